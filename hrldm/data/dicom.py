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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError
from pydicom.uid import MediaStorageDirectoryStorage

logger = logging.getLogger(__name__)
_NEEDED = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
}  # numbers
_TAGS = ("SeriesInstanceUID", "Modality", "ImageType", "SeriesDescription", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
         "GantryDetectorTilt", "SliceThickness", "SpacingBetweenSlices", "Manufacturer", "ConvolutionKernel", "KVP",
         "SamplesPerPixel", "PhotometricInterpretation")  # fmt: skip
_FORMAT = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_POSITIVE = ("PixelSpacing", "Rows", "Columns", "RescaleSlope")
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
                names = archive.namelist()
                archive.fp.seek(
                    -22 - len(archive.comment), 2
                )  # the end record, which zipfile reads but does not compare
                count = int.from_bytes(archive.fp.read(12)[10:], "little")
                if len(set(names)) < len(names) or count not in (len(names), 0xFFFF):  # the last: zip64
                    raise zipfile.BadZipFile(f"its list of files is damaged: {len(set(names))} names of {count} files")
                archive.extractall(tmp)
        except Exception as error:  # zipfile raises many kinds: damaged, encrypted, unknown method
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
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS, *_NEEDED, *_FORMAT])
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                continue
            damage = [t for t in ("Modality", "SeriesInstanceUID") if not header.get(t)]  # every DICOM object has them
            for _ in header:  # decodes the values, so that a damaged one shows here
                pass
        except (InvalidDicomError, EOFError):
            if file.suffix.lower() != ".dcm" or file.name.startswith("."):  # macOS puts ._0001.dcm beside 0001.dcm
                continue
            damage = ["DICOM header"]
        except Exception as error:  # pydicom raises many kinds
            raise ValueError(
                f"{path}: {file.name} has a damaged header ({error}); fetch the file again, or remove it if it is no slice"
            ) from error
        if damage:
            raise ValueError(
                f"{path}: {file.name} has no {', no '.join(damage)}, so it is damaged or cut short; "
                "fetch the file again, or remove it if it is no slice"
            )
        found.append((file, header))
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
    chosen = series_uid or next(iter(series))
    for file, header in found:  # a series has one modality
        if header.get("Modality") != "CT" and str(header.get("SeriesInstanceUID")) == chosen:
            raise ValueError(
                f"{path}: {file.name} is of the CT series but has modality {header.get('Modality')}; fetch it again"
            )
    return series[chosen]


def _sorted(slices: list, path: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """Slices along n·p, after the checks of single headers and of their agreement."""
    for file, header in slices:
        if (header.get("NumberOfFrames") or 1) != 1:
            raise ValueError(f"{path}: {file.name} is a multi-frame file; convert it to NIfTI first (dcm2niix)")
        missing = [tag for tag, n in _NEEDED.items() if not _has_numbers(header, tag, n)]
        if missing:
            raise ValueError(
                f"{path}: {file.name} lacks a usable {', '.join(missing)}; export the original series again"
            )
        if not (_has_numbers(header, "RescaleSlope", 1) and _has_numbers(header, "RescaleIntercept", 1)):
            raise ValueError(
                f"{path}: {file.name} lacks RescaleSlope or RescaleIntercept, so its values are not HU; export the original series again"
            )
        if header.get("PhotometricInterpretation") != "MONOCHROME2" or header.get("SamplesPerPixel") != 1:
            raise ValueError(
                f"{path}: {file.name} has {header.get('PhotometricInterpretation')} pixels of {header.get('SamplesPerPixel')} "
                "samples, not one MONOCHROME2 as a CT; export the original series again"
            )
        bits, stored, high, signed = (header.get(tag) for tag in _FORMAT)
        if bits not in (8, 16, 32) or not 1 <= (stored or 0) <= bits or high != stored - 1 or signed not in (0, 1):
            raise ValueError(
                f"{path}: {file.name} has {', '.join(_FORMAT)} {bits}, {stored}, {high}, {signed}, which is no number format; "
                "fetch the file again"
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
    """Whether `tag` holds `n` finite numbers, sizes above 0 and direction cosines of unit length."""
    try:
        values = np.atleast_1d(np.array(header.get(tag), float))
    except (TypeError, ValueError):
        return False
    if values.shape != (n,) or not np.isfinite(values).all():
        return False
    if tag in _POSITIVE and values.min() <= 0:
        return False
    return tag != "ImageOrientationPatient" or np.allclose(np.linalg.norm(values.reshape(2, 3), axis=1), 1, atol=1e-2)


def _number(header: pydicom.Dataset, tag: str) -> float:
    """The number in `tag`, 0 where there is none."""
    return float(header[tag].value) if _has_numbers(header, tag, 1) else 0.0


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
        thickness = _number(header, "SpacingBetweenSlices") or _number(header, "SliceThickness")
        if not thickness:
            raise ValueError(f"{path}: one slice without SliceThickness; give the whole series")
        step = normal * abs(thickness)
    else:
        _check_steps(positions @ normal, [f.name for f, _ in slices], path)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
        tilt = max(tilt, abs(_number(header, "GantryDetectorTilt")))
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
    drift = np.abs(along - np.linspace(along[0], along[-1], len(along)))  # small differences add up
    if drift.max() > 0.5 * typical:
        k = int(drift.argmax())
        raise ValueError(
            f"{path}: uneven slice spacing, {names[k]} lies {drift[k]:.2f} mm from its place in an even stack; "
            "resample it to even slices first"
        )


def _pixels(slices: list, path: Path) -> np.ndarray:
    """HU (X, Y, Z), slice by slice with its own rescale; int16 where it fits without loss, else float32."""
    planes = []
    rows, columns = _in_plane(slices[0][1])[0]
    for file, header in slices:
        _check_length(file, header, path)
        try:
            planes.append(sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO")))  # (1, Y, X)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path}: pixels of {file.name} cannot be decoded ({reason}); fetch the file again"
            ) from error
        if planes[-1].shape != (1, rows, columns):
            raise ValueError(
                f"{path}: pixels of {file.name} are {planes[-1].shape[1:]} where its header says {(rows, columns)}; fetch the file again"
            )
    volume = np.concatenate(planes).transpose(2, 1, 0)  # (Z, Y, X) -> (X, Y, Z)
    whole = volume.dtype.kind in "iu" or bool((volume == np.rint(volume)).all())
    fits = volume.min() >= np.iinfo(np.int16).min and volume.max() <= np.iinfo(np.int16).max
    return np.ascontiguousarray(volume, dtype=np.int16 if whole and fits else np.float32)


def _check_length(file: Path, header: pydicom.Dataset, path: Path) -> None:
    """Refuse uncompressed pixels that are not as many as the header says: the decoder reads on regardless."""
    try:
        data = pydicom.dcmread(file, specific_tags=["PixelData"])
        if data.file_meta.TransferSyntaxUID.is_encapsulated:
            return
        length = len(data.PixelData)
    except Exception as error:  # pydicom raises many kinds
        raise ValueError(f"{path}: pixels of {file.name} cannot be decoded ({error}); fetch the file again") from error
    each = header.BitsAllocated // 8
    surplus = length - header.Rows * header.Columns * each
    if not 0 <= surplus < min(header.Rows, header.Columns) * each:  # a padded end is no harm
        raise ValueError(
            f"{path}: pixels of {file.name} cannot be decoded ({length} bytes for {header.Rows} × {header.Columns} of "
            f"{header.BitsAllocated} bits); fetch the file again"
        )
