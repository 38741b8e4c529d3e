"""Differentiable histogram (Eq. 7) in O(N) time and memory.

Eq. 7 spreads each value f over the bins by a triangular kernel of half-width w around the centres mu_k:

    h_k = 1/|S| sum_i ReLU(1 - |f_i - mu_k| / w)

With w equal to the spacing of the centres, each value touches only two neighbouring bins, with weights that sum to one.
So the N x B matrix of the formula is not needed: each value adds (1 - r) to bin k and r to bin k + 1, where
u = (f - mu_0) / w, k = floor(u), r = u - k. The gradient is dh_k/df = -1/w, dh_{k+1}/df = +1/w. Values beyond the first
or last centre count in the edge bin, with zero gradient.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class HistogramConfig:
    """The requested HU histogram as a condition (Eq. 3), and L_hist (Eq. 8, 9)."""

    bins: int = 40
    vector: bool = True  # c_hist goes to the network
    tokens: int = 1  # of c_hist: 1 = paper; `bins` = one token per bin
    times_bins: bool = True  # Eq. 3 reads bins * h, all ones where h is flat; False = h itself, as printed
    template: bool = False  # the histogram also as an image (nodules/template.py); False = paper
    weight: float = 10.0  # lambda of Eq. 9; 0 = no L_hist
    space: str = "feature"  # of L_hist: feature | hu
    t_max: int | None = 400  # L_hist sees t <= this; None = all (paper)
    max_voxels: int = 16  # side in voxels of the lesion crop for L_hist; larger lesions are sub-cropped


_CHUNK = 2**17  # values at a time, so that temporaries stay small


class _TriangularHistogram(torch.autograd.Function):
    """Rows of values (R, N) with weights (R, N) -> sums of the triangular kernel (R, B). Saves indices, not N x B."""

    @staticmethod
    def forward(ctx, values: Tensor, weights: Tensor, lo: Tensor, width: Tensor, bins: int) -> Tensor:
        out = torch.zeros(values.shape[0], bins, dtype=values.dtype, device=values.device)
        left, moving = torch.empty_like(values, dtype=torch.int16), torch.empty_like(values)
        for part in _parts(values):
            w = weights[:, part]
            u = (values[:, part] - lo) / width  # position in bins, 0 at the first centre
            moving[:, part] = w * ((u >= 0) & (u <= bins - 1))
            u = u.clamp_(0, bins - 1)
            k = u.floor().clamp_(max=bins - 2)
            right = u.sub_(k).mul_(w)
            k = k.long()
            out.scatter_add_(1, k, w - right)
            out.scatter_add_(1, k.add_(1), right)
            left[:, part] = k.sub_(1)
        ctx.save_for_backward(left, moving, width)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        left, moving, width = ctx.saved_tensors
        out = torch.empty_like(moving)
        step = grad.diff(dim=1) / width
        for part in _parts(left):
            out[:, part] = step.gather(1, left[:, part].long()).mul_(moving[:, part])
        return out, None, None, None, None


def _parts(values: Tensor) -> list[slice]:
    """Column slices of (R, N) with about `_CHUNK` values each, so that temporaries stay small."""
    rows, n = values.shape
    width = max(_CHUNK // max(rows, 1), 1)
    return [slice(i, i + width) for i in range(0, n, width)]


def soft_histogram(
    values: Float[Tensor, "r n"], lo: Float[Tensor, "r 1"], hi: Float[Tensor, "r 1"], bins: int
) -> Float[Tensor, "r b"]:
    """Normalised histogram of each row of values (Eq. 7), differentiable in `values`.

    lo, hi: first and last bin centre of each row; the width is their spacing

    Raises:
        ValueError: fewer than two bins, an empty range, or no values.
    """
    if bins < 2:
        raise ValueError(f"a histogram needs at least two bins, got {bins}")
    if not bool((hi > lo).all()):
        raise ValueError("histogram range is empty: the last bin centre must lie above the first")
    if not values.shape[1]:
        raise ValueError("histogram of an empty lesion: no voxel of the mask lies in the crop")
    return _normalised(values, lo, hi, bins, values.new_ones(1, 1).expand_as(values))


def _normalised(values: Tensor, lo: Tensor, hi: Tensor, bins: int, weights: Tensor) -> Tensor:
    """`soft_histogram` of values that count by `weights`, without its checks, each of which stalls a GPU."""
    sums = _TriangularHistogram.apply(values, weights, lo, (hi - lo) / (bins - 1), bins)
    return sums / weights.sum(1, keepdim=True)


def masked_soft_histogram(
    features: Float[Tensor, "b c d h w"],
    mask: Tensor,
    lo: Float[Tensor, " c"],
    hi: Float[Tensor, " c"],
    bins: int,
) -> Float[Tensor, "b c k"]:
    """Per-channel histogram of the features inside the mask (B, 1, D, H, W), in float32 even under autocast.

    Runs in every training step, so nothing is checked: no mask may be empty, and lo < hi.
    """
    b, c = features.shape[:2]
    with torch.autocast(features.device.type, enabled=False):
        values = features.float().reshape(b * c, -1)
        weights = mask.float().expand(b, c, *mask.shape[2:]).reshape(b * c, -1)
        rows = (lo.float().repeat(b)[:, None], hi.float().repeat(b)[:, None])
        return _normalised(values, *rows, bins, weights).reshape(b, c, bins)


def dense_histogram(values: Tensor, lo: float, hi: float, bins: int) -> Tensor:
    """Eq. 7 as printed, N x B: only a reference for tests and the benchmark."""
    centres = torch.linspace(lo, hi, bins, dtype=values.dtype, device=values.device)
    width = (hi - lo) / (bins - 1)
    kernel = torch.relu(1 - (values.clamp(lo, hi)[:, None] - centres).abs() / width)
    return kernel.sum(0) / len(values)
