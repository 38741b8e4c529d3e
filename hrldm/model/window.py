"""The cube of the latent grid that Stage II sees: the lesion and some context, not the whole crop.

Everything outside M is given, and Eq. 5 looks only inside M, while the U-Net's cost grows with its input volume. A
nodule's window depends on its mask alone, so the network sees the same in training and sampling.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hrldm.model.autoencoder import FACTOR

SMALLEST = 6  # latent voxels; half of all nodules fit, and so share one side


@dataclass(frozen=True)
class Window:
    """A cube of `side` latent voxels that begins at `start`."""

    start: tuple[int, int, int]
    side: int

    @property
    def latent(self) -> tuple[slice, ...]:
        """Slices of the latent grid, after any leading axes."""
        return (..., *(slice(s, s + self.side) for s in self.start))

    @property
    def voxels(self) -> tuple[slice, ...]:
        """Slices of the voxel grid, after any leading axes."""
        return (..., *(slice(FACTOR * s, FACTOR * (s + self.side)) for s in self.start))


def latent_extent(mask: np.ndarray) -> list[tuple[int, int]]:
    """Per axis, the first latent voxel of a voxel mask (D, H, W) and the one after its last.

    Raises:
        ValueError: empty mask.
    """
    if not mask.any():
        raise ValueError("empty lesion mask: nothing to inpaint")
    hits = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return [(int(hit[0]) // FACTOR, int(hit[-1]) // FACTOR + 1) for hit in hits]


def lesion_window(mask: np.ndarray, context: int | None, levels: int) -> Window:
    """The window of one lesion.

    mask:    (D, D, D) voxels
    context: latent voxels to include on each side of the lesion; None takes the whole grid
    levels:  of the U-Net, which halves the grid between levels: the side is a multiple of 2^(levels - 1)
    """
    size = mask.shape[0] // FACTOR
    if context is None:
        return Window((0, 0, 0), size)
    extent = latent_extent(mask)
    stride = 2 ** (levels - 1)
    wanted = max(SMALLEST, max(hi - lo for lo, hi in extent) + 2 * context)
    side = min(-(-wanted // stride) * stride, size)
    start = (min(max((lo + hi - side) // 2, 0), size - side) for lo, hi in extent)
    return Window(tuple(start), side)


def by_side(windows: Iterable[Window]) -> list[np.ndarray]:
    """Indices of the windows grouped by side, smallest first: one side can form a batch."""
    sides = np.array([w.side for w in windows])
    return [np.flatnonzero(sides == side) for side in np.unique(sides)]
