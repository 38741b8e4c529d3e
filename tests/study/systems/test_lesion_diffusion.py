"""LesionDiffusion's LINet: composite latent, bounding-box denominator, Dice, tokens, eta = 1, the soft mask that overwrites M."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from monai.networks.schedulers.ddim import DDIMScheduler
from scipy import ndimage
from torch import nn

from hrldm.insertion.generator import Request
from hrldm.model.diffusion import Schedule, randn_like
from hrldm.model.unet import latent_masks
from hrldm.nodules.histograms import size_bin
from hrldm.train.latents import mask_tensor
from study import study as runs
from study.systems import peer
from study.systems.lesion_diffusion import (
    LesionDiffusion,
    LINet,
    ancestral_step,
    attributes_of,
    bounding_box_volume,
    irregularity,
)
from tests import tiny

CHANNELS, SIDE = 4, 6


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> LINet:
    torch.manual_seed(0)
    return tiny.wake(LINet(tiny.profile().unet, CHANNELS)).eval()


def box(*sides: int, size: int = 24) -> np.ndarray:
    """Mask of one box."""
    mask = np.zeros((size,) * 3, bool)
    mask[tuple(slice(1, 1 + n) for n in sides)] = True
    return mask


class Stub(nn.Module):
    """Predicts what `noise(z, m, t)` and `logit(z, m, t)` say, and keeps what it was shown."""

    def __init__(self, noise, logit) -> None:
        super().__init__()
        self.noise, self.logit, self.shown = noise, logit, []

    def forward(self, z, m, t, attributes):
        self.shown.append((z, m, t, attributes))
        return self.noise(z, m, t), self.logit(z, m, t)


# -- losses ------------------------------------------------------------------------------------------------------------


def batch_of_two() -> dict[str, torch.Tensor]:
    """Two corners of a box of 2 x 3 x 2, and one voxel; background and noise by chance."""
    m = torch.zeros(2, 1, 4, 4, 4)
    m[0, 0, 0, 0, 0] = m[0, 0, 1, 2, 1] = m[1, 0, 3, 3, 3] = 1
    mask = m.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    z0, eps = (noise(2, CHANNELS, 4, 4, 4, seed=s) for s in (1, 2))
    return {"z0": z0, "eps": eps, "m": m, "mask": mask, "t": torch.tensor([30, 800]), "subtype": torch.tensor([0, 2])}


def test_error_inside_m_over_the_volume_of_its_bounding_box():
    batch = batch_of_two()
    assert bounding_box_volume(batch["m"]).tolist() == [12, 1]
    off = torch.tensor([0.5, 0.25]).view(2, 1, 1, 1, 1)
    stub = Stub(lambda z, m, t: batch["eps"] + off * (100 - 99 * m), lambda z, m, t: m)  # 100 times as wrong outside M
    by_hand = (2 * CHANNELS * 0.5 / 12 + CHANNELS * 0.25 / 1) / 2
    assert LesionDiffusion.losses(stub, batch, tiny.profile())["inpaint"].item() == pytest.approx(by_hand, rel=1e-5)


def test_mask_head_is_taught_by_dice_of_its_sigmoid():
    batch, logit = batch_of_two(), noise(2, 1, 4, 4, 4, seed=3)
    stub = Stub(lambda z, m, t: batch["eps"], lambda z, m, t: logit)
    p, m = (x.double().numpy().reshape(2, -1) for x in (logit.sigmoid(), batch["m"]))
    by_hand = np.mean(1 - 2 * (p * m).sum(1) / (p.sum(1) + m.sum(1)))
    losses = LesionDiffusion.losses(stub, batch, tiny.profile())
    assert losses["dice"].item() == pytest.approx(by_hand, abs=1e-5)
    assert losses["inpaint"].item() == 0 and set(losses) == {"inpaint", "dice"}


def test_the_network_is_shown_the_noise_in_m_the_clean_background_around_and_m():
    batch, p = batch_of_two(), tiny.profile()
    stub = Stub(lambda z, m, t: z, lambda z, m, t: m)
    LesionDiffusion.losses(stub, batch, p)
    ((z, m, t, attributes),) = stub.shown
    abar = Schedule(p.diffusion).alphas_cumprod[batch["t"]].float().view(2, 1, 1, 1, 1)
    noised = abar.sqrt() * batch["z0"] + (1 - abar).sqrt() * batch["eps"]
    torch.testing.assert_close(z, torch.where(batch["m"] > 0, noised, batch["z0"]))
    assert m is batch["m"] and t is batch["t"] and attributes[:, 0].tolist() == [0, 2]
    net = network()
    assert net.net.conv_in.conv.in_channels == CHANNELS + 1 and net.net.out[2].conv.out_channels == CHANNELS + 1


# -- attributes and their tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(4, 4, 4), (9, 9, 9), (4, 6, 8), (2, 3, 20)])
def test_irregularity_of_a_box_is_the_ratio_of_second_moments(sides):
    closed = sum(n**2 for n in sides) / 12 / (0.6 * (3 * math.prod(sides) / (4 * math.pi)) ** (2 / 3))
    assert irregularity(mask_tensor(box(*sides)[None])).item() == pytest.approx(closed, rel=1e-5)


def test_irregularity_of_a_ball_is_one_and_no_shape_has_less():
    shapes = [tiny.ball(40, 15), box(12, 12, 12, size=40), tiny.ball(40, 15) & (np.indices((40,) * 3)[0] != 20)]
    ball, cube, split = irregularity(mask_tensor(np.stack(shapes))).tolist()
    assert ball == pytest.approx(1, abs=0.005) and min(cube, split) > ball


@pytest.mark.parametrize(
    ("mask", "size", "irregular"),
    [
        (tiny.ball(36, 4.5), 0, 0),
        (tiny.ball(36, 7), 1, 0),
        (tiny.ball(36, 13), 2, 0),
        (box(7, 10, 10, size=36), 1, 1),
        (box(3, 4, 14, size=36), 0, 2),
    ],
)
def test_attributes_of_a_mask_stay_when_it_is_moved_or_turned(mask, size, irregular):
    assert size_bin(float((6 * mask.sum() / np.pi) ** (1 / 3))) == size
    for same in (mask, mask.transpose(2, 0, 1), mask[::-1, :, ::-1]):
        assert attributes_of(mask_tensor(same[None]), torch.tensor([1])).tolist() == [[1, size, irregular]]


def test_one_token_per_attribute_that_only_its_own_value_changes():
    net = network()
    values = torch.cartesian_prod(*[torch.arange(3)] * 3)
    tokens = net.tokens(values)
    assert tokens.shape == (27, 3, tiny.profile().unet.ctx_dim)
    assert len(tokens.reshape(81, -1).unique(dim=0)) == 9
    equal = (tokens[:, None] == tokens[None]).all(-1)
    assert torch.equal(equal, values[:, None] == values[None])


@pytest.mark.parametrize("attribute", range(3))
def test_every_attribute_reaches_noise_and_mask(attribute):
    net, m = network(), latent_masks(mask_tensor(tiny.ball(24, 5)[None]))[0]
    z, t, values = noise(1, CHANNELS, SIDE, SIDE, SIDE), torch.tensor([400]), torch.ones(1, 3, dtype=torch.long)
    other = values.clone()
    other[0, attribute] = 2
    with torch.no_grad():
        for plain, told in zip(net(z, m, t, values), net(z, m, t, other), strict=True):
            assert (plain - told).abs().max() > 1e-5


# -- sampler -----------------------------------------------------------------------------------------------------------


def test_eta_of_one_is_the_posterior_of_ddpm_at_every_time():
    schedule, t = Schedule(), torch.arange(1000)
    z_t, eps_hat, draw = (noise(1000, 1, 2, 2, 2, seed=s).double() for s in range(3))
    made = ancestral_step(schedule, z_t, eps_hat, t, t - 1, draw)
    torch.testing.assert_close(made, schedule.ddpm_step(z_t, eps_hat, t, draw))
    spread = made - ancestral_step(schedule, z_t, eps_hat, t, t - 1, torch.zeros_like(draw))
    abar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1), abar[:-1]])
    posterior = schedule.betas * (1 - before) / (1 - abar)
    torch.testing.assert_close(spread, posterior.sqrt().view(-1, 1, 1, 1, 1) * draw)


@pytest.mark.parametrize(("steps", "now"), [(200, 999), (200, 500), (50, 20), (4, 700)])
def test_strided_steps_agree_with_monai(steps, now):
    reference = DDIMScheduler(
        1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False
    )
    reference.set_timesteps(steps)
    z_t, eps_hat = noise(1, 2, 3, 3, 3), noise(1, 2, 3, 3, 3, seed=1)
    expected, _ = reference.step(eps_hat, now, z_t, eta=1.0, generator=torch.Generator().manual_seed(2))
    t, t_prev = torch.tensor([now]), torch.tensor([now - 1000 // steps])
    made = ancestral_step(Schedule(), z_t, eps_hat, t, t_prev, noise(1, 2, 3, 3, 3, seed=2))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=1e-4)


def ball_request(n: int = 2) -> Request:
    made = tiny.patches(n)
    return Request(made.hu, made.mask, made.subtype, np.full((n, 40), 1 / 40), np.arange(n))


def system(net: nn.Module, steps: int = 3, **changes) -> LesionDiffusion:
    p = tiny.profile(sampling__steps=steps, **changes)
    return LesionDiffusion(tiny.autoencoder(), net, 0.8, p, p.sampling)


@pytest.mark.parametrize(
    ("asked", "timesteps", "taken"), [(50, 1000, 200), (1000, 1000, 200), (50, 150, 150), (1, 1000, 5)]
)
def test_two_hundred_steps_or_as_many_as_the_profile_and_the_schedule_allow(asked, timesteps, taken):
    request, stub = ball_request(1), Stub(lambda z, m, t: z, lambda z, m, t: m)
    made = system(stub, asked, diffusion__timesteps=timesteps)
    states = list(made.denoise(request, torch.zeros(1, CHANNELS, SIDE, SIDE, SIDE), mask_tensor(request.mask)))
    assert len(states) == len(stub.shown) == states[-1].total == taken
    times = [int(t) for _, _, t, _ in stub.shown]
    assert times[0] == timesteps - 1 and times[-1] == 0 and times == sorted(set(times), reverse=True)


def test_the_predicted_soft_mask_overwrites_m_and_the_clean_background_is_pasted_around_it():
    request = ball_request()
    z_bg, mask = noise(2, CHANNELS, SIDE, SIDE, SIDE, seed=5), mask_tensor(request.mask)
    asked = latent_masks(mask)[0]
    logits = [3 * noise(2, 1, SIDE, SIDE, SIDE, seed=10 + i) for i in range(5)]
    eps_hat = noise(2, CHANNELS, SIDE, SIDE, SIDE, seed=6)
    stub = Stub(lambda z, m, t: eps_hat, lambda z, m, t: logits[len(stub.shown) - 1])
    states = list(system(stub, 1).denoise(request, z_bg, mask))

    schedule = Schedule()
    generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]
    m, z = asked, randn_like(z_bg, generators)
    for i, (now, following) in enumerate([(999, 749), (749, 500), (500, 250), (250, 0), (0, -1)]):
        z = m * z + (1 - m) * z_bg
        torch.testing.assert_close(stub.shown[i][0], z)
        torch.testing.assert_close(stub.shown[i][1], m)
        t, t_prev = torch.full((2,), now), torch.full((2,), following)
        z = ancestral_step(schedule, z, eps_hat, t, t_prev, randn_like(z_bg, generators))
        m = 1 / (1 + (-logits[i]).exp())
    last = states[-1].z
    torch.testing.assert_close(last, asked * m * z + (1 - asked * m) * z_bg)
    assert torch.equal(last[(asked == 0).expand_as(last)], z_bg[(asked == 0).expand_as(last)])
    attributes = attributes_of(mask, torch.tensor(request.subtype))
    assert all(torch.equal(shown, attributes) for *_, shown in stub.shown)  # of the mask asked for, at every step


@pytest.mark.parametrize(("logit", "share"), [(50.0, 1.0), (0.0, 0.5), (-50.0, 0.0)])
def test_a_lesion_that_is_known_exactly_is_made_where_the_soft_mask_lets_it(logit, share):
    request, schedule = ball_request(), Schedule()
    z_bg, lesion = (noise(2, CHANNELS, SIDE, SIDE, SIDE, seed=s) for s in (5, 8))
    exact = Stub(lambda z, m, t: schedule.noise_of(z, lesion, t), lambda z, m, t: torch.full_like(m, logit))
    mask = mask_tensor(request.mask)
    m = share * latent_masks(mask)[0]
    *_, last = system(exact, 5).denoise(request, z_bg, mask)
    torch.testing.assert_close(last.z, m * lesion + (1 - m) * z_bg, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_nodule_in_any_batch_and_the_histogram_is_not_shown():
    request, made = ball_request(), system(network())
    z_bg, mask = noise(2, CHANNELS, SIDE, SIDE, SIDE, seed=5), mask_tensor(request.mask)
    *_, both = made.denoise(request, z_bg, mask)
    *_, alone = made.denoise(request[1:], z_bg[1:], mask[1:])
    torch.testing.assert_close(alone.z, both.z[1:], atol=1e-3, rtol=1e-3)
    darker = dataclasses.replace(request, histogram=np.eye(40)[[0, 1]])
    *_, same = made.denoise(darker, z_bg, mask)
    assert torch.equal(same.z, both.z)
    *_, other = made.denoise(dataclasses.replace(request, seeds=request.seeds + 7), z_bg, mask)
    assert (other.z - both.z).abs().max() > 0.01


# -- a study -----------------------------------------------------------------------------------------------------------


def test_study_trains_it_and_keeps_the_background(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    root = tiny.manifest(tmp_path / "data", {"train": 6, "test": 3})
    study = runs.open_study(tiny.profile(data__patch_mm=24, ldm__steps=5), "mine", str(root))
    study.__dict__["autoencoder"] = tiny.autoencoder()
    patches, background = study.patches("test"), study.backgrounds("test").hu
    request = Request(background, patches.mask, patches.subtype, np.full((3, 40), 1 / 40), np.arange(3))
    made = peer.trained(study, LesionDiffusion)(request)
    assert made.shape == background.shape and np.isfinite(made).all()
    for before, after, mask in zip(background, made, patches.mask, strict=True):
        far = ndimage.distance_transform_edt(~mask) > 5
        assert (after != before)[mask].mean() > 0.8 and far.any()
        np.testing.assert_array_equal(after[far], before[far])
    trained = peer.trained(study, LesionDiffusion)
    z, z_bg = trained.latents(request), trained._encoded(background)
    m = latent_masks(mask_tensor(patches.mask))[0].expand_as(z)
    assert torch.equal(z[m == 0], z_bg[m == 0]) and (z != z_bg)[m > 0].all()
    start = peer.run_path(study, LesionDiffusion)
    assert start.exists() and start != peer.run_path(study.with_seed(1), LesionDiffusion)
    torch.manual_seed(study.seed)
    untrained = LesionDiffusion.network(study.profile, CHANNELS).state_dict()
    moved = {k: (trained.unet.state_dict()[k] - v.to(trained.device)).abs().max() for k, v in untrained.items()}
    assert moved["embedding.weight"] > 0 and moved["net.out.2.conv.weight"] > 0
