"""Write a changed CT as a DICOM series derived from its source: same geometry, new UIDs, untouched pixels unchanged.

Each file is the source's own dataset with new pixels, a slice or (enhanced CT) many frames. HU are converted with the slice's own rescale, so an unchanged
voxel keeps its stored value. The series is derived (PS3.3 C.7.6.1.1.2): new SOP and series UIDs, the study and frame of
reference kept, ImageType DERIVED\\SECONDARY, the source slice and this software named, and a description that says it
is for research. Elements that describe only the old pixels or the old file are removed. UIDs are generated from the
source's UIDs and a key, so the same insertion gives the same series.
"""

import io
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from hrldm import __version__
from hrldm.atomic import writing
from hrldm.ct.dicom_headers import Slice, load, stored_range
from hrldm.ct.dicom_read import opened

Plane = tuple[Dataset, np.ndarray]  # header of a slice, and its HU (rows, columns)
NOTE, ERASED = "SYNTHETIC NODULE, RESEARCH ONLY", "LESION ERASED, RESEARCH ONLY"
DONE = {NOTE: "A lung nodule was synthesised", ERASED: "A lesion was replaced by lung of the same scan"}
PRIVATE = ("keep", "strip")
_STALE = ("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries",
          "IconImageSequence", "InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID", "MACParametersSequence",
          "DigitalSignaturesSequence", "DataSetTrailingPadding")  # fmt: skip
_NOT_FROM = "{} cannot be derived from ({}); write NIfTI only: format='nifti'"


def check_source(source: str | Path, series_uid: str | None = None) -> None:
    """Raise ValueError if `write_series` would refuse the series whatever the new HU; same arguments."""
    with opened(Path(source), series_uid) as slices:
        for file, header in slices:
            if reason := _why_not(header):
                raise ValueError(_NOT_FROM.format(file.name, reason))
        file, frames = next(iter(_by_file(slices).items()))  # its other elements stand for those of all slices
        least = [float(h.RescaleIntercept) + float(h.RescaleSlope) * stored_range(h)[0] for h, _ in frames]
        planes = [(h, np.full((h.Rows, h.Columns), hu)) for (h, _), hu in zip(frames, least, strict=True)]
        _write(file, planes, "", "keep", NOTE, io.BytesIO())


def write_series(
    source: str | Path, hu: np.ndarray, folder: Path, key: str, private: str = "strip", series_uid: str | None = None,
    note: str = NOTE,
) -> Path:  # fmt: skip
    """Write HU (X, Y, Z) of the series under `source`, in the voxel order of `read_series`, to a new `folder`.

    Args:
        source:     folder or zip that was read
        hu:         HU of every voxel, changed or not
        folder:     created here; as many files as the source has, in order of their lowest slices from `0001.dcm`
        key:        what the UIDs depend on besides the source's (the record of the insertion)
        private:    strip or keep the vendor's private tags
        series_uid: which series, as for `read_series`
        note:       of `DONE`, what was done to it

    Raises:
        ValueError: shape differs from the series, a slice cannot hold its values or is big endian.
        OSError: no space, or `folder` cannot be written.
    """
    folder.mkdir(parents=True)
    with opened(Path(source), series_uid) as slices:
        shape = (slices[0][1].Columns, slices[0][1].Rows, len(slices))
        if hu.shape != shape:
            raise ValueError(f"HU of shape {hu.shape} to write into a series of {shape}")
        for n, (file, frames) in enumerate(_by_file(slices).items(), start=1):
            with writing(folder):
                planes = [(header, hu[:, :, k].T) for header, k in frames]
                _write(file, planes, key, private, note, folder / f"{n:04d}.dcm")
    return folder


def _by_file(slices: list[Slice]) -> dict[Path, list[tuple[Dataset, int]]]:
    """Header and number of each slice by its file, in the order of the file's frames."""
    files: dict[Path, list[tuple[Dataset, int]]] = {}
    for k, (file, header) in enumerate(slices):
        files.setdefault(file, []).append((header, k))
    return {file: sorted(frames, key=lambda frame: getattr(frame[0], "frame", 0)) for file, frames in files.items()}


def _why_not(header: Dataset) -> str:
    """Why no slice can be derived from this one; empty if one can."""
    if missing := [tag for tag in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID") if not header.get(tag)]:
        return f"it lacks {', '.join(missing)}"
    if header.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:  # retired; other binary elements cannot be swapped
        return "it is big endian"
    return ""


def _write(file: Path, planes: list[Plane], key: str, private: str, note: str, out: Path | io.BytesIO) -> None:
    """Write what is derived from a file with `planes`; OSError, or ValueError for any other reason."""
    try:
        data = load(file)
        _derive(data, planes, key, private, note)
        data.save_as(out, enforce_file_format=True)
    except OSError:
        raise
    except Exception as error:  # pydicom raises many kinds when writing odd elements
        raise ValueError(_NOT_FROM.format(file.name, error)) from error


def _derive(data: Dataset, planes: list[Plane], key: str, private: str, note: str) -> None:
    """Turn a file's dataset into the derived one, with pixels from `planes`, one a frame.

    Raises:
        ValueError: UIDs missing, big endian, frames that are no slices, or values that its bits cannot hold.
    """
    if reason := _why_not(data):
        raise ValueError(reason)
    if (frames := int(data.get("NumberOfFrames") or 1)) != len(planes):
        raise ValueError(f"{len(planes)} of its {frames} frames are slices of this series")
    stored = np.stack([_as_stored(hu, header) for header, hu in planes])
    low, high = stored_range(data)
    if not low <= stored.min() <= stored.max() <= high:
        raise ValueError(
            f"values {stored.min():.0f}..{stored.max():.0f} do not fit {data.BitsStored} of {data.BitsAllocated} bits"
        )
    if private == "strip":
        data.remove_private_tags()
    for tag in _STALE:
        if tag in data:
            del data[tag]
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    reference.PurposeOfReferenceCodeSequence = _code("121322", "Source image for image processing operation")
    data.SourceImageSequence = [reference]
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[str(data.SeriesInstanceUID), key])
    data.SOPInstanceUID = generate_uid(entropy_srcs=[str(data.SOPInstanceUID), key])
    kind, *rest = [str(x) for x in np.atleast_1d(data.get("ImageType") or [])][2:] or [""]  # a lone value is plain text
    data.ImageType = ["DERIVED", "SECONDARY" if "NumberOfFrames" not in data else "PRIMARY", kind or "AXIAL", *rest]
    groups = [*data.get("SharedFunctionalGroupsSequence", []), *data.get("PerFrameFunctionalGroupsSequence", [])]
    for frame_type in (item for group in groups for item in group.get("CTImageFrameTypeSequence", [])):
        frame_type.FrameType = ["DERIVED", *frame_type.FrameType[1:]]
    data.SeriesDescription = f"{note}: {data.get('SeriesDescription', '')}"[:64].rstrip(": ")
    data.DerivationDescription = f"{DONE[note]} by HR-LDM companion; not for clinical use."
    data.ContributingEquipmentSequence = [*(data.get("ContributingEquipmentSequence") or []), _software(note)]
    meta = FileMetaDataset()  # the old one names the program that wrote the old file
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.preamble, data.file_meta = None, meta
    pixels = stored.astype(f"<{'i' if data.PixelRepresentation else 'u'}{data.BitsAllocated // 8}").tobytes()
    data.PixelData = pixels + b"\0" * (len(pixels) % 2)
    data["PixelData"].VR = "OW"


def _as_stored(hu: np.ndarray, header: Dataset) -> np.ndarray:
    return np.rint((hu.astype(np.float64) - float(header.RescaleIntercept)) / float(header.RescaleSlope))


def _software(note: str) -> Dataset:
    """Item of the Contributing Equipment Sequence: the software that changed the image."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = _code("109103", "Modifying Equipment")
    item.Manufacturer, item.ManufacturerModelName, item.SoftwareVersions = "HR-LDM companion", "hrldm", __version__
    item.ContributionDescription = note
    return item


def _code(value: str, meaning: str) -> list[Dataset]:
    """A code of DICOM's own terminology (PS3.16)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return [item]
