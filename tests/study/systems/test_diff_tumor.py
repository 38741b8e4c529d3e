"""DiffTumor-style: what the network is shown, what is compared, and its samplers."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from hrldm.insertion.generator import Request
from hrldm.nodules.histograms import hu_histogram
from hrldm.train.latents import build_latents
from study.systems.cosine import CosineSchedule
from study.systems.diff_tumor import FILL_HU, DiffTumor, DiffTumor200, DiffTumorUNet, blanked
from study.systems.peer import Peer
from tests import tiny


class Told(nn.Module):
    """A network that knows the clean latent: it answers with the noise that leads there."""

    low, high = torch.tensor(-2.0), torch.tensor(2.0)

    def __init__(self, z0, schedule):
        super().__init__()
        self.z0, self.schedule, self.calls = z0, schedule, 0

    def forward(self, z_t, t, picture, m):
        self.calls += 1
        return self.schedule.noise_of(z_t, self.z0, t)


def system(kind: type[Peer], network: nn.Module) -> Peer:
    p = tiny.profile(**kind.changes)
    return kind(tiny.autoencoder(), network, 1.0, p, dataclasses.replace(p.sampling, steps=25))


def request(n: int = 2) -> Request:
    patches = tiny.patches(n, 24)
    histograms = np.stack([hu_histogram(h[m]) for h, m in zip(patches.hu, patches.mask, strict=True)])
    return Request(patches.hu, patches.mask, patches.subtype, histograms, np.arange(n))


@pytest.mark.parametrize(("kind", "calls"), [(DiffTumor, 4), (DiffTumor200, 50)])
def test_a_network_that_knows_the_latent_leads_to_it_clipped_in_so_many_calls(kind, calls):
    z_bg = torch.randn(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    told = Told(3 * torch.tanh(z_bg), CosineSchedule(kind.changes["diffusion__timesteps"]))
    made = system(kind, told)
    mask = torch.ones(2, 1, 24, 24, 24)
    *_, last = made.denoise(request(), z_bg, mask, picture=z_bg)
    torch.testing.assert_close(last.z, told.z0.clamp(-2, 2), atol=1e-3, rtol=1e-3)
    assert told.calls == calls == last.total


def test_the_picture_is_the_crop_without_its_lesion_so_nothing_of_it_is_told():
    asked = request()
    shown = system(DiffTumor, nn.Identity()).pictures(asked)
    assert (shown[asked.mask] == FILL_HU).all()
    np.testing.assert_array_equal(shown[~asked.mask], asked.background[~asked.mask])


def test_noise_is_compared_everywhere_and_neither_label_nor_histogram_is_looked_at():
    p = tiny.profile(**DiffTumor.changes)
    batch = {"z0": torch.zeros(2, 4, 6, 6, 6), "eps": torch.ones(2, 4, 6, 6, 6), "t": torch.tensor([0, 3])}
    batch |= {"picture": batch["z0"], "m": torch.zeros(2, 1, 6, 6, 6)}

    def half(z_t, t, picture, m):
        out = batch["eps"].clone()
        out[..., :3] = 0  # wrong in one half, where there is no lesion either
        return out

    assert float(DiffTumor.losses(half, batch, p)["l1"]) == pytest.approx(0.5)


def test_z0_hat_is_kept_within_the_training_latents():
    cache = build_latents(tiny.autoencoder(), tiny.patches(6), 16, 2, 40, 0, picture=blanked)
    network = DiffTumorUNet(tiny.profile(), 4)
    DiffTumor.prepare(network, cache)
    z = cache.mean[:, 0] * cache.scale
    for c in range(4):
        inside = (z[:, c] >= float(network.low[c])) & (z[:, c] <= float(network.high[c]))
        assert inside.mean() == pytest.approx(0.998, abs=4e-3)


def test_the_lesion_follows_the_mask_and_the_seed():
    torch.manual_seed(0)
    made, asked = system(DiffTumor, tiny.wake(DiffTumorUNet(tiny.profile(), 4)).eval()), request()
    made.unet.low.fill_(-0.3)
    made.unet.high.fill_(0.3)
    first, again = made(asked), made(asked)
    np.testing.assert_array_equal(first, again)
    other = made(dataclasses.replace(asked, seeds=asked.seeds + 1))
    assert (other[asked.mask] != first[asked.mask]).mean() > 0.9
    relabelled = dataclasses.replace(asked, subtype=(asked.subtype + 1) % 3, histogram=asked.histogram[::-1].copy())
    np.testing.assert_array_equal(made(relabelled), first)
