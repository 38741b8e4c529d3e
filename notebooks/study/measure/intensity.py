"""What deep features miss: the HU inside the lesion, and whether a requested histogram is obtained.

For one nodule with lesion values x (obtained) and y (truth, the same mask):

- jsd            Jensen-Shannon divergence (Eq. 8) of 40-bin histograms (Section 5), natural logarithm, in [0, ln 2]
- wasserstein_hu first Wasserstein distance of the two sets of values, HU, not clipped: 50 means "off by 50 HU"
- sd_hu          standard deviation within the lesion, the sign of over-smoothing

Control asks for a histogram and measures what comes. Both sides are read from histograms clipped to -1000..400 HU, so
that the clipping of c_hist is not counted as the generator's error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import fft, ndimage, stats

from hrldm.nodules.histograms import histogram_jsd, histogram_moments, hu_histogram
from hrldm.nodules.patches import Patches
from study.measure.statistics import Estimate, least_squares, mean_interval

METRICS = ("jsd", "wasserstein_hu")
FLOOR = "real"
ALL = "all"
CONTROL_COLUMNS = "system nodule_id subtype requested_mean_hu obtained_mean_hu requested_sd_hu obtained_sd_hu".split()


def lesion_distances(obtained_hu: np.ndarray, truth_hu: np.ndarray) -> dict[str, float]:
    """jsd, wasserstein_hu, and mean and SD of either side, of two sets of lesion values in HU.

    Raises:
        ValueError: an empty lesion or values that are not finite.
    """
    x, y = np.ravel(obtained_hu).astype(float), np.ravel(truth_hu).astype(float)
    if not x.size or not y.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"lesion values must be finite and not empty, got {x.size} and {y.size} voxels")
    return {
        "jsd": histogram_jsd(hu_histogram(x), hu_histogram(y)),
        "wasserstein_hu": float(stats.wasserstein_distance(x, y)),
        "mean_hu": float(x.mean()),
        "truth_mean_hu": float(y.mean()),
        "sd_hu": float(x.std()),
        "truth_sd_hu": float(y.std()),
    }


def lesion_table(
    system: str, crops_hu: np.ndarray, truth_hu: np.ndarray, masks: np.ndarray, nodules: pd.DataFrame
) -> pd.DataFrame:
    """One row per nodule: system, nodule_id, subtype, patient_id and what :func:`lesion_distances` measures.

    Args:
        crops_hu, truth_hu: (N, D, D, D) HU, the system's crop and the truth of the same nodule.
        masks: (N, D, D, D) bool, the lesion in both.
        nodules: N rows with nodule_id, subtype and patient_id.

    Raises:
        ValueError: shapes that differ, or an empty lesion (named).
    """
    if not np.shape(crops_hu) == np.shape(truth_hu) == np.shape(masks) or len(nodules) != len(masks):
        raise ValueError(
            f"{system}: crops {np.shape(crops_hu)}, truth {np.shape(truth_hu)}, masks {np.shape(masks)} and "
            f"{len(nodules)} nodules do not fit each other"
        )
    rows = []
    for row, crop, truth, mask in zip(nodules.itertuples(), crops_hu, truth_hu, masks, strict=True):
        inside = np.asarray(mask, dtype=bool)
        if not inside.any():
            raise ValueError(f"{system}, nodule {row.nodule_id}: the mask is empty in its crop")
        key = {"system": system, "nodule_id": row.nodule_id, "subtype": row.subtype, "patient_id": row.patient_id}
        rows.append(key | lesion_distances(crop[inside], truth[inside]))
    return pd.DataFrame(rows)


def half_lesion_floor(truth_hu: np.ndarray, masks: np.ndarray, nodules: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The rows of :func:`lesion_table` for system `real`: two random halves of the voxels of one lesion.

    What sampling alone leaves between two histograms of so few voxels; lesions of a single voxel are left out.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for row, truth, mask in zip(nodules.itertuples(), truth_hu, masks, strict=True):
        values = rng.permutation(truth[np.asarray(mask, dtype=bool)])
        if values.size >= 2:
            key = {"system": FLOOR, "nodule_id": row.nodule_id, "subtype": row.subtype, "patient_id": row.patient_id}
            rows.append(key | lesion_distances(values[: values.size // 2], values[values.size // 2 :]))
    return pd.DataFrame(rows)


def lesion_tables(made: Mapping[str, np.ndarray], truth: Patches, seed: int) -> pd.DataFrame:
    """`half_lesion_floor` and the `lesion_table` of every system, together; `made`: system to crops (N, D, D, D) HU."""
    floor = half_lesion_floor(truth.hu, truth.mask, truth.frame, seed)
    tables = [lesion_table(name, crops, truth.hu, truth.mask, truth.frame) for name, crops in made.items()]
    return pd.concat([floor, *tables], ignore_index=True)


def lesion_histograms(
    lesions: pd.DataFrame, n_boot: int, seed: int, group: str = "patient_id", metrics: tuple[str, ...] = METRICS
) -> pd.DataFrame:
    """`lesion_histograms.csv`: system, subtype (and `all`), metric, value (mean), ci_low, ci_high, n.

    Args:
        lesions: rows of :func:`lesion_table`, several systems together.
        group: column whose values are resampled.
    """
    rows = []
    for system, of_system in lesions.groupby("system", sort=False):
        parts = [(ALL, of_system), *of_system.groupby("subtype", sort=False)]
        for subtype, part in parts:
            for metric in metrics:
                e = mean_interval(part[metric].to_numpy(), part[group].to_numpy(), n_boot, seed)
                rows.append((system, subtype, metric, e.value, e.ci_low, e.ci_high, e.n))
    return pd.DataFrame(rows, columns="system subtype metric value ci_low ci_high n".split())


def paired_difference(
    lesions: pd.DataFrame, a: str, b: str, metric: str, n_boot: int, seed: int, group: str = "patient_id"
) -> Estimate:
    """Mean over nodules of metric(b) - metric(a), with its interval and p by patient bootstrap (below 0: b is closer).

    Raises:
        ValueError: a system or metric that is absent, a nodule twice in a system, or no nodule in common.
    """
    if metric not in lesions:
        raise ValueError(f"no metric {metric!r} among {list(lesions.columns)}")
    first, second = (lesions[lesions["system"] == name].set_index("nodule_id") for name in (a, b))
    if first.index.has_duplicates or second.index.has_duplicates:
        raise ValueError(f"a nodule appears twice in {a!r} or {b!r}; a paired difference needs one row each")
    common = first.index.intersection(second.index)
    if common.empty:
        raise ValueError(f"{a!r} and {b!r} have no nodule in common")
    difference = second.loc[common, metric] - first.loc[common, metric]
    return mean_interval(difference.to_numpy(), first.loc[common, group].to_numpy(), n_boot, seed)


def control_table(
    system: str, requested: np.ndarray, crops_hu: np.ndarray, masks: np.ndarray, nodules: pd.DataFrame
) -> pd.DataFrame:
    """`control.csv`: requested and obtained mean and SD (HU) per nodule.

    Args:
        requested: (N, B) histograms the generator was given, over -1000..400 HU.
        crops_hu, masks: (N, D, D, D) what came, and the lesion.
        nodules: N rows with nodule_id and subtype.

    Raises:
        ValueError: an empty lesion.
    """
    rows = []
    for row, wish, crop, mask in zip(nodules.itertuples(), requested, crops_hu, masks, strict=True):
        got = hu_histogram(crop[np.asarray(mask, dtype=bool)], bins=len(wish))
        (mean, sd), (got_mean, got_sd) = histogram_moments(wish), histogram_moments(got)
        rows.append((system, row.nodule_id, row.subtype, mean, got_mean, sd, got_sd))
    return pd.DataFrame(rows, columns=CONTROL_COLUMNS)


def control_tables(
    orders: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]], truth: Patches, systems: Iterable[str]
) -> pd.DataFrame:
    """`control_table` of several systems over several orders: (histograms asked for (N, B), system to crops) each."""
    systems = tuple(systems)
    tables = [
        control_table(name, asked, made[name], truth.mask, truth.frame) for asked, made in orders for name in systems
    ]
    return pd.concat(tables, ignore_index=True)


def control_summary(control: pd.DataFrame) -> pd.DataFrame:
    """`control_summary.csv`: system, subtype (and `all`), quantity (mean_hu, sd_hu), slope, intercept, r2, n.

    Obtained on requested, by `least_squares`.
    """
    rows = []
    for system, of_system in control.groupby("system", sort=False):
        for subtype, part in [(ALL, of_system), *of_system.groupby("subtype", sort=False)]:
            for quantity in ("mean_hu", "sd_hu"):
                x, y = part[f"requested_{quantity}"].to_numpy(), part[f"obtained_{quantity}"].to_numpy()
                rows.append((system, subtype, quantity, *least_squares(x, y), x.size))
    return pd.DataFrame(rows, columns="system subtype quantity slope intercept r2 n".split())


def power_spectrum(volume_hu: np.ndarray, spacing_mm: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Radially averaged power spectrum of a cube.

    The mean is removed and a Hann window applied against the edges; power is normalised by the window, so that white
    noise of variance v has power v at every frequency.

    Args:
        volume_hu: (D, D, D) HU.
        spacing_mm: voxel side.

    Returns:
        frequency (K,) in cycles per mm, up to 1 / (2 spacing), and power (K,) in HU^2.

    Raises:
        ValueError: not a cube of at least 4 voxels a side.
    """
    volume = np.asarray(volume_hu, dtype=float)
    if volume.ndim != 3 or len(set(volume.shape)) != 1 or volume.shape[0] < 4:
        raise ValueError(f"a power spectrum needs a cube of side >= 4, got {volume.shape}")
    side = volume.shape[0]
    hann = np.hanning(side + 2)[1:-1]
    taper = hann[:, None, None] * hann[:, None] * hann
    power = np.abs(fft.fftn((volume - volume.mean()) * taper)) ** 2 / (taper**2).sum()
    axis = fft.fftfreq(side) * side
    radius = np.rint(np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)).astype(int)
    shells = np.arange(1, side // 2 + 1)
    return shells / (side * spacing_mm), ndimage.mean(power, radius, shells)
