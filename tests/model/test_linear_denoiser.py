"""The linear denoiser: its rows are what its output is linear in, the fit is ridge regression, times interpolate."""

import numpy as np
import pytest
import torch

from hrldm.model.linear_denoiser import KNOTS, RIDGE, LinearDenoiser
from hrldm.train.ldm import built
from tests import tiny


def inputs(n: int = 3, parts: int = 8) -> dict:
    g = torch.Generator().manual_seed(0)
    m = (torch.rand(n, 1, 4, 4, 4, generator=g) > 0.5).float()
    return {
        "z_t": torch.randn(n, 4, 4, 4, 4, generator=g),
        "masks": torch.cat([torch.rand(n, parts, 4, 4, 4, generator=g), m], 1),
        "subtype": torch.arange(n) % 3,
        "histogram": torch.rand(n, 40, generator=g).softmax(1),
    }


def fitted(target: torch.Tensor, given: dict, knot: int) -> LinearDenoiser:
    linear = LinearDenoiser(4, 8, 40, 1000)
    x = linear.rows(**given).double()
    y = target.permute(0, 2, 3, 4, 1)[given["masks"][:, -1] > 0].double()
    linear.solve(knot, x.T @ x, x.T @ y)
    return linear


def test_output_is_the_ridge_regression_of_its_rows():
    given, target = inputs(), torch.randn(3, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    inside = given["masks"][:, -1] > 0
    linear = fitted(target, given, knot=3)
    x, y = linear.rows(**given).numpy(), target.permute(0, 2, 3, 4, 1)[inside].numpy()
    assert x.shape == (int(inside.sum()), 27 * 6 + 8 + 43 + 1 + 40)
    expected = x @ np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    out = linear(t=linear.times[3].expand(3), **given).permute(0, 2, 3, 4, 1)[inside].numpy()
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_times_between_two_are_interpolated_and_others_do_not_enter():
    given, target = inputs(), torch.ones(3, 4, 4, 4, 4)
    linear = fitted(target, given, knot=3)
    low, high, beyond = linear.times[3], linear.times[4], linear.times[5]
    at = linear(t=low.expand(3), **given)
    assert at.abs().mean() > 0.1
    torch.testing.assert_close(linear(t=(0.75 * low + 0.25 * high).expand(3), **given), 0.75 * at, atol=1e-5, rtol=1e-4)
    assert not linear(t=beyond.expand(3), **given).any()
    mixed = linear(t=torch.stack([low, high, beyond]), **given)
    torch.testing.assert_close(mixed[0], at[0])
    assert not mixed[1:].any()
    assert len(linear.times) == len(KNOTS) and linear.times[-1] == 999


def test_network_starts_as_the_linear_denoiser_and_without_one_from_nothing():
    torch.manual_seed(0)
    model = built(tiny.profile(), 4).eval()
    given = inputs(parts=64)
    t = torch.tensor([5, 500, 900])
    for p in model.linear.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(given["z_t"], t, given["masks"], given["subtype"], given["histogram"]), model.linear(t=t, **given)
        )
    assert not any(p.requires_grad for p in model.linear.parameters())
    assert tiny.unet(unet__linear_skip=False).linear is None


@pytest.mark.parametrize("use", [True, False])
def test_histogram_reaches_the_linear_part_only_where_the_profile_lets_it(use):
    model = tiny.unet(histogram__vector=use)
    given = inputs(parts=64)
    args = (given["z_t"], torch.tensor([5, 500, 900]), given["masks"], given["subtype"])
    with torch.no_grad():
        for p in model.linear.parameters():
            torch.nn.init.normal_(p, std=0.1)
        a, b = (model(*args, h) for h in (given["histogram"], given["histogram"].flip(1)))
    assert torch.equal(a, b) is not use
