"""HU histograms of lesions as numbers: equal bins over -1000..400 HU (Section 5), and a library of real ones.

Used by c_hist, the template and every table; the differentiable histogram of Eq. 7 is in `model/histogram.py`.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM, SUBTYPES

logger = logging.getLogger(__name__)
SOLID_HU = -300.0  # solid tissue lies above
MIN_NODULES = 8  # cells of a table with fewer real nodules borrow from their neighbours
FLOOR_REACH = 12  # mm around a position, where the lung sets how dark a lesion may be
DARKER = 0.02  # largest share of a histogram below that floor


def bin_centres(bins: int) -> np.ndarray:
    """(bins,) HU in the middle of each bin."""
    return HIST_HU_MIN + (HIST_HU_MAX - HIST_HU_MIN) * (np.arange(bins) + 0.5) / bins


def hu_histogram(values_hu: np.ndarray, bins: int = 40) -> np.ndarray:
    """Normalised HU histogram of a lesion (Section 5): values clipped to [-1000, 400], 40 bins, float64, sum 1.

    Raises:
        ValueError: no voxel at all.
    """
    values = np.asarray(values_hu, np.float64).ravel()
    if not values.size:
        raise ValueError("HU histogram of an empty lesion")
    limits = (HIST_HU_MIN, HIST_HU_MAX)
    counts, _ = np.histogram(values.clip(*limits), bins=bins, range=limits)
    return counts / counts.sum()


def histogram_moments(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (HU) that a histogram (B,) asks for, from its bin centres."""
    centres = bin_centres(len(histogram))
    mean = float((histogram * centres).sum() / histogram.sum())
    return mean, float(np.sqrt((histogram * (centres - mean) ** 2).sum() / histogram.sum()))


def histogram_jsd(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two histograms (B,), natural logarithm (Eq. 8); both are normalised here.

    Raises:
        ValueError: different lengths, negative entries or an empty histogram.
    """
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    if p.shape != q.shape or (p < 0).any() or (q < 0).any() or not p.sum() > 0 or not q.sum() > 0:
        raise ValueError(f"need two non-negative histograms of one length with some mass, got {p.shape} and {q.shape}")
    return float(jensenshannon(p, q) ** 2)


def quantiles(histogram: np.ndarray, n: int) -> np.ndarray:
    """`n` HU values, ascending, whose histogram is the given one (uniform within each bin)."""
    edges = np.linspace(HIST_HU_MIN, HIST_HU_MAX, len(histogram) + 1)
    cdf = np.concatenate([[0.0], np.cumsum(histogram / histogram.sum())])
    return np.interp((np.arange(n) + 0.5) / n, cdf, edges)


def with_solid_share(histogram: np.ndarray, share: float) -> np.ndarray:
    """The histogram (k,) reweighted so that `share` of it lies above `SOLID_HU`, as a core of known volume requires.

    Raises:
        ValueError: the histogram is empty on one side of `SOLID_HU`.
    """
    solid = bin_centres(len(histogram)) > SOLID_HU
    above, below = histogram[solid].sum(), histogram[~solid].sum()
    if not min(above, below) > 0:
        side = "above" if above <= 0 else "below"
        raise ValueError(
            f"the histogram has nothing {side} {SOLID_HU:g} HU, so it cannot fill a solid core and its rim"
        )
    return np.where(solid, histogram * (share / above), histogram * ((1 - share) / below))


# -- real ones ---------------------------------------------------------------------------------------------------------


def size_bin(diameter_mm: float) -> int:
    """Index of the size bin (6-10, 10-20, 20-30 mm); smaller and larger lesions take the first and the last."""
    return int(np.searchsorted([hi for _, hi in SIZE_BINS_MM[:-1]], diameter_mm))


def bins_of(rows: pd.DataFrame | pd.Series):
    """The histogram columns b00, b01, … of rows of the library."""
    return rows.filter(regex=r"^b\d\d$")


@functools.cache
def histogram_library() -> pd.DataFrame:
    """Real histograms, one row per training nodule: nodule_id, patient_id, subtype, size_bin, …, b00..b39 (sum 1)."""
    table = pd.read_csv(Path(__file__).with_name("hu_histograms.csv"), comment="#")
    bins = bins_of(table).astype(float)
    table[bins.columns] = bins.div(bins.sum(axis=1), axis=0)
    return table


def completed(library: pd.DataFrame) -> pd.DataFrame:
    """The library plus the shipped rows of each subtype that it lacks; a warning names these."""
    shipped, lacking = histogram_library(), [s for s in SUBTYPES if s not in set(library.subtype)]
    if lacking:
        logger.warning("no %s nodule to train on: HU histograms come from the shipped library", ", no ".join(lacking))
    return pd.concat([library, shipped[shipped.subtype.isin(lacking)]], ignore_index=True)


def lung_floor(hu: np.ndarray, around: np.ndarray | None = None) -> float:
    """HU below which a lesion would be darker than the lung around it: 30 HU below the surroundings' lower quartile.

    hu:     crop around the position
    around: its voxels to use (without the lesion); None for all. Without voxels, the result is -inf
    """
    seen = hu if around is None else hu[around]
    return float(np.percentile(seen, 25)) - 30 if seen.size else -np.inf


def choose_histogram(
    subtype: str,
    diameter_mm: float,
    rng: np.random.Generator,
    library: pd.DataFrame | None = None,
    floor_hu: float = HIST_HU_MIN,
) -> tuple[str, np.ndarray]:
    """A random real histogram of the subtype and a similar size.

    library:  rows of `histogram_library` to choose from; None for all
    floor_hu: histograms with more than `DARKER` below are skipped (a lesion is not darker than the lung around it)

    Returns:
        nodule_id of its source and the histogram, float64 (40,) of sum 1.

    Raises:
        ValueError: the library has none of this subtype.
    """
    table = histogram_library() if library is None else library
    table = table[table.subtype == subtype]
    if table.empty:
        raise ValueError(f"no histogram of subtype {subtype!r}; choose one of {', '.join(SUBTYPES)}")
    bins = bins_of(table)
    lower_edges = np.linspace(HIST_HU_MIN, HIST_HU_MAX, bins.shape[1], endpoint=False)
    below = bins.loc[:, lower_edges < floor_hu].sum(axis=1)
    same = table[(table.size_bin == size_bin(diameter_mm)) & (below <= DARKER)]
    if len(same) < MIN_NODULES:
        gap = (np.log(table.diameter_mm) - np.log(diameter_mm)).abs()
        same = table.loc[(gap + 10 * np.maximum(below - DARKER, 0)).sort_values(kind="stable").index[:MIN_NODULES]]
    row = same.iloc[int(rng.integers(len(same)))]
    return str(row.nodule_id), bins_of(row).to_numpy(float)
