"""Can a synthetic lesion be told from a real one? By hand-made features, where deep ones see little (`realism.csv`).

A logistic regression and a random forest learn to tell the lesions of a system from real ones in their own scans, and are
judged on patients they have not seen. The systems work in healthy places (`transplant`), so that nothing of the real lesion
is left around; a real lesion pasted there (the system `transplant`) is the floor. Everything is measured inside the mask, with
filters that see nothing beyond it, but for the edge and the noise of the surroundings, which are read in the mask's own
slices: a box of a nodule has hardly a margin in z.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import ndimage, stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from study.measure.statistics import cluster_weights, percentile_interval, weighted_auroc

SCALES_MM = (0.7, 1.0, 1.5, 2.5)
LAGS = (1, 2, 3)  # voxels of 1 mm
PROFILE_MM = ((-3, -2), (-2, -1), (-1, 0), (0, 1), (1, 2), (2, 3))  # distance from the surface, inside negative
SURROUNDINGS_MM = (3.0, 7.0)  # beyond partial volume and feather
LUNG_HU = -700.0  # aerated lung, whose variation is mostly the scanner's noise
FOLDS, REPEATS = 5, 2
MODELS = {
    "logistic": lambda seed: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)),
    "forest": lambda seed: RandomForestClassifier(100, min_samples_leaf=2, random_state=seed, n_jobs=1),
}
REFERENCE = "texture"  # what no training made: a network has to be better


def lesion_features(hu: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Features of one lesion by name; hu (D, D, D) at 1 mm, axis 2 along z; mask (D, D, D) bool.

    `inside_…` and `edge_…` say where; `anisotropy_…` compare z with the plane, inside.
    """
    box = tuple(slice(max(s.start - 8, 0), s.stop + 8) for s in ndimage.find_objects(mask.astype(np.uint8))[0])
    hu, mask = hu[box].astype(np.float64).clip(HIST_HU_MIN, HIST_HU_MAX), mask[box]  # no histogram asks for more
    x = hu[mask]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    spread = max(x.std(), 1.0)
    flat = x.std() < 1e-3  # one value throughout has no moments beyond the first
    out = {
        "mean": x.mean(),
        "sd": spread,
        "skew": 0.0 if flat else stats.skew(x),
        "kurtosis": 0.0 if flat else stats.kurtosis(x),
    }
    out |= {f"q{q:02d}": np.percentile(x, q) for q in (5, 25, 50, 75, 95)}
    deep = depth > np.median(depth[mask])
    out["deep_minus_shallow"] = (hu[deep & mask].mean() if deep.any() else x.mean()) - hu[mask & ~deep].mean()
    for s in SCALES_MM:
        weight = ndimage.gaussian_filter(mask.astype(float), s)
        smooth = ndimage.gaussian_filter(np.where(mask, hu, 0.0), s) / np.maximum(weight, 1e-6)
        rest = (hu - smooth)[mask]
        out |= {f"grain_{s:g}": rest.std(), f"grain_{s:g}_share": rest.std() / spread}
        if s == 1.0:
            local = np.sqrt(ndimage.gaussian_filter(np.where(mask, (hu - smooth) ** 2, 0.0), 1.5)[mask])
            out["grain_unevenness"] = local.std() / max(local.mean(), 1e-6)
    anisotropy = {}
    for lag in LAGS:
        along = [_autocorrelation(hu, mask, axis, lag) for axis in range(3)]
        out[f"correlation_{lag}"] = float(np.mean(along))
        anisotropy[f"correlation_{lag}"] = along[2] - (along[0] + along[1]) / 2
    for order in (1, 2):
        power = np.array([_difference_power(hu, mask, axis, order) for axis in range(3)])
        out |= {f"difference_{order}": np.sqrt(power.mean()), f"difference_{order}_share": power.mean() / spread**2}
        anisotropy[f"difference_{order}"] = float(np.log((power[2] + 1) / (power[:2].mean() + 1)))
    slices = mask.any((0, 1))
    distance = ndimage.distance_transform_edt(~mask)
    around = (distance > SURROUNDINGS_MM[0]) & (distance <= SURROUNDINGS_MM[1]) & slices & (hu < LUNG_HU)
    own, noise = (np.sqrt(np.mean([_difference_power(hu, m, axis, 2) for axis in range(2)])) for m in (mask, around))
    ratio = float(np.log((own + 1) / (noise + 1))) if noise else 0.0  # no aerated lung about it: says nothing
    return (
        {f"inside_{k}": float(v) for k, v in out.items()}
        | {f"anisotropy_{k}": float(v) for k, v in anisotropy.items()}
        | _edge(hu, mask, depth, distance, slices)
        | {"edge_noise_over_surroundings": ratio}
    )


def _pairs(hu: np.ndarray, mask: np.ndarray, axis: int, shifts: tuple[int, ...]) -> list[np.ndarray]:
    """Values of voxels at the shifts along an axis, where all of them lie in the mask."""
    n, last = hu.shape[axis], max(shifts)
    cuts = [np.take(hu, np.arange(s, n - last + s), axis) for s in shifts]
    inside = np.logical_and.reduce([np.take(mask, np.arange(s, n - last + s), axis) for s in shifts])
    return [c[inside] for c in cuts]


def _autocorrelation(hu: np.ndarray, mask: np.ndarray, axis: int, lag: int) -> float:
    a, b = _pairs(hu, mask, axis, (0, lag))
    if len(a) < 5 or a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _difference_power(hu: np.ndarray, mask: np.ndarray, axis: int, order: int) -> float:
    """Mean square of the first or second difference along an axis, scaled so that white noise gives its variance."""
    values = _pairs(hu, mask, axis, tuple(range(order + 1)))
    if not len(values[0]):
        return 0.0
    difference = values[1] - values[0] if order == 1 else values[2] - 2 * values[1] + values[0]
    return float(np.mean(difference**2) / (2 if order == 1 else 6))


def _edge(hu, mask, depth, distance, slices) -> dict[str, float]:
    signed = np.where(mask, -depth + 0.5, distance - 0.5)
    shells = [(signed > lo) & (signed <= hi) & slices for lo, hi in PROFILE_MM]
    level = [float(hu[s].mean()) if s.any() else np.nan for s in shells]
    inner = next((v for v in level if np.isfinite(v)), 0.0)
    level = [inner if np.isnan(v) else v for v in level]
    steps = {f"step_{PROFILE_MM[i][0]}": level[i] - level[i + 1] for i in range(len(level) - 1)}
    gradient = np.hypot(*np.gradient(hu, axis=(0, 1)))
    surface = gradient[(np.abs(signed) <= 1) & slices]
    found = steps | {
        "gradient": surface.mean(),
        "gradient_sd": surface.std(),
        "gradient_q90": np.percentile(surface, 90),
    }
    found |= {f"sd_{PROFILE_MM[i][0]}": hu[s].std() if s.any() else 0.0 for i, s in enumerate(shells) if i >= 2}
    return {f"edge_{k}": float(v) for k, v in found.items()}


def feature_table(crops: np.ndarray, masks: np.ndarray) -> pd.DataFrame:
    """`lesion_features` of (N, D, D, D) crops, one row each."""
    return pd.DataFrame([lesion_features(hu, mask) for hu, mask in zip(crops, masks, strict=True)])


def feature_sets(columns: pd.Index) -> dict[str, list[str]]:
    """Columns of each set of features: inside, inside_isotropic, edge."""
    isotropic = [c for c in columns if c.startswith("inside_")]
    return {
        "inside": isotropic + [c for c in columns if c.startswith("anisotropy_")],
        "inside_isotropic": isotropic,
        "edge": [c for c in columns if c.startswith("edge_")],
    }


def out_of_fold(
    real: np.ndarray, synthetic: np.ndarray, groups: np.ndarray, groups_synthetic: np.ndarray, model: str, seed: int
) -> np.ndarray:
    """(n_real + n_synthetic,) mean probability of being synthetic, over `REPEATS` cross-validations by group."""
    x, y = np.concatenate([real, synthetic]), np.repeat([0, 1], [len(real), len(synthetic)])
    g = np.concatenate([groups, groups_synthetic])
    folds = min(FOLDS, np.unique(g).size)
    scores = np.zeros(len(y))
    for repeat in range(REPEATS):
        cv = StratifiedGroupKFold(folds, shuffle=True, random_state=seed + repeat)
        scores += cross_val_predict(MODELS[model](seed + repeat), x, y, groups=g, cv=cv, method="predict_proba")[:, 1]
    return scores / REPEATS


def realism(
    real: pd.DataFrame,
    systems: Mapping[str, pd.DataFrame],
    groups: np.ndarray,
    groups_synthetic: np.ndarray,
    place: str,
    n_boot: int,
    seed: int,
) -> pd.DataFrame:
    """`realism.csv`.

    Args:
        real: `feature_table` of real lesions in their own scans.
        systems: of each system's lesions.
        groups, groups_synthetic: patient of each real, and of each synthetic lesion (of its shape).
        place: displaced or in_place.
        n_boot: resamples of the patients.
        seed: of folds, models and resamples.

    Returns:
        system, place, features, model, auroc, ci_low, ci_high, minus_texture with its interval (NaN without texture),
        n_nodules (synthetic), n_patients. 0.5 is chance, 1 is always told.

    Raises:
        ValueError: fewer than two patients.
    """
    patients = np.unique(np.concatenate([groups, groups_synthetic]))
    if len(patients) < 2:
        raise ValueError("told from real is cross-validated by patient and needs at least two")
    code = np.searchsorted(patients, np.concatenate([groups, groups_synthetic]))
    truth = np.repeat([0, 1], [len(groups), len(groups_synthetic)])
    draws = cluster_weights(len(patients), n_boot, np.random.default_rng(seed))[:, code]
    rows = []
    for features, columns in feature_sets(real.columns).items():
        for model in MODELS:
            found: dict[str, tuple[float, np.ndarray]] = {}
            names = sorted(systems, key=lambda s: s != REFERENCE)  # the reference first
            for name in tqdm(names, desc=f"{features}, {model}", mininterval=10, disable=len(groups) < 20):
                parts = (t[columns].to_numpy() for t in (real, systems[name]))
                scores = out_of_fold(*parts, groups, groups_synthetic, model, seed)
                found[name] = (float(weighted_auroc(truth, scores)[0]), weighted_auroc(truth, scores, draws))
            for name in systems:
                value, spread = found[name]
                row = [name, place, features, model, value, *percentile_interval(spread)]
                if REFERENCE in found:
                    reference, other = found[REFERENCE]
                    row += [value - reference, *percentile_interval(spread - other)]
                else:
                    row += [np.nan] * 3
                rows.append([*row, len(groups_synthetic), len(np.unique(groups_synthetic))])
    columns = "system place features model auroc ci_low ci_high minus_texture minus_low minus_high n_nodules n_patients"
    return pd.DataFrame(rows, columns=columns.split())
