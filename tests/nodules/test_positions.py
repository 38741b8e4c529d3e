"""Placement on a phantom of known geometry: two balls of lung in soft tissue, one vessel, one airway."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules import pleura, positions
from hrldm.nodules.masks import highest, offsets
from hrldm.nodules.pleura import BASES, at_pleura
from hrldm.nodules.positions import LungMap, PlacementReport, overlap, sample_position
from hrldm.nodules.shape_fitting import fitted_distance
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


def test_candidates_are_all_voxels_of_that_depth_and_no_others():
    inside = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(12, 16, 19)), 2) > -0.05
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1]  # beyond the array is outside
    lungs = LungMap(inside.astype(np.uint8))
    for low, high in ((0.0, np.inf), (2.2, np.inf), (1.5, 3.0)):
        drawn = itertools.islice(lungs.candidates(np.random.default_rng(1), low, high), 40_000)
        found = {tuple(c) for c in drawn}
        assert found == {tuple(c) for c in np.argwhere(inside & (depth >= low) & (depth <= high))}
    for centre in np.argwhere(inside)[::50]:
        away = lungs.outwards(centre, 20.0)
        assert np.linalg.norm(away) == pytest.approx(depth[tuple(centre)])
        there = centre + away
        assert (there < 0).any() or (there >= inside.shape).any() or not inside[tuple(there)]


def test_a_part_is_cut_where_the_array_ends():
    whole, part = np.arange(7), np.arange(10, 14)
    for start in (-9, -2, 3, 5, 30):
        (here,), (own,) = overlap([start], part.shape, whole.shape)
        assert [(i, i - start + 10) for i in whole if 0 <= i - start < 4] == list(
            zip(whole[here], part[own], strict=True)
        )


# -- touching the pleura -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lung() -> np.ndarray:
    """HU of one ball of lung in soft tissue, with a partial-volume rim, noise, and a vessel along its wall."""
    away = np.sqrt(sum((g - 32.3) ** 2 for g in np.indices((66, 66, 66))))
    hu = np.interp(away, [26.5, 28.0], [-860.0, 40.0])
    hu[20:45, 31:33, 7:9] = 20
    return hu + np.random.default_rng(0).normal(0, 20, hu.shape)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("off_mm", [-2.5, 0.0, 2.0], ids=["labels too small", "right", "too large"])
def test_a_lesion_touches_the_pleura_that_the_ct_shows_and_keeps_its_volume(lung, base, off_mm):
    away = np.sqrt(sum((g - 32.3) ** 2 for g in np.indices(lung.shape)))
    labels = LungMap((away <= 27 + off_mm).astype(np.uint8))
    wall = ndimage.label(lung > -500)[0] == ndimage.label(lung > -500)[0][0, 0, 0]
    beside = ndimage.binary_dilation(wall) & ~wall
    least, most = {"narrow": (0.0, 0.5), "broad": (0.6, 1.2)}[base]
    for seed, diameter in enumerate((6.0, 9.0, 13.0, 18.0)):
        shape = fitted_distance(tiny.ball(25, 8), diameter, np.random.default_rng(seed))
        runs = [at_pleura(lung, labels, *shape, np.random.default_rng(seed), base) for _ in range(2)]
        (mask, centre, report), again = runs
        np.testing.assert_array_equal(mask, again[0])
        np.testing.assert_array_equal(centre, again[1])
        assert report.accepted == 1 and mask.sum() == round(np.pi / 6 * diameter**3)
        lesion = np.zeros(lung.shape, bool)
        lesion[tuple((offsets(mask) + centre).T)] = True
        assert not lesion[wall].any() and ndimage.label(lesion, np.ones((3, 3, 3)))[1] == 1
        contact = 2 * np.sqrt((lesion & beside).sum() / np.pi) / equivalent_diameter(mask.sum())
        assert least < contact <= most


@pytest.mark.parametrize("base", BASES)
def test_the_hilum_and_vessels_that_labels_leave_out_are_no_pleura(base):
    """A ball of lung with a bundle of vessels in it, 12 mm across, that reaches the wall on one side."""
    at = np.indices((90, 90, 90)) - 45.0
    away, beam = np.sqrt((at**2).sum(0)), np.hypot(at[0], at[1])
    hilum = (beam < 6) & (at[2] < 12)
    hu = np.where((away > 38) | hilum, 40.0, -860.0) + np.random.default_rng(0).normal(0, 20, away.shape)
    lungs = LungMap(((away <= 38) & ~hilum).astype(np.uint8))
    for seed in range(12):
        shape = fitted_distance(tiny.ball(25, 8), (6.0, 9.0)[seed % 2], np.random.default_rng(seed))
        mask, centre, _ = at_pleura(hu, lungs, *shape, np.random.default_rng(seed), base)
        assert away[tuple((offsets(mask) + centre).T)].max() > 38 - 5


def test_depth_below_the_filled_surface_is_that_of_the_ball(lung):
    away = np.sqrt(sum((g - 32.3) ** 2 for g in np.indices(lung.shape)))
    vessel = np.hypot(*(np.indices(lung.shape)[:2] - 32)) < 4
    lungs = LungMap(((away <= 27) & ~vessel).astype(np.uint8))
    low, shape = np.array([3, 10, 20]), (40, 30, 33)
    found = pleura.below_surface(lungs, low, shape)
    here = tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))
    seen = (
        np.abs(np.indices(lung.shape)[2] - 32)[here] < 15
    )  # where the vessel leaves the ball, its mouth is filled flat
    np.testing.assert_allclose(found.clip(0)[seen], (27.5 - away[here]).clip(0)[seen], atol=3.0)


def test_a_lesion_is_one_by_its_faces():
    """What a wall leaves of it beyond an edge looks like an island."""
    x, y, z = np.indices((12, 12, 12))
    ball = -np.sqrt((x - 4.1) ** 2 + (y - 4.2) ** 2 + (z - 5.3) ** 2)
    cut = np.where((x < 6) == (y < 6), ball, -np.inf)
    assert ndimage.label(highest(cut, 200))[1] == 2 and ndimage.label(highest(cut, 200), np.ones((3, 3, 3)))[1] == 1
    lesion = pleura._in_one(cut, 200)
    assert ndimage.label(lesion)[1] == 1 and lesion.sum() == 200 and not lesion[6:].any()


def test_at_the_pleura_lobe_and_occupied_places_are_kept(lung):
    away = np.sqrt(sum((g - 32.3) ** 2 for g in np.indices(lung.shape)))
    lobes = np.where(away <= 26, np.where(np.arange(66)[:, None, None] < 33, LEFT, RIGHT), 0).astype(np.uint8)
    occupied = np.zeros(lung.shape, bool)
    occupied[:, :33] = True
    shape = fitted_distance(LESION, 8.0, np.random.default_rng(0))
    for seed in range(5):
        mask, centre, _ = at_pleura(
            lung, LungMap(lobes), *shape, np.random.default_rng(seed), "broad", RIGHT, occupied=occupied
        )
        assert lobes[tuple(centre)] == RIGHT and not occupied[tuple((offsets(mask) + centre).T)].any()


def test_without_a_pleura_to_be_seen_there_is_no_place_at_it(lung, monkeypatch):
    """Air on, far beyond the labels: as where a map leaves out a part of the lung."""
    monkeypatch.setattr(pleura, "PLEURAL_TRIES", 20)
    shape = fitted_distance(LESION, 8.0, np.random.default_rng(0))
    away = np.sqrt(sum((g - 32.3) ** 2 for g in np.indices(lung.shape)))
    with pytest.raises(ValueError, match="found 0 of 1 subpleural places for a 8 mm lesion: 0 of 20.*Choose a smaller"):
        at_pleura(
            np.full_like(lung, -860.0), LungMap((away < 20).astype(int)), *shape, np.random.default_rng(0), "narrow"
        )
