"""LesionDiffusion-style generation (its inpainting network, LINet), from its published description, on our autoencoder and crops.

Kept: the network sees the composite latent z~_t = (1 - M) z0 + M z_t (Eq. 4 here) and M, one channel of the latent grid; it
predicts the noise and a logit of the lesion's mask; cross-attention takes one token per attribute. With eps and the sum over
channels and voxels,

    L = mean_b sum |M (eps - eps_hat)| / (|bbox(M)| + 1e-6)  +  1 - Dice(sigmoid(logit), M)

where the denominator is the volume of M's bounding box. Sampling takes 200 DDIM steps with eta = 1, that is with the
posterior variance. In each, the clean background is pasted around M, and then the predicted soft mask overwrites M. T = 1000
and its betas are those of the paper. A nodule costs 200 network calls as published.

Adapted: our autoencoder for its VQ-GAN, with our window of HU for its piecewise linear one; our U-Net's widths, window,
optimiser, learning rate and number of updates; learned tokens for its text encoder's (BiomedCLIP), of the attributes that every
request has: subtype, size bin, and how irregular the mask is. The histogram is not shown. Masks are given, so its mask
generator (LMNet) is left out. Times are spaced evenly, ending at 0. The soft mask may pass M's border while sampling, but the
last paste is within M, and the decoded lesion is feathered into the crop, as in all systems.

Profiles of few sampling steps take fewer here too (`most_steps`; quick: 50).
"""

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.losses import DiceLoss
from torch import Tensor, nn

from hrldm.config import SIZE_BINS_MM
from hrldm.insertion.generator import Request
from hrldm.model.diffusion import Schedule, blend, randn_like
from hrldm.model.losses import DELTA
from hrldm.model.unet import UnetConfig, latent_masks
from hrldm.train.config import Stage2
from study.systems.peer import Peer

ATTRIBUTES, VALUES = 3, 3  # subtype, size bin, irregularity; each 0, 1 or 2
IRREGULAR = (1.1, 1.2)  # `irregularity` between the values, about the thirds of lidc-mini
STEPS = 200


class LINet(nn.Module):
    """eps_hat and the mask's logit, from [z~_t, M], t and one token per attribute."""

    def __init__(self, config: UnetConfig, channels: int) -> None:
        super().__init__()
        self.net = DiffusionModelUNetMaisi(
            **config.blocks,
            in_channels=channels + 1,
            out_channels=channels + 1,
            with_conditioning=True,
            cross_attention_dim=config.ctx_dim,
        )
        self.embedding = nn.Embedding(ATTRIBUTES * VALUES, config.ctx_dim)

    def tokens(self, attributes: Int[Tensor, "b 3"]) -> Float[Tensor, "b 3 d_ctx"]:
        """The learned token of each attribute's value."""
        return self.embedding(attributes + VALUES * torch.arange(ATTRIBUTES, device=attributes.device))

    def forward(self, z: Tensor, m: Tensor, t: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like z (B, c, d, h, w) and logit like m (B, 1, d, h, w). t: (B,); attributes: (B, 3), see `attributes_of`"""
        out = self.net(torch.cat([z, m], 1), t, context=self.tokens(attributes))
        return out[:, :-1], out[:, -1:]


def attributes_of(mask: Float[Tensor, "b 1 D H W"], subtype: Int[Tensor, " b"]) -> Int[Tensor, "b 3"]:
    """Subtype, size bin (`size_bin`, of the equivalent diameter) and class of irregularity, from masks at 1 mm."""
    diameter = 2 * _ball_radius(mask)
    size = torch.bucketize(diameter, torch.tensor([hi for _, hi in SIZE_BINS_MM[:-1]]).to(diameter))
    irregular = torch.bucketize(irregularity(mask), torch.tensor(IRREGULAR).to(diameter))
    return torch.stack([subtype, size, irregular], 1)


def irregularity(mask: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, " b"]:
    """Mean squared distance from the centroid, over that of the ball of equal volume, 3/5 R^2: 1 for a ball, else more."""
    spread = 3 / 12  # of a voxel about its own centre
    for profile in _profiles(mask):
        share, x = profile / profile.sum(1, keepdim=True), torch.arange(profile.shape[1]).to(mask)
        spread = spread + (share * (x - (share @ x)[:, None]).square()).sum(1)
    return spread / (0.6 * _ball_radius(mask).square())


def bounding_box_volume(m: Float[Tensor, "b 1 d h w"]) -> Int[Tensor, " b"]:
    """|bbox(M)| in voxels of M's grid; M is not empty."""
    hits = [(profile > 0).int() for profile in _profiles(m)]
    return math.prod(hit.shape[1] - hit.argmax(1) - hit.flip(1).argmax(1) for hit in hits)


def _ball_radius(mask: Tensor) -> Tensor:
    return (mask.flatten(1).sum(1) * (3 / (4 * math.pi))) ** (1 / 3)


def _profiles(mask: Tensor) -> list[Tensor]:
    """Along each axis, the number of voxels at each position (B, n)."""
    return [mask.sum([other for other in (1, 2, 3, 4) if other != axis]) for axis in (2, 3, 4)]


def ancestral_step(
    schedule: Schedule, z_t: Tensor, eps_hat: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor
) -> Tensor:
    """One DDIM step t -> t_prev with eta = 1 (Song et al., Eq. 12 and 16); no noise where t_prev < 0."""
    abar, abar_prev = schedule.abar(t, z_t), schedule.abar(t_prev, z_t)
    variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    towards_z_t = (1 - abar_prev) * (abar / abar_prev / (1 - abar)).sqrt()  # sqrt(1 - abar_prev - variance)
    return abar_prev.sqrt() * schedule.predict_z0(z_t, eps_hat, t) + towards_z_t * eps_hat + variance.sqrt() * noise


class LesionDiffusion(Peer):
    """See the module's docstring."""

    name: ClassVar[str] = "lesion-diffusion"

    @staticmethod
    def network(config: Stage2, channels: int) -> LINet:
        return LINet(config.unet, channels)

    @staticmethod
    def losses(network: nn.Module, batch: dict[str, Tensor], config: Stage2) -> dict[str, Tensor]:
        z0, m, t, eps = (batch[name] for name in ("z0", "m", "t", "eps"))
        z_t = Schedule(config.diffusion).add_noise(z0, eps, t)
        eps_hat, logit = network(blend(m, z_t, z0), m, t, attributes_of(batch["mask"], batch["subtype"]))
        error = (m * (eps - eps_hat)).abs().flatten(1).sum(1)
        inpaint = (error / (bounding_box_volume(m) + DELTA)).mean()
        return {"inpaint": inpaint, "dice": DiceLoss(sigmoid=True)(logit, m)}

    @property
    def steps(self) -> int:
        """DDIM steps, each one network call."""
        return min(STEPS, self.most_steps, self.config.diffusion.timesteps)

    @torch.no_grad()
    def denoise(
        self, request: Request, z_bg: Tensor, mask: Tensor, lead: Tensor | None = None, picture: Tensor | None = None
    ) -> Iterator[SimpleNamespace]:
        schedule = Schedule(self.config.diffusion)
        generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]
        mask = mask.to(z_bg.device)
        attributes = attributes_of(mask, torch.tensor(request.subtype, device=z_bg.device))
        asked = m = latent_masks(mask)[0]
        z = blend(m, randn_like(z_bg, generators), z_bg)
        for i, (now, following) in enumerate(itertools.pairwise([*schedule.spaced(self.steps), -1]), start=1):
            t, t_prev = (torch.full((len(z),), time, device=z.device) for time in (now, following))
            eps_hat, logit = self.unet(z, m, t, attributes)
            z0_hat = schedule.predict_z0(z, eps_hat, t)
            z = ancestral_step(schedule, z, eps_hat, t, t_prev, randn_like(z_bg, generators))
            m = logit.sigmoid()  # overwrites M
            z = blend(m if i < self.steps else asked * m, z, z_bg)
            yield SimpleNamespace(z=z, z0_hat=z0_hat, t=now, step=i, total=self.steps)
