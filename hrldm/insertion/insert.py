"""Insert nodules into a CT and change nothing else: place each wish, generate its lesion, blend it into the CT.

All work is done on a 1 mm crop around each lesion, so time grows with the number of nodules, not with the CT. The
lesions of one call are denoised together; each is measured (`quality`) and retried with other noise if it misses its
target.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import crop_affine, equivalent_diameter, sample
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT
from hrldm.insertion.blend import MARGIN_SIGMAS, blended, mask_on_grid
from hrldm.insertion.generator import FEATHER_MM, Generator, Request, feathered
from hrldm.insertion.place import LungSpace, Nodule, place_nodule
from hrldm.insertion.quality import assess, faults
from hrldm.insertion.wish import Wish
from hrldm.nodules.shapes import ShapeLibrary, load_shapes

logger = logging.getLogger(__name__)
MOST_RETRIES = 100
CROP_MM, STEP_MM = 40, 8  # the crop's least side, and its increment


@dataclass(frozen=True, eq=False)
class Inserted:
    """What `insert` made.

    stored:  (X, Y, Z) values that replace the CT's own, same dtype
    mask:    (X, Y, Z) uint8 (uint16 from 256 nodules on), k for voxels of the k-th nodule
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
    retries: how often a nodule that misses its target is retried with other noise; the best is kept

    Raises:
        ValueError: no position for a nodule (with the reasons), a position outside the lungs, a lobe that the labels do
            not have, or retries that `check_retries` refuses.
    """
    check_retries(retries)
    library = library or load_shapes()
    space = LungSpace.of(ct, labels, avoid)
    nodules = [place_nodule(space, wish, library, i) for i, wish in enumerate(wishes, start=1)]
    if space.report.tried:  # no search if every position was given
        logger.info("places: %s", space.report)
    request, crops = requested(ct, nodules)
    made, found, tries = _made(generator, request, retries)

    stored = ct.stored.copy(order="K")
    array = stored if ct.array is ct.stored else ct.array.copy(order="K")
    now = dataclasses.replace(ct, array=array, stored=stored)
    mask, records = np.zeros(ct.shape, np.min_scalar_type(len(nodules))), []
    for k, (nodule, affine) in enumerate(zip(nodules, crops, strict=True)):
        box, values = blended(now, made[k], affine, request.mask[k], FEATHER_MM)
        stored[box] = values
        if array is not stored:
            array[box] = scaled(values, ct.slope, ct.inter)
        box, lesion = mask_on_grid(request.mask[k], affine, ct)
        mask[box][lesion] = k + 1
        records.append(nodule_record(nodule, request.mask[k], found[k], int(request.seeds[k]), tries[k]))
    return Inserted(stored, mask, records)


def check_retries(retries: int) -> None:
    """Raise ValueError for retries below 0, or so many that an unreachable target would never end."""
    if not 0 <= retries <= MOST_RETRIES:
        raise ValueError(f"retries={retries}: give 0 to {MOST_RETRIES}, how often a nodule that misses is made again")


# -- the parts ---------------------------------------------------------------------------------------------------------


def _side(mask: np.ndarray) -> int:
    """Side of the crop that holds a lesion, its feather and one more latent voxel."""
    offset = np.abs(np.argwhere(mask) - np.array(mask.shape) // 2).max()
    need = 2 * (offset + int(np.ceil(MARGIN_SIGMAS * FEATHER_MM)) + 4) + 1
    return max(CROP_MM, -(-need // STEP_MM) * STEP_MM)


def requested(ct: CT, nodules: Sequence[Nodule]) -> tuple[Request, list[np.ndarray]]:
    """The generator's request for placed nodules, on crops of one side, and the crops' affines."""
    side = max(_side(n.mask) for n in nodules)
    crops = [crop_affine(n.centre_mm, (side,) * 3) for n in nodules]
    background = np.stack([sample(ct.array, ct.affine, (side,) * 3, affine) for affine in crops])
    mask = np.stack([_centred(n.mask, side) for n in nodules])
    subtype = np.array([SUBTYPES.index(n.wish.subtype) for n in nodules])
    seeds = np.array([n.noise_seed for n in nodules])
    hu = np.rint(background.clip(-1024, 3071)).astype(np.int16)
    cores = [np.zeros_like(n.mask) if n.core is None else n.core for n in nodules]
    core = np.stack([_centred(c, side) for c in cores]) if any(c.any() for c in cores) else None
    return Request(hu, mask, subtype, np.stack([n.histogram for n in nodules]), seeds, core), crops


def _centred(mask: np.ndarray, side: int) -> np.ndarray:
    """The mask in a cube of `side` voxels, its voxel shape // 2 at side // 2; empty margins may be cut off."""
    out = np.zeros((side,) * 3, bool)
    start = side // 2 - np.array(mask.shape) // 2
    local = tuple(slice(max(0, s), s + n) for s, n in zip(start, mask.shape, strict=True))
    out[local] = mask[tuple(slice(max(0, -s), max(0, -s) + side) for s in start)]
    return out


def _made(generator: Generator, request: Request, retries: int) -> tuple[np.ndarray, list[dict], np.ndarray]:
    """The decoded crops, the `assess` results, and the number of tries. `request.seeds` become the kept lesions'."""
    made = np.empty(request.background.shape, np.float32)
    found: list[dict] = [{} for _ in range(len(request))]
    tries, open_ = np.zeros(len(request), int), np.arange(len(request))
    for attempt in range(retries + 1):
        asked = request[open_]
        if attempt:
            asked.seeds[:] = [np.random.SeedSequence((int(s), attempt)).generate_state(1)[0] for s in asked.seeds]
        decoded = generator(asked, paste=False)
        crops = feathered(asked.background, decoded, asked.mask)
        for row, i in enumerate(open_):
            core = None if asked.core is None else asked.core[row]
            now = assess(asked.background[row], crops[row], asked.mask[row], asked.histogram[row], core)
            tries[i] += 1
            if not found[i] or now["jsd"] < found[i]["jsd"]:
                made[i], found[i] = decoded[row], now | {"seed": int(asked.seeds[row])}
        open_ = np.array([i for i in open_ if faults(found[i])], int)
        if not len(open_):
            break
    request.seeds[:] = [f.pop("seed") for f in found]
    return made, found, tries


def nodule_record(nodule: Nodule, mask: np.ndarray, found: dict, noise_seed: int, tries: int) -> dict:
    """What reproduces and describes one nodule."""
    missed = faults(found)
    if missed:
        logger.warning("nodule at %s mm misses its wish: %s", np.round(nodule.centre_mm), "; ".join(missed))
    return {
        "wish": nodule.wish.given(),
        "centre_ras_mm": [round(float(x), 2) for x in nodule.centre_mm],
        "lobe": LOBE_NAMES.get(nodule.lobe, "lung"),
        "volume_mm3": int(mask.sum()),
        "diameter_mm": round(equivalent_diameter(mask.sum()), 2),
        **({} if nodule.core is None else {"core_mm3": int(nodule.core.sum())}),
        "shape": nodule.chosen["shape"],
        "histogram_source": nodule.chosen["histogram"],
        "requested_histogram": [round(float(x), 6) for x in nodule.histogram],
        "noise_seed": noise_seed,
        "times_made": int(tries),
        "quality": {k: round(v, 4) for k, v in found.items()},
        "missed": missed,
    }
