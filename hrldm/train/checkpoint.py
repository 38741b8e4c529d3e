"""Atomic, resumable checkpoints: one safetensors file whose header carries the JSON metadata.

A checkpoint is complete or absent: it is written beside its target, flushed to disk and renamed over it. Nothing is
unpickled on loading.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hrldm.atomic import atomic


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt or made for something else."""


def save(path: Path, groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping) -> None:
    """Write the named groups of tensors and the JSON-able `meta` to `path`, atomically."""
    flat = {f"{g}/{k}": v.detach().cpu().contiguous().clone() for g, state in groups.items() for k, v in state.items()}
    try:
        with atomic(path) as part:
            save_file(flat, part, metadata={"meta": json.dumps(meta)})
    except OSError as error:
        raise CheckpointError(error.strerror) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); free disk space and run again") from error


def load(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Groups of tensors and metadata of a checkpoint.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such checkpoint; train the stage first or give the path of one")
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            meta = json.loads((f.metadata() or {}).get("meta", "{}"))
            for key in f.keys():  # noqa: SIM118 - not a mapping
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = f.get_tensor(key)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: corrupt checkpoint ({error}); delete it to train again") from error
    return groups, meta


def load_meta(path: Path) -> dict:
    """Only the metadata, without reading any tensor."""
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads((f.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: missing or corrupt checkpoint ({error})") from error


def require(meta: Mapping, path: Path, **expected) -> None:
    """Raise CheckpointError when the metadata differs from `expected`."""
    wrong = {k: (meta.get(k), v) for k, v in expected.items() if meta.get(k) != v}
    if wrong:
        said = "; ".join(f"{k} is {have!r}, not {want!r}" for k, (have, want) in wrong.items())
        raise CheckpointError(f"{path}: made for another run ({said}); choose another folder or delete it")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of Adam-like optimisers as flat tensors, keyed `<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; parameter groups keep their current settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Ema:
    """Exponential moving average of a module's parameters; decay 0 follows them exactly."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Average in the current weights; early steps forget faster (the usual (1+n)/(10+n) warm-up)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = module.state_dict()
        moving = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in moving], [state[k] for k in moving], 1 - decay)
        for key in state.keys() - moving:
            self.shadow[key].copy_(state[key])


def learning_rate(base: float, step: int, total: int, power: float, warm_up: int) -> float:
    """Polynomial decay to zero (Section 5) after a linear rise over `warm_up` steps, if any."""
    return base * (1 - min(step, total) / total) ** power * min(1.0, (step + 1) / max(warm_up, 1))
