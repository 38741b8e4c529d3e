"""Positions at the pleura: where the CT shows it, and a shape moved there until it touches with a narrow or a broad base."""

import functools
import itertools

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter
from hrldm.ct.lungs import depth_mm
from hrldm.nodules.masks import PAD, box_of, cropped, highest, offsets
from hrldm.nodules.positions import SHELL_MM, VESSEL_HU, LungMap, PlacementReport, no_place, overlap, why_not

# least and greatest diameter of the contact with the pleura (of the disc of equal area), as a share of the lesion's
BASES = {"narrow": (0.2, 0.45), "broad": (0.6, np.inf)}
PLEURAL_TRIES = 200  # at the pleura, each of some 50 ms
PLEURA_MM, STEP_MM = 4.0, 0.5  # the pleura lies this near to the labels' surface; steps towards it
VESSEL_MM = 4.0  # tissue that is no thicker is no chest wall
CLOSING_MM, GRID_MM = 20.0, 2  # fills in the hilum and the vessels that labels leave out, on this grid


def chest_wall(hu: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lies beyond the pleura as the CT shows it, not as lung labels do, whose surface is some mm off.

    hu:     (x, y, z) at 1 mm
    inside: (x, y, z) bool, the lung labels

    Returns:
        Two masks (x, y, z). The wall: all that is further than `PLEURA_MM` from the labels, and tissue up to as deep in
        them that continues it. Its tissue where that is thicker than `VESSEL_MM`, so no vessel that comes out of it.
    """
    beyond, tissue = depth_mm(~inside) > PLEURA_MM, hu > VESSEL_HU
    parts, n = ndimage.label(beyond | tissue & (depth_mm(inside) <= PLEURA_MM))
    outer = np.zeros(n + 1, bool)
    outer[parts[beyond]] = True
    wall = outer[parts]
    thick = depth_mm(~(depth_mm(wall) > VESSEL_MM / 2)) <= VESSEL_MM / 2
    return wall, wall & tissue & thick


@functools.lru_cache(maxsize=1)
def _filled(lungs: LungMap) -> np.ndarray:
    """Depth (x, y, z) in mm below the surface of the lungs closed by `CLOSING_MM`, every `GRID_MM`, with a margin of
    `_MARGIN` voxels; not above 0 outside."""
    inside = np.pad(lungs.lobes[(slice(None, None, GRID_MM),) * 3] > 0, _MARGIN)
    grown = depth_mm(~inside) * GRID_MM <= CLOSING_MM
    return depth_mm(grown) * GRID_MM - CLOSING_MM - GRID_MM / 2


_MARGIN = int(CLOSING_MM) // GRID_MM + 2


def below_surface(lungs: LungMap, low: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Depth in mm below the surface of the lungs with hilum and vessels filled in: of voxels from `low` on, in this shape."""
    offset = np.asarray(low) / GRID_MM + _MARGIN
    return ndimage.affine_transform(_filled(lungs), np.full(3, 1 / GRID_MM), offset, tuple(shape), order=1)


def at_pleura(
    ct: np.ndarray,
    lungs: LungMap,
    distance: np.ndarray,
    n_voxels: int,
    rng: np.random.Generator,
    base: str,
    lobe: int | tuple[int, ...] | None = None,
    occupied: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, PlacementReport]:
    """A random position at the pleura, and the lesion that touches it there with one of `BASES`.

    ct, lungs, lobe, occupied: as for `sample_position`
    distance, n_voxels: of `shape_fitting.fitted_distance`

    Returns:
        mask of `n_voxels` lung voxels, CT voxel (3,) of its middle voxel `shape // 2`, and the report.

    Raises:
        ValueError: no position found.
    """
    reach = float(np.linalg.norm(offsets(highest(distance, n_voxels)), axis=1).max())
    diameter, report = equivalent_diameter(n_voxels), PlacementReport()
    starts = lungs.candidates(rng, 0.3 * diameter, reach + SHELL_MM, lobe)
    for start in itertools.islice(starts, PLEURAL_TRIES):
        lesion, middle, reason = _approach(ct, lungs, distance, n_voxels, start, *BASES[base])
        if reason is None:
            mask, box = cropped(lesion), box_of(lesion)
            centre = middle - np.array(lesion.shape) // 2 + [s.start - PAD for s in box] + np.array(mask.shape) // 2
            label = lungs.lobes[tuple(centre)]
            fits = label > 0 if lobe is None else np.isin(label, lobe)
            reason = why_not(offsets(mask) + centre, ct, occupied) if fits else "another lobe"
        if reason is None:
            report.accepted += 1
            return mask, centre, report
        report.rejected[reason] += 1
    raise no_place("subpleural", diameter, report)


def _approach(
    ct: np.ndarray, lungs: LungMap, distance: np.ndarray, n_voxels: int, start: np.ndarray, least: float, most: float
) -> tuple[np.ndarray | None, np.ndarray | None, str | None]:
    """Move a shape to the pleura nearest to `start`, cut by the wall but of constant volume, until its contact (the voxels
    with a face on the wall) has `least` of its diameter. The lesion in the array of `distance`, the CT voxel at the middle
    of that, and None; or why there is none."""
    voxels = offsets(highest(distance, n_voxels))
    reach = float(np.linalg.norm(voxels, axis=1).max())
    to = lungs.outwards(start, reach + SHELL_MM)
    if below_surface(lungs, start + to, (1, 1, 1)).item() > PLEURA_MM:
        return None, None, "hilum or vessel"
    far = np.linalg.norm(to)
    meets = far - (voxels @ to).max() / far  # mm from the start, where the shape meets the labels' surface
    half = int(np.ceil(reach + 2 * PLEURA_MM)) + 1
    here, _ = overlap(np.rint(start + meets / far * to).astype(int) - half, (2 * half + 1,) * 3, ct.shape)
    low = np.array([s.start for s in here])
    wall, pleura = chest_wall(ct[here], lungs.lobes[here] > 0)
    pleura &= below_surface(lungs, low, pleura.shape) <= PLEURA_MM
    way = np.arange(meets - PLEURA_MM, far + PLEURA_MM, STEP_MM)
    middles = np.rint(start + np.outer(way / far, to)).astype(int) - low
    if (middles[0] < 0).any() or (middles[0] >= wall.shape).any() or wall[tuple(middles[0])]:
        return None, None, "chest wall"
    free = ndimage.label(~wall)[0]
    free = free == free[tuple(middles[0])]
    touching, unseen = (ndimage.binary_dilation(x) & free for x in (pleura, wall & (ct[here] <= VESSEL_HU)))
    diameter = equivalent_diameter(n_voxels)
    for step, middle in enumerate(dict.fromkeys(map(tuple, middles.tolist()))):
        there, own = overlap(np.array(middle) - np.array(distance.shape) // 2, distance.shape, free.shape)
        inside = np.full(distance.shape, -np.inf)
        inside[own] = np.where(free[there], distance[own], -np.inf)
        lesion = _in_one(inside, n_voxels)
        if lesion is None:
            return None, None, "no room"
        contact = 2 * np.sqrt((lesion[own] & touching[there]).sum() / np.pi) / diameter
        if contact and not step:
            return None, None, "no room"
        if contact >= least:
            break
    else:
        return None, None, "too far from the pleura"
    if contact > most:
        return None, None, "contact too wide"
    if (lesion[own] & unseen[there]).any():
        return None, None, "no pleura to be seen"
    return lesion, low + middle, None


def _in_one(distance: np.ndarray, n_voxels: int) -> np.ndarray | None:
    """The `n_voxels` highest; of a lesion that the wall cuts in parts, the largest, grown to the volume. None: no room."""
    while np.isfinite(distance).sum() >= n_voxels:
        lesion = highest(distance, n_voxels)
        parts, n = ndimage.label(lesion)
        if n == 1:
            return lesion
        nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
        distance = np.where(parts[tuple(nearest)] == np.bincount(parts.ravel())[1:].argmax() + 1, distance, -np.inf)
    return None
