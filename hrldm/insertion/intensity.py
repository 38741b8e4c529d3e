"""What a lesion is filled with: the HU histogram that is requested for it, and the solid core that goes with it.

Both hold: the histogram has the mean and SD asked for, and as much of it lies above `SOLID_HU` as of the lesion is core. By
default the core follows the histogram. A core of the wish's own size or shape sets the histogram's solid part, unless the
histogram is the wish's own and no moments are asked for: that is kept as it is.

The ceiling of ground-glass is `SOLID_HU`: what is brighter in a real one is vessels. Of a histogram that is drawn for one, as
much lies above as of its own place is vessel, at most; another place's vessels would make a bright band where there is none.
Of one that is drawn for a solid lesion, no more lies below than a shell of 1 mm holds, or the rest would be holes: so it is in
real ones (the library's 149 have as much as such a shell of a ball from 10 mm on, .00 to .05 less on average, smaller ones less).
"""

import logging

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter
from hrldm.insertion.lung_space import LungSpace
from hrldm.insertion.wish import Wish, read_histogram
from hrldm.nodules.histograms import (
    FLOOR_REACH,
    SOLID_HU,
    draw_histogram,
    histogram_library,
    histogram_moments,
    lung_floor,
    quantiles,
    solid_share,
    with_moments,
    with_solid_share,
)
from hrldm.nodules.positions import VESSEL_HU, overlap
from hrldm.nodules.shape_fitting import core_of

logger = logging.getLogger(__name__)
# share of a part-solid lesion's volume that its core has by default, 0.46 to 0.67 of its diameter: readers' outlines give real
# ones more solid tissue, but then no ground-glass is seen about it
CORE_SHARE = (0.1, 0.3)
LEAST_CORE_MM = 3.0  # a smaller core is not seen, and only made where it is asked for
LEAST_RIM_MM = 1.0  # as thin a rim is not seen
OTHER_SHARE = 0.02  # a core's share of the lesion may differ so much from the histogram's solid part
DIMMED = 0.4  # greatest share of its contrast to the lung that a vessel loses within a lesion


def intensity(
    space: LungSpace,
    wish: Wish,
    mask: np.ndarray,
    core: np.ndarray | None,
    centre: np.ndarray,
    rng: np.random.Generator,
    name: str,
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """The histogram's source, the histogram (40,), and the solid core (x, y, z) bool or None, of a lesion with its middle at
    the voxel `centre` of `space`; warnings name the nodule.

    core: the user's own, None without

    Raises:
        ValueError: mean, SD, histogram and core that cannot be had together, with what can be had.
    """
    source, histogram = _histogram(space, wish, mask, centre, rng)
    if core is None and wish.core_mm:
        core = core_of(mask, wish.core_mm, rng)
    if core is None:
        histogram, core = _following_core(wish, mask, histogram, rng, name)
    else:
        histogram = _of_core(wish, core.sum() / mask.sum(), mask, histogram, name)
    _say_if_unusual(wish, histogram, name)
    _say_if_dimmed(space, wish, mask, centre, histogram, name)
    return source, histogram, core


# -- the histogram -----------------------------------------------------------------------------------------------------


def _histogram(
    space: LungSpace, wish: Wish, mask: np.ndarray, centre: np.ndarray, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """The histogram's source and values, not yet moved."""
    if wish.histogram is not None:
        return wish.histogram if isinstance(wish.histogram, str) else "given", read_histogram(wish.histogram)
    around = space.hu[tuple(slice(max(0, c - FLOOR_REACH), c + FLOOR_REACH + 1) for c in centre)]
    diameter = equivalent_diameter(mask.sum())
    bright = None if wish.subtype == "solid" else _vessels(space, mask, centre)
    source, histogram = draw_histogram(wish.subtype, diameter, rng, lung_floor(around), space.sources, bright)
    space.sources.append(source)
    return source, fitted(histogram, wish.subtype, mask, 0.0 if bright is None else bright[0])


def fitted(histogram: np.ndarray, subtype: str, mask: np.ndarray, vessel: float = 1.0) -> np.ndarray:
    """A drawn histogram (40,) with the solid share that a lesion's mask (x, y, z), at 1 mm, and its place allow.

    vessel: share of vessel in the place of a ground-glass lesion
    """
    share = solid_share(histogram)
    if subtype == "ground-glass" and share > vessel:
        return with_solid_share(histogram, vessel)
    below_shell = float(ndimage.binary_erosion(mask).sum() / mask.sum())
    if subtype == "solid" and 0 < share < below_shell:
        return with_solid_share(histogram, below_shell)
    return histogram


def _vessels(space: LungSpace, mask: np.ndarray, centre: np.ndarray) -> tuple[float, float] | None:
    """Share of vessel in a lesion's place, and the least HU that it has within the lesion; None without a vessel."""
    here, own = overlap(centre - np.array(mask.shape) // 2, mask.shape, space.hu.shape)
    hu = space.hu[here][mask[own]]
    vessel = hu > VESSEL_HU
    if not vessel.any() or vessel.all():
        return None
    bright, lung = hu[vessel].mean(), np.median(hu[~vessel])
    return float(vessel.mean()), float(bright - DIMMED * (bright - lung))


def _say_if_unusual(wish: Wish, histogram: np.ndarray, name: str) -> None:
    """Warn of a mean asked for that no real nodule of the subtype has."""
    if wish.mean_hu is None and wish.histogram is None:
        return
    library = histogram_library()
    real = library.mean_hu[library.subtype == wish.subtype]
    mean = histogram_moments(histogram)[0]
    if not real.min() <= mean <= real.max():
        logger.warning(
            "%s: a mean of %.0f HU is asked for; real %s nodules (%d of LIDC) have %.0f to %.0f",
            name, mean, wish.subtype, len(real), real.min(), real.max(),
        )  # fmt: skip


def _say_if_dimmed(
    space: LungSpace, wish: Wish, mask: np.ndarray, centre: np.ndarray, histogram: np.ndarray, name: str
) -> None:
    """Warn of a histogram asked for that leaves no room for the vessels of a ground-glass lesion's place."""
    if wish.drawn or wish.subtype == "solid" or (vessels := _vessels(space, mask, centre)) is None:
        return
    share, least = vessels
    brightest = quantiles(histogram, 1000)[-max(round(1000 * share), 1) :].mean()
    if brightest < least:
        logger.warning(
            "%s: %.1f%% of its place is vessel; the brightest %.1f%% of the histogram asked for has %.0f HU, less than the %.0f HU "
            "of a vessel that is still seen there: ask for a higher mean or SD, or another place",
            name, 100 * share, 100 * share, brightest, least,
        )  # fmt: skip


# -- the core ----------------------------------------------------------------------------------------------------------


def _of_core(wish: Wish, share: float, mask: np.ndarray, histogram: np.ndarray, name: str) -> np.ndarray:
    """The histogram for a core that is asked for and has this share of the lesion."""
    moments, own = (wish.mean_hu, wish.sd_hu), solid_share(histogram)
    kept = wish.histogram is not None and moments == (None, None)
    if wish.histogram is not None and abs(own - share) > OTHER_SHARE:
        least = quantiles(histogram, 1000)[-max(round(1000 * share), 1)]
        result = f"the brightest values, from {least:.0f} HU on, lie in the core" if kept else "it is weighted to that"
        logger.warning(
            "%s: %.0f%% of the histogram lies above %g HU, as a core of %.1f mm would have; one of %.1f mm is asked for: %s",
            name, 100 * own, SOLID_HU, equivalent_diameter(own * mask.sum()), equivalent_diameter(share * mask.sum()), result,
        )  # fmt: skip
    return histogram if kept else with_moments(with_solid_share(histogram, share), *moments, keep_solid=True)


def _following_core(
    wish: Wish, mask: np.ndarray, histogram: np.ndarray, rng: np.random.Generator, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The histogram with the moments asked for, and a core as large as its solid part; of one that is drawn and not moved,
    that part is limited first."""
    n = int(mask.sum())
    histogram = with_moments(histogram, wish.mean_hu, wish.sd_hu)
    if wish.subtype != "part-solid" or wish.core_mm == 0:
        return histogram, None
    share = solid_share(histogram)
    if wish.drawn and 0 < share < 1:
        least = max(CORE_SHARE[0], (LEAST_CORE_MM / equivalent_diameter(n)) ** 3)
        share = min(max(share, least), max(CORE_SHARE[1], least))
        histogram = with_solid_share(histogram, share)
    elif share * n > n - 1 or equivalent_diameter(share * n) < LEAST_CORE_MM:
        logger.warning(
            "%s: %.1f%% of its histogram lies above %g HU, so it gets no solid core%s",
            name, 100 * share, SOLID_HU, "" if share < 0.5 else " apart from a rim",
        )  # fmt: skip
        return histogram, None
    elif (rim := (equivalent_diameter(n) - equivalent_diameter(share * n)) / 2) < LEAST_RIM_MM:
        logger.warning(
            "%s: %.0f%% of its histogram lies above %g HU: the core leaves a rim of %.1f mm, which is hardly seen",
            name, 100 * share, SOLID_HU, rim,
        )  # fmt: skip
    return histogram, core_of(mask, equivalent_diameter(share * n), rng)
