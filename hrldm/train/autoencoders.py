"""Autoencoders from disk: the shipped one, one trained here, or MAISI's own file."""

import pickle
from pathlib import Path

import torch

from hrldm import paths
from hrldm.config import from_header
from hrldm.model.autoencoder import MAISI, Autoencoder, AutoencoderConfig
from hrldm.train import checkpoint as ckpt

SHIPPED_AUTOENCODER = paths.WEIGHTS / "autoencoder.safetensors"


def load_autoencoder(path: Path) -> Autoencoder:
    """An autoencoder written by `fit_autoencoder` or shipped: architecture from its metadata, EMA weights."""
    groups, meta = ckpt.load(path)
    if "architecture" not in meta:
        raise ckpt.CheckpointError(f"{path}: not an autoencoder checkpoint (no architecture in its metadata)")
    try:
        model = Autoencoder(from_header(AutoencoderConfig, meta["architecture"]))
        model.load_state_dict(groups["ema"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ckpt.CheckpointError(f"{path}: weights of another architecture ({str(error)[:200]})") from error
    return model


def load_maisi(path: Path) -> Autoencoder:
    """MAISI's own autoencoder file (`autoencoder_v1.pt`), NVIDIA licence, given by the user.

    Raises:
        CheckpointError: missing, or not these weights.
    """
    model = Autoencoder(MAISI)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("unet_state_dict", state)
        wanted = model.net.state_dict()
        # older files say conv.weight where MONAI now says conv.conv.weight
        renamed = {(k if k in wanted else k.replace("conv.", "conv.conv.", 1)): v for k, v in state.items()}
        model.net.load_state_dict(renamed, strict=True)
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, AttributeError, ValueError) as error:
        raise ckpt.CheckpointError(
            f"{path}: not MAISI's autoencoder ({str(error)[:200]}); expected autoencoder_v1.pt"
        ) from error
    return model
