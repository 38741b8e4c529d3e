"""Components of a lesion: a partition whose parts are where they were put, and which real readers' ratings agree with."""

import numpy as np
from scipy.stats import spearmanr

from hrldm.nodules.masks import components, solid_part
from hrldm.nodules.shapes import load_shapes
from tests import tiny


def spiked(length: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A ball with three straight strands of one voxel, and these strands beyond it."""
    ball = tiny.ball(32, 6)
    strands = np.zeros_like(ball)
    strands[16 : 16 + 7 + length, 16, 16] = strands[16, 16 - 6 - length : 16, 16] = strands[
        16, 16, 16 : 23 + length
    ] = True
    return ball | strands, strands & ~ball


def test_components_are_a_partition_of_the_mask_each_where_it_was_put():
    mask, strands = spiked()
    core = tiny.ball(32, 3)
    solid, glass, spicules = parts = components(mask, core)
    assert (parts.sum(0) == mask).all()
    np.testing.assert_array_equal(solid, core)
    assert spicules[strands].mean() > 0.9 and not spicules[tiny.ball(32, 5)].any()
    np.testing.assert_array_equal(glass, mask & ~core & ~spicules)


def test_components_turn_with_the_lesion_and_a_lesion_that_is_all_thin_has_no_spicule():
    mask, _ = spiked()
    core = np.roll(tiny.ball(32, 3), 2, 0)
    turned = components(np.flip(mask.swapaxes(0, 2), 1), np.flip(core.swapaxes(0, 2), 1))
    np.testing.assert_array_equal(turned, np.flip(components(mask, core).swapaxes(1, 3), 2))
    line = np.zeros((16,) * 3, bool)
    line[4:12, 8, 8] = True
    assert not components(line, line)[2].any() and components(line, line)[0].sum() == 8


def test_solid_is_above_the_threshold_and_the_lung_around_darkens_no_edge():
    mask, core = tiny.ball(32, 8), tiny.ball(32, 4)
    hu = np.where(core, 20, np.where(mask, -600, -900)) + np.random.default_rng(0).normal(0, 60, mask.shape)
    found = solid_part(hu, mask)
    assert not (found & ~mask).any() and (found & core).sum() / (found | core).sum() > 0.8
    assert (
        solid_part(np.where(mask, 20, -900), mask)[mask].all() and not solid_part(np.where(mask, -650, 40), mask).any()
    )


def test_spicules_are_more_where_readers_saw_more():
    """LIDC's ratings of spiculation, 1 to 5, of the shipped shapes in thin slices: the share of spicules rises with them."""
    library = load_shapes()
    rows = np.flatnonzero((library.table.diameter_mm >= 8) & (library.table.slice_mm <= 1.5))
    share = [components(m := library.masks[r], m)[2].sum() / m.sum() for r in rows]
    found = spearmanr(library.table.spiculation.iloc[rows], share)
    assert len(rows) > 250 and found.statistic > 0.45, found  # 0.54 in 280
