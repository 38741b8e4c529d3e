"""Windows of the latent grid: whole lesion, context on each side, sides the U-Net can halve, within the grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrldm.model.window import SMALLEST, Window, by_side, latent_extent, lesion_window
from tests import tiny


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 3))
def test_window_holds_the_lesion_and_its_context_and_no_more_than_it_must(seed, context, levels):
    rng = np.random.default_rng(seed)
    mask = np.zeros((64, 64, 64), bool)
    lo = rng.integers(0, 50, 3)
    hi = np.minimum(lo + rng.integers(1, 40, 3), 64)
    mask[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))] = True
    window = lesion_window(mask, context, levels)
    assert mask[window.voxels].sum() == mask.sum()
    assert window.side % 2 ** (levels - 1) == 0 and all(0 <= s <= 16 - window.side for s in window.start)
    extent = latent_extent(mask)
    for (first, end), start in zip(extent, window.start, strict=True):
        assert start <= max(first - context, 0) and start + window.side >= min(end + context, 16)
    need = max(SMALLEST, max(end - first for first, end in extent) + 2 * context)
    assert window.side < need + 2 ** (levels - 1) or window.side == 16


def test_extent_covers_exactly_the_latent_voxels_that_hold_lesion():
    mask = np.zeros((16, 16, 16), bool)
    mask[4:9, 0, 15] = True
    assert latent_extent(mask) == [(1, 3), (0, 1), (3, 4)]
    with pytest.raises(ValueError, match="empty lesion mask"):
        latent_extent(np.zeros((16, 16, 16), bool))


def test_no_context_is_the_whole_grid():
    window = lesion_window(tiny.ball(40, 4), None, 2)
    assert window == Window((0, 0, 0), 10)
    array = np.zeros((3, 10, 10, 10))
    assert array[window.latent].shape == array.shape


def test_windows_of_one_side_are_together_each_once():
    windows = [Window((0, 0, 0), side) for side in (8, 6, 8, 10, 6)]
    assert [rows.tolist() for rows in by_side(windows)] == [[1, 4], [0, 2], [3]]
