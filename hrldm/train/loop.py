"""What the training of both stages shares besides the losses: resuming, weight averaging, saving, progress.

Training is a generator. Each step draws all its randomness from (seed, step, rank), so a killed and resumed run ends
with the same weights as an uninterrupted one.

    loop = Loop(path, meta, {"model": model}, {"optimizer": adam}, ...)
    for step, rng in loop:
        loss = ...
        loop.descend(loss, "model", "optimizer")
        yield loop.done({"loss": loss})
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from hrldm.train import checkpoint as ckpt
from hrldm.train.device import grad_scaler

CHECK_EVERY = 50  # steps between loss checks on a GPU, each of which stalls it


@dataclass(frozen=True)
class StepState:
    """What a training step returns to its caller. Metrics may be tensors that the device is still computing."""

    step: int  # steps done, 1-based
    metrics: dict[str, Tensor]


class DivergedError(ArithmeticError):
    """A loss became NaN or infinite."""


class Loop:
    """The steps of a run, from its checkpoint on if there is one; see the module docstring.

    meta:       run metadata for the checkpoint's header; a run is resumed only if its `identity` keys agree
    modules:    trained modules by name; "model" is averaged
    optimizers: by name; a parameter group's optional "scale" multiplies its learning rate
    lr:         learning rate of a step
    precision:  `mixed_precision` of what the losses come from: fp16 has them scaled
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        identity: tuple[str, ...],
        total: int,
        ema: float,
        lr: Callable[[int], float],
        save_every: int,
        accelerator: Accelerator,
        precision: str = "no",
    ) -> None:
        self.path, self.total, self.save_every = Path(path), total, save_every
        self.accelerator, self.lr = accelerator, lr
        self.ema, self.meta = ckpt.Ema(modules["model"], ema), {"step": 0} | dict(meta)
        self.scaler = grad_scaler(precision, accelerator.device.type)
        if self.path.exists():
            groups, old = ckpt.load(self.path)
            ckpt.require(old, self.path, **{k: self.meta[k] for k in identity})
            for name, module in modules.items():
                module.load_state_dict(groups[name])
            for name, optimizer in optimizers.items():
                ckpt.restore_optimizer(optimizer, groups.get(name, {}))
            self.ema.shadow, self.meta = groups["ema"], old
            if old.get("scaler"):
                self.scaler.load_state_dict(old["scaler"])
        prepared = accelerator.prepare(*modules.values(), *optimizers.values())
        prepared = prepared if isinstance(prepared, tuple) else (prepared,)
        self.modules = dict(zip(modules, prepared[: len(modules)], strict=True))
        self.optimizers = dict(zip(optimizers, prepared[len(modules) :], strict=True))
        self.ema.shadow = {k: v.to(accelerator.device) for k, v in self.ema.shadow.items()}
        self.check_every = 1 if accelerator.device.type == "cpu" else CHECK_EVERY

    def __iter__(self) -> Iterator[tuple[int, np.random.Generator]]:
        """Each step's number, from 0, and its random generator."""
        seed, rank = self.meta["seed"], self.accelerator.process_index
        for step in range(self.meta["step"], self.total):
            self.step = step
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = self.lr(step) * group.get("scale", 1.0)
            yield step, np.random.default_rng((seed, step, rank))

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Stop before a step that would spoil the weights; the checkpoint on disk is untouched.

        Raises:
            DivergedError: naming the loss, the step and what to change.
        """
        if self.step % self.check_every and not self._due:
            return
        bad = [name for name, value in losses.items() if not torch.isfinite(value.detach()).all()]
        if bad:
            kept = f"the last checkpoint, {self.path}, is kept"
            kept = kept if self.path.exists() else "no checkpoint was written yet"
            raise DivergedError(
                f"training diverged at step {self.step + 1}: {' and '.join(bad)} is not a number; {kept}. "
                f"Lower the learning rate (now {self.lr(self.step):.3g}) or set mixed_precision to 'no'"
            )

    def descend(self, loss: Tensor, module: str, optimizer: str, clip: float | None) -> None:
        """One update of a module; clip: largest gradient norm, None for any."""
        self.optimizers[optimizer].zero_grad()
        self.accelerator.backward(self.scaler.scale(loss))
        if clip is not None:
            self.scaler.unscale_(self.optimizers[optimizer])
            self.accelerator.clip_grad_norm_(self.modules[module].parameters(), clip)
        self.scaler.step(self.optimizers[optimizer])

    def done(self, losses: Mapping[str, Tensor]) -> StepState:
        """Average the weights, save if due, and return the step's state."""
        unwrap, done = self.accelerator.unwrap_model, self.step + 1
        self.scaler.update()
        self.ema.update(unwrap(self.modules["model"]), self.step)
        if self.accelerator.is_main_process and self._due:
            groups = {name: unwrap(module).state_dict() for name, module in self.modules.items()}
            groups["ema"] = self.ema.shadow
            if done < self.total:  # nobody resumes a finished run
                groups |= {k: ckpt.optimizer_tensors(o.optimizer) for k, o in self.optimizers.items()}
            ckpt.save(self.path, groups, self.meta | {"step": done, "scaler": self.scaler.state_dict()})
        return StepState(done, {k: v.detach() for k, v in losses.items()})

    @property
    def _due(self) -> bool:
        return (self.step + 1) % self.save_every == 0 or self.step + 1 == self.total


def follow(steps: Iterator[StepState], path: Path, total: int, label: str) -> pd.DataFrame:
    """Run a training of `path` to its end with a progress bar; append its losses to history.jsonl beside it, return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = ckpt.load_meta(path)["step"] if path.exists() else 0
    lines, started = [], time.perf_counter()
    with (path.parent / "history.jsonl").open("a") as f:
        for state in tqdm(steps, total=total, initial=done, desc=label, mininterval=15):
            lines.append({"step": state.step, "seconds": time.perf_counter() - started} | state.metrics)
            if len(lines) == 50 or state.step == total:
                f.writelines(json.dumps({k: float(v) for k, v in line.items()}) + "\n" for line in lines)
                f.flush()
                lines = []
    return read_history(path.parent)


def read_history(folder: Path) -> pd.DataFrame:
    """Losses of a run, one row per step; steps repeated after a kill count once."""
    file = folder / "history.jsonl"
    if not file.exists():
        return pd.DataFrame(columns=["step"])
    frame = pd.read_json(file, lines=True)
    return frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
