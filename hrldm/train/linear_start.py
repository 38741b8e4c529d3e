"""The closed-form fit of the linear denoiser on cached latents, before the first step of training."""

from __future__ import annotations

import numpy as np
import torch

from hrldm.config import Profile
from hrldm.model.diffusion import Schedule, noisy_input, training_pair
from hrldm.model.linear_denoiser import KNOTS, LinearDenoiser
from hrldm.model.unet import latent_masks
from hrldm.model.window import by_side
from hrldm.train.latents import LatentCache, take, windows

MOST = 1000  # nodules and variants that the regression sees
BATCH = 64


@torch.no_grad()
def fit_linear(
    linear: LinearDenoiser, cache: LatentCache, profile: Profile, seed: int, device: torch.device | str = "cpu"
) -> None:
    """Ridge regression of the U-Net's target inside M at each of the K times; the same noise at all of them."""
    schedule, places = Schedule.from_profile(profile), windows(cache, profile)
    keys = np.array(list(places))
    if len(keys) > MOST:
        keys = keys[np.sort(np.random.default_rng(seed).choice(len(keys), MOST, replace=False))]
    groups = by_side(places[tuple(key)] for key in keys)
    if profile.use_c_hist:
        linear.mean_histogram.copy_(torch.from_numpy(cache.histogram.mean(0)))
    sums = [[0.0, 0.0] for _ in KNOTS]
    for rows in (group[i : i + BATCH] for group in groups for i in range(0, len(group), BATCH)):
        batch = {name: value.to(device) for name, value in take(cache, keys[rows], places).items()}
        noise = [
            np.random.default_rng((seed, *keys[i])).standard_normal(batch["z0"].shape[1:], np.float32) for i in rows
        ]
        eps = torch.from_numpy(np.stack(noise)).to(device)
        m, masks = latent_masks(batch["mask"], profile.mask_detail)
        histogram = batch["histogram"] if profile.use_c_hist else linear.mean_histogram.expand(len(rows), -1)
        for k, time in enumerate(linear.times):
            t = torch.full((len(rows),), round(float(time)), device=device)
            z_t, target = training_pair(schedule, batch["z0"], eps, t, profile.objective, profile.prediction)
            x = linear.rows(noisy_input(batch["z0"], z_t, m, profile.background), masks, batch["subtype"], histogram)
            y = target.permute(0, 2, 3, 4, 1)[m[:, 0] > 0]
            sums[k][0] += (x.T @ x).double()
            sums[k][1] += (x.T @ y).double()
    for k, (gram, moments) in enumerate(sums):
        linear.solve(k, gram, moments)
