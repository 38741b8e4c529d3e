"""Shapes to order: exact volume, the shape kept, chosen by subtype, size and spiculation."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from hrldm.nodules.shape_fitting import choose_shape, core_of, fitted
from hrldm.nodules.shapes import ShapeLibrary
from tests import tiny


@pytest.mark.parametrize("diameter", [6.0, 9.3, 17.0, 30.0])
def test_volume_is_that_of_the_sphere_and_the_margin_is_empty(diameter):
    for seed in range(3):
        out = fitted(tiny.ball(31, 9), diameter, np.random.default_rng(seed))
        assert out.sum() == round(np.pi / 6 * diameter**3)
        assert not out[:2].any() and not out[:, -2:].any() and out[2].any()


def test_without_turn_and_bend_a_shape_of_the_right_size_stays_itself():
    shape = tiny.ball(21, 7)
    shape[:10] &= np.arange(21)[None, :, None] > 8  # not symmetric
    diameter = (6 * shape.sum() / np.pi) ** (1 / 3)
    out = fitted(shape, diameter, np.random.default_rng(0), turn=False, bend_mm=0.0)
    own, got = (np.cov(np.argwhere(x).T) for x in (shape, out))  # size and orientation
    np.testing.assert_allclose(got, own, atol=0.05 * np.trace(own))
    third = [((np.argwhere(x) - np.argwhere(x).mean(0)) ** 3).mean(0) for x in (shape, out)]  # which way it leans
    np.testing.assert_allclose(third[1], third[0], atol=0.2 * np.abs(third[0]).max())


def test_turns_and_bends_differ_by_seed_and_keep_elongation():
    rod = np.zeros((30, 12, 12), bool)
    rod[3:27, 4:8, 4:8] = True
    a, b, again = (fitted(rod, 9.0, np.random.default_rng(s)) for s in (0, 1, 0))
    assert np.array_equal(a, again) and (a.shape != b.shape or not np.array_equal(a, b))
    for out in (a, b):
        spread = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(out).T)))
        assert spread[2] / spread[1] > 3  # 24 x 4 x 4


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="0 voxels"):
        fitted(np.zeros((5, 5, 5), bool), 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="diameter of -1"):
        fitted(tiny.ball(9, 3), -1, np.random.default_rng(0))


def library() -> ShapeLibrary:
    rng = np.random.default_rng(0)
    n = 300
    table = pd.DataFrame(
        {"subtype": np.resize(["solid", "part-solid", "ground-glass"], n), "diameter_mm": rng.uniform(6, 30, n),
         "spiculation": rng.integers(1, 6, n).astype(float)}
    )  # fmt: skip
    return ShapeLibrary(table, [tiny.ball(9, 3)] * n)


def test_choice_is_of_the_subtype_near_in_size_and_spiculation():
    rows = [choose_shape(library(), "part-solid", 12.0, np.random.default_rng(s), spiculation=4) for s in range(40)]
    chosen = library().table.loc[rows]
    assert set(chosen.subtype) == {"part-solid"} and set(chosen.spiculation) == {4.0} and chosen.index.nunique() > 5
    plain = library().table.loc[[choose_shape(library(), "solid", 25.0, np.random.default_rng(s)) for s in range(40)]]
    assert plain.diameter_mm.min() > 15 and plain.spiculation.nunique() == 5
    with pytest.raises(ValueError, match="unknown subtype 'semi'"):
        choose_shape(library(), "semi", 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="rating 1"):
        choose_shape(library(), "solid", 10, np.random.default_rng(0), spiculation=7)


def test_a_core_is_one_lump_off_the_middle_with_the_volume_asked_for():
    mask = tiny.ball(25, 8)
    away = []
    for seed in range(8):
        core = core_of(mask, 9.0, np.random.default_rng(seed))
        assert core.sum() == round(np.pi / 6 * 9**3) and not core[~mask].any()
        labels, n = ndimage.label(core)
        assert np.bincount(labels.ravel())[1:].max() >= 0.95 * core.sum()
        away.append(np.linalg.norm(np.argwhere(core).mean(0) - 12))
    assert 0.3 < np.mean(away) < 5 and len(set(away)) == 8
    with pytest.raises(ValueError, match=r"core of 20 mm does not fit into a lesion of 15.9 mm"):
        core_of(mask, 20.0, np.random.default_rng(0))
