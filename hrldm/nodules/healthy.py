"""A place as it was before its lesion: the lesion and its partial-volume shell replaced by lung of the same scan.

Let f be the HU, H the hole (the lesion and `MARGIN_MM` about it), p a patch of the same shape from another place, and
D = f - p about the hole. The patch is blended by its gradients (Pérez et al., "Poisson image editing", 2003), with a
screening length l, so that a vessel, the wall or the lesion's remnant at the hole's edge does not bleed into it:

    out = p + u  in H,    u - l² ∇²u = 0 in H,    u = D on its edge

The patch comes from the healthy place, of many drawn, whose surroundings fit those of the hole best (least squared D): as
deep in the lung, as bright and as noisy, with neither a vessel nor air that fills it. A hole too large for any place is
halved, and its parts, up to `MOST_PARTS`, are filled one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg

from hrldm.nodules.masks import box_of
from hrldm.nodules.positions import AIRWAY_HU, MAX_AIRWAY, MAX_VESSEL, VESSEL_HU

# real nodules exceed the lung by 92, 40, 23 and 20 HU at 0-1, 1-2, 2-3 and 3-4 mm: blur, and careful outlines
MARGIN_MM = 4.0
RING_MM = 3.0  # about the hole: where patch and surroundings are compared
SCREENING_MM = 2.0  # l: at 3, what is left beyond the margin shows in the hole
MIN_LUNG = 0.75  # of the lesion's surroundings: its margin and the ring
SEARCH_MM = 60.0  # from the lesion: farther away, noise and density differ
DEPTH_MM, DEPTH_SHARE = 3.0, 0.3  # greatest difference in depth below the pleura; or this share of it, if that is more
MEAN_HU, SD_FACTOR = 40.0, 1.4  # greatest difference of the surroundings' medians, greatest ratio of their SDs
SMOOTH_MM = 1.0  # before vessels and airways are looked for: noise is neither
TRIES, PLACES = 3000, 200  # places drawn at most, and fitting ones that are compared
SPLIT_MM = 10.0  # a shorter part of a hole is not halved again
MOST_PARTS = 8  # more look like patchwork
LEAST_RING = 30  # voxels of lung
TISSUE_HU, CLOSING_MM = -400.0, 3.0  # of `lung_of`: lung below, and vessels that are filled in
NO_PLACE = (
    f"no place in the lung within {SEARCH_MM:g} mm is like that of the lesion: as large, as deep, as bright, "
    "without vessels"
)


@dataclass(frozen=True)
class Patch:
    """Where lung was copied from.

    target, source: voxels of its middle in the hole and where it comes from
    mirrored:       axes along which it is flipped about it
    voxels:         how many
    misfit_hu:      root mean square of D in the ring about it
    places:         how many fitting places were compared
    """

    target: tuple[int, int, int]
    source: tuple[int, int, int]
    mirrored: tuple[int, ...]
    voxels: int
    misfit_hu: float
    places: int


def lung_of(hu: np.ndarray, mask: np.ndarray, spacing: np.ndarray = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Lung (x, y, z) bool of a crop about a lesion (`mask`), by threshold; vessels are filled in."""
    dark, pad = hu < TISSUE_HU, np.ceil(CLOSING_MM / np.asarray(spacing)).astype(int) + 1
    padded = np.pad(dark, [(n, n) for n in pad], mode="edge")
    grown = ndimage.distance_transform_edt(~padded, spacing) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, spacing) > CLOSING_MM
    return closed[tuple(slice(n, -n) for n in pad)] | dark | mask


def erased(
    hu: np.ndarray,
    lung: np.ndarray,
    mask: np.ndarray,
    spacing: np.ndarray = (1.0, 1.0, 1.0),
    seed: int = 0,
    avoid: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Patch]]:
    """Replace one lesion by lung.

    Args:
        hu:      (x, y, z) HU, a CT or a crop
        lung:    (x, y, z) bool or labels, 0 outside the lungs; the lesion counts as lung
        mask:    (x, y, z) bool, the lesion
        spacing: (3,) mm
        seed:    of the places drawn
        avoid:   (x, y, z) bool, other lesions, which no patch may hold

    Returns:
        float32 (x, y, z), equal to `hu` further than `MARGIN_MM` from the lesion; and the patches, one for most lesions.

    Raises:
        ValueError: shapes differ, an empty mask, too little lung about the lesion, or no place like it.
    """
    shapes = {np.shape(a) for a in (hu, lung, mask, hu if avoid is None else avoid)}
    if len(shapes) > 1 or not np.any(mask):
        raise ValueError(f"CT, lung and masks must have one shape, not {sorted(shapes)}, and the lesion a voxel")
    spacing = np.asarray(spacing, float)
    box = box_of(mask, int(np.ceil(SEARCH_MM / spacing.min())))
    filling = _Filling(hu[box], lung[box] > 0, mask[box] > 0, spacing, None if avoid is None else avoid[box] > 0)
    rng, corner, patches, todo = np.random.default_rng(seed), [s.start for s in box], [], [np.argwhere(filling.open)]
    while todo:
        part = todo.pop()
        found = filling.fill(part, rng, corner)
        if found is None:
            todo += _halves(part, spacing)
            if len(patches) + len(todo) > MOST_PARTS:
                raise ValueError(NO_PLACE)
        else:
            patches.append(found)
    out = hu.astype(np.float32)
    out[box] = filling.hu
    return out, patches


def _halves(part: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (n, 3) of a hole, halved across its longest side; ValueError if it is short."""
    size = np.ptp(part, axis=0) * spacing
    if size.max() < SPLIT_MM:
        raise ValueError(NO_PLACE)
    along = part[:, size.argmax()]
    low = along <= np.median(along)
    return part[low], part[~low]


class _Filling:
    """The box about a lesion while its hole is filled.

    hu:   (x, y, z) float32, filled so far
    open: (x, y, z) bool, the hole's voxels that are not yet filled
    """

    def __init__(
        self, hu: np.ndarray, lung: np.ndarray, mask: np.ndarray, spacing: np.ndarray, avoid: np.ndarray | None
    ):
        self.hu, self.spacing, self.lung = hu.astype(np.float32), spacing, lung | mask
        distance = ndimage.distance_transform_edt(~mask, spacing)
        about = (distance > 0) & (distance <= MARGIN_MM + RING_MM)
        share = float(lung[about].mean()) if about.any() else 0.0
        if share < MIN_LUNG:
            raise ValueError(
                f"{share:.0%} of what surrounds the lesion is lung, at least {MIN_LUNG:.0%} must be: it lies at the pleura or "
                "the hilum, which cannot be copied"
            )
        self.open = (distance <= MARGIN_MM) & self.lung  # the wall beside a lesion stays
        free = lung & ~self.open
        if avoid is not None:
            free &= ndimage.distance_transform_edt(~avoid, spacing) > MARGIN_MM
        self.depth, self.room = (ndimage.distance_transform_edt(a, spacing) for a in (self.lung, free))
        smooth = ndimage.gaussian_filter(self.hu, SMOOTH_MM / spacing)
        self.pad = int(np.ptp(np.argwhere(self.open), axis=0).max()) + int(np.ceil(RING_MM / spacing.min())) + 1
        # padded, so that no patch about a voxel of the box leaves the array
        self._free, self._vessel, self._air, self._source = (
            np.pad(a, self.pad, constant_values=beyond)
            for a, beyond in ((free, False), (smooth > VESSEL_HU, True), (smooth < AIRWAY_HU, True), (self.hu, np.nan))
        )

    def fill(self, part: np.ndarray, rng: np.random.Generator, corner: np.ndarray) -> Patch | None:
        """Fill the voxels (n, 3) of a part of the hole; None if no place is like it. corner: of the box in the CT."""
        inside = np.zeros_like(self.open)
        inside[tuple(part.T)] = True
        box = box_of(inside, int(np.ceil(RING_MM / self.spacing.min())) + 1)
        start, inside = np.array([s.start for s in box]), inside[box]
        ring = np.argwhere((ndimage.distance_transform_edt(~inside, self.spacing) <= RING_MM) & ~self.open[box])
        inner = ndimage.distance_transform_edt(np.pad(inside, 1), self.spacing)[1:-1, 1:-1, 1:-1]
        middle = start + np.unravel_index(inner.argmax(), inner.shape)
        surface = np.argwhere(inside & ~ndimage.binary_erosion(inside))
        first, ring, part_ = (a - middle for a in (surface[:: len(surface) // 100 + 1] + start, ring + start, part))
        best = self._best(middle, float(inner.max()), first, part_, ring, rng)
        if best is None:
            return None
        misfit, source, flip, places = best

        def patch(voxels: np.ndarray) -> np.ndarray:
            return self._source[self._index(source, flip, voxels - middle)]

        self.hu[tuple(part.T)] = patch(part) + self._edge(part, patch)
        self.open[tuple(part.T)] = False
        at = (tuple((voxel + corner).tolist()) for voxel in (middle, source))
        return Patch(*at, tuple(np.flatnonzero(flip < 0).tolist()), len(part), misfit, places)

    def _index(self, source: np.ndarray, flip: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Index of the padded arrays of voxels (n, 3) relative to the middle of a patch, flipped (3,) about it."""
        return tuple((source + self.pad + offsets * flip).T)

    def _best(
        self,
        middle: np.ndarray,
        radius: float,
        first: np.ndarray,
        part: np.ndarray,
        ring: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[float, np.ndarray, np.ndarray, int] | None:
        """Misfit, middle and flips of the best patch, and how many were compared.

        radius: of a ball (mm) in the part; first, part, ring: voxels (n, 3) relative to the middle: some of the part's
        surface, all of the part, and about it
        """
        here = tuple((middle + ring).T)
        target, clear = self.hu[here].clip(max=VESSEL_HU), self.lung[here]
        if clear.sum() < LEAST_RING:
            return None
        level, spread = np.median(target[clear]), target[clear].std()
        depth = self.depth[tuple(middle)]
        alike = np.abs(self.depth - depth) <= max(DEPTH_MM, DEPTH_SHARE * depth)
        fits = []
        for place in rng.permutation(np.argwhere(alike & (self.room >= radius)))[:TRIES]:
            flip = rng.choice([-1, 1], 3)
            if not self._free[self._index(place, flip, first)].all():
                continue
            at = self._index(place, flip, part)
            healthy = self._vessel[at].mean() <= MAX_VESSEL and self._air[at].mean() <= MAX_AIRWAY
            seen = self._source[self._index(place, flip, ring)].clip(max=VESSEL_HU)
            if not healthy or np.isnan(seen).any() or not self._free[at].all():
                continue
            apart, ratio = np.median(seen[clear]) - level, max(seen[clear].std(), 1.0) / max(spread, 1.0)
            if abs(apart) > MEAN_HU or not 1 / SD_FACTOR <= ratio <= SD_FACTOR:
                continue
            fits.append((float(np.sqrt(((target - seen) ** 2).mean())), place, flip))
            if len(fits) == PLACES:
                break
        return (*min(fits, key=lambda fit: fit[0]), len(fits)) if fits else None

    def _edge(self, part: np.ndarray, patch: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """u (n,) of the part's voxels: u_i + sum over the six neighbours j of (l / spacing)² (u_i - u_j) = 0, where
        neighbours beyond the array or in the open hole do not count."""
        number = np.pad(np.where(self.open, -2, -1), 1, constant_values=-2)  # -1: at the edge, where u is known
        n = len(part)
        number[tuple((part + 1).T)] = np.arange(n)
        diagonal, known, pairs = np.ones(n), np.zeros(n), []
        for axis, step in ((axis, step) for axis in range(3) for step in (-1, 1)):
            beside = part + step * (np.arange(3) == axis)
            other, weight = number[tuple((beside + 1).T)], (SCREENING_MM / self.spacing[axis]) ** 2
            diagonal += weight * (other >= -1)
            within, edge = np.flatnonzero(other >= 0), np.flatnonzero(other == -1)
            known[edge] += weight * (self.hu[tuple(beside[edge].T)] - patch(beside[edge]))
            pairs.append((np.full(len(within), -weight), within, other[within]))
        weights, rows, columns = (np.concatenate(a) for a in zip(*pairs, strict=True))
        matrix = sparse.csr_matrix((weights, (rows, columns)), (n, n)) + sparse.diags(diagonal)
        return cg(matrix, known, rtol=1e-4)[0]
