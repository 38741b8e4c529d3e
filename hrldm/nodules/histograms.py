"""HU histograms of lesions as numbers: equal bins over -1000..400 HU (Section 5), and a library of real ones.

Used by c_hist, the template and every table; the differentiable histogram of Eq. 7 is in `model/histogram.py`.
"""

import functools
import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.spatial.distance import jensenshannon

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM, SUBTYPES

logger = logging.getLogger(__name__)
SOLID_HU = -300.0  # solid tissue lies above
MIN_NODULES = 8  # cells of a table with fewer real nodules borrow from their neighbours
FLOOR_REACH = 12  # mm around a position, where the lung sets how dark a lesion may be
DARKER = 0.02  # largest share of a histogram below that floor
LEVELS = 10_000  # of a quantile function, when two are mixed
NEIGHBOURS = 4  # nearest histograms, of which one is mixed in
BRIGHTEST = 4  # candidates left at least where a ceiling is asked for


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


def solid_share(histogram: np.ndarray) -> float:
    """What part of the histogram (k,) lies above `SOLID_HU`."""
    return float(histogram[bin_centres(len(histogram)) > SOLID_HU].sum() / histogram.sum())


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


def with_moments(
    histogram: np.ndarray, mean_hu: float | None = None, sd_hu: float | None = None, keep_solid: bool = False
) -> np.ndarray:
    """The histogram (B,) shifted and stretched to a mean and SD (HU) as `histogram_moments` gives them.

    Values beyond -1000..400 HU fall into the first and the last bin. None keeps the histogram's own, as far as it can be had.

    keep_solid: what lies above `SOLID_HU` stays above and what lies below stays below, in the bins beside it at least, so that
        the solid share stays as it is

    Raises:
        ValueError: out of reach; the message says what can be reached.
    """
    if mean_hu is None and sd_hu is None:
        return histogram
    edges = np.linspace(HIST_HU_MIN, HIST_HU_MAX, len(histogram) + 1)
    cdf = np.concatenate([[0.0], np.cumsum(histogram)]) / np.cumsum(histogram)[-1]  # ends at 1 exactly
    own_mean, own_sd = histogram_moments(histogram)
    mean, sd = own_mean if mean_hu is None else mean_hu, own_sd if sd_hu is None else sd_hu
    width, middle = edges[1] - edges[0], int((bin_centres(len(histogram)) <= SOLID_HU).sum())
    kept = f" with {1 - cdf[middle]:.0%} of it above {SOLID_HU:g} HU" if keep_solid else ""

    def moved(stretch: float, shift: float) -> np.ndarray:
        """Histogram of stretch * value + shift."""
        below = np.interp((edges - shift) / stretch, edges, cdf)
        if keep_solid:
            below = np.append(below[:middle].clip(max=cdf[middle]), below[middle:].clip(min=cdf[middle]))
            below[middle] = cdf[middle]
        return np.diff(below[1:-1], prepend=0.0, append=1.0)

    span = HIST_HU_MAX - HIST_HU_MIN
    darkest, brightest = (histogram_moments(moved(1.0, shift))[0] for shift in (-span, span))
    low, high = darkest + width / 2, brightest - width / 2
    if not low - 1e-6 <= mean <= high + 1e-6:
        raise ValueError(f"a histogram of mean {mean:g} HU{kept}: it can be {low:.0f} to {high:.0f} HU")

    def of_mean(log_stretch: float) -> np.ndarray:
        """Histogram stretched, and shifted to the mean; its SD grows with the stretch."""
        stretch = np.exp(log_stretch)
        least, most = HIST_HU_MIN - stretch * HIST_HU_MAX, HIST_HU_MAX - stretch * HIST_HU_MIN
        return moved(stretch, brentq(lambda shift: histogram_moments(moved(stretch, shift))[0] - mean, least, most))

    narrow, wide = np.log(1e-3), np.log(1e3)
    least, most = max(width, histogram_moments(of_mean(narrow))[1]), histogram_moments(of_mean(wide))[1]
    if sd_hu is None:
        sd = min(max(sd, least), most)
    if not least <= sd <= most:
        reach = f"{least:.0f} to {most:.0f} HU there"
        raise ValueError(f"a histogram of SD {sd:g} HU at mean {mean:.4g} HU{kept}: it can be {reach}")
    return of_mean(brentq(lambda stretch: histogram_moments(of_mean(stretch))[1] - sd, narrow, wide, xtol=1e-9))


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


def _candidates(table: pd.DataFrame, subtype: str, diameter_mm: float, floor_hu: float) -> pd.DataFrame:
    """The rows that `choose_histogram` chooses from."""
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
    return same


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
    same = _candidates(histogram_library() if library is None else library, subtype, diameter_mm, floor_hu)
    row = same.iloc[int(rng.integers(len(same)))]
    return str(row.nodule_id), bins_of(row).to_numpy(float)


def draw_histogram(
    subtype: str,
    diameter_mm: float,
    rng: np.random.Generator,
    floor_hu: float = HIST_HU_MIN,
    avoid: Collection[str] = (),
    ceiling: tuple[float, float] | None = None,
) -> tuple[str, np.ndarray]:
    """A histogram between a real one, found as by `choose_histogram`, and one that is similar to it.

    Their quantile functions are mixed: a mix of bins would have two modes.

    avoid:   nodule_ids, or the sources of earlier draws; passed over while the subtype has `MIN_NODULES` others
    ceiling: (share, hu): the brightest `share` of the voxels has a mean of `hu` or more, as where vessels shine through a
        ground-glass nodule; where fewer than `BRIGHTEST` candidates have, these many are left, the brightest

    Returns:
        Source, as "0.731 ID + 0.269 ID", and the histogram, float64 (40,) of sum 1.

    Raises:
        ValueError: unknown subtype.
    """
    library = histogram_library()
    used = {word for source in avoid for word in source.split()}
    others = library[~library.nodule_id.isin(used)]
    enough = (others.subtype == subtype).sum() >= MIN_NODULES
    same = _candidates(others if enough else library, subtype, diameter_mm, floor_hu)
    values = np.stack([quantiles(histogram, LEVELS) for histogram in bins_of(same).to_numpy(float)])
    if ceiling is not None:
        share, hu = ceiling
        lacking = np.maximum(hu - values[:, -max(round(share * LEVELS), 1) :].mean(1), 0)
        bright = lacking <= np.partition(lacking, BRIGHTEST - 1)[BRIGHTEST - 1]
        same, values = same[bright], values[bright]
    one = int(rng.integers(len(same)))
    distance = np.abs(values - values[one]).mean(1)  # Wasserstein
    distance[one] = -1  # itself comes first
    other = int(rng.choice(np.argsort(distance, kind="stable")[1 : 1 + NEIGHBOURS]))
    weight = round(rng.uniform(0, 0.5), 3)
    source = f"{1 - weight:.3f} {same.nodule_id.iloc[one]} + {weight:.3f} {same.nodule_id.iloc[other]}"
    return source, hu_histogram((1 - weight) * values[one] + weight * values[other])
