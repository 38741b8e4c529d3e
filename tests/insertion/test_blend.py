"""The feather of a crop follows its formula."""

import numpy as np

from hrldm.insertion.blend import FEATHER_MM, MARGIN_SIGMAS, feather, feathered
from tests import tiny


def test_feather_follows_its_formula_at_brute_force_distances():
    mask = np.random.default_rng(1).random((13, 11, 9)) < 0.01
    w, places = feather(mask), np.stack(np.indices(mask.shape), -1)
    d = np.linalg.norm(places[..., None, :] - np.argwhere(mask), axis=-1).min(-1)
    end, margin = np.exp(-(MARGIN_SIGMAS**2) / 2), MARGIN_SIGMAS * FEATHER_MM
    expected = np.where(d < margin, (np.exp(-(d**2) / (2 * FEATHER_MM**2)) - end) / (1 - end), 0)
    np.testing.assert_allclose(w, expected, atol=1e-6)
    assert (w[mask] == 1).all() and (w[d >= margin] == 0).all() and (w[d < margin - 0.1] > 0).all()


def test_a_feathered_lesion_is_the_generated_one_inside_and_the_background_beyond_the_margin():
    mask, background = tiny.ball(24, 5), np.random.default_rng(2).integers(-900, -800, (24, 24, 24)).astype(np.int16)
    lesion = np.full(mask.shape, 50.5, np.float32)
    (out,) = feathered(background[None], lesion[None], mask[None])
    w = feather(mask)
    assert (out[mask] == 50.5).all() and (out[w == 0] == background[w == 0]).all()
    between = (w > 0) & ~mask
    assert (out[between] > background[between]).all() and (out[between] < 50.5).all()
