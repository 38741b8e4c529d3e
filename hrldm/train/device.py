"""Where networks run, in which precision, and whether the same seed gives the same bits.

On a CPU it does, on one machine with one number of threads. On a GPU sums are taken in any order unless
`HRLDM_DETERMINISTIC=1` is set, as the tests do; that costs speed.
"""

from __future__ import annotations

import os

import psutil
import torch

from hrldm.config import Profile

if os.environ.get("HRLDM_DETERMINISTIC") == "1" and torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first call
    torch.use_deterministic_algorithms(True, warn_only=True)  # what has no deterministic form says so
    torch.backends.cudnn.benchmark = False


def device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory_mb() -> float:
    """Free memory of the device that networks run on, in MB."""
    free = torch.cuda.mem_get_info()[0] if device() == "cuda" else psutil.virtual_memory().available
    return free / 2**20


def autocast(profile: Profile, kind: str) -> torch.autocast:
    """Mixed precision as the profile says, on `kind` of device; full precision on a CPU, where bf16 helps nobody: one
    without instructions for it takes 20 times as long (the paper profile's step: 16 minutes), and on two cores with
    `avx512_bf16` a convolution of the released network was measured at 161 GFLOP/s in bf16 against 222 in float32.

    Not accelerate's own: that keeps one precision a process, and a notebook may open profiles of two.

    Raises:
        ValueError: unknown setting.
    """
    if profile.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"unknown mixed_precision {profile.mixed_precision!r}; choose no or bf16")
    return torch.autocast(kind, torch.bfloat16, enabled=profile.mixed_precision == "bf16" and kind == "cuda")
