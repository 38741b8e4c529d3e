"""Placement on a phantom of known geometry: two balls of lung in soft tissue, one vessel, one airway."""

import numpy as np
import pytest
from scipy import ndimage

from hrldm.nodules.positions import LungMap, PlacementReport, depth_mm, sample_positions

SHAPE = (90, 60, 60)


def ball(center, radius, shape=SHAPE):
    return sum((g - c) ** 2 for g, c in zip(np.indices(shape), center, strict=True)) <= radius**2


@pytest.fixture(scope="module")
def chest():
    """HU and lobes: left lung = 10 (vessel through it), right lung = 12 (airway in it)."""
    hu = np.full(SHAPE, 50, np.int16)
    lobes = np.zeros(SHAPE, np.uint8)
    for label, center in ((10, (22, 30, 30)), (12, (67, 30, 30))):
        lobes[ball(center, 20)] = label
    hu[lobes > 0] = -860
    hu[20:25, 28:33, 10:51] = 40
    hu[ball((67, 30, 30), 5)] = -1010
    return hu, lobes


@pytest.fixture(scope="module")
def lesion():
    return ball((6, 6, 6), 4, (13, 13, 13))


def voxels(position, mask):
    full = np.zeros(SHAPE, bool)
    full[tuple(slice(c - n // 2, c - n // 2 + n) for c, n in zip(position.center, mask.shape, strict=True))] = mask
    return full


@pytest.mark.parametrize("location", ["inner", "subpleural"])
def test_positions_lie_where_asked(chest, lesion, location):
    hu, lobes = chest
    found, report = sample_positions(hu, lobes, lesion, 6, np.random.default_rng(1), location=location, lobe=12)
    depth = ndimage.distance_transform_edt(lobes > 0)
    taken = np.zeros(SHAPE, int)
    for position in found:
        here = voxels(position, lesion)
        assert here.sum() == lesion.sum()
        assert (lobes[here] == 12).all()
        assert lobes[position.center] == position.lobe == 12
        assert depth[here].min() >= 5 if location == "inner" else depth[here].min() <= 3
        assert (hu[here] < -985).mean() <= 0.05
        taken += here
    assert taken.max() == 1  # no overlap
    assert report.accepted == 6 and report.tried == 6 + sum(report.rejected.values())


def test_vessel_airway_and_occupied_places_are_refused(chest, lesion):
    hu, lobes = chest
    rng = np.random.default_rng(0)
    found, report = sample_positions(hu, lobes, lesion, 4, rng, lobe=10, max_vessel=0.0)
    assert report.rejected["vessel"] > 0
    assert all((hu[voxels(p, lesion)] < 0).all() for p in found)
    _, report = sample_positions(hu, lobes, lesion, 4, rng, lobe=12, max_airway=0.0)
    assert report.rejected["airway"] > 0
    occupied = np.zeros(SHAPE, bool)
    occupied[:, :30] = True
    found, report = sample_positions(hu, lobes, lesion, 4, rng, occupied=occupied)
    assert report.rejected["existing lesion"] > 0
    assert not any((voxels(p, lesion) & occupied).any() for p in found)


def test_allowed_centres_and_seed(chest, lesion):
    hu, lobes = chest
    allowed = np.zeros(SHAPE, bool)
    allowed[:30] = True
    lung_map = LungMap(lobes, allowed)
    runs = [sample_positions(hu, lobes, lesion, 3, np.random.default_rng(7), lung_map=lung_map)[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(p.center[0] < 30 for p in runs[0])


def test_bad_requests_are_told(chest, lesion):
    hu, lobes = chest
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown location"):
        sample_positions(hu, lobes, lesion, 1, rng, location="heart")
    with pytest.raises(ValueError, match="lung mask is empty"):
        sample_positions(hu, np.zeros_like(lobes), lesion, 1, rng)
    with pytest.raises(ValueError, match="shape mask is empty"):
        sample_positions(hu, lobes, np.zeros_like(lesion), 1, rng)
    with pytest.raises(ValueError, match=r"found 0 of 1 .* places for a 38 mm lesion"):
        sample_positions(hu, lobes, ball((20, 20, 20), 19, (41, 41, 41)), 1, rng, max_tries=50)


def test_report_adds_up():
    total = PlacementReport()
    one = PlacementReport(tried=4, accepted=1)
    one.rejected.update(["vessel"] * 3)
    total.add(one)
    total.add(one)
    assert total.acceptance == 0.25 and total.rejected["vessel"] == 6
    assert "2 of 8 places accepted (25%); rejected: vessel 6" == str(total)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.5)])
def test_depth_is_the_euclidean_distance(spacing):
    inside = np.pad(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 26, 31)), 2) > -0.05, 1)
    expected = ndimage.distance_transform_edt(inside, spacing)
    np.testing.assert_allclose(depth_mm(inside, spacing), expected, atol=1e-5)
