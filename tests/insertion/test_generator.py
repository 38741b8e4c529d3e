"""Lesions into crops: the background keeps its bits, a seed is a lesion whatever the batch, bad requests are named."""

import dataclasses

import numpy as np
import pytest
import torch

from hrldm.insertion.blend import FEATHER_MM, MARGIN_SIGMAS, feathered
from hrldm.insertion.generator import Generator, Request, reconstruct
from hrldm.model.autoencoder import normalise_hu
from hrldm.nodules.histograms import hu_histogram
from tests import tiny


def request(n: int = 3, size: int = 16, seed: int = 0) -> Request:
    made = tiny.patches(n, size, seed)
    histogram = np.stack([hu_histogram(h[m]) for h, m in zip(made.hu, made.mask, strict=True)])
    lung = np.random.default_rng(seed).normal(-850, 60, made.hu.shape).astype(np.int16)
    return Request(lung, made.mask, made.subtype, histogram, np.arange(10, 10 + n))


def generator(**changes) -> Generator:
    return tiny.generator(tiny.autoencoder(), tiny.unet(**changes), 0.8, **changes)


@pytest.mark.parametrize(
    "changes", [{}, {"diffusion__objective": "rflow", "histogram__weight": 0.0}, {"diffusion__background": "paper"}, {"sampling__sampler": "ddpm", "diffusion__timesteps": 4, "sampling__steps": 4}]
)  # fmt: skip
def test_voxels_beyond_the_feather_keep_their_values(changes):
    asked = request()
    out = generator(**changes)(asked)
    assert out.shape == asked.background.shape and out.dtype == np.float32 and np.isfinite(out).all()
    from scipy import ndimage

    for i in range(3):
        far = ndimage.distance_transform_edt(~asked.mask[i]) >= MARGIN_SIGMAS * FEATHER_MM
        assert far.any()
        np.testing.assert_array_equal(out[i][far], asked.background[i][far].astype(np.float32))
        assert (out[i][asked.mask[i]] != asked.background[i][asked.mask[i]]).mean() > 0.9


def test_same_seed_same_lesion_whatever_the_batch_other_seed_another():
    asked, make = request(), generator()
    together, again = make(asked), make(asked)
    np.testing.assert_array_equal(together, again)
    np.testing.assert_allclose(make(asked, batch=1), together, atol=0.5)
    np.testing.assert_allclose(make(asked[[2, 0]]), together[[2, 0]], atol=0.5)
    other = make(dataclasses.replace(asked, seeds=asked.seeds + 1))
    assert np.abs(other - together)[asked.mask].mean() > 5


def test_conditions_reach_the_lesion():
    asked, make = request(), generator()
    base = make(asked, paste=False)
    for change in ({"histogram": asked.histogram[:, ::-1]}, {"subtype": (asked.subtype + 1) % 3}):
        assert np.abs(make(dataclasses.replace(asked, **change), paste=False) - base)[asked.mask].max() > 0.1


def test_latents_outside_the_mask_are_the_backgrounds():
    asked, make, states = request(), generator(), []
    z = make.latents(asked, states.append)
    assert len(states) == 3 and torch.equal(states[-1].z, z)
    x = normalise_hu(torch.from_numpy(asked.background[:, None].astype(np.float32)))
    clean = make.autoencoder.encode(x)[0] * make.scale
    m = torch.nn.functional.max_pool3d(torch.from_numpy(asked.mask[:, None]).float(), 4).expand_as(z)
    torch.testing.assert_close(z[m == 0], clean[m == 0], atol=1e-5, rtol=1e-4)
    assert (z[m == 1] - clean[m == 1]).abs().mean() > 0.01


def test_lesions_of_different_windows_keep_their_order_and_their_backgrounds():
    asked, make, states = request(4, 40), generator(), []
    for i, radius in enumerate((13, 4, 5, 12)):
        asked.mask[i] = np.roll(tiny.ball(40, radius), 2 * i, 0)
    z = make.latents(asked, states.append)
    assert {tuple(s.z.shape) for s in states} == {(2, 4, 10, 10, 10)} and len(states) == 2 * make.sampling.steps
    torch.testing.assert_close(make.latents(asked), z, rtol=0, atol=0)
    np.testing.assert_allclose(make(asked), np.stack([make(asked[[i]])[0] for i in range(4)]), atol=0.5)
    x = normalise_hu(torch.from_numpy(asked.background[:, None].astype(np.float32)))
    clean = make.autoencoder.encode(x)[0] * make.scale
    m = torch.nn.functional.max_pool3d(torch.from_numpy(asked.mask[:, None]).float(), 4).expand_as(z)
    torch.testing.assert_close(z[m == 0], clean[m == 0], atol=1e-5, rtol=1e-4)
    assert all((z - clean)[i][m[i] == 1].abs().mean() > 0.01 for i in range(4))


def test_plain_decoding_is_the_decoded_latent():
    asked, make = request(), generator()
    expected = make.autoencoder.decode(make.latents(asked) / make.scale).clamp(0, 1)[:, 0] * 2000 - 1000
    np.testing.assert_allclose(make(asked, paste=False), expected.numpy(), atol=1e-2)


def test_a_study_may_take_the_decoded_crop_as_it_is():
    """Algorithm 2, line 12: no voxel of the original is put back."""
    asked, make = request(), generator(sampling__feather=False)
    expected = make.autoencoder.decode(make.latents(asked) / make.scale).clamp(0, 1)[:, 0] * 2000 - 1000
    np.testing.assert_allclose(make(asked), expected.numpy(), atol=1e-2)


def test_components_of_the_mask_reach_the_lesion():
    asked, make = request(), generator(unet__mask_channels=3)
    core = asked.mask & np.roll(asked.mask, 2, 1)
    base = make(dataclasses.replace(asked, core=core))
    assert np.isfinite(base).all()
    other = make(dataclasses.replace(asked, core=asked.mask & ~core))
    assert all(np.abs(other - base)[i][asked.mask[i]].max() > 0.1 for i in range(3))
    # a solid nodule without a core is solid throughout, others are ground-glass
    solid = dataclasses.replace(asked, core=np.where((asked.subtype == 0)[:, None, None, None], asked.mask, False))
    np.testing.assert_allclose(make(asked), make(solid), atol=1e-3)
    with pytest.raises(ValueError, match="a solid core is made by"):
        generator()(dataclasses.replace(asked, core=core))


def test_feathered_takes_the_lesion_inside_and_the_background_outside():
    asked = request(2)
    lesion = np.full(asked.background.shape, 77.0, np.float32)
    out = feathered(asked.background, lesion, asked.mask)
    assert (out[asked.mask] == 77).all()
    between = (out != 77) & (out != asked.background)
    low, high = np.minimum(asked.background, 77), np.maximum(asked.background, 77)
    assert between.any() and ((out >= low) & (out <= high)).all()


def test_reconstruction_goes_through_the_posterior_mean():
    model, hu = tiny.autoencoder(), tiny.patches(3, 16).hu
    x = normalise_hu(torch.from_numpy(hu[:, None].astype(np.float32)))
    expected = model.decode(model.encode(x)[0]).clamp(0, 1)[:, 0] * 2000 - 1000
    np.testing.assert_allclose(reconstruct(model, hu, batch=2), expected.numpy(), atol=1e-2)


def test_bad_requests_are_named():
    asked = request()
    with pytest.raises(ValueError, match="differ in length"):
        dataclasses.replace(asked, seeds=asked.seeds[:2])
    nothing = asked.mask.copy()
    nothing[1] = False
    with pytest.raises(ValueError, match=r"empty lesion mask at position\(s\) \[1\]"):
        generator()(dataclasses.replace(asked, mask=nothing))
    with pytest.raises(ValueError, match="not a multiple of 4"):
        generator()(request(size=18))
    with pytest.raises(ValueError, match="sampling steps must lie in"):
        generator(sampling__steps=0)(asked)
