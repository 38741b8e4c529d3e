"""CT input and output: geometry and stored values survive every round trip, and other programs read the same.

DICOM values are compared with pydicom's own reading in test_fuzz.py.
"""

import gzip
import logging
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import to_world
from hrldm.ct.volume import CT, from_ras, read_ct, to_ras, write_nifti
from tests.ct.test_geometry import affines


def phantom(shape=(17, 15, 22), seed=0):
    """Values of a chest CT: air, lung and soft tissue at random."""
    return np.random.default_rng(seed).integers(-1024, 400, shape).astype(np.int16)


@given(affine=affines(), dtype=st.sampled_from([np.int16, np.uint16, np.int32, np.float32, np.float64]))
@settings(max_examples=25, deadline=None)
def test_nifti_round_trip_keeps_values_dtype_affine_and_header(tmp_path_factory, affine, dtype):
    folder = tmp_path_factory.mktemp("trip")
    slope, inter = (0.5, -1024.0) if dtype == np.uint16 else (1.0, 0.0)
    stored = np.random.default_rng(1).integers(0, 3000, (6, 5, 4)).astype(dtype)
    stored = stored if dtype == np.uint16 else stored - dtype(1024)
    image = nib.Nifti1Image(stored, affine)
    image.header["descrip"] = b"from the scanner"
    image.header["cal_max"] = 400
    image.header.set_slope_inter(slope, inter)
    nib.save(image, folder / "a.nii.gz")
    ct = read_ct(folder / "a.nii.gz", min_slices=1)
    assert ct.stored.dtype == dtype and (ct.stored == stored).all()
    np.testing.assert_array_equal(ct.array, nib.load(folder / "a.nii.gz").get_fdata())
    np.testing.assert_array_equal(ct.array, stored * slope + inter)
    write_nifti(folder / "b.nii.gz", ct.stored, ct)
    assert gzip.decompress((folder / "a.nii.gz").read_bytes()) == gzip.decompress((folder / "b.nii.gz").read_bytes())


def test_big_endian_and_trailing_axis_come_back_as_they_were(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(phantom()[..., None], np.diag([1, 1, 2, 1]), header), tmp_path / "a.nii")
    ct = read_ct(tmp_path / "a.nii")
    assert ct.stored.dtype.isnative and ct.shape == (17, 15, 22)
    write_nifti(tmp_path / "b.nii", ct.stored, ct)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_a_new_file_is_read_alike_by_simpleitk(tmp_path):
    """Independent reader: same voxel, same place (LPS there, RAS here)."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix() @ np.diag([0.7, 0.8, 2.5])
    affine[:3, 3] = [-100, 50, 20]
    ct = CT(phantom(), affine)
    image = sitk.ReadImage(str(write_nifti(tmp_path / "n.nii.gz", ct.stored, ct)))
    for index in ((0, 0, 0), (16, 3, 21)):
        assert image.GetPixel(*index) == ct.array[index]
        place = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(place, to_world(affine, index), atol=1e-3)


def test_thick_slices_are_warned_about_and_crops_allowed(tmp_path, caplog):
    nib.save(nib.Nifti1Image(phantom((9, 9, 4)), np.diag([1, 1, 5, 1])), tmp_path / "thick.nii.gz")
    with caplog.at_level(logging.WARNING):
        read_ct(tmp_path / "thick.nii.gz", min_slices=4)
    assert "thick.nii.gz" in caplog.text and "slices of 5.0 mm: nodules smaller than two slices" in caplog.text


# -- DICOM -------------------------------------------------------------------------------------------------------------

ORIGIN, SPACING = np.array([-50.0, 30.0, 12.0]), (0.7, 0.8, 1.25)


def dicom_series(folder, turn, compressor=None):
    """A CT series written by SimpleITK, slices in shuffled file order; returns its HU (X, Y, Z)."""
    hu = phantom((12, 10, 21), seed=5)
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    if compressor:
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
    for k, name in enumerate(np.random.default_rng(0).permutation(hu.shape[2])):
        place = ORIGIN + turn[:, 2] * SPACING[2] * k
        plane = sitk.GetImageFromArray(hu[:, :, k].T[None])
        plane.SetSpacing(SPACING)
        plane.SetDirection(turn.ravel())
        plane.SetOrigin(place)
        tags = {
            "0008|0060": "CT", "0008|0008": r"DERIVED\SECONDARY", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3",
            "0020|0032": "\\".join(f"{v:.6f}" for v in place), "0018|0050": str(SPACING[2]),
            "0020|0037": "\\".join(f"{v:.9f}" for v in turn[:, :2].T.ravel()), "0028|1052": "-1024", "0028|1053": "1",
        }  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{name:03d}.dcm"))
        writer.Execute(plane)
    (folder / "LICENSE.txt").write_text("not an image")
    return hu


@pytest.mark.parametrize("compressor", [None, "JPEG2000"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -10, 15), (90, 0, 0)])
def test_dicom_series_in_any_orientation(tmp_path, angles, compressor):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    hu = dicom_series(tmp_path / "s", turn, compressor)
    syntaxes = {pydicom.dcmread(f).file_meta.TransferSyntaxUID for f in (tmp_path / "s").glob("*.dcm")}
    assert {syntax.is_compressed for syntax in syntaxes} == {compressor is not None}
    ct = read_ct(tmp_path / "s", min_slices=1)
    np.testing.assert_array_equal(ct.array, hu)
    assert ct.array.dtype == np.int16 and ct.provenance["SeriesInstanceUID"] == "1.2.3.4"
    np.testing.assert_allclose(ct.spacing, SPACING, rtol=1e-5)
    lps = ORIGIN + turn @ (np.array(SPACING) * [3, 4, 5])
    np.testing.assert_allclose(to_world(ct.affine, np.array([3, 4, 5])), lps * [-1, -1, 1], atol=1e-3)


def test_zip_equals_folder_and_becomes_nifti(tmp_path):
    hu = dicom_series(tmp_path / "s", np.eye(3))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in (tmp_path / "s").iterdir():
            archive.write(file, f"inner/{file.name}")
    ct = read_ct(tmp_path / "s.zip")
    np.testing.assert_array_equal(ct.array, hu)
    again = read_ct(write_nifti(tmp_path / "s.nii.gz", ct.stored, ct))
    np.testing.assert_array_equal(again.array, hu)
    np.testing.assert_allclose(again.affine, ct.affine, atol=1e-4)


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["lidc-cubes", "lidc-vois"])  # sform only and qform only, LPS and RAS
def test_real_round_trip_is_byte_identical(shared_data, tmp_path, folder):
    for source in sorted((shared_data / folder / "images").iterdir())[::40]:
        ct = read_ct(source, min_slices=1)
        copy = write_nifti(tmp_path / source.name, ct.stored, ct)
        assert gzip.decompress(source.read_bytes()) == gzip.decompress(copy.read_bytes())
        np.testing.assert_array_equal(from_ras(to_ras(ct).array, ct), ct.array)
