"""What a CT's scanner and reconstruction did to the anatomy about a place: sharpness and noise along each axis.

Both are measured on the CT's own voxels. Sharpness is the SD of the Gaussian point-spread function that fits the edges
between lung and soft tissue (pleura, mediastinum, large vessels) along each axis best. Noise is the autocovariance of
what a smooth background leaves of aerated lung.

A lesion put into the scan gets both (`insertion/finish.py`); without them it is told from real ones by its isotropy alone.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy import fft, ndimage, stats

from hrldm.ct.volume import CT

# edges
LUNG_HU, TISSUE_HU = -650.0, -200.0  # at least this dark and this bright, EDGE_MM to both sides of an edge
BRIGHTEST_HU = 60.0  # bone and contrast beyond the pleura would move the upper level of an edge
EDGE_MM = 4.0
BESIDE_MM = 0.7  # SD of the smoothing along the other two axes, against noise
ACROSS = 0.85  # least share of the squared gradient along the axis: more oblique surfaces look blurred
COARSEST_MM = 6.0  # along an axis with thicker voxels, what looks like an edge is anatomy
LEAST_EDGES, MOST_EDGES = 100, 1000
SCAN_EDGES = 1000  # edges that the whole scan counts as, beside those about a place
PART_MM, MOST_PARTS = 50.0, 16  # parts of the scan that are looked at for that
PART_SHARE = 0.1  # least share of a part that is lung, and that is tissue
USUAL_PSF_MM = 0.7  # where too few edges are seen
# noise
SMOOTH_MM = 4.0  # Gaussian whose rest is noise: wider keeps structure of the lung, narrower takes coarse noise away
AERATED_HU = (-980.0, -750.0)  # of the surroundings' mean, without vessels, bullae and air outside
GUARD_MM = 1.5  # around what is not aerated lung
CLIP = 3.0  # in local SDs: beyond, it is an edge
TAPER_MM = 4.0  # SD of the Gaussian that ends the autocovariance
QUANTILE = 25  # of the local SDs, %: vessels and fibrosis raise the others
_measured = weakref.WeakKeyDictionary()  # by CT, its `scan_psf_mm`


@dataclass(frozen=True, eq=False)
class Noise:
    """Stationary noise on one voxel grid: `spectrum`, the real FFT of its autocovariance, on a grid of `size`."""

    spectrum: np.ndarray
    size: tuple[int, int, int]

    @property
    def autocovariance(self) -> np.ndarray:
        """HU² by lag in voxels, lag (0, 0, 0) first, negative ones at the end, as an FFT orders them."""
        return fft.irfftn(self.spectrum, self.size)

    @functools.cached_property
    def sd(self) -> float:
        """HU."""
        return float(np.sqrt(max(self.autocovariance[0, 0, 0], 0.0)))

    def field(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """A random field (x, y, z) in HU with this autocovariance; shapes beyond `size` repeat."""
        white = rng.standard_normal(self.size)
        field = fft.irfftn(fft.rfftn(white) * np.sqrt(self.spectrum), self.size)
        return np.pad(field, [(0, max(0, n - m)) for n, m in zip(shape, self.size, strict=True)], mode="wrap")[
            tuple(slice(n) for n in shape)
        ]


# -- sharpness ---------------------------------------------------------------------------------------------------------


def scan_psf_mm(ct: CT) -> np.ndarray:
    """SD (3,) in mm of the Gaussian point-spread function along R, A and S, from parts all over the CT; measured once."""
    if ct not in _measured:
        _measured[ct] = psf_mm(*_parts(ct))
    return _measured[ct]


def _parts(ct: CT) -> tuple[list[np.ndarray], np.ndarray]:
    """At most `MOST_PARTS` parts (x, y, z) of the CT with lung and tissue, along R, A and S, and their spacing (3,)."""
    turn = nib.io_orientation(ct.affine)
    hu = nib.apply_orientation(ct.array, turn)  # a view
    spacing = ct.spacing[np.argsort(turn[:, 0])]
    side, every = np.ceil(PART_MM / spacing).astype(int), np.maximum(1, 2 / spacing).astype(int)
    mixed = []
    for start in np.ndindex(*np.maximum(1, np.array(hu.shape) // side)):
        part = hu[tuple(slice(a * n, (a + 1) * n) for a, n in zip(start, side, strict=True))]
        few = part[tuple(slice(None, None, n) for n in every)]
        lung = (few > AERATED_HU[0]) & (few < LUNG_HU)
        if min(lung.mean(), (few > TISSUE_HU).mean()) > PART_SHARE:
            mixed.append(part)
    return mixed[:: -(-len(mixed) // MOST_PARTS)] if mixed else [hu[:1]], spacing


def psf_mm(parts: Sequence[np.ndarray], spacing: np.ndarray, scan: np.ndarray | None = None) -> np.ndarray:
    """SD (3,) in mm of the Gaussian point-spread function along each axis.

    parts:   of the CT, each (x, y, z) HU with some pleura, mediastinum or large vessels
    spacing: (3,) mm
    scan:    (3,) mm, that of the whole CT, which counts as `SCAN_EDGES` edges

    x and y share the reconstruction's kernel: if their spacing is equal, their edges are taken together. An axis with
    fewer than `LEAST_EDGES` edges, or too coarse for any, has that of `scan`; without, `USUAL_PSF_MM` or the SD of its
    voxel's width, if that is more.
    """
    spacing = np.asarray(spacing, float)
    usual = np.maximum(USUAL_PSF_MM, spacing / np.sqrt(12)) if scan is None else np.asarray(scan, float)
    found = [_edges(np.asarray(hu), spacing) for hu in parts]
    seen, added, oblique, n = usual**2, np.zeros(3), np.eye(3), np.zeros(3)
    for axes in ([0, 1], [2]) if np.isclose(spacing[0], spacing[1], rtol=1e-3) else ([0], [1], [2]):
        profiles, ratios = (np.concatenate([part[axis][k] for part in found for axis in axes]) for k in (0, 1))
        if len(profiles) < LEAST_EDGES:
            continue
        every, width = slice(None, None, len(profiles) // MOST_EDGES + 1), spacing[axes[0]]
        seen[axes] = (_blur(profiles[every], _reach(width)) * width) ** 2
        # an oblique edge adds the blur of the other axes: sd² = Σ_j psf_j² n_j² / n_axis²
        ratio = ratios[every].mean(0)
        added[axes] = (ratio.sum() - 1) * BESIDE_MM**2
        oblique[axes] = ratio
        oblique[np.ix_(axes, axes)] = ratio[axes].sum() * np.eye(len(axes))
        n[axes] = len(profiles[every])
    variance = np.maximum(np.linalg.solve(oblique, seen - added), 0.3**2 * seen)
    share = 1.0 if scan is None else n / (n + SCAN_EDGES)
    return np.sqrt(share * variance + (1 - share) * usual**2)


def _reach(spacing: float) -> int:
    """Voxels to both sides of an edge."""
    return max(2, int(np.ceil(EDGE_MM / spacing)))


def _edges(hu: np.ndarray, spacing: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The edges between lung and tissue along each axis: profiles (n, 2 reach + 2) from 0 to 1, that cross in the middle,
    and the squares (n, 3) of their normals over that along the axis."""
    hu = np.clip(hu, -1024, BRIGHTEST_HU).astype(np.float32)
    smooth = ndimage.gaussian_filter(hu, 1.5 / spacing)
    slope = np.stack([np.gradient(smooth, s, axis=a) if hu.shape[a] > 1 else 0 * smooth for a, s in enumerate(spacing)])
    share = slope**2 / np.maximum((slope**2).sum(0), 1e-6)
    found = []
    for axis in range(3):
        beside = np.where(np.arange(3) == axis, 0.0, BESIDE_MM / spacing)
        found.append(_edges_along(ndimage.gaussian_filter(hu, beside), share, axis, spacing[axis]))
    return found


def _edges_along(hu: np.ndarray, share: np.ndarray, axis: int, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Those along one axis; share (3, x, y, z): the squares of the normals."""
    reach = _reach(spacing)
    hu, share = np.moveaxis(hu, axis, 2), np.moveaxis(share, axis + 1, 3)
    n = hu.shape[2]
    if n < 2 * reach + 2 or spacing > COARSEST_MM:
        return np.zeros((0, 2 * reach + 2), np.float32), np.zeros((0, 3), np.float32)
    size = np.abs(np.diff(hu, axis=2))
    inner = slice(reach, n - 1 - reach)
    peak = (size == ndimage.maximum_filter1d(size, 2 * reach + 1, axis=2))[:, :, inner]
    ends = (hu[:, :, 1:] + hu[:, :, :-1]) / 2
    left, right = ends[:, :, : n - 1 - 2 * reach], ends[:, :, 2 * reach :]
    lung, tissue = np.minimum(left, right), np.maximum(left, right)
    across = share[axis][:, :, inner] >= ACROSS
    at = np.argwhere(peak & (lung < LUNG_HU) & (tissue > TISSUE_HU) & across)
    profiles = hu[at[:, 0, None], at[:, 1, None], at[:, 2, None] + np.arange(2 * reach + 2)]
    falling = profiles[:, -1] < profiles[:, 0]
    profiles[falling] = profiles[falling, ::-1]
    normals = share[:, at[:, 0], at[:, 1], at[:, 2] + reach].T
    return _from_0_to_1(profiles), normals / normals[:, [axis]]


def _from_0_to_1(profiles: np.ndarray) -> np.ndarray:
    """Rising profiles (..., k) scaled by the means of the two voxels at either end."""
    low, high = profiles[..., :2].mean(-1, keepdims=True), profiles[..., -2:].mean(-1, keepdims=True)
    return (profiles - low) / (high - low)


@functools.cache
def _blurred_edges(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """SDs (m,) in voxels, and what `_edges` sees of edges so blurred, at all places between two voxels (m, places, k)."""
    sds, places = np.geomspace(0.1, reach, 200), np.linspace(-0.25, 1.25, 25)
    at = np.arange(-reach, reach + 2)
    return sds, _from_0_to_1(stats.norm.cdf((at - places[:, None]) / sds[:, None, None])).astype(np.float32)


def _blur(profiles: np.ndarray, reach: int) -> float:
    """SD (voxels) of the Gaussian blur that fits edges (n, k) best, each in its own place: least sum of distances."""
    sds, edges = _blurred_edges(reach)
    edges = edges.reshape(-1, edges.shape[-1])
    squares = (profiles**2).sum(1, keepdims=True) + (edges**2).sum(1) - 2 * profiles @ edges.T
    nearest = squares.reshape(len(profiles), len(sds), -1).min(2)
    return float(sds[np.sqrt(nearest.clip(0)).sum(0).argmin()])


# -- noise -------------------------------------------------------------------------------------------------------------


def noise_of(hu: np.ndarray, spacing: np.ndarray) -> Noise:
    """The noise of aerated lung.

    hu:      (x, y, z), the part of the CT about a place
    spacing: (3,) mm

    Without aerated lung, the noise is zero.
    """
    spacing = np.asarray(spacing, float)
    hu = np.asarray(hu, float)
    low, high = AERATED_HU
    near = ndimage.gaussian_filter(hu, 1.0 / spacing)
    usable = (near > low) & (near < high)
    usable &= ndimage.distance_transform_edt(usable, spacing) > GUARD_MM
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
