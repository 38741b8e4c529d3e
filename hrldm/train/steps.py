"""What the training generators of both stages share: the state they yield, and the check that a step is still sane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepState:
    """What a training step leaves for its caller. Metrics may be tensors of a device that is still at work on them."""

    step: int  # steps done, 1-based
    total: int
    metrics: dict[str, float | Tensor]


class DivergedError(ArithmeticError):
    """A loss is no longer a number."""


def require_finite(losses: Mapping[str, Tensor], step: int, lr: float, path: Path) -> None:
    """Stop before a step that would spoil the weights; the checkpoint on disk stays as it was.

    Raises:
        DivergedError: naming the loss, the step and what to change.
    """
    bad = [name for name, value in losses.items() if not torch.isfinite(value.detach()).all()]
    if bad:
        kept = f"the last checkpoint, {path}, is kept" if Path(path).exists() else "no checkpoint was written yet"
        raise DivergedError(
            f"training diverged at step {step + 1}: {' and '.join(bad)} is not a number; {kept}. "
            f"Lower the learning rate (now {lr:.3g}) or set mixed_precision to 'no'"
        )
