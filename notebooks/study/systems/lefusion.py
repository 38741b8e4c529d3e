"""LeFusion-style (Zhang et al., ICLR 2025), made from its description: diffusion in voxel space, inpainted by RePaint.

Kept as published:
    space      HU clipped to -1000..400, as [-1, 1]; no autoencoder
    noise      everywhere (Eq. 1 alone), cosine schedule, T = 300; the network predicts eps
    loss       |m (eps - eps_hat)|, averaged over all voxels, also those outside m: a small lesion weighs little
    condition  16 hard bins of the lesion's histogram, concatenated to the embedding of t; the network does not see m
    sampling   RePaint (Lugmayr et al., 2022): before each step x <- m x + (1 - m) q(x_bg, t); the ancestral step with z0_hat
               clipped to [-1, 1]; jumps back of `length` steps, so that each stretch is walked `resamplings` times

Adapted:
    patches    a voxel-space U-Net is too dear for two cores. 4 x 4 x 4 voxels become 64 channels (as in DiT), which loses
               nothing, and the U-Net has the widths, windows, nodules and updates of ours, and our averaging of weights
    filter     fewer than 64 channels cannot pass the noise of 64; a linear denoiser stands beside the U-Net, as beside ours
    scale      values are divided by their root mean square, as our latents are; the limits of z0_hat too
    bins       c_hist has 40 bins, in training too; each is spread evenly over those of the 16 that it overlaps
    embedding  an MLP before the concatenation, as MAISI embeds a voxel spacing
    pasting    LeFusion leaves the background that it predicts; here the lesion is feathered into the given one
    jumps      (2, 2), also published: 598 network calls, where (5, 5) takes 1,480
    few steps  at most `most_steps` of the T (quick: 50, so 98 calls); the cosine schedule depends on (t + 1) / T alone,
               so these are a schedule of so many steps
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from hrldm.insertion.generator import Request
from hrldm.model.autoencoder import FACTOR, denormalise_hu, normalise_hu
from hrldm.model.diffusion import blend, randn_like
from hrldm.model.unet import UnetConfig
from hrldm.train.config import Stage2
from study.study import Study
from study.systems.cosine import CosineSchedule
from study.systems.peer import Peer

BINS = 16
NEIGHBOURS = 0.9  # correlation of neighbouring voxels (about zero) in lesions at 1 mm, for the filter


class Voxels(nn.Module):
    """Stands for an autoencoder: HU -1000..400 as [-1, 1], each block of 4 x 4 x 4 voxels as 64 channels. Nothing is lost."""

    latent_channels = FACTOR**3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.tensor([HIST_HU_MIN, HIST_HU_MAX]))  # so that the weights' digest names it

    def encode(self, x: Float[Tensor, "b 1 4d 4h 4w"]) -> tuple[Tensor, Tensor]:
        """CT in [0, 1] (`normalise_hu`) -> values in [-1, 1] (B, 64, d, h, w), and a standard deviation of zero."""
        lo, hi = self.window
        values = blocks((denormalise_hu(x).clamp(lo, hi) - lo) / (hi - lo) * 2 - 1)
        return values, torch.zeros_like(values)

    def decode(self, z: Float[Tensor, "b 64 d h w"]) -> Float[Tensor, "b 1 4d 4h 4w"]:
        """Inverse of `encode` within the window."""
        lo, hi = self.window
        return normalise_hu((pixelshuffle(z, 3, FACTOR) + 1) / 2 * (hi - lo) + lo)


def blocks(x: Float[Tensor, "b 1 4d 4h 4w"]) -> Float[Tensor, "b 64 d h w"]:
    """Voxels, or a voxel mask, with each block of 4 x 4 x 4 as channels."""
    return pixelunshuffle(x, 3, FACTOR)


def sixteen(histogram: Float[Tensor, "b k"]) -> Float[Tensor, "b 16"]:
    """A histogram of k equal bins in 16 over the same range; the mass of a bin is spread evenly over its width."""
    return histogram.repeat_interleave(BINS, 1).unflatten(1, (BINS, -1)).sum(2) / BINS


class BlockFilter(nn.Module):
    """Best linear estimate of eps in a block with E[z0 z0'] = C, C falling by `NEIGHBOURS` per voxel along each axis:
    sqrt(1 - abar) (abar C + (1 - abar) I)^-1 z_t. Nothing is learned."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.schedule = CosineSchedule(timesteps)
        place = torch.arange(FACTOR, dtype=torch.float64)
        line = NEIGHBOURS ** (place[:, None] - place).abs()
        variances, components = torch.linalg.eigh(torch.kron(line, torch.kron(line, line)))
        self.register_buffer("variances", variances.float().view(-1, 1, 1, 1))
        self.register_buffer("components", components.float())

    def forward(self, z_t: Float[Tensor, "b 64 d h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "b 64 d h w"]:
        abar = self.schedule.abar(t.round().long(), z_t)
        parts = torch.einsum("ck,bcdhw->bkdhw", self.components, z_t)
        parts = parts * (1 - abar).sqrt() / (abar * self.variances + 1 - abar)
        return torch.einsum("ck,bkdhw->bcdhw", self.components, parts)


class HistogramUnet(DiffusionModelUNetMaisi):
    """MAISI's U-Net beside the filter, without cross-attention; the histogram's embedding is concatenated to that of t."""

    def __init__(self, config: UnetConfig, channels: int, timesteps: int) -> None:
        super().__init__(**config.blocks, in_channels=channels, out_channels=channels, include_spacing_input=True)
        self.spacing_layer = self._create_embedding_module(BINS, 4 * config.channels[0])  # 16 bins, not 3 spacings
        self.filter = BlockFilter(timesteps)

    def forward(self, z_t: Tensor, t: Tensor, histogram: Tensor) -> Tensor:
        """Predicted noise. z_t: (B, c, d, h, w); t: (B,); histogram: (B, k)"""
        return self.filter(z_t, t) + super().forward(z_t, t, spacing_tensor=sixteen(histogram))


def repaint_times(timesteps: int, length: int, resamplings: int) -> list[int]:
    """RePaint's walk T-1, .., -1. At every multiple of `length` below T - length it jumps back up by `length`,
    `resamplings` - 1 times, so that each stretch is walked `resamplings` times. A step down calls the network."""
    times = [timesteps - 1]
    for t in range(timesteps - 2, -2, -1):
        times.append(t)
        if t >= 0 and t % length == 0 and t < timesteps - length:
            times += [t + k for _ in range(resamplings - 1) for k in range(length, -1, -1)]
    return times


class LeFusion(Peer):
    """See the module's docstring."""

    name = "lefusion"
    changes: ClassVar[dict] = {"diffusion__timesteps": 300}
    jumps: ClassVar[tuple[int, int]] = (2, 2)  # length, resamplings

    @staticmethod
    def network(config: Stage2, channels: int) -> HistogramUnet:
        return HistogramUnet(config.unet, channels, config.diffusion.timesteps)

    @staticmethod
    def losses(network: nn.Module, batch: dict[str, Tensor], config: Stage2) -> dict[str, Tensor]:
        z_t = CosineSchedule(config.diffusion.timesteps).add_noise(batch["z0"], batch["eps"], batch["t"])
        eps_hat = network(z_t, batch["t"], batch["histogram"])
        return {"inpaint": (blocks(batch["mask"]) * (batch["eps"] - eps_hat)).abs().mean()}

    @staticmethod
    def codec(study: Study) -> Voxels:
        return Voxels()

    @torch.no_grad()
    def denoise(
        self, request: Request, z_bg: Tensor, mask: Tensor, lead: Tensor | None = None, picture: Tensor | None = None
    ) -> Iterator[SimpleNamespace]:
        """The states of RePaint, one per network call; the last has the background that the network predicts."""
        timesteps = self.config.diffusion.timesteps
        schedule = CosineSchedule(min(timesteps, self.most_steps))
        walk = repaint_times(schedule.timesteps, *self.jumps)
        total = sum(following < now for now, following in itertools.pairwise(walk))
        m = blocks(mask.to(z_bg))
        histogram = torch.from_numpy(np.array(request.histogram)).to(z_bg)
        generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]
        z, step = randn_like(z_bg, generators), 0
        for now, following in itertools.pairwise(walk):
            t, noise = torch.full((len(z),), now, device=z.device), randn_like(z_bg, generators)
            if following > now:
                left = schedule.abar(t + following - now, z) / schedule.abar(t, z)  # the product of 1 - beta between
                z = left.sqrt() * z + (1 - left).sqrt() * noise
                continue
            z = blend(m, z, schedule.add_noise(z_bg, noise, t))
            eps_hat = self.unet(z, (t + 1) * (timesteps / schedule.timesteps) - 1, histogram)
            z0_hat = schedule.predict_z0(z, eps_hat, t).clamp(-self.scale, self.scale)  # [-1, 1] as scaled
            eps_hat, step = schedule.noise_of(z, z0_hat, t), step + 1
            z = schedule.ddpm_step(z, eps_hat, t, randn_like(z_bg, generators))
            yield SimpleNamespace(z=z, z0_hat=z0_hat, t=now, step=step, total=total)
