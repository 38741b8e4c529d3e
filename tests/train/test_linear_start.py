"""The fit before the first step: it removes noise, is the same each time, and knows only what the profile allows."""

import numpy as np
import pytest
import torch

from hrldm.model.diffusion import Schedule, blend
from hrldm.model.linear_denoiser import LinearDenoiser
from hrldm.model.unet import latent_masks
from hrldm.train.latents import build_latents, mask_tensor
from hrldm.train.linear_start import fit_linear
from tests import tiny


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HRLDM_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield build_latents(tiny.autoencoder(), tiny.patches(24, 24), 16, 2, 40, seed=0)
    patch.undo()


def fit(cache, seed=0, **changes) -> LinearDenoiser:
    profile = tiny.profile(**changes)
    linear = LinearDenoiser(
        4, profile.unet.mask_channels * profile.unet.mask_detail**3, 40, profile.diffusion.timesteps
    )
    fit_linear(linear, cache, profile, seed)
    return linear


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_fit_removes_noise_at_every_time(cache, prediction):
    schedule, profile = Schedule(tiny.profile().diffusion), tiny.profile(diffusion__prediction=prediction)
    linear = fit(cache, diffusion__prediction=prediction)
    z0 = torch.from_numpy(np.array(cache.mean[:, 0])) * cache.scale
    m, masks = latent_masks(mask_tensor(cache.mask[:, 0]), profile.unet.mask_detail)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(9))
    subtype, histogram = torch.from_numpy(np.array(cache.subtype)), torch.from_numpy(cache.histogram).float()
    for now in (60, 300, 700):
        t = torch.full((len(z0),), now)
        z_t = schedule.add_noise(z0, eps, t)
        out = linear(blend(m, z_t, z0), t, masks, subtype, histogram)
        guess = schedule.predict_z0(z_t, schedule.noise(out, z_t, t, prediction), t)
        inside = m.expand_as(z0) > 0
        noise = schedule.predict_z0(z_t, torch.zeros_like(z_t), t) - z0
        left, brought, own = (x[inside].square().mean().sqrt() for x in (guess - z0, noise, z0 - z0[inside].mean()))
        assert left < 0.9 * min(brought, own), now


def test_fit_is_the_same_each_time_and_another_with_another_seed(cache):
    a, b, c = fit(cache), fit(cache), fit(cache, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.around.weight, c.around.weight)


def test_without_c_hist_no_weight_of_the_histogram_is_set(cache):
    linear = fit(cache, histogram__vector=False)
    assert not linear.share.weight.any() and not linear.whole.weight[:, :40].any()
    assert fit(cache).share.weight.any()
