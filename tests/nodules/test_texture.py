"""Texture: the histogram asked for is the one obtained, the rest of the CT is untouched, the structure is the subtype's."""

import numpy as np
import pytest
from scipy import ndimage

from hrldm.config import SUBTYPES
from hrldm.nodules.histograms import choose_histogram, histogram_moments, hu_histogram
from hrldm.nodules.texture import HALO_VOXELS, texture_nodule
from tests import tiny

MASK = tiny.ball(40, 8)
DEPTH = ndimage.distance_transform_edt(MASK)


@pytest.fixture(scope="module")
def lung() -> np.ndarray:
    """Lung with noise and one vessel, int16 HU."""
    rng = np.random.default_rng(0)
    hu = -870 + 30 * ndimage.gaussian_filter(rng.standard_normal(MASK.shape), 0.6) / 0.3
    hu[18:21, 18:21, :] = 20
    return np.round(hu).astype(np.int16)


def filled(lung: np.ndarray, subtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The lung with a nodule, and the histogram asked for."""
    rng = np.random.default_rng(seed)
    target = choose_histogram(subtype, 16, rng)[1]
    return texture_nodule(lung, MASK, subtype, target, rng), target


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("subtype", SUBTYPES)
def test_the_histogram_asked_for_is_obtained(lung, subtype, seed):
    out, target = filled(lung, subtype, seed)
    error = np.abs(hu_histogram(out[MASK]) - target).sum() / 2
    assert error < 0.03  # rounding to whole HU moves a few values over a bin's edge
    assert out[MASK].mean() == pytest.approx(histogram_moments(target)[0], abs=3)


def test_background_is_bit_identical_away_from_the_lesion(lung):
    before = lung.copy()
    out, _ = filled(lung, "solid")
    far = ~ndimage.binary_dilation(MASK, iterations=HALO_VOXELS)
    assert out.dtype == lung.dtype
    np.testing.assert_array_equal(lung, before)
    np.testing.assert_array_equal(out[far], lung[far])
    assert (out[MASK] != lung[MASK]).mean() > 0.9


def test_no_seam_at_the_mask_and_at_the_halo(lung):
    """The change dies out monotonically and is nothing at the halo's end."""
    distance = ndimage.distance_transform_edt(~MASK)
    change = filled(lung, "solid")[0].astype(float) - lung
    rings = [change[(distance > a) & (distance <= a + 1)].mean() for a in range(4)]
    surface = change[MASK & (DEPTH <= 1)].mean()
    assert surface > rings[0] > rings[1] > rings[2] >= rings[3] == 0
    assert rings[0] > 0.1 * surface  # partial volume goes on beyond the mask
    assert rings[2] < 15


@pytest.mark.parametrize("seed", range(3))
def test_part_solid_has_one_core_in_a_rim(lung, seed):
    out, _ = filled(lung, "part-solid", seed)
    solid = MASK & (out > -300)
    assert np.bincount(ndimage.label(solid)[0].ravel())[1:].max() > 0.8 * solid.sum()  # one core, not crumbs
    assert out[MASK & (DEPTH > 4)].mean() > out[MASK & (DEPTH <= 2)].mean() + 150


@pytest.mark.parametrize("seed", range(3))
def test_vessels_run_through_ground_glass(lung, seed):
    out, _ = filled(lung, "ground-glass", seed)
    vessel = MASK & (lung > -200)
    assert np.median(out[vessel]) > np.percentile(out[MASK & ~vessel], 85)


def test_texture_is_spatially_correlated(lung):
    """Neighbours inside differ by much less than voxels drawn at random from the same histogram."""
    inner = ndimage.binary_erosion(MASK, iterations=2)
    out = filled(lung, "ground-glass", 4)[0].astype(float)
    neighbour = np.std((out[1:] - out[:-1])[inner[1:] & inner[:-1]])
    assert neighbour < 0.7 * np.sqrt(2) * out[inner].std()


def test_same_seed_same_voxels(lung):
    target = choose_histogram("part-solid", 16, np.random.default_rng(0))[1]
    a, b, c = (texture_nodule(lung, MASK, "part-solid", target, np.random.default_rng(s)) for s in (5, 5, 6))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subtype": "cystic"}, "unknown subtype"),
        ({"mask": np.zeros_like(MASK)}, "non-empty"),
        ({"mask": MASK[1:]}, "shaped as the background"),
        ({"histogram": np.zeros(40)}, "not all zero"),
        ({"histogram": -np.ones(40)}, "non-negative"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_requests_are_told(lung, changes, message):
    given = {"background_hu": lung, "mask": MASK, "subtype": "solid", "histogram": np.ones(40)} | changes
    with pytest.raises(ValueError, match=message):
        texture_nodule(**given, rng=np.random.default_rng(0))
