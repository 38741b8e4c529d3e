"""Placing on the embedded CT and on a phantom: the pleura is touched, cores and histograms are as wished."""

import functools
import re

import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion import intensity, lung_space
from hrldm.insertion.place import LungSpace, Nodule, place_nodule
from hrldm.insertion.record import inputs
from hrldm.insertion.wish import Wish
from hrldm.nodules.histograms import SOLID_HU, bin_centres, histogram_moments, quantiles
from hrldm.nodules.masks import box_of, offsets
from hrldm.nodules.pleura import BASES
from hrldm.nodules.positions import VESSEL_HU
from hrldm.nodules.shapes import load_shapes
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from tests import tiny
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
    assert share == pytest.approx(solid(nodule.histogram), abs=1e-3) and 0.0999 <= share <= 0.3001


@pytest.mark.parametrize(
    ("own", "share", "left"),
    [(0.02, 0.1, 0.1), (0.2, 0.2, 0.2), (0.9, 0.3, 0.3), (0.0, None, 0.0), (1.0, None, 1.0)],
    ids=["hardly any", "some", "nearly all", "none", "all"],
)
def test_the_core_is_limited_and_the_histogram_follows(placed, monkeypatch, caplog, own, share, left):
    """left: the solid share of the histogram that is asked for in the end."""
    drawn = np.zeros(40)
    drawn[5], drawn[30] = 1 - own, own
    monkeypatch.setattr(intensity, "draw_histogram", lambda *_: ("drawn", drawn))
    nodule = placed(Wish("part-solid", 12.0))[0]
    made = None if nodule.core is None else nodule.core.sum() / nodule.mask.sum()
    assert made == (None if share is None else pytest.approx(share, abs=1e-3))
    assert solid(nodule.histogram) == pytest.approx(left)
    assert ("gets no solid core" in caplog.text) == (share is None)
    given = placed(Wish("part-solid", 12.0, histogram=drawn))[0]  # is not changed for a core that nobody asked for
    np.testing.assert_allclose(given.histogram, drawn)
    assert given.core is None if share is None else given.core.sum() / given.mask.sum() == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize(
    ("mean", "sd", "core"),
    [(-650, 80, None), (-500, None, None), (-250, None, None), (100, None, None), (None, 60, None), (None, 380, None),
     (-400, 200, None), (-700, None, 5.0), (-100, None, 9.0), (-500, 300, 9.0), (None, 260, 7.0), (-550, 200, 7.0)],
)  # fmt: skip
def test_mean_sd_and_core_of_a_part_solid_nodule_all_hold(placed, mean, sd, core):
    nodule = placed(Wish("part-solid", 12.0, mean_hu=mean, sd_hu=sd, core_mm=core, seed=1))[0]
    values = quantiles(nodule.histogram, int(nodule.mask.sum()))
    assert mean is None or values.mean() == pytest.approx(mean, abs=3)
    assert sd is None or values.std() == pytest.approx(sd, abs=3)
    share = 0 if nodule.core is None else nodule.core.sum() / nodule.mask.sum()
    assert share == pytest.approx(solid(nodule.histogram), abs=0.01 if nodule.core is None else 1e-3)
    assert core is None or nodule.core.sum() == round(np.pi / 6 * core**3)


GLASS = np.concatenate(
    [np.zeros(8), np.full(6, 0.125), np.zeros(14), np.full(4, 0.0625), np.zeros(8)]
)  # a quarter solid


def test_a_histogram_of_the_users_own_is_never_weighted_without_a_word(placed, caplog):
    asked = {"subtype": "part-solid", "diameter_mm": 12.0, "histogram": GLASS}
    assert placed(Wish(**asked, core_mm=7.6))[0].core is not None and not caplog.records  # a quarter, too
    kept = placed(Wish(**asked, core_mm=9.0))[0]
    np.testing.assert_allclose(kept.histogram, GLASS)
    assert kept.core.sum() == round(np.pi / 6 * 9**3)
    said = "25% of the histogram lies above -300 HU, as a core of 7.6 mm would have; one of 9.0 mm is asked for: "
    assert said + "the brightest values, from -5" in caplog.text
    moved = placed(Wish(**asked, core_mm=9.0, mean_hu=-350.0))[0]
    assert said + "it is weighted to that" in caplog.text
    assert histogram_moments(moved.histogram)[0] == pytest.approx(-350, abs=0.1)
    assert solid(moved.histogram) == pytest.approx(0.75**3, abs=1e-3)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish("part-solid", 12.0, mean_hu=-650.0, sd_hu=80.0), r"lies above -300 HU, so it gets no solid core$"),
        (Wish("part-solid", 12.0, mean_hu=0.0), r"leaves a rim of 0\.\d mm, which is hardly seen"),
        (Wish("part-solid", 12.0, histogram=np.eye(40)[30]), r"100.0% .* gets no solid core apart from a rim"),
        (Wish("ground-glass", mean_hu=100.0), r"mean of 100 HU is asked for; real ground-glass .* have -796 to -503"),
        (Wish("solid", mean_hu=-800.0), r"nodule 1 \(solid, 10 mm\): a mean of -800 HU .* have -523 to 33"),
        (Wish("solid", histogram=np.eye(40)[3]), r"a mean of -878 HU is asked for"),
        (Wish("solid", mean_hu=-20.0), None),
        (Wish("ground-glass", mean_hu=-650.0, sd_hu=80.0), None),
        (Wish("part-solid", 12.0, mean_hu=-400.0), None),
        (Wish("part-solid", 12.0, mean_hu=-500.0, core_mm=0), None),
    ],
)  # fmt: skip
def test_what_no_real_nodule_is_like_is_said(placed, caplog, wish, said):
    placed(wish)
    assert not caplog.records if said is None else re.search(said, caplog.text, re.MULTILINE)


def test_vessels_for_which_a_histogram_asked_for_has_no_room_are_said(chest, caplog):
    ct, labels = chest
    rod = (np.abs(places(ct.affine, ct.shape) - AT)[..., 1:] < 1.6).all(-1)
    space = LungSpace.of(CT(np.where(rod, 50, ct.array).astype(np.int16), ct.affine), labels)
    for number, (subtype, sd) in enumerate((("ground-glass", None), ("ground-glass", 60.0), ("solid", 60.0))):
        caplog.clear()
        at = (AT[0], AT[1], 25.0 * number)
        mean = {} if sd is None else {"mean_hu": -30.0 if subtype == "solid" else -700.0, "sd_hu": sd}
        space.hu[:] = np.roll(space.hu, 25 * (number > 0), 2)  # the rod follows the place
        place_nodule(space, Wish(subtype, 14.0, at=at, **mean), LIBRARY, 1)
        assert ("of its place is vessel" in caplog.text) == (number == 1)


def test_no_more_of_a_drawn_solid_histogram_is_dark_than_its_shell_holds():
    dark = np.full(40, 1 / 40)  # half of it below -300 HU
    for radius in (3, 6, 12):
        mask = tiny.ball(30, radius)
        rim = mask & (ndimage.distance_transform_edt(mask) <= 1)
        most = rim.sum() / mask.sum()
        fitted = intensity.fitted(dark, "solid", mask)
        assert 1 - solid(fitted) == pytest.approx(min(0.5, most)) and fitted.sum() == pytest.approx(1)
        assert (intensity.fitted(dark, "part-solid", mask) == dark).all()


def test_no_core_where_none_is_asked_for_or_it_would_be_a_speck(placed):
    assert placed(Wish("part-solid", 14.0, core_mm=0))[0].core is None
    assert all(placed(Wish(kind, 14.0))[0].core is None for kind in ("solid", "ground-glass"))
    assert placed(Wish("part-solid", 14.0, mean_hu=-600.0, sd_hu=120.0))[0].core is None  # of some 30 voxels, unasked


def test_mean_and_sd_are_those_asked_for(placed):
    flat = np.full(40, 1 / 40)
    for wish, moments in (
        (Wish("solid", 10.0, mean_hu=-20.0, sd_hu=60.0), (-20, 60)),
        (Wish("ground-glass", 10.0, mean_hu=-640.0), (-640, None)),
        (Wish("solid", 10.0, histogram=flat, mean_hu=-300.0), (-300, None)),
    ):
        found = histogram_moments(placed(wish)[0].histogram)
        assert all(got == pytest.approx(asked, abs=2) for got, asked in zip(found, moments, strict=True) if asked)
    with pytest.raises(
        ValueError, match=r"nodule 1 \(part-solid, 10 mm\): a histogram of SD 35 HU .*: it can be \d+ to"
    ):
        placed(Wish("part-solid", 10.0, sd_hu=35.0, core_mm=6.0))


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
    draw = intensity.draw_histogram
    monkeypatch.setattr(intensity, "draw_histogram", lambda *given: asked.append(given[-1]) or draw(*given))
    for subtype in ("ground-glass", "part-solid", "solid"):
        place_nodule(LungSpace.of(vessel, labels), Wish(subtype, 14.0, at=AT), LIBRARY, 1)
    place_nodule(LungSpace.of(ct, labels), Wish("ground-glass", 14.0, at=AT), LIBRARY, 1)
    share, least = asked[0]
    assert 0.05 < share < 0.4 and -560 < least < -310  # of a vessel blurred by 1 mm: -500..50, less 40 %
    assert asked[1] is not None and asked[2:] == [None, None]


def test_no_more_of_ground_glass_is_bright_than_of_its_place_is_vessel(chest, placed, monkeypatch):
    """Drawn ones have a quarter above -300 HU, as of another place's vessels; what is asked for holds all the same."""
    monkeypatch.setattr(intensity, "draw_histogram", lambda *_: ("drawn", GLASS))
    assert solid(placed(Wish("ground-glass", 14.0, at=AT))[0].histogram) == 0
    assert solid(placed(Wish("part-solid", 14.0, at=AT))[0].histogram) == pytest.approx(0.25)
    assert solid(placed(Wish("ground-glass", 14.0, at=AT, histogram=GLASS))[0].histogram) == pytest.approx(0.25)
    values = quantiles(placed(Wish("ground-glass", 14.0, at=AT, mean_hu=-560.0, sd_hu=150.0))[0].histogram, 1000)
    assert values.mean() == pytest.approx(-560, abs=3) and values.std() == pytest.approx(150, abs=3)
    ct, labels = chest
    rod = np.linalg.norm((places(ct.affine, ct.shape) - AT)[..., 1:] - [4.0, 0.0], axis=-1) < 1.6
    space = LungSpace.of(CT(np.where(rod, 50, ct.array).astype(np.int16), ct.affine), labels)
    made = place_nodule(space, Wish("ground-glass", 14.0, at=AT), LIBRARY, 1)
    low = np.rint(AT - space.affine[:3, 3]).astype(int) - np.array(made.mask.shape) // 2
    here = space.hu[tuple(slice(a, a + n) for a, n in zip(low, made.mask.shape, strict=True))][made.mask]
    assert solid(made.histogram) == pytest.approx((here > VESSEL_HU).mean()) and 0 < solid(made.histogram) < 0.25


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
    assert min((space.labels > 0).any(axis=tuple({0, 1, 2} - {a})).argmax() for a in range(3)) >= lung_space.BEYOND_MM
