"""Precision: what a profile asks for, and where it is heeded."""

import pytest
import torch

from hrldm.train.device import autocast
from study.profiles import get_profile


def test_a_cpu_computes_in_full_precision_whatever_the_profile_says():
    x = torch.rand(4, 4)
    for name in ("quick", "paper"):
        with autocast(get_profile(name).mixed_precision, "cpu"):
            assert (x @ x).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_in_bf16_where_the_profile_says_so():
    x = torch.rand(4, 4, device="cuda")
    for name, dtype in (("quick", torch.float32), ("paper", torch.bfloat16)):
        with autocast(get_profile(name).mixed_precision, "cuda"):
            assert (x @ x).dtype == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown mixed_precision 'fp8'"):
        autocast("fp8", "cpu")
