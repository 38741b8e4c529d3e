"""Find the slices of the one CT series in a folder, and check their headers.

Each header is checked on its own, then against the others; `dicom_read` checks the slice positions.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

logger = logging.getLogger(__name__)
# tag: how many numbers it holds
_NEEDED = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}
_TAGS = ("SeriesInstanceUID", "Modality", "ImageType", "SeriesDescription", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
         "GantryDetectorTilt", "SliceThickness", "SpacingBetweenSlices", "Manufacturer", "ConvolutionKernel", "KVP",
         "SamplesPerPixel", "PhotometricInterpretation", "SOPClassUID", "SOPInstanceUID")  # fmt: skip
_CT_STORAGE = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_FORMAT = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_DAMAGED = "{}: {} has no {}, so it is damaged or cut short; fetch the file again, or remove it if it is no slice"
_POSITIVE = ("PixelSpacing", "Rows", "Columns", "RescaleSlope")


def holds_dicom(folder: Path) -> bool:
    """Whether any file under `folder` is DICOM, whatever its name (many archives omit the extension)."""
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
        with file.open("rb") as f:
            if f.read(132)[128:] == b"DICM" and file.name != "DICOMDIR":
                return True
    return False


def _kind(file: Path) -> tuple[Path, str]:
    """What the files of one series share: the folder, and the name without numbers (or hashes)."""
    return file.parent, re.sub(r"[0-9A-Fa-f]{8,}|\d+", "0", file.name)


def read_headers(folder: Path, path: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """(file, header) of every DICOM file under `folder`; others are skipped, but refused if named like the slices."""
    found, others, dead = [], [], []
    for file in sorted(f for f in folder.rglob("*") if not f.is_dir() and f.name != "DICOMDIR"):
        if not file.is_file():
            dead.append(file)
            continue
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS, *_NEEDED, *_FORMAT])
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                continue
            damage = [t for t in ("Modality", "SeriesInstanceUID") if not header.get(t)]  # every DICOM object has them
            for _ in header:  # decodes the values, so that damage shows here
                pass
        except (InvalidDicomError, EOFError):
            if not file.name.startswith("."):  # macOS puts ._0001.dcm beside 0001.dcm
                others.append(file)
            continue
        except Exception as error:  # pydicom raises many kinds
            raise ValueError(
                f"{path}: {file.name} has a damaged header ({error}); fetch the file again, or remove it if it is no slice"
            ) from error
        if damage:
            raise ValueError(_DAMAGED.format(path, file.name, ", no ".join(damage)))
        found.append((file, header))
    kinds = {_kind(file) for file, _ in found}
    for file in others:
        if file.suffix.lower() == ".dcm" or _kind(file) in kinds:  # skipping an end slice would shorten the scan
            raise ValueError(_DAMAGED.format(path, file.name, "DICOM header"))
    if dead := [f for f in dead if f.suffix.lower() == ".dcm" or _kind(f) in kinds or not found]:
        raise ValueError(
            f"{path}: {len(dead)} link(s) to files that are not there, first {dead[0].name}; fetch them (git annex get, "
            "datalad get, dvc pull) or copy the files themselves"
        )
    if not found:
        raise ValueError(
            f"{path}: no DICOM file in it; give the folder or zip of one CT series, or a .nii/.nii.gz file"
        )
    return found


def one_series(found: list, path: Path, series_uid: str | None) -> list[tuple[Path, pydicom.Dataset]]:
    """The slices of the only CT series, or of `series_uid`; scouts and other modalities are left out."""
    usable = [(f, d) for f, d in found if d.get("Modality") == "CT" and "LOCALIZER" not in (d.get("ImageType") or [])]
    # dose reports and screenshots labelled CT have no position in space
    usable = [
        (f, d) for f, d in usable if d.get("SOPClassUID") in _CT_STORAGE or _has_numbers(d, "ImagePositionPatient", 3)
    ]
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
            f"{u} ({len(s)} slices, {s[0][1].get('SeriesDescription', 'no name')}, in {s[0][0].parent.name})"
            for u, s in series.items()
        )
        raise ValueError(
            f"{path}: {len(series)} series in one folder: {listing}. Choose one with series_uid=..., or give its folder alone"
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


def check_headers(slices: list[tuple[Path, pydicom.Dataset]], path: Path) -> None:
    """Raise ValueError for an incomplete or invalid header, or slices that do not form one stack."""
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
    shape, cosines, spacing = (in_plane(slices[0][1])[i] for i in range(3))
    for file, header in slices[1:]:
        other = in_plane(header)
        if (
            other[0] != shape
            or not np.allclose(other[1], cosines, atol=1e-3)
            or not np.allclose(other[2], spacing, atol=1e-3)
        ):
            raise ValueError(
                f"{path}: {file.name} differs from {slices[0][0].name} in size, orientation or pixel spacing; keep the slices of one stack"
            )


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


def stored_range(header: pydicom.Dataset) -> tuple[int, int]:
    """Smallest and largest value that a pixel can store, before the rescale."""
    bits = int(header.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if header.PixelRepresentation else (0, 2**bits - 1)


def number(header: pydicom.Dataset, tag: str) -> float:
    """The number in `tag`, or 0 if it has none."""
    return float(header[tag].value) if _has_numbers(header, tag, 1) else 0.0


def in_plane(header: pydicom.Dataset) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """((rows, columns), six direction cosines, (row, column) spacing in mm)."""
    cosines, spacing = np.array(header.ImageOrientationPatient, float), np.array(header.PixelSpacing, float)
    return (header.Rows, header.Columns), cosines, spacing
