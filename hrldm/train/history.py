"""A training generator run to its end with progress, its losses kept in `history.jsonl` beside its checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from hrldm.train import checkpoint as ckpt
from hrldm.train.steps import StepState


def follow(steps: Iterator[StepState], folder: Path, total: int, path: Path, label: str) -> pd.DataFrame:
    """Run a training generator with progress, appending its losses to history.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    done = ckpt.load_meta(path)["step"] if path.exists() else 0
    lines, started = [], time.perf_counter()
    with (folder / "history.jsonl").open("a") as f:
        for state in tqdm(steps, total=total, initial=done, desc=label, mininterval=15):
            lines.append({"step": state.step, "seconds": time.perf_counter() - started} | state.metrics)
            if len(lines) == 50 or state.step == total:
                f.writelines(json.dumps({k: float(v) for k, v in line.items()}) + "\n" for line in lines)
                f.flush()
                lines = []
    return read_history(folder)


def read_history(folder: Path) -> pd.DataFrame:
    """Loss history of a run, one row a step; steps repeated after a kill count once."""
    file = folder / "history.jsonl"
    if not file.exists():
        return pd.DataFrame(columns=["step"])
    frame = pd.read_json(file, lines=True)
    return frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
