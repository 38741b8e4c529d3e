"""Algorithm 2 over the whole body, the way that insertion is compared with."""

import dataclasses

import numpy as np
import pytest
import torch

from hrldm.ct.geometry import to_world
from hrldm.ct.volume import CT
from hrldm.insertion.insert import insert
from hrldm.insertion.wish import Wish
from hrldm.model.autoencoder import normalise_hu
from study.systems import algorithm2 as whole_volume
from tests import tiny
from tests.insertion.chests import LIBRARY, scan

WISH = Wish("solid", 14.0, seed=2)


def small_scan() -> tuple[CT, np.ndarray]:
    """The chest at half its size, so that its whole latent is quickly denoised."""
    ct, labels = scan(spacing=(4.0, 4.0, 4.0))
    return CT(ct.array, np.diag([0.5, 0.5, 0.5, 1.0]) @ ct.affine), labels


@pytest.fixture(scope="module")
def both():
    """One wish both ways, with networks that know nothing but the linear code."""
    ct, labels = small_scan()
    generator = tiny.generator(tiny.autoencoder(), tiny.unet(), 0.8, unet__context=1, sampling__match_t_max=300)
    whole = whole_volume.insert_whole(ct, [WISH], generator, labels, library=LIBRARY)
    local = insert(ct, [WISH], generator, labels, retries=0, library=LIBRARY)
    return ct, labels, generator, whole, local


def test_same_place_and_mask_but_every_voxel_of_the_body_changes(both):
    ct, _, _, whole, local = both
    np.testing.assert_array_equal(whole.mask, local.mask)
    assert whole.records[0]["centre_ras_mm"] == local.records[0]["centre_ras_mm"]
    body = ct.array > -500
    assert (whole.stored != ct.stored)[body].mean() > 0.5 > 0.05 > (local.stored != ct.stored)[body].mean()
    assert whole.stored.dtype == ct.stored.dtype


def test_body_grid_holds_the_body_and_no_more_than_its_box():
    ct, _ = small_scan()
    grid, shape = whole_volume.body_grid(ct, 8)
    assert all(n % 8 == 0 for n in shape)
    body = to_world(np.linalg.inv(grid), to_world(ct.affine, np.argwhere(ct.array > -500)))
    assert (body >= 0).all() and (body <= np.array(shape) - 1).all()
    assert (np.array(shape) - np.ptp(body, axis=0) < 8 + 3 * whole_volume.BODY_GRID_MM).all()


def test_lean_attention_is_the_same_attention():
    unet = tiny.unet()
    p = tiny.profile()
    z = torch.randn(1, p.autoencoder.latent_channels, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(1, p.unet.mask_detail**3 + 1, 4, 4, 4)
    inputs = (z, torch.tensor([5]), masks, torch.tensor([1]), torch.full((1, p.histogram.bins), 1 / p.histogram.bins))
    with torch.no_grad():
        plain = unet(*inputs)
        with whole_volume._lean_attention(unet):
            assert any(m.use_flash_attention for m in unet.modules() if hasattr(m, "use_flash_attention"))
            lean = unet(*inputs)
    torch.testing.assert_close(lean, plain, atol=1e-5, rtol=1e-4)
    assert not any(m.use_flash_attention for m in unet.modules() if hasattr(m, "use_flash_attention"))


def test_tiles_are_each_encoded_as_a_crop(both):
    generator = both[2]
    hu = np.random.default_rng(0).normal(-800, 100, (56, 48, 96)).astype(np.float32)
    z = whole_volume._encoded(generator, hu)
    assert z.shape[2:] == (14, 12, 24)
    for voxels, latent in (((slice(0, 48), slice(0, 48), slice(48, 96)), (slice(0, 12), slice(0, 12), slice(12, 24))),
                           ((slice(48, 56), slice(0, 48), slice(0, 48)), (slice(12, 14), slice(0, 12), slice(0, 12)))):  # fmt: skip
        with torch.no_grad():
            alone = generator.autoencoder.encode(normalise_hu(torch.from_numpy(hu[voxels]))[None, None])[0]
        torch.testing.assert_close(z[(..., *latent)], alone)


def test_what_it_cannot_do_is_said(both, monkeypatch):
    ct, labels, generator, *_ = both
    with pytest.raises(ValueError, match="one nodule at a time, 2 are asked for"):
        whole_volume.insert_whole(ct, [WISH, dataclasses.replace(WISH, seed=9)], generator, labels, library=LIBRARY)
    monkeypatch.setattr(whole_volume, "free_memory_mb", lambda: 1.0)
    with pytest.raises(ValueError, match=r"takes about \d+ GB of memory, 0 are free"):
        whole_volume.insert_whole(ct, [WISH], generator, labels, library=LIBRARY)
