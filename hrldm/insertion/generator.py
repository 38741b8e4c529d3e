"""Generate lesions in crops: encode the background, denoise inside M, decode, keep the original voxels elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from hrldm.insertion.blend import feathered
from hrldm.insertion.matching import CORE_HU, GAIN, core_lead, match_latents
from hrldm.model.autoencoder import Autoencoder, denormalise_hu
from hrldm.model.diffusion import SamplingConfig, Schedule, inpaint
from hrldm.model.unet import ConditionalUNet, latent_masks
from hrldm.model.window import Window, by_side, lesion_window
from hrldm.nodules.masks import components
from hrldm.nodules.template import template
from hrldm.train.config import Stage2
from hrldm.train.device import autocast
from hrldm.train.latents import encode_patches, mask_tensor

TEMPLATE_SEED = 19  # keeps its randomness apart from the sampler's
DECODED = 2  # crops decoded at once: more do not fit a CPU's cache


@dataclass(frozen=True, eq=False)
class Request:
    """What to make, for N nodules.

    background: (N, D, D, D) int16 HU, 1 mm
    mask:       (N, D, D, D) bool, the lesions
    subtype:    (N,) labels 0, 1, 2
    histogram:  (N, B) target HU histogram (c_hist)
    seeds:      (N,) noise seed of each nodule: the same seed gives the same lesion in any batch
    core:       (N, D, D, D) bool, the solid cores (empty: none); None: no cores. Needs histogram matching or mask channels

    Raises:
        ValueError: fields of different length, or an empty mask (with its position).
    """

    background: np.ndarray
    mask: np.ndarray
    subtype: np.ndarray
    histogram: np.ndarray
    seeds: np.ndarray
    core: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {len(value) for f in self.__dataclass_fields__ if (value := getattr(self, f)) is not None}
        if len(lengths) != 1:
            raise ValueError(f"the fields of a request differ in length: {sorted(lengths)}")
        if empty := [i for i, mask in enumerate(self.mask) if not mask.any()]:
            raise ValueError(f"empty lesion mask at position(s) {empty} of the request: nothing to inpaint")

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows) -> Request:
        """The chosen rows (slice or indices)."""
        values = (getattr(self, f) for f in self.__dataclass_fields__)
        return Request(*(None if value is None else value[rows] for value in values))


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained system: autoencoder, U-Net, the latent scale and settings of its training, and how to sample."""

    autoencoder: Autoencoder
    unet: ConditionalUNet
    scale: float
    config: Stage2
    sampling: SamplingConfig
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, request: Request, batch: int = 8, paste: bool = True, progress: str = "") -> np.ndarray:
        """HU crops (N, D, D, D) float32: the decoded lesion feathered into the background, or without `sampling.feather`
        the decoded crop (Algorithm 2, line 12).

        paste: False gives each lesion's window as decoded, and the background elsewhere

        Raises:
            ValueError: a crop whose side is not a multiple of 4, or a core to be pasted that neither mask channels nor a template
                nor matching makes (`finish` makes those of what is not pasted).
        """
        shown = self.config.unet.mask_channels > 1 or self.config.histogram.template
        made = not paste or shown or self.sampling.match_t_max is not None
        if request.core is not None and request.core.any() and not made:
            raise ValueError("a solid core is made by imposing its histogram while sampling; give match_t_max=...")
        groups = by_side(self._windows(request))
        batches = [rows[i : i + batch] for rows in groups for i in range(0, len(rows), batch)]
        decoded = np.empty(request.background.shape, np.float32)
        for rows in tqdm(batches, desc=progress, mininterval=10, disable=not progress):
            asked = request[rows]
            z = self._inpainted(asked, self._encoded(asked.background))
            decoded[rows] = self._decoded(z) if paste else self._decoded_windows(asked, z)
        return feathered(request.background, decoded, request.mask) if paste and self.sampling.feather else decoded

    def _encoded(self, hu: np.ndarray) -> torch.Tensor:
        """Scaled latents of HU crops, by the posterior mean."""
        return encode_patches(self.autoencoder, hu, self.device)[0].to(self.device) * self.scale

    def _decoded(self, z: torch.Tensor) -> np.ndarray:
        """HU crops of scaled latents."""
        return decoded_hu(self.autoencoder, z / self.scale)

    def _decoded_windows(self, request: Request, z: torch.Tensor) -> np.ndarray:
        """The backgrounds with the windows of their lesions, which have one side, decoded."""
        windows, out = self._windows(request), request.background.astype(np.float32)
        lesions = self._decoded(torch.stack([x[w.latent] for x, w in zip(z, windows, strict=True)]))
        for crop, window, lesion in zip(out, windows, lesions, strict=True):
            crop[window.voxels] = lesion
        return out

    @torch.no_grad()
    def latents(self, request: Request, each_step: Callable[[SimpleNamespace], None] | None = None) -> torch.Tensor:
        """Final latents (N, c, d, d, d).

        each_step: receives, for figures, every state of the nodules with windows of one side, on the whole crop's grid
        """
        return self._inpainted(request, self._encoded(request.background), each_step)

    def _inpainted(self, request: Request, z: torch.Tensor, each_step: Callable | None = None) -> torch.Tensor:
        """A copy of `z`, the scaled latents of the backgrounds, with the lesions inpainted."""
        z = z.clone()
        if (pictures := self.pictures(request)) is not None:
            pictures = self._encoded(pictures)
        windows = self._windows(request)
        for rows in by_side(windows):
            cuts = [windows[i].latent for i in rows]
            z_bg = torch.stack([z[i][cut] for i, cut in zip(rows, cuts, strict=True)])
            mask = mask_tensor(np.stack([request.mask[i][windows[i].voxels] for i in rows]))
            lead = None
            if request.core is not None:
                leads = [core_lead(request.core[i][windows[i].voxels]) for i in rows]
                lead = torch.from_numpy(np.stack(leads)).to(self.device)
            picture = None
            if pictures is not None:
                picture = torch.stack([pictures[i][cut] for i, cut in zip(rows, cuts, strict=True)])
            for state in self.denoise(request[rows], z_bg, mask, lead, picture):
                if each_step is not None:
                    state.z, state.z0_hat = (_filled(z[rows], x, cuts) for x in (state.z, state.z0_hat))
                    each_step(state)
            z[rows] = state.z if each_step is not None else _filled(z[rows], state.z, cuts)
        return z

    def pictures(self, request: Request) -> np.ndarray | None:
        """Templates of the requested histograms, HU (N, D, D, D); None for a network that takes none."""
        if not self.config.histogram.template:
            return None
        core = np.zeros_like(request.mask) if request.core is None else request.core
        rows = zip(request.background, request.mask, request.histogram, request.seeds, core, strict=True)
        return np.stack(
            [
                template(b, m, h, np.random.default_rng((TEMPLATE_SEED, int(s))), core_lead(c) / CORE_HU)
                for b, m, h, s, c in rows
            ]
        )

    def _windows(self, request: Request) -> list[Window]:
        unet = self.config.unet
        return [lesion_window(mask, unet.context, len(unet.channels)) for mask in request.mask]

    def denoise(
        self,
        request: Request,
        z_bg: torch.Tensor,
        mask: torch.Tensor,
        lead: torch.Tensor | None = None,
        picture: torch.Tensor | None = None,
    ) -> Iterator[SimpleNamespace]:
        """The sampler's states for nodules with windows of one side; z_bg, mask, lead and picture are cropped to them.

        lead: `core_lead` if cores are given; picture: scaled latent of `pictures`
        """
        diffusion, sampling = self.config.diffusion, self.sampling
        schedule = Schedule(diffusion)
        self.unet.to(self.device).eval()
        mask = mask.to(self.device)
        m, condition = latent_masks(self._components(mask, lead, request.subtype), self.config.unet.mask_detail)
        if picture is not None:
            condition = torch.cat([condition, picture], 1)
        subtype = torch.from_numpy(np.array(request.subtype)).long().to(self.device)
        histogram = torch.from_numpy(np.array(request.histogram)).float().to(self.device)
        generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]
        sampler = "rflow" if diffusion.objective == "rflow" else sampling.sampler

        def match(z0_hat: torch.Tensor) -> torch.Tensor:
            return self.imposed(z0_hat / self.scale, z_bg / self.scale, m, mask, histogram, lead) * self.scale

        def denoiser(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with autocast(self.config.mixed_precision, z.device.type):
                out = self.unet(z, t, condition, subtype, histogram).float()
            late = sampling.match_t_max is not None and float(t[0]) <= sampling.match_t_max
            if sampler == "rflow":
                tau = float(t[0]) / schedule.timesteps
                return (match(z + tau * out) - z) / tau if late else out
            eps_hat = schedule.noise(out, z, t, diffusion.prediction)
            return schedule.noise_of(z, match(schedule.predict_z0(z, eps_hat, t)), t) if late else eps_hat

        return inpaint(denoiser, z_bg, m, schedule, generators, sampler, sampling.steps, diffusion.background)

    def _components(self, mask: torch.Tensor, lead: torch.Tensor | None, subtype: np.ndarray) -> torch.Tensor:
        """`components` of lesions (B, 1, D, D, D); a solid nodule without a core is solid throughout."""
        if self.config.unet.mask_channels == 1:
            return mask
        lesions, parts = mask[:, 0].cpu().numpy() > 0, []
        # a lead is positive within its core alone
        cores = np.zeros_like(lesions) if lead is None else lead.cpu().numpy() > 0
        for lesion, core, label in zip(lesions, cores, subtype, strict=True):
            solid = lesion if label == 0 and not core.any() else core
            parts.append(components(lesion, solid))
        return torch.from_numpy(np.stack(parts)).to(mask)

    def imposed(
        self,
        lesion: torch.Tensor,
        z_bg: torch.Tensor,
        m: torch.Tensor,
        mask: torch.Tensor,
        histogram: torch.Tensor,
        lead: torch.Tensor | None,
    ) -> torch.Tensor:
        """Latents (B, c, d, d, d), not scaled, with the requested histogram imposed on the lesion."""
        for k in range(self.sampling.match_rounds):
            lesion = match_latents(self.autoencoder, lesion, z_bg, m, mask, histogram, lead, GAIN if k == 1 else 1.0)
        return lesion


def _filled(z: torch.Tensor, windows: torch.Tensor, cuts: list[tuple]) -> torch.Tensor:
    """Whole latents (n, c, d, d, d) with their windows (n, c, side, side, side) filled in."""
    z = z.clone()
    for whole, part, cut in zip(z, windows, cuts, strict=True):
        whole[cut] = part
    return z


def decoded_hu(autoencoder: Autoencoder, z: torch.Tensor) -> np.ndarray:
    """HU crops (N, D, D, D) of unscaled latents."""
    parts = [denormalise_hu(autoencoder.decode(part).clamp(0, 1))[:, 0].cpu().numpy() for part in z.split(DECODED)]
    return np.concatenate(parts)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, hu: np.ndarray, batch: int = 4, device: str = "cpu") -> np.ndarray:
    """Plain reconstruction of HU crops (N, D, D, D) through the posterior mean."""
    autoencoder = autoencoder.to(device).eval()
    return decoded_hu(autoencoder, encode_patches(autoencoder, hu, device, batch)[0].to(device))
