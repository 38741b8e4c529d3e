"""Three subtypes at one place: typical histograms of training nodules, and the share that comes in order."""

import numpy as np
import pandas as pd
import pytest

from hrldm.nodules.histograms import histogram_moments
from hrldm.train.latents import lesion_histograms
from study.measure import triplets
from study.study import library_of
from tests import tiny


class FakeStudy:
    seed = 0
    profile = tiny.profile()

    def __init__(self, n: int = 12) -> None:
        self.train = tiny.patches(n)

    def patches(self, split: str):
        return self.train


def test_every_nodule_is_asked_for_three_times_at_one_place_with_one_noise():
    study, test = FakeStudy(), tiny.patches(4, seed=1)
    thrice, request = triplets.triplet_request(study, test, test)
    assert len(thrice) == len(request) == 12
    assert thrice.frame.nodule_id.tolist() == np.repeat(test.frame.nodule_id, 3).tolist()
    assert request.subtype.reshape(4, 3).tolist() == [[2, 1, 0]] * 4
    assert (request.mask.reshape(4, 3, -1) == test.mask.reshape(4, 1, -1)).all()
    assert (request.seeds.reshape(4, 3) == request.seeds.reshape(4, 3)[:, :1]).all()
    assert len(set(request.seeds[::3])) == 4
    means = np.array([histogram_moments(h)[0] for h in request.histogram]).reshape(4, 3)
    np.testing.assert_allclose(means, [[-600, -250, 20]] * 4, atol=40)  # the levels of `tiny.patches`


def test_typical_histogram_is_the_mean_of_the_nearest_in_size():
    train = tiny.patches(60)
    library, own = library_of(train, 40), lesion_histograms(train, 40)
    got = triplets.typical_histograms(library, [8.0])[0, 2]
    solid = library[library.subtype == "solid"]
    near = (np.log(solid.diameter_mm / 8.0)).abs().nsmallest(triplets.NEAREST).index
    np.testing.assert_allclose(got, own[near].mean(0))
    with pytest.raises(ValueError, match="no part-solid nodule"):
        triplets.typical_histograms(library[library.subtype != "part-solid"], [8.0])


def test_a_subtype_without_training_nodules_is_asked_for_with_the_shipped_histograms(caplog):
    study, test = FakeStudy(), tiny.patches(4, seed=1)
    study.train = study.train[study.train.subtype == 0]
    _, request = triplets.triplet_request(study, test, test)
    means = np.array([histogram_moments(h)[0] for h in request.histogram]).reshape(4, 3)
    assert (np.diff(means, axis=1) > 50).all() and "no part-solid, no ground-glass nodule to train on" in caplog.text
    caplog.clear()
    triplets.triplet_request(FakeStudy(), test, test)
    assert not caplog.text


def test_share_in_order_by_hand():
    rows = [
        ("s", nodule, subtype, asked, got)
        for nodule, means in (("a", (-500, -300, 0)), ("b", (-500, -600, 0)), ("c", (-500, -300, -300)))
        for subtype, asked, got in zip(triplets.ORDER, (-600, -200, 10), means, strict=True)
    ]
    columns = ["system", "nodule_id", "asked_subtype", "requested_mean_hu", "obtained_mean_hu"]
    share = triplets.ordered_share(pd.DataFrame(rows, columns=columns)).set_index("side")
    assert share.value["requested"] == 1 and share.value["obtained"] == pytest.approx(1 / 3)
    assert (share.n == 3).all() and share.ci_low["obtained"] < 1 / 3 < share.ci_high["obtained"] < 1


def test_means_are_those_inside_the_mask():
    study, test = FakeStudy(), tiny.patches(2, seed=1)
    thrice, request = triplets.triplet_request(study, test, test)
    crops = np.full(thrice.hu.shape, -900.0)
    crops[thrice.mask] = np.repeat(np.linspace(-600, 0, 6), thrice.mask.sum((1, 2, 3)))
    table = triplets.triplet_table("s", thrice, request, crops)
    np.testing.assert_allclose(table.obtained_mean_hu, np.linspace(-600, 0, 6), atol=18)  # bins of 35 HU
    assert table.asked_subtype.tolist() == list(triplets.ORDER) * 2
