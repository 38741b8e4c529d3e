"""One DICOM CT series (a folder or a zip of it) to HU voxels and a RAS-mm affine.

pydicom reads the headers, which decide everything; SimpleITK (GDCM) decodes the pixels, compressed or not, and applies
each slice's rescale. Notation: r, c = direction cosines along a row and along a column (ImageOrientationPatient),
n = r × c the slice normal, p_k = ImagePositionPatient of slice k, all in LPS mm. Slices are sorted by n·p_k; the array
index is (column, row, slice), so the LPS affine has the columns r·Δcolumn, c·Δrow, (p_last − p_0)/(N − 1), and
diag(−1, −1, 1, 1) takes it to RAS. A series that is not a straight, evenly spaced, complete stack is refused: guessing
would put the nodule in the wrong place.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

logger = logging.getLogger(__name__)
_NEEDED = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
}  # numbers
_TAGS = ("SeriesInstanceUID", "Modality", "ImageType", "SeriesDescription", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
         "GantryDetectorTilt", "SliceThickness", "SpacingBetweenSlices", "Manufacturer", "ConvolutionKernel", "KVP")  # fmt: skip
_KEPT = ("SeriesInstanceUID", "Manufacturer", "ConvolutionKernel", "KVP", "SliceThickness")  # no patient data
MAX_TILT_DEG = 0.5
MAX_UNEVEN = 0.1  # of the median slice step


def read_series(path: str | Path, series_uid: str | None = None) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """HU voxels of the one CT series under `path`.

    Args:
        path:        folder (searched through) or zip of a DICOM series
        series_uid:  which SeriesInstanceUID, needed when there are several

    Returns:
        array (X, Y, Z) of HU, int16 where it fits without loss, else float32; affine (4, 4) to RAS mm; provenance.

    Raises:
        ValueError: no DICOM, not CT, several series, multi-frame, geometry or rescale missing, slices missing, doubled,
            uneven or of unequal shape, gantry tilt, pixels that cannot be decoded.
    """
    path = Path(path)
    with opened(path) as folder:
        slices = sorted_slices(folder, path, series_uid)
        affine = _affine(slices, path)
        array = _pixels(slices, path)
    first = slices[0][1]
    provenance = {"format": "dicom", "n_slices": str(len(slices))}
    return array, affine, provenance | {tag: str(first[tag].value) for tag in _KEPT if tag in first}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder itself, or the zip unpacked to a temporary folder."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hrldm-dicom-") as tmp:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(tmp)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:  # RuntimeError: encrypted
            raise ValueError(
                f"{path}: cannot be unpacked ({error}); give an intact zip without password, or the folder"
            ) from error
        yield Path(tmp)


def sorted_slices(folder: Path, path: Path, series_uid: str | None = None) -> list[tuple[Path, pydicom.Dataset]]:
    """(file, header) of the one CT series under `folder`, along its slice normal, checked; `path` is named in errors."""
    return _sorted(_one_series(_headers(folder, path), path, series_uid), path)


def _headers(folder: Path, path: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """(file, header) of every DICOM file under `folder`; other files are passed over."""
    found = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "DICOMDIR"):
        with contextlib.suppress(InvalidDicomError, EOFError):
            found.append((file, pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS, *_NEEDED])))
    if not found:
        raise ValueError(
            f"{path}: no DICOM file in it; give the folder or zip of one CT series, or a .nii/.nii.gz file"
        )
    return found


def _one_series(found: list, path: Path, series_uid: str | None) -> list[tuple[Path, pydicom.Dataset]]:
    """The slices of the only CT series, or of `series_uid`; scouts and other modalities are left out."""
    usable = [(f, d) for f, d in found if d.get("Modality") == "CT" and "LOCALIZER" not in (d.get("ImageType") or [])]
    if not usable:
        modalities = sorted({str(d.get("Modality", "none")) for _, d in found})
        raise ValueError(f"{path}: not a CT (modality {', '.join(modalities)}, or scouts only); give a CT series")
    if len(usable) < len(found):
        logger.info("%s: %d file(s) that are no CT slices left out", path, len(found) - len(usable))
    series: dict[str, list] = {}
    for file, header in usable:
        series.setdefault(str(header.get("SeriesInstanceUID")), []).append((file, header))
    if series_uid is None and len(series) > 1:
        listing = "; ".join(
            f"{u} ({len(s)} slices, {s[0][1].get('SeriesDescription', 'no name')})" for u, s in series.items()
        )
        raise ValueError(
            f"{path}: {len(series)} series in one folder: {listing}. Choose one with series_uid=…, or separate them"
        )
    if series_uid is not None and series_uid not in series:
        raise ValueError(f"{path}: no CT series {series_uid}; there is {', '.join(series)}")
    return series[series_uid or next(iter(series))]


def _sorted(slices: list, path: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """Slices along n·p, after the checks of single headers and of their agreement."""
    for file, header in slices:
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{path}: {file.name} is a multi-frame file; convert it to NIfTI first (dcm2niix)")
        missing = [tag for tag, n in _NEEDED.items() if not _has_numbers(header, tag, n)]
        if missing:
            raise ValueError(
                f"{path}: {file.name} lacks a usable {', '.join(missing)}; export the original series again"
            )
        if header.get("RescaleSlope") is None or header.get("RescaleIntercept") is None:
            raise ValueError(
                f"{path}: {file.name} lacks RescaleSlope or RescaleIntercept, so its values are not HU; export the original series again"
            )
    shape, cosines, spacing = (_in_plane(slices[0][1])[i] for i in range(3))
    for file, header in slices[1:]:
        other = _in_plane(header)
        if (
            other[0] != shape
            or not np.allclose(other[1], cosines, atol=1e-3)
            or not np.allclose(other[2], spacing, atol=1e-3)
        ):
            raise ValueError(
                f"{path}: {file.name} differs from {slices[0][0].name} in size, orientation or pixel spacing; keep the slices of one stack"
            )
    normal = np.cross(cosines[:3], cosines[3:])
    return sorted(slices, key=lambda s: float(normal @ np.array(s[1].ImagePositionPatient, float)))


def _has_numbers(header: pydicom.Dataset, tag: str, n: int) -> bool:
    """Whether `tag` holds `n` finite numbers; direction cosines must be of unit length too."""
    try:
        values = np.atleast_1d(np.array(header.get(tag), float))
    except (TypeError, ValueError):
        return False
    if values.shape != (n,) or not np.isfinite(values).all():
        return False
    return tag != "ImageOrientationPatient" or np.allclose(np.linalg.norm(values.reshape(2, 3), axis=1), 1, atol=1e-2)


def _in_plane(header: pydicom.Dataset) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """((rows, columns), six direction cosines, (row, column) spacing in mm)."""
    cosines, spacing = np.array(header.ImageOrientationPatient, float), np.array(header.PixelSpacing, float)
    return (header.Rows, header.Columns), cosines, spacing


def _affine(slices: list, path: Path) -> np.ndarray:
    """RAS-mm affine (4, 4) of (column, row, slice) of an evenly spaced, straight, complete stack."""
    header = slices[0][1]
    _, cosines, (row_mm, column_mm) = _in_plane(header)
    normal = np.cross(cosines[:3], cosines[3:])
    positions = np.array([h.ImagePositionPatient for _, h in slices], float)  # (N, 3)
    if len(slices) == 1:
        thickness = header.get("SpacingBetweenSlices") or header.get("SliceThickness")
        if not thickness:
            raise ValueError(f"{path}: one slice without SliceThickness; give the whole series")
        step = normal * abs(float(thickness))
    else:
        _check_steps(positions @ normal, [f.name for f, _ in slices], path)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
        tilt = max(tilt, abs(float(header.get("GantryDetectorTilt") or 0)))
        if tilt > MAX_TILT_DEG:
            raise ValueError(
                f"{path}: gantry tilt of {tilt:.1f}°, the slices are sheared; straighten it first (dcm2niix does) and give the NIfTI"
            )
        astray = positions - positions[0] - np.arange(len(slices))[:, None] * step  # (N, 3)
        astray = np.linalg.norm(astray - np.outer(astray @ normal, normal), axis=1)  # in-plane part, mm
        if astray.max() > max(row_mm, column_mm):
            name = slices[int(astray.argmax())][0].name
            raise ValueError(
                f"{path}: {name} is shifted {astray.max():.1f} mm in plane; keep the slices of one acquisition"
            )
    lps = np.eye(4)
    lps[:3] = np.column_stack([cosines[:3] * column_mm, cosines[3:] * row_mm, step, positions[0]])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _check_steps(along: np.ndarray, names: list[str], path: Path) -> None:
    """Refuse doubled, missing and unevenly spaced slices; `along` (N,) are sorted positions in mm."""
    steps = np.diff(along)
    typical = float(np.median(steps))
    doubled = np.flatnonzero(steps < max(0.01, 0.1 * typical))
    if doubled.size:
        k = doubled[0]
        raise ValueError(
            f"{path}: {doubled.size} slice position(s) twice, first {names[k]} and {names[k + 1]}; remove the duplicates"
        )
    holes = np.flatnonzero(steps > 1.5 * typical)
    if holes.size:
        k, lost = holes[0], int(np.rint(steps[holes] / typical - 1).sum())
        raise ValueError(
            f"{path}: {lost} slice(s) missing, first between {names[k]} and {names[k + 1]} "
            f"({steps[k]:.2f} mm where others are {typical:.2f} mm apart); fetch the series again"
        )
    k = int(np.abs(steps - typical).argmax())
    if abs(steps[k] - typical) > MAX_UNEVEN * typical:
        raise ValueError(
            f"{path}: uneven slice spacing ({steps[k]:.2f} mm at {names[k]}, {typical:.2f} mm elsewhere); resample it to even slices first"
        )


def _pixels(slices: list, path: Path) -> np.ndarray:
    """HU (X, Y, Z), slice by slice with its own rescale; int16 where it fits without loss, else float32."""
    planes = []
    for file, _ in slices:
        try:
            planes.append(sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))[0])  # (Y, X)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path}: pixels of {file.name} cannot be decoded ({reason}); fetch the file again"
            ) from error
    volume = np.stack(planes, axis=-1).transpose(1, 0, 2)  # (Y, X, Z) -> (X, Y, Z)
    whole = volume.dtype.kind in "iu" or bool((volume == np.rint(volume)).all())
    fits = volume.min() >= np.iinfo(np.int16).min and volume.max() <= np.iinfo(np.int16).max
    return np.ascontiguousarray(volume, dtype=np.int16 if whole and fits else np.float32)
