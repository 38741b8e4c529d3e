"""What a training step costs before any is made: arithmetic, memory and time of one at its full size.

Arithmetic and memory are counted on tensors without content (torch's `FakeTensorMode`). The time is measured with the same
network on cubes of growing side, up to the full one where that takes seconds, and grows with the arithmetic beyond.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hrldm.model.autoencoder import FACTOR, Autoencoder, kl_divergence
from hrldm.train.checkpoint import Ema
from hrldm.train.device import autocast, device
from hrldm.train.vae import EMA, discriminator
from study.profiles import Profile

PROBE_S = 1.0  # seconds of a step from which on no larger cube is tried
SMALLEST = 32  # voxels, the first cube

Step = Callable[[int], None]  # one step on cubes of so many voxels a side


@dataclass(frozen=True)
class Stage:
    """steps of one kind. build: device -> a step; side: of its cubes, voxels; multiple: what their sides must divide by"""

    name: str
    steps: int
    side: int
    multiple: int
    build: Callable[[str], Step]


class Cost(NamedTuple):
    """A row of the plan; measured_at_side: the largest cube whose step was timed."""

    stage: str
    steps: int
    side_voxels: int
    tflop_per_step: float
    s_per_step: float
    days: float
    memory_gb: float
    measured_at_side: int
    device: str

    def __str__(self) -> str:
        return (
            f"{self.stage}: {self.steps:,} steps, about {self.days:,.3g} days and {self.memory_gb:,.3g} GB on {self.device} "
            f"({self.s_per_step:,.3g} s a step)"
        )


def cost(stage: Stage, on: str | None = None) -> Cost:
    """Steps, days and memory of a stage on a device, by default that of the networks."""
    on = on or device()
    times = measured(stage, on)
    counts = {side: counted(stage, side, on) for side in {*times, stage.side}}
    seconds = extrapolated(times, {side: tflop for side, (tflop, _) in counts.items()}, stage.side)
    days = stage.steps * seconds / 86400
    return Cost(
        stage.name, stage.steps, stage.side, counts[stage.side][0], seconds, days, counts[stage.side][1], max(times), on
    )


def autoencoder_stage(p: Profile) -> Stage:
    """Both updates of Stage I, all losses on but the perceptual one."""

    def build(on: str) -> Step:
        model, critic = Autoencoder(p.autoencoder), discriminator()
        generator_update, critic_update = updates(model, p.vae.lr, True), updates(critic, p.vae.lr)

        def step(side: int) -> None:
            x = torch.zeros(p.vae.batch, 1, side, side, side)
            with autocast(p.mixed_precision, on):
                recon, mu, sigma = model(x)
            recon = recon.float()
            loss = (recon - x).abs().mean() + kl_divergence(mu.float(), sigma.float())
            generator_update(loss + critic(recon)[-1].square().mean())
            critic_update(critic(recon.detach())[-1].square().mean() + critic(x)[-1].square().mean())

        return step

    return Stage("I: autoencoder", p.vae.steps, p.vae.patch, FACTOR, build)


def updates(model: nn.Module, lr: float, averaged: bool = False) -> Callable[[Tensor], None]:
    """Descent of a loss by Adam; with a copy of the weights where they are averaged."""
    adam = torch.optim.Adam(model.parameters(), lr)
    average = Ema(model, EMA) if averaged else None

    def update(loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()
        if average is not None:
            average.update(model, 0)

    return update


# -- counting and measuring -----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made within it: those still referred to, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def counted(stage: Stage, side: int, on: str) -> tuple[float, float]:
    """TFLOP (a multiplication and an addition count two) and GB of a step, weights and optimizer included."""
    with torch.device(on), FakeTensorMode(), Live() as live:
        step = stage.build(on)
        step(side)  # Adam makes its moments
        with FlopCounterMode(display=False) as flops:
            step(side)
    return flops.get_total_flops() / 1e12, live.peak / 2**30


def measured(stage: Stage, on: str) -> dict[int, float]:
    """Seconds of a step by the side of its cubes, doubled from the smallest until a step takes `PROBE_S`; two sides at least."""
    times: dict[int, float] = {}
    with torch.device(on):
        step = stage.build(on)
        for side in sides(stage):
            times[side] = _seconds(step, side, on)
            if times[side] < PROBE_S:  # again, now that kernels are chosen and memory is taken
                times[side] = _seconds(step, side, on)
            elif len(times) > 1:
                break
    return times


def _seconds(step: Step, side: int, on: str) -> float:
    started = time.perf_counter()
    step(side)
    if on == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sides(stage: Stage) -> list[int]:
    """From at least `SMALLEST` voxels by doubling to the full side."""
    side, found = stage.multiple * -(-SMALLEST // stage.multiple), []
    while side < stage.side:
        found.append(side)
        side *= 2
    return [*found, stage.side]


def extrapolated(times: dict[int, float], tflop: dict[int, float], side: int) -> float:
    """Seconds of a step on cubes of `side`: on the line through the two largest measured, or in proportion to the largest."""
    *before, largest = times
    if side == largest:
        return times[largest]
    rate = times[largest] / tflop[largest]
    if before and times[before[-1]] < times[largest]:
        rate = (times[largest] - times[before[-1]]) / (tflop[largest] - tflop[before[-1]])
    return times[largest] + rate * (tflop[side] - tflop[largest])
