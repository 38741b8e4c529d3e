"""Shapes to order: exact volume, the shape kept, chosen by subtype, size and spiculation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.config import SUBTYPES
from hrldm.nodules import shape_fitting
from hrldm.nodules.masks import depth, highest
from hrldm.nodules.shape_fitting import choose_shape, core_of, fitted, fitted_distance
from hrldm.nodules.shapes import ShapeLibrary
from tests import tiny


@pytest.mark.parametrize("diameter", [6.0, 9.3, 17.0, 30.0])
def test_volume_is_that_of_the_sphere_and_the_margin_is_empty(diameter):
    for seed in range(3):
        out = fitted(tiny.ball(31, 9), diameter, np.random.default_rng(seed))
        assert out.sum() == round(np.pi / 6 * diameter**3)
        assert not out[:2].any() and not out[:, -2:].any() and out[2].any()


def test_every_count_of_voxels_can_be_chosen_by_distance_and_is_one_shape_grown():
    distance, n = fitted_distance(tiny.ball(31, 9), 12.0, np.random.default_rng(0))
    shapes = [highest(distance, count) for count in range(n - 40, n + 200)]
    assert [int(shape.sum()) for shape in shapes] == list(range(n - 40, n + 200))
    assert all((small <= large).all() for small, large in itertools.pairwise(shapes))
    assert np.abs(np.argwhere(shapes[40]).mean(0) - np.array(distance.shape) // 2).max() < 0.5


def test_neither_turned_nor_bent_a_shape_of_the_right_size_stays_itself(monkeypatch):
    monkeypatch.setattr(shape_fitting, "BEND_SD_MM", 0.0)
    monkeypatch.setattr(Rotation, "random", lambda random_state: Rotation.identity())
    shape = tiny.ball(21, 7)
    shape[:10] &= np.arange(21)[None, :, None] > 8  # not symmetric
    out = fitted(shape, (6 * shape.sum() / np.pi) ** (1 / 3), np.random.default_rng(0))
    own, got = (np.cov(np.argwhere(x).T) for x in (shape, out))  # size and orientation
    np.testing.assert_allclose(got, own, atol=0.05 * np.trace(own))
    own, got = (((np.argwhere(x) - np.argwhere(x).mean(0)) ** 3).mean(0) for x in (shape, out))  # which way it leans
    np.testing.assert_allclose(got, own, atol=0.2 * np.abs(own).max())


def test_turns_and_bends_differ_by_seed_and_keep_elongation():
    rod = np.zeros((30, 12, 12), bool)
    rod[3:27, 4:8, 4:8] = True
    a, b, again = (fitted(rod, 9.0, np.random.default_rng(s)) for s in (0, 1, 0))
    assert np.array_equal(a, again) and not np.array_equal(a, b)
    for out in (a, b):
        spread = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(out).T)))
        assert spread[2] / spread[1] > 3  # 24 x 4 x 4


@pytest.mark.parametrize(
    ("mask", "diameter", "message"),
    [(np.zeros((5, 5, 5), bool), 10, "0 voxels"), (tiny.ball(9, 3), -1, "diameter of -1")],
    ids=["empty", "negative"],
)
def test_impossible_sizes_are_refused(mask, diameter, message):
    with pytest.raises(ValueError, match=message):
        fitted(mask, diameter, np.random.default_rng(0))


def test_choice_is_of_the_subtype_near_in_size_and_spiculation():
    rng, n = np.random.default_rng(0), 300
    table = pd.DataFrame({"subtype": np.resize(SUBTYPES, n), "diameter_mm": rng.uniform(6, 30, n)})
    library = ShapeLibrary(table.assign(spiculation=rng.integers(1, 6, n).astype(float)), [])

    def chosen(*wish) -> pd.DataFrame:
        return library.table.loc[
            [choose_shape(library, *wish[:2], np.random.default_rng(s), *wish[2:]) for s in range(40)]
        ]

    spiculated, plain = chosen("part-solid", 12.0, 4), chosen("solid", 25.0)
    assert set(spiculated.subtype) == {"part-solid"} and set(spiculated.spiculation) == {4.0}
    assert spiculated.index.nunique() > 5
    assert set(plain.subtype) == {"solid"} and plain.diameter_mm.min() > 15 and plain.spiculation.nunique() == 5


def test_a_core_is_one_lump_off_the_middle_with_the_volume_asked_for():
    mask = tiny.ball(25, 8)
    away = []
    for seed in range(8):
        core = core_of(mask, 9.0, np.random.default_rng(seed))
        assert core.sum() == round(np.pi / 6 * 9**3) and not core[~mask].any()
        assert np.bincount(ndimage.label(core)[0].ravel())[1:].max() >= 0.95 * core.sum()
        away.append(np.linalg.norm(np.argwhere(core).mean(0) - 12))
    assert 0.3 < np.mean(away) < 5 and len(set(away)) == 8
    for diameter, share in ((9.0, 0.95), (11.0, 0.8)):  # by volume, balls of up to 12.9 mm leave a rim of 1.5 mm
        core = core_of(mask, diameter, np.random.default_rng(1))
        surface = core & ndimage.binary_dilation(~core)
        assert (depth(mask)[surface] >= 2.4).mean() >= share
    with pytest.raises(ValueError, match=r"core of 20 mm does not fit into a lesion of 15.9 mm"):
        core_of(mask, 20.0, np.random.default_rng(0))
