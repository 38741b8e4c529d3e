"""Voxel grids: indices to world mm, and resampling from one grid to another, at any orientation and spacing."""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and ITK name world mm in LPS; its own inverse
STRAIGHT = 0.01  # voxels that two grids may be turned against each other and still count as parallel


def equivalent_diameter(volume_mm3: float) -> float:
    """Diameter (mm) of the sphere of equal volume."""
    return float((6.0 * volume_mm3 / np.pi) ** (1 / 3))


def voxel_size(affine: np.ndarray) -> np.ndarray:
    """(3,) voxel size in mm along the axes of an array with this affine."""
    return np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)


def to_world(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """RAS mm (..., 3) of voxel indices (..., 3); with the inverse affine, indices of world points."""
    return np.asarray(index, float) @ affine[:3, :3].T + affine[:3, 3]


def head_foot(affine: np.ndarray) -> int:
    """Which axis (0, 1 or 2) of an array with this affine runs nearest to head-foot."""
    return int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == 2)[0])


def shifted(affine: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Affine (4, 4) of the part, beginning at index `start`, of an array with this affine."""
    out = affine.copy()
    out[:3, 3] = to_world(affine, start)
    return out


def reach(affine: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum coordinates (3,), under `affine`, of the box between the indices `low` and `high`."""
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
    world = to_world(affine, corners)
    return world.min(0), world.max(0)


def grid_gap(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance (mm) between corresponding corners of one array under affines `a` and `b`."""
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(shape[:3]) - 1)
    return float(np.linalg.norm(to_world(a, corners) - to_world(b, corners), axis=1).max())


def check_geometry(affine: np.ndarray, name: str | Path) -> None:
    """Raise ValueError for an affine that is not finite, not invertible, sheared or of absurd voxel size."""
    size = voxel_size(affine)
    if not np.isfinite(affine).all() or size.min() == 0 or abs(np.linalg.det(affine[:3, :3] / size)) < 1e-3:
        raise ValueError(
            f"{name}: affine is not invertible, the place of a voxel unknown; convert from the DICOM again"
        )
    if size.min() < 0.05 or size.max() > 20:
        raise ValueError(f"{name}: voxels of {' × '.join(f'{s:.4g}' for s in size)} mm; is the affine in mm?")
    cosines = affine[:3, :3] / size
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 0.02:
        raise ValueError(
            f"{name}: sheared affine (gantry tilt?), axes not at right angles; resample to a straight grid"
        )


def sample(
    array: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target_affine: np.ndarray,
    order: int = 1, outside: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Resample `array` (X, Y, Z) to another grid of any orientation; the cost depends on the target's size only.

    Args:
        shape, target_affine: of that grid
        order:    0 nearest (masks, keeps the dtype), 1 linear (float32)
        outside:  value beyond the array; None repeats its edge

    No smoothing before downsampling: at CT spacings it would change the HU histogram more than aliasing does.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    turn, shift = matrix[:3, :3], matrix[:3, 3]
    scale = np.diagonal(turn).copy()
    if np.abs(turn - np.diag(scale)).max() * max(shape) <= STRAIGHT:
        return _along_axes(array, scale, shift, shape, order, outside)
    values = array.view(np.uint8) if array.dtype == bool else array  # scipy knows no bool
    # `constant` would apply `outside` from the centre of the last voxel, `grid-constant` applies it from its edge
    beyond = {"mode": "nearest"} if outside is None else {"mode": "grid-constant", "cval": outside}
    dtype = values.dtype if order == 0 else np.float32
    out = ndimage.affine_transform(values, turn, shift, tuple(shape), dtype, order, **beyond)
    return out.astype(array.dtype, copy=False) if order == 0 else out


def _along_axes(
    array: np.ndarray, scale: np.ndarray, shift: np.ndarray, shape: tuple[int, ...], order: int, outside: float | None
) -> np.ndarray:
    """`sample` where the grids are parallel: one axis after the other, five times as fast as scipy."""
    ends = np.sort([shift, scale * (np.array(shape) - 1) + shift], axis=0)
    low, high = np.clip([np.floor(ends[0]), np.ceil(ends[1])], 0, np.array(array.shape) - 1).astype(int)
    array, shift = array[tuple(map(slice, low, high + 1))], shift - low
    if outside is not None:
        array, shift = np.pad(array, 1, constant_values=outside), shift + 1
    for axis in range(3):
        last = array.shape[axis] - 1
        at = np.clip(scale[axis] * np.arange(shape[axis]) + shift[axis], 0, last)
        if order == 0:
            array = array.take(np.floor(at + 0.5).astype(int), axis)
            continue
        low = at.astype(int)
        weight = np.expand_dims((at - low).astype(np.float32), [a for a in range(3) if a != axis])
        array, step = (array.take(i, axis).astype(np.float32, copy=False) for i in (low, np.minimum(low + 1, last)))
        step -= array
        step *= weight
        array += step
    return array


def resample(array: np.ndarray, affine: np.ndarray, spacing: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Resample `array` (X, Y, Z) to isotropic `spacing` mm along its own axes; same field of view up to half a voxel.

    Returns:
        array (float32) and its affine.
    """
    size, old = voxel_size(affine), np.array(array.shape)
    new = np.maximum(1, np.rint(old * size / spacing)).astype(int)
    scale = spacing / size
    grid = np.diag([*scale, 1.0])
    grid[:3, 3] = (old - 1) / 2 - scale * (new - 1) / 2  # the centres of both grids coincide
    grid = affine @ grid
    return sample(array, affine, tuple(int(n) for n in new), grid), grid


def crop_affine(centre_mm: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(4, 4) affine of an axis-aligned RAS crop of `shape` voxels of 1 mm whose middle voxel (n // 2) lies at `centre_mm`."""
    affine = np.eye(4)
    affine[:3, 3] = np.asarray(centre_mm, float) - np.array(shape) // 2
    return affine
