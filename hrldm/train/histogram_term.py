"""L_hist (Section 3.2.3): the histogram term of Eq. 8 on the lesions of a batch.

Decoding the whole ẑ0 would dominate a training step, so only a small cube around each lesion is decoded, and only as
far as D_trunc. All cubes have the same side, so a step decodes once, without a loop over nodules. GroupNorm is global,
so p and q are read from the same cube. The target q needs no gradient and, with latents at their posterior mean, never
changes: it is computed once per nodule and variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrldm.model.autoencoder import FACTOR, Autoencoder, denormalise_hu
from hrldm.model.diffusion import blend
from hrldm.model.histogram import masked_soft_histogram
from hrldm.model.losses import jensen_shannon
from hrldm.train.config import Stage2
from hrldm.train.device import autocast
from hrldm.train.latents import Windowed

RANGE_SAMPLES = 64  # lesions whose features set the bin range
BATCH = 16  # lesions decoded at once for the targets


@dataclass(frozen=True, eq=False)
class Cubes:
    """The cubes of n lesions within their windows.

    start: (n, 3) first latent voxel; side: of the cubes, in latent voxels
    """

    start: Tensor
    side: int

    def of(self, z: Tensor, factor: int = 1) -> Tensor:
        """Cut (n, c, side·factor, …) from latents (n, c, s, s, s), or from voxels with ``factor=FACTOR``."""
        reach = torch.arange(self.side * factor, device=z.device)
        x, y, w = (factor * self.start[:, axis, None] + reach for axis in range(3))
        n = torch.arange(len(z), device=z.device)[:, None, None, None]
        return z.movedim(1, -1)[n, x[:, :, None, None], y[:, None, :, None], w[:, None, None, :]].movedim(-1, 1)

    def __getitem__(self, rows) -> Cubes:
        return Cubes(self.start[rows], self.side)


def lesion_cubes(mask: Tensor, max_voxels: int) -> Cubes:
    """Cubes of at most `max_voxels` around the lesion voxel nearest to each lesion's middle, so all contain lesion.

    mask: (n, 1, D, D, D), none empty
    """
    grid = mask.shape[-1] // FACTOR
    side = min(max(max_voxels // FACTOR, 1), grid)
    start = []
    for lesion in mask[:, 0] > 0:
        voxels = lesion.nonzero()
        middle = voxels[((voxels - voxels.double().mean(0)) ** 2).sum(1).argmin()]
        start.append((((middle + 0.5) / FACTOR - side / 2).round().long()).clamp(0, grid - side))
    return Cubes(torch.stack(start), side)


class HistogramTerm:
    """Callable L_hist of a batch; see `__call__`.

    Args:
        groups: nodules that L_hist is computed for
        scale:  of their latents
        ranges: lo, hi of other nodules; None computes them from the groups
        lo, hi: (C,) first and last bin centre per channel: 0.1 and 99.9 percentile of training lesions' features

    Raises:
        ValueError: unknown histogram.space, or no autoencoder.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        groups: Sequence[Windowed],
        scale: float,
        config: Stage2,
        ranges: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if config.histogram.space not in ("feature", "hu"):
            raise ValueError(f"unknown histogram.space {config.histogram.space!r}; choose feature or hu")
        if autoencoder is None:
            raise ValueError("histogram.weight > 0 needs the autoencoder, whose frozen decoder L_hist reads")
        self.config, self.scale, self.device, self.groups = config, scale, groups[0].z0.device, groups
        self.decoder = autoencoder.to(self.device).eval().requires_grad_(False)
        self.cubes = {id(g): lesion_cubes(g.mask, config.histogram.max_voxels) for g in groups}
        self.lo, self.hi = self._ranges() if ranges is None else ranges
        self._targets: dict[int, Tensor] = {}

    def features(self, z: Tensor) -> Tensor:
        """Features of scaled latent cubes (n, c, d, h, w): D_trunc, or HU with ``histogram.space="hu"``."""
        z = z / self.scale
        with autocast(self.config.mixed_precision, z.device.type):
            if self.config.histogram.space == "hu":
                return denormalise_hu(self.decoder.decode(z)).float()
            return self.decoder.decode_truncated(z).float()

    def histogram(self, z: Tensor, mask: Tensor) -> Tensor:
        """Per-channel histograms (n, C, B) of scaled latent cubes inside their lesions (n, 1, D, H, W)."""
        return masked_soft_histogram(self.features(z), mask, self.lo, self.hi, self.config.histogram.bins)

    @torch.no_grad()
    def _ranges(self) -> tuple[Tensor, Tensor]:
        # the untouched variants
        own = [(g, r) for g in self.groups for r in (g.index[:, 1] == 0).nonzero()[:, 0].tolist()]
        chosen = np.linspace(0, len(own) - 1, min(RANGE_SAMPLES, len(own))).astype(int)
        values = []
        for g, r in (own[i] for i in chosen):
            cube = self.cubes[id(g)][[r]]
            inside = cube.of(g.mask[[r]], FACTOR)[0, 0]
            values.append(self.features(cube.of(g.z0[[r]]))[0][:, inside])
        pooled = torch.cat(values, 1).cpu().numpy()
        lo, hi = np.percentile(pooled, (0.1, 99.9), axis=1)
        hi = np.maximum(hi, lo + 1e-6)  # a constant channel must not divide by zero
        return (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (lo, hi))

    def has_ranges(self, lo: Sequence[float], hi: Sequence[float]) -> bool:
        """Whether `lo` and `hi` are its own, to 1 % of their span: another decoder's features have others."""
        given, own = torch.tensor([lo, hi], device=self.device), torch.stack([self.lo, self.hi])
        return given.shape == own.shape and bool(((given - own).abs() <= 0.01 * (self.hi - self.lo) + 1e-6).all())

    @torch.no_grad()
    def targets(self, g: Windowed) -> Tensor:
        """q of Eq. 8 (n, C, B) of a whole group, computed at the first call."""
        if id(g) not in self._targets:
            rows = torch.arange(len(g), device=self.device).split(BATCH)
            parts = tqdm(rows, desc="histograms", mininterval=10, disable=len(g) < 500)
            cubes = self.cubes[id(g)]
            self._targets[id(g)] = torch.cat(
                [self.histogram(cubes[r].of(g.z0[r]), cubes[r].of(g.mask[r], FACTOR)) for r in parts]
            )
        return self._targets[id(g)]

    def __call__(self, z0_hat: Tensor, batch: dict) -> Tensor:
        """Eq. 8, mean over channels and over the batch; nodules with t > `histogram.t_max` count zero.

        Args:
            z0_hat: (B, c, s, s, s), first composited with z0 here, since Eq. 5 does not train it outside M
            batch:  from `Batches.draw`, with times in ascending strata: nodules that can only be too noisy are not decoded
        """
        size, t_max, timesteps = len(z0_hat), self.config.histogram.t_max, self.config.diffusion.timesteps
        last = timesteps - 1 if t_max is None else t_max
        k = min(size, math.ceil(size * (last + 1) / timesteps))
        if k <= 0:
            return z0_hat.new_zeros(())
        g, rows, z0, t = batch["group"], batch["rows"][:k], batch["z0"][:k], batch["t"][:k]
        cube = self.cubes[id(g)][rows]
        mask = cube.of(batch["mask"][:k], FACTOR)
        if self.config.latents.sample:
            with torch.no_grad():
                q = self.histogram(cube.of(z0), mask)
        else:
            q = self.targets(g)[rows]
        composed = blend(batch["m"][:k], z0_hat[:k], z0)
        divergence = jensen_shannon(self.histogram(cube.of(composed), mask), q).mean(1)
        return (divergence * (t <= last)).sum() / size
