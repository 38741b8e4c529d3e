"""Impose the requested histogram on the clean lesion of each sampling step (our option, not the paper's).

c_hist and L_hist teach the network what a histogram looks like; neither forces a lesion to have the requested one.
Here, at each step with t <= ``match_t_max``, the estimate of Eq. 6 is decoded, the values inside the lesion are
replaced in rank order by the quantiles of the requested histogram (the optimal transport of one onto the other), and
the change is encoded again:

    z0_hat' = z0_hat + M (E(x') - E(x)),   x = D(z0_hat),   x' = x with its lesion matched.

The rank order of the voxels, and so the lesion's structure, stays the network's own; with a solid core, voxels rank
higher the deeper they lie in it. The difference of two encodings cancels what the autoencoder loses, so a lesion that
already matches is unchanged. Decoding undoes part of the change, so it is made ``match_rounds`` times, the second time
doubled (`GAIN`); the following steps make the texture consistent again.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from hrldm.model.autoencoder import Autoencoder, denormalise_hu, normalise_hu
from hrldm.nodules.histograms import quantiles

GAIN = 2.0  # on the second round's change: two rounds then reach what four do without (42 validation nodules)
CORE_HU, CORE_EDGE_MM = 600.0, 2.0  # lead of a core's inside over its edge, and the depth where it is reached


def core_lead(core: np.ndarray) -> np.ndarray:
    """HU (D, D, D) float32 added for ranking: -`CORE_HU` outside the core to `CORE_HU` inside; 0 without a core."""
    if not core.any():
        return np.zeros(core.shape, np.float32)
    depth = ndimage.distance_transform_edt(core) - ndimage.distance_transform_edt(~core)
    return (CORE_HU * np.clip(depth / CORE_EDGE_MM, -1, 1)).astype(np.float32)


def matched(
    hu: Float[Tensor, "d h w"],
    mask: Bool[Tensor, "d h w"],
    histogram: Float[Tensor, " k"],
    lead: Float[Tensor, "d h w"] | float = 0.0,
) -> Tensor:
    """`hu` with the values inside the mask replaced by the histogram's quantiles, in the rank order of `hu + lead`."""
    out = hu.clone()
    order = (hu + lead)[mask].argsort()
    values = torch.empty(len(order), dtype=hu.dtype, device=hu.device)
    values[order] = torch.from_numpy(quantiles(histogram.cpu().numpy(), len(order))).to(values)
    out[mask] = values
    return out


@torch.no_grad()
def match_latents(
    autoencoder: Autoencoder,
    z0_hat: Float[Tensor, "b c d h w"],
    z_bg: Float[Tensor, "b c d h w"],
    m: Float[Tensor, "b 1 d h w"],
    mask: Float[Tensor, "b 1 4d 4h 4w"],
    histogram: Float[Tensor, "b k"],
    lead: Float[Tensor, "b 4d 4h 4w"] | None = None,
    gain: float = 1.0,
) -> Float[Tensor, "b c d h w"]:
    """z0_hat' of the module docstring; latents are unscaled, each composited with its background.

    lead: `core_lead` of each lesion; None without cores
    gain: factor on the change
    """
    composed = m * z0_hat + (1 - m) * z_bg
    x = autoencoder.decode(composed).clamp(0, 1)
    hu = denormalise_hu(x)[:, 0]
    lead = torch.zeros_like(hu) if lead is None else lead
    wanted = torch.stack([matched(*parts) for parts in zip(hu, mask[:, 0] > 0, histogram, lead, strict=True)])
    wanted = normalise_hu(wanted)[:, None]
    return z0_hat + gain * m * (autoencoder.encode(wanted)[0] - autoencoder.encode(x)[0])
