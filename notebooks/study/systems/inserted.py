"""What `insert` ships: a generated lesion made part of its scan (`hrldm.insertion.finish`), here of the crop itself."""

from collections.abc import Sequence

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import sample, shifted
from hrldm.ct.volume import CT
from hrldm.insertion.finish import AVERAGED, finished
from hrldm.insertion.generator import Request

AROUND = 40  # voxels of the scan about what a lesion reaches, enough for its crop


def in_scans(
    request: Request,
    generated: np.ndarray,
    scans: Sequence[CT],
    affines: Sequence[np.ndarray],
    drawn: bool = False,
    **how: bool,
) -> np.ndarray:
    """Crops (N, D, D, D) float32 HU at 1 mm, read from the scans into which the lesions are put, each alone.

    generated: (N, D, D, D) HU at 1 mm, as the request asks
    affines:   (4, 4) of each crop
    drawn:     histograms are of the library, see `finished` and `insert`
    how:       `matching` and `grain` of `finished`
    """
    out = np.empty(generated.shape, np.float32)
    for i, (scan, affine) in enumerate(zip(scans, affines, strict=True)):
        asked = (request.mask[i], affine, request.histogram[i], int(request.seeds[i]))
        averaged = drawn and SUBTYPES[request.subtype[i]] in AVERAGED
        lesion = finished(scan, generated[i], *asked, drawn=averaged, **how)
        box = tuple(slice(max(0, s.start - AROUND), s.stop + AROUND) for s in lesion.box)
        part, low = scan.array[box].copy(), [s.start for s in box]
        part[tuple(slice(s.start - n, s.stop - n) for s, n in zip(lesion.box, low, strict=True))] = lesion.stored
        out[i] = sample(part, shifted(scan.affine, low), generated[i].shape, affine)
    return out


def in_crops(request: Request, generated: np.ndarray, **how: bool) -> np.ndarray:
    """`in_scans` with each background as its own scan of 1 mm."""
    grid = np.eye(4)
    return in_scans(request, generated, [CT(hu, grid) for hu in request.background], [grid] * len(request), **how)


def edged(request: Request, generated: np.ndarray) -> np.ndarray:
    """Crops (N, D, D, D) float32 HU: each lesion as generated, voxel by voxel, in the requested place, with the edge about
    it that `insert` would give it there. So systems differ inside the mask, and by what its blurred edge carries out."""
    return np.where(request.mask, generated, in_crops(request, generated, matching=False, grain=False))
