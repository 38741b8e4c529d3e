"""Read one DICOM CT series (folder, zip, or the series of one file) as HU voxels and a RAS-mm affine.

pydicom reads the headers, which decide everything, and plain pixels; SimpleITK (GDCM) decodes compressed ones. Notation: r,
c = direction cosines along a row and along a column (ImageOrientationPatient), n = r × c the slice normal, p_k =
ImagePositionPatient of slice k, all in LPS mm. Slices are sorted by n·p_k; the array index is (column, row, slice), so the
LPS affine has the columns r·Δcolumn, c·Δrow, (p_last − p_0)/(N − 1), and diag(−1, −1, 1, 1) converts it to RAS. A series
that is not a straight, evenly spaced, complete stack is refused: guessing would put the nodule in the wrong place.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from hrldm.ct.dicom_headers import (
    Slice,
    check_headers,
    in_plane,
    load,
    number,
    one_series,
    read_headers,
    stored_range,
)
from hrldm.ct.geometry import LPS_TO_RAS
from hrldm.ct.zipped import is_zip, unpacked

logger = logging.getLogger(__name__)
_KEPT = ("SeriesInstanceUID", "Manufacturer", "ConvolutionKernel", "KVP", "SliceThickness")  # no patient data
MAX_TILT_DEG = 0.5
MAX_UNEVEN = 0.1  # of the median slice step
SAME_MM = 0.01  # slices nearer than this lie at one place


@dataclass(frozen=True)
class Levels:
    """The HU that a series can store: base + step·k for integers k in low..high, or, if the slices' rescales differ
    (step 0), any HU in low..high."""

    base: float
    step: float
    low: float
    high: float

    def nearest(self, hu: np.ndarray) -> np.ndarray:
        """`hu` (any shape) rounded to the nearest storable HU, clipped at the limits, as scanners clip air."""
        if not self.step:
            return np.clip(hu, self.low, self.high)
        return self.base + self.step * np.clip(np.rint((hu - self.base) / self.step), self.low, self.high)


def read_series(
    path: str | Path, series_uid: str | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, str], Levels]:
    """HU voxels of the one CT series under `path`.

    Args:
        path:        folder (searched recursively) or zip of a DICOM series, or one file of it (then its folder alone)
        series_uid:  which, needed if there are several, see `one_series`

    Returns:
        array (X, Y, Z) of HU, int16 if lossless, else float32; affine (4, 4) to RAS mm; provenance; the HU that the
        series can store.

    Raises:
        ValueError: no DICOM, not CT, several series or acquisitions, geometry or rescale missing, slices missing,
            duplicated, unevenly spaced or of unequal shape, gantry tilt, pixels that cannot be decoded.
    """
    with opened(Path(path), series_uid) as slices:
        affine, array = _affine(slices), _pixels(slices)
    first = slices[0][1]
    provenance = {"format": "dicom", "n_slices": str(len(slices))}
    provenance |= {tag: str(first[tag].value) for tag in _KEPT if tag in first}
    return array, affine, provenance, _levels([header for _, header in slices])


def _levels(headers: list[pydicom.Dataset]) -> Levels:
    """The HU that all slices can store."""
    found = {(float(h.RescaleIntercept), float(h.RescaleSlope), *stored_range(h)) for h in headers}
    if len(found) == 1:
        return Levels(*found.pop())
    return Levels(0, 0, max(b + s * low for b, s, low, _ in found), min(b + s * high for b, s, _, high in found))


@contextlib.contextmanager
def opened(path: Path, series_uid: str | None = None) -> Iterator[list[Slice]]:
    """(file, header) of the one CT series in a folder or zip, or of one file, checked, and sorted along its normal.

    Every ValueError, of the block too, gets `path` in front.
    """
    try:
        alone = path.is_file()
        zipped = alone and is_zip(path)
        with unpacked(path) if zipped else contextlib.nullcontext(path.parent if alone else path) as folder:
            found = read_headers(folder, "*" if alone and not zipped else "**/*")
            slices = one_series(found, path, series_uid)
            check_headers(slices)
            normal = _normal(slices[0][1])
            slices.sort(key=lambda s: float(normal @ np.array(s[1].ImagePositionPatient, float)))
            yield _without_copies(slices, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _without_copies(slices: list[Slice], path: Path) -> list[Slice]:
    """Sorted slices without those that hold, at one place, the same pixels as the slice before them."""
    normal = _normal(slices[0][1])
    along = np.array([normal @ np.array(header.ImagePositionPatient, float) for _, header in slices])
    again = [k for k in np.flatnonzero(np.diff(along) < SAME_MM) + 1 if _alike(slices[k - 1], slices[k])]
    if again:
        first = slices[again[0]][0].name
        logger.warning(
            "%s: %d slice(s) there twice, pixel by pixel, first %s; the copies are left out", path, len(again), first
        )
    return [pair for k, pair in enumerate(slices) if k not in again]


def _alike(a: Slice, b: Slice) -> bool:
    return np.array_equal(*_pixels([a, b]).transpose(2, 0, 1))


def _normal(header: pydicom.Dataset) -> np.ndarray:
    """(3,) slice normal in LPS."""
    cosines = in_plane(header)[1]
    return np.cross(cosines[:3], cosines[3:])


def _affine(slices: list[Slice]) -> np.ndarray:
    """RAS-mm affine (4, 4) of (column, row, slice) of an evenly spaced, straight, complete stack."""
    header = slices[0][1]
    _, cosines, (row_mm, column_mm) = in_plane(header)
    normal = _normal(header)
    positions = np.array([h.ImagePositionPatient for _, h in slices], float)  # (N, 3)
    if len(slices) == 1:
        thickness = number(header, "SpacingBetweenSlices") or number(header, "SliceThickness")
        if not thickness:
            raise ValueError("one slice without SliceThickness; give the whole series")
        step = normal * abs(thickness)
    else:
        names = [file.name for file, _ in slices]
        _check_steps(positions @ normal, names)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
        tilt = max(tilt, abs(number(header, "GantryDetectorTilt")))
        if tilt > MAX_TILT_DEG:
            raise ValueError(f"gantry tilt of {tilt:.1f}° shears the slices; straighten it (dcm2niix), give the NIfTI")
        astray = positions - positions[0] - np.arange(len(slices))[:, None] * step  # (N, 3)
        astray = np.linalg.norm(astray - np.outer(astray @ normal, normal), axis=1)  # in-plane part, mm
        if (most := astray.max()) > max(row_mm, column_mm):
            name = names[int(astray.argmax())]
            raise ValueError(f"{name} is shifted {most:.1f} mm in plane; keep the slices of one acquisition")
    lps = np.eye(4)
    lps[:3] = np.column_stack([cosines[:3] * column_mm, cosines[3:] * row_mm, step, positions[0]])
    return LPS_TO_RAS @ lps


def _check_steps(along: np.ndarray, names: list[str]) -> None:
    """Refuse duplicate, missing and unevenly spaced slices; `along` (N,) are sorted positions in mm."""
    steps = np.diff(along)
    typical = float(np.median(steps))
    doubled = np.flatnonzero(steps < max(SAME_MM, 0.1 * typical))
    if doubled.size:
        pair = f"{names[doubled[0]]} and {names[doubled[0] + 1]}"
        raise ValueError(
            f"{doubled.size} slice position(s) twice with other pixels, first {pair}; remove one of each, or keep one acquisition"
        )
    holes = np.flatnonzero(steps > 1.5 * typical)
    if holes.size:
        k, lost = holes[0], int(np.rint(steps[holes] / typical - 1).sum())
        raise ValueError(
            f"{lost} slice(s) missing, first between {names[k]} and {names[k + 1]} "
            f"({steps[k]:.2f} mm where others are {typical:.2f} mm apart); fetch the series again"
        )
    k = int(np.abs(steps - typical).argmax())
    if abs(steps[k] - typical) > MAX_UNEVEN * typical:
        where = f"{steps[k]:.2f} mm at {names[k]}, {typical:.2f} mm elsewhere"
        raise ValueError(f"uneven slice spacing ({where}); resample it to even slices first")
    drift = np.abs(along - np.linspace(along[0], along[-1], len(along)))  # small differences add up
    k = int(drift.argmax())
    if drift[k] > 0.5 * typical:
        where = f"{names[k]} lies {drift[k]:.2f} mm from its place in an even stack"
        raise ValueError(f"uneven slice spacing ({where}); resample it to even slices first")


def _pixels(slices: list[Slice]) -> np.ndarray:
    """HU (X, Y, Z), each slice with its own rescale; int16 if lossless, else float32."""
    planes, last = [], (None, None)
    for file, header in slices:
        try:
            if file != last[0]:  # the frames of a file come one after the other
                last = file, _decoded(file, header)
            plane = last[1][getattr(header, "frame", 0)]
            if plane.shape != (header.Rows, header.Columns):
                raise ValueError(f"{plane.shape} pixels where its header says {(header.Rows, header.Columns)}")
            planes.append(_as_hu(plane, header))
        except Exception as error:  # SimpleITK's RuntimeError, and many kinds from pydicom
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"pixels of {file.name} cannot be decoded ({reason}); fetch the file again") from error
    return np.ascontiguousarray(np.stack(planes).transpose(2, 1, 0))  # (Z, Y, X) -> (X, Y, Z)


def _decoded(file: Path, header: pydicom.Dataset) -> np.ndarray:
    """All frames (n, Y, X) of one file: stored values, of a compressed file HU; any kind of exception if that fails."""
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))
    data = load(file)
    size, each = (header.Rows, header.Columns), header.BitsAllocated // 8
    surplus = len(data.PixelData) - int(np.prod(size)) * each * int(data.get("NumberOfFrames") or 1)
    if not 0 <= surplus < min(size) * each:  # padding at the end is harmless
        raise ValueError(f"{len(data.PixelData)} bytes for pixels of {header.BitsAllocated} bits")
    return data.pixel_array.reshape(-1, *size)


def _as_hu(plane: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    """A plane of `_decoded` in HU, int16 if lossless, else float32."""
    hu = plane
    if not header.file_meta.TransferSyntaxUID.is_encapsulated:
        hu = plane * float(header.RescaleSlope) + float(header.RescaleIntercept)
    limits = np.iinfo(np.int16)
    whole = limits.min <= hu.min() and hu.max() <= limits.max and (hu.dtype.kind in "iu" or (hu == np.rint(hu)).all())
    return hu.astype(np.int16 if whole else np.float32)
