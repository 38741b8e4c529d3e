"""The only place that knows folders. Everything else receives paths or asks here."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
WEIGHTS = PACKAGE / "weights"  # shipped safetensors with their cards
PUBLISHED = ROOT / "results" / "published"  # the paper's own numbers as CSV


def cache_dir() -> Path:
    """Folder for everything that can be made again (`HRLDM_CACHE`, default `.cache/`)."""
    path = Path(os.environ.get("HRLDM_CACHE", ROOT / ".cache"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def results_dir(dataset: str, profile: str) -> Path:
    """`results/<dataset>/<profile>/` with its `tables`, `figures` and `runs` folders."""
    path = Path(os.environ.get("HRLDM_RESULTS", ROOT / "results")) / dataset / profile
    for sub in ("tables", "figures", "runs"):
        (path / sub).mkdir(parents=True, exist_ok=True)
    return path


def bench_dir() -> Path:
    """`results/bench/`, where `make bench` writes."""
    path = Path(os.environ.get("HRLDM_RESULTS", ROOT / "results")) / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path
