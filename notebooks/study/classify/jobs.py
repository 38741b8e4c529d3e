"""Which nodules train, select and start each downstream classifier of Sections 6.3-6.5 (Table 3, Figs. 7 and 8).

A `Job` names the real and the synthetic nodules that train one DenseNet, the real ones that select its epoch, and where
its weights start. Folds are made by patient on train + validation. Two rules the paper leaves open:

- a synthetic nodule whose shape comes from a patient of the validation fold does not train in that fold;
- where fewer synthetic nodules exist than the balance asks for they are reused in turn (augmentation makes them
  differ); `RunResult.n_synthetic` and `n_synthetic_unique` say how often.

With `equal_steps` (default) an epoch is one pass over as many nodules as the fold's real training set holds, for every
arm: otherwise a balanced arm also gets twice the updates, and one with 10 % of the data a tenth. False = the paper's
plain epochs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from study.profiles import Profile

logger = logging.getLogger(__name__)
REAL_ONLY, REAL_SYNTH = "Real only", "Real + Synth"  # Table 3
CLINICAL, PROPORTIONAL, FULL = "Clinical (n%)", "Clinical (n%) + Synth (n%)", "Clinical (n%) + Synth (100%)"  # Fig. 7
SCRATCH, IMBALANCED, BALANCED = "scratch", "subtype-imbalanced", "subtype-balanced"  # Fig. 8
N_SUBTYPES = 3


@dataclass(frozen=True)
class ClassifierData:
    """Nodule crops for a classifier.

    Raises:
        ValueError: columns of different length, crops that are no cubes, NaN in the crops.
    """

    crops: np.ndarray  # (N, D, D, D) HU at 1 mm, any real dtype
    labels: np.ndarray  # (N,) int: subtype 0, 1, 2 or benign, malignant
    groups: np.ndarray  # (N,) patient of the nodule's shape
    diameters: np.ndarray  # (N,) mm
    is_synthetic: np.ndarray  # (N,) bool

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of classifier data differ in length: {lengths}")
        if self.crops.ndim != 4 or len(set(self.crops.shape[1:])) != 1:
            raise ValueError(f"classifier crops must be (N, D, D, D), not {self.crops.shape}")
        if np.issubdtype(self.crops.dtype, np.floating) and np.isnan(self.crops).any():
            raise ValueError(f"{int(np.isnan(self.crops).any((1, 2, 3)).sum())} classifier crop(s) hold NaN")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> ClassifierData:
        """The chosen rows (indices or mask)."""
        return ClassifierData(*(np.asarray(getattr(self, name))[index] for name in self.__dataclass_fields__))

    def digest(self) -> str:
        """Hash of what a training can depend on."""
        h = hashlib.blake2b(digest_size=16)
        for a in (self.crops, self.labels):
            h.update(f"{a.shape}{a.dtype}".encode() + np.ascontiguousarray(a).data)
        return h.hexdigest()


def centre_crop(crops: np.ndarray, side: int) -> np.ndarray:
    """Crops (N, D, D, D) -> (N, side, side, side) about their centre voxel D // 2.

    Raises:
        ValueError: the crops are smaller than `side`.
    """
    if crops.shape[1] < side:
        raise ValueError(f"crops of {crops.shape[1]} voxels are smaller than `downstream.crop_mm` = {side}")
    first = crops.shape[1] // 2 - side // 2
    inner = slice(first, first + side)
    return crops[:, inner, inner, inner]


def malignancy_data(data: ClassifierData, ratings: np.ndarray) -> ClassifierData:
    """Nodules rated malignant (>= 4, label 1) or benign (<= 2, label 0) by the readers; those between are left out."""
    ratings = np.asarray(ratings, float)
    kept = (ratings >= 4) | (ratings <= 2)
    return replace(data, labels=(ratings >= 4).astype(np.int64)).take(kept)


@dataclass(frozen=True)
class Job:
    """One training. Indices point into the real (train + validation) and the synthetic data."""

    arm: str
    fold: int
    real: np.ndarray
    synthetic: np.ndarray
    validation: np.ndarray
    retention: float = 1.0
    n_classes: int = N_SUBTYPES
    steps: int | None = None  # updates per epoch, None = one pass
    init: Path | None = None  # finished run whose weights to start from


def patient_folds(data: ClassifierData, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, validation) indices of each fold: stratified by label, no patient on both sides. Where there are fewer
    patients than folds, each is a fold, and a warning says so.

    Raises:
        ValueError: a single patient.
    """
    patients = len(np.unique(data.groups))
    if patients < 2:
        raise ValueError("all nodules to train on are of one patient; a fold to validate needs another")
    if patients < n_folds:
        logger.warning("%d folds instead of %d: there are no more patients to train on", patients, n_folds)
        n_folds = patients
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(data)), data.labels, data.groups))


def draw(pool: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` members of `pool`: none twice before all were taken once.

    Raises:
        ValueError: the pool is empty and something is asked of it.
    """
    if n > 0 and len(pool) == 0:
        raise ValueError(f"{n} synthetic nodules are needed of a subtype of which none exists; synthesise some first")
    passes = [rng.permutation(pool) for _ in range(-(-n // max(len(pool), 1)))]
    return np.concatenate(passes)[:n] if passes else np.empty(0, int)


def retain(labels: np.ndarray, index: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A share of `index`, taken within each label; with one generator state smaller shares lie within larger ones."""
    kept = []
    for label in np.unique(labels[index]):
        members = rng.permutation(index[labels[index] == label])
        kept.append(members[: int(np.ceil(round(fraction * len(members), 9)))])
    return np.sort(np.concatenate(kept))


def subtype_jobs(
    real: ClassifierData, synthetic: ClassifierData, profile: Profile, seed: int, equal_steps: bool = True
) -> list[Job]:
    """Table 3: each fold with its real nodules only, and with all subtypes filled up to the largest by synthetic.

    A subtype without synthetic nodules stays as it is; `RunResult.n_synthetic` says how many were added.
    """
    jobs = []
    for fold, (train, val) in enumerate(patient_folds(real, profile.downstream.folds, seed)):
        pools = _pools(real, synthetic, val)
        counts = np.bincount(real.labels[train], minlength=N_SUBTYPES)
        rng = np.random.default_rng((seed, fold, 1))
        fill = _drawn(pools, counts.max() - counts, rng)
        steps = _steps(len(train), profile) if equal_steps else None
        jobs.append(Job(REAL_ONLY, fold, train, np.empty(0, int), val, steps=steps))
        jobs.append(Job(REAL_SYNTH, fold, train, fill, val, steps=steps))
    return jobs


def scarcity_jobs(
    real: ClassifierData, synthetic: ClassifierData, profile: Profile, seed: int, equal_steps: bool = True
) -> list[Job]:
    """Fig. 7: retention x arm. The whole synthetic set (Synth 100 %) has as many of each subtype as the fold's largest.

    Retained subsets are nested and stratified by subtype; the validation fold stays whole in every cell. With nothing
    retained only Clinical (0%) + Synth (100%) can be trained: the other two arms have no job there.
    """
    jobs = []
    for fold, (train, val) in enumerate(
        patient_folds(real, profile.downstream.folds, seed)[: profile.downstream.scarcity_folds]
    ):
        pools = _pools(real, synthetic, val)
        most = np.bincount(real.labels[train]).max()
        rng = np.random.default_rng((seed, fold, 2))
        whole = _drawn(pools, [most] * N_SUBTYPES, rng)
        whole_labels = synthetic.labels[whole]
        steps = _steps(len(train), profile) if equal_steps else None
        for share in profile.downstream.retention:
            clinical = retain(real.labels, train, share, np.random.default_rng((seed, fold, 3)))
            part = whole[retain(whole_labels, np.arange(len(whole)), share, np.random.default_rng((seed, fold, 4)))]
            arms = {CLINICAL: part[:0], PROPORTIONAL: part} if share > 0 else {}
            for arm, added in (arms | {FULL: np.sort(whole)}).items():
                if len(clinical) + len(added) > 1:  # one nodule trains nothing
                    jobs.append(Job(arm, fold, clinical, np.sort(added), val, share, steps=steps))
    return jobs


def malignancy_jobs(
    real: ClassifierData, weights: Mapping[tuple[str, int], Path], profile: Profile, seed: int, equal_steps: bool = True
) -> list[Job]:
    """Fig. 8: malignant or benign from three initialisations, each fold from the subtype run of the same number.

    `real` holds malignancy labels (see `malignancy_data`); `weights` are the files of the subtype runs by (arm, fold):
    ``{(run.arm, run.fold): run.weights for run in runs}``.
    """
    jobs = []
    for fold, (train, val) in enumerate(patient_folds(real, profile.downstream.folds, seed)):
        steps = _steps(len(train), profile) if equal_steps else None
        for arm, source in ((SCRATCH, None), (IMBALANCED, REAL_ONLY), (BALANCED, REAL_SYNTH)):
            if source is not None and (source, fold) not in weights:
                raise ValueError(f"no subtype run {source!r} of fold {fold}; run the jobs of `subtype_jobs` first")
            init = weights.get((source, fold))
            jobs.append(Job(arm, fold, train, np.empty(0, int), val, n_classes=2, steps=steps, init=init))
    return jobs


def _pools(real: ClassifierData, synthetic: ClassifierData, validation: np.ndarray) -> list[np.ndarray]:
    """Indices of the synthetic nodules of each subtype that owe nothing to the validation fold."""
    usable = ~np.isin(synthetic.groups, real.groups[validation])
    return [np.flatnonzero(usable & (synthetic.labels == k)) for k in range(N_SUBTYPES)]


def _drawn(pools: list[np.ndarray], wanted: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """So many of each pool that is not empty, one after the other."""
    drawn = [draw(pool, n, rng) for pool, n in zip(pools, wanted, strict=True) if len(pool)]
    return np.concatenate([np.empty(0, int), *drawn])


def _steps(n: int, profile: Profile) -> int:
    return max(1, -(-n // profile.classifier.batch))
