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

import functools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage, optimize, special

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.histograms import MIN_NODULES, SOLID_HU, quantiles, size_bin
from hrldm.nodules.masks import box_of, signed_distance

HALO_VOXELS = 3
# SDs of the halo along x, y, z; real cubes exceed the lung by 29-114 HU at 0-1 mm, 11-47 at 1-2
PSF_MM = (0.9, 0.9, 1.1)
EDGE_MM = 1.3  # real cubes: about 220 HU/mm at a surface with 850 HU of contrast
SURFACE_SD_MM, SURFACE_MM = 1.0, 2.0  # SD and kernel of the field that displaces the surface
NOISE_MM = (0.6,)  # kernel of scanner noise
FIELD_MM = (1.2, 2.5, 5.0)  # kernels of g, the structure
BLUR_MM = (0.7, 0.7, 0.9)  # PSF within the lesion, after the first ranking


@functools.cache
def _statistics(subtype: str, size: int) -> tuple[float, np.ndarray]:
    """SD of the core's structure (HU), and the variance weights of `FIELD_MM`.

    Minus its in-plane Gaussian mean of width w, white noise smoothed by sigma keeps the fraction
    1 - 4 sigma^2 / (2 sigma^2 + w^2) + sigma^2 / (sigma^2 + w^2) of its variance; the weights fit this to the measured
    grain. The finest kernel's share is the noise of those scanners; it is left out, since the CT at hand has its own.
    """
    table = pd.read_csv(Path(__file__).with_name("texture_statistics.csv"), comment="#")
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
    background_hu: np.ndarray, mask: np.ndarray, subtype: str, histogram: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Fill a shape with a texture of the given histogram, seamlessly.

    background_hu: HU, (x, y, z), at 1 mm
    mask:          bool, same shape
    histogram:     non-negative (B,) over -1000..400 HU

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
    box = box_of(mask, HALO_VOXELS)
    inside, lung = mask[box], background_hu[box].astype(float)
    core_sd, weights = _statistics(subtype, size_bin(equivalent_diameter(mask.sum())))
    target = quantiles(histogram, int(mask.sum()))

    distance = ndimage.gaussian_filter(signed_distance(np.pad(inside, 1)), 0.7)[1:-1, 1:-1, 1:-1]
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
    halo = ndimage.gaussian_filter(filled - lung, PSF_MM, mode="constant", truncate=HALO_VOXELS / max(PSF_MM))
    near = ndimage.binary_dilation(inside, iterations=HALO_VOXELS) & ~inside
    filled[near] = (lung + halo)[near]

    out = background_hu.copy()
    changed = inside | near
    if np.issubdtype(out.dtype, np.integer):
        filled = np.round(filled)
    out[box][changed] = filled[changed].astype(out.dtype)
    return out
