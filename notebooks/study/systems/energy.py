"""Energy guidance without training: what L_hist does, at inference only (the idea of NodFlow, from its description).

The network is MAISI-DDPM's, trained with lambda = 0. At t <= `T_MAX` the estimate of Eq. 6 is decoded and moved down the
gradient of an energy in `ROUNDS` steps of Polyak's length; the sampler goes on from there. The energy is Cramér's distance of
the lesion's differentiable HU histogram (Eq. 7) from the requested one: unlike Eq. 8 it has a gradient wherever the two
differ, however far apart their bins.
"""

import dataclasses

import torch
from torch import Tensor

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from hrldm.insertion.generator import Generator
from hrldm.model.autoencoder import denormalise_hu
from hrldm.model.histogram import masked_soft_histogram
from hrldm.nodules.histograms import bin_centres
from study.study import Study
from study.systems import latent

T_MAX = 300  # as for imposing
ROUNDS = 4
LONGEST = 0.3  # of a step: root mean square within the lesion, that of all latents being 1


class EnergyGuided(Generator):
    """A generator whose `imposed` descends the energy instead of replacing values."""

    def imposed(
        self, lesion: Tensor, z_bg: Tensor, m: Tensor, mask: Tensor, histogram: Tensor, lead: Tensor | None
    ) -> Tensor:
        for _ in range(ROUNDS):
            with torch.enable_grad():
                z = lesion.detach().requires_grad_()
                hu = denormalise_hu(self.autoencoder.decode(m * z + (1 - m) * z_bg))
                energy = histogram_energy(hu, mask, histogram)
                (slope,) = torch.autograd.grad(energy.sum(), z)
            steep = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
            longest = LONGEST / self.scale * (m.flatten(1).sum(1) * slope.shape[1]).sqrt()
            step = torch.minimum(energy.detach() / steep, longest)  # Polyak: the energy's least value is 0
            lesion = lesion - (step / steep).view(-1, 1, 1, 1, 1) * slope
        return lesion


def histogram_energy(hu: Tensor, mask: Tensor, histogram: Tensor) -> Tensor:
    """Cramér's distance (B,) of the HU histograms inside the masks (B, 1, D, H, W) from the requested (B, bins)."""
    centres = bin_centres(histogram.shape[1])
    lo, hi = (torch.tensor([c], device=hu.device) for c in (centres[0], centres[-1]))
    found = masked_soft_histogram(hu.clamp(HIST_HU_MIN, HIST_HU_MAX), mask, lo, hi, histogram.shape[1])[:, 0]
    return (found - histogram).cumsum(1).square().sum(1)


def guided(study: Study) -> EnergyGuided:
    """MAISI-DDPM's network, guided."""
    plain = latent.trained(study, "maisi-ddpm")
    sampling = dataclasses.replace(plain.sampling, match_t_max=T_MAX)
    return EnergyGuided(plain.autoencoder, plain.unet, plain.scale, plain.config, sampling, plain.device)
