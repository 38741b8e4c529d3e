"""Placement on a phantom of known geometry: two balls of lung in soft tissue, one vessel, one airway."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from hrldm.nodules import positions
from hrldm.nodules.positions import LungMap, PlacementReport, depth_mm, sample_position
from tests import tiny

SHAPE = (90, 60, 60)
LESION = tiny.ball(13, 4)
LEFT, RIGHT = 10, 12


def ball(center, radius) -> np.ndarray:
    return sum((g - c) ** 2 for g, c in zip(np.indices(SHAPE), center, strict=True)) <= radius**2


@pytest.fixture(scope="module")
def chest() -> tuple[np.ndarray, LungMap]:
    """HU and lungs: the left with a vessel through it, the right with an airway in it."""
    hu = np.full(SHAPE, 50, np.int16)
    lobes = np.zeros(SHAPE, np.uint8)
    for label, center in ((LEFT, (22, 30, 30)), (RIGHT, (67, 30, 30))):
        lobes[ball(center, 20)] = label
    hu[lobes > 0] = -860
    hu[20:25, 28:33, 10:51] = 40
    hu[ball((67, 30, 30), 5)] = -1010
    return hu, LungMap(lobes)


def covered(centre) -> np.ndarray:
    """The lesion's voxels (bool, as the CT) at a position."""
    full = np.zeros(SHAPE, bool)
    full[tuple(slice(c - n // 2, c - n // 2 + n) for c, n in zip(centre, LESION.shape, strict=True))] = LESION
    return full


def placed(chest, n: int, seed: int = 0, **wishes) -> tuple[list[np.ndarray], PlacementReport]:
    """The voxels of `n` independent positions, and all searches together."""
    hu, lungs = chest
    rng, total, found = np.random.default_rng(seed), PlacementReport(), []
    for _ in range(n):
        centre, report = sample_position(hu, lungs, LESION, rng, **wishes)
        total.add(report)
        found.append(covered(centre))
    return found, total


@pytest.mark.parametrize("lobe", [LEFT, RIGHT, (LEFT, RIGHT)], ids=["left", "right", "either"])
@pytest.mark.parametrize("location", ["inner", "subpleural"])
def test_positions_lie_where_asked(chest, location, lobe):
    hu, lungs = chest
    depth = ndimage.distance_transform_edt(lungs.lobes > 0)
    found, report = placed(chest, 6, location=location, lobe=lobe)
    for here in found:
        assert here.sum() == LESION.sum() and np.isin(lungs.lobes[here], lobe).all()
        assert depth[here].min() >= 5 if location == "inner" else 0 < depth[here].min() <= 3
        assert (hu[here] < -985).mean() <= 0.05 and (hu[here] > -500).mean() <= 0.08
    assert report.accepted == 6 and report.tried == 6 + sum(report.rejected.values())


@pytest.mark.parametrize(("lobe", "reason"), [(LEFT, "vessel"), (RIGHT, "airway")])
def test_vessel_and_airway_are_refused(chest, lobe, reason):
    assert placed(chest, 6, lobe=lobe)[1].rejected[reason] > 0


def test_occupied_places_are_refused(chest):
    occupied = np.zeros(SHAPE, bool)
    occupied[:, :30] = True
    found, report = placed(chest, 4, occupied=occupied)
    assert report.rejected["existing lesion"] > 0
    assert not any((here & occupied).any() for here in found)


def test_allowed_centres_and_seed(chest):
    hu, lungs = chest
    allowed = np.zeros(SHAPE, bool)
    allowed[:30] = True
    part = LungMap(lungs.lobes, allowed)
    runs = [[sample_position(hu, part, LESION, np.random.default_rng(s))[0] for s in range(5)] for _ in range(2)]
    np.testing.assert_array_equal(*runs)
    assert np.array(runs)[..., 0].max() < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"location": "heart"}, "unknown location", id="location"),
        pytest.param({"shape_mask": np.zeros_like(LESION)}, "shape mask is empty", id="empty shape"),
        pytest.param({"ct": np.zeros((5, 5, 5))}, "must have one shape", id="another CT"),
        pytest.param({"occupied": np.zeros((5, 5, 5), bool)}, "must have one shape", id="occupied of another CT"),
        pytest.param(
            {"shape_mask": tiny.ball(41, 19)}, "found 0 of 1 .* places for a 38 mm lesion: 0 of", id="too large"
        ),
        pytest.param({"lobe": 11}, "found 0 of 1 .*: 0 of 0 places accepted", id="no such lobe"),
    ],
)
def test_bad_requests_are_told(chest, monkeypatch, changes, message):
    monkeypatch.setattr(positions, "TRIES", 50)
    with pytest.raises(ValueError, match=message):
        sample_position(
            **{"ct": chest[0], "lungs": chest[1], "shape_mask": LESION, "rng": np.random.default_rng(0)} | changes
        )


def test_a_mask_without_lung_is_refused():
    with pytest.raises(ValueError, match="lung mask is empty"):
        LungMap(np.zeros(SHAPE, np.uint8))


def test_report_adds_up():
    total, one = PlacementReport(), PlacementReport(1, Counter(vessel=3))
    total.add(one)
    total.add(one)
    assert total.tried == 8 and str(total) == "2 of 8 places accepted (25%); rejected: vessel 6"


def test_depth_is_the_euclidean_distance():
    inside = np.pad(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 26, 31)), 2) > -0.05, 1)
    np.testing.assert_allclose(depth_mm(inside), ndimage.distance_transform_edt(inside), atol=1e-5)
