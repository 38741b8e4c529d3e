"""The released HR-LDM: shipped autoencoder and U-Net, ready to generate nodules without any training."""

import json
from pathlib import Path

from torch import nn

from hrldm import paths
from hrldm.config import changed, from_header
from hrldm.insertion.generator import Generator
from hrldm.model.diffusion import DiffusionConfig, SamplingConfig
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from hrldm.train.device import device
from hrldm.train.latents import weights_digest
from hrldm.train.ldm import load_unet

RELEASED_UNET = paths.WEIGHTS / "unet.safetensors"


def released(
    unet: Path = RELEASED_UNET,
    autoencoder: Path = SHIPPED_AUTOENCODER,
    on: str | None = None,
    match_t_max: int | None = None,
    **sampling,
) -> Generator:
    """The generator with the released weights (or other files written by `scripts/train_released.py`).

    Args:
        on:       cpu or cuda; None takes the GPU if available
        match_t_max: impose the histogram while sampling, too, from this t on (400 where this is judged); `insert` imposes it on
            the voxels that are written
        sampling: other fields of `SamplingConfig` to change, for example ``steps=50``

    Raises:
        CheckpointError: a file is missing or corrupt (its weights differ from the card beside it), or the U-Net was
            trained on another autoencoder's latents.
        ValueError: unknown field, steps that the schedule does not have, or no CUDA device.
    """
    if on == "cuda" and device() != "cuda":
        raise ValueError("no CUDA device here; leave out on=cuda, or give cpu")
    on = on or device()
    meta = ckpt.load_meta(unet)
    if "sampling" not in meta or "autoencoder" not in meta:
        raise ckpt.CheckpointError(
            f"{unet}: not a released U-Net (no sampling settings in its header); see scripts/train_released.py"
        )
    model = load_autoencoder(autoencoder).eval().requires_grad_(False)
    _check_card(autoencoder, model)
    ckpt.require(meta, unet, autoencoder=weights_digest(model))
    how = sampled(from_header(SamplingConfig, meta["sampling"]), match_t_max=match_t_max, **sampling)
    net, scale, config = load_unet(unet, on)
    _check_card(unet, net)
    return Generator(model.to(on), net, scale, config, how, on)


def sampled(how: SamplingConfig, **changes) -> SamplingConfig:
    """The sampling with some fields changed; errors as in `released`."""
    how = changed(how, **changes)
    if not 1 <= how.steps <= DiffusionConfig.timesteps:
        raise ValueError(f"steps={how.steps}: give 1 to {DiffusionConfig.timesteps}")
    return how


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
