"""Can a synthetic lesion be told from a real one? By hand-made features, where deep ones see little (`realism.csv`).

A logistic regression and a random forest learn to tell the lesions of a system from real ones in their own scans, and are
judged on patients they have not seen. The systems work in healthy places (`transplant`), so that nothing of the real lesion
is left around; a real lesion pasted there (the system `transplant`) is the floor. Everything is measured inside the mask, with
filters that see nothing beyond it, but for the edge and the noise of the surroundings, which are read in the mask's own
slices: a box of a nodule has hardly a margin in z.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import ndimage, stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from hrldm.nodules.masks import box_of, depth
from study.measure.observers import Cases
from study.measure.statistics import auroc, patient_weights, percentile_interval

SCALES_MM = (0.7, 1.0, 1.5, 2.5)
LAGS = (1, 2, 3)  # voxels of 1 mm
PROFILE_MM = ((-3, -2), (-2, -1), (-1, 0), (0, 1), (1, 2), (2, 3))  # distance from the surface, inside negative
SURROUNDINGS_MM = (3.0, 7.0)  # beyond partial volume and feather
LUNG_HU = -700.0  # aerated lung, whose variation is mostly the scanner's noise
REPEATS = 2  # of the cross-validation
MODELS = {
    "logistic": lambda seed: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)),
    "forest": lambda seed: RandomForestClassifier(100, min_samples_leaf=2, random_state=seed, n_jobs=1),
}
LEAST_PATIENTS = 5  # with fewer, no interval: resampled, they say nothing of others
REFERENCE = "texture"  # what no training made: a network has to be better


def lesion_features(hu: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Features of one lesion by name; hu (D, D, D) at 1 mm, axis 2 along z; mask (D, D, D) bool.

    `inside_…` and `edge_…` say where; `anisotropy_…` compare z with the plane, inside.
    """
    box = box_of(mask, 8)
    hu, mask = hu[box].astype(np.float64).clip(HIST_HU_MIN, HIST_HU_MAX), mask[box]  # no histogram asks for more
    x, inner = hu[mask], depth(mask)
    spread = max(x.std(), 1.0)
    skew, kurtosis = (stats.skew(x), stats.kurtosis(x)) if x.std() >= 1e-3 else (0.0, 0.0)  # one value has none
    out = {"mean": x.mean(), "sd": spread, "skew": skew, "kurtosis": kurtosis}
    out |= {f"q{q:02d}": np.percentile(x, q) for q in (5, 25, 50, 75, 95)}
    deep = inner > np.median(inner[mask])
    out["deep_minus_shallow"] = (hu[deep].mean() if deep.any() else x.mean()) - hu[mask & ~deep].mean()
    for s in SCALES_MM:
        weight = ndimage.gaussian_filter(mask.astype(float), s)
        rest = hu - ndimage.gaussian_filter(np.where(mask, hu, 0.0), s) / np.maximum(weight, 1e-6)
        grain = rest[mask].std()
        out |= {f"grain_{s:g}": grain, f"grain_{s:g}_share": grain / spread}
        if s == 1.0:
            local = np.sqrt(ndimage.gaussian_filter(np.where(mask, rest**2, 0.0), 1.5)[mask])
            out["grain_unevenness"] = local.std() / max(local.mean(), 1e-6)
    anisotropy = {}
    for lag in LAGS:
        *plane, z = (_autocorrelation(hu, mask, axis, lag) for axis in range(3))
        out[f"correlation_{lag}"] = np.mean([*plane, z])
        anisotropy[f"correlation_{lag}"] = z - sum(plane) / 2
    for order in (1, 2):
        power = np.array([_difference_power(hu, mask, axis, order) for axis in range(3)])
        out |= {f"difference_{order}": np.sqrt(power.mean()), f"difference_{order}_share": power.mean() / spread**2}
        anisotropy[f"difference_{order}"] = np.log((power[2] + 1) / (power[:2].mean() + 1))
    slices, distance = mask.any((0, 1)), ndimage.distance_transform_edt(~mask)
    around = (distance > SURROUNDINGS_MM[0]) & (distance <= SURROUNDINGS_MM[1]) & slices & (hu < LUNG_HU)
    own, noise = (np.sqrt(np.mean([_difference_power(hu, m, axis, 2) for axis in range(2)])) for m in (mask, around))
    edge = _edge(hu, np.where(mask, 0.5 - inner, distance - 0.5), slices)
    edge["noise_over_surroundings"] = np.log((own + 1) / (noise + 1)) if noise else 0.0  # no aerated lung about it
    parts = {"inside": out, "anisotropy": anisotropy, "edge": edge}
    return {f"{part}_{name}": float(value) for part, values in parts.items() for name, value in values.items()}


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


def _edge(hu: np.ndarray, signed: np.ndarray, slices: np.ndarray) -> dict[str, float]:
    """Steps, gradient and spread by the signed distance to the surface (mm, inside negative), in the mask's slices."""
    shells = {lo: (signed > lo) & (signed <= hi) & slices for lo, hi in PROFILE_MM}
    level = {lo: hu[shell].mean() for lo, shell in shells.items() if shell.any()}
    inner = next(iter(level.values()), 0.0)  # stands for what is missing
    found = {f"step_{lo}": level.get(lo, inner) - level.get(hi, inner) for lo, hi in PROFILE_MM[:-1]}
    surface = np.hypot(*np.gradient(hu, axis=(0, 1)))[(np.abs(signed) <= 1) & slices]
    found |= {"gradient": surface.mean(), "gradient_sd": surface.std(), "gradient_q90": np.percentile(surface, 90)}
    return found | {f"sd_{lo}": hu[shells[lo]].std() if shells[lo].any() else 0.0 for lo, _ in PROFILE_MM[2:]}


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


def out_of_fold(shown: Cases, model: str, seed: int) -> np.ndarray:
    """(n_real + n_synthetic,) probability of being synthetic, mean over `REPEATS` cross-validations by patient."""
    runs = [
        cross_val_predict(MODELS[model](s), **shown.by_patient(s), method="predict_proba")[:, 1]
        for s in range(seed, seed + REPEATS)
    ]
    return np.mean(runs, axis=0)


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
        n_nodules (synthetic), n_patients. 0.5 is chance, 1 is always told. No interval below `LEAST_PATIENTS`.

    Raises:
        ValueError: fewer than two patients.
    """
    truth = np.repeat([0, 1], [len(groups), len(groups_synthetic)])
    weights = patient_weights(np.concatenate([groups, groups_synthetic]), n_boot, seed)
    counts = (len(groups_synthetic), len(np.unique(groups_synthetic)))
    if counts[1] < LEAST_PATIENTS:
        weights = np.full_like(weights, np.nan)
    rows = []
    for features, columns in feature_sets(real.columns).items():
        for model in MODELS:
            found = {}
            for name in tqdm(systems, desc=f"{features}, {model}", mininterval=10, disable=len(groups) < 20):
                shown = Cases(real[columns], systems[name][columns], groups, groups_synthetic)
                scores = out_of_fold(shown, model, seed)
                found[name] = auroc(truth, scores)[0], auroc(truth, scores, weights)
            reference, reference_draws = found.get(REFERENCE, (np.nan, np.full(n_boot, np.nan)))
            for name, (value, draws) in found.items():
                minus = value - reference, *percentile_interval(draws - reference_draws)
                rows.append((name, place, features, model, value, *percentile_interval(draws), *minus, *counts))
    columns = "system place features model auroc ci_low ci_high minus_texture minus_low minus_high n_nodules n_patients"
    return pd.DataFrame(rows, columns=columns.split())
