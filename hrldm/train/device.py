"""Where networks run, and in which precision."""

from __future__ import annotations

import torch

from hrldm.config import Profile


def device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(profile: Profile) -> str:
    """`bf16` or `no`: what the profile says, and for `auto` bf16 only where the hardware computes in it natively.

    Raises:
        ValueError: unknown setting.
    """
    if profile.mixed_precision not in ("auto", "no", "bf16"):
        raise ValueError(f"unknown mixed_precision {profile.mixed_precision!r}; choose auto, no or bf16")
    if profile.mixed_precision != "auto":
        return profile.mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"
