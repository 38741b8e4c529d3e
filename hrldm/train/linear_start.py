"""The closed-form fit of the linear denoiser on cached latents, before the first step of training."""

import numpy as np
import torch

from hrldm.model.diffusion import Schedule, noisy_input, training_pair
from hrldm.model.linear_denoiser import KNOTS, LinearDenoiser
from hrldm.train.config import Stage2
from hrldm.train.latents import LatentCache, windowed

MOST = 1000  # nodules and variants that the regression sees
BATCH = 64


@torch.no_grad()
def fit_linear(linear: LinearDenoiser, cache: LatentCache, config: Stage2, seed: int) -> None:
    """Ridge regression of the U-Net's target inside M at each of the K times; the same noise at all of them."""
    schedule, d = Schedule(config.diffusion), config.diffusion
    keys = np.argwhere(np.ones(cache.mask.shape[:2], bool))
    if len(keys) > MOST:
        keys = keys[np.sort(np.random.default_rng(seed).choice(len(keys), MOST, replace=False))]
    if config.histogram.vector:
        linear.mean_histogram.copy_(torch.from_numpy(cache.histogram.mean(0)))
    sums = [[0.0, 0.0] for _ in KNOTS]
    for group in windowed(cache, config.unet, config.histogram.template, keys=keys):
        for rows in torch.arange(len(group)).split(BATCH):
            batch = group.take(rows, config.unet.mask_detail)
            draws = (np.random.default_rng((seed, *key)) for key in group.index[rows].tolist())
            noise = [rng.standard_normal(batch["z0"].shape[1:], np.float32) for rng in draws]
            eps = torch.from_numpy(np.stack(noise))
            given = batch["condition"], batch["subtype"], batch["histogram"]
            if not config.histogram.vector:
                given = *given[:2], linear.mean_histogram.expand(len(rows), -1)
            for k, time in enumerate(linear.times):
                t = torch.full((len(rows),), round(float(time)))
                z_t, target = training_pair(schedule, batch["z0"], eps, t, d.objective, d.prediction)
                x = linear.rows(noisy_input(batch["z0"], z_t, batch["m"], d.background), *given)
                y = target.permute(0, 2, 3, 4, 1)[batch["m"][:, 0] > 0]
                sums[k][0] += (x.T @ x).double()
                sums[k][1] += (x.T @ y).double()
    for k, (gram, moments) in enumerate(sums):
        linear.solve(k, gram, moments)
