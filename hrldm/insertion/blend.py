"""Put a generated lesion into the original voxels and change nothing else.

Notation: d = distance (mm) of a voxel to the lesion mask, 0 inside it. The weight is a Gaussian cut at the margin
m = 3σ and shifted so that it ends in zero without a step:

    w(d) = (exp(−d²/2σ²) − exp(−m²/2σ²)) / (1 − exp(−m²/2σ²))  for d < m,   w = 0 for d ≥ m,   hence w = 1 on the mask.

With x the original HU, g the generated HU, R' the interpolation from the original's grid to the generated crop's and R
the way back (linear; where the original is coarser, the mean over its voxel, as a scanner's partial volume):

    out = x + R(w·(g − R'x)).

Only the difference is interpolated, so the original's own fine texture stays and g = R'x changes nothing; on a common
grid R is the identity and out = g on the mask. A voxel with R(w) = 0 is never computed: its stored value is copied,
bit for bit.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import reach, sample, to_world, voxel_size
from hrldm.ct.volume import CT

MARGIN_SIGMAS = 3.0  # the weight is exactly 0 from this many σ outside the mask
_NEGLIGIBLE = 1e-5  # interpolated weights up to here count as 0: less than 0.02 HU


def feather(mask: np.ndarray, sigma_mm: float, spacing: float | np.ndarray) -> np.ndarray:
    """Weights w(d) of the module docstring: exactly 1 on the mask, exactly 0 from `MARGIN_SIGMAS`·σ outside it.

    Args:
        mask:      (X, Y, Z) bool
        sigma_mm:  fall-off; 0 pastes the mask hard
        spacing:   voxel size in mm, one number or three

    Returns:
        (X, Y, Z) float32 in [0, 1].

    Raises:
        ValueError: empty mask, σ negative or not finite.
    """
    mask = np.asarray(mask, bool)
    if not mask.any():
        raise ValueError("empty mask, there is nothing to paste; give the nodule's mask")
    if not 0 <= sigma_mm < np.inf:
        raise ValueError(f"sigma_mm {sigma_mm} must be finite and not negative; 0 pastes without a feather")
    weights = mask.astype(np.float32)
    if sigma_mm == 0:
        return weights
    spacing = np.broadcast_to(np.asarray(spacing, float), 3)
    margin = MARGIN_SIGMAS * sigma_mm
    box = _grown_box(mask, np.ceil(margin / spacing).astype(int))
    distance = ndimage.distance_transform_edt(~mask[box], sampling=spacing)
    end = np.exp(-(MARGIN_SIGMAS**2) / 2)
    w = (np.exp(-(distance**2) / (2 * sigma_mm**2)) - end) / (1 - end)
    weights[box] = np.where(distance < margin, np.clip(w, 0, 1), 0)
    return weights


def blended(
    original: CT, generated_hu: np.ndarray, generated_affine: np.ndarray, mask: np.ndarray, sigma_mm: float = 1.0
) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of the original's grid that a generated lesion reaches, and its new stored values.

    Args:
        original:          the CT, any orientation, spacing and obliquity
        generated_hu:      (x, y, z) HU of the crop, for example 1 mm RAS
        generated_affine:  (4, 4) of the crop
        mask:              (x, y, z) bool, the lesion on the crop's grid
        sigma_mm:          feather, see `feather`

    Returns:
        slices of the original's grid, and the new values (x, y, z) there, in the dtype of `original.stored`; nothing
        else changes.

    Raises:
        ValueError: shapes differ, generated values not finite, empty mask, lesion outside the CT, or the feather is cut
            by the crop's edge inside the CT (the lesion would end in a step).
    """
    name = original.source or "CT"
    if mask.shape != generated_hu.shape or mask.ndim != 3:
        raise ValueError(f"{name}: mask {mask.shape} and generated crop {generated_hu.shape} must be one 3D grid")
    if not np.isfinite(generated_hu).all():
        raise ValueError(f"{name}: NaN or infinite values in the generated crop; try another seed or checkpoint")
    weights = feather(mask, sigma_mm, voxel_size(generated_affine))
    _check_uncut(weights, generated_affine, original)
    box, box_affine, reached = _on_grid(weights, generated_affine, original, _NEGLIGIBLE)
    before = sample(original.array, original.affine, mask.shape, generated_affine)  # R'x
    change = _project(weights * (generated_hu - before), generated_affine, reached.shape, box_affine)
    touched = reached > _NEGLIGIBLE
    out = original.stored[box].copy()
    hu = original.array[box][touched] + change[touched].astype(np.float64)
    out[touched] = original.to_stored(hu)
    return box, out


def mask_on_grid(mask: np.ndarray, affine: np.ndarray, ct: CT) -> tuple[tuple[slice, ...], np.ndarray]:
    """A lesion mask (x, y, z) resampled to the grid of `ct`: the part it reaches, and the voxels there (bool) that are
    at least half lesion.

    A lesion too small for that gets the one voxel that holds most of it.

    Raises:
        ValueError: the lesion lies outside the CT.
    """
    box, _, share = _on_grid(mask.astype(np.float32), affine, ct, 0.0)
    return box, share >= min(0.5, share.max())


def _on_grid(
    weights: np.ndarray, affine: np.ndarray, ct: CT, least: float
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """Weights on the part of the CT's grid that they can reach (one crop voxel around those above 0): the slices and the
    affine of that part, and R of the weights.

    Raises:
        ValueError: none is above `least` there.
    """
    inner = _grown_box(weights > 0, np.zeros(3, int))
    to_ct = np.linalg.inv(ct.affine) @ affine
    first, last = reach(to_ct, [s.start - 1 for s in inner], [s.stop for s in inner])
    low = np.maximum(np.ceil(first - 0.5).astype(int), 0)  # voxel i covers i ± 1/2
    high = np.minimum(np.floor(last + 0.5).astype(int) + 1, ct.shape)
    shift = np.eye(4)
    shift[:3, 3] = low
    box_affine = ct.affine @ shift
    if (low >= high).any() or not (reached := _project(weights, affine, high - low, box_affine)).max() > least:
        raise ValueError(f"{ct.source or 'CT'}: the lesion lies outside the CT; place it inside")
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), box_affine, reached


def _project(values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target_affine: np.ndarray) -> np.ndarray:
    """R: `values` (x, y, z), 0 outside, on a grid of `shape`, averaged over the voxels of a coarser one. float32."""
    parts = np.maximum(1, np.ceil(voxel_size(target_affine) / voxel_size(affine) - 1e-3)).astype(int)
    finer = np.diag([*(1 / parts), 1.0])
    finer[:3, 3] = (1 / parts - 1) / 2  # sub-voxel j of n lies at (j + 1/2)/n − 1/2
    fine = sample(values, affine, tuple(int(n) for n in shape * parts), target_affine @ finer, outside=0.0)
    blocks = [size for pair in zip(shape, parts, strict=True) for size in pair]
    return fine.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float64).astype(np.float32)


def _grown_box(mask: np.ndarray, by: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of `mask`, grown by `by` voxels on each side within the array."""
    boxes = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(0, b.start - g), min(n, b.stop + g)) for b, g, n in zip(boxes, by, mask.shape, strict=True))


def _check_uncut(weights: np.ndarray, affine: np.ndarray, ct: CT) -> None:
    """Refuse a feather that the crop's face cuts although the CT continues beyond that face."""
    beyond = ndimage.binary_dilation(np.pad(weights > 0, 1))
    beyond[1:-1, 1:-1, 1:-1] = False  # leaves the voxels behind the faces
    index = to_world(np.linalg.inv(ct.affine) @ affine, np.argwhere(beyond) - 1)
    if ((index >= -0.5) & (index <= np.array(ct.shape) - 0.5)).all(1).any():
        raise ValueError(f"{ct.source or 'CT'}: the edge of the generated crop cuts the feather; take a larger crop")
