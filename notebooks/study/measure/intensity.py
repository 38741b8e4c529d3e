"""What deep features miss: the HU inside the lesion, and whether a requested histogram is obtained.

For one nodule with lesion values x (obtained) and y (truth, the same mask):

- jsd            Jensen-Shannon divergence (Eq. 8) of 40-bin histograms (Section 5), natural logarithm, in [0, ln 2]
- wasserstein_hu first Wasserstein distance of the two sets of values, HU, not clipped: 50 means "off by 50 HU"
- sd_hu          standard deviation within the lesion, the sign of over-smoothing

Control asks for a histogram and measures what comes. Both sides are read from histograms clipped to -1000..400 HU, so
that the clipping of c_hist is not counted as the generator's error.
"""

from collections.abc import Iterable, Iterator, Mapping

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
    """`METRICS`, and mean and SD of either side with the error of the mean and the ratio of the SDs.

    Args:
        obtained_hu, truth_hu: any shape, the values of a lesion in HU.

    Raises:
        ValueError: an empty lesion or values that are not finite.
    """
    x, y = np.ravel(obtained_hu).astype(float), np.ravel(truth_hu).astype(float)
    if not x.size or not y.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"lesion values must be finite and not empty, got {x.size} and {y.size} voxels")
    with np.errstate(divide="ignore", invalid="ignore"):  # a truth of one value
        sd_ratio = x.std() / y.std()
    return {
        "jsd": histogram_jsd(hu_histogram(x), hu_histogram(y)),
        "wasserstein_hu": float(stats.wasserstein_distance(x, y)),
        "mean_hu": float(x.mean()),
        "truth_mean_hu": float(y.mean()),
        "mean_error_hu": float(abs(x.mean() - y.mean())),
        "sd_hu": float(x.std()),
        "truth_sd_hu": float(y.std()),
        "sd_ratio": float(sd_ratio),
    }


def lesion_pairs(name: str, crops_hu: np.ndarray, truth: Patches) -> Iterator[tuple]:
    """Row, crop, true HU and mask of each nodule; `crops_hu` (N, D, D, D) is what `name` made of it.

    Raises:
        ValueError: crops of another shape, or an empty lesion (named).
    """
    if np.shape(crops_hu) != truth.mask.shape:
        raise ValueError(f"{name}: crops {np.shape(crops_hu)} do not fit the nodules' {truth.mask.shape}")
    for row, crop, hu, mask in zip(truth.frame.itertuples(), crops_hu, truth.hu, truth.mask, strict=True):
        if not mask.any():
            raise ValueError(f"{name}, nodule {row.nodule_id}: the mask is empty in its crop")
        yield row, crop, hu, mask


def lesion_table(system: str, crops_hu: np.ndarray, truth: Patches) -> pd.DataFrame:
    """One row per nodule: system, nodule_id, subtype, patient_id and what :func:`lesion_distances` measures.

    crops_hu: (N, D, D, D) HU, the system's; raises as :func:`lesion_pairs`
    """
    pairs = lesion_pairs(system, crops_hu, truth)
    return pd.DataFrame([_row(system, row, crop[mask], hu[mask]) for row, crop, hu, mask in pairs])


def lesion_tables(made: Mapping[str, np.ndarray], truth: Patches, seed: int) -> pd.DataFrame:
    """The `lesion_table` of every system, after the floor `real`: two random halves of the voxels of one lesion.

    The floor is what sampling alone leaves between two histograms of so few voxels; it leaves out lesions of a single one.

    made: system to crops (N, D, D, D) HU
    """
    rng = np.random.default_rng(seed)
    floor = []
    for row, _, hu, mask in lesion_pairs(FLOOR, truth.hu, truth):
        values = rng.permutation(hu[mask])
        if values.size >= 2:
            floor.append(_row(FLOOR, row, values[: values.size // 2], values[values.size // 2 :]))
    tables = [lesion_table(name, crops, truth) for name, crops in made.items()]
    return pd.concat([pd.DataFrame(floor), *tables], ignore_index=True)


def _row(system: str, nodule, obtained_hu: np.ndarray, truth_hu: np.ndarray) -> dict:
    key = {"nodule_id": nodule.nodule_id, "subtype": nodule.subtype, "patient_id": nodule.patient_id}
    return {"system": system} | key | lesion_distances(obtained_hu, truth_hu)


def by_subtype(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """System, subtype and their rows; the first subtype of each system is `all`."""
    for system, of_system in table.groupby("system", sort=False):
        yield system, ALL, of_system
        for subtype, part in of_system.groupby("subtype", sort=False):
            yield system, subtype, part


def lesion_histograms(
    lesions: pd.DataFrame, n_boot: int, seed: int, metrics: tuple[str, ...] = METRICS
) -> pd.DataFrame:
    """`lesion_histograms.csv`: system, subtype (and `all`), metric, value (mean), ci_low, ci_high, n.

    lesions: rows of :func:`lesion_table`, several systems together; their patients are resampled
    """
    rows = []
    for system, subtype, part in by_subtype(lesions):
        for metric in metrics:
            e = mean_interval(part[metric], part["patient_id"], n_boot, seed)
            rows.append((system, subtype, metric, e.value, e.ci_low, e.ci_high, e.n))
    return pd.DataFrame(rows, columns="system subtype metric value ci_low ci_high n".split())


def paired_difference(lesions: pd.DataFrame, a: str, b: str, metric: str, n_boot: int, seed: int) -> Estimate:
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
    return mean_interval(difference, first.loc[common, "patient_id"], n_boot, seed)


def control_tables(
    orders: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]], truth: Patches, systems: Iterable[str]
) -> pd.DataFrame:
    """`control.csv`: mean and SD (HU) that were requested and obtained, a row for each order, system and nodule.

    Args:
        orders: histograms asked for (N, B), over -1000..400 HU, and system to the crops (N, D, D, D) that came.
        truth: the nodules; their HU are not looked at.
        systems: which ones.

    Raises:
        ValueError: an empty lesion.
    """
    systems, rows = tuple(systems), []
    for requested, made in orders:
        for system in systems:
            for row, wish, crop, mask in zip(
                truth.frame.itertuples(), requested, made[system], truth.mask, strict=True
            ):
                (mean, sd), (got_mean, got_sd) = map(histogram_moments, (wish, hu_histogram(crop[mask], len(wish))))
                rows.append((system, row.nodule_id, row.subtype, mean, got_mean, sd, got_sd))
    return pd.DataFrame(rows, columns=CONTROL_COLUMNS)


def control_summary(control: pd.DataFrame) -> pd.DataFrame:
    """`control_summary.csv`: system, subtype (and `all`), quantity (mean_hu, sd_hu), slope, intercept, r2, n.

    Obtained on requested, by `least_squares`.
    """
    rows = []
    for system, subtype, part in by_subtype(control):
        for quantity in ("mean_hu", "sd_hu"):
            x, y = part[f"requested_{quantity}"].to_numpy(), part[f"obtained_{quantity}"].to_numpy()
            rows.append((system, subtype, quantity, *least_squares(x, y), x.size))
    return pd.DataFrame(rows, columns="system subtype quantity slope intercept r2 n".split())


def power_spectrum(volume_hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radially averaged power spectrum of a cube.

    The mean is removed and a Hann window applied against the edges; power is normalised by the window, so that white
    noise of variance v has power v at every frequency.

    Args:
        volume_hu: (D, D, D) HU at 1 mm.

    Returns:
        frequency (K,) in cycles per mm, up to 1 / 2, and power (K,) in HU^2.

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
    return shells / side, ndimage.mean(power, radius, shells)
