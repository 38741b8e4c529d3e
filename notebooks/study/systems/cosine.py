"""The cosine noise schedule (Nichol & Dhariwal, 2021, Eq. 17), which DiffTumor and LeFusion use."""

import math

import torch

from hrldm.model.diffusion import Schedule

OFFSET = 0.008  # s
LARGEST_BETA = 0.9999  # without a limit the last step would leave nothing of z0


class CosineSchedule(Schedule):
    """abar_t = f(t + 1) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), t = 0..T-1; so abar depends on (t + 1) / T alone."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        fraction = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        f = (math.pi / 2 * (fraction + OFFSET) / (1 + OFFSET)).cos().square()
        self.betas = (1 - f[1:] / f[:-1]).clamp_max(LARGEST_BETA)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
