"""Stage I (Section 3.1): the MAISI VAE, wrapped so that a lesion crop is decoded only as far as the histogram needs.

Notation: x (B, 1, D, H, W) is a CT in [0, 1]; z (B, c, D/4, H/4, W/4) its latent; the posterior is N(mu, sigma^2).
D_trunc (Section 3.2.3) runs the decoder through its penultimate residual block, at full resolution; `decode_rest` runs
the rest, so ``decode(z) == decode_rest(decode_truncated(z))``.

The compact autoencoder adds a linear code of 4x4x4 blocks to the network, with the same latent size (a strided
convolution in, a transposed one out; residual autoencoding, Chen et al., ICLR 2025). The network then learns only what
a linear code cannot represent, which makes training on two cores possible. MAISI's own weights have no such term.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi, MaisiEncoder, MaisiResBlock
from torch import Tensor, nn
from torch.nn import functional

from hrldm.config import HU_MAX, HU_MIN

FACTOR = 4  # spatial compression (Section 5)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of Stage I (Section 3.1), and where its weights come from."""

    source: str = "shipped"  # | train | maisi (the file that HRLDM_MAISI names, else train) | path of such a file
    channels: tuple[int, ...] = (16, 32, 64)  # width per level, full resolution first
    res_blocks: tuple[int, ...] = (2, 1, 1)  # decoder; two at full resolution: D_trunc ends with the penultimate
    encoder_res_blocks: tuple[int, ...] = (1, 1, 1)
    latent_channels: int = 8  # c
    norm_groups: int = 8
    norm: bool = False  # GroupNorm as in MAISI; without it contrast survives, and a crop decodes as in the whole CT
    linear_skip: bool = True  # linear code of 4x4x4 blocks beside the network; False for MAISI's own weights


MAISI = AutoencoderConfig(  # the autoencoder of the paper
    channels=(64, 128, 256), res_blocks=(2, 2, 2), encoder_res_blocks=(2, 2, 2), latent_channels=4, norm_groups=32,
    norm=True, linear_skip=False,
)  # fmt: skip


def normalise_hu(hu):
    """Clip HU to [-1000, 1000] and scale to [0, 1] (Section 5); tensors and arrays alike."""
    clip = hu.clamp if isinstance(hu, Tensor) else np.asarray(hu, np.float32).clip
    return (clip(HU_MIN, HU_MAX) - HU_MIN) / (HU_MAX - HU_MIN)


def denormalise_hu(x):
    """Inverse of `normalise_hu` within the window."""
    return x * (HU_MAX - HU_MIN) + HU_MIN


class LinearCode(nn.Module):
    """A linear code of 4x4x4 blocks: analysis by principal components, least-squares synthesis from nearby blocks.

    analysis:  strided convolution, kernel 4: (B, 1, 4d, ..) -> (B, c, d, ..)
    synthesis: transposed convolution, kernel 4 (a block from its own code: plain PCA) or 12 (from its 27 neighbours: no
               block edges, and about 2 dB better on CT)
    """

    def __init__(self, latent_channels: int, overlap: bool = True) -> None:
        super().__init__()
        kernel, padding = (3 * FACTOR, 2 * FACTOR) if overlap else (FACTOR, 0)
        self.overlap = overlap
        self.analysis = nn.Conv3d(1, latent_channels, FACTOR, stride=FACTOR)
        self.synthesis = nn.ConvTranspose3d(latent_channels, 1, kernel, stride=FACTOR, padding=padding)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "b 1 d h w"], whiten: float = 0.5) -> LinearCode:
        """Fit the weights to the blocks of `x`: principal components, then (with overlap) ridge regression.

        whiten: 0 keeps the components' scale, 1 gives each unit variance. 0.5 keeps the mean intensity (first
        component) well above the diffusion noise without drowning texture.
        """
        blocks = _blocks(x).double()
        mean = blocks.mean(0)
        values, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        c = self.analysis.out_channels
        components = vectors[:, -c:].flip(1).T  # (c, 64)
        components *= torch.where(components.sum(1, keepdim=True) < 0, -1.0, 1.0)  # first component: brighter = larger
        scale = values[-c:].flip(0).clamp_min(1e-12).sqrt()[:, None] ** whiten
        shape = (c, 1, FACTOR, FACTOR, FACTOR)
        self.analysis.weight.copy_((components / scale).reshape(shape))
        self.analysis.bias.copy_(-(components / scale) @ mean)
        self.synthesis.bias.fill_(mean.mean())
        if self.overlap:
            self._fit_overlapping(x)
        else:
            self.synthesis.weight.copy_((components * scale).reshape(shape))
        return self

    def decode(self, z: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 4d 4h 4w"]:
        """Synthesis; blocks at the edge are replicated beyond it."""
        return self.synthesis(functional.pad(z, (1,) * 6, mode="replicate") if self.overlap else z)

    def _fit_overlapping(self, x: Tensor) -> None:
        z = self.analysis(x)
        around = z.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, c, n, n, n, 3, 3, 3) codes of 27 blocks
        a = around.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3).double()
        target = _blocks(x[..., FACTOR:-FACTOR, FACTOR:-FACTOR, FACTOR:-FACTOR]).double() - self.synthesis.bias.double()
        gram = a.T @ a / len(a)
        w = torch.linalg.solve(gram + 1e-5 * torch.eye(len(gram), dtype=gram.dtype), a.T @ target / len(a))
        # neighbour (i, j, k) of a block contributes through the part of its kernel that overlaps the block
        w = w.reshape(-1, 3, 3, 3, FACTOR, FACTOR, FACTOR).flip(1, 2, 3).permute(0, 1, 4, 2, 5, 3, 6)
        self.synthesis.weight.copy_(w.reshape(len(w), 1, *[3 * FACTOR] * 3))


def _blocks(x: Tensor) -> Tensor:
    """All 4x4x4 blocks of (B, 1, D, H, W) as rows (N, 64)."""
    return x.unfold(2, FACTOR, FACTOR).unfold(3, FACTOR, FACTOR).unfold(4, FACTOR, FACTOR).reshape(-1, FACTOR**3)


class Autoencoder(nn.Module):
    """MAISI VAE with encode, decode and decode_truncated."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, levels, c = config, len(config.channels), config.latent_channels
        if levels != 3:
            raise ValueError(f"the MAISI VAE has three levels (compression by 4), got channels={config.channels}")
        common = {
            "spatial_dims": 3, "in_channels": 1, "num_channels": config.channels, "norm_num_groups": config.norm_groups, "norm_eps": 1e-6,
            "attention_levels": (False,) * levels, "num_splits": 1, "dim_split": 1, "norm_float16": False, "save_mem": False,
            "use_flash_attention": False,
        }  # fmt: skip
        self.net = AutoencoderKlMaisi(out_channels=1, num_res_blocks=config.res_blocks, latent_channels=c, **common)
        if config.encoder_res_blocks != config.res_blocks:
            self.net.encoder = MaisiEncoder(out_channels=c, num_res_blocks=config.encoder_res_blocks, **common)
        self.latent_channels = c
        self.linear = LinearCode(c) if config.linear_skip else None
        # conv, res blocks and upsamplings, then norm and conv: D_trunc is all but the last res block, norm and conv
        self._cut = len(self.net.decoder.blocks) - 3
        if not config.norm:
            _remove_norms(self.net)
        if config.linear_skip:  # start exactly at the linear code
            for conv in (self.net.quant_conv_mu.conv, self.net.decoder.blocks[-1].conv.conv):
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)
            nn.init.zeros_(self.net.quant_conv_log_sigma.conv.weight)
            nn.init.constant_(self.net.quant_conv_log_sigma.conv.bias, -8.0)

    @property
    def feature_channels(self) -> int:
        """Channels of `decode_truncated`: those of the network, plus one for the linear code."""
        return self.net.decoder.blocks[-1].conv.conv.in_channels + (self.linear is not None)

    @property
    def encoding_parts(self) -> list[nn.Module]:
        """The modules that `encode` uses."""
        linear = [] if self.linear is None else [self.linear.analysis]
        return [self.net.encoder, self.net.quant_conv_mu, self.net.quant_conv_log_sigma, *linear]

    def encode(self, x: Float[Tensor, "b 1 4d 4h 4w"]) -> tuple[Tensor, Tensor]:
        """CT in [0, 1] -> posterior mean and standard deviation, each (B, c, d, h, w)."""
        if any(n % FACTOR for n in x.shape[2:]):
            raise ValueError(
                f"spatial shape {tuple(x.shape[2:])} is not a multiple of {FACTOR}; pad or crop the volume"
            )
        mu, sigma = self.net.encode(x)
        return (mu if self.linear is None else mu + self.linear.analysis(x)), sigma

    def decode_truncated(self, z: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b f 4d 4h 4w"]:
        """D_trunc (Section 3.2.3): latent -> features at the cut after the penultimate residual block."""
        h = self.net.post_quant_conv(z)
        for block in self.net.decoder.blocks[: self._cut]:
            h = block(h)
        return h if self.linear is None else torch.cat([h, self.linear.decode(z)], dim=1)

    def decode_rest(self, features: Float[Tensor, "b f 4d 4h 4w"]) -> Float[Tensor, "b 1 4d 4h 4w"]:
        """The decoder after the cut: features of `decode_truncated` -> CT in [0, 1]."""
        h = features if self.linear is None else features[:, :-1]
        for block in self.net.decoder.blocks[self._cut :]:
            h = block(h)
        return h if self.linear is None else h + features[:, -1:]

    def decode(self, z: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 4d 4h 4w"]:
        """Latent -> CT in [0, 1] (not clipped)."""
        return self.decode_rest(self.decode_truncated(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a posterior sample, with posterior mean and standard deviation."""
        mu, sigma = self.encode(x)
        eps = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return self.decode(mu + sigma * eps), mu, sigma


def _remove_norms(net: nn.Module) -> None:
    """Replace every GroupNorm by the identity (as in EDSR, Lim et al., 2017); let convolutions preserve variance."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, MaisiResBlock):
            module.conv2.conv.conv.weight.data.mul_(0.3)  # residual branches start small


def kl_divergence(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)), summed over the latent, mean over the batch (as MAISI weighs it)."""
    kl = 0.5 * (mu**2 + sigma**2 - 2 * sigma.clamp_min(1e-8).log() - 1)
    return kl.flatten(1).sum(1).mean()
