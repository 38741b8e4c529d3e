"""Which nodules train, select and start each downstream classifier of Sections 6.3-6.5 (Table 3, Figs. 7 and 8).

A `Job` names the real and the synthetic nodules that train one classifier, the real ones that select its epoch, and where
its weights start; what its arm is, `ARMS` says. Folds are made by patient: four fifths train, one selects. Two rules the
paper leaves open:

- a synthetic nodule with the shape or in the scan of a patient of the validation fold does not train in that fold;
- where fewer synthetic nodules exist than the balance asks for they are reused in turn (augmentation makes them
  differ); `RunResult.n_synthetic` and `n_synthetic_unique` say how often.

With `downstream.equal_updates` an epoch is one pass over as many nodules as the fold's real training set holds, for every
arm; with the paper's plain epochs a balanced arm gets twice the updates, and one with 10 % of the data a tenth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from hrldm.cache import digest
from hrldm.config import SUBTYPES
from study.profiles import Profile

logger = logging.getLogger(__name__)
REAL_ONLY, REAL_SYNTH = "Real only", "Real + Synth"  # Table 3
DIAMETER, MEAN_HU = "Diameter alone", "Mean HU alone"  # what no network is needed for
CLINICAL, PROPORTIONAL, FULL = "Clinical (n%)", "Clinical (n%) + Synth (n%)", "Clinical (n%) + Synth (100%)"  # Fig. 7
SCRATCH, IMBALANCED, BALANCED = "scratch", "subtype-imbalanced", "subtype-balanced"  # Fig. 8
NOTHING = np.empty(0, int)
OURS = "hr-ldm"


@dataclass(frozen=True)
class Recipe:
    """What an arm trains on besides the fold's real nodules, and how. Every run's file holds the one it was trained by."""

    system: str = ""  # of `study.systems.registry.SYSTEMS`, whose nodules fill the subtypes up
    oversampled: bool = False  # the real nodules of the rarer subtypes are repeated until all are as many
    class_weights: bool = False  # in the loss
    strong: bool = False  # augmentation, see `train.STRONG`
    start: str = ""  # the arm whose classifier lends its weights
    rule: str = ""  # logistic regression on this column of `ClassifierData` and no network


RULES = {DIAMETER: Recipe(rule="log_diameter"), MEAN_HU: Recipe(rule="mean_hu")}
BESIDE = {  # our arms beside the two of Table 3
    "Oversampling": Recipe(oversampled=True),
    "Class weights": Recipe(class_weights=True),
    "Strong augmentation": Recipe(strong=True),
    "Real + texture": Recipe("texture"),
    "Real + transplant": Recipe("transplant"),
    "Real + maisi-ddpm": Recipe("maisi-ddpm"),  # lambda = 0
}
FIG7, FIG8 = (CLINICAL, PROPORTIONAL, FULL, *RULES), (SCRATCH, IMBALANCED, BALANCED, *RULES)
ARMS = {
    **{arm: Recipe() for arm in (REAL_ONLY, CLINICAL, SCRATCH)},
    **{arm: Recipe(OURS) for arm in (REAL_SYNTH, PROPORTIONAL, FULL)},
    IMBALANCED: Recipe(start=REAL_ONLY),
    BALANCED: Recipe(start=REAL_SYNTH),
    **BESIDE,
    **RULES,
}


class Stream(IntEnum):
    """What is drawn: each from a generator of its own, seeded by (seed, fold, stream)."""

    FILL = 1  # the synthetic nodules that fill the subtypes up
    WHOLE = 2  # the whole synthetic set of Fig. 7
    CLINICAL = 3  # the share of the real nodules that is kept
    PART = 4  # the share of the synthetic set that is kept
    TRAINING = 5  # a classifier's first weights and batches


@dataclass(frozen=True)
class ClassifierData:
    """Nodule crops for a classifier.

    Raises:
        ValueError: columns of different length, crops that are no cubes, NaN in the crops.
    """

    crops: np.ndarray  # (N, D, D, D) HU at 1 mm, any real dtype
    masks: np.ndarray  # (N, D, D, D) bool
    labels: np.ndarray  # (N,) int: subtype 0, 1, 2 or benign, malignant
    groups: np.ndarray  # (N,) patient of the nodule's shape
    places: np.ndarray  # (N,) the scan, or the part of one, that it lies in
    diameters: np.ndarray  # (N,) mm
    source: np.ndarray  # (N,) the system that made it; "" real

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of classifier data differ in length: {lengths}")
        if self.crops.ndim != 4 or len(set(self.crops.shape[1:])) != 1 or self.masks.shape != self.crops.shape:
            raise ValueError(
                f"classifier crops and masks must be (N, D, D, D), not {self.crops.shape}, {self.masks.shape}"
            )
        if np.issubdtype(self.crops.dtype, np.floating) and np.isnan(self.crops).any():
            raise ValueError(f"{int(np.isnan(self.crops).any((1, 2, 3)).sum())} classifier crop(s) hold NaN")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> ClassifierData:
        """The chosen rows (indices or mask)."""
        return ClassifierData(*(np.asarray(getattr(self, name))[index] for name in self.__dataclass_fields__))

    @property
    def log_diameter(self) -> np.ndarray:
        return np.log(self.diameters)

    @property
    def mean_hu(self) -> np.ndarray:
        return np.array([crop[mask].mean() for crop, mask in zip(self.crops, self.masks, strict=True)])

    def digest(self) -> str:
        """Hash of what a training can depend on, and of who made it."""
        return digest(self.crops, self.labels, self.source.tolist())


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
    n_classes: int = len(SUBTYPES)
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
    possible = min(patients, int(np.unique(data.labels, return_counts=True)[1].max()))
    if possible < n_folds:
        logger.warning("%d folds instead of %d: there are no more patients to train on", possible, n_folds)
        n_folds = max(possible, 2)
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
    return np.concatenate([NOTHING, *passes])[:n]


def retain(labels: np.ndarray, index: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A share of `index`, taken within each label; with one generator state smaller shares lie within larger ones."""
    kept = []
    for label in np.unique(labels[index]):
        members = rng.permutation(index[labels[index] == label])
        kept.append(members[: int(np.ceil(round(fraction * len(members), 9)))])
    return np.sort(np.concatenate(kept))


def subtype_jobs(
    real: ClassifierData, synthetic: Mapping[str, ClassifierData], profile: Profile, seed: int
) -> list[Job]:
    """Table 3: each fold with its real nodules only, and with all subtypes filled up to the largest by synthetic ones; the arms
    of `BESIDE` in the first `downstream.beside_folds`. All systems add the same shapes in the same places.

    A subtype without synthetic nodules stays as it is; `RunResult.n_synthetic` says how many were added.
    """
    jobs = []
    for fold, train, val, steps in _folds(real, profile, seed):
        arms = [REAL_ONLY, REAL_SYNTH, *RULES, *(BESIDE if fold < profile.downstream.beside_folds else ())]
        counts = np.bincount(real.labels[train], minlength=len(SUBTYPES))
        missing = np.where(counts > 0, counts.max() - counts, 0)
        for arm in arms:
            own, more = train, NOTHING
            rng = np.random.default_rng((seed, fold, Stream.FILL))
            if ARMS[arm].system:
                more = _drawn(real, synthetic[ARMS[arm].system], train, val, missing, rng)
            elif ARMS[arm].oversampled:
                pools = [train[real.labels[train] == k] for k in range(len(SUBTYPES))]
                own = np.concatenate([train, *(draw(pool, n, rng) for pool, n in zip(pools, missing, strict=True))])
            jobs.append(Job(arm, fold, own, more, val, steps=steps))
    return jobs


def scarcity_jobs(
    real: ClassifierData, synthetic: Mapping[str, ClassifierData], profile: Profile, seed: int
) -> list[Job]:
    """Fig. 7: retention x arm. The whole synthetic set (Synth 100 %) has as many of each subtype as the fold's largest.

    Retained subsets are nested and stratified by subtype; the validation fold stays whole in every cell. With nothing
    retained only Clinical (0%) + Synth (100%) can be trained: the other arms have no job there.
    """
    jobs, made = [], synthetic[OURS]
    for fold, train, val, steps in list(_folds(real, profile, seed))[: profile.downstream.scarcity_folds]:
        most = [np.bincount(real.labels[train]).max()] * len(SUBTYPES)
        whole = _drawn(real, made, train, val, most, np.random.default_rng((seed, fold, Stream.WHOLE)))
        for share in profile.downstream.retention:
            clinical = retain(real.labels, train, share, np.random.default_rng((seed, fold, Stream.CLINICAL)))
            rng = np.random.default_rng((seed, fold, Stream.PART))
            part = whole[retain(made.labels[whole], np.arange(len(whole)), share, rng)]
            arms = {CLINICAL: NOTHING, PROPORTIONAL: part, **dict.fromkeys(RULES, NOTHING)} if share > 0 else {}
            for arm, added in (arms | {FULL: whole}).items():
                if len(clinical) + len(added) > 1:  # one nodule trains nothing
                    jobs.append(Job(arm, fold, clinical, np.sort(added), val, share, steps=steps))
    return jobs


def malignancy_jobs(
    real: ClassifierData, weights: Mapping[tuple[str, int], Path], profile: Profile, seed: int
) -> list[Job]:
    """Fig. 8: malignant or benign from three initialisations, each fold from the subtype run of the same number.

    `real` holds malignancy labels (see `malignancy_data`); `weights` are the files of the subtype runs by (arm, fold):
    ``{(run.arm, run.fold): run.weights for run in runs}``.

    Raises:
        ValueError: a subtype run that is not among `weights`.
    """
    jobs = []
    for fold, train, val, steps in _folds(real, profile, seed):
        for arm in FIG8:
            source = ARMS[arm].start
            if source and (source, fold) not in weights:
                raise ValueError(f"no subtype run {source!r} of fold {fold}; run the jobs of `subtype_jobs` first")
            init = weights.get((source, fold))
            if arm == BALANCED and init == weights[REAL_ONLY, fold]:  # nothing was there to add: one run, no second arm
                continue
            jobs.append(Job(arm, fold, train, NOTHING, val, n_classes=2, steps=steps, init=init))
    return jobs


def _folds(
    real: ClassifierData, profile: Profile, seed: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, int | None]]:
    """Each fold's number, training and validation indices, and updates per epoch."""
    for fold, (train, val) in enumerate(patient_folds(real, profile.downstream.folds, seed)):
        equal = max(1, -(-len(train) // profile.classifier.batch))
        yield fold, train, val, equal if profile.downstream.equal_updates else None


def _drawn(
    real: ClassifierData,
    synthetic: ClassifierData,
    train: np.ndarray,
    validation: np.ndarray,
    wanted: Sequence[int],
    rng: np.random.Generator,
) -> np.ndarray:
    """So many synthetic nodules of each subtype that has any, of those that owe nothing to the validation fold."""
    # lidc-mini has one place for all: it is of the training fold too
    foreign = np.setdiff1d(real.places[validation], real.places[train])
    usable = ~np.isin(synthetic.groups, real.groups[validation]) & ~np.isin(synthetic.places, foreign)
    pools = [np.flatnonzero(usable & (synthetic.labels == k)) for k in range(len(SUBTYPES))]
    drawn = [draw(pool, n, rng) for pool, n in zip(pools, wanted, strict=True) if len(pool)]
    return np.concatenate([NOTHING, *drawn])
