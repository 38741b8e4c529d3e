"""Nodules into a CT, and nothing else changed: the wish, a shape, a place, the lesion, the original voxels around it.

All work is done on the lesion's own crop of 1 mm, so time grows with the number of nodules and not with the CT. Places
are looked for on a 1 mm RAS grid over the lungs; the lesions of one call are denoised together; each is measured
(`quality`) and made again with another noise where it misses its wish.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from hrldm.config import SUBTYPES
from hrldm.data.ct import CT, scaled, to_ras
from hrldm.data.fitting import choose_shape, fitted
from hrldm.data.geometry import crop_affine, sample, to_world
from hrldm.data.placement import LOBE_NAMES, LungMap, PlacementReport, sample_positions
from hrldm.data.shapes import ShapeLibrary, load_shapes
from hrldm.data.texture import FLOOR_REACH, choose_histogram, lung_floor
from hrldm.synthesis.blend import MARGIN_SIGMAS, mask_on_grid, paste
from hrldm.synthesis.generate import FEATHER_MM, Generator, Request, feathered
from hrldm.synthesis.plan import Wish, read_histogram
from hrldm.synthesis.quality import assess, faults

logger = logging.getLogger(__name__)
CROP_MM, STEP_MM = 40, 8  # the crop's side: the least, and what it grows by
APART_MM = 2 * MARGIN_SIGMAS * FEATHER_MM  # between lesions: the feathers do not meet
SHAPES_TRIED = 5  # a shape that finds no place is turned or exchanged so often


@dataclass(frozen=True, eq=False)
class LungSpace:
    """The lungs on an axis-aligned RAS grid of 1 mm: HU, labels, depth, and what is taken."""

    affine: np.ndarray
    hu: np.ndarray
    labels: np.ndarray
    map: LungMap
    occupied: np.ndarray

    @classmethod
    def of(cls, ct: CT, labels: np.ndarray, avoid: np.ndarray | None = None) -> LungSpace:
        """labels, avoid: (X, Y, Z) on the CT's grid; avoid: voxels no lesion may touch (known lesions)."""
        # one voxel order and one rounding, so that the same scan stored in another order gives the same places
        ras = to_ras(CT(ct.array, ct.affine))
        grid = np.round(ras.affine, 6)
        label = to_ras(CT(labels.astype(np.uint8), ct.affine)).array
        box = ndimage.find_objects((label > 0).astype(np.uint8))[0]
        corners = np.stack(np.meshgrid(*[(s.start - 1, s.stop) for s in box], indexing="ij"), -1).reshape(-1, 3)
        world = to_world(grid, corners)
        low, high = np.floor(world.min(0)), np.ceil(world.max(0))
        affine = np.eye(4)
        affine[:3, 3] = low
        shape = tuple(int(n) for n in high - low + 1)
        hu = sample(ras.array, grid, shape, affine)
        on_grid = sample(label, grid, shape, affine, order=0, outside=0)
        occupied = np.zeros(shape, bool)
        if avoid is not None:
            known = to_ras(CT(avoid.astype(bool), ct.affine)).array
            occupied = sample(known, grid, shape, affine, order=0, outside=0)
        return cls(affine, hu, on_grid, LungMap(on_grid), occupied)


@dataclass(frozen=True, eq=False)
class Nodule:
    """A wish with everything chosen: where, which shape, which histogram."""

    wish: Wish
    centre_mm: np.ndarray
    mask: np.ndarray  # (x, y, z) bool at 1 mm RAS; its voxel shape // 2 lies at centre_mm
    histogram: np.ndarray
    lobe: int
    chosen: dict[str, str]  # ids of the shape and of the histogram


@dataclass(frozen=True, eq=False)
class Inserted:
    """What `insert` made.

    stored:  (X, Y, Z) values to be written in the place of the CT's own, same dtype
    mask:    (X, Y, Z) uint8, k for voxels of the k-th nodule
    records: one dict per nodule, JSON-able
    """

    stored: np.ndarray
    mask: np.ndarray
    records: list[dict]


def insert(
    ct: CT,
    wishes: Sequence[Wish],
    generator: Generator,
    labels: np.ndarray,
    avoid: np.ndarray | None = None,
    retries: int = 2,
    library: ShapeLibrary | None = None,
) -> Inserted:
    """Put nodules into a CT.

    labels:  (X, Y, Z) lungs or lobes on the CT's grid, see `lungs.lung_labels`
    avoid:   (X, Y, Z) bool, voxels that no nodule may touch
    retries: how often a nodule that misses its wish is made again with another noise; the best is taken

    Raises:
        ValueError: no place for a nodule (with the reasons), a place outside the lungs, or a lobe the labels do not tell.
    """
    library = library or load_shapes()
    space = LungSpace.of(ct, labels, avoid)
    report = PlacementReport()
    nodules = [_place(space, wish, library, report, i) for i, wish in enumerate(wishes, start=1)]
    logger.info("places: %s", report)
    side = max(_side(n.mask) for n in nodules)
    crops = [crop_affine(n.centre_mm, (side,) * 3) for n in nodules]
    request = _request(ct, nodules, crops, side)
    made, found, tries = _made(generator, request, retries)

    stored, mask, records = ct, np.zeros(ct.shape, np.uint8), []
    for k, (nodule, affine) in enumerate(zip(nodules, crops, strict=True)):
        values = paste(stored, made[k], affine, request.mask[k], FEATHER_MM)
        stored = dataclasses.replace(ct, array=scaled(values, ct.slope, ct.inter), stored=values)
        mask[mask_on_grid(request.mask[k], affine, ct)] = k + 1
        records.append(_record(nodule, request.mask[k], found[k], int(request.seeds[k]), tries[k]))
    return Inserted(stored.stored, mask, records)


# -- where -------------------------------------------------------------------------------------------------------------


def _place(space: LungSpace, wish: Wish, library: ShapeLibrary, report: PlacementReport, number: int) -> Nodule:
    """Choose shape, place and histogram of one wish, and take the place."""
    rng = np.random.default_rng((wish.seed, 1))
    lobe = _lobe_label(space, wish)
    for attempt in range(SHAPES_TRIED):
        row = choose_shape(library, wish.subtype, wish.diameter_mm, rng, wish.spiculation)
        mask = fitted(library.masks[row], wish.diameter_mm, rng)
        try:
            if wish.at is not None:
                centre = _given_place(space, mask, np.asarray(wish.at, float))
            else:
                found, this = sample_positions(
                    space.hu, space.labels, mask, 1, rng, location=wish.location, lobe=lobe, occupied=space.occupied,
                    lung_map=space.map,
                )  # fmt: skip
                report.add(this)
                centre = np.array(found[0].center)
            break
        except ValueError as error:
            if attempt == SHAPES_TRIED - 1:
                raise ValueError(f"nodule {number} ({wish.subtype}, {wish.diameter_mm:g} mm): {error}") from error
    _take(space, mask, centre)
    if wish.histogram is not None:
        source, histogram = str(wish.histogram), read_histogram(wish.histogram)
    else:
        floor = lung_floor(_around(space.hu, centre, FLOOR_REACH))
        source, histogram = choose_histogram(wish.subtype, wish.diameter_mm, rng, floor_hu=floor)
    chosen = {"shape": str(library.table.nodule_id[row]), "histogram": source}
    return Nodule(wish, to_world(space.affine, centre), mask, histogram, int(space.labels[tuple(centre)]), chosen)


def _lobe_label(space: LungSpace, wish: Wish) -> int | None:
    if wish.lobe is None:
        return None
    label = next(k for k, name in LOBE_NAMES.items() if name == wish.lobe)
    if not (space.labels == label).any():
        raise ValueError(
            f"lobe {wish.lobe} is asked for, but the lung labels do not tell lobes; give a TotalSegmentator map (--lungs)"
        )
    return label


def _given_place(space: LungSpace, mask: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The voxel of a place in RAS mm, checked: the whole lesion within the lungs and off what is taken."""
    centre = np.rint(at - space.affine[:3, 3]).astype(int)
    voxels = np.argwhere(mask) - np.array(mask.shape) // 2 + centre
    if (voxels < 0).any() or (voxels >= space.hu.shape).any() or (space.map.depth[tuple(voxels.T)] <= 0).any():
        reach = np.linalg.norm(np.argwhere(mask) - np.array(mask.shape) // 2, axis=1).max()
        deep = np.argwhere(space.map.depth >= min(reach + 1, space.map.depth.max()))
        nearest = deep[np.argmin(((deep - centre) ** 2).sum(1))] + space.affine[:3, 3]
        raise ValueError(
            f"at {', '.join(f'{x:.0f}' for x in at)} mm the lesion would leave the lungs; the nearest place for it is "
            f"{', '.join(f'{x:.0f}' for x in nearest)}"
        )
    if space.occupied[tuple(voxels.T)].any():
        raise ValueError(f"at {', '.join(f'{x:.0f}' for x in at)} mm there is another lesion; choose another place")
    return centre


def _take(space: LungSpace, mask: np.ndarray, centre: np.ndarray) -> None:
    """Mark the lesion and what its feather reaches as occupied."""
    pad = int(np.ceil(APART_MM)) + 1
    grown = ndimage.distance_transform_edt(~np.pad(mask, pad)) <= APART_MM
    start = centre - np.array(mask.shape) // 2 - pad
    inside = [slice(max(0, s), min(n, s + m)) for s, n, m in zip(start, space.hu.shape, grown.shape, strict=True)]
    own = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    space.occupied[tuple(inside)] |= grown[own]


def _around(volume: np.ndarray, centre: np.ndarray, reach: int) -> np.ndarray:
    return volume[tuple(slice(max(0, c - reach), c + reach + 1) for c in centre)]


# -- what --------------------------------------------------------------------------------------------------------------


def _side(mask: np.ndarray) -> int:
    """Side of the crop that holds a lesion, its feather and a latent voxel beyond."""
    offset = np.abs(np.argwhere(mask) - np.array(mask.shape) // 2).max()
    need = 2 * (offset + int(np.ceil(MARGIN_SIGMAS * FEATHER_MM)) + 4) + 1
    return max(CROP_MM, -(-need // STEP_MM) * STEP_MM)


def _request(ct: CT, nodules: list[Nodule], crops: list[np.ndarray], side: int) -> Request:
    shape = (side,) * 3
    background = np.stack([sample(ct.array, ct.affine, shape, affine) for affine in crops])
    mask = np.zeros(background.shape, bool)
    for k, nodule in enumerate(nodules):
        start = side // 2 - np.array(nodule.mask.shape) // 2
        local = tuple(slice(max(0, s), s + n) for s, n in zip(start, nodule.mask.shape, strict=True))
        own = tuple(slice(max(0, -s), max(0, -s) + side) for s in start)  # empty margins of the shape may stand out
        mask[k][local] = nodule.mask[own]
    subtype = np.array([SUBTYPES.index(n.wish.subtype) for n in nodules])
    seeds = np.array([np.random.SeedSequence((n.wish.seed, 2)).generate_state(1)[0] for n in nodules])
    hu = np.rint(background.clip(-1024, 3071)).astype(np.int16)
    return Request(hu, mask, subtype, np.stack([n.histogram for n in nodules]), seeds)


def _made(generator: Generator, request: Request, retries: int) -> tuple[np.ndarray, list[dict], np.ndarray]:
    """The decoded crops, what `assess` says of each, and how often each was made. `request.seeds` become those taken."""
    made = np.empty(request.background.shape, np.float32)
    found: list[dict] = [{} for _ in range(len(request))]
    tries, open_ = np.zeros(len(request), int), np.arange(len(request))
    asked = request
    for attempt in range(retries + 1):
        if attempt:
            asked = dataclasses.replace(request, seeds=request.seeds + 0)
            asked.seeds[open_] = [
                np.random.SeedSequence((int(s), attempt)).generate_state(1)[0] for s in asked.seeds[open_]
            ]
        decoded = generator(asked[open_], paste=False)
        crops = feathered(request.background[open_], decoded, request.mask[open_])
        for row, i in enumerate(open_):
            now = assess(request.background[i], crops[row], request.mask[i], request.histogram[i])
            tries[i] += 1
            if not found[i] or now["jsd"] < found[i]["jsd"]:
                made[i], found[i] = decoded[row], now | {"seed": int(asked.seeds[i])}
        open_ = np.array([i for i in open_ if faults(found[i])], int)
        if not len(open_):
            break
    request.seeds[:] = [f.pop("seed") for f in found]
    return made, found, tries


def _record(nodule: Nodule, mask: np.ndarray, found: dict, noise_seed: int, tries: int) -> dict:
    """What reproduces and describes one nodule."""
    wish = {k: v for k, v in dataclasses.asdict(nodule.wish).items() if v is not None}
    missed = faults(found)
    if missed:
        logger.warning("nodule at %s mm misses its wish: %s", np.round(nodule.centre_mm), "; ".join(missed))
    return {
        "wish": wish,
        "centre_ras_mm": [round(float(x), 2) for x in nodule.centre_mm],
        "lobe": LOBE_NAMES.get(nodule.lobe, "lung"),
        "volume_mm3": int(mask.sum()),
        "diameter_mm": round(float((6 * mask.sum() / np.pi) ** (1 / 3)), 2),
        "shape": nodule.chosen["shape"],
        "histogram_source": nodule.chosen["histogram"],
        "requested_histogram": [round(float(x), 6) for x in nodule.histogram],
        "noise_seed": noise_seed,
        "times_made": int(tries),
        "quality": {k: round(v, 4) for k, v in found.items()},
        "missed": missed,
    }
