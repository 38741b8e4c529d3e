"""The released HR-LDM: shipped autoencoder and U-Net, ready to generate nodules without any training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import nn

from hrldm import paths
from hrldm.config import Profile, replaced
from hrldm.insertion.generator import Generator
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from hrldm.train.device import device
from hrldm.train.latents import weights_digest
from hrldm.train.ldm import load_unet

RELEASED_UNET = paths.WEIGHTS / "unet.safetensors"
SAMPLING = {
    "sample_steps": 4,
    "match_t_max": 400,
    "match_rounds": 2,
}  # for the shipped weights; others: as in their header


def released(
    unet: Path = RELEASED_UNET,
    autoencoder: Path = SHIPPED_AUTOENCODER,
    on: str | None = None,
    grain: bool = True,
    **sampling,
) -> Generator:
    """The generator with the released weights (or other files written by `scripts/train_released.py`).

    on:       cpu or cuda; None takes the GPU if available
    grain:    give lesions the grain of their surroundings
    sampling: fields of the profile to change, for example ``match_t_max=None`` or ``sample_steps=50``

    Raises:
        CheckpointError: a file is missing or corrupt (its weights differ from the card beside it), or the U-Net was
            trained on another autoencoder's latents.
        ValueError: unknown field, steps that the schedule does not have, or no CUDA device.
    """
    if on == "cuda" and device() != "cuda":
        raise ValueError("no CUDA device here; leave out on=cuda, or give cpu")
    on = on or device()
    meta = ckpt.load_meta(unet)
    if "profile" not in meta or "autoencoder" not in meta:
        raise ckpt.CheckpointError(
            f"{unet}: not a released U-Net (no profile in its header); see scripts/train_released.py"
        )
    model = load_autoencoder(autoencoder).eval().requires_grad_(False)
    _check_card(autoencoder, model)
    ckpt.require(meta, unet, autoencoder=weights_digest(model))
    known = {f.name for f in dataclasses.fields(Profile)}
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["profile"].items() if k in known}
    profile = sampled(
        Profile(**stored), **((SAMPLING if Path(unet).resolve() == RELEASED_UNET.resolve() else {}) | sampling)
    )
    net, scale = load_unet(unet, profile, on)
    _check_card(unet, net)
    return Generator(model.to(on), net, scale, profile, on, grain)


def sampled(profile: Profile, **sampling) -> Profile:
    """The profile with changed sampling fields; errors as in `released`."""
    profile = replaced(profile, **sampling)
    if not 1 <= profile.sample_steps <= profile.num_train_timesteps:
        raise ValueError(f"sample_steps={profile.sample_steps}: give 1 to {profile.num_train_timesteps}")
    return profile


def _check_card(path: Path, model: nn.Module) -> None:
    """Raise CheckpointError if weights differ from the card beside them; a file without a card is the user's own."""
    card = path.with_suffix(".json")
    if not card.exists():
        return
    try:
        expected = json.loads(card.read_text(encoding="utf-8"))["weights_sha256_16"]
    except (ValueError, KeyError, TypeError) as error:
        raise ckpt.CheckpointError(f"{card}: not the card of {path.name} ({error}); fetch both again") from error
    if (found := weights_digest(model)) != expected:
        raise ckpt.CheckpointError(
            f"{path}: damaged, its weights are {found} where its card says {expected}; fetch both again"
        )
