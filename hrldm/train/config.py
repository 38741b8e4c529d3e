"""Settings of Stage II's training: everything that a trained U-Net depends on besides its data, seed and start."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from hrldm.config import changed
from hrldm.model.diffusion import DiffusionConfig
from hrldm.model.histogram import HistogramConfig
from hrldm.model.unet import UnetConfig
from hrldm.train.latents import LatentsConfig


@dataclass(frozen=True)
class LdmConfig:
    """Training of Stage II (Section 5)."""

    pretrain_steps: int = 2000  # on lidc-mini with lambda 0, before any other dataset; 0 = none (paper)
    steps: int = 1000
    epochs: int = 0  # instead of steps: passes over the training nodules (paper); see `Stage2.for_nodules`
    batch: int = 8
    lr: float = 6e-4
    lr_power: float = 1.0  # polynomial schedule
    warm_up: int = 20  # steps of a linear rise before it; 0 = none (paper)
    clip: float | None = 1.0  # largest gradient norm; None = any (paper)
    ema: float = 0.998
    inpaint_norm: str = "paper"  # paper: per lesion voxel, summed over channels (suits lambda = 10) | voxels_channels


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """The parts that make a trained U-Net; a profile is one, and a checkpoint's header holds one."""

    unet: UnetConfig = field(default_factory=UnetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    histogram: HistogramConfig = field(default_factory=HistogramConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    ldm: LdmConfig = field(default_factory=LdmConfig)
    mixed_precision: str = "no"  # no | bf16 | fp16 with gradient scaling (paper); on a GPU only

    def stage2(self) -> Stage2:
        """These parts alone: what the cache keys of a U-Net and the headers of checkpoints take of a profile."""
        return Stage2(**{f.name: getattr(self, f.name) for f in fields(Stage2)})

    def for_nodules(self, n: int) -> Self:
        """With `ldm.epochs` turned into steps over n training nodules.

        Raises:
            ValueError: both are given, or neither.
        """
        if bool(self.ldm.steps) == bool(self.ldm.epochs):
            raise ValueError(
                f"ldm.steps={self.ldm.steps} and ldm.epochs={self.ldm.epochs}: give one, and 0 for the other"
            )
        steps = self.ldm.steps or -(-self.ldm.epochs * n // self.ldm.batch)
        return changed(self, ldm__steps=steps, ldm__epochs=0)
