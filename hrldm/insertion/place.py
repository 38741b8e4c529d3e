"""Choose a nodule's position, shape and histogram from its wish, before any network runs.

Positions are searched on a 1 mm RAS grid over the lungs. A wish brings its own lesion as a mask file, or gets a shape
of the library and a position for it, and a histogram like real ones that is not darker than the lung there. A part-solid
lesion gets a solid core as large as its histogram's solid part.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import equivalent_diameter, reach, sample, shifted, to_world, voxel_size
from hrldm.ct.label_maps import LOBE_NAMES, read_beside
from hrldm.ct.lungs import depth_mm
from hrldm.ct.volume import CT, to_ras
from hrldm.insertion.blend import FEATHER_MM, MARGIN_SIGMAS
from hrldm.insertion.wish import LARGEST_MM, Wish, read_histogram
from hrldm.nodules.histograms import (
    FLOOR_REACH,
    SOLID_HU,
    bin_centres,
    draw_histogram,
    lung_floor,
    with_moments,
    with_solid_share,
)
from hrldm.nodules.masks import box_of, cropped, highest
from hrldm.nodules.pleura import BASES, at_pleura
from hrldm.nodules.positions import VESSEL_HU, LungMap, PlacementReport, overlap, sample_position
from hrldm.nodules.shape_fitting import choose_shape, core_of, fitted_distance
from hrldm.nodules.shapes import ShapeLibrary

logger = logging.getLogger(__name__)
APART_MM = 2 * MARGIN_SIGMAS * FEATHER_MM  # between lesions, so that their feathers do not meet
PLACE_SEED, NOISE_SEED = 1, 2  # what a wish's seed draws: shape, place and histogram; the seed of the sampler's noise
BEYOND_MM = 6  # outside the lung labels, where the pleura may lie
SHAPES_TRIED = 5  # random shapes and rotations tried until one finds a position
CORE_SHARE, LEAST_CORE_MM = (0.1, 0.6), 2.0  # a part-solid lesion's core by default: share of its volume, diameter
DIMMED = 0.4  # greatest share of its contrast to the lung that a vessel loses within a lesion
OWN_IN_LUNG = 0.9  # least share of a user's mask; a reader's outline may touch the chest wall
PARTS_MM = 5.0  # largest gap between parts of one lesion in a user's mask
OWN_AIR_HU = -975.0  # a lower mean is trachea, stomach or bulla, where no lesion grows
OWN_LARGEST_MM = 2 * LARGEST_MM  # a longer mask is an organ, not a lesion


def _ends(labels: np.ndarray) -> tuple[list[int], list[int]]:
    """First and last index (3,) of the voxels above 0; as ndimage's, faster."""
    seen = [np.flatnonzero(labels.max(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [int(s[0]) for s in seen], [int(s[-1]) for s in seen]


@dataclass(frozen=True, eq=False)
class LungSpace:
    """The lungs of `ct` on an axis-aligned RAS grid of 1 mm: HU, labels, occupied voxels, and what was placed."""

    ct: CT
    affine: np.ndarray
    hu: np.ndarray
    labels: np.ndarray
    map: LungMap
    occupied: np.ndarray
    report: PlacementReport = field(default_factory=PlacementReport)
    sources: list[str] = field(default_factory=list)

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
        first, last = (np.array(ends) for ends in _ends(whole))
        low, high = reach(ct.affine, first - 1, last + 1)
        low, high = np.floor(low) - BEYOND_MM, np.ceil(high) + BEYOND_MM
        affine, shape = np.eye(4), tuple(int(n) for n in high - low + 1)
        affine[:3, 3] = low
        margin = np.ceil(BEYOND_MM / ct.spacing).astype(int) + 2
        start, stop = np.maximum(first - margin, 0), np.minimum(last + margin + 1, ct.shape)

        def on_grid(values: np.ndarray, **how) -> np.ndarray:
            # one voxel order and one rounding, so that the same scan stored in another order gives the same positions
            part = values[tuple(slice(*ends) for ends in zip(start, stop, strict=True))]
            ras = to_ras(CT(part, shifted(ct.affine, start)))
            return sample(ras.array, np.round(ras.affine, 6), shape, affine, **how)

        lobes = on_grid(whole.astype(np.uint8, copy=False), order=0, outside=0)
        occupied = np.zeros(shape, bool)
        if avoid is not None:
            occupied = on_grid(avoid.astype(bool, copy=False), order=0, outside=0)
            if occupied.any():  # the feather must not reach it either; sampling loses half a voxel of each grid
                near = MARGIN_SIGMAS * FEATHER_MM + (1 + ct.spacing.max()) / 2
                around = box_of(occupied, int(near) + 1)
                occupied[around] = ndimage.distance_transform_edt(~occupied[around]) <= near
        return cls(ct, affine, on_grid(ct.array), lobes, LungMap(lobes), occupied)


@dataclass(frozen=True, eq=False)
class Nodule:
    """A wish with everything chosen.

    mask, core: (x, y, z) bool at 1 mm RAS, whose voxel shape // 2 lies at centre_mm; core None: no solid core
    chosen:     ids of the shape and of the histogram; at the pleura, the base
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
        """Of the sampler's noise; subtypes of one seed have their own."""
        key = (self.wish.seed, NOISE_SEED, SUBTYPES.index(self.wish.subtype))
        return int(np.random.SeedSequence(key).generate_state(1)[0])


def place_nodule(space: LungSpace, wish: Wish, library: ShapeLibrary, number: int) -> Nodule:
    """Choose shape, position and histogram of one wish, and mark the position as occupied.

    Raises:
        ValueError: no position, or one outside the lungs or occupied; a core that does not fit. The message names the
            nodule.
    """
    rng = np.random.default_rng((wish.seed, PLACE_SEED))
    chosen, core = {}, None
    try:
        if wish.location == "subpleural":
            drawn = list(BASES)[rng.integers(len(BASES))]
            chosen["base"] = wish.base or drawn
        if wish.mask is not None:
            mask, core, centre = _own_lesion(space, wish.mask)
            chosen["shape"] = "own mask"
        else:
            chosen["shape"], mask, centre = _library_lesion(space, wish, library, rng, chosen.get("base"))
        chosen["histogram"], histogram = _histogram(space, wish, mask, centre, rng)
        core, histogram = _core(wish, mask, core, histogram, rng)
    except ValueError as error:
        raise ValueError(f"nodule {number} ({wish.described()}): {error}") from error
    _take(space, mask, centre)
    return Nodule(wish, to_world(space.affine, centre), mask, core, histogram, int(space.labels[tuple(centre)]), chosen)


# -- the lesion and its position ---------------------------------------------------------------------------------------


def _library_lesion(
    space: LungSpace, wish: Wish, library: ShapeLibrary, rng: np.random.Generator, base: str | None
) -> tuple[str, np.ndarray, np.ndarray]:
    """Id of a shape, its mask, and the voxel of `space` at its middle; base: at the pleura, one of `BASES`."""
    lobe = _lobe_label(space, wish)
    for _ in range(SHAPES_TRIED):
        row = choose_shape(library, wish.subtype, wish.diameter_mm, rng, wish.spiculation)
        fit = fitted_distance(library.masks[row], wish.diameter_mm, rng)
        mask = cropped(highest(*fit))
        try:
            if base is not None:
                mask, centre, report = at_pleura(space.hu, space.map, *fit, rng, base, lobe, space.occupied)
                space.report.add(report)
            elif wish.at is not None:
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
    if (voxels < 0).any() or (voxels >= space.hu.shape).any() or not space.labels[tuple(voxels.T)].all():
        radius = np.linalg.norm(voxels - centre, axis=1).max()
        depth = depth_mm(space.labels > 0)
        deep = np.argwhere(depth >= min(radius + 1, depth.max()))
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
    inside, own = overlap(centre - np.array(mask.shape) // 2 - pad, grown.shape, space.hu.shape)
    space.occupied[inside] |= grown[own]


# -- its histogram -----------------------------------------------------------------------------------------------------


def _histogram(
    space: LungSpace, wish: Wish, mask: np.ndarray, centre: np.ndarray, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """The histogram's source and values, moved to the mean and SD asked for."""
    if wish.histogram is not None:
        source = wish.histogram if isinstance(wish.histogram, str) else "given"
        histogram = read_histogram(wish.histogram)
    else:
        around = space.hu[tuple(slice(max(0, c - FLOOR_REACH), c + FLOOR_REACH + 1) for c in centre)]
        diameter = equivalent_diameter(mask.sum())
        bright = None if wish.subtype == "solid" else _vessels(space, mask, centre)
        source, histogram = draw_histogram(wish.subtype, diameter, rng, lung_floor(around), space.sources, bright)
        space.sources.append(source)
    return source, with_moments(histogram, wish.mean_hu, wish.sd_hu)


def _vessels(space: LungSpace, mask: np.ndarray, centre: np.ndarray) -> tuple[float, float] | None:
    """Share of vessel in a lesion's place, and the least HU that it has within the lesion; None without a vessel."""
    here, own = overlap(centre - np.array(mask.shape) // 2, mask.shape, space.hu.shape)
    hu = space.hu[here][mask[own]]
    vessel = hu > VESSEL_HU
    if not vessel.any() or vessel.all():
        return None
    bright, lung = hu[vessel].mean(), np.median(hu[~vessel])
    return float(vessel.mean()), float(bright - DIMMED * (bright - lung))


def _core(
    wish: Wish, mask: np.ndarray, core: np.ndarray | None, histogram: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray | None, np.ndarray]:
    """The solid core, and the histogram whose solid part is as large.

    A core of the wish's own size or shape (`core`) sets the histogram's solid part. By default it is the other way round,
    within `CORE_SHARE`, where the histogram is not the wish's own.
    """
    if core is None and wish.core_mm:
        core = core_of(mask, wish.core_mm, rng)
    if core is not None:
        return core, with_solid_share(histogram, core.sum() / mask.sum())
    share = float(histogram[bin_centres(len(histogram)) > SOLID_HU].sum())
    limited = min(max(share, CORE_SHARE[0]), CORE_SHARE[1])
    diameter = equivalent_diameter(limited * mask.sum())
    if wish.subtype != "part-solid" or wish.core_mm == 0 or not 0 < share < 1 or diameter < LEAST_CORE_MM:
        return None, histogram
    if limited != share and wish.histogram is None:
        histogram = with_solid_share(histogram, limited)
    return core_of(mask, diameter, rng), histogram
