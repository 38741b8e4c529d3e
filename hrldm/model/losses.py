"""Losses of Stage II: Eq. 5 (inpainting), Eq. 8 (Jensen–Shannon) and their sum, Eq. 9."""

import torch
from torch import Tensor

DELTA = 1e-6  # delta of Eq. 5
_EPS = 1e-12  # keeps log and its gradient finite in empty bins


def inpainting_loss(eps: Tensor, eps_hat: Tensor, m: Tensor, norm: str = "paper") -> Tensor:
    """Eq. 5 per sample, then the mean over the batch.

    Args:
        eps, eps_hat: (B, c, d, h, w)
        m:            (B, 1, d, h, w) binary
        norm:         paper: divide by the lesion's voxels | voxels_channels: by voxels times c

    Raises:
        ValueError: unknown norm.
    """
    if norm not in ("paper", "voxels_channels"):
        raise ValueError(f"unknown inpaint_norm {norm!r}; choose paper or voxels_channels")
    error = (m * (eps - eps_hat)).abs().flatten(1).sum(1)
    volume = m.flatten(1).sum(1) * (1 if norm == "paper" else eps.shape[1])
    return (error / (volume + DELTA)).mean()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Eq. 8 over the last axis, in nats: symmetric, within [0, ln 2]. p, q: (..., B), each summing to one."""
    a = 0.5 * (p + q)
    log_a = (a + _EPS).log()
    kl_p = (p * ((p + _EPS).log() - log_a)).sum(-1)
    kl_q = (q * ((q + _EPS).log() - log_a)).sum(-1)
    return (0.5 * (kl_p + kl_q)).clamp_min(0)


def total_loss(inpaint: Tensor, hist: Tensor | None, lambda_hist: float) -> Tensor:
    """Eq. 9; lambda 0 (or no histogram term) leaves the inpainting loss untouched, bit for bit."""
    if lambda_hist == 0 or hist is None:
        return inpaint
    return inpaint + torch.as_tensor(lambda_hist, dtype=inpaint.dtype) * hist
