"""Precision: what a profile asks for, where it is heeded, and what it costs; CUDA graphs as far as a CPU can tell."""

import pytest
import torch
from torch import nn

from hrldm.train.device import autocast, graphed
from study.profiles import get_profile
from tests import tiny


def test_a_cpu_computes_in_full_precision_whatever_the_profile_says():
    x = torch.rand(4, 4)
    for name in ("quick", "paper"):
        with autocast(get_profile(name).mixed_precision, "cpu"):
            assert (x @ x).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_in_the_precision_of_its_profile():
    x = torch.rand(4, 4, device="cuda")
    for name, dtype in (("quick", torch.float32), ("gpu", torch.bfloat16), ("paper", torch.float16)):
        with autocast(get_profile(name).mixed_precision, "cuda"):
            assert (x @ x).dtype == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown mixed_precision 'fp8'"):
        autocast("fp8", "cpu")


def test_the_unet_in_bf16_is_finite_and_near_float32():
    net, g = tiny.unet().eval(), torch.Generator().manual_seed(0)
    z, masks = (torch.randn(3, c, 4, 4, 4, generator=g) for c in (4, 65))
    rest = torch.tensor([0, 1, 2]), torch.rand(3, 40, generator=g)
    with torch.no_grad():
        exact = net(z, torch.tensor([5, 300, 900]), masks, *rest)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(z, torch.tensor([5, 300, 900]), masks, *rest)
    assert rounded.isfinite().all() and not torch.equal(rounded.float(), exact)  # it was rounded somewhere
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.fixture
def captures(monkeypatch):
    """Stands for CUDA's capturing: what was captured, and whether cuDNN searched for its fastest kernels meanwhile."""
    seen = []

    def capture(model, example, allow_unused_input):
        if example[0].isnan().any():
            raise RuntimeError("cannot be captured")
        seen.append((example[0].shape, torch.backends.cudnn.benchmark))
        return lambda *inputs: (model(*inputs), example[0].shape)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return seen


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_each_shape_has_its_graph_and_the_search_for_kernels_is_as_before(
    captures, monkeypatch, searched, deterministic
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searched)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    small, large = torch.rand(2, 3), torch.rand(4, 3)
    net = nn.Linear(3, 1)
    run = graphed(net, [(small,), (large,)], "no")
    assert captures == [(small.shape, not deterministic), (large.shape, not deterministic)]
    assert torch.backends.cudnn.benchmark == searched
    for x in (torch.rand(4, 3), torch.rand(2, 3)):
        out, shape = run(x)
        assert shape == x.shape and torch.equal(out, net(x))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        graphed(net, [(small * float("nan"),)], "no")
    assert torch.backends.cudnn.benchmark == searched
