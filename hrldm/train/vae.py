"""Training of Stage I: L1 + perceptual + patch-adversarial + KL (Section 3.1), as a generator.

``for state in train_autoencoder(...)`` yields after every step, so that the caller handles progress, logging and early
stopping.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn

from hrldm.cache import digest
from hrldm.model.autoencoder import Autoencoder, AutoencoderConfig, kl_divergence, normalise_hu
from hrldm.nodules.augmentation import sample_patches
from hrldm.train import checkpoint as ckpt
from hrldm.train.device import autocast, device
from hrldm.train.latents import weights_digest
from hrldm.train.loop import Loop, StepState

STAGE = "autoencoder"
VERSION = 1  # raise when the same settings and crops would give other weights; part of cache keys
EMA, POWER, WARM_UP = 0.999, 0.9, 50  # decay of the average; of the learning rate; steps
CLIP = 1.0  # largest gradient norm of the autoencoder
LINEAR_CODE_SEED = 7  # keeps the patches of the linear code apart from those of the steps


@dataclass(frozen=True)
class VaeConfig:
    """Training of Stage I (Section 5)."""

    steps: int = 40
    batch: int = 2
    patch: int = 32  # side, voxels
    lr: float = 1e-3
    perceptual: float = 0.01  # weights of the losses
    adversarial: float = 0.003
    kl: float = 1e-7
    adversarial_start: int = 20  # step from which the last two but KL count


def discriminator() -> nn.Module:
    """Patch discriminator with two strided layers: receptive field of about 16 voxels, small enough for two cores."""
    return PatchDiscriminator(
        spatial_dims=3, num_layers_d=2, channels=16, in_channels=1, out_channels=1, norm="INSTANCE"
    )


def train_autoencoder(
    volumes: Sequence[np.ndarray],
    weights: Sequence[float],
    architecture: AutoencoderConfig,
    config: VaeConfig,
    seed: int,
    path: Path,
    perceptual: nn.Module | None = None,
    save_every: int = 200,
    start: Mapping[str, Tensor] | None = None,
    mixed_precision: str = "no",
) -> Iterator[StepState]:
    """Train `config.steps` steps on random patches, resuming from `path` when it exists.

    volumes:    HU arrays at 1 mm     # see `hrldm.nodules.augmentation.sample_patches`
    perceptual: module (x, y) -> scalar, or None to leave the term out whatever its weight
    start:      weights to continue from; only the decoder is trained then, so a U-Net on the same latents stays valid

    Raises:
        CheckpointError: `path` belongs to a run with other settings.
        DivergedError: a loss became NaN or infinite.
    """
    accelerator = Accelerator(cpu=device() == "cpu")
    torch.manual_seed(seed)
    model, critic = Autoencoder(architecture), discriminator()
    meta = {"stage": STAGE, "digest": digest(architecture, config), "seed": seed, "architecture": asdict(architecture)}
    if start is not None:
        model.load_state_dict(start)
        for part in model.encoding_parts:
            part.requires_grad_(False)
        meta["start"] = weights_digest(model)
    elif model.linear is not None:  # it starts at the principal components of the training patches
        patches = sample_patches(volumes, weights, 32, 256, np.random.default_rng((seed, LINEAR_CODE_SEED)))
        model.linear.fit(normalise_hu(torch.from_numpy(patches)))
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    if perceptual is not None:
        perceptual.to(accelerator.device)
    optimizers = {
        "opt_g": torch.optim.Adam(_parameters(model), config.lr),
        "opt_d": torch.optim.Adam([{"params": critic.parameters(), "scale": 0.5}], config.lr),
    }
    loop = Loop(
        path, meta, {"model": model, "critic": critic}, optimizers, identity=tuple(k for k in meta if k != "architecture"),
        total=config.steps, ema=EMA, save_every=save_every, accelerator=accelerator,
        lr=lambda step: ckpt.learning_rate(config.lr, step, config.steps, POWER, WARM_UP),
        precision=mixed_precision,
    )  # fmt: skip
    model, critic = loop.modules["model"], loop.modules["critic"]

    for step, rng in loop:
        noise = torch.Generator(accelerator.device).manual_seed(int(rng.integers(2**62)))
        hu = sample_patches(volumes, weights, config.patch, config.batch, rng)
        x = normalise_hu(torch.from_numpy(hu)).to(accelerator.device)
        with autocast(mixed_precision, accelerator.device.type):
            recon, mu, sigma = model(x, noise)
        recon = recon.float()
        losses = {"l1": (recon - x).abs().mean(), "kl": kl_divergence(mu.float(), sigma.float())}
        total = losses["l1"] + config.kl * losses["kl"]
        late = step >= config.adversarial_start
        if perceptual is not None and config.perceptual > 0 and late:
            slices = torch.Generator().manual_seed(int(rng.integers(2**62)))
            losses["perceptual"] = perceptual(recon, x, slices)
            total = total + config.perceptual * losses["perceptual"]
        fights = config.adversarial > 0 and late
        if fights:
            losses["adversarial"] = adversarial(critic(recon)[-1], target_is_real=True, for_discriminator=False)
            total = total + config.adversarial * losses["adversarial"]
        loop.check(losses)
        loop.descend(total, "model", "opt_g", CLIP)
        if fights:
            loop.optimizers["opt_d"].zero_grad()  # clears the gradients that the generator's step left in the critic
            fake = adversarial(critic(recon.detach())[-1], target_is_real=False, for_discriminator=True)
            real = adversarial(critic(x)[-1], target_is_real=True, for_discriminator=True)
            losses["discriminator"] = 0.5 * (fake + real)
            loop.descend(losses["discriminator"], "critic", "opt_d", None)
        yield loop.done(losses)


def _parameters(model: Autoencoder) -> list[dict]:
    """What is trained, in groups; the linear code starts at its optimum: a tenth of the rate keeps it near while the network
    learns the rest."""
    linear = set() if model.linear is None else {id(p) for p in model.linear.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in linear], "scale": 1.0}]
    return groups + ([{"params": [p for p in trained if id(p) in linear], "scale": 0.1}] if linear else [])
