"""Training of Stage II (Algorithm 1), as a generator; lambda_hist = 0 makes it MAISI-DDPM, ``objective="rflow"``
MAISI's rectified flow, all else equal.

Runs that differ in one option see the same nodules, times and noise. Resuming, averaging and saving are in `loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from hrldm.config import Profile
from hrldm.model.autoencoder import Autoencoder
from hrldm.model.diffusion import Schedule, noisy_input, training_pair
from hrldm.model.losses import inpainting_loss, total_loss
from hrldm.model.unet import ConditionalUNet
from hrldm.train import checkpoint as ckpt
from hrldm.train.device import autocast, graphed
from hrldm.train.device import device as device_name
from hrldm.train.histogram_term import HistogramTerm
from hrldm.train.latents import LatentCache, Windowed, windowed
from hrldm.train.linear_start import fit_linear
from hrldm.train.loop import Loop, StepState

STAGE = "ldm"
VERSION = 1  # raise when the same settings and latents would give other weights; part of cache keys
WARM_UP = 20  # steps
GRAPHED_FROM = 200  # steps from which capturing CUDA graphs pays off
RUN_FIELDS = (  # what a trained U-Net depends on
    "ae_latent_channels", "unet_channels", "unet_attention", "unet_res_blocks", "unet_head_channels", "unet_norm_groups", "unet_linear_skip",
    "ctx_dim", "hist_tokens", "histogram_template", "mask_channels", "mask_detail", "ldm_steps", "ldm_batch", "ldm_lr", "ldm_lr_power", "ldm_ema",
    "mixed_precision", "num_train_timesteps", "beta_start", "beta_end", "objective", "prediction", "background", "use_c_hist",
    "lambda_hist", "hist_bins", "hist_space", "hist_t_max", "hist_max_voxels", "inpaint_norm", "latent_sample",
    "lesion_context",
)  # fmt: skip


class Batches:
    """Random batches from a latent cache, kept entirely on the device. All windows of a batch have the same side; over
    many batches every nodule and variant is drawn equally often."""

    def __init__(self, cache: LatentCache, profile: Profile, device: torch.device | str = "cpu") -> None:
        self.profile, self.device = profile, torch.device(device)
        self.groups = list(windowed(cache, profile, device))
        sizes = np.array([len(g) for g in self.groups])
        self.shares = sizes / sizes.sum()

    def draw(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """One batch of a random group, see `of`."""
        return self.of(self.groups[rng.choice(len(self.groups), p=self.shares)], int(rng.integers(2**62)))

    def of(self, group: Windowed, seed: int) -> dict[str, Tensor]:
        """One batch of a group (see `Windowed.take`) with times t (B,) and noise eps like z0; with `latent_sample`, z0
        is drawn from the posterior. Times are uniform on 0..T-1 and stratified, one per B-th, in ascending order: this
        lowers the gradient's variance.
        """
        p, g = self.profile, torch.Generator(self.device).manual_seed(seed)
        rows = torch.randint(len(group), (p.ldm_batch,), generator=g, device=self.device)
        batch = group.take(rows, p.mask_detail) | {"group": group, "rows": rows}
        z0, std = batch["z0"], batch.pop("std")
        strata = torch.arange(p.ldm_batch, device=self.device)
        u = torch.rand(p.ldm_batch, generator=g, device=self.device, dtype=torch.float64)
        batch["t"] = ((strata + u) * (p.num_train_timesteps / p.ldm_batch)).long().clamp_max(p.num_train_timesteps - 1)
        batch["eps"] = torch.randn(z0.shape, generator=g, device=self.device)
        if p.latent_sample:
            batch["z0"] = z0 + std * torch.randn(z0.shape, generator=g, device=self.device)
        return batch


def train_ldm(
    cache: LatentCache,
    profile: Profile,
    seed: int,
    path: Path,
    autoencoder: Autoencoder | None = None,
    accelerator: Accelerator | None = None,
    save_every: int = 100,
    initial: dict[str, Tensor] | None = None,
) -> Iterator[StepState]:
    """Train `ldm_steps` steps of Algorithm 1, resuming from `path` when it exists.

    autoencoder: frozen decoder for L_hist; may be None when lambda_hist is 0
    initial:     weights to start from, see `started`

    Raises:
        CheckpointError: `path` belongs to a run with other settings or other latents.
        DivergedError: a loss became NaN or infinite.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the null token, or the MLP of c_hist
    accelerator = accelerator or Accelerator(cpu=device_name() == "cpu", kwargs_handlers=[unused])
    device, schedule = accelerator.device, Schedule.from_profile(profile)
    torch.manual_seed(seed)
    network = _network(cache, profile, seed, path, initial)
    batches, l_hist = Batches(cache, profile, device), None
    if profile.lambda_hist > 0 and profile.objective == "ddpm":
        l_hist = HistogramTerm(autoencoder, batches.groups, cache.scale, profile)
    loop = _loop(network, l_hist, cache, profile, seed, path, accelerator, save_every)
    model = _graphs(loop, batches, schedule) or loop.modules["model"]

    for _, rng in loop:  # Algorithm 1, line by line
        batch = batches.draw(rng)  # 1, 2: z0 from the cache; t, eps
        z_t, target, inputs = network_inputs(batch, schedule, profile)  # 3, 4: Eq. 1, Eq. 4
        with autocast(profile, device.type):
            out = model(*inputs).float()  # 5, 6: c_type, c_hist, eps_hat
        losses = {"inpaint": inpainting_loss(target, out, batch["m"], profile.inpaint_norm)}  # 9: Eq. 5
        if l_hist is not None:
            eps_hat = schedule.noise(out, z_t, batch["t"], profile.prediction)
            z0_hat = schedule.predict_z0(z_t, eps_hat, batch["t"])  # 7: Eq. 6
            losses["hist"] = l_hist(z0_hat, batch)  # 8, 10: Eq. 7, Eq. 8
        loop.check(losses)
        total = total_loss(losses["inpaint"], losses.get("hist"), profile.lambda_hist)  # 11: Eq. 9
        loop.descend(total, "model", "optimizer")  # 12
        yield loop.done(losses)


def network_inputs(
    batch: dict[str, Tensor], schedule: Schedule, profile: Profile
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """z_t (Eq. 1), the network's target, and its inputs, the first of which is from Eq. 4."""
    z_t, target = training_pair(schedule, batch["z0"], batch["eps"], batch["t"], profile.objective, profile.prediction)
    t = batch["t"] + 1 if profile.objective == "rflow" else batch["t"]  # as in sampling
    z_in = noisy_input(batch["z0"], z_t, batch["m"], profile.background)
    return z_t, target, (z_in, t, batch["condition"], batch["subtype"], batch["histogram"])


def _network(
    cache: LatentCache, profile: Profile, seed: int, path: Path, initial: dict[str, Tensor] | None
) -> ConditionalUNet:
    """The initial network; its linear part is fitted unless `initial` or a checkpoint provides it."""
    network = ConditionalUNet(profile)
    own = network.state_dict()
    if initial is not None:
        network.load_state_dict(started(own, initial))
    lost = initial is not None and any(k in initial and initial[k].numel() > own[k].numel() for k in own)  # inputs lost
    if network.linear is not None and (initial is None or lost) and not Path(path).exists():
        fit_linear(network.linear, cache, profile, seed)
    return network


def _loop(
    network: ConditionalUNet,
    l_hist: HistogramTerm | None,
    cache: LatentCache,
    profile: Profile,
    seed: int,
    path: Path,
    accelerator: Accelerator,
    save_every: int,
) -> Loop:
    meta = {"stage": STAGE, "digest": profile.digest(*RUN_FIELDS), "seed": seed, "n": len(cache), "scale": cache.scale}
    if l_hist is not None:
        meta |= {"hist_lo": l_hist.lo.tolist(), "hist_hi": l_hist.hi.tolist()}
    adam = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], profile.ldm_lr, fused=True)

    def lr(step: int) -> float:
        falling = ckpt.polynomial_lr(profile.ldm_lr, step, profile.ldm_steps, profile.ldm_lr_power)
        return falling * min(1.0, (step + 1) / WARM_UP)

    loop = Loop(
        path, meta, {"model": network}, {"optimizer": adam}, identity=("stage", "digest", "seed", "n"),
        total=profile.ldm_steps, ema=profile.ldm_ema, lr=lr, save_every=save_every, accelerator=accelerator,
    )  # fmt: skip
    # another autoencoder's, or other crops
    if not math.isclose(loop.meta.get("scale", 0.0), cache.scale, rel_tol=1e-6):
        raise ckpt.CheckpointError(f"{path}: made of other latents; choose another folder or delete it")
    return loop


def _graphs(loop: Loop, batches: Batches, schedule: Schedule) -> Callable[..., Tensor] | None:
    """The network as CUDA graphs, one per window side; None if they would not pay off."""
    accelerator, profile = loop.accelerator, batches.profile
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1 or loop.left < GRAPHED_FROM:
        return None
    examples = [network_inputs(batches.of(g, 0), schedule, profile)[2] for g in batches.groups]
    return graphed(loop.modules["model"], examples, profile)


def started(own: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Starting weights: `initial` where it fits. Inputs that only one of the two has (a template's) come last: new ones
    start at zero, dropped ones are cut off. Other mismatched weights (hist_tokens changed) start afresh."""
    out = dict(own)
    for name in own.keys() & initial.keys():
        new, old = own[name], initial[name]
        if new.shape == old.shape:
            out[name] = old
        elif new.ndim == old.ndim > 2 and new.shape[0] == old.shape[0] and new.shape[2:] == old.shape[2:]:
            kept = old[:, : new.shape[1]].to(new)
            out[name] = torch.cat([kept, torch.zeros_like(new[:, kept.shape[1] :])], 1)
    return out


def load_unet(path: Path, profile: Profile, device: torch.device | str = "cpu") -> tuple[ConditionalUNet, float]:
    """The trained U-Net (EMA weights, evaluation mode) and the latent scale it was trained with.

    Raises:
        CheckpointError: missing, corrupt, or of another architecture.
    """
    groups, meta = ckpt.load(path)
    ckpt.require(meta, path, stage=STAGE)
    model = ConditionalUNet(profile)
    try:
        model.load_state_dict(groups["ema"])
    except (RuntimeError, KeyError) as error:
        raise ckpt.CheckpointError(f"{path}: weights of another architecture ({str(error)[:200]})") from error
    return model.to(device).eval().requires_grad_(False), meta["scale"]
