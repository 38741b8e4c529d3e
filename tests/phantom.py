"""A piece of chest as a scanner with a known point-spread function and known noise shows it."""

import numpy as np
from scipy import ndimage

TISSUE_MM = np.array([6.0, 7.0, 8.0])  # least thickness beyond the lung, along each axis
LUNG_HU, TISSUE_HU = -860.0, 40.0


def scanned(
    spacing: tuple[float, ...],
    psf: tuple[float, ...],
    lesion_mm: float = 0.0,
    bright: tuple[str, ...] = (),
    field_mm: float = 56.0,
) -> np.ndarray:
    """HU (x, y, z) without noise: lung with vessels in soft tissue, on a fine grid, blurred, sampled at the voxels' middles.

    spacing, psf: mm; SDs of a Gaussian
    lesion_mm:    radius of a ball of 0 HU in the middle
    bright:       what lies beyond the pleura: "bone" (ribs 5 mm behind it), "contrast" (a side of 150 HU), "metal"
    """
    spacing, rng = np.array(spacing), np.random.default_rng(0)
    shape, parts = (field_mm / spacing).astype(int), np.where(spacing > 1, 9, 3)
    fine = spacing / parts
    at = [(np.arange(n) + 0.5 - n / 2) * s for n, s in zip(shape * parts, fine, strict=True)]
    x, y, z = np.meshgrid(*(a.astype(np.float32) for a in at), indexing="ij", sparse=True)

    def beyond(mm: float) -> np.ndarray:
        a, b, c = field_mm / 2 - TISSUE_MM + mm
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 >= 1

    hu = np.where(beyond(0), np.float32(TISSUE_HU), np.float32(LUNG_HU))
    for _ in range(8):
        (p, q, r), to, radius = rng.uniform(-0.3, 0.3, 3) * field_mm, rng.standard_normal(3), rng.uniform(0.7, 2.5)
        u, v, w = to / np.linalg.norm(to)
        along = (x - p) * u + (y - q) * v + (z - r) * w
        hu[(x - p) ** 2 + (y - q) ** 2 + (z - r) ** 2 - along**2 < radius**2] = TISSUE_HU
    if "bone" in bright:
        hu[beyond(5) & (np.cos(z / 2) > 0)] = 600.0
    if "contrast" in bright:
        hu[beyond(0) & (x > 5)] = 150.0
    if "metal" in bright:
        hu[beyond(4) & (np.abs(y) < 2) & (np.abs(z) < 4)] = 3000.0
    if lesion_mm:
        hu[x**2 + y**2 + z**2 <= lesion_mm**2] = 0.0
    blur = np.sqrt(np.maximum(np.square(psf) - fine**2 / 12, 0)) / fine  # a fine voxel is a blur, too
    return ndimage.gaussian_filter(hu, blur)[tuple(slice(n // 2, None, n) for n in parts)]


def noise(shape: tuple[int, ...], spacing: tuple[float, ...], sd: float, blur: tuple[float, ...]) -> np.ndarray:
    """White noise blurred by a Gaussian (SDs in mm), of this SD (HU); it wraps around."""
    field = ndimage.gaussian_filter(
        np.random.default_rng(1).standard_normal(shape), np.divide(blur, spacing), mode="wrap"
    )
    return sd * field / field.std()
