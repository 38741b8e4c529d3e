"""The experiments of Section 6 put together: what is asked of the generators, and which nodules meet which classifier.

The measures themselves are elsewhere (`fidelity`, `intensity`, `turing`, `classification`); here are only the choices
that several notebooks must share, so that they find each other's crops and runs in the cache:

- the test nodules of Tables 1 and 2, and what every system is asked to make of them;
- the synthetic pool of Table 3 and Figs. 7 and 8: places and shapes of *training* nodules, each with another training
  nodule's histogram of its subtype and size and a noise of its own.

Nodules are grouped by the patient of their shape, the unit of every interval and of every fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hrldm import paths
from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.nodules.manifest import UNIT
from hrldm.nodules.patches import Patches
from hrldm.train.device import device
from study.classify.jobs import (
    ClassifierData,
    Job,
    centre_crop,
    draw,
    malignancy_data,
    malignancy_jobs,
    scarcity_jobs,
    subtype_jobs,
)
from study.classify.runs import RunResult, run_jobs
from study.measure.intensity import power_spectrum
from study.measure.observers import Cases, out_of_fold_calls
from study.measure.statistics import Estimate
from study.study import Study
from study.systems.registry import request_for, synthesise

POOL_SEED, CROSS_SEED = 7, 3  # keep the requests of the pool and of the crossed control apart from all others


def shape_patients(frame: pd.DataFrame) -> np.ndarray:
    """(N,) patient that each nodule's shape comes from: `shape_patient_id` where the manifest has it, else the patient."""
    patients = frame.patient_id
    if UNIT in frame:
        patients = frame[UNIT].where(frame[UNIT].fillna("") != "", patients)
    return patients.astype(str).to_numpy()


# -- Tables 1 and 2 ----------------------------------------------------------------------------------------------------


def evaluation_nodules(study: Study) -> tuple[Patches, Patches]:
    """The nodules of Tables 1 and 2 and the same places without them, at most `n_synthetic`."""
    rows = slice(study.profile.tables.n_synthetic)
    return study.patches("test")[rows], study.backgrounds("test")[rows]


def crossed_request(
    study: Study, truth: Patches, background: Patches, n: int | None = None
) -> tuple[Patches, Request, np.ndarray]:
    """Nodules that keep their label and shape but are asked for the histogram of another subtype of their size.

    What comes shows whether the generator follows c_hist or reads the intensity off the label.

    Returns:
        the chosen nodules (`n`, default `ablation_n`), the request, and the subtype label (n,) of each histogram.
    """
    rng = np.random.default_rng((study.seed, CROSS_SEED))
    rows = np.sort(rng.permutation(len(truth))[: n or study.profile.ablation.n])
    chosen = truth[rows]
    asked = (chosen.subtype + rng.integers(1, len(SUBTYPES), len(rows))) % len(SUBTYPES)
    others = replace(background[rows], frame=chosen.frame.assign(subtype=np.array(SUBTYPES)[asked]))
    request = request_for(study, chosen, background[rows], "library", CROSS_SEED)
    return chosen, replace(request, histogram=study.library_histograms(others, CROSS_SEED)), asked


def centre_spectra(
    crops: Mapping[str, np.ndarray], masks: np.ndarray, side: int = 12, average: Callable = np.mean
) -> pd.DataFrame:
    """Power spectrum of the centre of the largest third of the lesions: system, cycles_per_mm, power_hu2.

    Small lesions are left out: a cube about them is mostly background, which is the same in every system.

    Args:
        crops: system -> (N, D, D, D) HU at 1 mm.
        masks: (N, D, D, D) bool.
        side: of the cube, voxels.
        average: over lesions; one of them can rule a mean, not a median.
    """
    volume = np.asarray(masks).reshape(len(masks), -1).sum(1)
    largest = np.argsort(-volume, kind="stable")[: max(1, len(volume) // 3)]
    parts = []
    for system, volumes in crops.items():
        spectra = [power_spectrum(cube) for cube in centre_crop(np.asarray(volumes)[largest], side)]
        power = average([power for _, power in spectra], axis=0)
        parts.append(pd.DataFrame({"system": system, "cycles_per_mm": spectra[0][0], "power_hu2": power}))
    return pd.concat(parts, ignore_index=True)


def difference_sentence(measure: str, first: str, second: str, e: Estimate, unit: str = "") -> str:
    """`first` minus `second` in words, where lower is better: value, 95 % interval, p, n, and who is closer to real."""
    if not np.isfinite(e.value):
        return f"{measure}, {first} minus {second}: not computed, too few patients."
    if e.ci_high < 0:
        verdict = f"{first} is closer"
    elif e.ci_low > 0:
        verdict = f"{second} is closer"
    else:
        verdict = "no difference seen, the interval holds zero"
    return (
        f"{measure}, {first} minus {second}: {e.value:+.3g}{unit and ' ' + unit} "
        f"(95 % interval {e.ci_low:+.3g} to {e.ci_high:+.3g}, p = {e.p:.2g}, n = {e.n}): {verdict}."
    )


def tight_spacing(masks: np.ndarray, side: int, margin: int = 2) -> np.ndarray:
    """(N,) mm that a voxel of `tight_crops` stands for: every lesion is enlarged by another factor."""
    found = [np.argwhere(mask) for mask in masks]
    return np.array([(np.ptp(f, axis=0).max() + 2 * margin) / (side - 1) for f in found])


def observer_calls(shown: Cases, seed: int, observer: str, folds: int = 5) -> pd.DataFrame:
    """Each case's out-of-fold call, as `turing_table` counts them: case (row in its side), truth, called.

    Raises:
        ValueError: no observer of that name.
    """
    truth, called = out_of_fold_calls(observer, shown, seed, folds, only=observer)
    words = np.array(["real", "synthetic"])
    case = np.concatenate([np.arange(len(shown.real)), np.arange(len(shown.synthetic))])
    return pd.DataFrame({"case": case, "truth": words[truth], "called": words[called[observer]]})


def printed_table1(table: pd.DataFrame, plane: str = "average") -> pd.DataFrame:
    """`table1_fidelity.csv`, ours or the paper's, in the units it is printed in: FID, KID x 1e3, MMD x 1e2 per system."""
    rows = table[table.plane == plane]
    wide = rows.pivot(index="system", columns="metric", values="value").loc[rows.system.unique()]
    named = {"fid": "FID", "kid": "KID x 1e3", "mmd": "MMD x 1e2"}
    return wide.mul({"fid": 1.0, "kid": 1e3, "mmd": 1e2}).rename(columns=named).rename_axis(columns=None)


# -- Table 3, Figs. 6-8 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Downstream:
    """What the classifiers of Sections 6.3-6.5 learn from and are tested on, crops of `cls_crop_mm`."""

    real: ClassifierData  # train + validation
    synthetic: ClassifierData
    test: ClassifierData
    real_ratings: np.ndarray  # (N,) the readers' malignancy, 1-5; NaN where there is none
    test_ratings: np.ndarray

    def counts(self) -> pd.DataFrame:
        """Nodules and patients of each subtype in the three sets."""
        parts = {"real (train + val)": self.real, "synthetic": self.synthetic, "test": self.test}
        rows = [[*np.bincount(d.labels, minlength=len(SUBTYPES)), len(np.unique(d.groups))] for d in parts.values()]
        return pd.DataFrame(rows, index=list(parts), columns=[*SUBTYPES, "patients"])

    def lacks_subtypes(self) -> str:
        """What cannot be had of subtypes that are absent from the real or the test nodules; "" where none is."""
        said = []
        for k, subtype in enumerate(SUBTYPES):
            if not (self.real.labels == k).any():
                said.append(f"**No {subtype} nodule to train on:** no classifier learns it, and none is synthesised.")
            if not (self.test.labels == k).any() or (self.test.labels == k).all():
                amount = "All test nodules are" if (self.test.labels == k).any() else "No test nodule is"
                said.append(f"**{amount} {subtype}:** its AUROC and AUPRC cannot be computed and are left empty.")
        return "\n\n".join(said)

    def lacks_malignancy(self, folds: int) -> str:
        """Why malignancy cannot be learnt in so many folds, or not be tested; "" where it can."""
        rated, test = malignancy_data(self.real, self.real_ratings), malignancy_data(self.test, self.test_ratings)
        for name, part in (("train on", rated), ("test on", test)):
            benign, malignant = np.bincount(part.labels, minlength=2)
            if not (benign and malignant):
                return (
                    f"**Left out: malignancy.** There are {benign} nodules rated benign (column `malignancy`, 1 or 2) and "
                    f"{malignant} rated malignant (4 or 5) to {name}; both are needed."
                )
        fewest = min(len(np.unique(rated.groups[rated.labels == k])) for k in (0, 1))
        if fewest < folds:
            return (
                f"**Left out: malignancy.** Its rarer class has nodules of {fewest} patients to train on; {folds} folds need "
                f"as many."
            )
        return ""


def pool_request(study: Study, per_subtype: int | None = None) -> tuple[Patches, Request]:
    """The synthetic pool: the same number of each subtype in the training split, from its places and shapes; and these.

    per_subtype: default as many as the largest subtype has in the training split, at most `n_synthetic`. Where a subtype
        has fewer nodules, they are used again with another histogram and another noise; where it has none, none is made.
    """
    train, background = study.patches("train"), study.backgrounds("train")
    counts = np.bincount(train.subtype, minlength=len(SUBTYPES))
    n = per_subtype or min(int(counts.max()), study.profile.tables.n_synthetic)
    rng = np.random.default_rng((study.seed, POOL_SEED))
    index = np.concatenate([draw(np.flatnonzero(train.subtype == k), n, rng) for k in np.flatnonzero(counts)])
    return train[index], request_for(study, train[index], background[index], "library", POOL_SEED)


def downstream_data(study: Study, system: str = "hr-ldm", per_subtype: int | None = None) -> Downstream:
    """Real, synthetic and test nodules for the classifiers; the synthetic ones are made once and kept on disk.

    Raises:
        ValueError: `cls_crop_mm` exceeds `patch_mm`; see `pool_request`.
    """
    p = study.profile
    if p.downstream.crop_mm > p.data.patch_mm:
        raise ValueError(
            f"cls_crop_mm {p.downstream.crop_mm} exceeds patch_mm {p.data.patch_mm}, the side of synthetic crops"
        )
    splits = [s for s in ("train", "val") if (study.frame.split == s).any()]
    real = [study.patches(s) for s in splits]
    test = study.patches("test")
    source, request = pool_request(study, per_subtype)
    made = synthesise(study, system, request, source)
    every = ClassifierData(
        *(
            np.concatenate(columns)
            for columns in zip(*(_columns(r, r.hu, p.downstream.crop_mm, False) for r in real), strict=True)
        )
    )
    return Downstream(
        real=every,
        synthetic=ClassifierData(*_columns(source, made, p.downstream.crop_mm, True)),
        test=ClassifierData(*_columns(test, test.hu, p.downstream.crop_mm, False)),
        real_ratings=np.concatenate([_ratings(r.frame) for r in real]),
        test_ratings=_ratings(test.frame),
    )


def _ratings(frame: pd.DataFrame) -> np.ndarray:
    return frame.reindex(columns=["malignancy"]).malignancy.to_numpy(float)


def subtype_runs(study: Study, data: Downstream) -> list[RunResult]:
    """Table 3 and Fig. 6: Real only and Real + Synth in every fold."""
    jobs = subtype_jobs(data.real, data.synthetic, study.profile, study.seed)
    return _run(study, jobs, data.real, data.synthetic, data.test)


def scarcity_runs(study: Study, data: Downstream) -> list[RunResult]:
    """Fig. 7: retention x arm."""
    jobs = scarcity_jobs(data.real, data.synthetic, study.profile, study.seed)
    return _run(study, jobs, data.real, data.synthetic, data.test)


def malignancy_runs(study: Study, data: Downstream) -> tuple[list[RunResult], ClassifierData]:
    """Fig. 8: malignant or benign from three initialisations, and the rated test nodules they are judged on.

    The two pre-trained initialisations are the runs of `subtype_runs`, trained now where they are not in the cache. No run
    where `Downstream.lacks_malignancy` says why.
    """
    rated, test = malignancy_data(data.real, data.real_ratings), malignancy_data(data.test, data.test_ratings)
    if data.lacks_malignancy(study.profile.downstream.folds):
        return [], test
    weights = {(run.arm, run.fold): run.weights for run in subtype_runs(study, data)}
    return _run(study, malignancy_jobs(rated, weights, study.profile, study.seed), rated, None, test), test


def run_overview(runs: list[RunResult]) -> pd.DataFrame:
    """One row a run: arm, retention, fold, training nodules, how many of them synthetic and different, chosen epoch."""
    rows = [
        (r.arm, r.retention, r.fold, r.n_real, r.n_synthetic, r.n_synthetic_unique, r.best_epoch, r.epochs)
        for r in runs
    ]
    columns = "arm retention fold n_real n_synthetic n_synthetic_unique best_epoch epochs".split()
    return pd.DataFrame(rows, columns=columns)


def _columns(patches: Patches, hu: np.ndarray, side: int, synthetic: bool) -> tuple[np.ndarray, ...]:
    frame = patches.frame
    fixed = np.full(len(frame), synthetic)
    return centre_crop(hu, side), patches.subtype, shape_patients(frame), frame.diameter_mm.to_numpy(float), fixed


def _run(
    study: Study, jobs: list[Job], real: ClassifierData, synthetic: ClassifierData | None, test: ClassifierData
) -> list[RunResult]:
    cache = paths.cache_dir() / "classifiers"
    return run_jobs(jobs, real, synthetic, test, study.profile, study.seed, cache, device=device())
