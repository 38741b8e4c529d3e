"""Damage is what it says, in the lesion only; measures answer as they must where the answer is known."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from hrldm.nodules.patches import Patches
from study.measure import known_answer as ka
from study.measure.features import Extractor
from tests import tiny


class Pixels(nn.Module):
    """Sees an image itself, coarsely: mean and spread of 16 fields."""

    def forward(self, images):
        fields = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
        return torch.cat([fields.mean(-1), fields.std(-1)], 1).flatten(1)


EXTRACTOR = Extractor("pixels", 16, Pixels())


@pytest.fixture(scope="module")
def nodules() -> Patches:
    patches = tiny.patches(40)
    rng = np.random.default_rng(0)
    return dataclasses.replace(patches, hu=(patches.hu + rng.normal(0, 15, patches.hu.shape)).astype(np.int16))


@pytest.fixture(scope="module")
def table(nodules):
    return ka.known_answer(nodules, np.arange(40) // 2, EXTRACTOR, n_boot=100, seed=0)


@pytest.mark.parametrize("damage", ka.DAMAGES)
def test_damage_stays_in_the_lesion_is_repeatable_and_grows(nodules, damage):
    change = []
    for strength in ka.DAMAGES[damage]:
        out = ka.damaged(nodules, damage, strength, 3)
        assert out.dtype == np.float32 and (out[~nodules.mask] == nodules.hu[~nodules.mask]).all()
        assert (out == ka.damaged(nodules, damage, strength, 3)).all()
        change.append(np.abs(out - nodules.hu)[nodules.mask].mean())
    assert 0 < change[0] < change[-1]
    assert damage == "mosaic_voxels" or (np.diff(change) > 0).all()  # blocks of 4 and 6 do not nest
    with pytest.raises(ValueError, match="unknown damage 'rust'"):
        ka.damaged(nodules, "rust", 1.0, 0)


def test_each_damage_is_what_it_says(nodules):
    everywhere = dataclasses.replace(nodules, mask=np.ones_like(nodules.mask))
    hu = nodules.hu.astype(float)
    assert (ka.damaged(everywhere, "offset_hu", 50.0, 0) - hu == 50).all()
    noise = ka.damaged(everywhere, "noise_hu", 40.0, 0) - hu
    assert noise.std() == pytest.approx(40, rel=0.02) and abs(noise.mean()) < 0.5
    np.testing.assert_allclose(ka.damaged(everywhere, "noise_hu", 80.0, 0) - hu, 2 * noise, atol=1e-3)
    blurred = ndimage.gaussian_filter(hu[0], 1.5)  # one crop does not run into the next
    np.testing.assert_allclose(ka.damaged(everywhere, "blur_mm", 1.5, 0)[0], blurred, atol=0.1)
    mosaic = ka.damaged(everywhere, "mosaic_voxels", 7.0, 0)[0]  # a side of 24 ends in a block of 3
    for block in (np.s_[:7, :7, 7:14], np.s_[7:14, 21:, :7], np.s_[21:, 21:, 21:]):
        np.testing.assert_allclose(mosaic[block], hu[0][block].mean(), rtol=1e-4)


def test_every_measure_answers_for_every_damage_and_strength(table):
    assert list(table) == "damage strength metric value ci_low ci_high notices clear n".split() and set(table.n) == {40}
    damaged = table[table.damage != "none"]
    assert len(damaged) == 16 * 6 and not damaged.duplicated(["damage", "strength", "metric"]).any()
    assert set(table.metric[table.damage == "none"]) == {"fid", "kid", "mmd", "jsd", "wasserstein_hu"}
    assert (table.ci_low <= table.ci_high).all() and table.notices.dtype == bool
    assert not table.notices[table.damage == "none"].any() and not table.clear[table.damage == "none"].any()
    assert table.notices.sum() > table.clear.sum() > 0 and not (table.clear & ~table.notices).any()


def test_an_offset_is_off_by_itself_and_everything_notices_a_large_one(table):
    of = table[table.damage == "offset_hu"].set_index(["metric", "strength"])
    np.testing.assert_allclose(of.loc["wasserstein_hu"].value, ka.DAMAGES["offset_hu"], rtol=1e-4)
    assert of.xs(100.0, level="strength").notices.all()
    for metric in ("kid", "mmd", "jsd", "auroc"):
        assert (np.diff(of.value[metric]) > 0).all()


def test_what_is_noticed_first(table):
    first = ka.first_noticed(table)
    assert first.index.tolist() == list(ka.DAMAGES) and set(first) == set(table.metric)
    by_hand = table[(table.damage == "noise_hu") & (table.metric == "kid")].assign(notices=[True, False, True, True])
    assert ka.first_noticed(by_hand).loc["noise_hu", "kid"] == 40.0  # a lucky hit below does not count
    assert np.isnan(ka.first_noticed(by_hand.assign(notices=False)).loc["noise_hu", "kid"])


def test_undamaged_nodules_of_a_second_draw_are_not_noticed(nodules, monkeypatch):
    monkeypatch.setattr(ka, "DAMAGES", {"noise_hu": (1e-3,)})
    table = ka.known_answer(nodules, np.arange(40) // 2, EXTRACTOR, n_boot=100, seed=1)
    assert not table[table.metric != "auroc"].notices.any()
