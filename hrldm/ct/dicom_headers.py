"""Find the slices of the one CT series in a folder, and check their headers.

Each header is checked on its own, then against the first; `dicom_read` checks the slice positions. Errors name the file;
`dicom_read.opened` puts the path of the scan before it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.errors import InvalidDicomError
from pydicom.misc import is_dicom

logger = logging.getLogger(__name__)
Slice = tuple[Path, pydicom.Dataset]  # file, header
# tag: how many numbers it holds
_NEEDED = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1,
           "RescaleSlope": 1, "RescaleIntercept": 1}  # fmt: skip
_POSITIVE = ("PixelSpacing", "Rows", "Columns", "RescaleSlope")
_FORMAT = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_READ = (*_NEEDED, *_FORMAT, "SeriesInstanceUID", "Modality", "ImageType", "SeriesDescription", "NumberOfFrames",
         "GantryDetectorTilt", "SliceThickness", "SpacingBetweenSlices", "Manufacturer", "ConvolutionKernel", "KVP",
         "SamplesPerPixel", "PhotometricInterpretation", "SOPClassUID", "SOPInstanceUID")  # fmt: skip
_CT_STORAGE = (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
_DAMAGED = "{} is damaged or cut short ({}); fetch the file again, or remove it if it is no slice"


def holds_dicom(folder: Path) -> bool:
    """Whether any file under `folder` is DICOM, whatever its name (many archives omit the extension)."""
    files = (f for f in folder.rglob("*") if f.name != "DICOMDIR" and not f.name.startswith(".") and f.is_file())
    return any(is_dicom(file) for file in files)


def read_headers(folder: Path) -> list[Slice]:
    """(file, header) of every DICOM file under `folder`; others are skipped, but refused if named like the slices."""
    found, others, dead = [], [], []
    for file in sorted(f for f in folder.rglob("*") if not f.is_dir() and f.name != "DICOMDIR"):
        if not file.is_file():
            dead.append(file)
            continue
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_READ))
            if header.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
                continue
            list(header)  # decodes the values, so that damage shows here
            if missing := [tag for tag in ("Modality", "SeriesInstanceUID") if not header.get(tag)]:
                raise ValueError(f"no {', no '.join(missing)}")  # every DICOM object has them
            found.append((file, header))
        except (InvalidDicomError, EOFError):
            if not file.name.startswith("."):  # macOS puts ._0001.dcm beside 0001.dcm
                others.append(file)
        except Exception as error:  # pydicom raises many kinds
            raise ValueError(_DAMAGED.format(file.name, error)) from error
    kinds = {_kind(file) for file, _ in found}

    def like_a_slice(file: Path) -> bool:
        return file.suffix.lower() == ".dcm" or _kind(file) in kinds

    if others := [file for file in others if like_a_slice(file)]:  # skipping an end slice would shorten the scan
        raise ValueError(_DAMAGED.format(others[0].name, "no DICOM header"))
    if dead := [file for file in dead if like_a_slice(file) or not found]:
        raise ValueError(
            f"{len(dead)} link(s) to files that are not there, first {dead[0].name}; fetch them (git annex get, "
            "datalad get, dvc pull) or copy the files themselves"
        )
    if not found:
        raise ValueError("no DICOM file in it; give the folder or zip of one CT series, or a .nii/.nii.gz file")
    return found


def _kind(file: Path) -> tuple[Path, str]:
    """What the files of one series share: the folder, and the name without numbers (or hashes)."""
    return file.parent, re.sub(r"[0-9A-Fa-f]{8,}|\d+", "0", file.name)


def one_series(found: list[Slice], path: Path, series_uid: str | None) -> list[Slice]:
    """The slices of the only CT series of the scan at `path`, or of `series_uid`; scouts and other modalities are left out."""
    series: dict[str, list[Slice]] = {}
    for file, header in found:
        # dose reports and screenshots labelled CT have no position in space; a slice whose class is damaged names it twice
        classes = header.get("SOPClassUID"), header.file_meta.get("MediaStorageSOPClassUID")
        in_space = any(c in _CT_STORAGE for c in classes) or _has_numbers(header, "ImagePositionPatient", 3)
        if header.Modality == "CT" and "LOCALIZER" not in (header.get("ImageType") or []) and in_space:
            series.setdefault(str(header.SeriesInstanceUID), []).append((file, header))
    if not series:
        modalities = ", ".join(sorted({str(header.Modality) for _, header in found}))
        raise ValueError(f"not a CT (modality {modalities}, or scouts only); give a CT series")
    if left_out := len(found) - sum(map(len, series.values())):
        logger.info("%s: %d file(s) that are no CT slices left out", path, left_out)
    if series_uid is None and len(series) > 1:
        listing = "; ".join(
            f"{key} ({len(slices)} slices, {slices[0][1].get('SeriesDescription', 'no name')}, in {slices[0][0].parent.name})"
            for key, slices in series.items()
        )
        raise ValueError(
            f"{len(series)} series in one folder: {listing}. Choose one with series_uid=..., or give its folder alone"
        )
    chosen = next(iter(series)) if series_uid is None else series_uid
    if chosen not in series:
        raise ValueError(f"no CT series {chosen}; there is {', '.join(series)}")
    for file, header in found:  # a series has one modality
        if header.Modality != "CT" and str(header.SeriesInstanceUID) == chosen:
            raise ValueError(f"{file.name} is of the CT series but has modality {header.Modality}; fetch it again")
    return series[chosen]


def check_headers(slices: list[Slice]) -> None:
    """Raise ValueError for an incomplete or invalid header, or slices that do not form one stack."""
    first_file, first = slices[0]
    for file, header in slices:
        if fault := _fault(header):
            raise ValueError(f"{file.name} {fault}")
        if not all(np.allclose(a, b, atol=1e-3) for a, b in zip(in_plane(header), in_plane(first), strict=True)):
            raise ValueError(
                f"{file.name} differs from {first_file.name} in size, orientation or pixel spacing; keep the slices of one stack"
            )


def _fault(header: pydicom.Dataset) -> str:
    """What makes a slice of this header unreadable, and the remedy; empty if nothing."""
    if (header.get("NumberOfFrames") or 1) != 1:
        return "is a multi-frame file; convert it to NIfTI first (dcm2niix)"
    if missing := [tag for tag, n in _NEEDED.items() if not _has_numbers(header, tag, n)]:
        return f"lacks a usable {', '.join(missing)}, so its place is unknown or its values are not HU; export the original series again"
    colours, samples = header.get("PhotometricInterpretation"), header.get("SamplesPerPixel")
    if (colours, samples) != ("MONOCHROME2", 1):
        return f"has {colours} pixels of {samples} samples, not one MONOCHROME2; export the original series again"
    bits, stored, high, signed = (header.get(tag) for tag in _FORMAT)
    if bits not in (8, 16, 32) or not 1 <= (stored or 0) <= bits or high != stored - 1 or signed not in (0, 1):
        values = f"{bits}, {stored}, {high}, {signed}"
        return f"has {', '.join(_FORMAT)} {values}, which is no number format; fetch the file again"
    return ""


def _has_numbers(header: pydicom.Dataset, tag: str, n: int) -> bool:
    """Whether `tag` holds `n` finite numbers, sizes above 0 and direction cosines of unit length."""
    try:
        values = np.atleast_1d(np.array(header.get(tag), float))
    except (TypeError, ValueError):
        return False
    if values.shape != (n,) or not np.isfinite(values).all() or (tag in _POSITIVE and values.min() <= 0):
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
