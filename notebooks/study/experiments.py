"""The experiments of Section 6 put together: what is asked of the generators, and which nodules meet which classifier.

The measures themselves are in `measure` and `classify`; here are only the choices that several notebooks must share, so
that they find each other's crops and runs in the cache:

- the test nodules of Tables 1 and 2, and what every system is asked to make of them;
- the synthetic pool of Table 3 and Figs. 7 and 8: shapes held out from the classifiers' real nodules, at random healthy
  places of the training scans, each with a training nodule's histogram of its subtype and size and a noise of its own.

Nodules are grouped by the patient of their shape, the unit of every interval and of every fold.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.nodules.augmentation import CUBE_SYMMETRIES, cube_symmetry
from hrldm.nodules.manifest import units
from hrldm.nodules.patches import Patches
from hrldm.paths import EMBEDDED
from hrldm.train.device import device
from study.classify.jobs import (
    ARMS,
    OURS,
    ClassifierData,
    Job,
    centre_crop,
    draw,
    malignancy_data,
    malignancy_jobs,
    patient_folds,
    scarcity_jobs,
    subtype_jobs,
)
from study.classify.runs import RunResult, run_jobs
from study.measure.border import border_table
from study.measure.intensity import power_spectrum
from study.measure.statistics import Estimate
from study.places import random_places, scans_of
from study.study import Study
from study.systems.registry import request_for, synthesise

SPECTRUM_SIDE = 12  # voxels of the cube whose power spectrum is taken
POOL_SEED, CROSS_SEED = 7, 3  # keep the requests of the pool and of the crossed control apart from all others


def shape_patients(frame: pd.DataFrame) -> np.ndarray:
    """(N,) patient that each nodule's shape comes from, see `units`."""
    return units(frame).astype(str).to_numpy()


# -- Tables 1 and 2 ----------------------------------------------------------------------------------------------------


def evaluation_nodules(study: Study) -> tuple[Patches, Patches]:
    """The nodules of Tables 1 and 2 and the same places without them (`Study.places`), at most `n_synthetic`."""
    rows = slice(study.profile.tables.n_synthetic)
    truth, background = study.places("test")
    return truth[rows], background[rows]


def crossed_request(study: Study, truth: Patches, background: Patches) -> tuple[Patches, Request, np.ndarray]:
    """Nodules that keep their label and shape but are asked for the histogram of another subtype of their size.

    What comes shows whether the generator follows c_hist or reads the intensity off the label.

    Returns:
        the chosen nodules (at most `ablation.n`), the request, and the subtype label (n,) of each histogram.
    """
    rng = np.random.default_rng((study.seed, CROSS_SEED))
    rows = np.sort(rng.permutation(len(truth))[: study.profile.ablation.n])
    chosen = truth[rows]
    asked = (chosen.subtype + rng.integers(1, len(SUBTYPES), len(rows))) % len(SUBTYPES)
    others = replace(background[rows], frame=chosen.frame.assign(subtype=np.array(SUBTYPES)[asked]))
    request = request_for(study, chosen, background[rows], "library", CROSS_SEED)
    return chosen, replace(request, histogram=study.library_histograms(others, CROSS_SEED)), asked


def centre_spectra(crops: Mapping[str, np.ndarray], masks: np.ndarray, average: Callable = np.mean) -> pd.DataFrame:
    """Power spectrum of the centre of the largest third of the lesions: system, cycles_per_mm, power_hu2.

    Small lesions are left out: a cube about them is mostly background, which is the same in every system.

    Args:
        crops: system -> (N, D, D, D) HU at 1 mm.
        masks: (N, D, D, D) bool.
        average: over lesions; one of them can rule a mean, not a median.
    """
    volume = np.asarray(masks).reshape(len(masks), -1).sum(1)
    largest = np.argsort(-volume, kind="stable")[: max(1, len(volume) // 3)]
    parts = []
    for system, volumes in crops.items():
        spectra = [power_spectrum(cube) for cube in centre_crop(volumes[largest], SPECTRUM_SIDE)]
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


def printed_table1(table: pd.DataFrame) -> pd.DataFrame:
    """`table1_fidelity.csv`, ours or the paper's, in the units it is printed in: FID, KID x 1e3, MMD x 1e2 per system."""
    rows = table[table.plane == "average"]
    wide = rows.pivot(index="system", columns="metric", values="value").loc[rows.system.unique()]
    named = {"fid": "FID", "fid_whole": "FID, whole sample", "kid": "KID x 1e3", "mmd": "MMD x 1e2"}
    wide = wide.mul({metric: {"kid": 1e3, "mmd": 1e2}.get(metric, 1.0) for metric in wide})
    return wide.rename(columns=named).rename_axis(columns=None)


# -- Table 3, Figs. 6-8 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Downstream:
    """What the classifiers of Sections 6.3-6.5 learn from and are tested on, crops of `downstream.crop_mm`."""

    real: ClassifierData  # train + validation without the patients who give shapes
    synthetic: dict[str, ClassifierData]  # of each system, from the same shapes in the same places
    test: ClassifierData
    rated: ClassifierData  # those of `real` whose malignancy the readers rated, with it as label
    rated_test: ClassifierData

    def counts(self) -> pd.DataFrame:
        """Nodules and patients of each subtype in the three sets."""
        parts = {"real (train + val)": self.real, **self.synthetic, "test": self.test}
        rows = [[*np.bincount(d.labels, minlength=len(SUBTYPES)), len(np.unique(d.groups))] for d in parts.values()]
        return pd.DataFrame(rows, index=list(parts), columns=[*SUBTYPES, "patients"])

    def border(self, n_boot: int, seed: int) -> pd.DataFrame:
        """`border.csv`: each system's nodules of the subtypes that all make against the real ones by what surrounds them, other
        scans judged than learned from; where all lie in one scan, other shapes."""
        made = {name: d for name, d in self.synthetic.items() if len(d)}
        shared = functools.reduce(np.intersect1d, (d.labels for d in made.values()))
        unit = "groups" if len(np.unique(self.real.places)) < 2 else "places"

        def side(whole: ClassifierData) -> tuple[np.ndarray, ...]:
            d = whole.take(np.isin(whole.labels, shared))
            return d.crops, d.masks, d.labels, getattr(d, unit)

        return border_table(side(self.real), {name: side(d) for name, d in made.items()}, n_boot, seed)

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
        for name, part in (("train on", self.rated), ("test on", self.rated_test)):
            benign, malignant = np.bincount(part.labels, minlength=2)
            if not (benign and malignant):
                return (
                    f"**Left out: malignancy.** There are {benign} nodules rated benign (column `malignancy`, 1 or 2) and "
                    f"{malignant} rated malignant (4 or 5) to {name}; both are needed."
                )
        fewest = min(len(np.unique(self.rated.groups[self.rated.labels == k])) for k in (0, 1))
        if fewest < folds:
            return (
                f"**Left out: malignancy.** Its rarer class has nodules of {fewest} patients to train on; "
                f"{folds} folds need as many."
            )
        return ""


def known_nodules(study: Study) -> tuple[Patches, np.ndarray]:
    """The nodules of train and validation, and (M, D, D, D) HU of their places without them."""
    splits = [s for s in ("train", "val") if (study.frame.split == s).any()]
    parts, behind = [study.patches(s) for s in splits], [study.backgrounds(s).hu for s in splits]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    hu, mask = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hu", "mask"))
    return Patches(hu, mask, frame), np.concatenate(behind)


def pool_request(
    study: Study, known: Patches, behind: np.ndarray, donors: np.ndarray, n: int
) -> tuple[Patches, Request, np.ndarray]:
    """The synthetic pool: `n` nodules of each subtype that the donors have, solid ones last.

    The shapes are the donors', each time turned or mirrored anew; the places are random ones of the training scans
    (`random_places`). Where a subtype has fewer donors than `n`, they are used again.

    Args:
        known, behind: see `known_nodules`.
        donors:        rows of `known` that give their shapes.

    Returns:
        the donors' nodules as turned, what is asked of the generators, and the scan of each place.
    """
    rng = np.random.default_rng((study.seed, POOL_SEED))
    pools = [donors[known.subtype[donors] == k] for k in range(len(SUBTYPES))]
    rows = np.concatenate([draw(pool, n, rng) for pool in reversed(pools) if len(pool)])
    turns = rng.integers(len(CUBE_SYMMETRIES), size=len(rows))
    hu, mask = (
        np.stack([cube_symmetry(array[i], t) for i, t in zip(rows, turns, strict=True)])
        for array in (known.hu, known.mask)
    )
    source = Patches(hu, mask, known.frame.iloc[rows].reset_index(drop=True))
    places, scans = random_places(mask, rows, known, behind, study.dataset == EMBEDDED, rng)
    request = request_for(study, source, Patches(places, mask, source.frame), "library", POOL_SEED)
    return source, request, scans


def downstream_data(study: Study) -> Downstream:
    """Real, synthetic and test nodules for the classifiers; the synthetic ones are made once and kept on disk.

    One patient in `downstream.shape_part` of train and validation gives shapes for synthesis, and no real nodule. HR-LDM makes
    all subtypes, the systems of the other arms of Table 3 those that are filled up. All get the same edge, that of `insert`:
    by the feather of the crops a classifier could tell them from real ones.

    Raises:
        ValueError: `downstream.crop_mm` exceeds `data.patch_mm`.
    """
    p = study.profile
    if p.downstream.crop_mm > p.data.patch_mm:
        raise ValueError(
            f"downstream.crop_mm {p.downstream.crop_mm} exceeds data.patch_mm {p.data.patch_mm}, the side of synthetic crops"
        )
    (known, behind), unseen = known_nodules(study), study.patches("test")
    everything, test = (_data(part, part.hu, p.downstream.crop_mm) for part in (known, unseen))
    kept, donors = patient_folds(everything, p.downstream.shape_part, study.seed)[0]
    real = everything.take(kept)
    most = max(
        np.bincount(real.labels[train]).max() for train, _ in patient_folds(real, p.downstream.folds, study.seed)
    )
    source, request, scans = pool_request(study, known, behind, donors, int(most))
    synthetic = {}
    for system in dict.fromkeys(recipe.system for recipe in ARMS.values() if recipe.system):
        rows = np.flatnonzero((source.subtype != np.bincount(real.labels).argmax()) | (system == OURS))
        if len(rows):
            made = synthesise(study, system, request[rows], source[rows], edge=True)
            synthetic[system] = _data(source[rows], made, p.downstream.crop_mm, system, scans[rows])
        else:  # nothing is to be filled up
            synthetic[system] = synthetic[OURS].take(rows)
    ratings = [part.frame.reindex(columns=["malignancy"]).malignancy.to_numpy() for part in (known, unseen)]
    rated, rated_test = malignancy_data(real, ratings[0][kept]), malignancy_data(test, ratings[1])
    return Downstream(real, synthetic, test, rated, rated_test)


def _data(
    nodules: Patches, hu: np.ndarray, side: int, source: str = "", scans: np.ndarray | None = None
) -> ClassifierData:
    crops, masks = centre_crop(hu, side), centre_crop(nodules.mask, side)
    scans = scans_of(nodules.frame) if scans is None else scans
    columns = (nodules.subtype, shape_patients(nodules.frame), scans, nodules.frame.diameter_mm.to_numpy(float))
    return ClassifierData(crops, masks, *columns, np.full(len(nodules), source, object))


def subtype_runs(study: Study, data: Downstream) -> list[RunResult]:
    """Table 3 and Fig. 6: Real only and Real + Synth in every fold, the other arms in some."""
    jobs = subtype_jobs(data.real, data.synthetic, study.profile, study.seed)
    return _run(study, jobs, data.real, data.synthetic, data.test)


def scarcity_runs(study: Study, data: Downstream) -> list[RunResult]:
    """Fig. 7: retention x arm."""
    jobs = scarcity_jobs(data.real, data.synthetic, study.profile, study.seed)
    return _run(study, jobs, data.real, data.synthetic, data.test)


def malignancy_runs(study: Study, data: Downstream) -> list[RunResult]:
    """Fig. 8: malignant or benign from three initialisations, judged on the rated test nodules.

    The two pre-trained initialisations are the runs of `subtype_runs`, trained now where they are not in the cache. No run
    where `Downstream.lacks_malignancy` says why.
    """
    if data.lacks_malignancy(study.profile.downstream.folds):
        return []
    weights = {(run.arm, run.fold): run.weights for run in subtype_runs(study, data)}
    jobs = malignancy_jobs(data.rated, weights, study.profile, study.seed)
    return _run(study, jobs, data.rated, {}, data.rated_test)


def run_overview(runs: list[RunResult]) -> pd.DataFrame:
    """One row a run: arm, retention, fold, training nodules, how many of them synthetic and different, chosen epoch."""
    columns = "arm retention fold n_real n_synthetic n_synthetic_unique best_epoch epochs".split()
    return pd.DataFrame([[getattr(r, c) for c in columns] for r in runs], columns=columns)


def run_curves(runs: list[RunResult]) -> pd.DataFrame:
    """Training and validation loss of every epoch: arm, retention, fold, epoch, train_loss, val_loss."""
    parts = [pd.DataFrame(r.history).assign(arm=r.arm, retention=r.retention, fold=r.fold) for r in runs if r.history]
    columns = "arm retention fold epoch train_loss val_loss".split()
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _run(
    study: Study, jobs: list[Job], real: ClassifierData, synthetic: dict[str, ClassifierData], test: ClassifierData
) -> list[RunResult]:
    return run_jobs(jobs, real, synthetic, test, study.profile, study.seed, device=device())
