"""Grids: voxel orders, and sampling on other grids."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import crop_affine, resample, sample, to_world, voxel_size
from hrldm.ct.volume import CT, from_ras, to_ras


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
    rng = np.random.default_rng(seed)
    ct = CT(rng.integers(-1024, 400, shape).astype(np.int16), affine)
    ras = to_ras(ct)
    assert nib.aff2axcodes(ras.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(from_ras(ras.array, ct), ct.array)
    index = rng.integers(shape)  # the same place has the same value
    there = to_world(np.linalg.inv(ras.affine), to_world(affine, index))
    np.testing.assert_allclose(there, np.rint(there), atol=1e-6)
    assert ras.array[tuple(np.rint(there).astype(int))] == ct.array[tuple(index)]


@given(affine=affines())
@settings(max_examples=25, deadline=None)
def test_linear_sampling_reproduces_a_linear_field_in_world_space(affine):
    """A field linear in world mm is a fixed point of linear interpolation, whatever the two grids."""
    slope = np.array([2.0, -3.0, 5.0])
    field = to_world(affine, np.stack(np.indices((20, 20, 20)), -1)) @ slope
    shape = (3, 4, 5)
    target = crop_affine(to_world(affine, np.array([9.5, 9.5, 9.5])), shape) @ np.diag([0.5, 0.5, 0.5, 1.0])
    expected = to_world(target, np.stack(np.indices(shape), -1)) @ slope
    np.testing.assert_allclose(sample(field, affine, shape, target), expected, atol=1e-2)


@pytest.mark.parametrize("outside", [None, 0.0])
@pytest.mark.parametrize("order", [0, 1])
@given(affine=affines(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_sampling_on_a_parallel_grid_is_that_of_scipy(outside, order, affine, data):
    """Cut out, enlarged, mirrored or wholly beyond the array."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    array = rng.integers(-1000, 400, rng.integers(3, 15, 3)).astype(np.int16)
    shape = tuple(rng.integers(1, 20, 3).tolist())
    scale = rng.uniform(0.3, 3, 3) * rng.choice([-1, 1], 3)
    within = np.diag([*scale, 1.0])
    within[:3, 3] = rng.uniform(-12, 24, 3)
    got = sample(array, affine, shape, affine @ within, order, outside)
    beyond = {"mode": "nearest"} if outside is None else {"mode": "grid-constant", "cval": outside}
    wanted = ndimage.affine_transform(array.astype(np.float32), scale, within[:3, 3], shape, order=order, **beyond)
    assert got.dtype == (np.float32 if order else np.int16)
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_a_label_reaches_to_the_edge_of_its_voxel_and_no_further():
    labels = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    affine[:3, 3] = (-30.0, 12.7, -163.3)
    for shift, same in ((1e-6, True), (-1e-6, True), (0.4, True), (-0.4, True), (0.6, False)):
        target = affine.copy()
        target[:3, 3] += shift * np.array([0.7, 0.7, 2.5])
        got = sample(labels, affine, labels.shape, target, order=0, outside=0)
        assert (got == labels).all() == same
    assert got[2].max() == got[:, 2].max() == got[:, :, 2].max() == 0 and (got[:2, :2, :2] == labels[1:, 1:, 1:]).all()


def test_resample_keeps_field_of_view_and_identity():
    affine = np.array([[-0.7, 0, 0, 90], [0, 0, 2.5, -4], [0, 0.7, 0, 7], [0, 0, 0, 1.0]])
    array = np.random.default_rng(0).integers(-1024, 400, (40, 30, 12)).astype(np.int16)
    out, grid = resample(array, affine, 1.0)
    assert out.shape == (28, 21, 30) and out.dtype == np.float32
    centre = [to_world(a, (np.array(s) - 1) / 2) for a, s in ((affine, array.shape), (grid, out.shape))]
    np.testing.assert_allclose(*centre, atol=1e-9)
    np.testing.assert_allclose(voxel_size(grid), 1)
    np.testing.assert_array_equal(resample(array, np.diag([-1, 1, 1, 1.0]), 1.0)[0], array)


def test_resample_matches_simpleitk():
    array = np.random.default_rng(3).normal(size=(20, 18, 10)).astype(np.float32)
    out, grid = resample(array, np.diag([0.7, 0.8, 2.5, 1]), 1.0)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((0.7, 0.8, 2.5))
    reference = sitk.Resample(image, out.shape, sitk.Transform(), sitk.sitkLinear, grid[:3, 3], (1, 1, 1))
    inner = (slice(1, -1),) * 3  # the two treat what lies beyond the last voxel centre differently
    np.testing.assert_allclose(out[inner], sitk.GetArrayFromImage(reference).transpose(2, 1, 0)[inner], atol=1e-5)


def test_crop_affine_puts_the_middle_voxel_at_the_centre():
    affine = crop_affine(np.array([10.0, -20.0, 30.0]), (48, 48, 33))
    np.testing.assert_allclose(to_world(affine, np.array([24, 24, 16])), [10, -20, 30])
