"""A linear denoiser beside the U-Net, fitted in closed form (our option, like the autoencoder's linear code).

Weak noise is removed by comparing neighbours. A linear filter of 3^3 latent voxels does this; a U-Net, which normalises
every feature, is slow to learn it: after 450 steps of 16 nodules it left 84 % of the noise at t = 100, the filter
leaves 47 %. With the filter, the U-Net only learns what a linear map cannot represent. For every output channel and
each of K times,

    out = W1 * [z_t, m, M, T] + W2 m_parts + W3 [h, c_type, 1] + m W4 h

with m the soft mask, M the binary mask, T the template's latent if the network takes one, h the requested histogram
(centred) and * a convolution. Between the K times, outputs are interpolated linearly. The weights come from ridge
regression of the U-Net's own target inside M.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm.config import SUBTYPES

KNOTS = (0.0, 0.01, 0.025, 0.05, 0.08, 0.12, 0.18, 0.26, 0.38, 0.55, 0.75, 1.0)  # of T; dense where the noise is low
RIDGE = 10.0  # latents have about unit variance, and a fit sees some ten thousand voxels


class LinearDenoiser(nn.Module):
    """Zero until fitted, then frozen.

    channels: c of the latent; parts: channels of the soft mask; bins: of the histogram; timesteps: of the schedule;
    template: channels of the template's latent, 0 if unused
    """

    def __init__(self, channels: int, parts: int, bins: int, timesteps: int, template: int = 0) -> None:
        super().__init__()
        self.channels, self.bins = channels, bins
        self.register_buffer("times", torch.tensor(KNOTS) * (timesteps - 1))
        self.register_buffer("mean_histogram", torch.full((bins,), 1 / bins))
        out = len(KNOTS) * channels
        self.around = nn.Conv3d(channels + 2 + template, out, 3, padding=1, bias=False)
        self.shape = nn.Conv3d(parts, out, 1, bias=False)
        self.whole = nn.Linear(bins + len(SUBTYPES), out)
        self.share = nn.Linear(bins, out, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)

    def forward(
        self,
        z_t: Float[Tensor, "b c d h w"],
        t: Float[Tensor, " b"],
        masks: Float[Tensor, "b m d h w"],
        subtype: Int[Tensor, " b"],
        histogram: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b c d h w"]:
        """The linear part of the U-Net's output; same arguments as `ConditionalUNet`."""
        soft, parts, others, h, whole = self._inputs(masks, subtype, histogram)
        out = self.around(torch.cat([z_t, soft, others], 1)) + self.shape(parts)
        out = out + self.whole(whole)[:, :, None, None, None] + soft * self.share(h)[:, :, None, None, None]
        out = out.unflatten(1, (len(KNOTS), self.channels))
        return (out * self._weights(t)[:, :, None, None, None, None]).sum(1)

    def _inputs(self, masks: Tensor, subtype: Tensor, histogram: Tensor) -> tuple[Tensor, ...]:
        """m, m_parts, [M, T], h and [h, c_type]."""
        parts, others = masks.tensor_split([self.shape.in_channels], 1)
        h = (histogram - self.mean_histogram) * self.bins
        whole = torch.cat([h, F.one_hot(subtype, len(SUBTYPES)).to(h)], 1)
        return parts.mean(1, keepdim=True), parts, others, h, whole

    def _weights(self, t: Tensor) -> Tensor:
        """Interpolation weights (B, K) of the K times at t."""
        t = t.to(self.times).clamp(self.times[0], self.times[-1])
        right = torch.searchsorted(self.times, t).clamp(1, len(KNOTS) - 1)
        low, high = self.times[right - 1], self.times[right]
        part = ((t - low) / (high - low))[:, None]
        k = torch.arange(len(KNOTS), device=t.device)
        return (k == right[:, None] - 1) * (1 - part) + (k == right[:, None]) * part

    # -- fit -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rows(self, z_t: Tensor, masks: Tensor, subtype: Tensor, histogram: Tensor) -> Float[Tensor, "n f"]:
        """Regressors of the linear map, one row per latent voxel of M (batch first, then in grid order)."""
        soft, parts, others, h, whole = self._inputs(masks, subtype, histogram)
        near = F.pad(torch.cat([z_t, soft, others], 1), (1,) * 6)
        for axis in (2, 3, 4):
            near = near.unfold(axis, 3, 1)
        near = near.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
        spread = (x[:, None, None, None].expand(*near.shape[:4], -1) for x in (whole, torch.ones_like(h[:, :1]), h))
        whole, one, h = spread
        soft, parts = (x.permute(0, 2, 3, 4, 1) for x in (soft, parts))
        return torch.cat([near, parts, whole, one, soft * h], -1)[others[:, 0] > 0]

    @torch.no_grad()
    def solve(self, knot: int, gram: Float[Tensor, "f f"], moments: Float[Tensor, "f c"]) -> None:
        """Set the weights of one of the K times from X'X and X'Y of its rows."""
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + RIDGE * eye, moments).T.to(self.whole.weight.dtype)
        n = [m.weight[0].numel() for m in (self.around, self.shape, self.whole)]
        around, shape, whole, bias, share = weights.split([*n, 1, self.bins], 1)
        rows = slice(knot * self.channels, (knot + 1) * self.channels)
        self.around.weight[rows] = around.reshape(self.around.weight[rows].shape)
        self.shape.weight[rows] = shape.reshape(self.shape.weight[rows].shape)
        self.whole.weight[rows], self.whole.bias[rows], self.share.weight[rows] = whole, bias[:, 0], share
