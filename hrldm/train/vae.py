"""Training of Stage I: L1 + perceptual + patch-adversarial + KL (Section 3.1), as a generator.

``for state in train_autoencoder(...)`` yields after every step, so that progress, logging and early stopping live in the
caller. Each step draws its patches and noise from (seed, step, rank) alone: a run killed and resumed ends in the same
weights as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn

from hrldm.config import Profile
from hrldm.model.autoencoder import Autoencoder, architecture, kl_divergence, normalise_hu
from hrldm.nodules.augmentation import sample_patches
from hrldm.train import checkpoint as ckpt
from hrldm.train.device import autocast, device
from hrldm.train.latents import weights_digest
from hrldm.train.steps import StepState, require_finite

STAGE = "autoencoder"
VERSION = 1  # raise when the same settings and crops would give other weights; part of the keys of caches


def discriminator() -> nn.Module:
    """Patch discriminator with two strided layers: receptive field of about 16 voxels, small enough for two cores."""
    return PatchDiscriminator(
        spatial_dims=3, num_layers_d=2, channels=16, in_channels=1, out_channels=1, norm="INSTANCE"
    )


def fit_linear_code(model: Autoencoder, volumes: Sequence[np.ndarray], weights: Sequence[float], seed: int) -> None:
    """Start the linear skip at the principal components of the training patches."""
    if model.linear is not None:
        patches = sample_patches(volumes, weights, 32, 256, np.random.default_rng((seed, 7)))
        model.linear.fit(normalise_hu(torch.from_numpy(patches)))


def train_autoencoder(
    volumes: Sequence[np.ndarray],
    weights: Sequence[float],
    profile: Profile,
    seed: int,
    path: Path,
    perceptual: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    save_every: int = 200,
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[StepState]:
    """Train `ae_steps` steps on random patches, resuming from `path` when it exists.

    volumes:    HU arrays at 1 mm     # see `hrldm.nodules.augmentation.sample_patches`
    perceptual: module (x, y) -> scalar, or None to leave the term out whatever its weight
    start:      weights to go on from; then the decoder alone is trained, so that a U-Net trained on the latents stays right

    Raises:
        CheckpointError: `path` belongs to a run with other settings.
        DivergedError: a loss became NaN or infinite.
    """
    accelerator = accelerator or Accelerator(cpu=device() == "cpu")
    torch.manual_seed(seed)
    model, critic = Autoencoder.from_profile(profile), discriminator()
    if start is None:
        fit_linear_code(model, volumes, weights, seed)
    else:
        model.load_state_dict(start)
        for part in model.encoding_parts:
            part.requires_grad_(False)
    ema = ckpt.Ema(model, 0.999)
    linear = list(model.linear.parameters()) if model.linear is not None else []
    # the linear code starts at its optimum: a tenth of the step keeps it near while the network learns the rest
    groups_g = [{"params": [q for q in model.parameters() if all(q is not p for p in linear)], "scale": 1.0}]
    groups_g += [{"params": linear, "scale": 0.1}] if linear else []
    groups_g = [g | {"params": [q for q in g["params"] if q.requires_grad]} for g in groups_g]
    opt_g = torch.optim.Adam(groups_g, profile.ae_lr)
    opt_d = torch.optim.Adam([{"params": critic.parameters(), "scale": 0.5}], profile.ae_lr)
    fields = [f.name for f in dataclasses.fields(profile) if f.name.startswith("ae_")]
    meta = {"stage": STAGE, "digest": profile.digest(*fields), "seed": seed, "step": 0}
    meta["architecture"] = architecture(profile)
    if start is not None:
        meta["start"] = weights_digest(model)
    if Path(path).exists():
        groups, meta_old = ckpt.load(path)
        ckpt.require(meta_old, path, **{k: meta[k] for k in ("stage", "digest", "seed", "start") if k in meta})
        model.load_state_dict(groups["model"])
        critic.load_state_dict(groups["critic"])
        ckpt.restore_optimizer(opt_g, groups["opt_g"])
        ckpt.restore_optimizer(opt_d, groups.get("opt_d", {}))
        ema.shadow = groups["ema"]
        meta = meta_old
    model, critic, opt_g, opt_d = accelerator.prepare(model, critic, opt_g, opt_d)
    ema.shadow = {k: v.to(accelerator.device) for k, v in ema.shadow.items()}
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    if perceptual is not None:
        perceptual.to(accelerator.device)

    for step in range(meta["step"], profile.ae_steps):
        draw = np.random.default_rng((seed, step, accelerator.process_index))
        noise = torch.Generator(accelerator.device).manual_seed(int(draw.integers(2**62)))
        hu = sample_patches(volumes, weights, profile.ae_patch, profile.ae_batch, draw)
        x = normalise_hu(torch.from_numpy(hu)).to(accelerator.device)
        lr = ckpt.polynomial_lr(profile.ae_lr, step, profile.ae_steps, 0.9) * min(1.0, (step + 1) / 50)
        for group in (*opt_g.param_groups, *opt_d.param_groups):
            group["lr"] = lr * group["scale"]

        with autocast(profile, accelerator.device.type):
            recon, mu, sigma = model(x, noise)
        recon = recon.float()
        losses = {"l1": (recon - x).abs().mean(), "kl": kl_divergence(mu.float(), sigma.float())}
        total = losses["l1"] + profile.ae_kl * losses["kl"]
        if perceptual is not None and profile.ae_perceptual > 0 and step >= profile.ae_adversarial_start:
            slices = torch.Generator().manual_seed(int(draw.integers(2**62)))
            losses["perceptual"] = perceptual(recon, x, slices)
            total = total + profile.ae_perceptual * losses["perceptual"]
        fights = profile.ae_adversarial > 0 and step >= profile.ae_adversarial_start
        if fights:
            losses["adversarial"] = adversarial(critic(recon)[-1], target_is_real=True, for_discriminator=False)
            total = total + profile.ae_adversarial * losses["adversarial"]
        require_finite(losses, step, lr, path)
        opt_g.zero_grad()
        accelerator.backward(total)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt_g.step()
        if fights:
            opt_d.zero_grad()
            fake = adversarial(critic(recon.detach())[-1], target_is_real=False, for_discriminator=True)
            real = adversarial(critic(x)[-1], target_is_real=True, for_discriminator=True)
            losses["discriminator"] = 0.5 * (fake + real)
            accelerator.backward(losses["discriminator"])
            opt_d.step()
        ema.update(accelerator.unwrap_model(model), step)

        done = step + 1
        if accelerator.is_main_process and (done % save_every == 0 or done == profile.ae_steps):
            groups = {
                "model": accelerator.unwrap_model(model).state_dict(),
                "critic": accelerator.unwrap_model(critic).state_dict(),
                "ema": ema.shadow,
                "opt_g": ckpt.optimizer_tensors(opt_g.optimizer),
                "opt_d": ckpt.optimizer_tensors(opt_d.optimizer),
            }
            ckpt.save(path, groups, meta | {"step": done})
        yield StepState(done, profile.ae_steps, {k: float(v.detach()) for k, v in losses.items()})
