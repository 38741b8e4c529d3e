"""Choose a nodule's position, shape and histogram from its wish, before any network runs.

Positions are searched on a 1 mm RAS grid over the lungs. A wish brings its own lesion as a mask file, or gets a shape
of the library, a position for it, and a real histogram that is not darker than the lung there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter, reach, sample, shifted, to_world, voxel_size
from hrldm.ct.label_maps import LOBE_NAMES, read_beside
from hrldm.ct.volume import CT, to_ras
from hrldm.insertion.blend import MARGIN_SIGMAS
from hrldm.insertion.generator import FEATHER_MM
from hrldm.insertion.wish import LARGEST_MM, Wish, read_histogram
from hrldm.nodules.histograms import FLOOR_REACH, choose_histogram, lung_floor, with_solid_share
from hrldm.nodules.positions import LungMap, PlacementReport, sample_position
from hrldm.nodules.shape_fitting import choose_shape, core_of, fitted
from hrldm.nodules.shapes import ShapeLibrary

logger = logging.getLogger(__name__)
APART_MM = 2 * MARGIN_SIGMAS * FEATHER_MM  # between lesions, so that their feathers do not meet
PLACE_SEED, NOISE_SEED = 1, 2  # what a wish's seed draws: shape, place and histogram; the seed of the sampler's noise
SHAPES_TRIED = 5  # random shapes and rotations tried until one finds a position
OWN_IN_LUNG = 0.9  # least share of a user's mask; a reader's outline may touch the chest wall
PARTS_MM = 5.0  # largest gap between parts of one lesion in a user's mask
OWN_AIR_HU = -975.0  # a lower mean is trachea, stomach or bulla, where no lesion grows
OWN_LARGEST_MM = 2 * LARGEST_MM  # a longer mask is an organ, not a lesion


@dataclass(frozen=True, eq=False)
class LungSpace:
    """The lungs of `ct` on an axis-aligned RAS grid of 1 mm: HU, labels, depth, and occupied voxels."""

    ct: CT
    affine: np.ndarray
    hu: np.ndarray
    labels: np.ndarray
    map: LungMap
    occupied: np.ndarray
    report: PlacementReport = field(default_factory=PlacementReport)

    @classmethod
    def of(cls, ct: CT, labels: np.ndarray, avoid: np.ndarray | None = None) -> LungSpace:
        """labels, avoid: (X, Y, Z) on the CT's grid; avoid: voxels that must not change (known lesions).

        Raises:
            ValueError: not on the CT's grid, or no lung.
        """
        for name, given in (("labels", labels), ("avoid", avoid)):
            if given is not None and np.shape(given) != ct.shape:
                raise ValueError(
                    f"{name} have {np.shape(given)} voxels and the CT {ct.shape} (x, y, z); SimpleITK's arrays are (z, y, x)"
                )
        whole = np.asarray(labels)
        if whole.dtype.kind == "f" and (whole != np.rint(whole)).any() or whole.min() < 0 or whole.max() > 255:
            raise ValueError(
                f"labels of {whole.min():g} to {whole.max():g}: give whole numbers 0 to 255, 0 outside the lungs (of a "
                "probability map, its voxels above 0.5)"
            )
        if not (whole > 0).any():
            raise ValueError("the labels hold no lung: no voxel above 0")
        # one voxel order and one rounding, so that the same scan stored in another order gives the same positions
        ras = to_ras(CT(ct.array, ct.affine))
        grid = np.round(ras.affine, 6)
        label = to_ras(CT(labels.astype(np.uint8), ct.affine)).array
        box = ndimage.find_objects((label > 0).astype(np.uint8))[0]
        first, last = reach(grid, [s.start - 1 for s in box], [s.stop for s in box])
        low, high = np.floor(first), np.ceil(last)
        affine = np.eye(4)
        affine[:3, 3] = low
        shape = tuple(int(n) for n in high - low + 1)
        hu = sample(ras.array, grid, shape, affine)
        on_grid = sample(label, grid, shape, affine, order=0, outside=0)
        occupied = np.zeros(shape, bool)
        if avoid is not None:
            known = to_ras(CT(avoid.astype(bool), ct.affine)).array
            occupied = sample(known, grid, shape, affine, order=0, outside=0)
            if occupied.any():  # the feather must not reach it either; sampling loses half a voxel of each grid
                near = MARGIN_SIGMAS * FEATHER_MM + (1 + ct.spacing.max()) / 2
                occupied = ndimage.distance_transform_edt(~occupied) <= near
        return cls(ct, affine, hu, on_grid, LungMap(on_grid), occupied)


@dataclass(frozen=True, eq=False)
class Nodule:
    """A wish with everything chosen.

    mask, core: (x, y, z) bool at 1 mm RAS, whose voxel shape // 2 lies at centre_mm; core None: no solid core requested
    chosen:     ids of the shape and of the histogram
    """

    wish: Wish
    centre_mm: np.ndarray
    mask: np.ndarray
    core: np.ndarray | None
    histogram: np.ndarray
    lobe: int
    chosen: dict[str, str]

    @property
    def noise_seed(self) -> int:
        return int(np.random.SeedSequence((self.wish.seed, NOISE_SEED)).generate_state(1)[0])


def place_nodule(space: LungSpace, wish: Wish, library: ShapeLibrary, number: int) -> Nodule:
    """Choose shape, position and histogram of one wish, and mark the position as occupied.

    Raises:
        ValueError: no position, or one outside the lungs or occupied; a core that does not fit. The message names the
            nodule.
    """
    rng = np.random.default_rng((wish.seed, PLACE_SEED))
    try:
        if wish.mask is not None:
            mask, core, centre = _own_lesion(space, wish.mask)
            shape = "own mask"
        else:
            shape, mask, centre = _library_lesion(space, wish, library, rng)
            core = None if wish.core_mm is None else core_of(mask, wish.core_mm, rng)
        source, histogram = _histogram(space, wish, mask, core, centre, rng)
    except ValueError as error:
        raise ValueError(f"nodule {number} ({wish.described()}): {error}") from error
    _take(space, mask, centre)
    chosen = {"shape": shape, "histogram": source}
    return Nodule(wish, to_world(space.affine, centre), mask, core, histogram, int(space.labels[tuple(centre)]), chosen)


# -- the lesion and its position ---------------------------------------------------------------------------------------


def _library_lesion(
    space: LungSpace, wish: Wish, library: ShapeLibrary, rng: np.random.Generator
) -> tuple[str, np.ndarray, np.ndarray]:
    """Id of a shape, its mask, and the voxel of `space` at its middle."""
    lobe = _lobe_label(space, wish)
    for _ in range(SHAPES_TRIED):
        row = choose_shape(library, wish.subtype, wish.diameter_mm, rng, wish.spiculation)
        mask = fitted(library.masks[row], wish.diameter_mm, rng)
        try:
            if wish.at is not None:
                centre = np.rint(np.asarray(wish.at, float) - space.affine[:3, 3]).astype(int)
                _check_place(space, mask, centre, wish.at)
                if lobe is not None and (found := int(space.labels[tuple(centre)])) != lobe:
                    raise ValueError(
                        f"that place is in {LOBE_NAMES.get(found, 'no lobe')}, not in {wish.lobe}; leave out one of both"
                    )
            else:
                centre, report = sample_position(space.hu, space.map, mask, rng, wish.location, lobe, space.occupied)
                space.report.add(report)
            return str(library.table.nodule_id[row]), mask, centre
        except ValueError as error:
            no_place = error
    raise no_place


def _lobe_label(space: LungSpace, wish: Wish) -> int | None:
    if wish.lobe is None:
        return None
    label = next(k for k, name in LOBE_NAMES.items() if name == wish.lobe)
    if not (space.labels == label).any():
        if there := [name for k, name in LOBE_NAMES.items() if (space.labels == k).any()]:
            raise ValueError(f"lobe {wish.lobe} is asked for, but the lung labels have {', '.join(there)} only")
        raise ValueError(
            f"lobe {wish.lobe} is asked for, but the lung labels do not tell lobes; give a TotalSegmentator map (lungs=...)"
        )
    return label


def _check_place(space: LungSpace, mask: np.ndarray, centre: np.ndarray, at: tuple[float, ...]) -> None:
    """Raise ValueError unless the whole lesion lies within the lungs and on free voxels."""
    voxels = np.argwhere(mask) - np.array(mask.shape) // 2 + centre
    if (voxels < 0).any() or (voxels >= space.hu.shape).any() or (space.map.depth[tuple(voxels.T)] <= 0).any():
        radius = np.linalg.norm(voxels - centre, axis=1).max()
        deep = np.argwhere(space.map.depth >= min(radius + 1, space.map.depth.max()))
        nearest = deep[np.argmin(((deep - centre) ** 2).sum(1))] + space.affine[:3, 3]
        raise ValueError(
            f"at {', '.join(f'{x:.0f}' for x in at)} mm the lesion would leave the lungs; the nearest place for it is "
            f"{', '.join(f'{x:.0f}' for x in nearest)}"
        )
    if space.occupied[tuple(voxels.T)].any():
        raise ValueError(f"at {', '.join(f'{x:.0f}' for x in at)} mm there is another lesion; choose another place")


def _own_lesion(space: LungSpace, path: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
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
    in_lung = space.labels[tuple(voxels[within].T)] > 0
    if in_lung.sum() < OWN_IN_LUNG * len(voxels):
        raise ValueError(
            f"{path}: {in_lung.sum() / len(voxels):.0%} of the lesion lies in the lungs of this CT, at least {OWN_IN_LUNG:.0%} "
            f"must{f' ({cut:.0%} is beyond the CT)' if cut else ''}; is it the mask of this scan?"
        )
    if (mean := float(space.hu[tuple(voxels[within].T)].mean())) < OWN_AIR_HU:
        raise ValueError(f"{path}: the lesion lies in air (mean {mean:.0f} HU); is it the mask of this scan?")
    if cut:
        logger.warning("%s: %.0f%% of the lesion is beyond the CT and cannot be written", path, 100 * cut)
    if space.occupied[tuple(voxels[within].T)].any():
        raise ValueError(f"{path}: there is another lesion at this place")
    return lesion, core if core.any() else None, centre


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


def _take(space: LungSpace, mask: np.ndarray, centre: np.ndarray) -> None:
    """Mark the lesion and what its feather reaches as occupied."""
    pad = int(np.ceil(APART_MM)) + 1
    grown = ndimage.distance_transform_edt(~np.pad(mask, pad)) <= APART_MM
    start = centre - np.array(mask.shape) // 2 - pad
    inside = [slice(max(0, s), min(n, s + m)) for s, n, m in zip(start, space.hu.shape, grown.shape, strict=True)]
    own = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    space.occupied[tuple(inside)] |= grown[own]


# -- its histogram -----------------------------------------------------------------------------------------------------


def _histogram(
    space: LungSpace,
    wish: Wish,
    mask: np.ndarray,
    core: np.ndarray | None,
    centre: np.ndarray,
    rng: np.random.Generator,
) -> tuple[str, np.ndarray]:
    """The histogram's source and values; with a core, its solid part has the core's share of the volume."""
    if wish.histogram is not None:
        source, histogram = str(wish.histogram), read_histogram(wish.histogram)
    else:
        around = space.hu[tuple(slice(max(0, c - FLOOR_REACH), c + FLOOR_REACH + 1) for c in centre)]
        diameter = equivalent_diameter(mask.sum())
        source, histogram = choose_histogram(wish.subtype, diameter, rng, floor_hu=lung_floor(around))
    if core is not None:
        histogram = with_solid_share(histogram, core.sum() / mask.sum())
    return source, histogram
