"""Table 2 with a *model observer*: a cross-validated classifier calls crops real or synthetic. It is no human reader.

Two conditions as in Section 6.2: `cropped` shows the nodule alone, cut tight and enlarged (:func:`tight_crops`), and
`full_context` the surrounding lung as well. The observer sees deep features averaged over slices and planes and a few
HU statistics of the crop. Every call is out of fold, folds split by patient, so that it never judges a patient it
learned from; with as many real as synthetic cases, 50 % is chance. Unlike a radiologist it is trained on the very
difference it is asked for, so its accuracy is an upper bound to be read as "a difference exists".
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from study.measure.statistics import wilson_interval

CONDITIONS = ("cropped", "full_context")
COLUMNS = "observer condition truth called_real called_synthetic".split()
WORDS = ("real", "synthetic")  # labels 0 and 1
OBSERVERS = {  # on principal components of the standardised features
    "model observer (logistic)": LogisticRegression(C=0.1, max_iter=1000),
    "model observer (boosting)": HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=8, min_samples_leaf=5),
}
COMPONENTS = 50
MARGIN = 2  # voxels around the lesion in `cropped`


@dataclass(frozen=True)
class Cases:
    """What is to be told apart: features (N, F) of real and of synthetic cases and the patient (N,) of each.

    Raises:
        ValueError: sizes that do not fit.
    """

    real: np.ndarray
    synthetic: np.ndarray
    groups_real: np.ndarray
    groups_synthetic: np.ndarray

    def __post_init__(self) -> None:
        pairs = ((self.real, self.groups_real), (self.synthetic, self.groups_synthetic))
        if any(len(x) != len(g) for x, g in pairs) or np.shape(self.real)[1:] != np.shape(self.synthetic)[1:]:
            raise ValueError("features and groups of the two sides do not fit each other")

    def by_patient(self, seed: int, folds: int = 5) -> dict:
        """Arguments of scikit-learn's `cross_val_predict`: X, y (0 real, 1 synthetic, the real ones first), groups, cv.

        folds: fewer where there are fewer patients.

        Raises:
            ValueError: fewer than two patients.
        """
        groups = np.concatenate([self.groups_real, self.groups_synthetic])
        patients = np.unique(groups).size
        if patients < 2:
            raise ValueError("real and synthetic are told apart by patient, and that needs at least two patients")
        return {
            "X": np.concatenate([self.real, self.synthetic]).astype(float),
            "y": np.repeat([0, 1], [len(self.real), len(self.synthetic)]),
            "groups": groups,
            "cv": StratifiedGroupKFold(min(folds, patients), shuffle=True, random_state=seed),
        }


def tight_crops(crops_hu: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Condition `cropped`: the cube about each lesion's mask and a margin, enlarged to the side of the crop.

    Args:
        crops_hu: (N, D, D, D) HU.
        masks: (N, D, D, D) bool, none empty.

    Returns:
        (N, D, D, D) float32 HU, trilinear.

    Raises:
        ValueError: an empty mask.
    """
    out = np.empty(np.shape(crops_hu), dtype=np.float32)
    for i, (crop, mask) in enumerate(zip(crops_hu, masks, strict=True)):
        found = np.argwhere(mask)
        if not found.size:
            raise ValueError(f"case {i}: the mask is empty in its crop")
        low, high = found.min(0), found.max(0)
        half = (high - low).max() / 2 + MARGIN
        # positions of the output voxels; beyond the crop its border value repeats
        axes = [np.linspace(c - half, c + half, len(crop)) for c in (low + high) / 2]
        grid = np.meshgrid(*axes, indexing="ij")
        out[i] = ndimage.map_coordinates(np.asarray(crop, np.float32), grid, order=1, mode="nearest")
    return out


def tight_spacing(masks: np.ndarray) -> np.ndarray:
    """(N,) mm that a voxel of `tight_crops` stands for: every lesion is enlarged by another factor."""
    spans = [np.ptp(np.argwhere(mask), axis=0).max() for mask in masks]
    return np.array([(span + 2 * MARGIN) / (masks.shape[1] - 1) for span in spans])


def crop_statistics(crops_hu: np.ndarray) -> np.ndarray:
    """HU statistics (N, 9) of the central cube, half as wide, of each crop (N, D, D, D).

    Mean, SD, percentiles 5, 25, 50, 75 and 95, mean gradient magnitude (HU per voxel) and mean absolute Laplacian
    (sharpness, noise).
    """
    side = crops_hu.shape[1] // 2
    cubes = crops_hu[(slice(None), *[slice(side // 2, side // 2 + side)] * 3)].astype(float)
    flat = cubes.reshape(len(cubes), -1)
    gradient = np.sqrt(sum(g**2 for g in np.gradient(cubes, axis=(1, 2, 3)))).reshape(len(cubes), -1).mean(1)
    sharp = [np.abs(ndimage.laplace(cube)).mean() for cube in cubes]
    percentiles = np.percentile(flat, [5, 25, 50, 75, 95], axis=1)
    return np.column_stack([flat.mean(1), flat.std(1), *percentiles, gradient, sharp])


def case_features(features: dict[str, np.ndarray], *more: np.ndarray) -> np.ndarray:
    """Features {plane: (N, S, F)} averaged over slices, planes side by side, then `more` (N, k): (N, 3F + k)."""
    return np.column_stack([*(f.mean(axis=1) for f in features.values()), *more])


def observer_calls(shown: Cases, seed: int, observer: str, folds: int = 5) -> pd.DataFrame:
    """Each case's out-of-fold call by one of `OBSERVERS`: case (row in its side), truth, called.

    Raises:
        ValueError: no observer of that name, or fewer than two patients.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"no observer {observer!r}; choose one of {', '.join(OBSERVERS)}")
    told = shown.by_patient(seed, folds)
    smallest = min(len(train) for train, _ in told["cv"].split(told["X"], told["y"], told["groups"]))
    components = PCA(min(COMPONENTS, smallest - 1, told["X"].shape[1]), random_state=seed)
    model = make_pipeline(StandardScaler(), components, clone(OBSERVERS[observer]).set_params(random_state=seed))
    case = np.concatenate([np.arange(len(shown.real)), np.arange(len(shown.synthetic))])
    truth, called = (np.array(WORDS)[labels] for labels in (told["y"], cross_val_predict(model, **told)))
    return pd.DataFrame({"case": case, "truth": truth, "called": called})


def turing_table(cases: dict[str, Cases], seed: int, folds: int = 5) -> pd.DataFrame:
    """`table2_turing.csv` of the model observers: observer, condition, truth, called_real, called_synthetic.

    Args:
        cases: condition -> what is shown.
        folds: cross-validation folds by patient, fewer where there are fewer patients.

    Raises:
        ValueError: unknown condition, or fewer than two patients.
    """
    if unknown := set(cases) - set(CONDITIONS):
        raise ValueError(f"unknown condition {sorted(unknown)}; choose among {', '.join(CONDITIONS)}")
    rows = []
    for condition, shown in cases.items():
        for observer in OBSERVERS:
            calls = observer_calls(shown, seed, observer, folds)
            for truth in WORDS:
                called = calls.called[calls.truth == truth]
                rows.append((observer, condition, truth, *(int((called == word).sum()) for word in WORDS)))
    return pd.DataFrame(rows, columns=COLUMNS)


def accuracy_table(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with its 95 % Wilson interval from counts as in Table 2, a radiologist's or a model's.

    Returns:
        observer, condition, quantity (accuracy; sensitivity_real, sensitivity_synthetic: share called rightly;
        fooled: share of synthetic called real), value, ci_low, ci_high, n.

    Raises:
        ValueError: a condition without exactly one row per truth.
    """
    rows = []
    for (observer, condition), part in table.groupby(["observer", "condition"], sort=False):
        counts = part.set_index("truth")[["called_real", "called_synthetic"]]
        if sorted(counts.index) != list(WORDS):
            raise ValueError(f"{observer}, {condition}: needs one row for truth real and one for synthetic")
        (real, suspected), (fooled, found) = counts.loc[list(WORDS)].astype(int).to_numpy().tolist()
        quantities = {
            "accuracy": (real + found, real + suspected + fooled + found),
            "sensitivity_real": (real, real + suspected),
            "sensitivity_synthetic": (found, fooled + found),
            "fooled": (fooled, fooled + found),
        }
        for quantity, (count, n) in quantities.items():
            rows.append((observer, condition, quantity, count / n, *wilson_interval(count, n), n))
    return pd.DataFrame(rows, columns="observer condition quantity value ci_low ci_high n".split())
