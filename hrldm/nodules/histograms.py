"""HU histograms of lesions: `hist_bins` equal bins over -1000..400 HU (Section 5), as numbers.

Used by c_hist, the template and every table; the differentiable histogram of Eq. 7 is in `model/histogram.py`.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import jensenshannon

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN


def bin_centres(bins: int) -> np.ndarray:
    """(bins,) HU in the middle of each bin."""
    return HIST_HU_MIN + (HIST_HU_MAX - HIST_HU_MIN) * (np.arange(bins) + 0.5) / bins


def hu_histogram(values_hu: np.ndarray, bins: int = 40, lo: float = HIST_HU_MIN, hi: float = HIST_HU_MAX) -> np.ndarray:
    """Normalised HU histogram of a lesion (Section 5): values clipped to [-1000, 400], 40 bins, float64, sum 1.

    Raises:
        ValueError: no voxel at all.
    """
    values = np.asarray(values_hu, np.float64).ravel()
    if not values.size:
        raise ValueError("HU histogram of an empty lesion")
    counts, _ = np.histogram(values.clip(lo, hi), bins=bins, range=(lo, hi))
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
