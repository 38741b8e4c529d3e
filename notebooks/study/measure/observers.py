"""Table 2 with a *model observer*: a cross-validated classifier calls crops real or synthetic. It is no human reader.

Two conditions as in Section 6.2: `cropped` shows the nodule alone, cut tight and enlarged (:func:`tight_crops`), and
`full_context` the surrounding lung as well. The observer sees deep features averaged over slices and planes and a few
HU statistics of the crop. Every call is out of fold, folds split by patient, so that it never judges a patient it
learned from; with as many real as synthetic cases, 50 % is chance. Unlike a radiologist it is trained on the very
difference it is asked for, so its accuracy is an upper bound to be read as "a difference exists".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from study.measure.statistics import wilson_interval

CONDITIONS = ("cropped", "full_context")
COLUMNS = "observer condition truth called_real called_synthetic".split()
STATISTICS = ("mean", "sd", "p5", "p25", "p50", "p75", "p95", "gradient", "laplacian")


@dataclass(frozen=True)
class Cases:
    """What an observer is shown in one condition: features (N, F) of each side and the patient (N,) of each case."""

    real: np.ndarray
    synthetic: np.ndarray
    groups_real: np.ndarray
    groups_synthetic: np.ndarray


def tight_crops(crops_hu: np.ndarray, masks: np.ndarray, margin: int = 2, side: int | None = None) -> np.ndarray:
    """Condition `cropped`: the cube about each lesion's mask plus a margin, enlarged to one side.

    Args:
        crops_hu: (N, D, D, D) HU.
        masks: (N, D, D, D) bool, none empty.
        margin: voxels around the lesion.
        side: output side, voxels; default D.

    Returns:
        (N, side, side, side) float32 HU, trilinear.

    Raises:
        ValueError: an empty mask.
    """
    side = side or np.shape(crops_hu)[1]
    out = np.empty((len(crops_hu), side, side, side), dtype=np.float32)
    for i, (crop, mask) in enumerate(zip(crops_hu, masks, strict=True)):
        found = np.argwhere(mask)
        if not found.size:
            raise ValueError(f"case {i}: the mask is empty in its crop")
        low, high = found.min(0), found.max(0)
        half = (high - low).max() / 2 + margin
        # positions of the output voxels; beyond the crop its border value repeats
        axes = [np.linspace(c - half, c + half, side) for c in (low + high) / 2]
        grid = np.meshgrid(*axes, indexing="ij")
        out[i] = ndimage.map_coordinates(np.asarray(crop, np.float32), grid, order=1, mode="nearest")
    return out


def crop_statistics(crops_hu: np.ndarray, side: int | None = None) -> np.ndarray:
    """HU statistics of each crop's central cube, (N, 9) in the order of :data:`STATISTICS`.

    Mean, SD, five percentiles, mean gradient magnitude (HU per voxel) and mean absolute Laplacian (sharpness, noise).

    Args:
        crops_hu: (N, D, D, D) HU.
        side: side of the central cube, voxels; default D / 2.
    """
    full = np.shape(crops_hu)[1]
    side = side or full // 2
    start = (full - side) // 2
    cubes = np.asarray(crops_hu, dtype=float)[(slice(None), *[slice(start, start + side)] * 3)]
    flat = cubes.reshape(len(cubes), -1)
    gradient = np.sqrt(sum(g**2 for g in np.gradient(cubes, axis=(1, 2, 3)))).reshape(len(cubes), -1).mean(1)
    sharp = [np.abs(ndimage.laplace(cube)).mean() for cube in cubes]
    return np.column_stack(
        [flat.mean(1), flat.std(1), *np.percentile(flat, [5, 25, 50, 75, 95], axis=1), gradient, sharp]
    )


def case_features(features: dict[str, np.ndarray], statistics: np.ndarray) -> np.ndarray:
    """Features {plane: (N, S, F)} averaged over slices, planes side by side, then statistics (N, k): (N, 3F + k)."""
    return np.column_stack([*(f.mean(axis=1) for f in features.values()), statistics])


def observers(seed: int, components: int) -> dict[str, Pipeline]:
    """The model observers by name, untrained, on so many principal components of the standardised features."""
    return {
        "model observer (logistic)": make_pipeline(
            StandardScaler(), PCA(components, random_state=seed), LogisticRegression(C=0.1, max_iter=1000)
        ),
        "model observer (boosting)": make_pipeline(
            StandardScaler(),
            PCA(components, random_state=seed),
            HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=8, min_samples_leaf=5, random_state=seed),
        ),
    }


def turing_table(cases: dict[str, Cases], seed: int, folds: int = 5) -> pd.DataFrame:
    """`table2_turing.csv` of the model observers: observer, condition, truth, called_real, called_synthetic.

    Args:
        cases: condition -> what is shown.
        folds: cross-validation folds by patient, fewer where there are fewer patients.

    Raises:
        ValueError: unknown condition, sizes that do not fit, or fewer than two patients.
    """
    if unknown := set(cases) - set(CONDITIONS):
        raise ValueError(f"unknown condition {sorted(unknown)}; choose among {', '.join(CONDITIONS)}")
    rows = []
    for condition, shown in cases.items():
        truth, called = out_of_fold_calls(condition, shown, seed, folds)
        for name, calls in called.items():
            for label, word in ((0, "real"), (1, "synthetic")):
                of = calls[truth == label]
                rows.append((name, condition, word, int((of == 0).sum()), int((of == 1).sum())))
    return pd.DataFrame(rows, columns=COLUMNS)


def out_of_fold_calls(
    condition: str, shown: Cases, seed: int, folds: int = 5, only: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Truth (N,) and each observer's cross-validated calls (N,), 0 real and 1 synthetic, the real cases first.

    only: the one observer to ask; None asks all.

    Raises:
        ValueError: sizes that do not fit, fewer than two patients, or no observer of that name.
    """
    x, truth, groups = _stack(condition, shown)
    cv = StratifiedGroupKFold(min(folds, np.unique(groups).size), shuffle=True, random_state=seed)
    smallest = min(len(train) for train, _ in cv.split(x, truth, groups))
    asked = observers(seed, min(50, smallest - 1, x.shape[1]))
    if only is not None:
        if only not in asked:
            raise ValueError(f"no observer {only!r}; choose one of {', '.join(asked)}")
        asked = {only: asked[only]}
    return truth, {name: cross_val_predict(o, x, truth, groups=groups, cv=cv) for name, o in asked.items()}


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
        counts = part.set_index("truth")
        if sorted(counts.index) != ["real", "synthetic"]:
            raise ValueError(f"{observer}, {condition}: needs one row for truth real and one for synthetic")
        real, synthetic = counts.loc["real"], counts.loc["synthetic"]
        n_real = int(real["called_real"] + real["called_synthetic"])
        n_synthetic = int(synthetic["called_real"] + synthetic["called_synthetic"])
        quantities = {
            "accuracy": (int(real["called_real"] + synthetic["called_synthetic"]), n_real + n_synthetic),
            "sensitivity_real": (int(real["called_real"]), n_real),
            "sensitivity_synthetic": (int(synthetic["called_synthetic"]), n_synthetic),
            "fooled": (int(synthetic["called_real"]), n_synthetic),
        }
        for quantity, (count, n) in quantities.items():
            rows.append((observer, condition, quantity, count / n, *wilson_interval(count, n), n))
    return pd.DataFrame(rows, columns="observer condition quantity value ci_low ci_high n".split())


def _stack(condition: str, shown: Cases) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = ((shown.real, shown.groups_real), (shown.synthetic, shown.groups_synthetic))
    if any(len(x) != len(g) for x, g in pairs) or np.shape(shown.real)[1:] != np.shape(shown.synthetic)[1:]:
        raise ValueError(f"{condition}: features and groups of the two sides do not fit each other")
    groups = np.concatenate([shown.groups_real, shown.groups_synthetic])
    if np.unique(groups).size < 2:
        raise ValueError(f"{condition}: calls are cross-validated by patient and need at least two patients")
    x = np.concatenate([shown.real, shown.synthetic]).astype(float)
    return x, np.repeat([0, 1], [len(shown.real), len(shown.synthetic)]), groups
