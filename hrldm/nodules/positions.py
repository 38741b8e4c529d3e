"""Where a nodule may go: lung masks -> plausible positions for a lesion of a given shape.

`inner`: the whole shape lies at least `MARGIN_MM` below the lung surface (the lung eroded). `subpleural`: the shape
comes within `SHELL_MM` of the surface without crossing it. Both reject a position with too large a share of vessel (HU
above `VESSEL_HU`) or of airway and bulla (HU below `AIRWAY_HU`), one that touches an occupied voxel (an existing
lesion, or one placed before), and one outside the chosen lobe. Reasons are counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk

from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.masks import box_of, offsets

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


def depth_mm(inside: np.ndarray) -> np.ndarray:
    """Distance (x, y, z) float32 of each inside voxel to the nearest outside one; as scipy's, three times as fast."""
    outside = sitk.GetImageFromArray((~inside).astype(np.uint8))
    distance = sitk.SignedMaurerDistanceMap(outside, insideIsPositive=False, squaredDistance=False)
    return sitk.GetArrayFromImage(distance).clip(0)


class LungMap:
    """Depth below the lung surface and the list of candidate voxels, computed once for many searches.

    lobes:   int (x, y, z) at 1 mm, 0 outside the lungs; lobe labels, or 1 for a plain lung mask
    allowed: bool (x, y, z), voxels allowed as a centre; None allows all

    Raises:
        ValueError: the mask is empty.
    """

    def __init__(self, lobes: np.ndarray, allowed: np.ndarray | None = None):
        inside = lobes > 0
        if not inside.any():
            raise ValueError("the lung mask is empty: segment the lungs or lobes of this CT first")
        box = box_of(inside, 1)
        self.lobes = lobes
        self.depth = np.zeros(lobes.shape, np.float32)
        self.depth[box] = depth_mm(np.pad(inside[box], 1))[1:-1, 1:-1, 1:-1]
        self._centres = np.argwhere(inside if allowed is None else inside & allowed).astype(np.int16)

    def candidates(
        self,
        rng: np.random.Generator,
        low: float = 0.0,
        high: float = np.inf,
        lobe: int | tuple[int, ...] | None = None,
    ) -> Iterator[np.ndarray]:
        """Random voxels (3,) of the lobe(s) at a depth of `low`..`high` mm, without end unless there are hardly any."""
        idle = 0
        while len(self._centres) and idle < IDLE:
            drawn = self._centres[rng.integers(len(self._centres), size=DRAWN)].astype(int)
            at = tuple(drawn.T)
            keep = (self.depth[at] >= low) & (self.depth[at] <= high)
            if lobe is not None:
                keep &= np.isin(self.lobes[at], lobe)
            idle = 0 if keep.any() else idle + 1
            yield from drawn[keep]


def _why_not(
    voxels: np.ndarray, ct: np.ndarray, depth: np.ndarray, location: str, occupied: np.ndarray | None
) -> str | None:
    """Why a lesion may not cover these voxels (n, 3); None if it may."""
    if (voxels < 0).any() or (voxels >= ct.shape).any():
        return "volume edge"
    covered = tuple(voxels.T)
    nearest, hu = depth[covered].min(), ct[covered]
    if nearest <= 0:
        return "chest wall"
    if location == "inner" and nearest < MARGIN_MM:
        return "too near the pleura"
    if location == "subpleural" and nearest > SHELL_MM:
        return "too far from the pleura"
    if (hu > VESSEL_HU).mean() > MAX_VESSEL:
        return "vessel"
    if (hu < AIRWAY_HU).mean() > MAX_AIRWAY:
        return "airway"
    if occupied is not None and occupied[covered].any():
        return "existing lesion"
    return None


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
    report = PlacementReport()
    for centre in itertools.islice(lungs.candidates(rng, low, high, lobe), TRIES):
        if not (reason := _why_not(voxels + centre, ct, lungs.depth, location, occupied)):
            report.accepted += 1
            return centre, report
        report.rejected[reason] += 1
    raise ValueError(
        f"found 0 of 1 {location} places for a {2 * radius:.0f} mm lesion: {report}. "
        "Choose a smaller lesion, or another lobe or location"
    )
