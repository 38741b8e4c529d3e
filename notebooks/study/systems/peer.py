"""What the compared systems of other authors share: crops, windows, batches, updates, learning rate, averaging, pasting.

A peer is a subclass of `Peer` in a file of its own, with its network, its loss and its sampler, made from the published
description alone. All else is as in our own rows, so that a difference in the tables is a difference of method.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hrldm.cache import digest, keyed
from hrldm.config import changed
from hrldm.insertion.generator import Generator, Request
from hrldm.model.autoencoder import Autoencoder
from hrldm.train import checkpoint as ckpt
from hrldm.train.config import Stage2
from hrldm.train.device import device
from hrldm.train.latents import LatentCache, Picture, weights_digest
from hrldm.train.ldm import Batches
from hrldm.train.loop import Loop, StepState, follow
from study.profiles import Profile
from study.study import Study, pretraining_study

STAGE = "peer"


class Peer(Generator):
    """A compared system. A subclass gives the four below, and `denoise`."""

    name: ClassVar[str]
    VERSION: ClassVar[int] = 1  # raise when the same settings and data would give other weights
    changes: ClassVar[dict] = {}  # of the profile, as `part__field`
    picture: ClassVar[Picture | None] = None  # an image the network is shown besides; its latent is batch["picture"]

    @staticmethod
    def network(config: Stage2, channels: int) -> nn.Module:
        """The untrained network for latents of so many channels."""
        raise NotImplementedError

    @staticmethod
    def losses(network: nn.Module, batch: dict[str, Tensor], config: Stage2) -> dict[str, Tensor]:
        """The terms whose sum is descended, for a batch of `Batches`: z0, t, eps (B, c, d, d, d), m, mask, subtype, …; and
        step, the number of updates done."""
        raise NotImplementedError

    @staticmethod
    def prepare(network: nn.Module, cache: LatentCache) -> None:
        """Fit before training what has a closed form."""

    @staticmethod
    def codec(study: Study) -> Autoencoder:
        """What encodes crops and decodes lesions."""
        return study.autoencoder

    @property
    def most_steps(self) -> int:
        """Steps that a sampler of many may take here: those of the paper's profile are enough for all as published."""
        return 5 * self.sampling.steps

    def pictures(self, request: Request) -> np.ndarray | None:
        """HU (N, D, D, D) of `picture` for each nodule, or None."""
        picture = type(self).picture
        if picture is None:
            return None
        rows = zip(request.background, request.mask, request.histogram, request.seeds, strict=True)
        return np.stack([picture(b, m, h, np.random.default_rng(int(s))) for b, m, h, s in rows])


def trained(study: Study, system: type[Peer]) -> Peer:
    """The trained system (trained now when it is not on disk yet), on nodules of known truth first as our own networks are."""
    profile, codec = changed(study.profile, **system.changes), system.codec(study)
    own = codec is study.autoencoder
    cache = study.latents("train", system.picture) if own else study.encoded("train", system.picture, codec)
    start = None
    if (embedded := pretraining_study(study, study.profile)) is not None:
        start = trained(embedded, system).unet.state_dict()
    path = run_path(study, system)
    torch.manual_seed(study.seed)
    network = system.network(profile, cache.mean.shape[2])
    if not path.exists() or ckpt.load_meta(path)["step"] < profile.ldm.steps:
        if start is not None:
            network.load_state_dict(start)
        system.prepare(network, cache)
        follow(_train(system, network, cache, profile, study.seed, path), path, profile.ldm.steps, system.name)
    network.load_state_dict(ckpt.load(path)[0]["ema"])
    network = network.to(device()).eval().requires_grad_(False)
    return system(codec, network, cache.scale, profile, profile.sampling, device())


def run_path(study: Study, system: type[Peer]) -> Path:
    """Where the weights of a system are kept."""
    profile = changed(study.profile, **system.changes)
    pretrained = study.dataset != "lidc-mini" and profile.ldm.pretrain_steps
    data = (profile.data.patch_mm, study.data_hash, weights_digest(system.codec(study)), pretrained, study.seed)
    return keyed("runs", system.name, system.VERSION, profile.stage2(), *data) / f"{STAGE}.safetensors"


def _train(
    system: type[Peer], network: nn.Module, cache: LatentCache, config: Profile, seed: int, path: Path
) -> Iterator[StepState]:
    """Train `ldm.steps` steps, resuming from `path` when it exists."""
    accelerator = Accelerator(cpu=device() == "cpu")
    batches = Batches(cache, config, accelerator.device, pictures=system.picture is not None)
    settings = config.stage2()
    meta = {"stage": STAGE, "digest": digest(system.name, settings), "seed": seed, "config": asdict(settings)}
    adam = torch.optim.Adam(network.parameters(), config.ldm.lr, fused=True)
    loop = Loop(
        path, meta, {"model": network}, {"optimizer": adam}, identity=("stage", "digest", "seed"),
        total=config.ldm.steps, ema=config.ldm.ema, save_every=100, accelerator=accelerator,
        lr=lambda step: ckpt.learning_rate(config.ldm.lr, step, config.ldm.steps, config.ldm.lr_power, config.ldm.warm_up),
    )  # fmt: skip
    for step, rng in loop:
        batch = batches.draw(rng) | {"step": step}
        losses = system.losses(loop.modules["model"], batch, config)
        loop.check(losses)
        loop.descend(sum(losses.values()), "model", "optimizer", config.ldm.clip)
        yield loop.done(losses)
