"""A lesion drawn by the user: read, checked against the scan, and brought to the grid of placing."""

import logging

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import reach, sample, shifted, to_world, voxel_size
from hrldm.ct.label_maps import read_beside
from hrldm.insertion.lung_space import LungSpace
from hrldm.insertion.wish import LARGEST_MM
from hrldm.nodules.pleura import chest_wall
from hrldm.nodules.positions import VESSEL_HU, overlap

logger = logging.getLogger(__name__)
OWN_IN_LUNG = 0.9  # least share of a user's mask; a reader's outline may touch the chest wall
PARTS_MM = 5.0  # largest gap between parts of one lesion in a user's mask
OWN_AIR_HU = -975.0  # a lower mean is trachea, stomach or bulla, where no lesion grows
MOST_TISSUE = 0.5  # share of tissue from which a user is told that a lesion is there already
WALL_MM = 12  # about a lesion, to see which tissue is wall
OWN_LARGEST_MM = 2 * LARGEST_MM  # a longer mask is an organ, not a lesion


def own_lesion(space: LungSpace, path: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Mask, core (None without one) and middle voxel of a lesion drawn by the user: 1 the lesion, 2 its solid core."""
    values, affine = read_beside(path, space.ct)
    if values.min() < 0 or not 1 <= values.max() <= 2:
        labels = f"labels {values.min():g} to {values.max():g}" if values.any() else "empty mask"
        raise ValueError(f"{path}: {labels}; mark the lesion with 1, its solid core with 2")
    found = ndimage.find_objects((values > 0).astype(np.uint8))[0]
    to_space = np.linalg.inv(space.affine) @ affine
    first, last = reach(to_space, [s.start - 0.5 for s in found], [s.stop - 0.5 for s in found])
    longest = float((last - first).max())
    if longest > OWN_LARGEST_MM:
        raise ValueError(f"{path}: {longest:.0f} mm long, lesions have up to {OWN_LARGEST_MM:g}; give the mask of one")
    _check_one(path, values[found] > 0, voxel_size(affine))
    low, high = np.floor(first).astype(int) - 1, np.ceil(last).astype(int) + 2
    shape, grid = tuple(int(n) for n in high - low), shifted(space.affine, low)
    lesion, core = (sample((values >= k).astype(np.float32), affine, shape, grid, outside=0.0) >= 0.5 for k in (1, 2))
    if not lesion.any():
        raise ValueError(f"{path}: {int((values > 0).sum())} voxel(s) that are less than 1 mm³; mark a whole lesion")
    centre = low + np.array(shape) // 2
    voxels = np.argwhere(lesion) + low
    within = ((voxels >= 0) & (voxels < space.hu.shape)).all(1)
    index, n = to_world(np.linalg.inv(space.ct.affine), to_world(space.affine, voxels)), np.array(space.ct.shape)
    beyond = (np.abs(index - (n - 1) / 2) - n / 2) * space.ct.spacing  # mm beyond the CT's faces
    cut = float((beyond > 0.5).any(1).mean())  # half a voxel of 1 mm
    here = tuple(voxels[within].T)
    in_lung, hu = space.labels[here] > 0, space.hu[here]
    if in_lung.sum() < OWN_IN_LUNG * len(voxels):
        raise ValueError(
            f"{path}: {in_lung.sum() / len(voxels):.0%} of the lesion lies in the lungs of this CT, at least {OWN_IN_LUNG:.0%} "
            f"must{f' ({cut:.0%} is beyond the CT)' if cut else ''}; is it the mask of this scan?"
        )
    if (mean := float(hu.mean())) < OWN_AIR_HU:
        raise ValueError(f"{path}: the lesion lies in air (mean {mean:.0f} HU); is it the mask of this scan?")
    if cut:
        logger.warning("%s: %.0f%% of the lesion is beyond the CT and cannot be written", path, 100 * cut)
    if space.occupied[here].any():
        raise ValueError(f"{path}: there is another lesion at this place")
    lesion &= ~_wall(space, lesion, low, path)
    core &= lesion
    if (tissue := float((hu > VESSEL_HU).mean())) > MOST_TISSUE:
        logger.warning(
            "%s: %.0f%% of the lesion is tissue already (mean %.0f HU), which is replaced; `hrldm erase` turns a lesion into lung",
            path, 100 * tissue, mean,
        )  # fmt: skip
    return lesion, core if core.any() else None, centre


def _wall(space: LungSpace, lesion: np.ndarray, low: np.ndarray, path: str) -> np.ndarray:
    """Voxels (x, y, z) of a lesion's box, from `low` on, that are chest wall or mediastinum; how much of it is said."""
    around = np.array(lesion.shape) + 2 * WALL_MM
    here, own = overlap(low - WALL_MM, tuple(around.tolist()), space.hu.shape)
    wall = np.zeros(around, bool)
    wall[own] = chest_wall(space.hu[here], space.labels[here] > 0)[0]
    wall = wall[(slice(WALL_MM, -WALL_MM),) * 3]
    if (share := float(wall[lesion].mean())) > 0:
        logger.warning("%s: %.1f%% of the lesion is chest wall or mediastinum, which stays as it is", path, 100 * share)
    return wall


def _check_one(path: str, lesion: np.ndarray, spacing: np.ndarray) -> None:
    """Raise ValueError for a mask of several lesions or with stray voxels: their middle would lie between them."""
    parts, n = ndimage.label(lesion, np.ones((3, 3, 3)))
    if n < 2:
        return
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    distance = ndimage.distance_transform_edt(parts != largest, spacing)
    gap = max(ndimage.minimum(distance, parts, range(1, n + 1)))
    if gap > PARTS_MM + spacing.max():
        raise ValueError(
            f"{path}: {n} parts, one of them {gap:.0f} mm from the largest; give the mask of one lesion, without stray voxels"
        )
