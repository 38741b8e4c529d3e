"""A changed CT back into the DICOM series it came from: same geometry, new identity, every untouched pixel as it was.

Each slice is the source's own dataset with other pixels. HU go back through the slice's own rescale, so a voxel that was
not changed has the stored value it had. The series is derived (PS3.3 C.7.6.1.1.2): new SOP and series UIDs, the study and
frame of reference kept, ImageType DERIVED\\SECONDARY, the source slice and this software named, and the description says
that it is for research. What was true of the old pixels or the old file alone goes. UIDs follow from the source's and a
key, so the same insertion gives the same series.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from hrldm import __version__
from hrldm.ct import dicom_read as dicom
from hrldm.ct.dicom_headers import stored_range

NOTE = "SYNTHETIC NODULE, RESEARCH ONLY"
PRIVATE = ("keep", "strip")
_STALE = ("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries",
          "IconImageSequence", "InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID", "MACParametersSequence",
          "DigitalSignaturesSequence", "DataSetTrailingPadding")  # fmt: skip


_NOT_FROM = "{}: {} cannot be derived from ({}); write NIfTI only: format='nifti'"


def check_source(source: str | Path, series_uid: str | None = None) -> None:
    """Raise ValueError where `write_series` would refuse the series whatever is to be written; arguments as there."""
    path = Path(source)
    with dicom.opened(path) as unpacked:
        slices = dicom.sorted_slices(unpacked, path, series_uid)
        for file, header in slices:
            if reason := _why_not(header):
                raise ValueError(_NOT_FROM.format(path, file.name, reason))
        file, header = slices[0]  # of its other elements those of the first slice are as the others'
        least = float(header.RescaleIntercept) + float(header.RescaleSlope) * stored_range(header)[0]
        try:
            data = pydicom.dcmread(file)
            _derive(data, np.full((data.Rows, data.Columns), least), "", "keep")
            data.save_as(io.BytesIO(), enforce_file_format=True)
        except Exception as error:  # as in write_series
            raise ValueError(_NOT_FROM.format(path, file.name, error)) from error


def write_series(
    source: str | Path, hu: np.ndarray, folder: Path, key: str, private: str = "strip", series_uid: str | None = None
) -> Path:
    """Write HU (X, Y, Z) of the series under `source`, in the voxel order of `dicom.read_series`, to a new `folder`.

    Args:
        source:     folder or zip that was read
        hu:         HU of every voxel, changed or not
        folder:     made here; one file a slice, `0001.dcm` from the first slice on
        key:        what the UIDs depend on besides the source's (the record of what was done)
        private:    strip or keep the vendor's private tags
        series_uid: which series, as for `read_series`

    Raises:
        ValueError: another shape than the series, a slice that cannot hold its values or is big endian, unknown `private`.
    """
    if private not in PRIVATE:
        raise ValueError(f"private tags: choose {' or '.join(PRIVATE)}, not {private!r}")
    path = Path(source)
    folder.mkdir(parents=True)
    with dicom.opened(path) as unpacked:
        slices = dicom.sorted_slices(unpacked, path, series_uid)
        if hu.shape[2] != len(slices):
            raise ValueError(f"{path}: {hu.shape[2]} slices to write into a series of {len(slices)}")
        for k, (file, _) in enumerate(slices):
            data = pydicom.dcmread(file)
            if hu.shape[:2] != (data.Columns, data.Rows):
                raise ValueError(f"{path}: slices of {hu.shape[:2]} to write into {(data.Columns, data.Rows)}")
            try:
                _derive(data, hu[:, :, k].T, key, private)
                data.save_as(folder / f"{k + 1:04d}.dcm", enforce_file_format=True)
            except OSError as error:
                said = (
                    f"{folder}: could not be written ({error.strerror or error}); free space or choose another folder"
                )
                raise OSError(error.errno, said) from error
            except Exception as error:  # pydicom raises many kinds on odd elements that it has to write
                raise ValueError(_NOT_FROM.format(path, file.name, error)) from error
    return folder


def _why_not(header: Dataset) -> str:
    """Why no slice can be derived from this one; empty where it can."""
    if missing := [tag for tag in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID") if not header.get(tag)]:
        return f"it lacks {', '.join(missing)}"
    if header.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:  # retired; its other binary elements cannot be turned
        return "it is big endian"
    return ""


def _derive(data: Dataset, hu: np.ndarray, key: str, private: str) -> None:
    """Make a slice's dataset the derived one, with pixels (rows, columns) of HU.

    Raises:
        ValueError: no identity to refer to, big endian, or values that its bits cannot hold.
    """
    if reason := _why_not(data):
        raise ValueError(reason)
    stored = np.rint((hu.astype(np.float64) - float(data.RescaleIntercept)) / float(data.RescaleSlope))
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
    data.SourceImageSequence = Sequence([reference])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[str(data.SeriesInstanceUID), key])
    data.SOPInstanceUID = generate_uid(entropy_srcs=[str(data.SOPInstanceUID), key])
    kind, *rest = [str(x) for x in np.atleast_1d(data.get("ImageType") or [])][2:] or [""]  # one value is plain text
    data.ImageType = ["DERIVED", "SECONDARY", kind or "AXIAL", *rest]
    data.SeriesDescription = f"{NOTE}: {data.get('SeriesDescription', '')}"[:64].rstrip(": ")
    data.DerivationDescription = "A lung nodule was synthesised by HR-LDM companion; not for clinical use."
    data.ContributingEquipmentSequence = Sequence([*(data.get("ContributingEquipmentSequence") or []), _software()])
    meta = FileMetaDataset()  # the old one tells of the program that wrote the old file
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.preamble, data.file_meta = None, meta
    pixels = stored.astype(f"<{'i' if data.PixelRepresentation else 'u'}{data.BitsAllocated // 8}").tobytes()
    data.PixelData = pixels + b"\0" * (len(pixels) % 2)
    data["PixelData"].VR = "OW"


def _software() -> Dataset:
    """Item of the Contributing Equipment Sequence: what changed the image."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = _code("109103", "Modifying Equipment")
    item.Manufacturer, item.ManufacturerModelName, item.SoftwareVersions = "HR-LDM companion", "hrldm", __version__
    item.ContributionDescription = NOTE
    return item


def _code(value: str, meaning: str) -> Sequence:
    """A code of DICOM's own terminology (PS3.16)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return Sequence([item])
