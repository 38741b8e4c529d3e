"""Texture: the histogram asked for is the one obtained, the rest of the CT is untouched, the structure is the subtype's."""

import numpy as np
import pytest
from scipy import ndimage

from hrldm.config import SUBTYPES
from hrldm.nodules.histograms import quantiles
from hrldm.nodules.texture import (
    HALO_VOXELS,
    choose_histogram,
    histogram_library,
    lung_floor,
    size_bin,
    texture_nodule,
    with_solid_share,
)

EDGES = np.linspace(-1000, 400, 41)


@pytest.fixture(scope="module")
def scene():
    """Lung with noise and one vessel (int16 HU, 40^3), and a ball of 8 mm radius."""
    rng = np.random.default_rng(0)
    lung = -870 + 30 * ndimage.gaussian_filter(rng.standard_normal((40, 40, 40)), 0.6) / 0.3
    lung[18:21, 18:21, :] = 20
    mask = sum((g - 20) ** 2 for g in np.indices(lung.shape)) <= 8**2
    return np.round(lung).astype(np.int16), mask


def histogram_of(values):
    return np.histogram(np.clip(values, -1000, 400), EDGES)[0] / values.size


def test_quantiles_have_the_histogram():
    histogram = np.zeros(40)
    histogram[[3, 10, 11, 39]] = 0.1, 0.4, 0.25, 0.25
    np.testing.assert_allclose(histogram_of(quantiles(histogram, 4000)), histogram, atol=3e-4)
    assert (np.diff(quantiles(histogram, 4000)) >= 0).all()


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_the_histogram_asked_for_is_obtained(scene, subtype):
    lung, mask = scene
    for seed in range(3):
        _, target = choose_histogram(subtype, 16, np.random.default_rng(seed))
        out = texture_nodule(lung, mask, subtype, target, np.random.default_rng(seed))
        error = np.abs(histogram_of(out[mask]) - target).sum() / 2
        assert error < 0.03  # rounding to whole HU moves a few values over a bin's edge
        assert out[mask].mean() == pytest.approx(target @ (EDGES[1:] + EDGES[:-1]) / 2, abs=3)


def test_background_is_bit_identical_away_from_the_lesion(scene):
    lung, mask = scene
    before = lung.copy()
    out = texture_nodule(
        lung, mask, "solid", choose_histogram("solid", 16, np.random.default_rng(0))[1], np.random.default_rng(0)
    )
    far = ~ndimage.binary_dilation(mask, iterations=HALO_VOXELS)
    assert out.dtype == lung.dtype
    assert (lung == before).all()
    assert (out[far] == lung[far]).all()
    assert (out[mask] != lung[mask]).mean() > 0.9


def test_no_seam_at_the_mask_and_at_the_halo(scene):
    """The change dies out monotonically and is nothing at the halo's end."""
    lung, mask = scene
    distance = ndimage.distance_transform_edt(~mask)
    _, target = choose_histogram("solid", 16, np.random.default_rng(0))
    change = texture_nodule(lung, mask, "solid", target, np.random.default_rng(0)).astype(float) - lung
    rings = [change[(distance > a) & (distance <= a + 1)].mean() for a in range(4)]
    surface = change[mask & (ndimage.distance_transform_edt(mask) <= 1)].mean()
    assert surface > rings[0] > rings[1] > rings[2] >= rings[3] == 0
    assert rings[0] > 0.1 * surface  # partial volume goes on beyond the mask
    assert rings[2] < 15


def test_part_solid_has_a_core_in_a_rim_and_vessels_run_through_ground_glass(scene):
    lung, mask = scene
    depth = ndimage.distance_transform_edt(mask)
    vessel = mask & (lung > -200)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        out = texture_nodule(lung, mask, "part-solid", choose_histogram("part-solid", 16, rng)[1], rng)
        core = ndimage.label(mask & (out > -300))[0]
        largest = np.bincount(core.ravel())[1:].max()
        assert largest > 0.8 * (mask & (out > -300)).sum()  # one core, not crumbs
        assert out[mask & (depth > 4)].mean() > out[mask & (depth <= 2)].mean() + 150
        out = texture_nodule(lung, mask, "ground-glass", choose_histogram("ground-glass", 16, rng)[1], rng)
        assert np.median(out[vessel]) > np.percentile(out[mask & ~vessel], 85)


def test_texture_is_spatially_correlated(scene):
    """Neighbours inside differ by much less than voxels drawn at random from the same histogram."""
    lung, mask = scene
    inner = ndimage.binary_erosion(mask, iterations=2)
    _, target = choose_histogram("ground-glass", 16, np.random.default_rng(4))
    out = texture_nodule(lung, mask, "ground-glass", target, np.random.default_rng(4)).astype(float)
    both = inner[1:] & inner[:-1]
    neighbour = np.std((out[1:] - out[:-1])[both])
    assert neighbour < 0.7 * np.sqrt(2) * out[inner].std()


def test_same_seed_same_voxels(scene):
    lung, mask = scene
    _, target = choose_histogram("part-solid", 16, np.random.default_rng(0))
    a, b, c = (texture_nodule(lung, mask, "part-solid", target, np.random.default_rng(s)) for s in (5, 5, 6))
    assert (a == b).all() and (a != c).any()


def test_histogram_library_is_real_and_ordered():
    table = histogram_library()
    bins = table.filter(regex=r"^b\d\d$").to_numpy()
    np.testing.assert_allclose(bins.sum(1), 1)
    means = table.groupby("subtype").mean_hu.mean()
    assert means["ground-glass"] < means["part-solid"] < means["solid"]
    clipped = bins @ (EDGES[1:] + EDGES[:-1]) / 2
    inside = table.sd_hu < 350  # those without metal or calcium, whose HU leave the bins' range
    assert np.abs(clipped - table.mean_hu)[inside].median() < 3
    assert table.groupby("subtype").mean_hu.std().min() > 40  # the variety of real nodules is kept
    assert [size_bin(d) for d in (4, 6, 9.9, 10.1, 19, 25, 40)] == [0, 0, 0, 1, 1, 2, 2]


def test_bad_requests_are_told(scene):
    lung, mask = scene
    target, rng = np.ones(40), np.random.default_rng(0)
    for bad, message in (
        ((lung, mask, "cystic", target), "unknown subtype"),
        ((lung, np.zeros_like(mask), "solid", target), "non-empty"),
        ((lung, mask[1:], "solid", target), "shaped as the background"),
        ((lung, mask, "solid", np.zeros(40)), "not all zero"),
        ((lung, mask, "solid", -target), "non-negative"),
    ):
        with pytest.raises(ValueError, match=message):
            texture_nodule(*bad, rng)
    with pytest.raises(ValueError, match="no histogram of subtype"):
        choose_histogram("cystic", 10, rng)


def test_lung_floor_is_read_off_the_air_about_the_lesion():
    crop = np.full((12, 12, 12), -860.0)
    crop[4:8, 4:8, 4:8] = -980.0
    lesion = crop == -980.0
    assert lung_floor(crop, ~lesion) == -890.0
    crop[6:] = 40.0  # chest wall beside it
    assert lung_floor(crop) == -890.0


def test_solid_share_is_set_and_each_side_keeps_its_form():
    h = np.zeros(40)
    h[[5, 10, 30, 35]] = [0.3, 0.3, 0.3, 0.1]
    out = with_solid_share(h, 0.8)
    np.testing.assert_allclose(out[[5, 10, 30, 35]], [0.1, 0.1, 0.6, 0.2])
    with pytest.raises(ValueError, match="nothing above -300 HU"):
        with_solid_share(np.eye(40)[5], 0.5)
