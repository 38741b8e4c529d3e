"""Masks of single lesions, (x, y, z) bool: their box, their voxels, and distances to their surface."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

PAD = 2  # empty voxels around a shape


def box_of(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice, slice]:
    """The smallest box around a mask that is not empty, `margin` voxels wider where the array is."""
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(s.start - margin, 0), s.stop + margin) for s in found)


def cropped(mask: np.ndarray) -> np.ndarray:
    """The mask with exactly `PAD` empty voxels on each side."""
    return np.pad(mask[box_of(mask)], PAD)


def offsets(mask: np.ndarray) -> np.ndarray:
    """(n, 3) voxels of a mask relative to its middle voxel `shape // 2`."""
    return np.argwhere(mask) - np.array(mask.shape) // 2


def highest(values: np.ndarray, n: int) -> np.ndarray:
    """Mask of the `n` highest values; of all that equal the n-th, if there are ties."""
    return values >= np.partition(values.ravel(), values.size - n)[values.size - n]


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance in voxels to the nearest one outside, which lie beyond the array too; 0 outside."""
    return ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]


def signed_distance(mask: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Distance (mm) to the other side of the surface, positive inside; the mask must not fill the array."""
    return ndimage.distance_transform_edt(mask, spacing) - ndimage.distance_transform_edt(~mask, spacing)
