"""Where a nodule may go: lung masks -> plausible positions for a lesion of a given shape.

`sample_position` knows the labels only. `inner`: the whole shape lies at least `MARGIN_MM` below the lung surface (the
lung eroded). `subpleural`: it comes within `SHELL_MM` of the surface without crossing it. (`pleura` finds the pleura by
HU, and there a shape touches it.) All reject a position with too large a share of vessel (HU above `VESSEL_HU`) or of
airway and bulla (HU below `AIRWAY_HU`), one that touches an occupied voxel (an existing lesion, or one placed before), and
one outside the chosen lobe. Reasons are counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hrldm.ct.geometry import equivalent_diameter
from hrldm.ct.lungs import depth_mm
from hrldm.nodules.masks import offsets

LOCATIONS = ("inner", "subpleural")
MARGIN_MM = 5.0  # least depth of an inner lesion's surface
SHELL_MM = 3.0  # greatest distance of a subpleural lesion from the lung surface
VESSEL_HU, AIRWAY_HU = -500.0, -985.0
MAX_VESSEL, MAX_AIRWAY = 0.08, 0.05  # greatest shares of the lesion's voxels
TRIES = 5000  # positions tested before giving up
DRAWN = 256  # candidates drawn at a time
IDLE = 200  # draws without a candidate before giving up


@dataclass
class PlacementReport:
    """How searches went: positions accepted, and rejected by reason."""

    accepted: int = 0
    rejected: Counter = field(default_factory=Counter)

    @property
    def tried(self) -> int:
        return self.accepted + self.rejected.total()

    def add(self, other: PlacementReport) -> None:
        """Add the counts of another search."""
        self.accepted += other.accepted
        self.rejected.update(other.rejected)

    def __str__(self) -> str:
        share = self.accepted / max(self.tried, 1)
        reasons = ", ".join(f"{k} {v}" for k, v in self.rejected.most_common())
        return f"{self.accepted} of {self.tried} places accepted ({share:.0%}); rejected: {reasons or 'none'}"


def overlap(start: np.ndarray, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[tuple[slice, ...], ...]:
    """Slices of an array `whole`, and of a part of `shape` that begins at its index `start`, where both have voxels."""
    inside = tuple(slice(max(0, s), max(0, min(n, s + m))) for s, m, n in zip(start, shape, whole, strict=True))
    return inside, tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))


class LungMap:
    """The lungs and the list of candidate voxels, made once for many searches.

    lobes:   int (x, y, z) at 1 mm, 0 outside the lungs; lobe labels, or 1 for a plain lung mask
    allowed: bool (x, y, z), voxels allowed as a centre; None allows all

    Raises:
        ValueError: the mask is empty.
    """

    def __init__(self, lobes: np.ndarray, allowed: np.ndarray | None = None):
        inside = lobes > 0
        if not inside.any():
            raise ValueError("the lung mask is empty: segment the lungs or lobes of this CT first")
        self.lobes = lobes
        self._outside = np.pad(~inside, 1, constant_values=True)  # as is all beyond the array
        self._centres = np.flatnonzero(inside if allowed is None else inside & allowed)

    def nearest(self, distance: np.ndarray, centre: np.ndarray) -> float:
        """The least `distance` (a, b, c), its middle voxel at `centre`, of a voxel outside the lungs; inf without one."""
        here, own = overlap(centre + 1 - np.array(distance.shape) // 2, distance.shape, self._outside.shape)
        return float(distance[own][self._outside[here]].min(initial=np.inf))

    def outwards(self, centre: np.ndarray, reach_mm: float) -> np.ndarray:
        """(3,) voxels from `centre` to the nearest one outside the lungs, which is at most `reach_mm` away."""
        half = int(np.ceil(reach_mm))
        ball = np.indices((2 * half + 1,) * 3).reshape(3, -1).T - half
        ball = ball[np.argsort((ball**2).sum(1), kind="stable")]
        at = np.clip(centre + 1 + ball, 0, np.array(self._outside.shape) - 1)
        return ball[self._outside[tuple(at.T)].argmax()]

    def candidates(
        self,
        rng: np.random.Generator,
        low: float = 0.0,
        high: float = np.inf,
        lobe: int | tuple[int, ...] | None = None,
    ) -> Iterator[np.ndarray]:
        """Random voxels (3,) of the lobe(s) at a depth of `low`..`high` mm, without end unless there are hardly any."""
        side = 2 * int(np.ceil(low if np.isinf(high) else high)) + 1
        around = np.linalg.norm(np.indices((side,) * 3) - side // 2, axis=0)
        idle = 0
        while len(self._centres) and idle < IDLE:
            drawn = self._centres[rng.integers(len(self._centres), size=DRAWN)]
            drawn = np.stack(np.unravel_index(drawn, self.lobes.shape), axis=1)
            if lobe is not None:
                drawn = drawn[np.isin(self.lobes[tuple(drawn.T)], lobe)]
            idle += 1
            for centre in drawn:
                if low <= self.nearest(around, centre) <= high:
                    idle = 0
                    yield centre


def why_not(voxels: np.ndarray, ct: np.ndarray, occupied: np.ndarray | None) -> str | None:
    """Why a lesion may not cover these voxels (n, 3); None if it may."""
    if (voxels < 0).any() or (voxels >= ct.shape).any():
        return "volume edge"
    covered = tuple(voxels.T)
    hu = ct[covered]
    if (hu > VESSEL_HU).mean() > MAX_VESSEL:
        return "vessel"
    if (hu < AIRWAY_HU).mean() > MAX_AIRWAY:
        return "airway"
    if occupied is not None and occupied[covered].any():
        return "existing lesion"
    return None


def _wrong_depth(nearest: float, location: str) -> str | None:
    """Why a lesion, `nearest` mm from the outside of the lungs, is not at this location; None if it is."""
    if nearest <= 0:
        return "chest wall"
    if location == "inner" and nearest < MARGIN_MM:
        return "too near the pleura"
    if location == "subpleural" and nearest > SHELL_MM:
        return "too far from the pleura"
    return None


def no_place(location: str, diameter_mm: float, report: PlacementReport) -> ValueError:
    """The error of a search that found none."""
    return ValueError(
        f"found 0 of 1 {location} places for a {diameter_mm:.0f} mm lesion: {report}. "
        "Choose a smaller lesion, or another lobe or location"
    )


def sample_position(
    ct: np.ndarray,
    lungs: LungMap,
    shape_mask: np.ndarray,
    rng: np.random.Generator,
    location: str = "inner",
    lobe: int | tuple[int, ...] | None = None,
    occupied: np.ndarray | None = None,
) -> tuple[np.ndarray, PlacementReport]:
    """A random position for a shape.

    ct:         HU, (x, y, z) at 1 mm
    lungs:      of the same grid
    shape_mask: bool (a, b, c), the lesion
    location:   `inner` or `subpleural`
    lobe:       label(s) the centre must have; None means anywhere in the lungs
    occupied:   bool, same shape as the CT: voxels no lesion may touch

    Returns:
        CT voxel (3,) for the mask's middle voxel `shape // 2`, and the report.

    Raises:
        ValueError: unknown location, unequal shapes, empty mask, or no position found.
    """
    if location not in LOCATIONS:
        raise ValueError(f"unknown location {location!r}; choose one of {', '.join(LOCATIONS)}")
    if ct.shape != lungs.lobes.shape or (occupied is not None and occupied.shape != ct.shape):
        raise ValueError(f"CT {ct.shape}, lobes {lungs.lobes.shape} and occupied must have one shape")
    if not shape_mask.any():
        raise ValueError("the shape mask is empty")
    voxels = offsets(shape_mask)
    reach = float(np.linalg.norm(voxels, axis=1).max())
    radius = equivalent_diameter(shape_mask.sum()) / 2
    low, high = (MARGIN_MM + 0.6 * radius, np.inf) if location == "inner" else (0.6 * radius, reach + SHELL_MM)
    # from the lesion, as far as the margins need it
    distance = depth_mm(~np.pad(shape_mask, int(np.ceil(max(MARGIN_MM, SHELL_MM))) + 1))
    report = PlacementReport()
    for centre in itertools.islice(lungs.candidates(rng, low, high, lobe), TRIES):
        reason = _wrong_depth(lungs.nearest(distance, centre), location) or why_not(voxels + centre, ct, occupied)
        if reason is None:
            report.accepted += 1
            return centre, report
        report.rejected[reason] += 1
    raise no_place(location, 2 * radius, report)
