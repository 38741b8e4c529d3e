"""A nodule of known truth: a real shape filled with a texture that has exactly a given real HU histogram.

Model, in fractions of tissue: lung at HU h holds b = (h - h_lung) / -h_lung of tissue beyond the mean lung, and a
lesion fills the remaining air:

    s = b + (1 - b) (c a + g),

with a(x) the occupancy (a Gaussian edge around a surface), c the filling, and g a Gaussian random field inside.
Readers' outlines are not the tissue's edge: the surface is the shape's, displaced by a smooth field and by the constant
for which the mean of a matches the requested mean HU. A part-solid nodule has two surfaces: the rim's, and that of an
eccentric core whose share is the histogram's share above `SOLID_HU`. Vessels (b near 1) run through ground-glass and
vanish in solid tissue. Amplitude and spectrum of g are measured on real nodules by subtype and size
(`texture_statistics.csv`, scripts/make_hu_histograms.py). The voxels' ranks in s are mapped to the quantiles of the
target histogram; the result is blurred, given the CT's own noise level, and ranked again, so that the histogram is
exact and the structure comes from s. Outside the mask, a point-spread function continues the edge and fades out within
`HALO_VOXELS`; the rest of the background is untouched.

Nothing is learnt: this is the zero-training system `texture` of Table 1.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage, optimize, special

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM, SUBTYPES
from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.histograms import bin_centres, quantiles

logger = logging.getLogger(__name__)
HALO_VOXELS = 3
PSF_MM = (
    0.9,
    0.9,
    1.1,
)  # SDs of the halo along x, y, z; real cubes exceed the lung by 29-114 HU at 0-1 mm, 11-47 at 1-2
EDGE_MM = 1.3  # real cubes: about 220 HU/mm at a surface with 850 HU of contrast
SURFACE_SD_MM, SURFACE_MM = 1.0, 2.0  # SD and kernel of the field that displaces the surface
SOLID_HU = -300.0  # solid tissue lies above
NOISE_MM = (0.6,)  # kernel of scanner noise
FIELD_MM = (1.2, 2.5, 5.0)  # kernels of g, the structure
BLUR_MM = (0.7, 0.7, 0.9)  # PSF within the lesion, after the first ranking
MIN_NODULES = 8  # table cells with fewer real nodules borrow from their neighbours
FLOOR_REACH = 12  # mm around a position, where the lung sets how dark a lesion may be
_FOLDER = Path(__file__).parent


def size_bin(diameter_mm: float) -> int:
    """Index of the size bin (6-10, 10-20, 20-30 mm); smaller and larger lesions take the first and the last."""
    return int(np.searchsorted([hi for _, hi in SIZE_BINS_MM[:-1]], diameter_mm))


def bins_of(rows: pd.DataFrame | pd.Series):
    """The histogram columns b00, b01, … of rows of the library."""
    return rows.filter(regex=r"^b\d\d$")


@functools.cache
def histogram_library() -> pd.DataFrame:
    """Real histograms, one row per training nodule: nodule_id, patient_id, subtype, size_bin, …, b00..b39 (sum 1)."""
    table = pd.read_csv(_FOLDER / "hu_histograms.csv", comment="#")
    bins = bins_of(table).astype(float)
    table[bins.columns] = bins.div(bins.sum(axis=1), axis=0)
    return table


def completed(library: pd.DataFrame) -> pd.DataFrame:
    """The library plus the shipped rows of each subtype that it lacks; a warning names these."""
    shipped, lacking = histogram_library(), [s for s in SUBTYPES if s not in set(library.subtype)]
    if lacking:
        logger.warning("no %s nodule to train on: HU histograms come from the shipped library", ", no ".join(lacking))
    return pd.concat([library, shipped[shipped.subtype.isin(lacking)]], ignore_index=True)


def choose_histogram(
    subtype: str,
    diameter_mm: float,
    rng: np.random.Generator,
    library: pd.DataFrame | None = None,
    floor_hu: float = HIST_HU_MIN,
) -> tuple[str, np.ndarray]:
    """A random real histogram of the subtype and a similar size.

    Args:
        subtype: of the nodule.
        diameter_mm: of the nodule.
        rng: random generator.
        library: rows of `histogram_library` to choose from; None for all.
        floor_hu: histograms with more than 2 % below are skipped (a lesion is not darker than the lung around it).

    Returns:
        nodule_id of its source and the histogram, float64 (40,) of sum 1.

    Raises:
        ValueError: the library has none of this subtype.
    """
    table = histogram_library() if library is None else library
    table = table[table.subtype == subtype]
    if table.empty:
        raise ValueError(f"no histogram of subtype {subtype!r}; choose one of {', '.join(SUBTYPES)}")
    gap = (np.log(table.diameter_mm) - np.log(diameter_mm)).abs()
    bins = bins_of(table)
    centers = np.linspace(HIST_HU_MIN, HIST_HU_MAX, bins.shape[1], endpoint=False)
    below = bins.loc[:, centers < floor_hu].sum(axis=1)
    same = table[(table.size_bin == size_bin(diameter_mm)) & (below <= 0.02)]
    if len(same) < MIN_NODULES:
        same = table.loc[(gap + 10 * np.maximum(below - 0.02, 0)).sort_values(kind="stable").index[:MIN_NODULES]]
    row = same.iloc[int(rng.integers(len(same)))]
    return str(row.nodule_id), bins_of(row).to_numpy(float)


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


def lung_floor(hu: np.ndarray, around: np.ndarray | None = None) -> float:
    """HU below which a lesion would be darker than the lung around it: 30 HU below the surroundings' lower quartile.

    hu:     crop around the position
    around: its voxels to use (without the lesion); None for all. Without voxels, the result is -inf
    """
    seen = hu if around is None else hu[around]
    return float(np.percentile(seen, 25)) - 30 if seen.size else -np.inf


@functools.cache
def _statistics(subtype: str, size: int) -> tuple[float, np.ndarray]:
    """SD of the core's structure (HU), and the variance weights of `FIELD_MM`.

    Minus its in-plane Gaussian mean of width w, white noise smoothed by sigma keeps the fraction
    1 - 4 sigma^2 / (2 sigma^2 + w^2) + sigma^2 / (sigma^2 + w^2) of its variance; the weights fit this to the measured
    grain. The finest kernel's share is the noise of those scanners; it is left out, since the CT at hand has its own.
    """
    table = pd.read_csv(_FOLDER / "texture_statistics.csv", comment="#")
    table = table[(table.subtype == subtype) & (table.nodules >= MIN_NODULES)]
    row = table.iloc[int((table.size_bin - size).abs().to_numpy().argmin())]
    widths = np.array([1.0, 2.0, 4.0])[:, None]
    sigma2 = np.square([*NOISE_MM, *FIELD_MM])
    left = 1 - 4 * sigma2 / (2 * sigma2 + widths**2) + sigma2 / (sigma2 + widths**2)
    grain = np.square(row[["grain_1", "grain_2", "grain_4"]].to_numpy(float) / row.core_sd)
    weights = optimize.nnls(np.vstack([left, np.ones(len(sigma2))]), np.append(np.minimum(grain, 1), 1.0))[0][1:]
    share = weights.sum()
    return float(row.core_sd * np.sqrt(share)), weights / share if share > 0 else weights


def _field(
    shape: tuple[int, ...], weights: np.ndarray, sigmas: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Gaussian random field of unit variance: a sum of smoothed white noise, longer along z, as from thick slices."""
    out = np.zeros(shape)
    for weight, sigma in zip(weights, sigmas, strict=True):
        noise = rng.standard_normal(shape)
        if weight > 0:
            smooth = ndimage.gaussian_filter(noise, (sigma, sigma, (sigma**2 + 0.7) ** 0.5), mode="wrap")
            out += np.sqrt(weight) * smooth / smooth.std()
    return out


def ranked(score: np.ndarray, inside: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The ascending `target` values, assigned to the masked voxels in the order of their scores."""
    values = np.empty(len(target))
    values[np.argsort(score[inside], kind="stable")] = target
    return values


def _occupancy(
    distance: np.ndarray, inside: np.ndarray, share: float, wander_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Soft indicator of a surface parallel to the shape's, displaced by `wander_mm`, around `share` of the mask."""
    moved = distance + wander_mm * _field(distance.shape, np.ones(1), (max(SURFACE_MM, 2 * wander_mm),), rng)
    share = float(np.clip(share, 0.01, 0.99))
    reach = float(np.abs(moved[inside]).max()) + 5 * EDGE_MM

    def gap(offset: float) -> float:
        return float(special.ndtr((moved[inside] - offset) / EDGE_MM).mean()) - share

    return special.ndtr((moved - optimize.brentq(gap, -reach, reach)) / EDGE_MM)


def _filling(
    target: np.ndarray, level: float, distance: np.ndarray, inside: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Tissue share c a of one component: plateau at the target's upper quartile, surface set by the target's mean."""
    plateau = float(np.quantile(target, 0.75))
    share = (float(target.mean()) - level) / max(plateau - level, 1.0)
    return (plateau - level) / max(-level, 100.0) * _occupancy(distance, inside, share, SURFACE_SD_MM, rng)


def texture_nodule(
    background_hu: np.ndarray,
    mask: np.ndarray,
    subtype: str,
    histogram: np.ndarray,
    rng: np.random.Generator,
    psf_mm: tuple[float, float, float] = PSF_MM,
) -> np.ndarray:
    """Fill a shape with a texture of the given histogram, seamlessly.

    Args:
        background_hu: HU, (x, y, z), at 1 mm.
        mask: bool, same shape.
        subtype: `solid`, `part-solid` or `ground-glass`.
        histogram: non-negative (B,) over -1000..400 HU.
        rng: random generator.
        psf_mm: standard deviations of the CT's point-spread function.

    Returns:
        HU (x, y, z), dtype of the background; equal to it beyond `HALO_VOXELS` from the mask.

    Raises:
        ValueError: empty mask, unequal shapes, unknown subtype, or a histogram that is negative or sums to zero.
    """
    if subtype not in SUBTYPES:
        raise ValueError(f"unknown subtype {subtype!r}; choose one of {', '.join(SUBTYPES)}")
    if mask.shape != background_hu.shape or not mask.any():
        raise ValueError(f"mask {mask.shape} must be non-empty and shaped as the background {background_hu.shape}")
    histogram = np.asarray(histogram, float)
    if (histogram < 0).any() or not histogram.sum() > 0:
        raise ValueError("the histogram must be non-negative and not all zero")
    box = tuple(
        slice(max(s.start - HALO_VOXELS, 0), s.stop + HALO_VOXELS)
        for s in ndimage.find_objects(mask.astype(np.uint8))[0]
    )
    inside, lung = mask[box], background_hu[box].astype(float)
    core_sd, weights = _statistics(subtype, size_bin(equivalent_diameter(mask.sum())))
    target = quantiles(histogram, int(mask.sum()))

    padded = np.pad(inside, 1)
    distance = ndimage.distance_transform_edt(padded) - ndimage.distance_transform_edt(~padded)
    distance = ndimage.gaussian_filter(distance, 0.7)[1:-1, 1:-1, 1:-1]
    level = float(np.median(lung[inside]))
    air = max(-level, 100.0)
    if subtype == "part-solid":
        core, rim = target[target > SOLID_HU], target[target <= SOLID_HU]
        solid = _occupancy(distance, inside, len(core) / len(target), 0.25 * distance.max(), rng)
        fill = _filling(rim if len(rim) else target, level, distance, inside, rng)
        fill += solid * ((np.median(core) - level) / air - fill) if len(core) else 0.0
    else:
        fill = _filling(target, level, distance, inside, rng)
    structure = core_sd / air * _field(inside.shape, weights, FIELD_MM, rng)
    tissue = np.clip((lung - level) / air, -0.2, 1)
    residue = lung - ndimage.gaussian_filter(lung, (1, 1, 0))
    noise = 1.4826 * float(np.median(np.abs(residue))) * _field(inside.shape, np.ones(1), NOISE_MM, rng)

    filled = lung.copy()
    filled[inside] = ranked(tissue + (1 - tissue) * (fill + structure), inside, target)
    filled[inside] = ranked(ndimage.gaussian_filter(filled, BLUR_MM) + noise, inside, target)
    halo = ndimage.gaussian_filter(filled - lung, psf_mm, mode="constant", truncate=HALO_VOXELS / max(psf_mm))
    near = ndimage.binary_dilation(inside, iterations=HALO_VOXELS) & ~inside
    filled[near] = (lung + halo)[near]

    out = background_hu.copy()
    changed = inside | near
    if np.issubdtype(out.dtype, np.integer):
        filled = np.round(filled)
    out[box][changed] = filled[changed].astype(out.dtype)
    return out
