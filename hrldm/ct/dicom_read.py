"""Read one DICOM CT series (folder or zip) as HU voxels and a RAS-mm affine.

pydicom reads the headers, which decide everything; SimpleITK (GDCM) decodes the pixels, compressed or not, and applies
each slice's rescale. Notation: r, c = direction cosines along a row and along a column (ImageOrientationPatient),
n = r × c the slice normal, p_k = ImagePositionPatient of slice k, all in LPS mm. Slices are sorted by n·p_k; the array
index is (column, row, slice), so the LPS affine has the columns r·Δcolumn, c·Δrow, (p_last − p_0)/(N − 1), and
diag(−1, −1, 1, 1) converts it to RAS. A series that is not a straight, evenly spaced, complete stack is refused:
guessing would put the nodule in the wrong place.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from hrldm.ct.dicom_headers import Slice, check_headers, in_plane, number, one_series, read_headers, stored_range

_KEPT = ("SeriesInstanceUID", "Manufacturer", "ConvolutionKernel", "KVP", "SliceThickness")  # no patient data
MAX_TILT_DEG = 0.5
MAX_UNEVEN = 0.1  # of the median slice step


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
        path:        folder (searched recursively) or zip of a DICOM series
        series_uid:  which SeriesInstanceUID, needed if there are several

    Returns:
        array (X, Y, Z) of HU, int16 if lossless, else float32; affine (4, 4) to RAS mm; provenance; the HU that the
        series can store.

    Raises:
        ValueError: no DICOM, not CT, several series, multi-frame, geometry or rescale missing, slices missing,
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
    """(file, header) of the one CT series in a folder or zip, checked, and sorted along its normal.

    Every ValueError, of the block too, gets `path` in front.
    """
    try:
        with contextlib.nullcontext(path) if path.is_dir() else _unpacked(path) as folder:
            slices = one_series(read_headers(folder), path, series_uid)
            check_headers(slices)
            normal = _normal(slices[0][1])
            yield sorted(slices, key=lambda s: float(normal @ np.array(s[1].ImagePositionPatient, float)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The zip unpacked to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="hrldm-dicom-") as tmp:
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                # the end record, whose file count zipfile reads but does not check
                archive.fp.seek(-22 - len(archive.comment), 2)
                count = int.from_bytes(archive.fp.read(12)[10:], "little")
                if len(set(names)) < len(names) or count not in (len(names), 0xFFFF):  # 0xFFFF: zip64
                    raise zipfile.BadZipFile(f"its list of files is damaged: {len(set(names))} names of {count} files")
                archive.extractall(tmp)
        except Exception as error:  # zipfile raises many kinds: damaged, encrypted, unknown method
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                said = f"{path}: no room to unpack it in {tmp}; set TMPDIR to a larger disk"
                raise OSError(error.errno, said) from error
            raise ValueError(
                f"cannot be unpacked ({error}); give an intact zip without password, or the folder"
            ) from error
        yield Path(tmp)


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
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _check_steps(along: np.ndarray, names: list[str]) -> None:
    """Refuse duplicate, missing and unevenly spaced slices; `along` (N,) are sorted positions in mm."""
    steps = np.diff(along)
    typical = float(np.median(steps))
    doubled = np.flatnonzero(steps < max(0.01, 0.1 * typical))
    if doubled.size:
        pair = f"{names[doubled[0]]} and {names[doubled[0] + 1]}"
        raise ValueError(f"{doubled.size} slice position(s) twice, first {pair}; remove the duplicates")
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
    planes = []
    for file, header in slices:
        try:
            planes.append(_decoded(file, header))
        except Exception as error:  # SimpleITK's RuntimeError, and many kinds from pydicom
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"pixels of {file.name} cannot be decoded ({reason}); fetch the file again") from error
    volume = np.concatenate(planes).transpose(2, 1, 0)  # (Z, Y, X) -> (X, Y, Z)
    whole = volume.dtype.kind in "iu" or bool((volume == np.rint(volume)).all())
    fits = volume.min() >= np.iinfo(np.int16).min and volume.max() <= np.iinfo(np.int16).max
    return np.ascontiguousarray(volume, dtype=np.int16 if whole and fits else np.float32)


def _decoded(file: Path, header: pydicom.Dataset) -> np.ndarray:
    """HU (1, Y, X) of one file; any kind of exception if that fails."""
    size = (header.Rows, header.Columns)
    data = pydicom.dcmread(file, specific_tags=["PixelData"])
    if not data.file_meta.TransferSyntaxUID.is_encapsulated:  # the decoder would not notice another number of pixels
        each = header.BitsAllocated // 8
        surplus = len(data.PixelData) - np.prod(size) * each
        if not 0 <= surplus < min(size) * each:  # padding at the end is harmless
            raise ValueError(f"{len(data.PixelData)} bytes for {size} pixels of {header.BitsAllocated} bits")
    if header.BitsAllocated < 32:
        plane = sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))
    else:  # GDCM reads 16 stored of 32 allocated bits as 16 allocated
        pixels = pydicom.dcmread(file).pixel_array
        plane = pixels[None] * float(header.RescaleSlope) + float(header.RescaleIntercept)
    if plane.shape != (1, *size):
        raise ValueError(f"{plane.shape[1:]} pixels where its header says {size}")
    return plane
