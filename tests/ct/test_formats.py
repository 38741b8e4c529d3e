"""Each input format gives the voxels and the place that its own library reads, and takes them back unchanged.

Written by SimpleITK, nibabel or pydicom, which are the reference; RAS here, LPS there.
"""

import logging
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from scipy.spatial.transform import Rotation

from hrldm.ct import zipped
from hrldm.ct.dicom_read import read_series
from hrldm.ct.dicom_write import check_source, write_series
from hrldm.ct.geometry import to_world
from hrldm.ct.volume import read_ct as read_whole_ct
from hrldm.ct.volume import same_suffix, write_ct
from tests import tiny

SPACING = np.array([0.7, 0.8, 2.5])
TURNS = [Rotation.from_euler("xyz", a, degrees=True).as_matrix() for a in ((0, 0, 0), (10, -20, 35), (90, 0, 90))]


def read_ct(path, **how):
    """Turned on its side, the phantom has 9 slices."""
    return read_whole_ct(path, min_slices=9, **how)


def phantom(shape=(11, 9, 22), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)


def itk(hu: np.ndarray, turn: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(hu.transpose(2, 1, 0))
    image.SetSpacing(SPACING.tolist())
    image.SetOrigin((-101.123456789, 52.2, 1 / 3))
    image.SetDirection(turn.ravel().tolist())
    return image


def same_place(image: sitk.Image, ct) -> None:
    for index in ((0, 0, 0), (10, 3, 21), (4, 8, 1)):
        assert image.GetPixel(*index) == ct.array[index]
        lps = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(to_world(ct.affine, index), np.array(lps) * [-1, -1, 1], atol=1e-9)


# -- MetaImage and NRRD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("name", "kind"), [("a.mha", np.int16), ("a.mhd", np.int32), ("a.nrrd", np.int16), ("A.NHDR", np.float32)])  # fmt: skip
def test_metaimage_and_nrrd_in_and_out(tmp_path, name, kind, turn):
    image = itk(phantom().astype(kind), turn)
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, str(tmp_path / "in" / name.lower()))
    path = (tmp_path / "in" / name.lower()).rename(tmp_path / "in" / name)
    ct = read_ct(path)
    assert ct.stored.dtype == kind
    np.testing.assert_array_equal(ct.array, phantom())
    same_place(image, ct)
    changed = ct.stored.copy()
    changed[3, 4, 5] = 77
    out = write_ct(tmp_path / f"out{same_suffix(path)}", changed, ct)
    assert out.suffix == (".mha" if "mh" in name else ".nrrd") and len(list(tmp_path.glob("out*"))) == 1
    before, after = sitk.ReadImage(str(path)), sitk.ReadImage(str(out))
    for value in (
        "GetOrigin",
        "GetSpacing",
        "GetDirection",
        "GetPixelID",
        "GetSize",
    ):  # NRRD holds spacing times direction
        np.testing.assert_allclose(
            getattr(before, value)(), getattr(after, value)(), rtol=0, atol=0 if "mh" in name else 1e-15
        )
    differ = sitk.GetArrayFromImage(before) != sitk.GetArrayFromImage(after)
    assert np.argwhere(differ).tolist() == [[5, 4, 3]]
    again = read_ct(write_ct(tmp_path / "out.nii.gz", changed, ct))
    np.testing.assert_allclose(again.affine, ct.affine, atol=1e-4)
    np.testing.assert_array_equal(again.array, changed)


def test_an_image_file_that_is_none_is_refused(tmp_path):
    sitk.WriteImage(itk(phantom(), TURNS[0]), str(tmp_path / "cut.mha"))
    (tmp_path / "cut.mha").write_bytes((tmp_path / "cut.mha").read_bytes()[:-500])
    sitk.WriteImage(sitk.GetImageFromArray(phantom()[0]), str(tmp_path / "flat.mha"))
    (tmp_path / "text.nrrd").write_text("hello")
    (tmp_path / "nowhere.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nspacings: 1 1 1\nencoding: raw\nendian: little\n\n"
        + bytes(128)
    )
    sitk.WriteImage(itk(phantom(), TURNS[0]), str(tmp_path / "lost.mhd"))
    (tmp_path / "lost.raw").unlink()
    for name, words in {
        "cut.mha": "not readable as an image", "flat.mha": "is not one 3D volume", "text.nrrd": "not readable",
        "nowhere.nrrd": "no space in its header", "lost.mhd": "not readable as an image", "gone.mha": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            read_ct(tmp_path / name)


# -- zips --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("a.nii.gz",), ("deep/a.nii", "__MACOSX/._a.nii", "README.txt"), ("a.mhd", "a.raw")])
def test_an_image_in_a_zip(tmp_path, names):
    (tmp_path / "in").mkdir()
    first = names[0].rpartition("/")[2]
    sitk.WriteImage(itk(phantom(), TURNS[1]), str(tmp_path / "in" / first))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in names:
            file = tmp_path / "in" / name.rpartition("/")[2]
            archive.writestr(name, file.read_bytes() if file.exists() else b"other")
    ct = read_ct(tmp_path / "s.zip")
    np.testing.assert_array_equal(ct.array, phantom())
    np.testing.assert_allclose(ct.affine, read_ct(tmp_path / "in" / first).affine)
    assert ct.source == str(tmp_path / "s.zip") and same_suffix(ct.source) == ".nii.gz"


def test_a_zip_of_several_images_is_refused_and_one_beside_a_series_is_no_ct(tmp_path):
    nib.save(nib.Nifti1Image(phantom(), np.eye(4)), tmp_path / "a.nii.gz")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(tmp_path / "a.nii.gz", "a.nii.gz"), archive.write(tmp_path / "a.nii.gz", "b.nii.gz")
    with pytest.raises(ValueError, match=r"two.zip: 2 images in it \(a.nii.gz, b.nii.gz\); give a zip of one"):
        read_ct(tmp_path / "two.zip")
    folder = tiny.dicom_series(tmp_path / "s", phantom(seed=4), np.diag([0.7, 0.7, 2, 1]))
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        archive.write(tmp_path / "a.nii.gz", "mask.nii.gz")
        for file in folder.iterdir():
            archive.write(file, file.name)
    np.testing.assert_array_equal(read_ct(tmp_path / "series.zip").array, read_ct(folder).array)


@pytest.mark.parametrize("name", ["a.nii", "a.dcm"])
def test_a_zip_that_would_grow_beyond_any_ct_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name):
    monkeypatch.setattr(zipped, "FREE_BYTES", 2**20)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *_: pytest.fail("unpacked"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(20_000_000))
    assert (tmp_path / "bomb.zip").stat().st_size < 30_000
    with pytest.raises(ValueError, match=r"bomb.zip: cannot be unpacked \(it would grow to 20 MB"):
        read_ct(tmp_path / "bomb.zip")


# -- DICOM -------------------------------------------------------------------------------------------------------------


def series(folder, n=22, seed=0, **tags):
    """A series of n slices 2 mm apart from z = 0 with `tags`; returns its files."""
    hu = phantom((11, 9, n), seed)
    files = sorted(tiny.dicom_series(folder, hu, np.diag([-0.7, -0.7, 2.0, 1.0])).iterdir())
    for k, file in enumerate(files):
        d = pydicom.dcmread(file)
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f"{d.SOPInstanceUID[:40]}.{seed}.{k}"
        d.update(tag_values := Dataset())
        for tag, value in tags.items():
            setattr(d, tag, value)
        assert not tag_values
        d.save_as(file)
    return files


def test_one_file_stands_for_its_series(tmp_path):
    files = series(tmp_path / "s")
    for file in series(tmp_path / "t", seed=1, SeriesInstanceUID="1.2.4"):
        file.rename(tmp_path / "s" / f"t{file.name}")
    (tmp_path / "s" / "deeper").mkdir()
    files[3].rename(tmp_path / "s" / "no-suffix")
    for path, seed in ((files[5], 0), (tmp_path / "s" / "no-suffix", 0), (tmp_path / "s" / "t0002.dcm", 1)):
        ct = read_ct(path)
        np.testing.assert_array_equal(ct.array, phantom((11, 9, 22), seed))
        out = write_series(path, ct.stored, tmp_path / f"out-{path.name}", "key")
        np.testing.assert_array_equal(read_ct(out).array, ct.array)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("meta", [True, False])
def test_dicom_without_a_part_10_header(tmp_path, syntax, meta):
    folder = tiny.dicom_series(tmp_path / "s", phantom(), np.diag([-0.7, -0.7, 2.0, 1.0]), syntax=syntax, name="IM{:d}")
    for file in folder.iterdir():
        d = pydicom.dcmread(file)
        content = file.read_bytes()[132:]
        if not meta:  # nor the file's own group, whose length its first element says
            content = content[12 + d.file_meta.FileMetaInformationGroupLength :]
        file.write_bytes(content)
    for path in (folder, folder / "IM7"):
        ct = read_ct(path)
        np.testing.assert_array_equal(ct.array, phantom())
        np.testing.assert_allclose(ct.affine, np.diag([-0.7, -0.7, 2.0, 1.0]), atol=1e-9)
    check_source(folder)
    np.testing.assert_array_equal(read_series(write_series(folder, ct.stored, tmp_path / "out", "key"))[0], phantom())


def enhanced(path, hu, affine, syntax=ExplicitVRLittleEndian, shared_rescale=True, order=None):
    """An enhanced CT, its frames in any order; returns its intercepts by frame."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    n = hu.shape[2]
    order = np.random.default_rng(1).permutation(n) if order is None else order
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID, d.Modality = "1.2.3", "1.2", "1.5", "CT"
    d.ImageType, d.NumberOfFrames, d.Rows, d.Columns = (
        ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        n,
        hu.shape[1],
        hu.shape[0],
    )
    d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
    d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15

    def group(**tags):
        item = Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        return [item]

    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[spacing[1], spacing[0]], SliceThickness=spacing[2])
    shared.PlaneOrientationSequence = group(
        ImageOrientationPatient=[f"{x:.10f}" for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
    )
    shared.CTImageFrameTypeSequence = group(FrameType=list(d.ImageType))
    inter = np.full(n, -1024) if shared_rescale else -1024 - np.arange(n)
    d.PerFrameFunctionalGroupsSequence = []
    for k in order:
        own = Dataset()
        own.PlanePositionSequence = group(ImagePositionPatient=[f"{x:.8f}"[:16] for x in (lps @ [0, 0, k, 1])[:3]])
        rescale = group(RescaleSlope=1, RescaleIntercept=int(inter[k]), RescaleType="HU")
        (shared if shared_rescale else own).PixelValueTransformationSequence = rescale
        d.PerFrameFunctionalGroupsSequence.append(own)
    d.SharedFunctionalGroupsSequence = [shared]
    stored = np.stack([(hu[:, :, k].T.astype(int) - inter[k]) for k in order]).astype("<u2")
    d.PixelData = stored.tobytes()
    d["PixelData"].VR = "OW"
    if syntax.is_encapsulated:
        d.compress(syntax)
    path.parent.mkdir(exist_ok=True)
    d.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("syntax", "shared"), [(ExplicitVRLittleEndian, True), (ExplicitVRLittleEndian, False), (RLELossless, True)]
)
def test_enhanced_ct_in_and_out(tmp_path, turn, syntax, shared):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * SPACING, (-50.5, 30.25, 12)
    path = enhanced(tmp_path / "s" / "e.dcm", phantom(), affine, syntax, shared)
    for place in (path, path.parent):
        ct = read_ct(place)
        flip = ct.affine[:3, 2] @ affine[:3, 2] < 0
        expected = phantom()[:, :, ::-1] if flip else phantom()
        np.testing.assert_array_equal(ct.array, expected)
        first = affine @ [0, 0, 21 if flip else 0, 1]
        np.testing.assert_allclose(ct.affine[:3, 3], first[:3], atol=1e-6)
        np.testing.assert_allclose(ct.affine[:3, :2], affine[:3, :2], atol=1e-6)
    changed = ct.stored.copy()
    changed[3, 4, 5] = 77
    check_source(path)
    out = write_series(path, changed, tmp_path / "out", "key")
    (file,) = out.iterdir()
    d = pydicom.dcmread(file)
    assert d.ImageType[0] == d.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0].FrameType[0] == "DERIVED"
    assert d.SeriesInstanceUID != "1.2.3" and d.NumberOfFrames == 22
    again = read_ct(out)
    np.testing.assert_array_equal(again.array, changed)
    np.testing.assert_array_equal(again.affine, ct.affine)
    difference = d.pixel_array.astype(int) - pydicom.dcmread(path).pixel_array  # by pydicom, in the order of the file
    assert np.count_nonzero(difference) == 1


def test_copies_of_slices_are_left_out_and_said_and_other_pixels_at_one_place_are_refused(tmp_path, caplog):
    files = series(tmp_path / "s")
    for name in ("0003.dcm", "0021.dcm"):
        (tmp_path / "s" / f"copy-{name}").write_bytes((tmp_path / "s" / name).read_bytes())
    with caplog.at_level(logging.WARNING):
        ct = read_ct(tmp_path / "s")
    np.testing.assert_array_equal(ct.array, phantom((11, 9, 22)))
    assert "2 slice(s) there twice, pixel by pixel" in caplog.text
    out = write_series(tmp_path / "s", ct.stored, tmp_path / "out", "key")
    assert len(list(out.iterdir())) == 22
    d = pydicom.dcmread(files[3])
    d.PixelData = bytes(len(d.PixelData))
    d.save_as(tmp_path / "s" / "copy-0003.dcm")
    with pytest.raises(ValueError, match="1 slice position.s. twice with other pixels.*0003.dcm"):
        read_ct(tmp_path / "s")


def test_two_acquisitions_in_one_series_are_named_and_chosen(tmp_path, caplog):
    series(tmp_path / "s" / "in", AcquisitionNumber=1, SeriesDescription="thorax")
    series(tmp_path / "s" / "ex", n=24, seed=1, AcquisitionNumber=2)
    for uid in (None, "1.2.3"):
        with pytest.raises(ValueError, match=r"2 acquisitions in one series: .*series_uid=") as caught:
            read_ct(tmp_path / "s", series_uid=uid)
        for words in ("1.2.3:1 (22 slices, thorax, in in)", "1.2.3:2 (24 slices, no name, in ex)"):
            assert words in str(caught.value)
    for uid, n, seed in (("1.2.3:1", 22, 0), ("1.2.3:2", 24, 1), ("largest", 24, 1)):
        np.testing.assert_array_equal(read_ct(tmp_path / "s", series_uid=uid).array, phantom((11, 9, n), seed))
    assert "the largest chest CT is taken, 1.2.3:2, of: " in caplog.text
    np.testing.assert_array_equal(read_ct(tmp_path / "s" / "in" / "0003.dcm").array, phantom((11, 9, 22)))


def test_acquisitions_that_continue_each_other_are_one_scan(tmp_path):
    files = series(tmp_path / "s")
    for k, file in enumerate(files):
        d = pydicom.dcmread(file)
        d.AcquisitionNumber = 1 if k < 9 else 2
        d.save_as(file)
    np.testing.assert_array_equal(read_ct(tmp_path / "s").array, phantom((11, 9, 22)))


def test_the_largest_is_an_original_of_the_chest(tmp_path):
    for k, tags in enumerate(
        (
            {},
            {"BodyPartExamined": "HEAD"},
            {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]},
            {"BodyPartExamined": "CHEST"},
        )
    ):
        series(tmp_path / "s" / str(k), n=(22, 40, 50, 24)[k], seed=k, SeriesInstanceUID=f"1.2.{k}", **tags)
    assert read_ct(tmp_path / "s", series_uid="largest").provenance["SeriesInstanceUID"] == "1.2.3"


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nii.gz", "mha", "dicom"])
def test_padding_is_air_to_the_reader_and_stays_as_it_is_in_the_file(tmp_path, caplog, kind):
    hu, affine = phantom(), np.diag([-0.7, -0.7, 2.0, 1.0])
    hu[:2] = -32768
    path = tmp_path / f"a.{kind}"
    if kind == "dicom":
        tiny.dicom_series(path, hu, affine, signed=True, bits=16, inter=0.0)
    elif kind == "mha":
        sitk.WriteImage(itk(hu, TURNS[0]), str(path))
    else:
        nib.save(nib.Nifti1Image(hu, affine), path)
    ct = read_ct(path)
    assert "18.2% of its voxels are padding (-32768), taken for air (-1024 HU)" in caplog.text
    np.testing.assert_array_equal(ct.array, np.where(hu == -32768, -1024, hu))
    np.testing.assert_array_equal(ct.stored, hu)
    if kind == "dicom":
        out = write_series(path, ct.stored, tmp_path / "out", "key")
        np.testing.assert_array_equal(read_series(out)[0], hu)
    else:
        np.testing.assert_array_equal(read_ct(write_ct(tmp_path / f"b.{kind}", ct.stored, ct)).stored, hu)


def test_values_below_hu_that_differ_are_no_padding(tmp_path):
    hu = phantom().astype(np.int32)
    hu[0, 0, :2] = -40000, -39999
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="values -40000..399 are beyond HU"):
        read_ct(tmp_path / "a.nii")
