"""Choose a shape of the library by its ratings, then rotate, bend and scale it to the requested one.

The signed distance d of a shape is smooth, so rotating, bending and scaling are one interpolation of d. The new shape
is the voxels with the largest d that make up the requested volume, so its volume is exact at any size.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.masks import PAD, cropped, depth, highest, signed_distance
from hrldm.nodules.shapes import ShapeLibrary

NEAREST = 40  # a shape is drawn from this many nearest in size
RATING_WIDTH = 0.5  # largest deviation from the requested spiculation, if enough shapes remain
BEND_SD_MM, BEND_MM = 0.5, 6.0  # SD and kernel of the field that bends a shape
CORE_MM = 3.0  # kernel of the field that moves a core off the middle
CORE_WANDER = 0.25  # its SD as a fraction of the lesion's depth
RIM_MM = 1.5  # ground-glass about a core
RIM_WEIGHT = 10.0  # a voxel with 1 mm less of it is taken as if it lay so many mm farther from the core's middle


def choose_shape(
    library: ShapeLibrary, subtype: str, diameter_mm: float, rng: np.random.Generator, spiculation: float | None = None
) -> int:
    """Row of a random shape of the subtype among those nearest in size (and in spiculation, 1..5, if given)."""
    table = library.table[library.table.subtype == subtype]
    if spiculation is not None:
        gap = (table.spiculation - spiculation).abs()
        table = table[gap <= max(RATING_WIDTH, float(gap.nsmallest(8).max()))]
    gap = (np.log(table.diameter_mm) - np.log(diameter_mm)).abs()
    return int(rng.choice(gap.nsmallest(NEAREST, keep="first").index))


def _sphere_voxels(diameter_mm: float) -> int:
    return max(1, round(np.pi / 6 * diameter_mm**3))


def fitted(mask: np.ndarray, diameter_mm: float, rng: np.random.Generator) -> np.ndarray:
    """The shape of `fitted_distance` as a mask, with `PAD` empty voxels around."""
    return cropped(highest(*fitted_distance(mask, diameter_mm, rng)))


def fitted_distance(mask: np.ndarray, diameter_mm: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The shape (x, y, z) at 1 mm, randomly rotated, bent by a smooth field of `BEND_SD_MM`, and scaled to a volume.

    Returns:
        d (n, n, n), the shape's middle in the middle voxel, no two values the same; and how many of the highest make the
        volume: as many as a sphere of `diameter_mm` has mm3.

    Raises:
        ValueError: empty mask, or a diameter that is not positive.
    """
    if not mask.any() or not diameter_mm > 0:
        raise ValueError(f"cannot fit a shape of {int(mask.sum())} voxels to a diameter of {diameter_mm:g} mm")
    n_voxels = _sphere_voxels(diameter_mm)
    scale = (n_voxels / mask.sum()) ** (1 / 3)
    padded = np.pad(mask, PAD)
    centre = np.argwhere(padded).mean(0)
    reach = np.linalg.norm(np.argwhere(padded) - centre, axis=1).max() * scale
    side = 2 * int(np.ceil(reach + 3 * BEND_SD_MM + PAD)) + 1
    grid = np.indices((side,) * 3).reshape(3, -1).astype(float) - side // 2
    for axis in range(3):
        noise = ndimage.gaussian_filter(rng.standard_normal((side,) * 3), BEND_MM)
        grid[axis] += (BEND_SD_MM / noise.std() * noise).ravel()
    rotation = Rotation.random(random_state=rng).as_matrix()
    at = rotation @ grid / scale + centre[:, None]
    fine = ndimage.map_coordinates(signed_distance(padded), at, order=1, mode="nearest").reshape((side,) * 3) * scale
    fine -= 1e-6 * np.linalg.norm(grid, axis=0).reshape(fine.shape)  # breaks ties, so that the count is exact
    return fine, n_voxels


def posed_distance(mask: np.ndarray, diameter_mm: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """As `fitted_distance`, but turned and bent at the shape's own size and then scaled: at all sizes one shape, and as many
    draws of `rng`."""
    own_mm = equivalent_diameter(mask.sum())
    distance, _ = fitted_distance(mask, own_mm, rng)
    scale, middle = diameter_mm / own_mm, len(distance) // 2
    half = int(np.ceil(middle * scale)) + PAD
    grid = np.indices((2 * half + 1,) * 3) - half
    fine = ndimage.map_coordinates(distance, grid / scale + middle, order=1, mode="nearest") * scale
    fine -= 1e-6 * np.linalg.norm(grid, axis=0)
    return fine, _sphere_voxels(diameter_mm)


def core_of(mask: np.ndarray, diameter_mm: float, rng: np.random.Generator) -> np.ndarray:
    """The solid core of a part-solid lesion: one off-centre lump with the volume of a sphere of `diameter_mm`, with a rim of
    `RIM_MM` about it where the lesion has room for it.

    mask: (x, y, z) bool at 1 mm, the whole lesion

    Returns:
        bool (x, y, z), within the mask.

    Raises:
        ValueError: the core would fill the lesion.
    """
    n_voxels = _sphere_voxels(diameter_mm)
    if n_voxels >= mask.sum():
        raise ValueError(
            f"a solid core of {diameter_mm:g} mm does not fit into a lesion of {equivalent_diameter(mask.sum()):.1f} mm"
        )
    deep = depth(mask)
    noise = ndimage.gaussian_filter(rng.standard_normal(mask.shape), CORE_MM)
    score = deep + CORE_WANDER * deep.max() / noise.std() * noise
    middle = np.array(np.unravel_index(np.where(mask, score, -np.inf).argmax(), mask.shape))
    score -= np.linalg.norm(np.indices(mask.shape) - middle[:, None, None, None], axis=0)
    score -= RIM_WEIGHT * np.maximum(RIM_MM + 1 - deep, 0)  # a voxel under a rim of n voxels has depth n + 1
    core = np.zeros(mask.shape, bool)
    inside = np.flatnonzero(mask)
    core.ravel()[inside[np.argsort(-score.ravel()[inside], kind="stable")[:n_voxels]]] = True
    return core
