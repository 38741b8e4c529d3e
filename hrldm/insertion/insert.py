"""Insert nodules into a CT and change nothing else: place each wish, generate its lesion, blend it into the CT.

The network works on a 1 mm crop around each lesion, so time grows with the number of nodules, not with the CT. The
lesions of one call are denoised together. Each is then made part of its scan (`finish`) and measured on the voxels that
are written (`quality`); it is retried with other noise if it misses its target.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import crop_affine, equivalent_diameter, sample
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT
from hrldm.insertion.finish import AVERAGED, LEAST_VOXELS, Finished, finished, holds, lesion_in
from hrldm.insertion.generator import Generator, Request
from hrldm.insertion.place import LungSpace, Nodule, place_nodule
from hrldm.insertion.quality import assess, faults
from hrldm.insertion.wish import Wish
from hrldm.nodules.cubes import cube_about, whole_hu
from hrldm.nodules.histograms import histogram_moments, quantiles
from hrldm.nodules.shapes import ShapeLibrary, load_shapes

logger = logging.getLogger(__name__)
MOST_RETRIES = 100
CROP_MM, STEP_MM = 40, 8  # the crop's least side, and its increment
CONTEXT_MM = 8  # of lung about a lesion in its crop: what the network's window holds


@dataclass(frozen=True, eq=False)
class Inserted:
    """What `insert` made.

    Attributes:
        stored:  (X, Y, Z) values that replace the CT's own, same dtype
        mask:    (X, Y, Z) uint8 (uint16 from 256 nodules on), k for voxels of the k-th nodule
        core:    (X, Y, Z) bool, voxels of solid cores
        records: one dict per nodule, JSON-able
    """

    stored: np.ndarray
    mask: np.ndarray
    core: np.ndarray
    records: list[dict]


def insert(
    ct: CT,
    wishes: Sequence[Wish],
    generator: Generator,
    labels: np.ndarray,
    avoid: np.ndarray | None = None,
    retries: int = 2,
    library: ShapeLibrary | None = None,
    matching: bool = True,
    grain: bool = True,
) -> Inserted:
    """Put nodules into a CT.

    Args:
        labels:  (X, Y, Z) lungs or lobes on the CT's grid, see `lungs.lung_labels`
        avoid:   (X, Y, Z) bool, voxels that no nodule may touch
        retries: how often a nodule that misses its target is retried with other noise; the best is kept
        matching, grain: see `finished`

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
    for k, nodule in enumerate(nodules, start=1):
        if not holds(size := equivalent_diameter(nodule.mask.sum()), ct.spacing):
            logger.warning(
                "nodule %d: %.1f mm in voxels of up to %.1f mm mixes with the lung around it: expect a mean of about %.0f HU, not "
                "%.0f; histograms hold from %.0f mm on",
                k, size, ct.spacing.max(), _mixed_mean(ct, nodule), histogram_moments(nodule.histogram)[0],
                LEAST_VOXELS * ct.spacing.max(),
            )  # fmt: skip
    request, crops = requested(ct, nodules)
    keep = np.zeros(ct.shape, bool) if avoid is None else np.array(avoid, bool)
    drawn = [n.wish.drawn and n.wish.subtype in AVERAGED for n in nodules]
    how = [{"matching": matching, "grain": grain, "drawn": own} for own in drawn]
    made = _made(ct, generator, request, crops, keep, retries, how)

    stored, core = ct.stored.copy(order="K"), np.zeros(ct.shape, bool)
    mask, records = np.zeros(ct.shape, np.min_scalar_type(len(nodules))), []
    for k, (nodule, (lesion, found, seed, tries)) in enumerate(zip(nodules, made, strict=True), start=1):
        edge = (lesion.stored != ct.stored[lesion.box]) & ~lesion.lesion & (mask[lesion.box] == 0)
        shared = edge & (stored[lesion.box] != ct.stored[lesion.box])  # with another's edge: partial volumes add up
        added = scaled(stored[lesion.box], ct.slope, ct.inter)[shared] + (lesion.after - lesion.before)[shared]
        stored[lesion.box][edge | lesion.lesion] = lesion.stored[edge | lesion.lesion]
        stored[lesion.box][shared] = ct.to_stored(added)
        mask[lesion.box][lesion.lesion] = k
        core[lesion.box][lesion.core] = True
        scan = {
            "psf_mm": [round(float(sd), 3) for sd in lesion.psf_mm],
            "noise_hu": round(lesion.noise_hu, 2),
            "reach_mm": round(lesion.reach_mm, 2),
            "holds_histogram": lesion.held,
        }
        records.append(nodule_record(nodule, lesion.histogram, found, seed, tries) | {"scan": scan})
    return Inserted(stored, mask, core, records)


def check_retries(retries: int) -> None:
    """Raise ValueError for retries below 0, or so many that an unreachable target would never end."""
    if not 0 <= retries <= MOST_RETRIES:
        raise ValueError(f"retries={retries}: give 0 to {MOST_RETRIES}, how often a nodule that misses is made again")


# -- the parts ---------------------------------------------------------------------------------------------------------


def _side(mask: np.ndarray) -> int:
    """Side of the crop that holds a lesion and its context."""
    need = 2 * (np.abs(np.argwhere(mask) - np.array(mask.shape) // 2).max() + CONTEXT_MM) + 1
    return max(CROP_MM, -(-need // STEP_MM) * STEP_MM)


def requested(ct: CT, nodules: Sequence[Nodule]) -> tuple[Request, list[np.ndarray]]:
    """The generator's request for placed nodules, on crops of one side, and the crops' affines."""
    side = max(_side(n.mask) for n in nodules)
    crops = [crop_affine(n.centre_mm, (side,) * 3) for n in nodules]
    background = np.stack([sample(ct.array, ct.affine, (side,) * 3, affine) for affine in crops])
    mask = np.stack([_centred(n.mask, side) for n in nodules])
    subtype = np.array([SUBTYPES.index(n.wish.subtype) for n in nodules])
    seeds = np.array([n.noise_seed for n in nodules])
    cores = [np.zeros_like(n.mask) if n.core is None else n.core for n in nodules]
    core = np.stack([_centred(c, side) for c in cores]) if any(c.any() for c in cores) else None
    return Request(whole_hu(background), mask, subtype, np.stack([n.histogram for n in nodules]), seeds, core), crops


def _centred(mask: np.ndarray, side: int) -> np.ndarray:
    """The mask in a cube of `side` voxels, its voxel shape // 2 at side // 2; empty margins may be cut off."""
    return cube_about(mask, [n // 2 for n in mask.shape], side, fill=False)


def _mixed_mean(ct: CT, nodule: Nodule) -> float:
    """Mean HU to expect of a lesion where the grid is too coarse: each voxel holds as much of it as lies within, and those
    that hold more are the brighter ones."""
    box, lesion, share = lesion_in(ct, nodule.mask, crop_affine(nodule.centre_mm, nodule.mask.shape))
    share, order = share[lesion], np.argsort(share[lesion])
    values = np.empty(len(share))
    values[order] = quantiles(nodule.histogram, len(share))
    return float((share * values + (1 - share) * ct.array[box][lesion]).mean())


def _made(
    ct: CT,
    generator: Generator,
    request: Request,
    crops: Sequence[np.ndarray],
    keep: np.ndarray,
    retries: int,
    how: Sequence[dict[str, bool]],
) -> list[tuple[Finished, dict, int, int]]:
    """The best try of each lesion, with what `assess` found, its noise seed, and the number of tries."""
    best: list = [None] * len(request)
    open_ = np.arange(len(request))
    for attempt in range(retries + 1):
        asked = request[open_]
        if attempt:
            asked.seeds[:] = [np.random.SeedSequence((int(s), attempt)).generate_state(1)[0] for s in asked.seeds]
        for row, (i, hu) in enumerate(zip(open_, generator(asked, paste=False), strict=True)):
            core = None if asked.core is None else asked.core[row]
            seed, histogram = int(asked.seeds[row]), asked.histogram[row]
            lesion = finished(ct, hu, asked.mask[row], crops[i], histogram, seed, core, keep, **how[i])
            found = assess(lesion.before, lesion.after, lesion.lesion, ct.spacing, lesion.histogram, lesion.core)
            better = best[i] is None or found["jsd"] < best[i][1]["jsd"]
            best[i] = *((lesion, found, seed) if better else best[i][:3]), attempt + 1
        # other noise does not help where the grid is too coarse
        open_ = np.array([i for i in open_ if best[i][0].held and faults(best[i][1])], int)
        if not len(open_):
            break
    return best


def nodule_record(nodule: Nodule, histogram: np.ndarray, found: dict, noise_seed: int, tries: int) -> dict:
    """What reproduces and describes one nodule; histogram: requested of the written voxels."""
    missed = faults(found)
    if missed:
        place = ", ".join(f"{x:.0f}" for x in nodule.centre_mm)
        logger.warning("nodule at %s mm misses its wish: %s", place, "; ".join(missed))
    return {
        "wish": nodule.wish.given(),
        "centre_ras_mm": [round(float(x), 2) for x in nodule.centre_mm],
        "lobe": LOBE_NAMES.get(nodule.lobe, "lung"),
        "volume_mm3": int(nodule.mask.sum()),
        "diameter_mm": round(equivalent_diameter(nodule.mask.sum()), 2),
        **({} if nodule.core is None else {"core_mm3": int(nodule.core.sum())}),
        **({"base": nodule.chosen["base"]} if "base" in nodule.chosen else {}),
        "shape": nodule.chosen["shape"],
        "histogram_source": nodule.chosen["histogram"],
        "requested_histogram": [round(float(x), 6) for x in histogram],
        "noise_seed": noise_seed,
        "times_made": tries,
        "quality": {k: round(v, 4) for k, v in found.items()},
        "missed": missed,
    }
