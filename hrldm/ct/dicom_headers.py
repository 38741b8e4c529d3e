"""Find the slices of the one CT series in a folder, and check their headers.

Each header is checked on its own, then against the first; `dicom_read` checks the slice positions. Errors name the file;
`dicom_read.opened` puts the path of the scan before it. A multi-frame file (enhanced CT) counts as one slice a frame:
each gets a header of its own, with the functional groups laid flat.
"""

import logging
import re
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.errors import InvalidDicomError
from pydicom.misc import is_dicom

from hrldm.ct.zipped import is_zip

logger = logging.getLogger(__name__)
Slice = tuple[Path, pydicom.Dataset]  # file, header; of a multi-frame file, `header.frame` counts from 0
LARGEST = "largest"  # as series_uid: the series that `_rank` puts first
# tag: how many numbers it holds
_NEEDED = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1,
           "RescaleSlope": 1, "RescaleIntercept": 1}  # fmt: skip
_POSITIVE = ("PixelSpacing", "Rows", "Columns", "RescaleSlope")
_FORMAT = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_READ = (*_NEEDED, *_FORMAT, "SeriesInstanceUID", "Modality", "ImageType", "SeriesDescription", "NumberOfFrames",
         "GantryDetectorTilt", "SliceThickness", "SpacingBetweenSlices", "Manufacturer", "ConvolutionKernel", "KVP",
         "SamplesPerPixel", "PhotometricInterpretation", "SOPClassUID", "SOPInstanceUID", "AcquisitionNumber",
         "BodyPartExamined", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")  # fmt: skip
_CT_STORAGE = (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
_DAMAGED = "{} is damaged or cut short ({}); fetch the file again, or remove it if it is no slice"


def holds_dicom(folder: Path) -> bool:
    """Whether any file under `folder` is DICOM, whatever its name (many archives omit the extension)."""
    files = (f for f in folder.rglob("*") if f.name != "DICOMDIR" and not f.name.startswith(".") and f.is_file())
    return any(is_dicom(file) for file in files)


def load(file: Path, **how) -> pydicom.FileDataset:
    """`pydicom.dcmread`, also of a file without preamble and file meta (PS3.10), as PACS and old archives keep them."""
    try:
        return pydicom.dcmread(file, **how)
    except InvalidDicomError:
        data = pydicom.dcmread(file, force=True, **how)
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return data


def _header(file: Path) -> pydicom.Dataset:
    """The elements that are read here; InvalidDicomError for a file that is no DICOM."""
    how = {"stop_before_pixels": True, "specific_tags": list(_READ)}
    if is_dicom(file):
        return load(file, **how)
    try:
        data = load(file, **how)
        known = all(data.get(tag) for tag in ("SOPClassUID", "SeriesInstanceUID", "Modality"))
        if known and uid.UID(data.SOPClassUID) in uid.UID_dictionary:
            return data
    except Exception as error:  # what pydicom makes of other files' bytes
        raise InvalidDicomError from error
    raise InvalidDicomError


def holds_slice(file: Path) -> bool:
    """Whether a file is DICOM, with or without its preamble."""
    try:
        return is_dicom(file) or bool(_header(file))
    except InvalidDicomError:
        return False


def _by_frame(header: pydicom.Dataset) -> list[pydicom.Dataset]:
    """One header a frame: of a multi-frame CT, the functional groups laid flat (PS3.3 C.7.6.16); else itself."""
    own = header.get("PerFrameFunctionalGroupsSequence")
    if not own or header.Modality != "CT":
        return [header]
    if len(own) != header.NumberOfFrames:
        raise ValueError(f"{header.NumberOfFrames} frames, {len(own)} of them described")
    headers = []
    for k, groups in enumerate(own):
        flat = pydicom.Dataset({e.tag: e for e in header if e.VR != "SQ"})
        for group in (e for part in (*header.get("SharedFunctionalGroupsSequence", []), groups) for e in part):
            if group.VR == "SQ" and group.value:
                flat.update(group.value[0])
        flat.file_meta, flat.NumberOfFrames, flat.frame = header.file_meta, 1, k
        headers.append(flat)
    return headers


def read_headers(folder: Path, within: str = "**/*") -> list[Slice]:
    """(file, header) of every DICOM file under `folder`; others are skipped, but refused if named like the slices."""
    found, others, dead = [], [], []
    for file in sorted(f for f in folder.glob(within) if not f.is_dir() and f.name != "DICOMDIR"):
        if not file.is_file():
            dead.append(file)
            continue
        try:
            header = _header(file)
            if header.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
                continue
            list(header)  # decodes the values, so that damage shows here
            if missing := [tag for tag in ("Modality", "SeriesInstanceUID") if not header.get(tag)]:
                raise ValueError(f"no {', no '.join(missing)}")  # every DICOM object has them
            found += [(file, frame) for frame in _by_frame(header)]
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
    """The slices of the only CT series of the scan at `path`, or of `series_uid`; scouts and other modalities are left out.

    series_uid: a SeriesInstanceUID, with ":2" behind it for acquisition 2 of a series that holds several; or `LARGEST`
    """
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
    series = {key: part for uid_, slices in series.items() for key, part in _acquisitions(uid_, slices).items()}
    if path.is_file() and not is_zip(path):
        series = {key: slices for key, slices in series.items() if path in (file for file, _ in slices)}
        if not series:
            raise ValueError("no CT slice; give a slice of the series, or its folder")
    if series_uid == LARGEST:
        fit = [max(series, key=lambda key: _rank(series[key]))]
    else:
        fit = [key for key in series if series_uid in (None, key, key.partition(":")[0])]
    if not fit:
        raise ValueError(f"no CT series {series_uid}; there is {', '.join(series)}")
    listing = "; ".join(
        f"{key} ({len(slices)} slices, {slices[0][1].get('SeriesDescription', 'no name')}, in {slices[0][0].parent.name})"
        for key, slices in series.items()
    )
    if len(fit) > 1:
        alike = len({key.partition(":")[0] for key in fit}) == 1
        kind = "acquisitions in one series" if alike else "series in one folder"
        raise ValueError(f"{len(fit)} {kind}: {listing}. Choose one with series_uid=..., or give its folder alone")
    chosen = fit[0]
    if series_uid == LARGEST and len(series) > 1:
        logger.warning(
            "%s: %d CT series, the largest chest CT is taken, %s, of: %s", path, len(series), chosen, listing
        )
    for file, header in found:  # a series has one modality
        if header.Modality != "CT" and str(header.SeriesInstanceUID) == chosen.partition(":")[0]:
            raise ValueError(f"{file.name} is of the CT series but has modality {header.Modality}; fetch it again")
    return series[chosen]


def _acquisitions(series_uid: str, slices: list[Slice]) -> dict[str, list[Slice]]:
    """The slices by acquisition ("uid:number") where several cover the same part of the patient; else as one series."""
    parts: dict[str, list[Slice]] = {}
    for file, header in slices:
        acquisition = header.get("AcquisitionNumber", header.get("FrameAcquisitionNumber"))
        parts.setdefault(f"{series_uid}:{acquisition}", []).append((file, header))
    placed = all(_has_numbers(h, tag, _NEEDED[tag]) for _, h in slices for tag in tuple(_NEEDED)[:2])
    if len(parts) > 1 and placed:
        cosines = np.array(slices[0][1].ImageOrientationPatient, float)
        normal = np.cross(cosines[:3], cosines[3:])
        along = [[float(normal @ np.array(h.ImagePositionPatient, float)) for _, h in part] for part in parts.values()]
        ends = sorted((min(a), max(a)) for a in along)
        if any(low < high for (_, high), (low, _) in zip(ends, ends[1:], strict=False)):
            return parts
    return {series_uid: slices}


def _rank(slices: list[Slice]) -> tuple[bool, bool, int]:
    """For `LARGEST`: original before reformatted, of the chest (or unsaid) before other parts, then the most slices."""
    header = slices[0][1]
    kind, part = header.get("ImageType") or [""], str(header.get("BodyPartExamined") or "CHEST").upper()
    return "ORIGINAL" in kind, any(name in part for name in ("CHEST", "THORAX", "LUNG")), len(slices)


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
        return "is a multi-frame file that does not say where its frames lie; convert it to NIfTI first (dcm2niix)"
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
