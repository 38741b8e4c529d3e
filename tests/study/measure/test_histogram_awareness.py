"""The histogram term's measurements, on an autoencoder that is a plain linear code, where the answers are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage, stats

from hrldm.config import changed
from hrldm.model.autoencoder import Autoencoder, AutoencoderConfig, normalise_hu
from hrldm.model.diffusion import Schedule
from hrldm.model.unet import latent_masks
from hrldm.nodules.patches import Patches
from hrldm.train.histogram_term import HistogramTerm
from hrldm.train.latents import LatentCache, encode_patches, lesion_histograms, mask_tensor, windowed
from study.measure import histogram_awareness
from study.measure.histogram_awareness import (
    awareness_table,
    change_lesion,
    correlations,
    descend,
    feature_histogram,
    lesion_histogram,
    losses_by_time,
)
from study.profiles import get_profile

SIDE, N = 16, 4


@pytest.fixture(scope="module")
def patches():
    """Four smooth lungs with a ball of 9 mm of growing intensity."""
    rng = np.random.default_rng(0)
    hu = -800 + 300 * ndimage.gaussian_filter(
        rng.standard_normal((N, SIDE, SIDE, SIDE)), (0, 1.5, 1.5, 1.5), mode="wrap"
    )
    grid = np.indices((SIDE,) * 3) - SIDE / 2 + 0.5
    mask = np.broadcast_to((grid**2).sum(0) < 4.5**2, hu.shape).copy()
    hu += mask * np.array([150.0, 300.0, 450.0, 600.0])[:, None, None, None]
    frame = pd.DataFrame({"nodule_id": list("abcd"), "patient_id": list("ppqr"), "subtype": ["solid"] * N})
    return Patches(hu.astype(np.int16), mask, frame)


@pytest.fixture(scope="module")
def term(patches):
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig())
    model.linear.fit(normalise_hu(torch.from_numpy(patches.hu.astype(np.float32)))[:, None])
    mean, std = encode_patches(model, patches.hu)
    cache = LatentCache(
        mean[:, None].numpy(), std[:, None].numpy(), patches.mask[:, None], lesion_histograms(patches, 40),
        patches.subtype, 1 / float(mean.square().mean().sqrt()),
    )  # fmt: skip
    profile = get_profile("smoke", histogram__t_max=None, unet__context=None)
    return HistogramTerm(model, list(windowed(cache, profile.unet, profile.histogram.template)), cache.scale, profile)


def test_change_lesion_is_offset_and_contrast_inside_the_mask_only(patches):
    hu, mask = patches.hu[0], patches.mask[0]
    changed = change_lesion(hu, mask, 50.0, 0.5)
    np.testing.assert_array_equal(changed[~mask], hu[~mask])
    np.testing.assert_allclose(changed[mask].mean(), hu[mask].mean() + 50, rtol=1e-5)
    np.testing.assert_allclose(changed[mask].std(), hu[mask].std() / 2, rtol=1e-4)
    assert change_lesion(hu, mask, 5000)[mask].max() == 1000 and hu[mask].max() < 0  # clipped, and the input untouched


def test_the_linear_channel_ranks_changes_as_hu_does(term, patches, monkeypatch):
    monkeypatch.setattr(histogram_awareness, "OFFSETS_HU", (-100, 0, 20, 50, 100))
    monkeypatch.setattr(histogram_awareness, "CONTRASTS", (0.5,))
    table = awareness_table(term, patches)
    assert len(table) == N * 6
    unchanged = table[(table.offset_hu == 0) & (table.contrast == 1)]
    assert unchanged.hu_jsd.max() == 0 and unchanged.feature_jsd.max() < 1e-6
    assert (table.feature_jsd <= np.log(2)).all()
    linear = f"channel_{term.decoder.feature_channels - 1:02d}"
    assert stats.spearmanr(table.hu_jsd, table[linear]).statistic > 0.8


def test_correlations_are_scipy_s_with_patient_intervals():
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 1, 60)
    table = pd.DataFrame({"patient_id": np.repeat(np.arange(12), 5), "hu_jsd": x, "feature_jsd": x**3})
    table["nodule_id"] = np.repeat(np.arange(20), 3)
    table["channel_00"], table["channel_01"] = rng.uniform(0, 1, 60), 0.0
    found = correlations(table, n_boot=40, seed=0).set_index(["feature", "measure"])
    np.testing.assert_allclose(found.value["feature_jsd", "spearman"], 1)
    np.testing.assert_allclose(found.value["feature_jsd", "pearson"], stats.pearsonr(x, x**3).statistic)
    assert np.isnan(found.value["channel_01", "spearman"])
    noise = found.loc[("channel_00", "spearman")]
    assert noise.ci_low < noise.value < noise.ci_high < 0.6
    assert found.value["feature_jsd", "spearman_within"] == 1 and found.n["feature_jsd", "spearman_within"] == 20
    assert found.n["feature_jsd", "pearson"] == 60
    alone = correlations(table.assign(patient_id="p"), n_boot=40, seed=0).set_index(["feature", "measure"])
    pd.testing.assert_series_equal(alone.value, found.value)
    assert alone[["ci_low", "ci_high"]].isna().all(axis=None)  # of one patient


def test_descent_moves_the_lesion_s_histogram_and_nothing_else(term, patches):
    z, voxels = term.groups[0].z0, mask_tensor(patches.mask)
    m = latent_masks(voxels)[0]
    target = lesion_histogram(term, z[3:4], voxels[3:4])  # the brightest lesion; all share one mask
    moved, losses = descend(term, z[:1], m[:1], voxels[:1], target, steps=20, lr=0.1)
    assert losses[-1] < 0.5 * losses[0] and len(losses) == 21
    outside = (m[:1] == 0).expand_as(moved)
    torch.testing.assert_close(moved[outside], z[:1][outside], rtol=0, atol=0)
    with torch.no_grad():
        before, after = (term.decoder.decode(x / term.scale)[0, 0].numpy()[patches.mask[0]] for x in (z[:1], moved))
    assert after.mean() > before.mean() + 0.05  # 100 HU towards the target


class _Oracle(torch.nn.Module):
    """Knows z0, hence the noise (or v) inside M; `error` is added to it."""

    def __init__(self, term, error: float = 0.0):
        super().__init__()
        self.term, self.error = term, error

    def forward(self, z_t, t, masks, subtype, histogram):
        z0 = self.term.groups[0].z0[: len(z_t)]
        abar = Schedule(self.term.config.diffusion).abar(t, z_t)
        eps = (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()
        exact = eps if self.term.config.diffusion.prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * z0
        return exact + self.error


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_losses_of_a_perfect_predictor_are_zero_and_errors_of_the_noise_grow_with_t(term, monkeypatch, prediction):
    monkeypatch.setattr(term, "config", changed(term.config, diffusion__prediction=prediction))
    perfect = losses_by_time(_Oracle(term), term, (10, 500, 990), seed=0, n=N)
    assert list(perfect.t) == [10, 500, 990]
    assert perfect.inpaint.max() < 1e-2 and perfect["hist"][:2].max() < 1e-3
    wrong = losses_by_time(_Oracle(term, 0.1), term, (10, 500, 990), seed=0, n=N)
    if prediction == "v":  # no error of v is amplified, in eps_hat or z0_hat, at any t
        assert (wrong.inpaint < 0.1 * 8 + 1e-2).all() and wrong["hist"][2] < 10 * wrong["hist"][1]
        return
    np.testing.assert_allclose(wrong.inpaint, 0.1 * 8, atol=2e-2)  # Eq. 5 sums over the 8 channels
    assert wrong["hist"].is_monotonic_increasing and wrong["hist"][2] > 10 * wrong["hist"][0]


def test_hist_space_hu_reads_the_decoded_hu(term, patches):
    profile = changed(term.config, histogram__space="hu")
    in_hu = HistogramTerm(term.decoder, term.groups, term.scale, profile)
    h = feature_histogram(in_hu, patches.hu[2], patches.mask[2])
    assert h.shape == (1, profile.histogram.bins)
    centres = torch.linspace(float(in_hu.lo), float(in_hu.hi), profile.histogram.bins)
    assert abs(float((h[0] * centres).sum()) - patches.hu[2][patches.mask[2]].mean()) < 40
