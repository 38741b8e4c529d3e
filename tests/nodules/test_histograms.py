"""HU histograms: quantiles that have them, moments on demand, and the library of real ones, of which the lung allows some."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hrldm.nodules import histograms
from hrldm.nodules.histograms import (
    MIN_NODULES,
    bins_of,
    choose_histogram,
    draw_histogram,
    histogram_library,
    histogram_moments,
    hu_histogram,
    lung_floor,
    quantiles,
    size_bin,
    solid_share,
    with_moments,
    with_solid_share,
)
from hrldm.nodules.split import patient_split
from scripts.make_hu_histograms import MOST, UNBOXED, disagreement, nodules, spread

CENTRES = np.arange(-982.5, 400, 35)  # of 40 bins over -1000..400 HU


def histogram(**shares) -> np.ndarray:
    """`b3=0.5`: half of the voxels in bin 3."""
    made = np.zeros(40)
    for name, share in shares.items():
        made[int(name[1:])] = share
    return made


def gaussian(mean: float, sd: float) -> np.ndarray:
    """Exact histogram of a Gaussian, clipped to the range."""
    below = stats.norm.cdf(np.linspace(-1000, 400, 41), mean, sd)
    below[[0, -1]] = 0, 1
    return np.diff(below)


def test_quantiles_have_the_histogram():
    asked = histogram(b3=0.1, b10=0.4, b11=0.25, b39=0.25)
    made = quantiles(asked, 4000)
    np.testing.assert_allclose(hu_histogram(made), asked, atol=3e-4)
    assert (np.diff(made) >= 0).all()


def test_solid_share_is_set_and_each_side_keeps_its_form():
    asked = histogram(b5=0.3, b10=0.3, b30=0.3, b35=0.1)
    np.testing.assert_allclose(with_solid_share(asked, 0.8), histogram(b5=0.1, b10=0.1, b30=0.6, b35=0.2))
    with pytest.raises(ValueError, match="nothing above -300 HU"):
        with_solid_share(histogram(b5=1), 0.5)


@pytest.mark.parametrize(("mean", "sd"), [(-600, 90), (-250, 200), (100, 60)])
@pytest.mark.parametrize(
    "own", [gaussian(-400, 120), histogram(b3=0.5, b30=0.5), histogram(b12=1)], ids="gaussian two-modes one-bin".split()
)
def test_moments_asked_for_are_obtained(own, mean, sd):
    assert histogram_moments(with_moments(own, mean, sd)) == pytest.approx((mean, sd), abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_moments_are_obtained_with_the_solid_share_kept(share):
    own = with_solid_share(gaussian(-400, 250), share)
    low, high = (
        -982.5 + 700 * share + 17.5,
        -317.5 + 700 * share - 17.5,
    )  # both parts in their outermost bins, and one off
    for mean in np.linspace(low, high, 5):
        made = with_moments(own, mean, keep_solid=True)
        assert histogram_moments(made)[0] == pytest.approx(mean, abs=0.01)
        assert solid_share(made) == pytest.approx(share, abs=1e-9) and made.min() > -1e-12
        # by hand: least, the parts drawn together at -300 HU; most, pushed to the four ends, the core first
        with pytest.raises(ValueError, match=r"it can be \d+ to \d+ HU there") as error:
            with_moments(own, mean, 900.0, keep_solid=True)
        least, most = (float(x) for x in re.findall(r"(\d+) to (\d+) HU there", str(error.value))[0])
        middle = -317.5 + 35 * share
        one = (mean + 282.5 * share) / (1 - share) if mean < middle else (mean + 317.5 * (1 - share)) / share
        other = (-282.5, share) if mean < middle else (-317.5, 1 - share)
        by_hand = np.sqrt((1 - other[1]) * (one - mean) ** 2 + other[1] * (other[0] - mean) ** 2)
        assert least == pytest.approx(max(35, by_hand), abs=20)  # a value between two bins has an SD of up to 17.5
        for sd in (least + 1, (least + most) / 2, most - 1):
            made = with_moments(own, mean, sd, keep_solid=True)
            assert histogram_moments(made) == pytest.approx((mean, sd), abs=0.01)
            assert solid_share(made) == pytest.approx(share, abs=1e-9)
    with pytest.raises(
        ValueError, match=rf"with {share:.0%} of it above -300 HU: it can be {low:.0f} to {high:.0f} HU"
    ):
        with_moments(own, low - 3, keep_solid=True)


def test_shifted_and_stretched_gaussian_is_a_gaussian():
    made = with_moments(gaussian(-400, 120), -550, 100)
    np.testing.assert_allclose(made, gaussian(-550, np.sqrt(100**2 - 35**2 / 12)), atol=2e-3)  # less the bins' own SD
    assert histogram_moments(with_moments(gaussian(-400, 120), mean_hu=-500))[1] == pytest.approx(
        histogram_moments(gaussian(-400, 120))[1], abs=0.01
    )
    assert histogram_moments(with_moments(gaussian(-400, 120), sd_hu=60))[0] == pytest.approx(-400, abs=0.01)
    np.testing.assert_array_equal(with_moments(gaussian(-400, 120)), gaussian(-400, 120))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mean_hu": 500}, r"mean 500 HU: it can be -965 to 365 HU"),
        ({"mean_hu": -1100}, r"mean -1100 HU: it can be -965 to 365 HU"),
        ({"mean_hu": -800, "sd_hu": 500}, r"SD 500 HU at mean -800 HU: it can be 35 to 4\d\d HU there"),
        ({"sd_hu": 20}, r"SD 20 HU at mean -400 HU: it can be 35 to 6\d\d HU there"),
    ],
    ids=["bright", "dark", "wide", "narrow"],
)
def test_moments_out_of_reach_are_told(asked, message):
    with pytest.raises(ValueError, match=message):
        with_moments(gaussian(-400, 120), **asked)


def test_histogram_library_is_real_and_ordered():
    table = histogram_library()
    bins = bins_of(table).to_numpy()
    np.testing.assert_allclose(bins.sum(1), 1)
    by_subtype = table.groupby("subtype").mean_hu
    assert by_subtype.mean()["ground-glass"] < by_subtype.mean()["part-solid"] < by_subtype.mean()["solid"]
    assert by_subtype.std().min() > 40  # the variety of real nodules is kept
    assert np.abs(bins @ CENTRES - table.mean_hu).median() < 3


def test_shipped_rows_are_training_nodules_that_look_as_rated_each_once_and_not_too_many():
    table = histogram_library()
    assert {patient_split(p) for p in table.patient_id} == {"train"}
    assert table.patient_id.str.fullmatch(r"LIDC-IDRI-\d{4}").all()  # of unknown patients, none
    why = [disagreement(r.subtype, r.diameter_mm, bins_of(r).to_numpy(float)) for _, r in table.iterrows()]
    assert set(why) == {""}
    assert table.nodule_id.is_unique and table.groupby(["subtype", "size_bin"]).size().max() <= MOST
    boxed = table.nodule_id.str.startswith("LIDC")
    twice = table[~boxed & table.patient_id.isin(table.patient_id[boxed])]
    assert set(twice.nodule_id) <= set(UNBOXED)


def test_nodules_to_measure_are_of_training_patients_each_once(shared_data):
    table = nodules([shared_data / "lidc-vois", shared_data / "lidc-cubes"])
    assert len(table) > 490 and table.nodule_id.is_unique and table.diameter_mm.between(6, 30).all()
    assert {patient_split(p) for p in table.patient_id} == {"train"}
    cubes = table.root == shared_data / "lidc-cubes"
    assert set(table[cubes & table.patient_id.isin(table.patient_id[~cubes])].nodule_id) <= set(UNBOXED)
    assert not table.patient_id.str.startswith("unknown").any()


@pytest.mark.parametrize(
    ("subtype", "diameter", "shape", "why"),
    [
        ("ground-glass", 12, gaussian(-620, 120), ""),
        ("ground-glass", 12, gaussian(-369, 190), "too much solid tissue"),
        ("part-solid", 12, (gaussian(-650, 80) + gaussian(0, 60)) / 2, ""),
        ("part-solid", 12, gaussian(-620, 120), "too little solid tissue"),
        ("part-solid", 12, gaussian(0, 60), "too much solid tissue"),
        ("part-solid", 12, gaussian(-350, 60), "no core"),
        ("solid", 12, gaussian(-200, 250), ""),
        ("solid", 7, gaussian(-470, 220), ""),
        ("solid", 25, gaussian(-470, 220), "too little solid tissue"),
        ("solid", 6, gaussian(-712, 106), "too little solid tissue"),
        ("solid", 12, gaussian(608, 800), "calcium"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rating_and_hu_must_agree(subtype, diameter, shape, why):
    assert disagreement(subtype, diameter, shape) == why


def test_thinning_keeps_the_spread():
    rng = np.random.default_rng(0)
    cell = pd.DataFrame({"mean_hu": rng.normal(-200, 20, 400), "sd_hu": rng.normal(250, 10, 400)})
    cell.loc[[7, 300], "mean_hu"] = [-500.0, 100.0]
    kept = spread(cell)
    assert len(kept) == MOST and {7, 300} <= set(kept.index) and kept.index.is_monotonic_increasing
    assert kept.mean_hu.std() > 1.5 * cell.mean_hu.std()
    few = cell.iloc[[0, 1, 1, 2]].reset_index(drop=True)  # two alike
    pd.testing.assert_frame_equal(spread(few), few)


@pytest.mark.parametrize(
    ("diameter", "expected"), [(4, 0), (6, 0), (9.9, 0), (10.1, 1), (19, 1), (25, 2), (40, 2)], ids=lambda x: f"{x:g}"
)
def test_size_bins_take_what_lies_beyond_them(diameter, expected):
    assert size_bin(diameter) == expected


def test_chosen_histograms_are_of_the_subtype_and_size_and_not_darker_than_the_lung():
    library = histogram_library().set_index("nodule_id")
    for seed in range(20):
        source, chosen = choose_histogram("solid", 16, np.random.default_rng(seed), floor_hu=-900.0)
        assert (library.subtype[source], library.size_bin[source]) == ("solid", 1)
        np.testing.assert_array_equal(chosen, bins_of(library.loc[source]))
        assert chosen[CENTRES < -900].sum() <= 0.02
    with pytest.raises(ValueError, match="no histogram of subtype 'cystic'"):
        choose_histogram("cystic", 10, np.random.default_rng(0))


def names(*sources: str) -> set[str]:
    """The nodules of draws."""
    return {name for source in sources for name in source.split()[1::3]}


def draws(n: int, *arguments, **options) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(3)
    made = [draw_histogram(*arguments, rng=rng, **options) for _ in range(n)]
    return [source for source, _ in made], np.stack([chosen for _, chosen in made])


def brightest(chosen: np.ndarray, share: float) -> float:
    return quantiles(chosen, 1000)[-round(1000 * share) :].mean()


def test_drawn_histograms_lie_between_two_real_ones_of_the_subtype_and_size():
    library = histogram_library().set_index("nodule_id")
    for source, drawn in zip(*draws(20, "solid", 16, floor_hu=-900.0), strict=True):
        share, one, _, weight, other = source.split()
        assert one != other and 0 <= float(weight) <= 0.5 and float(share) + float(weight) == pytest.approx(1)
        pair = library.loc[[one, other]]
        assert (pair.subtype == "solid").all() and (pair.size_bin == 1).all()
        means = bins_of(pair).to_numpy() @ CENTRES
        assert histogram_moments(drawn)[0] == pytest.approx(means @ [float(share), float(weight)], abs=2)
        assert drawn[CENTRES < -900].sum() <= 0.025
    with pytest.raises(ValueError, match="no histogram of subtype 'cystic'"):
        draws(1, "cystic", 10)


def test_two_gaussians_mix_to_one_mode_between_them(monkeypatch):
    rows = [dict(zip((f"b{i:02d}" for i in range(40)), gaussian(mean, 80), strict=True)) for mean in (-700, -200)]
    table = pd.DataFrame({"nodule_id": ["dark", "bright"], "subtype": "solid", "size_bin": 1, "diameter_mm": 12.0})
    monkeypatch.setattr(histograms, "histogram_library", lambda: table.join(pd.DataFrame(rows)))
    mean = {"dark": -700, "bright": -200}
    for source, drawn in zip(*draws(10, "solid", 12), strict=True):
        share, one, _, weight, other = source.split()
        middle = float(share) * mean[one] + float(weight) * mean[other]
        np.testing.assert_allclose(drawn, gaussian(middle, 80), atol=8e-3)
        peak = drawn.argmax()  # one mode, where bins would give two
        assert (np.diff(drawn[: peak + 1]) > -1e-3).all() and (np.diff(drawn[peak:]) < 1e-3).all()
        assert histogram_moments(drawn)[0] == pytest.approx(middle, abs=0.5)


def test_draws_hardly_ever_repeat():
    sources, drawn = draws(40, "ground-glass", 12, floor_hu=-920)
    assert len(set(sources)) == 40 and len(np.unique(drawn.round(3), axis=0)) >= 35


def test_nodules_to_avoid_are_passed_over_while_others_remain():
    rng, sources = np.random.default_rng(0), []
    for _ in range(10):
        sources.append(draw_histogram("ground-glass", 12, rng, avoid=sources[-1:])[0])
    assert not any(names(a) & names(b) for a, b in pairwise(sources))
    every = histogram_library().query("subtype == 'ground-glass'").nodule_id.tolist()
    assert names(*draws(20, "ground-glass", 12, avoid=every[:-MIN_NODULES])[0]) <= set(every[-MIN_NODULES:])
    assert names(*draws(1, "ground-glass", 12, avoid=every)[0]) <= set(every)  # no others


def test_vessels_under_ground_glass_need_a_bright_end():
    plain = draws(40, "ground-glass", 12)[1]
    asked = draws(40, "ground-glass", 12, ceiling=(0.05, -200.0))[1]
    assert min(brightest(drawn, 0.05) for drawn in plain) < -300 < -201 < min(brightest(drawn, 0.05) for drawn in asked)
    library = histogram_library().query("subtype == 'ground-glass' and size_bin == 1")
    bright = {r.nodule_id: brightest(bins_of(r).to_numpy(float), 0.05) for _, r in library.iterrows()}
    found = names(*draws(40, "ground-glass", 12, ceiling=(0.05, 300.0))[0])
    assert found == set(sorted(bright, key=bright.get)[-4:])  # none has it: the nearest to it


def test_lung_floor_is_read_off_the_air_about_the_lesion():
    crop = np.full((12, 12, 12), -860.0)
    crop[4:8, 4:8, 4:8] = -980.0
    lesion = crop == -980.0
    assert lung_floor(crop, ~lesion) == -890.0
    assert lung_floor(crop, np.zeros_like(lesion)) == -np.inf
    crop[6:] = 40.0  # chest wall beside it
    assert lung_floor(crop) == -890.0
