"""Only the feathered lesion changes, in any orientation and spacing (in any file: `test_any_scan`)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import crop_affine, sample, to_world
from hrldm.ct.volume import CT
from hrldm.insertion.blend import MARGIN_SIGMAS, blended, feather


def ball(shape, radius):
    """A ball around the middle voxel (n // 2) and each voxel's distance from there."""
    distance = np.linalg.norm(np.stack(np.indices(shape), -1) - np.array(shape) // 2, axis=-1)
    return distance <= radius, distance


def lung_ct(shape=(40, 36, 30), affine=None, seed=0, **kwargs):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0) * 300
    return CT(np.rint(noise - 850).astype(np.int16), np.eye(4) if affine is None else affine, **kwargs)


def oblique(spacing, angles, order=(0, 1, 2), signs=(1, 1, 1)):
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.eye(3)[:, order] @ np.diag(np.multiply(signs, spacing))
    affine[:3, 3] = [-30, 40, -200]
    return affine


# -- feather -----------------------------------------------------------------------------------------------------------


def test_feather_follows_its_formula_at_brute_force_distances():
    spacing, sigma = np.array([0.7, 1.0, 2.5]), 1.2
    mask = np.random.default_rng(1).random((13, 11, 9)) < 0.01
    w = feather(mask, sigma, spacing)
    inside = np.argwhere(mask) * spacing
    places = np.stack(np.indices(mask.shape), -1) * spacing
    d = np.linalg.norm(places[..., None, :] - inside, axis=-1).min(-1)
    end = np.exp(-(MARGIN_SIGMAS**2) / 2)
    expected = np.where(d < MARGIN_SIGMAS * sigma, (np.exp(-(d**2) / (2 * sigma**2)) - end) / (1 - end), 0)
    np.testing.assert_allclose(w, expected, atol=1e-6)
    assert (w[mask] == 1).all() and (w[d >= MARGIN_SIGMAS * sigma] == 0).all() and (w[d < 3 * sigma - 0.1] > 0).all()


def test_feather_zero_is_the_mask_and_bad_arguments_are_refused():
    mask, _ = ball((9, 9, 9), 3)
    np.testing.assert_array_equal(feather(mask, 0, 1.0), mask)
    with pytest.raises(ValueError, match="empty mask.*give the nodule's mask"):
        feather(np.zeros((4, 4, 4), bool), 1, 1)
    for sigma in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="sigma_mm"):
            feather(mask, sigma, 1.0)


def paste(ct: CT, *lesion, **options) -> np.ndarray:
    """All stored values of the CT with the lesion in them."""
    out = ct.stored.copy()
    box, values = blended(ct, *lesion, **options)
    out[box] = values
    return out


# -- paste -------------------------------------------------------------------------------------------------------------


def test_on_a_common_grid_the_result_is_the_formula():
    ct = lung_ct()
    mask, _ = ball(ct.shape, 6)
    generated = np.random.default_rng(2).normal(0, 50, ct.shape)
    out = paste(ct, generated, ct.affine, mask, sigma_mm=1.5)
    w = feather(mask, 1.5, 1.0).astype(float)
    expected = ct.array + w * (generated - ct.array)
    np.testing.assert_allclose(out[w > 1e-4], expected[w > 1e-4], atol=0.51)  # rounded to int16
    np.testing.assert_array_equal(out[w == 0], ct.stored[w == 0])
    np.testing.assert_array_equal(out[mask], np.rint(generated[mask].astype(np.float32)))


@given(
    angles=st.tuples(*[st.floats(-30, 30)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    spacing=st.tuples(*[st.floats(0.6, 1.2)] * 3),
)
@settings(max_examples=15, deadline=None)
def test_lesion_lands_at_its_world_place_with_its_size(angles, order, signs, spacing):
    """A smooth blob on a 1 mm RAS crop: mass and centre of what was added are the blob's, in any geometry."""
    affine = oblique(spacing, angles, order, signs)
    ct = CT(np.full((48, 48, 48), -850.0) + lung_ct((48, 48, 48)).array * 0.1, affine)
    shape, centre = (32, 32, 32), to_world(affine, np.array([23.3, 24.1, 24.6]))
    grid = crop_affine(centre, shape)
    mask, distance = ball(shape, 9)
    bump = 900 * np.exp(-(distance**2) / (2 * 2.5**2))
    before = sample(ct.array, ct.affine, shape, grid)
    added = paste(ct, before + bump, grid, mask) - ct.stored
    mass = added.sum() * np.prod(spacing)
    assert mass == pytest.approx(bump.sum(), rel=0.02)
    place = to_world(affine, np.stack(np.indices(ct.shape), -1))
    np.testing.assert_allclose((added[..., None] * place).sum((0, 1, 2)) / added.sum(), centre, atol=0.1)
    assert added.max() == pytest.approx(900, rel=0.12)


def test_nothing_generated_changes_nothing_and_keeps_fine_texture():
    ct = lung_ct(affine=oblique((0.7, 0.7, 1.25), (3, 4, 5)))
    shape = (24, 24, 24)
    grid = crop_affine(to_world(ct.affine, np.array([20, 18, 15])), shape)
    mask, _ = ball(shape, 6)
    out = paste(ct, sample(ct.array, ct.affine, shape, grid), grid, mask)
    np.testing.assert_array_equal(out, ct.stored)


def test_thick_slices_get_the_mean_of_what_they_hold():
    """1 mm crop, 4 mm slices: mass is kept although the slice centres may miss the lesion's middle."""
    ct = CT(np.full((30, 30, 12), -850.0), np.diag([1, 1, 4, 1.0]))
    shape = (24, 24, 24)
    mask, _ = ball(shape, 4)
    for z in (20.0, 21.0, 22.0):
        grid = crop_affine(np.array([15.0, 15.0, z]), shape)
        added = paste(ct, np.full(shape, 50.0), grid, mask) - ct.stored
        expected = feather(mask, 1.0, 1.0).sum() * 900
        assert added.sum() * 4 == pytest.approx(expected, rel=0.02)


def test_integer_overflow_is_clipped_and_the_original_not_written_to():
    ct = CT(np.full((20, 20, 20), -1000, np.int16), np.eye(4), np.full((20, 20, 20), 24, np.uint16), 1.0, -1024.0)
    mask, _ = ball(ct.shape, 3)
    out = paste(ct, np.full(ct.shape, -5000.0), ct.affine, mask)
    assert out[10, 10, 10] == 0 and (ct.stored == 24).all()


# -- bad input ---------------------------------------------------------------------------------------------------------

SMALL = (16, 16, 16)
INSIDE, BESIDE, JUST_BESIDE = (20.0, 18.0, 15.0), (500.0, 0.0, 0.0), (-6.2, 18.0, 15.0)


@pytest.mark.parametrize(
    ("generated", "mask", "at", "message"),
    [
        (np.full(SMALL, np.nan), ball(SMALL, 3)[0], INSIDE, "scan.nii.gz.*NaN or infinite values.*another seed"),
        (
            np.zeros((16, 16, 15)),
            ball(SMALL, 3)[0],
            INSIDE,
            r"scan.nii.gz: mask \(16, 16, 16\).*\(16, 16, 15\).*one 3D grid",
        ),
        (np.zeros(SMALL), np.zeros(SMALL, bool), INSIDE, "empty mask.*give the nodule's mask"),
        (np.zeros(SMALL), ball(SMALL, 3)[0], BESIDE, "scan.nii.gz.*outside the CT.*place it inside"),
        (np.zeros(SMALL), ball(SMALL, 3)[0], JUST_BESIDE, "scan.nii.gz.*outside the CT.*place it inside"),
        (np.zeros(SMALL), ball(SMALL, 7)[0], INSIDE, "scan.nii.gz.*edge of the generated crop cuts.*larger crop"),
    ],
    ids=["NaN", "two grids", "empty", "far outside", "outside by less than a voxel", "cut by the crop"],
)
def test_bad_input_is_named_with_file_fault_and_remedy(generated, mask, at, message):
    ct = lung_ct(source="scan.nii.gz")
    before = ct.stored.copy()
    with pytest.raises(ValueError, match=message):
        blended(ct, generated, crop_affine(np.array(at), SMALL), mask)
    np.testing.assert_array_equal(ct.stored, before)


def test_a_lesion_at_the_ct_border_may_be_cut_by_it():
    """The crop's face coincides with the CT's own: no step inside the image, so it is allowed."""
    ct = lung_ct((20, 20, 20))
    mask = np.zeros(ct.shape, bool)
    mask[:4, 8:12, 8:12] = True
    out = paste(ct, np.zeros(ct.shape), ct.affine, mask)
    assert (out[mask] == 0).all()
