"""Lungs and lobes of a CT: from the user's label map, else TotalSegmentator if installed, else a threshold.

All return labels on the CT's own grid: TotalSegmentator's lobe numbers (`label_maps.LOBE_NAMES`) if lobes are known,
else 1 for lung; 0 outside. Whatever the source, the result must look like lung on this CT and match the CT's own lungs
(`label_maps`), so a map of another patient or orientation is refused.
"""

import contextlib
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from hrldm.ct.geometry import head_foot, reach, resample, sample, shifted, to_world
from hrldm.ct.label_maps import check_map, read_map
from hrldm.ct.volume import CT, write_nifti

logger = logging.getLogger(__name__)
TISSUE_HU = -400.0  # lung and air below, tissue above
GRID_MM, CHECK_MM = 2.0, 4.0  # the threshold method works on this grid; to check a map, a coarser one does
CLOSING_MM = 8.0  # fills in vessels and pleural nodules up to about twice this size
LEAST_ML = 400.0  # of a whole lung; less is warned of
SOME_ML = 50.0  # anything smaller is the trachea
CUT_MM2 = 400.0  # of lung in an outer face of the image: the scan cuts it
SMALLER_LUNG = 0.15  # of the larger lung: smaller pieces are bowel gas or the trachea
LUNG_HU = -950.0  # a lower mean is air
LUNG_MEAN_HU = (-980.0, -450.0)  # plausible mean inside a lung mask, vessels included
ROI = tuple(f"lung_{part}_lobe_{side}" for part, side in (
    ("upper", "left"), ("lower", "left"), ("upper", "right"), ("middle", "right"), ("lower", "right")))  # fmt: skip


def lung_labels(ct: CT, path: str | Path | None = None) -> tuple[np.ndarray, str]:
    """Labels (X, Y, Z) uint8 on the CT's grid, and their source: the map's file name (or TotalSegmentator) with its
    lobe numbering, or "threshold".

    Args:
        path: label map or mask of this CT (an image file, any grid in the same world space; labels of TotalSegmentator,
            version 1 or 2, MAISI or VISTA3D); None segments the CT, by threshold if TotalSegmentator is missing or fails

    Raises:
        ValueError: no lungs in the scan, or a map of another CT; the message says what to do.
    """
    if path is not None:
        labels, numbers = _from_map(ct, path)
        return labels, Path(path).name + numbers
    if shutil.which("TotalSegmentator"):
        try:
            with total_segmentator(ct) as file:
                labels, numbers = _from_map(ct, file)
                return labels, "TotalSegmentator" + numbers
        except (ValueError, OSError) as error:
            logger.warning("%s: lungs by threshold, which tells no lobes, for %s", ct.source or "CT", error)
    labels = threshold_lungs(ct).view(np.uint8)
    _check_lung(ct, labels, "threshold")
    return labels, "threshold"


def _from_map(ct: CT, file: str | Path) -> tuple[np.ndarray, str]:
    """Checked labels (X, Y, Z) of a map, and the numbering found, in words."""
    try:
        own, affine = _own_lungs(ct, CHECK_MM)
    except ValueError:  # a scan cropped so that the lungs join the air outside: all dark voxels
        own, affine = resample(ct.array, ct.affine, CHECK_MM)
        own = own < TISSUE_HU
    labels, numbering = read_map(file, ct, own, affine)
    _check_lung(ct, labels, str(file))
    check_map(file, ct, labels, own, affine)
    return labels, f" ({numbering} numbers)" if numbering else ""


def threshold_lungs(ct: CT) -> np.ndarray:
    """Lungs (X, Y, Z) bool by threshold and closing: large dark regions not connected to the air around the patient.

    Raises:
        ValueError: no region of at least `LEAST_ML` ml, and none of `SOME_ML` with the density of lung.
    """
    closed, affine = _own_lungs(ct, GRID_MM, alone=True)
    box = ndimage.find_objects(closed.view(np.uint8))[0]
    ends = [s.start - 1 for s in box], [s.stop for s in box]
    first, last = reach(np.linalg.inv(ct.affine) @ affine, *ends)
    low, high = np.maximum(np.floor(first), 0).astype(int), np.minimum(np.ceil(last).astype(int) + 1, ct.shape)
    lungs = np.zeros(ct.shape, bool)
    here = lungs[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    here[:] = sample(closed, affine, here.shape, shifted(ct.affine, low), outside=0) > 0.5
    return lungs


def depth_mm(inside: np.ndarray) -> np.ndarray:
    """Distance (x, y, z) float32 of each inside voxel to the nearest outside one; as scipy's, three times as fast."""
    outside = sitk.GetImageFromArray((~inside).astype(np.uint8))
    distance = sitk.SignedMaurerDistanceMap(outside, insideIsPositive=False, squaredDistance=False)
    return sitk.GetArrayFromImage(distance).clip(0)


def _own_lungs(ct: CT, grid_mm: float, alone: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`threshold_lungs` on a grid of `grid_mm` along the CT's axes, and its affine. alone: no lung map is given."""
    hu, affine = resample(ct.array, ct.affine, grid_mm)
    regions, n = ndimage.label(hu < TISSUE_HU)
    # the air around the patient reaches the sides; at head and foot, a scan may cut the lungs
    across = np.moveaxis(regions, head_foot(affine), -1)
    at_edge = np.union1d(across[[0, -1]], across[:, [0, -1]])
    at_edge = at_edge[at_edge > 0]
    ml = np.bincount(regions.ravel(), minlength=n + 1) * grid_mm**3 / 1000
    inside = ml.copy()
    inside[[0, *at_edge]] = 0
    found = inside.max()
    if found < LEAST_ML:  # few slices, or lungs cut by the sides of the image: what is no gas
        some = [k for k in np.flatnonzero(ml >= SOME_ML) if k and np.median(hu[regions == k]) > LUNG_HU]
        inside = np.where(np.isin(np.arange(n + 1), some), ml, 0)
        if not some:
            raise ValueError(
                f"{ct.source or 'CT'}: no lungs found (the largest dark region inside the body has {found:.0f} ml, a lung at "
                f"least {LEAST_ML:.0f}); give a chest CT, or its lung mask"
            )
    largest = inside.max()
    lungs = (inside >= SMALLER_LUNG * largest)[regions]
    if alone:  # the edge of the image may cut the other lung, which then cannot be told from the air around the patient
        span = to_world(affine, np.argwhere(lungs))[:, 0]
        for k in at_edge[ml[at_edge] >= SMALLER_LUNG * lungs.sum() * grid_mm**3 / 1000]:
            region = np.argwhere(regions == k)
            beside = not span.min() < to_world(affine, region.mean(0))[0] < span.max()  # a mattress lies below
            if beside and (mean := float(hu[tuple(region.T)].mean())) > LUNG_HU:
                logger.warning(
                    "%s: %.0f ml of the density of lung (mean %.0f HU) are cut by the edge of the image and not taken for "
                    "lung; give a lung mask to have nodules there", ct.source or "CT", ml[k], mean,
                )  # fmt: skip
    box, margin = ndimage.find_objects(lungs.view(np.uint8))[0], int(np.ceil(CLOSING_MM / grid_mm)) + 1
    padded = np.pad(lungs[box], margin)
    grown = depth_mm(~padded) * grid_mm <= CLOSING_MM
    closed = depth_mm(grown) * grid_mm > CLOSING_MM
    lungs[box] = ndimage.binary_fill_holes(closed | padded)[(slice(margin, -margin),) * 3]
    return lungs, affine


@contextlib.contextmanager
def total_segmentator(ct: CT) -> Iterator[Path]:
    """Segment the five lobes with the user's own TotalSegmentator (its weights have their own licence).

    Raises:
        ValueError: it failed; the message includes its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="hrldm-lobes-") as folder:
        image, out = Path(folder) / "ct.nii.gz", Path(folder) / "lobes.nii.gz"
        write_nifti(image, ct.stored, ct)
        command = ["TotalSegmentator", "-i", str(image), "-o", str(out), "--ml", "--roi_subset", *ROI]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not out.exists():
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise ValueError(f"TotalSegmentator failed ({said}); run it yourself and give its map, or a lung mask")
        yield out


def _check_lung(ct: CT, labels: np.ndarray, source: str) -> None:
    """Raise ValueError for labels that cannot be the lungs of this CT; warn where they are few, or cut."""
    step = np.maximum(1, GRID_MM // ct.spacing).astype(int)
    every = tuple(slice(None, None, n) for n in step)
    inside = labels[every] > 0
    ml = float(inside.sum()) * float(np.prod(ct.spacing * step)) / 1000
    mean = float(np.clip(ct.array[every][inside], -1024, 400).mean()) if inside.any() else 0.0
    low, high = LUNG_MEAN_HU
    if ml < SOME_ML or not low <= mean <= high:
        raise ValueError(
            f"{source}: not the lungs of {ct.source or 'this CT'} ({ml:.0f} ml with a mean of {mean:.0f} HU; lungs have at "
            f"least {SOME_ML:.0f} ml and {low:.0f}..{high:.0f} HU); give the mask of this scan"
        )
    if ml < LEAST_ML:
        logger.warning("%s: %.0f ml of lung, a whole lung has %.0f or more", ct.source or "CT", ml, LEAST_ML)
    if cut := ", ".join(_cut(ct, labels)):
        logger.warning("%s: the scan cuts the lungs (%s); nodules come into what is there", ct.source or "CT", cut)


def _cut(ct: CT, labels: np.ndarray) -> Iterator[str]:
    """The sides of the image that the lungs reach."""
    sides = {"R": ("left", "right"), "A": ("back", "front"), "S": ("foot", "head")}
    sides |= {opposite: names[::-1] for opposite, names in zip("LPI", sides.values(), strict=True)}
    for axis, towards in enumerate(nib.aff2axcodes(ct.affine)):
        area = float(np.prod(np.delete(ct.spacing, axis)))
        for end, name in zip((0, -1), sides[towards], strict=True):
            if np.count_nonzero(labels.take(end, axis)) * area > CUT_MM2:
                yield name
