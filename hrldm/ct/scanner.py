"""What a CT's scanner and reconstruction did to the anatomy about a place: sharpness and noise along each axis.

Both are measured on the CT's own voxels. Sharpness is the SD of the Gaussian point-spread function that explains how wide
the edges between lung and soft tissue (pleura, mediastinum, large vessels) are along each axis. Noise is the
autocovariance of what a smooth background leaves of aerated lung.

A lesion put into the scan gets both (`insertion/finish.py`); without them it is told from real ones by its isotropy alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage, stats

# edges
LUNG_HU, TISSUE_HU = -650.0, -200.0  # at least this dark and this bright, EDGE_MM to both sides of an edge
BRIGHTEST_HU = 60.0  # bone and contrast beyond the pleura would move the upper level of an edge
EDGE_MM = 4.0
BESIDE_MM = 1.0  # SD of the smoothing along the other two axes, against noise
ACROSS = 0.85  # least share of the squared gradient along the axis: more oblique surfaces look blurred
LEAST_EDGES = 100
USUAL_PSF_MM = 0.7  # where too few edges are seen, and half a voxel if that is more
# noise
SMOOTH_MM = 4.0  # Gaussian whose rest is noise: wider keeps structure of the lung, narrower takes coarse noise away
AERATED_HU = (-1010.0, -750.0)  # of the surroundings' mean, without vessels, bullae and air outside
GUARD_MM = 1.5  # around what is not aerated lung
CLIP = 3.0  # in local SDs: beyond, it is an edge
TAPER_MM = 4.0  # SD of the Gaussian that ends the autocovariance
QUANTILE = 25  # of the local SDs, %: vessels and fibrosis raise the others


@dataclass(frozen=True, eq=False)
class Noise:
    """Stationary noise on one voxel grid: `spectrum`, the real FFT of its autocovariance, on a grid of `size`."""

    spectrum: np.ndarray
    size: tuple[int, int, int]

    @property
    def autocovariance(self) -> np.ndarray:
        """HU² by lag in voxels, lag (0, 0, 0) first, negative ones at the end, as an FFT orders them."""
        return fft.irfftn(self.spectrum, self.size)

    @property
    def sd(self) -> float:
        """HU."""
        return float(np.sqrt(self.spectrum_sum))

    @functools.cached_property
    def spectrum_sum(self) -> float:
        return max(float(self.autocovariance[0, 0, 0]), 0.0)

    def field(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """A random field (x, y, z) in HU with this autocovariance; shapes beyond `size` repeat."""
        white = rng.standard_normal(self.size)
        field = fft.irfftn(fft.rfftn(white) * np.sqrt(self.spectrum), self.size)
        return np.pad(field, [(0, max(0, n - m)) for n, m in zip(shape, self.size, strict=True)], mode="wrap")[
            tuple(slice(n) for n in shape)
        ]


# -- sharpness ---------------------------------------------------------------------------------------------------------


@functools.cache
def _width_of_sd() -> tuple[np.ndarray, np.ndarray]:
    """Median 25-75 % width of sampled edges (voxels), and the SD of their blur (voxels), over all phases."""
    sds = np.geomspace(0.05, 12, 60)
    phases = (np.arange(40) + 0.5) / 40
    at = np.arange(-60, 61)
    widths = [np.median(_widths(stats.norm.cdf((at[None] - phases[:, None]) / sd), len(at) // 2)) for sd in sds]
    return np.maximum.accumulate(widths), sds


def _widths(profiles: np.ndarray, step: int) -> np.ndarray:
    """Distance in samples between the 25 and 75 % crossings nearest to the middle of rising edges (n, k) from 0 to 1.

    step: the edge lies between samples `step` and `step + 1`.
    """

    def crossing(rising: np.ndarray, level: float) -> np.ndarray:
        """How far left of the sample `step + 1` the profile falls below the level; the columns run leftwards."""
        below = rising < level
        first = np.where(below.any(1), below.argmax(1), rising.shape[1] - 1)
        first = np.maximum(first, 1)
        rows = np.arange(len(rising))
        low, high = rising[rows, first], rising[rows, first - 1]
        return first - np.clip((level - low) / np.where(high > low, high - low, 1.0), 0, 1)

    left = crossing(profiles[:, step + 1 :: -1] if step + 1 >= 0 else profiles, 0.25)
    right = crossing(1 - profiles[:, step:], 0.25)
    return left + right - 1


def psf_mm(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """SD (3,) in mm of the Gaussian point-spread function along each axis.

    hu:      (x, y, z), a part of the CT with some pleura, mediastinum or large vessels
    spacing: (3,) mm

    An axis along which fewer than `LEAST_EDGES` edges are seen gets `USUAL_PSF_MM`, or half a voxel.
    """
    spacing = np.asarray(spacing, float)
    hu = np.clip(hu, -1024, BRIGHTEST_HU).astype(np.float32)
    smooth = ndimage.gaussian_filter(hu, 1.5 / spacing)
    slope = np.stack([np.gradient(smooth, s, axis=a) if hu.shape[a] > 1 else 0 * smooth for a, s in enumerate(spacing)])
    share = slope**2 / np.maximum((slope**2).sum(0), 1e-6)
    seen, oblique = np.full(3, np.nan), np.zeros((3, 3))
    for axis in range(3):
        beside = np.where(np.arange(3) == axis, 0.0, BESIDE_MM / spacing)
        found = _edges(ndimage.gaussian_filter(hu, beside), share, axis, max(2, int(np.ceil(EDGE_MM / spacing[axis]))))
        if found is None:
            continue
        widths, shares = found
        seen[axis] = np.interp(np.median(widths), *_width_of_sd()) * spacing[axis]
        oblique[axis] = np.median(shares / shares[:, [axis]], axis=0)
    # an oblique edge adds the blur of the other axes: sd² = Σ_j psf_j² n_j² / n_axis²
    usual = np.maximum(USUAL_PSF_MM, spacing / 2)
    known = ~np.isnan(seen)
    oblique[~known] = np.eye(3)[~known]
    seen = np.where(known, seen, usual)
    np.fill_diagonal(oblique, 1.0)
    added = np.where(known, (oblique.sum(1) - 1) * BESIDE_MM**2, 0.0)
    return np.sqrt(np.maximum(np.linalg.solve(oblique, seen**2 - added), (0.3 * seen) ** 2))


def _edges(hu: np.ndarray, share: np.ndarray, axis: int, reach: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Widths (n,) in voxels of the edges between lung and tissue along an axis, and their normals' squares (n, 3)."""
    hu, share = np.moveaxis(hu, axis, 2), np.moveaxis(share, axis + 1, 3)
    n = hu.shape[2]
    if n < 2 * reach + 2:
        return None
    steps = np.diff(hu, axis=2)
    size = np.abs(steps)
    inner = slice(reach, n - 1 - reach)
    peak = (size == ndimage.maximum_filter1d(size, 2 * reach + 1, axis=2))[:, :, inner]
    left, right = hu[:, :, : n - 1 - 2 * reach], hu[:, :, 2 * reach + 1 :]
    lung, tissue = np.minimum(left, right), np.maximum(left, right)
    across = share[axis][:, :, inner] >= ACROSS
    at = np.argwhere(peak & (lung < LUNG_HU) & (tissue > TISSUE_HU) & across)
    if len(at) < LEAST_EDGES:
        return None
    columns = at[:, 2, None] + np.arange(2 * reach + 2)
    profiles = hu[at[:, 0, None], at[:, 1, None], columns]
    falling = profiles[:, -1] < profiles[:, 0]
    profiles[falling] = profiles[falling, ::-1]
    low, high = profiles[:, :2].mean(1, keepdims=True), profiles[:, -2:].mean(1, keepdims=True)
    profiles = (profiles - low) / np.maximum(high - low, 1.0)
    return _widths(profiles, reach), share[:, at[:, 0], at[:, 1], at[:, 2] + reach].T


# -- noise -------------------------------------------------------------------------------------------------------------


def noise_of(hu: np.ndarray, spacing: np.ndarray, without: np.ndarray | None = None) -> Noise:
    """The noise of aerated lung.

    hu:      (x, y, z), the part of the CT about a place
    spacing: (3,) mm
    without: (x, y, z) bool, voxels to leave out

    Without aerated lung, the noise is zero.
    """
    spacing = np.asarray(spacing, float)
    hu = np.asarray(hu, float)
    low, high = AERATED_HU
    near = ndimage.gaussian_filter(hu, 1.0 / spacing)
    usable = (near > low) & (near < high) & (hu > -1023)
    usable &= ndimage.distance_transform_edt(usable, spacing) > GUARD_MM
    if without is not None:
        usable &= ~without
    size = tuple(
        fft.next_fast_len(n + int(np.ceil(3 * TAPER_MM / s)), real=True) for n, s in zip(hu.shape, spacing, strict=True)
    )
    nothing = Noise(np.zeros((*size[:2], size[2] // 2 + 1)), size)
    if not usable.any():
        return nothing
    smooth = SMOOTH_MM / spacing
    weight = ndimage.gaussian_filter(usable.astype(float), smooth)
    mean = ndimage.gaussian_filter(np.where(usable, hu, 0.0), smooth) / np.maximum(weight, 1e-9)
    rest = np.where(usable, hu - mean, 0.0)
    local = np.sqrt(ndimage.gaussian_filter(rest**2, smooth)[usable] / weight[usable])
    strength = float(np.percentile(local, QUANTILE))
    if strength == 0:
        return nothing
    rest = np.clip(rest, -CLIP * strength, CLIP * strength)
    pairs = fft.irfftn(np.abs(fft.rfftn(usable.astype(float), size)) ** 2, size)
    covariance = fft.irfftn(np.abs(fft.rfftn(rest, size)) ** 2, size) / np.maximum(pairs, 1.0)
    lags = np.meshgrid(*((fft.fftfreq(n, 1 / n) * s) ** 2 for n, s in zip(size, spacing, strict=True)), indexing="ij")
    covariance *= np.exp(-sum(lags) / (2 * TAPER_MM**2))
    spectrum = np.maximum(fft.rfftn(covariance).real, 0.0)
    scale = strength**2 / max(float(fft.irfftn(spectrum, size)[0, 0, 0]), 1e-12)
    return Noise(spectrum * scale, size)
