"""Energy guidance: the energy is Cramér's distance, and descending it brings a lesion's histogram nearer."""

import pytest
import torch
from torch.nn import functional as F

from hrldm.model.autoencoder import denormalise_hu, normalise_hu
from hrldm.nodules.histograms import bin_centres
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from study.systems.energy import EnergyGuided, histogram_energy
from tests import tiny


def test_the_energy_is_the_squared_distance_of_the_cumulative_histograms():
    hu = torch.full((1, 1, 4, 4, 4), float(bin_centres(40)[10]))
    wish = torch.eye(40)[[13]]
    assert float(histogram_energy(hu, torch.ones(1, 1, 4, 4, 4), wish)) == pytest.approx(3.0)  # 1 at each of three bins
    hu.requires_grad_()
    (slope,) = torch.autograd.grad(histogram_energy(hu + 5, torch.ones(1, 1, 4, 4, 4), wish).sum(), hu)
    assert (slope < 0).all()  # brighter is nearer, though no bin is shared


@pytest.mark.parametrize("bin_", [8, 20, 30])
def test_descending_it_moves_the_lesion_towards_its_wish_and_leaves_the_rest(bin_):
    codec, asked, p = load_autoencoder(SHIPPED_AUTOENCODER), tiny.patches(2, 24), tiny.profile()
    codec.eval().requires_grad_(False)
    z = codec.encode(normalise_hu(torch.from_numpy(asked.hu).float())[:, None])[0]
    guided = EnergyGuided(codec, tiny.unet(), float(1 / z.square().mean().sqrt()), p, p.sampling)
    mask = torch.from_numpy(asked.mask).float()[:, None]
    m = F.max_pool3d(mask, 4)
    wish = torch.zeros(2, 40)
    wish[:, bin_ - 3 : bin_ + 4] = torch.tensor([1, 2, 3, 4, 3, 2, 1]) / 16

    def energy(latents: torch.Tensor) -> torch.Tensor:
        return histogram_energy(denormalise_hu(codec.decode(m * latents + (1 - m) * z)), mask, wish)

    moved = guided.imposed(z, z, m, mask, wish, None)
    assert (energy(moved) < 0.8 * energy(z)).all() and energy(moved).sum() < 0.25 * energy(z).sum()
    assert torch.equal((1 - m) * moved, (1 - m) * z)
