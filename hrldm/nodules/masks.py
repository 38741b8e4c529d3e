"""Masks of single lesions, (x, y, z) bool: their box, their voxels, distances to their surface, and their components."""

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.histograms import SOLID_HU

PAD = 2  # empty voxels around a shape
SMOOTH_MM = 1.0  # SD of the mean that is compared with `SOLID_HU`: a reader outlines a core, not single voxels
THIN = 0.2  # radius of the opening's ball, of the lesion's diameter: agrees best with readers' ratings of spiculation


def box_of(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice, slice]:
    """The smallest box around a mask that is not empty, `margin` voxels wider where the array is."""
    # as ndimage.find_objects, faster
    seen = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(max(int(s[0]) - margin, 0), int(s[-1]) + 1 + margin) for s in seen)


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


def solid_part(hu: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Voxels of a lesion at 1 mm about which its own mean lies above `SOLID_HU`."""
    here = box_of(mask, 1)
    inside = mask[here].astype(np.float32)
    mean = ndimage.gaussian_filter(hu[here] * inside, SMOOTH_MM) / ndimage.gaussian_filter(inside, SMOOTH_MM).clip(1e-6)
    out = np.zeros(mask.shape, bool)
    out[here] = (mean > SOLID_HU) & mask[here]
    return out


def components(mask: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """(3, x, y, z) solid, ground-glass and spiculation of a lesion at 1 mm (Section 3.2.1); together they are the mask, once.

    Spiculation is the mask minus its opening by a ball of `THIN` times its diameter, unless that takes all.

    solid: solid voxels, from `solid_part` or a core asked for
    """
    out = np.zeros((3, *mask.shape), bool)
    here = box_of(mask, 1)
    whole, radius = mask[here], THIN * equivalent_diameter(mask.sum())
    deep = ndimage.distance_transform_edt(whole) > radius
    body = whole & (ndimage.distance_transform_edt(~deep) <= radius) if deep.any() else whole
    core = solid[here] & body
    out[(slice(None), *here)] = core, body & ~core, whole & ~body
    return out
