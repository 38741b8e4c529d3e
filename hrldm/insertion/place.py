"""Choose a nodule's position, shape and histogram from its wish, before any network runs.

A wish brings its own lesion as a mask file (`own_mask`), or gets a shape of the library and a position for it in the lungs
(`lung_space`); then its histogram and its core (`intensity`).
"""

import logging
from dataclasses import dataclass

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import LPS_TO_RAS, to_world
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.lungs import depth_mm
from hrldm.insertion.intensity import intensity
from hrldm.insertion.lung_space import LungSpace
from hrldm.insertion.own_mask import own_lesion
from hrldm.insertion.wish import Wish
from hrldm.nodules.masks import cropped, highest
from hrldm.nodules.pleura import BASES, at_pleura
from hrldm.nodules.positions import sample_position
from hrldm.nodules.shape_fitting import choose_shape, fitted_distance, posed_distance
from hrldm.nodules.shapes import ShapeLibrary

logger = logging.getLogger(__name__)
PLACE_SEED, NOISE_SEED = 1, 2  # what a wish's seed draws: shape, place and histogram; the seed of the sampler's noise
SHAPES_TRIED = 5  # random shapes and rotations tried until one finds a position


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
        ValueError: no position, or one outside the lungs or occupied; mean, SD and core that cannot be had together. The
            message names the nodule.
    """
    rng = np.random.default_rng((wish.seed, PLACE_SEED))
    chosen, core, name = {}, None, f"nodule {number} ({wish.described()})"
    try:
        if wish.location == "subpleural":
            drawn = list(BASES)[rng.integers(len(BASES))]
            chosen["base"] = wish.base or drawn
        if wish.mask is not None:
            mask, core, centre = own_lesion(space, wish.mask)
            chosen["shape"] = "own mask"
        else:
            chosen["shape"], mask, centre = _library_lesion(space, wish, library, rng, chosen.get("base"))
        chosen["histogram"], histogram, core = intensity(space, wish, mask, core, centre, rng, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    space.take(mask, centre)
    return Nodule(wish, to_world(space.affine, centre), mask, core, histogram, int(space.labels[tuple(centre)]), chosen)


# -- the lesion and its position ---------------------------------------------------------------------------------------


def _library_lesion(
    space: LungSpace, wish: Wish, library: ShapeLibrary, rng: np.random.Generator, base: str | None
) -> tuple[str, np.ndarray, np.ndarray]:
    """Id of a shape, its mask, and the voxel of `space` at its middle; base: at the pleura, one of `BASES`."""
    lobe = _lobe_label(space, wish)
    for _ in range(SHAPES_TRIED if wish.shape is None else 1):
        if wish.shape is None:
            row = choose_shape(library, wish.subtype, wish.diameter_mm, rng, wish.spiculation)
            fit = fitted_distance(library.masks[row], wish.diameter_mm, rng)
        else:
            row = library.row(wish.shape)
            fit = posed_distance(library.masks[row], wish.diameter_mm, rng)
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
        turned = np.rint(to_world(LPS_TO_RAS, at) - space.affine[:3, 3]).astype(int)
        inside = (turned >= 0).all() and (turned < space.hu.shape).all() and space.labels[tuple(turned)]
        raise ValueError(
            f"at {', '.join(f'{x:.0f}' for x in at)} mm the lesion would leave the lungs; the nearest place for it is "
            f"{', '.join(f'{x:.0f}' for x in nearest)}"
            + (
                "; as LPS it lies in the lungs: if it is, say so (lps=True), or turn the signs of x and y"
                if inside
                else ""
            )
        )
    side = "right" if at[0] > to_world(space.affine, np.argwhere(space.labels))[:, 0].mean() else "left"
    logger.info("at %s mm (RAS): the patient's %s", ", ".join(f"{x:.0f}" for x in at), side)
    if space.occupied[tuple(voxels.T)].any():
        raise ValueError(f"at {', '.join(f'{x:.0f}' for x in at)} mm there is another lesion; choose another place")
