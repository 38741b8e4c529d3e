"""The cosine schedule against published values and its closed form."""

import math

import pytest
import torch

from study.systems.cosine import CosineSchedule


def test_four_steps_as_difftumor_takes_them():
    abar = CosineSchedule(4).alphas_cumprod.tolist()
    assert abar[:3] == pytest.approx([0.847, 0.494, 0.144], abs=5e-4)
    assert abar[3] == pytest.approx(1.4e-5, abs=5e-7)


@pytest.mark.parametrize("steps", [4, 200, 300, 1000])
def test_closed_form_up_to_the_clipped_step(steps):
    schedule = CosineSchedule(steps)

    def f(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [f(t + 1) / f(0) for t in range(steps - 1)]
    assert schedule.alphas_cumprod[:-1].tolist() == pytest.approx(expected, rel=1e-9)
    assert schedule.betas[-1] == 0.9999 and (schedule.betas[:-1] < 0.9999).all()


def test_fewer_steps_are_a_part_of_the_schedule():
    few, many = CosineSchedule(3).alphas_cumprod, CosineSchedule(300).alphas_cumprod
    torch.testing.assert_close(few[:2], many[[99, 199]])


def test_noise_is_added_by_it():
    z0, eps, t = torch.ones(3, 1, 2, 2, 2), torch.zeros(3, 1, 2, 2, 2), torch.tensor([0, 2, 3])
    schedule = CosineSchedule(4)
    torch.testing.assert_close(
        schedule.add_noise(z0, eps, t)[:, 0, 0, 0, 0].double(), schedule.alphas_cumprod[t].sqrt()
    )
