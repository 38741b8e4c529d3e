"""Lesions into crops: encode the background, denoise inside M, decode, and keep the original voxels elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from hrldm.config import Profile
from hrldm.model.autoencoder import Autoencoder, denormalise_hu
from hrldm.model.diffusion import Schedule, inpaint
from hrldm.model.unet import ConditionalUNet, latent_masks
from hrldm.synthesis.blend import feather
from hrldm.train.device import autocast
from hrldm.train.latents import encode_patches, mask_tensor

FEATHER_MM = 1.0  # sigma of the fall-off around the lesion


@dataclass(frozen=True, eq=False)
class Request:
    """What to make, for N nodules.

    background: (N, D, D, D) int16 HU, 1 mm
    mask:       (N, D, D, D) bool, where
    subtype:    (N,) labels 0, 1, 2
    histogram:  (N, B) target HU histogram (c_hist)
    seeds:      (N,) noise seed of each nodule: the same seed gives the same lesion whatever the batch
    """

    background: np.ndarray
    mask: np.ndarray
    subtype: np.ndarray
    histogram: np.ndarray
    seeds: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, f)) for f in self.__dataclass_fields__}
        if len(lengths) != 1:
            raise ValueError(f"the fields of a request differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.mask)


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained system: autoencoder, U-Net, the latent scale of its training, and how to sample."""

    autoencoder: Autoencoder
    unet: ConditionalUNet
    scale: float
    profile: Profile
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, request: Request, batch: int = 8, paste: bool = True, progress: str = "") -> np.ndarray:
        """HU crops (N, D, D, D) float32: the decoded lesion feathered into the background (or the plain decoding).

        Raises:
            ValueError: an empty mask, or a crop whose side is not a multiple of 4.
        """
        parts = []
        starts = range(0, len(request), batch)
        for i in tqdm(starts, desc=progress, mininterval=10, disable=not progress):
            rows = slice(i, i + batch)
            z = self.latents(Request(*(getattr(request, f)[rows] for f in Request.__dataclass_fields__)))
            parts.append(denormalise_hu(self.autoencoder.decode(z / self.scale).clamp(0, 1))[:, 0].cpu().numpy())
        decoded = np.concatenate(parts)
        return feathered(request.background, decoded, request.mask) if paste else decoded

    def latents(self, request: Request, each_step=None) -> torch.Tensor:
        """Final latents (N, c, d, d, d); `each_step` receives every intermediate state, for pictures."""
        p, schedule = self.profile, Schedule.from_profile(self.profile)
        self.unet.to(self.device).eval()
        z_bg = encode_patches(self.autoencoder, request.background, self.device)[0].to(self.device) * self.scale
        m, condition = latent_masks(mask_tensor(request.mask).to(self.device))
        subtype = torch.from_numpy(np.array(request.subtype)).long().to(self.device)
        histogram = torch.from_numpy(np.array(request.histogram)).float().to(self.device)
        generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]

        def denoiser(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with autocast(p, z.device.type):
                return self.unet(z, t, condition, subtype, histogram).float()

        sampler = "rflow" if p.objective == "rflow" else p.sampler
        for state in inpaint(denoiser, z_bg, m, schedule, generators, sampler, p.sample_steps, p.background):
            if each_step is not None:
                each_step(state)
        return state.z


def feathered(background: np.ndarray, lesion_hu: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paste lesions (N, D, D, D) into their backgrounds; voxels beyond the feather are the background's own."""
    out = background.astype(np.float32)
    for i in range(len(out)):
        w = feather(mask[i], FEATHER_MM, 1.0)
        out[i] = np.where(w > 0, (1 - w) * out[i] + w * lesion_hu[i], out[i])
    return out


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, hu: np.ndarray, batch: int = 4, device: str = "cpu") -> np.ndarray:
    """Plain reconstruction of HU crops (N, D, D, D) through the posterior mean."""
    autoencoder = autoencoder.to(device).eval()
    parts = []
    for i in range(0, len(hu), batch):
        mean, _ = encode_patches(autoencoder, hu[i : i + batch], device)
        parts.append(denormalise_hu(autoencoder.decode(mean.to(device)).clamp(0, 1))[:, 0].cpu().numpy())
    return np.concatenate(parts)
