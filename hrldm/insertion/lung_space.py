"""The lungs of a CT as placing sees them: on an axis-aligned RAS grid of 1 mm, with what is taken already."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import reach, sample, shifted
from hrldm.ct.volume import CT, to_ras
from hrldm.insertion.blend import FEATHER_MM, MARGIN_SIGMAS
from hrldm.nodules.masks import box_of
from hrldm.nodules.positions import LungMap, PlacementReport, overlap

BEYOND_MM = 6  # outside the lung labels, where the pleura may lie
FEATHERED_MM = MARGIN_SIGMAS * FEATHER_MM  # beyond a lesion, what its feather reaches
# beyond a lesion, how far its finished edge reaches: 2.5 SDs of the scan's sharpness, each half a voxel
EDGE_VOXELS = 1.25


def voxel_mm(ct: CT) -> np.ndarray:
    """(3,) extent of the CT's voxels along R, A and S."""
    return np.abs(ct.affine[:3, :3]).sum(1)


def edge_mm(ct: CT) -> np.ndarray:
    """(3,) how far beyond a lesion its edge in this CT reaches along R, A and S."""
    return np.maximum(FEATHERED_MM, EDGE_VOXELS * voxel_mm(ct))


def grown(mask: np.ndarray, by_mm: np.ndarray) -> np.ndarray:
    """The mask (x, y, z) at 1 mm and all about it within `by_mm` (3,) along the axes."""
    return ndimage.distance_transform_edt(~mask, 1 / by_mm) <= 1


@dataclass(frozen=True, eq=False)
class LungSpace:
    """The lungs of `ct` on an axis-aligned RAS grid of 1 mm: HU, labels, occupied voxels, and what was placed."""

    ct: CT
    affine: np.ndarray
    hu: np.ndarray
    labels: np.ndarray
    map: LungMap
    occupied: np.ndarray
    report: PlacementReport = field(default_factory=PlacementReport)
    sources: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, ct: CT, labels: np.ndarray, avoid: np.ndarray | None = None) -> LungSpace:
        """labels, avoid: (X, Y, Z) on the CT's grid; avoid: voxels that must not change (known lesions).

        Raises:
            ValueError: not on the CT's grid, or no lung.
        """
        for name, given in (("labels", labels), ("avoid", avoid)):
            if given is not None and np.shape(given) != ct.shape:
                raise ValueError(
                    f"{name} have {np.shape(given)} voxels and the CT {ct.shape} (x, y, z); SimpleITK's arrays are (z, y, x)"
                )
        whole = np.asarray(labels)
        if whole.dtype.kind == "f" and (whole != np.rint(whole)).any() or whole.min() < 0 or whole.max() > 255:
            raise ValueError(
                f"labels of {whole.min():g} to {whole.max():g}: give whole numbers 0 to 255, 0 outside the lungs (of a "
                "probability map, its voxels above 0.5)"
            )
        lungs = whole > 0
        if not lungs.any():
            raise ValueError("the labels hold no lung: no voxel above 0")
        first, beyond = np.array([(s.start, s.stop) for s in box_of(lungs)]).T
        low, high = reach(ct.affine, first - 1, beyond)
        low, high = np.floor(low) - BEYOND_MM, np.ceil(high) + BEYOND_MM
        affine, shape = np.eye(4), tuple(int(n) for n in high - low + 1)
        affine[:3, 3] = low
        margin = np.ceil(BEYOND_MM / ct.spacing).astype(int) + 2
        start, stop = np.maximum(first - margin, 0), np.minimum(beyond + margin, ct.shape)

        def on_grid(values: np.ndarray, **how) -> np.ndarray:
            # one voxel order and one rounding, so that the same scan stored in another order gives the same positions
            part = values[tuple(slice(*ends) for ends in zip(start, stop, strict=True))]
            ras = to_ras(CT(part, shifted(ct.affine, start)))
            return sample(ras.array, np.round(ras.affine, 6), shape, affine, **how)

        lobes = on_grid(whole.astype(np.uint8, copy=False), order=0, outside=0)
        occupied = np.zeros(shape, bool)
        if avoid is not None:
            occupied = on_grid(avoid.astype(bool, copy=False), order=0, outside=0)
            if occupied.any():  # no edge must reach it either; sampling loses half a voxel of each grid
                near = edge_mm(ct) + (1 + voxel_mm(ct)) / 2
                around = box_of(occupied, int(near.max()) + 1)
                occupied[around] = grown(occupied[around], near)
        return cls(ct, affine, on_grid(ct.array), lobes, LungMap(lobes), occupied)

    def untouched(self) -> LungSpace:
        """The same lungs to place into, from what is taken now on."""
        return replace(self, occupied=self.occupied.copy(), report=PlacementReport(), sources=[])

    def take(self, mask: np.ndarray, centre: np.ndarray) -> None:
        """Mark a lesion, its middle at the voxel `centre`, as occupied, with all about it where another would come too near:
        their feathers would meet, or the edge of one reach the other's voxels, which lie up to half of one beyond its mask."""
        apart = np.maximum(2 * FEATHERED_MM, edge_mm(self.ct) + voxel_mm(self.ct) / 2)
        pad = int(np.ceil(apart.max())) + 1
        near = grown(np.pad(mask, pad), apart)
        inside, own = overlap(centre - np.array(mask.shape) // 2 - pad, near.shape, self.hu.shape)
        self.occupied[inside] |= near[own]
