"""The requested histogram as a picture: exact values, in the order of depth, a core first, the same for one seed."""

import numpy as np
from scipy import ndimage

from hrldm.nodules.histograms import hu_histogram
from hrldm.nodules.template import template
from tests import tiny

MASK = tiny.ball(32, 9)
HISTOGRAM = hu_histogram(np.random.default_rng(0).normal(-300, 180, 4000))


def made(seed=0, mask=MASK, lead=None) -> np.ndarray:
    return template(np.full(MASK.shape, -860, np.int16), mask, HISTOGRAM, np.random.default_rng(seed), lead)


def test_lesion_has_the_histogram_and_nothing_else_changes():
    out = made()
    assert out.dtype == np.float32 and (out[~MASK] == -860).all()
    np.testing.assert_allclose(hu_histogram(out[MASK]), HISTOGRAM, atol=1.5 / MASK.sum())


def test_brighter_inside_than_at_the_surface_and_rough_everywhere():
    out, depth = made(), ndimage.distance_transform_edt(MASK)
    shells = [out[(depth > d) & (depth <= d + 1)] for d in range(5)]
    assert all(a.mean() < b.mean() for a, b in zip(shells[:3], shells[1:4], strict=True))
    assert min(s.std() for s in shells) > 20


def test_a_core_goes_first():
    core = np.roll(tiny.ball(32, 4), 4, 0) & MASK
    out = made(lead=np.where(core, 1.0, -1.0))
    assert out[core].min() > out[MASK & ~core].max()


def test_same_seed_same_picture():
    np.testing.assert_array_equal(made(3), made(3))
    assert (made(3) != made(4))[MASK].mean() > 0.5
    assert made(mask=np.eye(32, dtype=bool)[:, :, None] & np.eye(32, dtype=bool)[0])[0, 0, 0] != -860
