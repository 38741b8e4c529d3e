"""Random training patches out of volumes in memory: where, which way round, and from which volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AIR_HU = -1000


def cube_symmetry(array: np.ndarray, index: int) -> np.ndarray:
    """One of the 48 symmetries of the cube (6 axis orders x 8 flips) applied to the last three axes; 0 is identity."""
    if not 0 <= index < 48:
        raise ValueError(f"cube symmetry {index} is not in 0..47")
    order = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))[index // 8]
    lead = array.ndim - 3
    array = np.transpose(array, (*range(lead), *(lead + a for a in order)))
    return array[(..., *(slice(None, None, -1) if index >> b & 1 else slice(None) for b in range(3)))]


def sample_patches(
    volumes: Sequence[np.ndarray], weights: Sequence[float], size: int, n: int, rng: np.random.Generator
) -> np.ndarray:
    """`n` random patches (n, 1, size, size, size) float32 HU, each randomly turned and mirrored.

    volumes: HU arrays at 1 mm; smaller sides are padded by their edge. weights: chance of each volume.
    """
    p = np.asarray(weights, float)
    out = np.empty((n, 1, size, size, size), np.float32)
    for i in range(n):
        volume = volumes[rng.choice(len(volumes), p=p / p.sum())]
        start = [rng.integers(0, max(s - size, 0) + 1) for s in volume.shape]
        patch = volume[tuple(slice(a, a + size) for a in start)]
        if min(patch.shape) < size:
            short = [size - s for s in patch.shape]
            patch = np.pad(patch, [(s // 2, s - s // 2) for s in short], mode="edge")
        out[i, 0] = cube_symmetry(patch, int(rng.integers(48)))
    return out
