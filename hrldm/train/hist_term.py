"""L_hist (Section 3.2.3) where training needs it: decode only a tight crop around each lesion, only as far as D_trunc.

For each nodule and variant the crop is fixed: the lesion's latent bounding box and one latent voxel of halo, at most
`hist_max_voxels` wide. GroupNorm is global, so p and q are read from the same crop. The target q needs no gradient and,
with latents at their posterior mean, never changes: it is computed once per crop and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrldm.config import Profile
from hrldm.model.autoencoder import FACTOR, Autoencoder, denormalise_hu
from hrldm.model.diffusion import blend
from hrldm.model.histogram import masked_soft_histogram
from hrldm.model.losses import jensen_shannon
from hrldm.model.window import latent_extent
from hrldm.train.latents import LatentCache

HALO = 1  # latent voxels around the lesion that D_trunc sees beside it
RANGE_SAMPLES = 64  # lesions whose features set the range of the bins


@dataclass(frozen=True)
class Crop:
    """Latent box of a lesion, and its voxel mask inside (1, 1, D, H, W)."""

    box: tuple[slice, slice, slice]
    mask: Tensor

    def within(self, start: Sequence[int]) -> Crop:
        """The same crop, counted from the first voxel of a window."""
        return Crop(tuple(slice(b.start - s, b.stop - s) for b, s in zip(self.box, start, strict=True)), self.mask)


def lesion_crop(mask: np.ndarray, max_voxels: int) -> Crop:
    """Tight latent box around a voxel mask (D, H, W), with halo, at most `max_voxels` wide and never without lesion."""
    box = []
    centre = np.argwhere(mask)
    centre = centre[np.argmin(((centre - centre.mean(0)) ** 2).sum(1))]  # the lesion voxel nearest to its middle
    for axis, (first, end) in enumerate(latent_extent(mask)):
        low, high = max(first - HALO, 0), min(end + HALO, mask.shape[axis] // FACTOR)
        width = min(high - low, max(max_voxels // FACTOR, 1))
        lo = low if width == high - low else min(max(int(centre[axis]) // FACTOR - width // 2, low), high - width)
        box.append(slice(lo, lo + width))
    voxels = mask[tuple(slice(b.start * FACTOR, b.stop * FACTOR) for b in box)]
    return Crop(tuple(box), torch.from_numpy(np.array(voxels)).float()[None, None])


class HistogramTerm:
    """Callable L_hist of a batch; see `__call__`.

    lo, hi: (C,) first and last bin centre per channel: 0.1 and 99.9 percentile of training lesions' features
    """

    def __init__(self, autoencoder: Autoencoder, cache: LatentCache, profile: Profile, device: torch.device) -> None:
        if profile.hist_space not in ("feature", "hu"):
            raise ValueError(f"unknown hist_space {profile.hist_space!r}; choose feature or hu")
        if profile.lesion_context is not None and profile.lesion_context < HALO:
            raise ValueError(f"lesion_context must be at least {HALO}, the halo that L_hist decodes around the lesion")
        if autoencoder is None:
            raise ValueError("lambda_hist > 0 needs the autoencoder, whose frozen decoder L_hist reads")
        self.decoder = autoencoder.to(device).eval().requires_grad_(False)
        self.cache, self.profile, self.device = cache, profile, device
        self._crops: dict[tuple[int, int], Crop] = {}
        self._targets: dict[tuple[int, int], Tensor] = {}
        self.lo, self.hi = self._ranges()

    def features(self, z: Tensor) -> Tensor:
        """Features of scaled latent crops (B, c, d, h, w): D_trunc, or HU with ``hist_space="hu"``."""
        n = len(z)
        if n == 1 and z.device.type == "cpu":
            z = z.expand(
                2, -1, -1, -1, -1
            )  # for one small crop PyTorch takes a convolution 5 times slower than for two
        z = z / self.cache.scale
        if self.profile.hist_space == "hu":
            return denormalise_hu(self.decoder.decode(z)[:n])
        return self.decoder.decode_truncated(z)[:n]

    def crop(self, i: int, v: int) -> Crop:
        if (i, v) not in self._crops:
            found = lesion_crop(np.asarray(self.cache.mask[i, v]), self.profile.hist_max_voxels)
            self._crops[i, v] = Crop(found.box, found.mask.to(self.device))
        return self._crops[i, v]

    @torch.no_grad()
    def _ranges(self) -> tuple[Tensor, Tensor]:
        values = []
        chosen = np.linspace(0, len(self.cache) - 1, min(RANGE_SAMPLES, len(self.cache))).astype(int)
        for i in tqdm(chosen, desc="feature ranges", mininterval=10, disable=len(chosen) < 32):
            crop = self.crop(int(i), 0)
            z = torch.from_numpy(np.array(self.cache.mean[i, 0])).to(self.device)[None] * self.cache.scale
            f = self.features(z[(..., *crop.box)]).float()
            values.append(f[0][:, crop.mask[0, 0] > 0])
        pooled = torch.cat(values, 1).cpu().numpy()
        lo, hi = np.percentile(pooled, (0.1, 99.9), axis=1)
        hi = np.maximum(hi, lo + 1e-6)  # a dead channel says nothing, but must not divide by zero
        return (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (lo, hi))

    def histogram(self, z: Tensor, crop: Crop) -> Tensor:
        """Per-channel histogram (1, C, B) of a scaled latent crop inside its lesion."""
        return self._histograms(z, crop.mask)

    def _histograms(self, z: Tensor, mask: Tensor) -> Tensor:
        return masked_soft_histogram(self.features(z), mask, self.lo, self.hi, self.profile.hist_bins)

    @torch.no_grad()
    def target(self, z0: Tensor, key: tuple[int, int], crop: Crop) -> Tensor:
        """q of Eq. 8 for one nodule; kept unless latents are sampled anew at each step.

        Always decoded alone: in a batch it could differ in its last bit, and with it a resumed run.
        """
        if self.profile.latent_sample:
            return self.histogram(z0[(..., *crop.box)], crop)
        if key not in self._targets:
            self._targets[key] = self.histogram(z0[(..., *crop.box)], crop)
        return self._targets[key]

    def __call__(
        self, z0_hat: Tensor, z0: Tensor, m: Tensor, t: Tensor, index: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """Eq. 8, mean over channels and over the batch; nodules with t > `hist_t_max` contribute zero.

        z0_hat, z0: (B, c, d, h, w) scaled latents of each nodule's window; z0_hat is composited first, since Eq. 5
                    teaches it nothing outside M
        m:          (B, 1, d, h, w) binary; t: (B,); index: (B, 2) nodule and variant in the cache
        start:      (B, 3) first latent voxel of each window; None where z0 is the whole grid
        """
        composed = blend(m, z0_hat, z0)
        groups: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}  # crops of one shape are decoded together
        for b in range(len(t)):
            if self.profile.hist_t_max is not None and int(t[b]) > self.profile.hist_t_max:
                continue
            key = (int(index[b, 0]), int(index[b, 1]))
            crop = self.crop(*key).within((0, 0, 0) if start is None else start[b].tolist())
            part = composed[b : b + 1][(..., *crop.box)]
            groups.setdefault(part.shape, []).append((part, crop.mask, self.target(z0[b : b + 1], key, crop)))
        total = z0_hat.new_zeros(())
        for group in groups.values():
            z, mask, q = (torch.cat(x) for x in zip(*group, strict=True))
            total = total + jensen_shannon(self._histograms(z, mask), q).mean(1).sum()
        return total / len(t)
