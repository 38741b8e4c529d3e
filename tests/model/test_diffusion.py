"""Eq. 1, 4, 6 and 10, the reverse steps and Algorithm 2 against closed forms, MONAI's schedulers and perfect denoisers."""

import math

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from hrldm.model.diffusion import (
    BACKGROUNDS,
    SAMPLERS,
    DiffusionConfig,
    Schedule,
    blend,
    flow_input,
    inpaint,
    noisy_input,
    randn_like,
)
from study.profiles import get_profile

MONAI = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
SHAPE = (2, 4, 5, 5, 5)


def randn(seed: int, shape=SHAPE, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lesion() -> torch.Tensor:
    m = torch.zeros(2, 1, 5, 5, 5, dtype=torch.float64)
    m[..., 1:4, 2:4, 1:3] = 1
    return m


def seeded(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def run(*args, **kwargs):
    return list(inpaint(*args, **kwargs))


def perfect(z0: torch.Tensor, schedule: Schedule, sampler: str):
    """The denoiser that knows z0: the noise (or velocity) that makes z out of it."""

    def denoiser(z, t):
        if sampler == "rflow":
            return (z0 - z) / (t / schedule.timesteps).to(z).view(-1, 1, 1, 1, 1)
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        return (z - abar.sqrt() * z0) / (1 - abar).sqrt()

    return denoiser


def test_schedule_is_the_papers():
    schedule, monai = Schedule(get_profile("paper").diffusion), DDPMScheduler(1000, **MONAI)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), monai.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert schedule.betas[0].item() == pytest.approx(0.0015) and schedule.betas[-1].item() == pytest.approx(0.0195)
    assert 80 < 1 / schedule.alphas_cumprod[-1].sqrt() < 90  # Eq. 6 amplifies 84-fold at the last t (design decision 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_equations_1_and_6_invert_each_other_at_every_t(dtype, tolerance):
    schedule = Schedule()
    t = torch.arange(1000)
    z0, eps = randn(0, (1000, 1, 2, 2, 2), dtype), randn(1, (1000, 1, 2, 2, 2), dtype)
    z_t = schedule.add_noise(z0, eps, t)
    amplified = tolerance / schedule.alphas_cumprod.sqrt().view(-1, 1, 1, 1, 1)
    assert ((schedule.predict_z0(z_t, eps, t) - z0).abs() < amplified).all()
    assert z_t.dtype == dtype
    var = schedule.add_noise(torch.zeros_like(z0), torch.ones_like(z0), t)[:, 0, 0, 0, 0] ** 2
    torch.testing.assert_close(var.double(), 1 - schedule.alphas_cumprod, atol=1e-5, rtol=1e-4)


def test_v_holds_the_same_noise_and_amplifies_no_error():
    schedule, z0, eps = Schedule(), randn(0), randn(1)
    for now in (0, 1, 100, 500, 999):
        t = torch.full((2,), now)
        z_t = schedule.add_noise(z0, eps, t)
        v = schedule.target(z0, eps, t, "v")
        torch.testing.assert_close(schedule.noise(v, z_t, t, "v"), eps, rtol=0, atol=1e-12)
        abar = schedule.alphas_cumprod[now]
        wrong = schedule.predict_z0(z_t, schedule.noise(v + 0.1, z_t, t, "v"), t)
        torch.testing.assert_close(wrong - z0, (-0.1 * (1 - abar).sqrt()).expand_as(z0), rtol=0, atol=1e-10)
        assert torch.equal(schedule.noise(eps, z_t, t, "eps"), schedule.target(z0, eps, t, "eps"))
    with pytest.raises(ValueError, match="unknown prediction 'z0'"):
        schedule.target(z0, eps, t, "z0")


@pytest.mark.parametrize("t", [1, 2, 10, 400, 999])
def test_ddpm_step_is_the_closed_form_posterior(t):
    """q(z_{t-1} | z_t, z0) by Bayes: the product of N(z_t; sqrt(a) z_{t-1}, b) and N(z_{t-1}; sqrt(abar') z0, 1 - abar')."""
    schedule = Schedule()
    z0, eps, noise = randn(0), randn(1), randn(2)
    times = torch.full((2,), t)
    z_t = schedule.add_noise(z0, eps, times)
    b, before = schedule.betas[t], schedule.alphas_cumprod[t - 1]
    precision = (1 - b) / b + 1 / (1 - before)
    mean = ((1 - b).sqrt() / b * z_t + before.sqrt() / (1 - before) * z0) / precision
    ours = schedule.ddpm_step(z_t, eps, times, noise)
    torch.testing.assert_close(ours, mean + noise / precision.sqrt(), atol=1e-9, rtol=1e-9)


def test_last_ddpm_step_adds_no_noise():
    schedule, z_t, eps, t = Schedule(), randn(0), randn(1), torch.zeros(2, dtype=torch.long)
    expected = schedule.predict_z0(z_t, eps, t)
    torch.testing.assert_close(schedule.ddpm_step(z_t, eps, t, randn(2)), expected, atol=1e-12, rtol=0)


def test_ddpm_steps_equal_monais():
    schedule, monai = Schedule(), DDPMScheduler(1000, variance_type="fixed_small", **MONAI)
    for t in (999, 998, 700, 300, 40, 2, 1, 0):
        z, out = randn(t, dtype=torch.float32), randn(t + 1, dtype=torch.float32)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
        theirs, z0_hat = monai.step(out, t, z, generator=torch.Generator().manual_seed(5))
        times = torch.full((2,), t)
        torch.testing.assert_close(schedule.ddpm_step(z, out, times, noise), theirs, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(schedule.predict_z0(z, out, times), z0_hat, atol=1e-4, rtol=1e-4)


def test_ddim_times_and_trajectory_equal_monais():
    schedule, monai = Schedule(), DDIMScheduler(1000, **MONAI)
    for steps in (1, 4, 50, 1000):
        monai.set_timesteps(steps)
        assert schedule.spaced(steps) == monai.timesteps.tolist()
    z = ours = randn(3, dtype=torch.float32)
    for t in schedule.spaced(1000):  # with all steps, MONAI's t - T / steps is the next one of the list
        out = torch.sin(3 * z)
        z, _ = monai.step(out, t, z)
        times = torch.full((2,), t)
        ours = schedule.ddim_step(ours, torch.sin(3 * ours), times, times - 1)
        torch.testing.assert_close(ours, z, atol=5e-3, rtol=1e-3)
        ours = z


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("ddim", 1), ("ddim", 7), ("ddim", 40), ("rflow", 1), ("rflow", 7)])  # fmt: skip
def test_perfect_denoiser_returns_z0_in_the_lesion_and_the_clean_background_outside(sampler, steps, background):
    schedule = Schedule(DiffusionConfig(timesteps=40))
    z0, z_bg, m = randn(0), randn(1), lesion()
    states = run(perfect(z0, schedule, sampler), z_bg, m, schedule, seeded(), sampler, steps, background)
    inside = m.expand_as(z0) == 1
    tolerance = 1e-5 if sampler == "rflow" else 1e-8  # its times are float32
    torch.testing.assert_close(states[-1].z[inside], z0[inside], atol=tolerance, rtol=0)
    assert torch.equal(states[-1].z[~inside], z_bg[~inside])
    torch.testing.assert_close(states[0].z0_hat[inside], z0[inside], atol=tolerance, rtol=0)
    assert [s.step for s in states] == list(range(1, steps + 1)) and states[-1].total == steps


def test_rectified_flow_steps_sum_to_one():
    constant = torch.ones(2, 4, 5, 5, 5, dtype=torch.float64)
    for steps in (1, 3, 7, 30):
        start = randn_like(constant, seeded())
        end = run(lambda z, t: constant, 0 * constant, lesion() * 0 + 1, Schedule(), seeded(), "rflow", steps)[-1].z
        torch.testing.assert_close(end - start, constant, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddim", 500), ("rflow", 200)])
def test_exact_score_of_a_gaussian_gives_its_mean_and_spread(sampler, steps):
    mu, sd, schedule = 0.7, 0.4, Schedule()

    def denoiser(z, t):
        if sampler == "rflow":
            tau = (t / 1000).to(z).view(-1, 1, 1, 1, 1)
            residual = (z - (1 - tau) * mu) / ((1 - tau) ** 2 * sd**2 + tau**2)
            return mu + ((1 - tau) * sd**2 - tau) * residual
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        return (1 - abar).sqrt() * (z - abar.sqrt() * mu) / (abar * sd**2 + 1 - abar)

    one = torch.ones(1, 1, 20, 20, 20, dtype=torch.float64)
    z = run(denoiser, one, one, schedule, seeded(1), sampler, steps)[-1].z
    assert z.mean().item() == pytest.approx(mu, abs=0.02)
    assert z.std().item() == pytest.approx(sd, rel=0.03)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 8), ("rflow", 8)])
def test_background_on_the_way(sampler, steps, background):
    """Clean: z_bg at every step. Noised and paper: z_bg at the noise level of the step (Eq. 10)."""
    schedule, seen = Schedule(), []
    z_bg, m = torch.full((1, 1, 20, 20, 20), 2.0), torch.zeros(1, 1, 20, 20, 20)
    m[..., 9, 9, 9] = 1
    outside = m == 0

    def denoiser(z, t):
        seen.append((z[outside].clone(), t[0]))
        return torch.zeros_like(z)

    run(denoiser, z_bg, m, schedule, seeded(1), sampler, steps, background)
    for z, t in seen[1:]:
        if background == "clean":
            assert z.eq(2).all()
        else:
            level = t / 1000 if sampler == "rflow" else (1 - schedule.alphas_cumprod[t]).sqrt()
            signal = 1 - level if sampler == "rflow" else schedule.alphas_cumprod[t].sqrt()
            assert z.std().item() == pytest.approx(level.item(), abs=0.03)
            assert z.mean().item() == pytest.approx(2 * signal.item(), abs=0.05)
    assert (seen[0][0].std() == 0) == (background == "clean")


def test_algorithm_2_to_the_letter():
    schedule, z_bg, m = Schedule(DiffusionConfig(timesteps=30)), randn(1), lesion()

    def denoiser(z, t):
        return torch.tanh(z) + 0.01 * t.view(-1, 1, 1, 1, 1)

    ours = run(denoiser, z_bg, m, schedule, seeded(), "ddpm", 30, "paper")[-1].z
    g, beta = seeded(), schedule.betas
    alpha, abar = 1 - beta, torch.cumprod(1 - beta, 0)
    z = randn_like(z_bg, g)  # line 5
    for t in range(30, 0, -1):  # the paper counts 1..T
        k = t - 1
        eps = denoiser(z, torch.full((2,), k))  # line 7
        noise = randn_like(z, g)
        var = beta[k] * (1 - abar[k - 1]) / (1 - abar[k]) if t > 1 else torch.tensor(0.0)
        z = (z - beta[k] / (1 - abar[k]).sqrt() * eps) / alpha[k].sqrt() + var.sqrt() * noise  # line 8
        noised = abar[k - 1].sqrt() * z_bg + (1 - abar[k - 1]).sqrt() * randn_like(z, g) if t > 1 else z_bg  # line 9
        z = m * z + (1 - m) * noised  # line 10
    torch.testing.assert_close(ours, z, atol=1e-9, rtol=1e-9)


def test_training_input_of_each_background_rule():
    z0, z_t, m = randn(0), randn(1), lesion()
    for rule in ("clean", "paper"):  # Eq. 4
        torch.testing.assert_close(noisy_input(z0, z_t, m, rule), torch.where(m == 1, z_t, z0))
    assert torch.equal(noisy_input(z0, z_t, m, "noised"), z_t)
    torch.testing.assert_close(blend(m, z_t, z0), torch.where(m == 1, z_t, z0))
    with pytest.raises(ValueError, match="unknown background rule 'dirty'"):
        noisy_input(z0, z_t, m, "dirty")


def test_flow_input_is_the_straight_line():
    z0, eps = randn(0), randn(1)
    z, velocity = flow_input(z0, eps, torch.tensor([0, 1000]), 1000)
    torch.testing.assert_close(z, torch.stack([z0[0], eps[1]]))
    torch.testing.assert_close(velocity, z0 - eps)


def test_noise_of_an_item_does_not_depend_on_its_batch():
    z = torch.zeros(3, 2, 4, 4, 4)
    together = randn_like(z, [torch.Generator().manual_seed(s) for s in (7, 8, 9)])
    alone = randn_like(z[:1], [torch.Generator().manual_seed(8)])
    assert torch.equal(together[1], alone[0])
    with pytest.raises(ValueError, match="3 items but 2 generators"):
        randn_like(z, seeded(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"background": "dirty"}, "unknown background rule 'dirty'"),
        ({"sampler": "ddpm", "steps": 50}, "ddpm takes all 1000 steps"),
        ({"steps": 0}, "sampling steps must lie in 1..1000"),
        ({"steps": 1001}, "sampling steps must lie in 1..1000"),
        ({"sampler": "rflow", "steps": 0}, "sampling steps must lie in 1"),
    ],
)
def test_bad_sampling_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(lambda z, t: z, randn(0), lesion(), Schedule(), seeded(), **kwargs)


def test_unknown_options_are_all_of_the_named_ones():
    assert set(SAMPLERS) == {"ddpm", "ddim", "rflow"} and set(BACKGROUNDS) == {"clean", "noised", "paper"}
    assert math.isclose(Schedule().abar(torch.tensor([-1]), torch.zeros(1, 1)).item(), 1.0)
