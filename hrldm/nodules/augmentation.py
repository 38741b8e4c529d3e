"""Random training patches from volumes in memory: random volume, position and orientation."""

import itertools
from collections.abc import Sequence

import numpy as np

CUBE_SYMMETRIES = tuple(  # (order of the axes, axes to flip)
    (order, tuple(a for a in range(3) if flips[a]))
    for order in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
)


def cube_symmetry(array, index: int):
    """One of the 48 symmetries of the cube applied to the last three axes of an array or tensor; 0 is the identity.

    Raises:
        ValueError: no such symmetry.
    """
    if not 0 <= index < len(CUBE_SYMMETRIES):
        raise ValueError(f"cube symmetry {index} is not in 0..{len(CUBE_SYMMETRIES) - 1}")
    order, flips = CUBE_SYMMETRIES[index]
    lead = array.ndim - 3
    axes = (*range(lead), *(lead + a for a in order))
    mirrored = tuple(lead + a for a in flips)
    if isinstance(array, np.ndarray):
        return np.flip(array.transpose(axes), mirrored)
    return array.permute(axes).flip(mirrored)


def sample_patches(
    volumes: Sequence[np.ndarray], weights: Sequence[float], size: int, n: int, rng: np.random.Generator
) -> np.ndarray:
    """`n` random patches (n, 1, size, size, size) float32 HU, each randomly rotated and mirrored.

    volumes: HU arrays at 1 mm; sides below `size` are edge-padded. weights: sampling weight of each volume.
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
