"""Forward and reverse diffusion for inpainting: Eq. 1, 4, 6, 10, the DDPM and DDIM steps, rectified flow, Algorithm 2.

Notation: z0 clean latent, z_t noisy latent (Eq. 1), M binary lesion mask, abar_t = `alphas_cumprod[t]`. Time runs over
0..T-1, as in every library; the paper's t = 1..T is ours plus one, so "t - 1" at the last step means no noise at all.

Background rule (the paper uses one in training, another in sampling):
    clean   Eq. 4 in training, the clean background pasted back at each sampling step
    noised  Eq. 1 everywhere in training, Eq. 10 in sampling
    paper   Eq. 4 in training, Eq. 10 in sampling: the network never saw a noised background

What the network predicts (the sampler and Eq. 6 always use eps_hat):
    eps     the noise, as in the paper: at t = 999 an error in eps_hat becomes an error in z0_hat 84 times as large, and
            an undertrained network starts every nodule from such a z0_hat
    v       v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (Salimans & Ho 2022): v and z_t give eps_hat and z0_hat exactly,
            and neither error is amplified at any t
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREDICTIONS = ("v", "eps")


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule and objective; `timesteps` to `beta_end` by Section 5."""

    timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    objective: str = "ddpm"  # ddpm | rflow
    prediction: str = "v"  # the U-Net's output, compared in Eq. 5: v, from which eps follows exactly | eps (paper)
    background: str = "clean"  # clean | noised | paper


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample from a trained network."""

    sampler: str = "ddim"  # ddpm | ddim; rectified flow has its own
    steps: int = 10
    match_t_max: int | None = None  # impose the histogram at t <= this (insertion/matching.py); None = never (paper)
    feather: bool = True  # only the lesion is taken, into the original voxels; False = the whole decoded crop (paper)
    match_rounds: int = 1  # times per such step, since decoding undoes part of it; the second change is doubled


Known = TypeVar("Known")
Draw = Callable[[], Tensor]  # noise shaped like z
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (z (B, c, ...), t (B,)) -> predicted noise (or velocity, for rflow)


class Schedule:
    """Scaled-linear DDPM noise schedule (Section 5)."""

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        config = config or DiffusionConfig()
        self.timesteps = config.timesteps
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, self.timesteps, dtype=torch.float64)
        self.betas = root**2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)

    def abar(self, t: Int[Tensor, " b"], like: Tensor) -> Tensor:
        """abar_t as (B, 1, 1, 1, 1) in `like`'s type; 1 where t < 0 (before any noise)."""
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # once: a copy at every step would stall the GPU
        abar = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp_min(0)])
        return abar.to(like.dtype).to(like.device).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Eq. 1: z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps."""
        abar = self.abar(t, z0)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor, prediction: str) -> Tensor:
        """The network's training target at z_t.

        Raises:
            ValueError: unknown prediction.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")
        if prediction == "eps":
            return eps
        abar = self.abar(t, z0)
        return abar.sqrt() * eps - (1 - abar).sqrt() * z0

    def noise(self, out: Tensor, z_t: Tensor, t: Tensor, prediction: str) -> Tensor:
        """eps_hat from the network's output."""
        if prediction == "eps":
            return out
        abar = self.abar(t, z_t)
        return abar.sqrt() * out + (1 - abar).sqrt() * z_t

    def predict_z0(self, z_t: Tensor, eps_hat: Tensor, t: Tensor) -> Tensor:
        """Eq. 6, the inverse of Eq. 1."""
        abar = self.abar(t, z_t)
        return (z_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt()

    def noise_of(self, z_t: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """The noise that Eq. 1 adds to z0 to give z_t."""
        abar = self.abar(t, z_t)
        return (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()

    def ddpm_step(self, z_t: Tensor, eps_hat: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """One ancestral step t -> t - 1 with the posterior variance (Ho et al., Eq. 7); the last step adds no noise."""
        abar, abar_prev = self.abar(t, z_t), self.abar(t - 1, z_t)
        beta = 1 - abar / abar_prev
        z0 = self.predict_z0(z_t, eps_hat, t)
        mean = (abar_prev.sqrt() * beta * z0 + (abar / abar_prev).sqrt() * (1 - abar_prev) * z_t) / (1 - abar)
        return mean + (beta * (1 - abar_prev) / (1 - abar)).sqrt() * noise

    def ddim_step(self, z_t: Tensor, eps_hat: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
        """One deterministic step t -> t_prev (Song et al., eta = 0)."""
        return self.add_noise(self.predict_z0(z_t, eps_hat, t), eps_hat, t_prev)

    def spaced(self, steps: int) -> list[int]:
        """`steps` evenly spaced times from T-1 down to 0; T-1 alone for one step."""
        return torch.linspace(self.timesteps - 1, 0, steps).round().int().tolist()


def blend(m: Float[Tensor, "b 1 d h w"], lesion: Tensor, background: Tensor) -> Tensor:
    """M * lesion + (1 - M) * background (the form of Eq. 4 and Eq. 10)."""
    return m * lesion + (1 - m) * background


class Background(NamedTuple):
    """Whether the latent outside M is noised like the lesion; see the module's docstring."""

    noised_in_training: bool
    noised_in_sampling: bool


BACKGROUNDS = {"clean": Background(False, False), "noised": Background(True, True), "paper": Background(False, True)}


def _known(what: str, name: str, table: Mapping[str, Known]) -> Known:
    """The entry of that name; ValueError if there is none."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def noisy_input(z0: Tensor, z_t: Tensor, m: Tensor, background: str) -> Tensor:
    """What the network sees in training: Eq. 4, or z_t itself for the `noised` rule."""
    return z_t if _known("background rule", background, BACKGROUNDS).noised_in_training else blend(m, z_t, z0)


def flow_input(z0: Tensor, eps: Tensor, t: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """Rectified flow (MAISI-v2): z_tau = (1 - tau) z0 + tau eps with tau = t / T, and its target velocity z0 - eps."""
    tau = (t / timesteps).to(z0.dtype).view(-1, *[1] * (z0.ndim - 1))
    return (1 - tau) * z0 + tau * eps, z0 - eps


def training_pair(
    schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor, objective: str, prediction: str
) -> tuple[Tensor, Tensor]:
    """z_t and the network's target there. t = 0..T-1; rectified flow counts 1..T, in sampling too."""
    if objective == "rflow":
        return flow_input(z0, eps, t + 1, schedule.timesteps)
    return schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t, prediction)  # Algorithm 1, line 3


def randn_like(z: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Noise (B, ...) drawn item by item, so that a nodule's noise does not depend on its batch. CPU generators."""
    if len(generators) != len(z):
        raise ValueError(f"{len(z)} items but {len(generators)} generators")
    return torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)


class Ddpm:
    """The ancestral sampler, over all times of the schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def times(self, steps: int) -> list[float]:
        """The times of the steps, then -1 for no noise."""
        if steps != self.schedule.timesteps:
            raise ValueError(f"ddpm takes all {self.schedule.timesteps} steps; use ddim for {steps}")
        return [*self.schedule.spaced(steps), -1]

    def step(self, z: Tensor, eps_hat: Tensor, now: int, following: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """z0_hat, and z at the following time; Algorithm 2, line 8."""
        t = _full(z, now)
        return self.schedule.predict_z0(z, eps_hat, t), self.schedule.ddpm_step(z, eps_hat, t, draw())

    def noised(self, z_bg: Tensor, following: int, draw: Draw) -> Tensor:
        """The background with the noise of the following time; Algorithm 2, line 9."""
        return self.schedule.add_noise(z_bg, draw(), _full(z_bg, following))


class Ddim(Ddpm):
    """The deterministic sampler, over any number of times."""

    def times(self, steps: int) -> list[float]:
        return [*self.schedule.spaced(steps), -1]

    def step(self, z: Tensor, eps_hat: Tensor, now: int, following: int, draw: Draw) -> tuple[Tensor, Tensor]:
        t = _full(z, now)
        return self.schedule.predict_z0(z, eps_hat, t), self.schedule.ddim_step(z, eps_hat, t, _full(z, following))


class Euler(Ddpm):
    """Rectified flow by Euler's method. Times stay floats: rounded, the steps would sum to more than one."""

    def times(self, steps: int) -> list[float]:
        return [self.schedule.timesteps * (1 - i / steps) for i in range(steps)] + [0.0]

    def step(self, z: Tensor, velocity: Tensor, now: float, following: float, draw: Draw) -> tuple[Tensor, Tensor]:
        total = self.schedule.timesteps
        return z + (now / total) * velocity, z + ((now - following) / total) * velocity

    def noised(self, z_bg: Tensor, following: float, draw: Draw) -> Tensor:
        return flow_input(z_bg, draw(), _full(z_bg, following), self.schedule.timesteps)[0]


SAMPLERS = {"ddpm": Ddpm, "ddim": Ddim, "rflow": Euler}


def _full(z: Tensor, time: float) -> Tensor:
    return torch.full((len(z),), time, device=z.device)


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    z_bg: Float[Tensor, "b c d h w"],
    m: Float[Tensor, "b 1 d h w"],
    schedule: Schedule,
    generators: list[torch.Generator],
    sampler: str = "ddim",
    steps: int = 50,
    background: str = "clean",
) -> Iterator[SimpleNamespace]:
    """Algorithm 2: denoise the lesion into the background, yielding after each step z, z0_hat, t, step, total.

    ``sampler="ddpm", steps=T, background="paper"`` is Algorithm 2 to the letter. The last z yielded has the clean
    background outside M under every rule.

    Raises:
        ValueError: unknown sampler or background, no steps, or ddpm with fewer steps than the schedule has.
    """
    solver = _known("sampler", sampler, SAMPLERS)(schedule)
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"sampling steps must lie in 1..{schedule.timesteps}, got {steps}")
    noised = _known("background rule", background, BACKGROUNDS).noised_in_sampling
    times = solver.times(steps)
    z = randn_like(z_bg, generators)  # line 5
    z = z if noised else blend(m, z, z_bg)
    for i, (now, following) in enumerate(itertools.pairwise(times), start=1):  # line 6
        out = denoiser(z, _full(z, now))  # line 7
        z0_hat, z = solver.step(z, out, now, following, lambda: randn_like(z_bg, generators))  # line 8
        behind = z_bg
        if noised and i < steps:  # at the end there is no noise
            behind = solver.noised(z_bg, following, lambda: randn_like(z_bg, generators))  # line 9
        z = blend(m, z, behind)  # line 10, Eq. 10
        yield SimpleNamespace(z=z, z0_hat=z0_hat, t=now, step=i, total=steps)
