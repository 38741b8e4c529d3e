"""Training of Stage II (Algorithm 1), as a generator; `histogram.weight` = 0 makes it MAISI-DDPM,
``diffusion.objective="rflow"`` MAISI's rectified flow, all else equal.

Runs that differ in one option see the same nodules, times and noise. Resuming, averaging and saving are in `loop`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from hrldm.cache import digest
from hrldm.config import from_header
from hrldm.model.autoencoder import Autoencoder
from hrldm.model.diffusion import DiffusionConfig, Schedule, noisy_input, training_pair
from hrldm.model.losses import inpainting_loss, total_loss
from hrldm.model.unet import ConditionalUNet
from hrldm.train import checkpoint as ckpt
from hrldm.train.config import Stage2
from hrldm.train.device import autocast, graphed
from hrldm.train.device import device as device_name
from hrldm.train.histogram_term import HistogramTerm
from hrldm.train.latents import LatentCache, Windowed, windowed
from hrldm.train.linear_start import fit_linear
from hrldm.train.loop import Loop, StepState

STAGE = "ldm"
VERSION = 1  # raise when the same settings and latents would give other weights; part of cache keys
GRAPHED_FROM = 200  # steps of a run from which capturing CUDA graphs pays off


class Batches:
    """Random batches from a latent cache, kept entirely on the device. All windows of a batch have the same side; over
    many batches every nodule and variant is drawn equally often."""

    def __init__(
        self, cache: LatentCache, config: Stage2, device: torch.device | str = "cpu", pictures: bool | None = None
    ) -> None:
        """pictures: take the cache's pictures; None as `histogram.template` says."""
        self.config, self.device = config, torch.device(device)
        pictures = config.histogram.template if pictures is None else pictures
        self.groups = list(windowed(cache, config.unet, pictures, device))
        sizes = np.array([len(g) for g in self.groups])
        self.shares = sizes / sizes.sum()

    def draw(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """One batch of a random group, see `of`."""
        return self.of(self.groups[rng.choice(len(self.groups), p=self.shares)], int(rng.integers(2**62)))

    def of(self, group: Windowed, seed: int) -> dict[str, Tensor]:
        """One batch of a group (see `Windowed.take`) with times t (B,) and noise eps like z0; with `latents.sample`, z0
        is drawn from the posterior. Times are uniform on 0..T-1 and stratified, one per B-th, in ascending order: this
        lowers the gradient's variance.
        """
        g = torch.Generator(self.device).manual_seed(seed)
        size, timesteps = self.config.ldm.batch, self.config.diffusion.timesteps
        rows = torch.randint(len(group), (size,), generator=g, device=self.device)
        batch = group.take(rows, self.config.unet.mask_detail) | {"group": group, "rows": rows}
        z0, std = batch["z0"], batch.pop("std")
        u = torch.rand(size, generator=g, device=self.device, dtype=torch.float64)
        strata = torch.arange(size, device=self.device) + u
        batch["t"] = (strata * (timesteps / size)).long().clamp_max(timesteps - 1)
        batch["eps"] = torch.randn(z0.shape, generator=g, device=self.device)
        if self.config.latents.sample:
            batch["z0"] = z0 + std * torch.randn(z0.shape, generator=g, device=self.device)
        return batch


def train_ldm(
    cache: LatentCache,
    config: Stage2,
    seed: int,
    path: Path,
    autoencoder: Autoencoder | None = None,
    save_every: int = 100,
    initial: dict[str, Tensor] | None = None,
) -> Iterator[StepState]:
    """Train `ldm.steps` steps of Algorithm 1, resuming from `path` when it exists.

    Args:
        autoencoder: frozen decoder for L_hist; may be None when `histogram.weight` is 0
        initial:     weights to start from, see `started`

    Raises:
        CheckpointError: `path` belongs to a run with other settings, other latents or another decoder.
        DivergedError: a loss became NaN or infinite.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the null token, or the MLP of c_hist
    accelerator = Accelerator(cpu=device_name() == "cpu", kwargs_handlers=[unused])
    device, schedule = accelerator.device, Schedule(config.diffusion)
    torch.manual_seed(seed)
    network = _network(cache, config, seed, path, initial)
    batches, l_hist = Batches(cache, config, device), None
    if config.histogram.weight > 0 and config.diffusion.objective == "ddpm":
        l_hist = HistogramTerm(autoencoder, batches.groups, cache.scale, config)
    settings = config.stage2()
    meta = {
        "stage": STAGE, "digest": digest(settings), "seed": seed, "n": len(cache), "scale": cache.scale,
        "latent_channels": network.latent_channels, "config": asdict(settings),
    }  # fmt: skip
    if l_hist is not None:
        meta |= {"hist_lo": l_hist.lo.tolist(), "hist_hi": l_hist.hi.tolist()}
    adam = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], config.ldm.lr, fused=True)
    loop = Loop(
        path, meta, {"model": network}, {"optimizer": adam}, identity=("stage", "digest", "seed", "n"),
        total=config.ldm.steps, ema=config.ldm.ema, save_every=save_every, accelerator=accelerator,
        lr=lambda step: ckpt.learning_rate(config.ldm.lr, step, config.ldm.steps, config.ldm.lr_power, config.ldm.warm_up),
        precision=config.mixed_precision,
    )  # fmt: skip
    # another autoencoder's, or other crops
    if not math.isclose(loop.meta.get("scale", 0.0), cache.scale, rel_tol=1e-6):
        raise ckpt.CheckpointError(f"{path}: made of other latents; choose another folder or delete it")
    if l_hist is not None and not l_hist.has_ranges(loop.meta["hist_lo"], loop.meta["hist_hi"]):
        raise ckpt.CheckpointError(f"{path}: L_hist read another decoder; choose another folder or delete it")
    model = _graphs(loop, batches, schedule) or loop.modules["model"]

    for _, rng in loop:  # Algorithm 1, line by line
        batch = batches.draw(rng)  # 1, 2: z0 from the cache; t, eps
        z_t, target, inputs = network_inputs(batch, schedule, config.diffusion)  # 3, 4: Eq. 1, Eq. 4
        with autocast(config.mixed_precision, device.type):
            out = model(*inputs).float()  # 5, 6: c_type, c_hist, eps_hat
        losses = {"inpaint": inpainting_loss(target, out, batch["m"], config.ldm.inpaint_norm)}  # 9: Eq. 5
        if l_hist is not None:
            eps_hat = schedule.noise(out, z_t, batch["t"], config.diffusion.prediction)
            z0_hat = schedule.predict_z0(z_t, eps_hat, batch["t"])  # 7: Eq. 6
            losses["hist"] = l_hist(z0_hat, batch)  # 8, 10: Eq. 7, Eq. 8
        loop.check(losses)
        total = total_loss(losses["inpaint"], losses.get("hist"), config.histogram.weight)  # 11: Eq. 9
        loop.descend(total, "model", "optimizer", config.ldm.clip)  # 12
        yield loop.done(losses)


def network_inputs(
    batch: dict[str, Tensor], schedule: Schedule, config: DiffusionConfig
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """z_t (Eq. 1), the network's target, and its inputs, the first of which is from Eq. 4."""
    z_t, target = training_pair(schedule, batch["z0"], batch["eps"], batch["t"], config.objective, config.prediction)
    t = batch["t"] + 1 if config.objective == "rflow" else batch["t"]  # as in sampling
    z_in = noisy_input(batch["z0"], z_t, batch["m"], config.background)
    return z_t, target, (z_in, t, batch["condition"], batch["subtype"], batch["histogram"])


def _network(
    cache: LatentCache, config: Stage2, seed: int, path: Path, initial: dict[str, Tensor] | None
) -> ConditionalUNet:
    """The initial network; its linear part is fitted unless `initial` or a checkpoint provides it."""
    network = built(config, cache.mean.shape[2])
    own = network.state_dict()
    if initial is not None:
        network.load_state_dict(started(own, initial))
    lost = initial is not None and any(k in initial and initial[k].numel() > own[k].numel() for k in own)  # inputs lost
    if network.linear is not None and (initial is None or lost) and not Path(path).exists():
        fit_linear(network.linear, cache, config, seed)
    return network


def _graphs(loop: Loop, batches: Batches, schedule: Schedule) -> Callable[..., Tensor] | None:
    """The network as CUDA graphs, one per window side; None if they would not pay off. A resumed run has them where the
    whole one has: they round differently."""
    accelerator, config = loop.accelerator, batches.config
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1 or loop.total < GRAPHED_FROM:
        return None
    examples = [network_inputs(batches.of(g, 0), schedule, config.diffusion)[2] for g in batches.groups]
    return graphed(loop.modules["model"], examples, config.mixed_precision)


def started(own: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Starting weights: `initial` where it fits. Inputs that only one of the two has (a template's) come last: new ones
    start at zero, dropped ones are cut off. Other mismatched weights (another number of tokens) start afresh."""
    out = dict(own)
    for name in own.keys() & initial.keys():
        new, old = own[name], initial[name]
        if new.shape == old.shape:
            out[name] = old
        elif new.ndim == old.ndim > 2 and new.shape[0] == old.shape[0] and new.shape[2:] == old.shape[2:]:
            kept = old[:, : new.shape[1]].to(new)
            out[name] = torch.cat([kept, torch.zeros_like(new[:, kept.shape[1] :])], 1)
    return out


def built(config: Stage2, latent_channels: int) -> ConditionalUNet:
    """The U-Net of these settings, untrained."""
    return ConditionalUNet(config.unet, config.histogram, latent_channels, config.diffusion.timesteps)


def load_unet(path: Path, device: torch.device | str = "cpu") -> tuple[ConditionalUNet, float, Stage2]:
    """The trained U-Net (EMA weights, evaluation mode), the latent scale it was trained with, and its settings.

    Raises:
        CheckpointError: missing, corrupt, or of another architecture.
    """
    groups, meta = ckpt.load(path)
    ckpt.require(meta, path, stage=STAGE)
    try:
        config = from_header(Stage2, meta["config"])
        model = built(config, meta["latent_channels"])
        model.load_state_dict(groups["ema"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ckpt.CheckpointError(f"{path}: weights of another architecture ({str(error)[:200]})") from error
    return model.to(device).eval().requires_grad_(False), meta["scale"], config
