"""Give a synthetic lesion the grain that the autoencoder smooths away (our option, not the paper's).

r = x - D(E(x)) is what the autoencoder loses of a crop x: the scanner's noise and the finest texture. A decoded lesion
lacks it and looks too smooth in its surroundings, so it gets a Gaussian random field with the autocovariance of r
outside the lesion. The field's strength is the lowest decile of r's local standard deviation there, which edges,
vessels and fibrosis hardly affect. In the middle of real training nodules (33 of `lidc-cubes` with at least 100 voxels
2 mm below the surface) r is 1.50 times as strong (median; solid 1.25, part-solid 1.59, ground-glass 1.65;
`scripts/measure_grain.py`); a slightly too smooth lesion is less visible than a too rough one. The lesion's own
structure is damped by the variance of the grain, so that mean and standard deviation stay the same.
"""

from __future__ import annotations

import numpy as np
from scipy import fft, ndimage

from hrldm.config import HU_MAX, HU_MIN

GAP = 3  # voxels around the lesion that are ignored
LOCAL, REACH = 3.0, 4.0  # in voxels: SD of the window of local SDs; SD of the autocovariance's taper
QUANTILE = 10  # of the local standard deviations, %
CLIP = 3.0  # in local standard deviations: beyond this, r is an edge, not grain


def local_sd(residual: np.ndarray, where: np.ndarray) -> np.ndarray:
    """1D array of the RMS of r around each voxel of `where` (D, D, D) with most of its neighbours in `where` too."""
    weight = ndimage.gaussian_filter(where.astype(float), LOCAL)
    power = ndimage.gaussian_filter(np.where(where, residual, 0.0) ** 2, LOCAL)
    seen = where & (weight > 0.5)
    return np.sqrt(power[seen] / weight[seen])


def residual_of(
    background: np.ndarray, reconstruction: np.ndarray, lesion: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """r of a crop (D, D, D) HU, and where it is usable: outside the lesion and within the autoencoder's HU window."""
    r = np.clip(background, HU_MIN, HU_MAX) - reconstruction
    around = ~ndimage.binary_dilation(lesion, iterations=GAP) & (background > HU_MIN) & (background < HU_MAX)
    return r.astype(float), around


def grain_like(residual: np.ndarray, around: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random field (D, D, D) float32 in HU with the grain of the lesion's surroundings.

    Args:
        residual, around: see `residual_of`
        rng:              random generator

    Returns:
        The field; zeros if no usable voxel is left.
    """
    local = local_sd(residual, around)
    strength = float(np.percentile(local, QUANTILE)) if local.size else 0.0
    if strength == 0:
        return np.zeros(residual.shape, np.float32)
    values = np.where(around, np.clip(residual, -CLIP * strength, CLIP * strength), 0.0)
    size = [fft.next_fast_len(2 * n, real=True) for n in residual.shape]  # no wrap-around
    pairs = fft.irfftn(np.abs(fft.rfftn(around.astype(float), size)) ** 2, size)
    covariance = fft.irfftn(np.abs(fft.rfftn(values, size)) ** 2, size) / np.maximum(pairs, 1.0)
    lags = np.meshgrid(*(fft.fftfreq(n, 1 / n) ** 2 for n in size), indexing="ij")
    covariance *= np.exp(-sum(lags) / (2 * REACH**2))
    spectrum = np.maximum(fft.rfftn(covariance).real, 0.0)
    field = fft.irfftn(fft.rfftn(rng.standard_normal(size)) * np.sqrt(spectrum), size)
    field = field[tuple(slice(n) for n in residual.shape)]
    expected = np.sqrt(fft.irfftn(spectrum, size)[0, 0, 0])
    return (field * (strength / expected)).astype(np.float32)


def with_grain(hu: np.ndarray, grain: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """`hu` (D, D, D) plus the grain; inside the lesion, mean and (unless the grain exceeds it) SD stay as before."""
    out = hu + grain
    before, added = hu[lesion], grain[lesion]
    kept = np.sqrt(max(0.0, 1 - added.var() / max(before.var(), 1e-6)))
    out[lesion] = before.mean() + kept * (before - before.mean()) + added - added.mean()
    return out
