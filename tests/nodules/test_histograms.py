"""HU histograms: quantiles that have them, and the library of real ones, of which the lung allows some."""

import numpy as np
import pytest

from hrldm.nodules.histograms import (
    bins_of,
    choose_histogram,
    histogram_library,
    hu_histogram,
    lung_floor,
    quantiles,
    size_bin,
    with_solid_share,
)

CENTRES = np.arange(-982.5, 400, 35)  # of 40 bins over -1000..400 HU


def histogram(**shares) -> np.ndarray:
    """`b3=0.5`: half of the voxels in bin 3."""
    made = np.zeros(40)
    for name, share in shares.items():
        made[int(name[1:])] = share
    return made


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


def test_histogram_library_is_real_and_ordered():
    table = histogram_library()
    bins = bins_of(table).to_numpy()
    np.testing.assert_allclose(bins.sum(1), 1)
    by_subtype = table.groupby("subtype").mean_hu
    assert by_subtype.mean()["ground-glass"] < by_subtype.mean()["part-solid"] < by_subtype.mean()["solid"]
    assert by_subtype.std().min() > 40  # the variety of real nodules is kept
    inside = table.sd_hu < 350  # those without metal or calcium, whose HU leave the bins' range
    assert np.abs(bins @ CENTRES - table.mean_hu)[inside].median() < 3


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


def test_lung_floor_is_read_off_the_air_about_the_lesion():
    crop = np.full((12, 12, 12), -860.0)
    crop[4:8, 4:8, 4:8] = -980.0
    lesion = crop == -980.0
    assert lung_floor(crop, ~lesion) == -890.0
    assert lung_floor(crop, np.zeros_like(lesion)) == -np.inf
    crop[6:] = 40.0  # chest wall beside it
    assert lung_floor(crop) == -890.0
