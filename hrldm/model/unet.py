"""Stage II's network (Section 3.2.1): MAISI's 3D U-Net with subtype, histogram and mask conditions.

    eps_hat = eps_theta([z~_t, M], t, c_type, c_hist)

c_type is an embedding added to that of t; c_hist = W2 silu(W1 h + b1) + b2 (Eq. 3) enters by cross-attention. With one
token, as in the paper, the attention softmax is 1 for every query, so c_hist acts as an additive bias that is the same
everywhere. ``tokens = B`` gives one token per bin instead, among which attention can choose.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.utils import pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm.config import SUBTYPES
from hrldm.model.autoencoder import FACTOR
from hrldm.model.histogram import HistogramConfig
from hrldm.model.linear_denoiser import LinearDenoiser


@dataclass(frozen=True)
class UnetConfig:
    """Architecture of the U-Net, and what it sees of a nodule."""

    channels: tuple[int, ...] = (48, 96)
    attention: tuple[bool, ...] = (False, True)
    res_blocks: int = 1
    head_channels: int = 32
    norm_groups: int = 16
    ctx_dim: int = 64  # d_ctx of Eq. 3
    linear_skip: bool = True  # a linear denoiser, fitted in closed form, beside the U-Net; False = paper
    mask_channels: int = 1  # C of Section 3.2.1 item 3: 1 = the lesion | 3 = solid, ground-glass, spiculation (paper)
    mask_detail: int = 4  # soft-mask subdivisions of a latent voxel's side; 1 = paper
    context: int | None = 1  # latent voxels around the lesion that the U-Net sees; None = the whole crop (paper)

    @property
    def blocks(self) -> dict:
        """What MONAI's U-Nets take of it."""
        return {
            "spatial_dims": 3, "num_channels": self.channels, "attention_levels": self.attention, "num_res_blocks": self.res_blocks,
            "num_head_channels": self.head_channels, "norm_num_groups": self.norm_groups,
        }  # fmt: skip


class HistogramEmbedding(nn.Module):
    """Histogram (B, bins) -> context (B, tokens, d_ctx). Without `vector`, every nodule gets the same learned token."""

    def __init__(self, config: HistogramConfig, dim: int) -> None:
        super().__init__()
        bins, tokens = config.bins, config.tokens
        if tokens not in (1, bins):
            raise ValueError(f"histogram.tokens must be 1 (paper) or the number of bins ({bins}), got {tokens}")
        self.tokens, self.use, self.scale = tokens, config.vector, bins if config.times_bins else 1
        self.null = nn.Parameter(torch.zeros(1, 1, dim))
        # created even if unused, so that networks with and without c_hist start from the same weights
        self.mlp = nn.Sequential(nn.Linear(bins if tokens == 1 else 1, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02) if tokens > 1 else None

    def forward(self, h: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        if not self.use:
            return self.null.expand(len(h), -1, -1)
        h = h * self.scale
        if self.tokens == 1:
            return self.mlp(h)[:, None]  # Eq. 3
        return self.mlp(h[..., None]) + self.position


class ConditionalUNet(nn.Module):
    """Noise predictor eps_theta.

    Input channels: c of the latent; C detail^3 + 1 of the mask (soft components, and binary M, where the noise is); with
    `histogram.template` c more, the template's latent.

    Raises:
        ValueError: mask channels other than 1 or 3, or a number of tokens that `HistogramEmbedding` refuses.
    """

    def __init__(self, config: UnetConfig, histogram: HistogramConfig, latent_channels: int, timesteps: int) -> None:
        super().__init__()
        if config.mask_channels not in (1, 3):
            raise ValueError(f"unet.mask_channels={config.mask_channels}: give 1 (the lesion) or 3 (its components)")
        self.config, self.latent_channels = config, latent_channels
        parts = config.mask_channels * config.mask_detail**3
        template = latent_channels if histogram.template else 0
        self.net = DiffusionModelUNetMaisi(
            **config.blocks,
            in_channels=latent_channels + parts + 1 + template,
            out_channels=latent_channels,
            with_conditioning=True,
            cross_attention_dim=config.ctx_dim,
            num_class_embeds=len(SUBTYPES),
        )
        self.linear = None
        if config.linear_skip:
            self.linear = LinearDenoiser(latent_channels, parts, histogram.bins, timesteps, template)
        self.c_hist = HistogramEmbedding(histogram, config.ctx_dim)

    def forward(
        self,
        z_t: Float[Tensor, "b c d h w"],
        t: Float[Tensor, " b"],
        masks: Float[Tensor, "b m d h w"],
        subtype: Int[Tensor, " b"],
        histogram: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b c d h w"]:
        """Predicted noise. masks: the condition of `latent_masks`, then the template's latent if there is one."""
        out = self.net(torch.cat([z_t, masks], 1), t, context=self.c_hist(histogram), class_labels=subtype)
        if self.linear is None:
            return out
        with torch.autocast(z_t.device.type, enabled=False):  # small noise is a small difference of large numbers
            h = histogram if self.c_hist.use else self.linear.mean_histogram.expand_as(histogram)
            return out.float() + self.linear(z_t, t, masks, subtype, h)


def latent_masks(mask: Float[Tensor, "b c 4d 4h 4w"], detail: int = 1) -> tuple[Tensor, Tensor]:
    """Voxel mask (B, C, D, H, W) -> binary M (B, 1, d, h, w) for blending and losses, and the network's condition
    (B, C detail^3 + 1, d, h, w): average-pooled components and M.

    detail: 1 averages each component over a latent voxel, as in the paper; 2 or 4 over each of its detail^3 parts, one
            channel per part, so that the network knows the shape within the latent voxel

    M is the max-pool, so even the smallest nodule keeps a latent voxel (averaging and nearest neighbour may lose it).

    Raises:
        ValueError: detail is not 1, 2 or 4. (`lesion_window` refuses empty masks: a check here would stall the GPU.)
    """
    if FACTOR % detail:
        raise ValueError(f"mask_detail must divide {FACTOR}, the side of a latent voxel, got {detail}")
    mask = mask.float()
    m = F.max_pool3d(mask.amax(1, keepdim=True), FACTOR)
    parts = pixelunshuffle(F.avg_pool3d(mask, FACTOR // detail), 3, detail)
    return m, torch.cat([parts, m], 1)
