"""Eq. 5, 8 and 9 against closed forms; the Jensen–Shannon gradient is finite wherever training can take it."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from hrldm.model.diffusion import Schedule, blend
from hrldm.model.histogram import masked_soft_histogram
from hrldm.model.losses import inpainting_loss, jensen_shannon, total_loss


def distributions(n: int, bins: int = 40, seed: int = 0) -> torch.Tensor:
    p = np.random.default_rng(seed).dirichlet(np.full(bins, 0.1), n)
    return torch.from_numpy(p * (p > 1e-4) / (p * (p > 1e-4)).sum(1, keepdims=True))  # with truly empty bins


def test_jensen_shannon_equals_scipys():
    p, q = distributions(50, seed=1), distributions(50, seed=2)
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(jensen_shannon(p, q), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_shannon_lies_in_0_ln2_is_symmetric_and_zero_only_for_equals(dtype):
    p, q = distributions(200, seed=3).to(dtype), distributions(200, seed=4).to(dtype)
    d = jensen_shannon(p, q)
    assert (d > 0).all() and (d <= math.log(2) + 1e-6).all()
    torch.testing.assert_close(d, jensen_shannon(q, p), atol=1e-7, rtol=0)
    assert jensen_shannon(p, p).abs().max() < 1e-7
    nudged = p.clone()
    nudged[:, 0], nudged[:, 1] = p[:, 0] + 0.02, p[:, 1] + 0.01
    assert (jensen_shannon(p, nudged / nudged.sum(1, keepdim=True)) > 1e-6).all()
    one, other = torch.eye(40, dtype=dtype)[[0, 5]]
    assert jensen_shannon(one, other).item() == pytest.approx(math.log(2), abs=1e-6)


def test_jensen_shannon_gradient_is_finite_with_empty_bins_and_right_elsewhere():
    one, other = torch.eye(40)[[0, 5]]
    one.requires_grad_()
    jensen_shannon(one, other).backward()
    assert one.grad.isfinite().all()
    p = torch.rand(3, 8, dtype=torch.float64) + 0.1
    p, q = (p / p.sum(1, keepdim=True)).requires_grad_(), torch.full((3, 8), 1 / 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(jensen_shannon, (p, q))


@pytest.mark.parametrize("t", [0, 1, 100, 250, 400, 500, 750, 900, 998, 999])
def test_histogram_loss_has_a_finite_gradient_at_every_t(t):
    """Through Eq. 6, which divides by sqrt(abar_t): 84-fold at t = 999."""
    g, schedule = torch.Generator().manual_seed(t), Schedule()
    z0, eps = torch.randn(2, 4, 6, 6, 6, generator=g), torch.randn(2, 4, 6, 6, 6, generator=g)
    m = torch.zeros(2, 1, 6, 6, 6)
    m[..., 2:5, 2:5, 2:5] = 1
    times = torch.full((2,), t)
    eps_hat = (0.5 * torch.randn(eps.shape, generator=g)).requires_grad_()  # an untrained network's answer
    z0_hat = blend(m, schedule.predict_z0(schedule.add_noise(z0, eps, times), eps_hat, times), z0)
    lo, hi = torch.full((4,), -3.0), torch.full((4,), 3.0)
    p, q = (masked_soft_histogram(z, m, lo, hi, 40) for z in (z0_hat, z0))
    loss = jensen_shannon(p, q).mean()
    loss.backward()
    assert eps_hat.grad.isfinite().all() and loss.isfinite()
    assert eps_hat.grad.any()
    assert eps_hat.grad[m.expand_as(eps) == 0].eq(0).all()


def test_inpainting_loss_is_equation_5():
    g = torch.Generator().manual_seed(0)
    eps, eps_hat = torch.randn(2, 3, 4, 4, 4, generator=g), torch.randn(2, 3, 4, 4, 4, generator=g)
    m = torch.zeros(2, 1, 4, 4, 4)
    m[0, 0, 1, 1, 1] = 1
    m[1, 0, :2] = 1  # 32 voxels: each sample is divided by its own volume
    by_hand = [(eps - eps_hat)[0, :, 1, 1, 1].abs().sum(), (eps - eps_hat)[1, :, :2].abs().sum() / 32]
    paper = inpainting_loss(eps, eps_hat, m)
    assert paper.item() == pytest.approx(float(sum(by_hand)) / 2, rel=1e-5)
    assert inpainting_loss(eps, eps_hat, m, "voxels_channels").item() == pytest.approx(paper.item() / 3, rel=1e-5)
    outside = eps_hat + 100 * (1 - m)
    assert inpainting_loss(eps, outside, m).item() == pytest.approx(paper.item(), rel=1e-5)
    with pytest.raises(ValueError, match="unknown inpaint_norm"):
        inpainting_loss(eps, eps_hat, m, "mean")


def test_total_loss_is_equation_9_and_lambda_0_changes_no_bit():
    inpaint, hist = torch.tensor(0.7), torch.tensor(float("nan"))
    assert total_loss(inpaint, torch.tensor(0.02), 10.0).item() == pytest.approx(0.9)
    assert total_loss(inpaint, hist, 0.0) is inpaint
    assert total_loss(inpaint, None, 10.0) is inpaint
