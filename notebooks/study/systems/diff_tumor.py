"""DiffTumor-style generation (Chen et al., CVPR 2024), from its published description, on our autoencoder and crops.

Kept: the network sees the latent of the crop whose lesion is blanked out, and the mask; the whole latent is noised; eps is
compared by L1 everywhere; cosine schedule; T = 4 with the ancestral sampler and z0_hat clipped, meant for early tumours, and
T = 200 with 50 DDIM steps. It takes neither subtype nor histogram: one network for all subtypes.

Adapted: our autoencoder for its VQ-GAN, so latents are scaled to the training set's 0.1-99.9 percentiles instead of the
codebook's range; our U-Net's widths for its factorised attention; window -1000..1000 HU, so that its fill value 0 of
[-1, 1] is `FILL_HU`; the crop's window of the other systems; nodules of all sizes in both regimes; feathering for its
Gaussian blending.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm.insertion.generator import Request
from hrldm.model.diffusion import Ddim, Ddpm, randn_like
from hrldm.model.unet import latent_masks
from hrldm.train.config import Stage2
from hrldm.train.latents import LatentCache
from study.systems.cosine import CosineSchedule
from study.systems.peer import Peer

FILL_HU = 0.0
CLIP = (0.001, 0.999)  # quantiles of the training latents that z0_hat is kept within


def blanked(background: np.ndarray, mask: np.ndarray, histogram: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The crop with its lesion blanked out."""
    return np.where(mask, np.float32(FILL_HU), background)


class DiffTumorUNet(nn.Module):
    """eps_theta([z_t, E(x (1 - m)), m], t), and the range of the latents it was trained on."""

    def __init__(self, config: Stage2, channels: int) -> None:
        super().__init__()
        self.net = DiffusionModelUNetMaisi(**config.unet.blocks, in_channels=2 * channels + 1, out_channels=channels)
        self.register_buffer("low", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("high", torch.zeros(channels, 1, 1, 1))

    def forward(self, z_t: Tensor, t: Tensor, picture: Tensor, m: Tensor) -> Tensor:
        return self.net(torch.cat([z_t, picture, 2 * m - 1], 1), t)


class DiffTumor(Peer):
    """T = 4; see the module docstring."""

    name = "diff-tumor"
    changes = {"diffusion__timesteps": 4}
    picture = staticmethod(blanked)
    steps = 4
    sampler = Ddpm
    network = DiffTumorUNet

    @staticmethod
    def prepare(network: DiffTumorUNet, cache: LatentCache) -> None:
        values = np.moveaxis(np.asarray(cache.mean[:, 0]), 1, 0).reshape(len(network.low), -1)
        for bound, q in zip((network.low, network.high), CLIP, strict=True):
            bound.copy_(torch.from_numpy(np.quantile(values, q, axis=1) * cache.scale).view_as(bound))

    @staticmethod
    def losses(network: nn.Module, batch: dict[str, Tensor], config: Stage2) -> dict[str, Tensor]:
        z_t = CosineSchedule(config.diffusion.timesteps).add_noise(batch["z0"], batch["eps"], batch["t"])
        return {"l1": F.l1_loss(network(z_t, batch["t"], batch["picture"], batch["m"]), batch["eps"])}

    def denoise(
        self, request: Request, z_bg: Tensor, mask: Tensor, lead: Tensor | None = None, picture: Tensor | None = None
    ) -> Iterator[SimpleNamespace]:
        schedule = CosineSchedule(self.config.diffusion.timesteps)
        solver, generators = self.sampler(schedule), [torch.Generator().manual_seed(int(s)) for s in request.seeds]
        m = latent_masks(mask.to(z_bg.device))[0]
        z = randn_like(z_bg, generators)
        steps = min(self.steps, self.most_steps)
        for i, (now, following) in enumerate(itertools.pairwise(solver.times(steps)), start=1):
            t = torch.full((len(z),), now, device=z.device)
            eps_hat = self.unet(z, t, picture, m)
            z0_hat = schedule.predict_z0(z, eps_hat, t).clamp(self.unet.low, self.unet.high)
            eps_hat = schedule.noise_of(z, z0_hat, t)
            z = solver.step(z, eps_hat, now, following, lambda: randn_like(z_bg, generators))[1]
            yield SimpleNamespace(z=z, z0_hat=z0_hat, t=now, step=i, total=steps)


class DiffTumor200(DiffTumor):
    """T = 200 and 50 DDIM steps."""

    name = "diff-tumor-200"
    changes = {"diffusion__timesteps": 200}
    steps = 50
    sampler = Ddim
