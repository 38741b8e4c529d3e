"""Placing on the embedded CT and on a phantom: the pleura is touched, cores and histograms are as wished."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion import place
from hrldm.insertion.place import LungSpace, Nodule, place_nodule
from hrldm.insertion.record import inputs
from hrldm.insertion.wish import Wish
from hrldm.nodules.histograms import SOLID_HU, bin_centres, histogram_moments
from hrldm.nodules.masks import box_of, offsets
from hrldm.nodules.pleura import BASES
from hrldm.nodules.shapes import load_shapes
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from tests.insertion.chests import LIBRARY, places

AT = (-70.0, 0.0, 0.0)


@functools.cache
def embedded(lobes: bool) -> tuple[CT, np.ndarray]:
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    return ct, lung_labels(ct, wheel_file(*LIDC_0001_LOBES) if lobes else None)[0]


@pytest.fixture
def placed(chest):
    """A function that places wishes one after the other in the lungs of the phantom."""

    def _placed(*wishes: Wish) -> list[Nodule]:
        space = LungSpace.of(*chest)
        return [place_nodule(space, wish, LIBRARY, k) for k, wish in enumerate(wishes, start=1)]

    return _placed


def solid(histogram: np.ndarray) -> float:
    return float(histogram[bin_centres(40) > SOLID_HU].sum())


# -- at the pleura -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lobes", [True, False], ids=["lobe map", "threshold"])
def test_on_a_real_scan_every_lesion_touches_the_pleura_with_the_base_asked_for(lobes, base):
    space = LungSpace.of(*embedded(lobes))
    near = ndimage.distance_transform_edt(space.labels > 0) < 4, ndimage.distance_transform_edt(space.labels == 0) > 4
    tissue = (space.hu > -500) & (near[0] | near[1])
    parts, _ = ndimage.label(tissue)
    wall = np.isin(parts, np.setdiff1d(np.unique(parts[near[1]]), 0))
    contacts = []
    for seed in range(20):
        diameter = (6.0, 8.0, 10.0, 14.0, 20.0)[seed % 5]
        nodule = place_nodule(
            space, Wish("solid", diameter, location="subpleural", base=base, seed=seed), load_shapes(), 1
        )
        lesion = np.zeros(wall.shape, bool)
        lesion[tuple((offsets(nodule.mask) + np.rint(nodule.centre_mm - space.affine[:3, 3]).astype(int)).T)] = True
        assert lesion.sum() == round(np.pi / 6 * diameter**3) and not lesion[wall].any()
        box = box_of(lesion, 2)
        touching = lesion[box] & ndimage.binary_dilation(wall[box])
        contacts.append(2 * np.sqrt(touching.sum() / np.pi) / diameter)
    low, high = (0.15, 0.75) if base == "narrow" else (0.6, 1.2)  # a vessel beside it may add to the contact
    assert low <= min(contacts) and max(contacts) <= high
    assert np.median(contacts) < 0.5 or base == "broad"


def test_the_base_is_drawn_half_each_or_as_wished_and_the_seed_repeats_it(placed):
    wishes = [Wish("solid", 8.0, location="subpleural", seed=seed) for seed in range(24)]
    drawn = [placed(wish)[0] for wish in wishes]
    assert 6 <= sum(nodule.chosen["base"] == "broad" for nodule in drawn) <= 18
    again = placed(Wish("solid", 8.0, location="subpleural", base=drawn[0].chosen["base"], seed=0))[0]
    np.testing.assert_array_equal(again.mask, drawn[0].mask)
    np.testing.assert_array_equal(again.centre_mm, drawn[0].centre_mm)
    assert "base" not in placed(Wish("solid", 8.0))[0].chosen


def test_a_lesion_that_the_pleura_cuts_may_have_a_core(placed):
    nodule = placed(Wish("part-solid", 14.0, location="subpleural", base="broad", core_mm=7.0, seed=2))[0]
    assert nodule.core.sum() == round(np.pi / 6 * 7**3) and not nodule.core[~nodule.mask].any()


# -- cores and histograms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_part_solid_nodule_has_a_core_as_large_as_its_histograms_solid_part(placed, seed):
    nodule = placed(Wish("part-solid", 14.0, seed=seed))[0]
    share = nodule.core.sum() / nodule.mask.sum()
    assert share == pytest.approx(solid(nodule.histogram), abs=1e-3) and 0.0999 <= share <= 0.6001


@pytest.mark.parametrize(
    ("own", "share", "left"),
    [(0.02, 0.1, 0.1), (0.3, 0.3, 0.3), (0.9, 0.6, 0.6), (0.0, None, 0.0), (1.0, None, 1.0)],
    ids=["hardly any", "some", "nearly all", "none", "all"],
)
def test_the_core_is_limited_and_the_histogram_follows(placed, monkeypatch, own, share, left):
    """left: the solid share of the histogram that is asked for in the end."""
    drawn = np.zeros(40)
    drawn[5], drawn[30] = 1 - own, own
    monkeypatch.setattr(place, "draw_histogram", lambda *_: ("drawn", drawn))
    nodule = placed(Wish("part-solid", 12.0))[0]
    made = None if nodule.core is None else nodule.core.sum() / nodule.mask.sum()
    assert made == (None if share is None else pytest.approx(share, abs=1e-3))
    assert solid(nodule.histogram) == pytest.approx(left)
    given = placed(Wish("part-solid", 12.0, histogram=drawn))[0]  # is not changed for a core that nobody asked for
    np.testing.assert_allclose(given.histogram, drawn)
    assert (given.core is None) == (share is None)


def test_no_core_where_none_is_asked_for_or_it_would_be_a_speck(placed, monkeypatch):
    assert placed(Wish("part-solid", 14.0, core_mm=0))[0].core is None
    assert all(placed(Wish(kind, 14.0))[0].core is None for kind in ("solid", "ground-glass"))
    monkeypatch.setattr(place, "LEAST_CORE_MM", 13.0)
    assert placed(Wish("part-solid", 14.0))[0].core is None


def test_mean_and_sd_are_those_asked_for(placed):
    flat = np.full(40, 1 / 40)
    for wish, moments in (
        (Wish("solid", 10.0, mean_hu=-20.0, sd_hu=60.0), (-20, 60)),
        (Wish("ground-glass", 10.0, mean_hu=-640.0), (-640, None)),
        (Wish("solid", 10.0, histogram=flat, mean_hu=-300.0), (-300, None)),
    ):
        found = histogram_moments(placed(wish)[0].histogram)
        assert all(got == pytest.approx(asked, abs=2) for got, asked in zip(found, moments, strict=True) if asked)
    with pytest.raises(ValueError, match=r"nodule 1 \(solid, 10 mm\): a histogram of"):
        placed(Wish("solid", 10.0, mean_hu=-950.0, sd_hu=400.0))


def test_the_nodules_of_one_ct_have_histograms_of_different_sources(placed):
    chosen = [nodule.chosen["histogram"] for nodule in placed(*(Wish("solid", 8.0, seed=s) for s in range(8)))]
    used = [word for source in chosen for word in source.split() if "LIDC" in word]
    assert len(used) == len(set(used))


def test_vessels_shine_through_a_ground_glass_nodule(chest, monkeypatch):
    """A rod of vessel through the place: its share, and its HU less 40 % of its contrast, limit the histogram."""
    ct, labels = chest
    rod = (np.abs(places(ct.affine, ct.shape) - AT)[..., 1:] < 1.6).all(-1)
    vessel = CT(np.where(rod, 50, np.where(labels > 0, -850, ct.array)).astype(np.int16), ct.affine)
    asked = []
    draw = place.draw_histogram
    monkeypatch.setattr(place, "draw_histogram", lambda *given: asked.append(given[-1]) or draw(*given))
    for subtype in ("ground-glass", "part-solid", "solid"):
        place_nodule(LungSpace.of(vessel, labels), Wish(subtype, 14.0, at=AT), LIBRARY, 1)
    place_nodule(LungSpace.of(ct, labels), Wish("ground-glass", 14.0, at=AT), LIBRARY, 1)
    share, least = asked[0]
    assert 0.05 < share < 0.4 and -560 < least < -310  # of a vessel blurred by 1 mm: -500..50, less 40 %
    assert asked[1] is not None and asked[2:] == [None, None]


def test_histograms_of_numbers_are_no_input_files():
    wishes = [Wish(histogram=np.ones(40)), Wish()]
    assert set(inputs("ct.nii.gz", wishes)) == {"ct"}


# -- the space ---------------------------------------------------------------------------------------------------------


def test_the_space_shows_the_ct_and_its_labels_and_keeps_off_what_is_to_be_avoided(chest):
    ct, labels = chest
    avoid = (np.linalg.norm(places(ct.affine, ct.shape) - AT, axis=-1) < 8).astype(bool)
    space = LungSpace.of(ct, labels, avoid)
    world = places(space.affine, space.hu.shape)
    radius = np.minimum(*(np.linalg.norm((world - [side, 0, 0]) / [50, 60, 90], axis=-1) for side in (-70, 70)))
    assert ((space.labels > 0) != (radius < 1)).mean() < 0.02
    assert space.hu[radius < 0.95].mean() == pytest.approx(-850, abs=1)
    assert space.hu[(radius > 1.06) & (radius < 1.1)].mean() == pytest.approx(ct.array[70, 50, 35], abs=20)
    away = np.linalg.norm(world - AT, axis=-1)
    assert space.occupied[away < 10].all() and not space.occupied[away > 16].any()
    assert min((space.labels > 0).any(axis=tuple({0, 1, 2} - {a})).argmax() for a in range(3)) >= place.BEYOND_MM
