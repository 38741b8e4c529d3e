"""Where networks run, and in which precision."""

from __future__ import annotations

import psutil
import torch

from hrldm.config import Profile


def device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory_mb() -> float:
    """Free memory of the device that networks run on, in MB."""
    free = torch.cuda.mem_get_info()[0] if device() == "cuda" else psutil.virtual_memory().available
    return free / 2**20


def autocast(profile: Profile, kind: str) -> torch.autocast:
    """Mixed precision as the profile says, on `kind` of device; full precision on a CPU without instructions for bf16, which
    takes 20 times as long with it (one with them: two thirds of the time of float32).

    Not accelerate's own: that keeps one precision a process, and a notebook may open profiles of two.

    Raises:
        ValueError: unknown setting.
    """
    if profile.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"unknown mixed_precision {profile.mixed_precision!r}; choose no or bf16")
    able = kind == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=profile.mixed_precision == "bf16" and able)
