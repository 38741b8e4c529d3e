"""CT input and output: geometry and stored values survive every round trip; DICOM agrees with pydicom's own reading."""

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

from hrldm.ct.geometry import crop_affine, resample, sample, to_world
from hrldm.ct.volume import CT, from_ras, read_ct, to_ras, write_nifti


def phantom(shape=(17, 15, 22), dtype=np.int16, seed=0):
    """Values of a chest CT: air, lung and soft tissue at random."""
    return np.random.default_rng(seed).integers(-1024, 400, shape).astype(dtype)


@st.composite
def affines(draw):
    """Any voxel order and obliquity, 0.4-4 mm voxels."""
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    spacing = draw(st.tuples(*[st.floats(0.4, 4.0)] * 3))
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-40.0, 40.0)] * 3)), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, order] @ np.diag(np.multiply(signs, spacing))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-400.0, 400.0)] * 3))
    return affine


@given(affine=affines(), shape=st.tuples(*[st.integers(1, 7)] * 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_to_ras_is_exact_keeps_world_positions_and_is_undone(affine, shape, seed):
    ct = CT(phantom(shape, seed=seed), affine)
    ras = to_ras(ct)
    assert nib.aff2axcodes(ras.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(from_ras(ras.array, ct), ct.array)
    index = np.array([np.random.default_rng(seed).integers(n) for n in shape])  # the same place has the same value
    there = to_world(np.linalg.inv(ras.affine), to_world(affine, index))
    np.testing.assert_allclose(there, np.rint(there), atol=1e-6)
    assert ras.array[tuple(np.rint(there).astype(int))] == ct.array[tuple(index)]


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
    np.testing.assert_allclose(ct.array, stored * slope + inter)
    write_nifti(folder / "b.nii.gz", ct.stored, ct)
    assert gzip.decompress((folder / "a.nii.gz").read_bytes()) == gzip.decompress((folder / "b.nii.gz").read_bytes())


def test_slope_of_a_uint16_file_is_applied_and_stored_values_kept(tmp_path):
    stored = np.arange(27, dtype=np.uint16).reshape(3, 3, 3) * 100
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1.0, -1024.0)
    nib.save(image, tmp_path / "u.nii")
    ct = read_ct(tmp_path / "u.nii", min_slices=1)
    assert ct.stored.dtype == np.uint16 and ct.array.dtype == np.float32
    np.testing.assert_array_equal(ct.stored, stored)
    np.testing.assert_array_equal(ct.array, stored.astype(float) - 1024)
    np.testing.assert_array_equal(ct.array, nib.load(tmp_path / "u.nii").get_fdata())


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
    assert "thick.nii.gz" in caplog.text and "5.0 mm slices" in caplog.text


# -- resampling --------------------------------------------------------------------------------------------------------


@given(affine=affines())
@settings(max_examples=25, deadline=None)
def test_linear_sampling_reproduces_a_linear_field_in_world_space(affine):
    """A field linear in world mm is a fixed point of linear interpolation, whatever the two grids."""
    slope = np.array([2.0, -3.0, 5.0])
    index = np.stack(np.indices((20, 20, 20)), -1)
    field = to_world(affine, index) @ slope
    shape = (3, 4, 5)
    target = crop_affine(to_world(affine, np.array([9.5, 9.5, 9.5])), shape, spacing=0.5)
    expected = to_world(target, np.stack(np.indices(shape), -1)) @ slope
    np.testing.assert_allclose(sample(field, affine, shape, target), expected, atol=1e-2)


def test_resample_keeps_field_of_view_and_identity():
    affine = np.array([[-0.7, 0, 0, 90], [0, 0, 2.5, -4], [0, 0.7, 0, 7], [0, 0, 0, 1.0]])
    array = phantom((40, 30, 12))
    out, grid = resample(array, affine, 1.0)
    assert out.shape == (28, 21, 30) and out.dtype == np.float32
    centre = [to_world(a, (np.array(s) - 1) / 2) for a, s in ((affine, array.shape), (grid, out.shape))]
    np.testing.assert_allclose(*centre, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), 1)
    same, grid = resample(array, np.diag([-1, 1, 1, 1.0]), 1.0)
    np.testing.assert_array_equal(same, array)
    mask, _ = resample(array > 0, affine, 1.0, order=0)
    assert mask.dtype == bool


def test_resample_matches_simpleitk():
    array = np.random.default_rng(3).normal(size=(20, 18, 10)).astype(np.float32)
    out, grid = resample(array, np.diag([0.7, 0.8, 2.5, 1]), 1.0)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((0.7, 0.8, 2.5))
    reference = sitk.Resample(image, out.shape, sitk.Transform(), sitk.sitkLinear, grid[:3, 3], (1, 1, 1))
    inner = (slice(1, -1),) * 3  # the two treat what lies beyond the last voxel centre differently
    np.testing.assert_allclose(out[inner], sitk.GetArrayFromImage(reference).transpose(2, 1, 0)[inner], atol=1e-5)


def test_crop_affine_puts_the_middle_voxel_at_the_centre():
    affine = crop_affine(np.array([10.0, -20.0, 30.0]), (48, 48, 33), spacing=0.5)
    np.testing.assert_allclose(to_world(affine, np.array([24, 24, 16])), [10, -20, 30])


# -- DICOM -------------------------------------------------------------------------------------------------------------


def dicom_series(folder, direction, spacing, origin, compressor=None, slope=1.0):
    """A CT series written by SimpleITK, slices in shuffled file order; returns its HU (X, Y, Z)."""
    hu = phantom((12, 10, 21), seed=5)
    hu = hu if slope == 1.0 else (hu // 2 * 2).astype(np.int16)
    folder.mkdir()
    for k, name in enumerate(np.random.default_rng(0).permutation(hu.shape[2])):
        plane = sitk.GetImageFromArray(hu[:, :, k].T[None])
        plane.SetSpacing(spacing)
        plane.SetDirection(direction.ravel())
        place = origin + direction[:, 2] * spacing[2] * k
        plane.SetOrigin(place)
        tags = {
            "0008|0060": "CT", "0008|0008": r"DERIVED\SECONDARY", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3",
            "0020|0032": "\\".join(f"{v:.6f}" for v in place), "0018|0050": str(spacing[2]),
            "0020|0037": "\\".join(f"{v:.9f}" for v in direction[:, :2].T.ravel()),
            "0028|1052": "-1024", "0028|1053": str(slope),
        }  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        if compressor:
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / f"{name:03d}.dcm"))
        writer.Execute(plane)
    (folder / "LICENSE.txt").write_text("not an image")
    return hu


@pytest.mark.parametrize("compressor", [None, "JPEG2000"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -10, 15), (90, 0, 0)])
def test_dicom_series_in_any_orientation(tmp_path, angles, compressor):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    origin, spacing = np.array([-50.0, 30.0, 12.0]), (0.7, 0.8, 1.25)
    hu = dicom_series(tmp_path / "series", turn, spacing, origin, compressor)
    compressed = {
        pydicom.dcmread(f).file_meta.TransferSyntaxUID.is_compressed for f in (tmp_path / "series").glob("*.dcm")
    }
    assert compressed == {compressor is not None}
    ct = read_ct(tmp_path / "series", min_slices=1)
    np.testing.assert_array_equal(ct.array, hu)
    assert ct.array.dtype == np.int16 and ct.provenance["SeriesInstanceUID"] == "1.2.3.4"
    np.testing.assert_allclose(ct.spacing, spacing, rtol=1e-5)
    lps = origin + turn @ (np.array(spacing) * [3, 4, 5])
    np.testing.assert_allclose(to_world(ct.affine, np.array([3, 4, 5])), lps * [-1, -1, 1], atol=1e-3)


def test_dicom_values_agree_with_pydicom(tmp_path):
    dicom_series(tmp_path / "s", np.eye(3), (1.0, 1.0, 2.0), np.zeros(3), slope=2.0)
    ct = read_ct(tmp_path / "s")
    for file in (tmp_path / "s").glob("*.dcm"):
        header = pydicom.dcmread(file)
        assert header.RescaleSlope == 2
        k = round(header.ImagePositionPatient[2] / 2)
        expected = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
        np.testing.assert_array_equal(ct.array[:, :, k], expected.T)


def test_zip_equals_folder_and_becomes_nifti(tmp_path):
    hu = dicom_series(tmp_path / "s", np.eye(3), (1.0, 1.0, 2.0), np.zeros(3))
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
