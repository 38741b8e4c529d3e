"""The differentiable histogram is Eq. 7, in value and in gradient, without its N x B matrix."""

import numpy as np
import pytest
import torch

from hrldm.model import histogram
from hrldm.model.histogram import dense_histogram, masked_soft_histogram, soft_histogram
from hrldm.nodules.histograms import histogram_jsd, histogram_moments, hu_histogram


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def eq7(values: np.ndarray, lo: float, hi: float, bins: int) -> np.ndarray:
    """Eq. 7 in plain numpy float64; what lies outside counts at the edge."""
    centres = np.linspace(lo, hi, bins)
    distance = np.abs(np.clip(values, lo, hi)[:, None] - centres) / (centres[1] - centres[0])
    return np.maximum(1 - distance, 0).sum(0) / len(values)


@pytest.mark.parametrize("bins", [2, 7, 40, 256])
def test_equals_equation_7_in_float64(bins):
    rng = np.random.default_rng(bins)
    values = rng.normal(0, 2, (3, 5000))
    lo, hi = np.array([-3.0, -1.0, 0.5]), np.array([3.0, 5.0, 0.9])
    ours = soft_histogram(torch.from_numpy(values), column(*lo), column(*hi), bins).numpy()
    for row in range(3):
        np.testing.assert_allclose(ours[row], eq7(values[row], lo[row], hi[row], bins), atol=1e-12)
        dense = dense_histogram(torch.from_numpy(values[row]), lo[row], hi[row], bins)
        np.testing.assert_allclose(ours[row], dense.numpy(), atol=1e-12)


def test_float32_stays_within_1e6_of_float64():
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    exact = soft_histogram(values.double(), column(-3), column(3), 40)
    single = soft_histogram(values, column(-3).float(), column(3).float(), 40)
    assert (single - exact).abs().max() < 1e-6


def test_values_on_the_centres_give_numpys_histogram():
    rng = np.random.default_rng(1)
    k = rng.integers(0, 11, 4000)
    expected = np.histogram(k, bins=11, range=(-0.5, 10.5))[0] / 4000
    ours = soft_histogram(torch.from_numpy(k * 0.3 - 1.0)[None], column(-1.0), column(2.0), 11)[0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


def test_many_fine_bins_pooled_converge_to_numpys_histogram():
    values = np.random.default_rng(2).uniform(0, 1, 20_000)
    expected = np.histogram(values, bins=10, range=(0, 1))[0] / len(values)
    errors = []
    for fine in (1, 10, 100, 1000):  # fine bins in each of numpy's; their centres tile [0, 1] as numpy's edges do
        half = 0.05 / fine
        ours = soft_histogram(torch.from_numpy(values)[None], column(half), column(1 - half), 10 * fine)[0]
        errors.append(np.abs(ours.numpy().reshape(10, fine).sum(1) - expected).max())
    assert errors[-1] < 3e-4
    assert errors[-1] < 0.1 * errors[0]


def test_gradient_by_gradcheck():
    values = torch.empty(2, 60, dtype=torch.float64).uniform_(-1.2, 1.2, generator=torch.Generator().manual_seed(3))
    width = 2 / 8
    u = (values + 1) / width
    values = (values + 0.2 * width * ((u - u.round()).abs() < 0.05)).requires_grad_()  # off the kinks at the centres
    weights = (torch.arange(120).reshape(2, 60) % 3 > 0).double()
    centres = column(-1, -1), column(1, 1)
    assert torch.autograd.gradcheck(lambda v: soft_histogram(v, *centres, 9), values)
    assert torch.autograd.gradcheck(lambda v: histogram._normalised(v, *centres, 9, weights), values)


def test_gradient_equals_that_of_the_dense_formula():
    values = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    direction = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    fast, dense = values.clone().requires_grad_(), values.clone().requires_grad_()
    (soft_histogram(fast[None], column(-2), column(2), 40)[0] @ direction).backward()
    (dense_histogram(dense, -2.0, 2.0, 40) @ direction).backward()
    torch.testing.assert_close(fast.grad, dense.grad, atol=1e-12, rtol=0)


def test_more_values_than_one_chunk(monkeypatch):
    g = torch.Generator().manual_seed(9)
    values, weights = torch.randn(3, 1000, generator=g).double(), torch.rand(3, 1000, generator=g).double()
    results = []
    for chunk in (10**6, 100):
        monkeypatch.setattr(histogram, "_CHUNK", chunk)
        v = values.clone().requires_grad_()
        h = histogram._normalised(v, column(-2, -2, -2), column(2, 2, 2), 20, weights)
        h.square().sum().backward()
        results.append((h.detach(), v.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-14, rtol=0)


def test_one_value_between_two_centres_in_closed_form():
    value = column(0.3).requires_grad_()  # centres 0, 1, 2
    h = soft_histogram(value, column(0), column(2), 3)
    torch.testing.assert_close(h, torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64))
    for k, slope in enumerate((-1.0, 1.0, 0.0)):
        (grad,) = torch.autograd.grad(h[0, k], value, retain_graph=True)
        assert grad.item() == pytest.approx(slope)


def test_edge_bins_catch_what_falls_outside_without_gradient():
    values = torch.tensor([[-50.0, -1.0, 1.0, 7.0, 1e6]], dtype=torch.float64, requires_grad=True)
    h = soft_histogram(values, column(-1), column(1), 5)
    torch.testing.assert_close(h, torch.tensor([[0.4, 0, 0, 0, 0.6]], dtype=torch.float64))
    h[0, 0].backward()
    assert values.grad[0, [0, 3, 4]].eq(0).all()
    assert values.grad[0, 1] != 0


def test_mask_weights_leave_only_the_lesion():
    g = torch.Generator().manual_seed(6)
    values, mask = torch.randn(1, 3000, generator=g).double(), torch.rand(1, 3000, generator=g) < 0.2
    ours = histogram._normalised(values, column(-2), column(2), 12, mask.double())
    alone = soft_histogram(values[mask][None], column(-2), column(2), 12)
    torch.testing.assert_close(ours, alone, atol=1e-12, rtol=0)
    assert ours.sum().item() == pytest.approx(1)


def test_masked_features_per_sample_and_channel():
    g = torch.Generator().manual_seed(7)
    features = torch.randn(2, 3, 4, 5, 6, generator=g)
    mask = torch.rand(2, 1, 4, 5, 6, generator=g) < 0.5
    lo, hi = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([2.0, 1.0, 0.5])
    ours = masked_soft_histogram(features, mask, lo, hi, 10)
    assert ours.shape == (2, 3, 10)
    for b in range(2):
        for c in range(3):
            inside = features[b, c][mask[b, 0]].double().numpy()
            np.testing.assert_allclose(ours[b, c], eq7(inside, lo[c].item(), hi[c].item(), 10), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_soft_histogram(features, mask, lo, hi, 10), ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 1}, "at least two bins"),
        ({"hi": column(0)}, "range is empty"),
        ({"values": torch.zeros(1, 0)}, "empty lesion"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"values": torch.zeros(1, 5), "lo": column(0), "hi": column(1), "bins": 4} | change
    with pytest.raises(ValueError, match=message):
        soft_histogram(**arguments)


def test_hu_histogram_clips_to_its_range():
    values = np.array([-3000, -1000, -999, 0, 399, 400, 2000])
    h = hu_histogram(values)
    assert h.dtype == np.float64 and h.shape == (40,)
    assert h[0] == pytest.approx(3 / 7) and h[-1] == pytest.approx(3 / 7) and h.sum() == pytest.approx(1)
    assert h[np.flatnonzero(h)[1]] == pytest.approx(1 / 7)
    with pytest.raises(ValueError, match="empty lesion"):
        hu_histogram(values[:0])


def test_moments_of_a_histogram_are_those_of_its_values():
    values = np.random.default_rng(8).normal(-300, 120, 50_000)
    mean, sd = histogram_moments(hu_histogram(values))
    assert mean == pytest.approx(values.mean(), abs=1)
    assert sd == pytest.approx(np.hypot(values.std(), 35 / np.sqrt(12)), abs=1)  # a bin is 35 HU wide


def test_jsd_reaches_its_bounds_and_is_symmetric():
    rng = np.random.default_rng(0)
    p, q = rng.random(40), rng.random(40)
    left, right = np.repeat([1.0, 0.0], 20), np.repeat([0.0, 1.0], 20)
    assert histogram_jsd(p, p) == pytest.approx(0, abs=1e-12)
    assert histogram_jsd(left, right) == pytest.approx(np.log(2))
    a = (p / p.sum() + q / q.sum()) / 2  # Eq. 8 as printed
    eq8 = 0.5 * (p / p.sum() * np.log(p / p.sum() / a)).sum() + 0.5 * (q / q.sum() * np.log(q / q.sum() / a)).sum()
    assert histogram_jsd(p, q) == pytest.approx(eq8) == histogram_jsd(q, p)
    with pytest.raises(ValueError, match="some mass"):
        histogram_jsd(np.zeros(3), p[:3])
