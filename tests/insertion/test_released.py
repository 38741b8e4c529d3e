"""Released weights: loaded with their own profile, tied to their autoencoder; the shipped ones obey what is asked for."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import hrldm
from hrldm.insertion.generator import Request
from hrldm.insertion.released import RELEASED_UNET, released
from hrldm.model.diffusion import SamplingConfig
from hrldm.nodules.histograms import histogram_moments, hu_histogram
from hrldm.train import checkpoint as ckpt
from hrldm.train.latents import weights_digest
from study.measure.triplets import ORDER
from tests import tiny


@pytest.fixture
def shipped(tmp_path):
    """Files of tiny networks as the ship scripts write them."""
    model, unet, profile = tiny.autoencoder(), tiny.unet(), tiny.profile(sampling__match_t_max=300)
    architecture = dataclasses.asdict(model.config)
    ckpt.save(tmp_path / "ae.safetensors", {"ema": model.state_dict()}, {"architecture": architecture})
    meta = {
        "stage": "ldm", "scale": 0.8, "latent_channels": 4, "config": dataclasses.asdict(profile),
        "sampling": dataclasses.asdict(profile.sampling), "autoencoder": weights_digest(model),
    }  # fmt: skip
    ckpt.save(tmp_path / "unet.safetensors", {"ema": unet.state_dict()}, meta)
    return tmp_path, unet, profile


def test_files_give_back_the_networks_profile_and_scale(shipped):
    folder, unet, profile = shipped
    made = released(folder / "unet.safetensors", folder / "ae.safetensors", steps=2)
    assert made.sampling == dataclasses.replace(profile.sampling, steps=2, match_t_max=None)
    assert made.scale == 0.8
    assert made.config == profile.stage2()
    assert all(
        torch.equal(a.cpu(), b)
        for a, b in zip(made.unet.state_dict().values(), unet.state_dict().values(), strict=True)
    )
    for steps in (0, -3, 10**6):
        with pytest.raises(ValueError, match=f"steps={steps}: give 1 to 1000"):
            released(folder / "unet.safetensors", folder / "ae.safetensors", steps=steps)
    with pytest.raises(ValueError, match="unknown setting 'stepps'"):
        released(folder / "unet.safetensors", folder / "ae.safetensors", stepps=2)


def test_wrong_files_are_named(shipped):
    folder = shipped[0]
    with pytest.raises(ckpt.CheckpointError, match=r"absent.*missing or corrupt"):
        released(folder / "absent.safetensors", folder / "ae.safetensors")
    with pytest.raises(ckpt.CheckpointError, match="not a released U-Net"):
        released(folder / "ae.safetensors", folder / "ae.safetensors")
    with pytest.raises(ckpt.CheckpointError, match=r"made for another run \(autoencoder is"):
        released(folder / "unet.safetensors")  # the shipped autoencoder is another


@pytest.mark.parametrize("name", ["unet", "ae"])
def test_weights_with_a_flipped_bit_are_refused_by_their_card(shipped, name):
    folder = shipped[0]
    files = folder / "unet.safetensors", folder / "ae.safetensors"
    made = released(*files)
    for stem, model in (("unet", made.unet), ("ae", made.autoencoder)):
        (folder / f"{stem}.json").write_text(json.dumps({"weights_sha256_16": weights_digest(model)}))
    released(*files)
    path = folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ckpt.CheckpointError, match=rf"{name}.safetensors: damaged, its weights are .* fetch both again"
    ):
        released(*files)
    (folder / f"{name}.json").write_text("[]")
    with pytest.raises(ckpt.CheckpointError, match=rf"{name}.json: not the card"):
        released(*files)


@pytest.mark.skipif(not RELEASED_UNET.exists(), reason="no released U-Net in hrldm/weights")
def test_the_shipped_weights_are_sampled_as_was_chosen_for_them_unless_something_else_is_asked():
    made = released().sampling
    assert made == SamplingConfig(steps=4, match_t_max=None, match_rounds=2)
    assert released(match_t_max=400).sampling == dataclasses.replace(made, match_t_max=400)
    assert released(match_rounds=1).sampling == dataclasses.replace(made, match_rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="no CUDA device here"):
        released(on="cuda")


@pytest.mark.skipif(not RELEASED_UNET.exists(), reason="no released U-Net in hrldm/weights")
def test_the_shipped_network_makes_the_intensity_that_is_asked_for():
    made = tiny.patches(6, 40)
    lung = np.random.default_rng(0).normal(-850, 30, made.hu.shape).astype(np.int16)
    wanted = np.stack([hu_histogram(h[k]) for h, k in zip(made.hu, made.mask, strict=True)])
    request = Request(lung, made.mask, made.subtype, wanted, np.arange(6))
    crops = hrldm.released()(request)
    got = np.array([histogram_moments(hu_histogram(c[k]))[0] for c, k in zip(crops, made.mask, strict=True)])
    asked = np.array([histogram_moments(h)[0] for h in wanted])
    assert np.abs(got - asked).max() < 60
    dark, middle, bright = (got[made.frame.subtype == s].mean() for s in ORDER)
    assert dark < middle < bright


def test_the_package_offers_the_tool_and_nothing_else():
    for name in hrldm._TOOL:  # whatever was imported before: no module may hide a function
        assert callable(getattr(hrldm, name)), name
    assert hrldm.Wish().subtype == "solid"
    with pytest.raises(AttributeError, match="no attribute 'insert_magic'"):
        hrldm.insert_magic  # noqa: B018
