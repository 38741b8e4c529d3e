"""A requested histogram imposed while sampling: exact in HU, nothing else moved, and obeyed by the lesion that comes out."""

import numpy as np
import pytest
import torch

from hrldm.ct.volume import CT
from hrldm.insertion import generator as generate
from hrldm.insertion.finish import finished
from hrldm.insertion.generator import Request
from hrldm.insertion.matching import core_lead, match_latents, matched
from hrldm.nodules.histograms import histogram_jsd, hu_histogram
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from tests import tiny


def histogram(mean: float, sd: float, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(hu_histogram(np.random.default_rng(seed).normal(mean, sd, 20000)))


def test_matched_keeps_the_order_and_everything_outside():
    hu = torch.from_numpy(np.random.default_rng(1).normal(-700, 80, (16, 16, 16))).float()
    mask = torch.from_numpy(tiny.ball(16, 5))
    out = matched(hu, mask, histogram(0, 60))
    assert torch.equal(out[~mask], hu[~mask])
    assert torch.equal(out[mask].argsort(), hu[mask].argsort())
    assert out[mask].mean().item() == pytest.approx(0, abs=3) and out[mask].std().item() == pytest.approx(60, rel=0.1)
    torch.testing.assert_close(matched(out, mask, histogram(0, 60)), out)


def test_matching_moves_the_lesion_only_and_not_when_it_obeys():
    model = load_autoencoder(SHIPPED_AUTOENCODER).eval()
    mask = torch.from_numpy(tiny.ball(32, 6)).float()[None, None]
    m = torch.nn.functional.max_pool3d(mask, 4)
    lung = torch.full((1, 1, 32, 32, 32), 0.08)  # -840 HU
    with torch.no_grad():
        z_bg, z = model.encode(lung)[0], model.encode(torch.where(mask > 0, torch.tensor(0.3), lung))[0]

    def lesion(latent):
        with torch.no_grad():
            return (model.decode(m * latent + (1 - m) * z_bg) * 2000 - 1000)[mask > 0]

    asked = histogram(0, 50)[None]
    moved = match_latents(model, z, z_bg, m, mask, asked)
    assert torch.equal((moved * (1 - m)), z * (1 - m))
    assert abs(lesion(z).mean()) > 300 and abs(lesion(moved).mean()) < 40
    own = torch.from_numpy(hu_histogram(lesion(z).numpy()))[None]
    still = match_latents(model, z, z_bg, m, mask, own)
    assert (still - z).abs().max() < 0.1 * (moved - z).abs().max()


@pytest.mark.parametrize("objective", ["ddpm", "rflow"])
def test_generator_obeys_the_histogram_with_an_untrained_network(objective, monkeypatch):
    changes = {
        "autoencoder__latent_channels": 8,
        "diffusion__objective": objective,
        "sampling__steps": 4,
        "histogram__weight": 0.0,
    }
    model, unet = load_autoencoder(SHIPPED_AUTOENCODER).eval(), tiny.unet(**changes)
    made = tiny.patches(3, 32)
    wanted = np.stack([hu_histogram(h[k]) for h, k in zip(made.hu, made.mask, strict=True)])
    lung = np.random.default_rng(0).normal(-850, 30, made.hu.shape).astype(np.int16)
    request = Request(lung, made.mask, made.subtype, wanted, np.arange(3))

    def jsd(**more):
        out = tiny.generator(model, unet, 0.8, **changes, **more)(request)
        pairs = zip(out, made.mask, wanted, strict=True)
        return np.mean([histogram_jsd(hu_histogram(o[k]), w) for o, k, w in pairs])

    once = jsd(sampling__match_t_max=1000)
    twice = jsd(sampling__match_t_max=1000, sampling__match_rounds=2)
    assert once < 0.5 * jsd() and twice < 0.9 * once
    monkeypatch.setattr(generate, "GAIN", 1.0)
    assert twice < jsd(sampling__match_t_max=1000, sampling__match_rounds=2) and twice < 1.2 * jsd(
        sampling__match_t_max=1000, sampling__match_rounds=4
    )


def test_a_core_takes_the_densest_part_of_the_histogram():
    hu = torch.from_numpy(np.random.default_rng(1).normal(-700, 80, (24, 24, 24))).float()
    mask, core = tiny.ball(24, 9), tiny.ball(24, 5)
    share = core.sum() / mask.sum()
    values = np.concatenate([np.full(round(1000 * (1 - share)), -600.0), np.full(round(1000 * share), 20.0)])
    wanted = torch.from_numpy(hu_histogram(values))
    out = matched(hu, torch.from_numpy(mask), wanted, torch.from_numpy(core_lead(core))).numpy()
    assert (out[core] > -100).mean() > 0.99 and (out[mask & ~core] < -500).mean() > 0.98
    plain = matched(hu, torch.from_numpy(mask), wanted).numpy()
    assert (plain[core] > -100).mean() < 0.5


def test_the_generator_makes_the_core():
    changes = {"autoencoder__latent_channels": 8, "sampling__steps": 4}
    model, unet = load_autoencoder(SHIPPED_AUTOENCODER).eval(), tiny.unet(**changes)
    mask, core = tiny.ball(32, 9)[None], tiny.ball(32, 5)[None]
    share = core.sum() / mask.sum()
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-600, 60, 5000), rng.normal(20, 40, round(5000 * share / (1 - share)))])
    lung = rng.normal(-850, 30, mask.shape).astype(np.int16)
    request = Request(lung, mask, np.array([1]), hu_histogram(values)[None], np.array([3]), core)
    out = tiny.generator(model, unet, 0.8, **changes, sampling__match_t_max=1000)(request)
    assert out[core].mean() > -200 and out[mask & ~core].mean() < -450
    with pytest.raises(ValueError, match="solid core is made by imposing"):
        tiny.generator(model, unet, 0.8, **changes)(request)
    made = tiny.generator(model, unet, 0.8, **changes)(request, paste=False)[0]  # the finish makes the core
    lesion = finished(CT(lung[0], np.eye(4)), made, mask[0], np.eye(4), request.histogram[0], 3, core[0])
    assert lesion.after[lesion.core].mean() > -200 and lesion.after[lesion.lesion & ~lesion.core].mean() < -450
