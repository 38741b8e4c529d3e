"""LeFusion: lossless patches, hard bins beside the time, a loss over all voxels, RePaint's calls and background."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from hrldm.insertion.generator import Request, reconstruct
from hrldm.model.autoencoder import normalise_hu
from hrldm.model.diffusion import SamplingConfig
from hrldm.nodules.histograms import hu_histogram
from study import study as runs
from study.systems import peer, registry
from study.systems.cosine import CosineSchedule
from study.systems.lefusion import HistogramUnet, LeFusion, Voxels, blocks, repaint_times, sixteen
from tests import tiny

PROFILE = tiny.profile(**LeFusion.changes)
T = PROFILE.diffusion.timesteps


def test_voxels_come_back_exactly_within_the_window():
    hu = np.arange(-1000, 401).astype(np.int16)
    cube = np.resize(np.random.default_rng(0).permutation(hu), (1, 12, 12, 12))
    assert len(np.unique(cube)) == len(hu)
    np.testing.assert_array_equal(np.rint(reconstruct(Voxels(), cube)), cube)
    beyond = np.array([-1024, 700], np.int16).repeat(32).reshape(1, 4, 4, 4)
    np.testing.assert_allclose(np.unique(np.rint(reconstruct(Voxels(), beyond))), [-1000, 400])


def test_values_are_those_of_the_window_and_a_mask_takes_the_same_places():
    hu = torch.tensor([-1000.0, -300.0, 400.0, 50.0]).repeat(128).reshape(1, 1, 8, 8, 8)
    z, std = Voxels().encode(normalise_hu(hu))
    assert z.shape == (1, 64, 2, 2, 2) and not std.any()
    torch.testing.assert_close(z.unique(), torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    for level, value in ((-300, 0.0), (400, 1.0)):
        torch.testing.assert_close(z[blocks((hu == level).float()) > 0], torch.full((128,), value))


def test_sixteen_bins_against_numpy():
    counts = np.random.default_rng(0).integers(0, 9, (3, 40))
    hu = -1000 + 35 * (np.arange(40)[:, None] + (np.arange(16) + 0.5) / 16)  # spread evenly within each bin
    found = sixteen(torch.from_numpy(counts / counts.sum(1, keepdims=True)))
    for row, c in zip(found, counts, strict=True):
        values = (hu + 1000) / 700 - 1
        expected, _ = np.histogram(values, 16, (-1, 1), weights=np.broadcast_to(c[:, None], hu.shape))
        np.testing.assert_allclose(row, expected / expected.sum(), atol=1e-9)


def test_sixteen_bins_of_a_lesion_are_off_by_less_than_the_mass_of_the_bins_they_cut():
    hu = np.random.default_rng(1).normal(-400, 250, 5000).clip(-1000, 400)
    fine = hu_histogram(hu)
    expected = np.histogram(hu, 16, (-1000, 400))[0] / len(hu)
    error = np.abs(sixteen(torch.from_numpy(fine)[None])[0].numpy() - expected)
    assert error.max() < fine.max() / 2 and error.sum() < 0.05


@pytest.mark.parametrize("t", [0, 20, 150, 299])
def test_untrained_network_is_the_best_linear_one_for_its_blocks(t):
    place = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)))
    covariance = 0.9 ** np.abs(place[:, :, None] - place[:, None]).sum(0)
    abar = float(CosineSchedule(T).alphas_cumprod[t])
    best = np.linalg.solve(abar * covariance + (1 - abar) * np.eye(64), np.sqrt(1 - abar) * np.eye(64))  # of eps on z_t
    z = torch.randn(1, 64, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    found = HistogramUnet(PROFILE.unet, 64, T)(z, torch.tensor([float(t)]), torch.full((1, 40), 1 / 40))
    expected = np.einsum("ij,bjxyz->bixyz", best, z.numpy())
    np.testing.assert_allclose(found.detach(), expected, atol=2e-3)


def test_histogram_is_concatenated_to_the_embedding_of_the_time():
    net = tiny.wake(HistogramUnet(PROFILE.unet, 64, T))
    seen = []
    net.down_blocks[0].resnets[0].time_emb_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    z, h = torch.randn(2, 64, 2, 2, 2), torch.eye(40)[[3, 30]]
    for t, bins in itertools.product((5, 250), (h, h.flip(0))):
        net(z, torch.full((2,), t), bins)
    time, bins = zip(*(s.chunk(2, 1) for s in seen), strict=True)
    assert torch.equal(time[0], time[1]) and not torch.equal(time[0], time[2])
    assert torch.equal(bins[0], bins[2]) and torch.equal(bins[0], bins[1].flip(0)) and not torch.equal(*bins[:2])
    h.requires_grad_()
    (slope,) = torch.autograd.grad(net(z, torch.full((2,), 5), h).square().sum(), h)
    assert (slope.abs().sum(1) > 0).all()


def test_loss_is_the_error_within_the_lesion_over_all_voxels():
    g = torch.Generator().manual_seed(0)
    z0, eps, wrong = (torch.randn(2, 64, 2, 2, 2, generator=g) for _ in range(3))
    mask = torch.zeros(2, 1, 8, 8, 8)
    mask[0, 0, 1:4, 2:5, 3:7] = mask[1, 0, 5, 5, 5] = 1
    batch = {"z0": z0, "eps": eps, "t": torch.tensor([10, 200]), "mask": mask, "histogram": torch.full((2, 40), 1 / 40)}
    inside, seen = blocks(mask), []

    def network(z_t, t, histogram):
        seen.append(z_t)
        return eps + inside * 2 + (1 - inside) * wrong

    loss = LeFusion.losses(network, batch, PROFILE)
    assert float(sum(loss.values())) == pytest.approx(2 * (36 + 1) / (2 * 512))
    torch.testing.assert_close(seen[0], CosineSchedule(T).add_noise(z0, eps, batch["t"]))  # outside the lesion too


@pytest.mark.parametrize(("jumps", "calls"), [((5, 5), 1480), ((2, 2), 598), ((1, 1), 300), ((10, 10), 2910)])
def test_repaint_calls_the_network_as_often_as_published(jumps, calls):
    steps = np.diff(repaint_times(300, *jumps))
    assert (steps < 0).sum() == calls
    assert set(steps[steps < 0]) == {-1} and set(steps[steps > 0]) <= {jumps[0]}


def test_repaint_walk_of_five_steps():
    assert repaint_times(5, 2, 3) == [4, 3, 2, 4, 3, 2, 4, 3, 2, 1, 0, 2, 1, 0, 2, 1, 0, -1]


def sampler(network, scale=1.0, **sampling) -> LeFusion:
    sampling = replace(SamplingConfig(), **{"steps": 60} | sampling)  # as published
    return LeFusion(Voxels(), network, scale, PROFILE, sampling)


def place(n: int, side: int = 2, seed: int = 0) -> tuple[Request, torch.Tensor, torch.Tensor]:
    """A request, the background's values and the masks of n cubes of `side` blocks, half of each in the mask."""
    mask = np.zeros((n, *[4 * side] * 3), bool)
    mask[:, : 2 * side] = True
    histogram, seeds = np.full((n, 40), 1 / 40), np.arange(n) + seed
    request = Request(np.zeros(mask.shape, np.int16), mask, np.zeros(n, int), histogram, seeds)
    z_bg = torch.randn(n, 64, *[side] * 3, generator=torch.Generator().manual_seed(9)) * 0.3
    return request, z_bg, torch.from_numpy(mask).float()[:, None]


def last(states) -> SimpleNamespace:
    for state in states:  # noqa: B007
        pass
    return state


def test_background_is_noised_to_the_time_at_which_the_network_is_called():
    request, z_bg, mask = place(4)
    schedule, outside, seen = CosineSchedule(T), blocks(mask) == 0, []

    def network(z, t, histogram):
        residual = schedule.noise_of(z, z_bg, t.long())[outside]
        seen.append((float(t[0]), float(residual.mean()), float(residual.std())))
        return torch.zeros_like(z)

    state = last(sampler(network).denoise(request, z_bg, mask))
    t, mean, std = np.array(seen).T
    np.testing.assert_array_equal(t, [a for a, b in itertools.pairwise(repaint_times(T, 2, 2)) if b < a])
    assert state.step == state.total == len(t) == 598
    assert np.abs(mean).max() < 0.15 and np.abs(std - 1).max() < 0.1  # 1024 values each


def test_the_network_has_the_last_word_on_the_background_and_is_clipped():
    request, z_bg, mask = place(2)
    wanted = torch.linspace(-1.5, 1.5, z_bg.numel()).reshape(z_bg.shape)
    schedule = CosineSchedule(T)

    def network(z, t, histogram):
        return schedule.noise_of(z, wanted, t.long())

    state = last(sampler(network, scale=1.2).denoise(request, z_bg, mask))
    torch.testing.assert_close(state.z, wanted.clamp(-1.2, 1.2), atol=2e-3, rtol=0)


def test_samples_have_the_distribution_that_the_network_knows():
    """For values N(mu, s^2) the best eps_hat is known: with jumps, as without, mean and variance must come out."""
    request, z_bg, mask = place(16)
    mask, mu, s, schedule = torch.ones_like(mask), 0.2, 0.5, CosineSchedule(T)

    def network(z, t, histogram):
        abar = schedule.abar(t.long(), z)
        return (1 - abar).sqrt() * (z - abar.sqrt() * mu) / (abar * s**2 + 1 - abar)

    made = last(sampler(network, scale=10.0).denoise(request, z_bg, mask)).z
    assert float(made.mean()) == pytest.approx(mu, abs=0.02)
    assert float(made.std()) == pytest.approx(s, rel=0.03)  # a little less: the posterior variance is its lower bound


def test_few_steps_are_few_of_the_same_times():
    request, z_bg, mask = place(1)
    seen = []

    def network(z, t, histogram):
        seen.append(float(t[0]))
        return torch.zeros_like(z)

    assert last(sampler(network, steps=1).denoise(request, z_bg, mask)).total == len(seen) == 9
    assert seen == [
        299,
        239,
        299,
        239,
        179,
        119,
        179,
        119,
        59,
    ]  # the walk 4, 3, 2, 4, 3, 2, 1, 0, 2, 1, 0, -1 of five steps


def test_a_nodule_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    made = sampler(tiny.wake(HistogramUnet(PROFILE.unet, 64, T)).eval(), steps=3)
    request, z_bg, mask = place(2)
    both = last(made.denoise(request, z_bg, mask)).z
    torch.testing.assert_close(last(made.denoise(request[[1]], z_bg[1:], mask[1:])).z[0], both[1], atol=1e-4, rtol=0)


def test_trained_and_asked_like_every_system(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    root = tiny.manifest(tmp_path / "data", {"train": 4, "test": 2})
    study = runs.open_study(tiny.profile(data__patch_mm=24, ldm__steps=2), "mine", str(root))
    study.__dict__["autoencoder"] = nn.Linear(1, 1)  # not used
    patches = study.patches("test")
    request = registry.request_for(study, patches, study.backgrounds("test"))
    made = peer.trained(study, LeFusion)(request)
    np.testing.assert_array_equal(peer.trained(study, LeFusion)(request), made)
    for crop, place_, mask in zip(made, request.background, request.mask, strict=True):
        far = ndimage.distance_transform_edt(~mask) > 3
        np.testing.assert_array_equal(crop[far], place_[far])
        assert (np.abs(crop[mask] - place_[mask]) > 1).mean() > 0.8
        assert crop[mask].min() >= -1000 and crop[mask].max() <= 400.001
