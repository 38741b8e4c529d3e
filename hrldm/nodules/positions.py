"""Where a nodule may go: lung masks -> plausible positions for a lesion of a given shape.

`inner`: the whole shape lies at least `margin_mm` below the lung surface (the lung eroded). `subpleural`: the shape
comes within `shell_mm` of the surface without crossing it. Both reject a position with too large a share of vessel (HU
above `VESSEL_HU`) or of airway and bulla (HU below `AIRWAY_HU`), one that touches an occupied voxel (an existing
lesion, or one placed before), and one outside the chosen lobe. Reasons are counted, and the acceptance rate is logged.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter

LOCATIONS = ("inner", "subpleural")
VESSEL_HU, AIRWAY_HU = -500.0, -985.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """CT voxel for the shape mask's centre voxel `shape // 2`, the lobe label there, and the location."""

    center: tuple[int, int, int]
    lobe: int
    location: str


@dataclass
class PlacementReport:
    """How the search went: positions tried, accepted, and rejected by reason."""

    tried: int = 0
    accepted: int = 0
    rejected: Counter = field(default_factory=Counter)

    @property
    def acceptance(self) -> float:
        """Share of tried positions that were accepted."""
        return self.accepted / max(self.tried, 1)

    def add(self, other: PlacementReport) -> None:
        """Add the counts of another search."""
        self.tried += other.tried
        self.accepted += other.accepted
        self.rejected.update(other.rejected)

    def __str__(self) -> str:
        reasons = ", ".join(f"{k} {v}" for k, v in self.rejected.most_common())
        return f"{self.accepted} of {self.tried} places accepted ({self.acceptance:.0%}); rejected: {reasons or 'none'}"


def depth_mm(inside: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Distance (x, y, z) float32 of each inside voxel to the nearest outside one; as scipy's, three times as fast."""
    outside = sitk.GetImageFromArray((~inside).astype(np.uint8))
    outside.SetSpacing([float(s) for s in spacing[::-1]])  # SimpleITK orders axes in reverse
    distance = sitk.SignedMaurerDistanceMap(
        outside, insideIsPositive=False, squaredDistance=False, useImageSpacing=True
    )
    return sitk.GetArrayFromImage(distance).clip(0)


class LungMap:
    """Depth below the lung surface and the list of candidate voxels, computed once for many searches.

    Args:
        lobes: int (x, y, z), 0 outside the lungs; lobe labels, or 1 for a plain lung mask.
        allowed: bool (x, y, z), voxels allowed as a centre; None allows all.
        spacing: mm per voxel.

    Raises:
        ValueError: the mask is empty.
    """

    def __init__(
        self,
        lobes: np.ndarray,
        allowed: np.ndarray | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        found = ndimage.find_objects((lobes > 0).astype(np.uint8))
        if not found:
            raise ValueError("the lung mask is empty: segment the lungs or lobes of this CT first")
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in found[0])
        inside = np.pad(lobes[box] > 0, 1)
        self.lobes = lobes
        self.spacing = spacing
        self.depth = np.zeros(lobes.shape, np.float32)
        self.depth[box] = depth_mm(inside, spacing)[1:-1, 1:-1, 1:-1]
        centers = lobes > 0 if allowed is None else (lobes > 0) & allowed
        self._candidates = np.argwhere(centers).astype(np.int16)

    def draw(
        self, n: int, lobe: tuple[int, ...] | None, low: float, high: float, rng: np.random.Generator
    ) -> np.ndarray:
        """At most `n` random candidate voxels (m, 3) of the lobes at a depth of `low`..`high` mm."""
        if not len(self._candidates):
            return np.empty((0, 3), int)
        centers = self._candidates[rng.integers(len(self._candidates), size=n)].astype(int)
        depth = self.depth[tuple(centers.T)]
        keep = (depth >= low) & (depth <= high)
        if lobe is not None:
            keep &= np.isin(self.lobes[tuple(centers.T)], lobe)
        return centers[keep]


def _why_not(
    depth: np.ndarray,
    hu: np.ndarray,
    location: str,
    margin_mm: float,
    shell_mm: float,
    max_vessel: float,
    max_airway: float,
) -> str | None:
    """Why a position is rejected, from depth (mm) and HU of the voxels the lesion would cover; None if accepted."""
    if depth.min() <= 0:
        return "chest wall"
    if location == "inner" and depth.min() < margin_mm:
        return "too near the pleura"
    if location == "subpleural" and depth.min() > shell_mm:
        return "too far from the pleura"
    if (hu > VESSEL_HU).mean() > max_vessel:
        return "vessel"
    if (hu < AIRWAY_HU).mean() > max_airway:
        return "airway"
    return None


def sample_positions(
    ct: np.ndarray,
    lobes: np.ndarray,
    shape_mask: np.ndarray,
    n: int,
    rng: np.random.Generator,
    *,
    location: str = "inner",
    lobe: int | tuple[int, ...] | None = None,
    occupied: np.ndarray | None = None,
    lung_map: LungMap | None = None,
    margin_mm: float = 5.0,
    shell_mm: float = 3.0,
    max_vessel: float = 0.08,
    max_airway: float = 0.05,
    max_tries: int = 5000,
) -> tuple[list[Position], PlacementReport]:
    """Random positions for a shape; those of one call do not overlap.

    Args:
        ct: HU, (x, y, z).
        lobes: int, same shape: lobe labels, or 1 for a plain lung mask; 0 outside.
        shape_mask: bool (a, b, c) on the CT's grid, lesion in its middle.
        n: positions wanted.
        rng: random generator.
        location: `inner` or `subpleural`.
        lobe: label(s) the centre must have; None means anywhere in the lungs.
        occupied: bool, same shape as the CT: voxels no lesion may touch.
        lung_map: prepared `LungMap(lobes)`, to save the distance transform when calling often.
        margin_mm: least depth of an inner lesion's surface.
        shell_mm: greatest distance of a subpleural lesion from the lung surface.
        max_vessel: greatest share of lesion voxels above `VESSEL_HU`.
        max_airway: greatest share of lesion voxels below `AIRWAY_HU`.
        max_tries: positions tested before giving up.

    Returns:
        The positions and the report.

    Raises:
        ValueError: unknown location, unequal shapes, empty mask, or fewer than `n` positions found.
    """
    if location not in LOCATIONS:
        raise ValueError(f"unknown location {location!r}; choose one of {', '.join(LOCATIONS)}")
    if ct.shape != lobes.shape or (occupied is not None and occupied.shape != ct.shape):
        raise ValueError(f"CT {ct.shape}, lobes {lobes.shape} and occupied must have one shape")
    if not shape_mask.any():
        raise ValueError("the shape mask is empty")
    lung_map = lung_map or LungMap(lobes)
    labels = None if lobe is None else tuple(np.atleast_1d(lobe).tolist())
    voxels = np.argwhere(shape_mask) - np.array(shape_mask.shape) // 2  # offsets from the centre voxel
    reach = float(np.linalg.norm(voxels * lung_map.spacing, axis=1).max())
    radius = equivalent_diameter(shape_mask.sum() * np.prod(lung_map.spacing)) / 2
    low, high = (margin_mm + 0.6 * radius, np.inf) if location == "inner" else (0.6 * radius, reach + shell_mm)
    limit = np.array(ct.shape)
    taken: set[tuple[int, int, int]] = set()
    found: list[Position] = []
    report = PlacementReport()
    idle = 0
    while len(found) < n and report.tried < max_tries and idle < 200:
        places = lung_map.draw(256, labels, low, high, rng)
        idle = idle + 1 if not len(places) else 0
        for center in places:
            if len(found) == n or report.tried == max_tries:
                break
            report.tried += 1
            at = voxels + center
            if (at < 0).any() or (at >= limit).any():
                reason = "volume edge"
            else:
                index = tuple(at.T)
                reason = _why_not(
                    lung_map.depth[index], ct[index], location, margin_mm, shell_mm, max_vessel, max_airway
                )
                if reason is None and occupied is not None and occupied[index].any():
                    reason = "existing lesion"
                elif reason is None and n > 1 and not taken.isdisjoint(map(tuple, at.tolist())):
                    reason = "overlap"
            if reason:
                report.rejected[reason] += 1
                continue
            taken.update(map(tuple, at.tolist()))
            report.accepted += 1
            found.append(Position(tuple(int(c) for c in center), int(lobes[tuple(center)]), location))
    logger.debug("placement: %s", report)
    if len(found) < n:
        raise ValueError(
            f"found {len(found)} of {n} {location} places for a {2 * radius:.0f} mm lesion: {report}. "
            "Choose a smaller lesion, or another lobe or location"
        )
    return found, report
