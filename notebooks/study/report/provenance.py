"""Where the numbers in a results folder come from: ``provenance.json``.

One file per results folder. Every notebook run adds to it (several may end at once under ``make -j``), so writing means
merging under a lock; a run with another profile, dataset or seed starts it anew.
"""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from hrldm import paths
from hrldm.atomic import write_text
from hrldm.cache import digest
from hrldm.train.config import Stage2

NAME = "provenance.json"
PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "scikit-learn", "torchmetrics", "accelerate")


def write_provenance(
    results_dir: Path | str,
    profile: Stage2,
    dataset: str,
    seed: int,
    data_hash: str | None = None,
    wall_time_s: Mapping[str, float] | None = None,
    peak_memory_mb: Mapping[str, int] | None = None,
) -> Path:
    """Write or complete ``results_dir/provenance.json``; `commits` and `data_hashes` have what each notebook was last run on.

    Args:
        results_dir: results/<dataset>/<profile>/, made when absent.
        profile: the settings with all changes; their name, digest and every field are recorded.
        dataset: name of the dataset.
        seed: the run's seed.
        data_hash: hash of the manifest and its files; None keeps the recorded one.
        wall_time_s: {notebook: seconds}, added to the recorded ones.
        peak_memory_mb: {notebook: resident memory of all its processes}, added likewise.

    Returns:
        Path of the file.
    """
    folder = Path(results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    run = {
        "dataset": dataset,
        "seed": seed,
        "profile": getattr(profile, "name", "released"),
        "profile_digest": digest(profile),
        "profile_fields": json.loads(json.dumps(dataclasses.asdict(profile))),  # tuples become lists, as in the file
    }
    with _lock(path):
        before = read_provenance(folder)
        if any(before.get(key) != value for key, value in run.items()):
            before = {}
        git = git_state()
        data_hash = data_hash if data_hash is not None else before.get("data_hash")
        # a notebook run again later has a commit and data of its own; entries of before have those of before
        earlier = before.get("wall_time_s", {})
        commits = before.get("commits") or dict.fromkeys(earlier, before.get("git", {}).get("commit"))
        hashes = before.get("data_hashes") or dict.fromkeys(earlier, before.get("data_hash"))
        record = run | {
            "data_hash": data_hash,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git,
            "commits": dict(sorted((commits | dict.fromkeys(wall_time_s or {}, git["commit"])).items())),
            "data_hashes": dict(sorted((hashes | dict.fromkeys(wall_time_s or {}, data_hash)).items())),
            "device": device_name(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "packages": {name: metadata.version(name) for name in PACKAGES},
            **{
                name: dict(sorted((before.get(name, {}) | dict(new or {})).items()))
                for name, new in (("wall_time_s", wall_time_s), ("peak_memory_mb", peak_memory_mb))
            },
        }
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def read_provenance(results_dir: Path | str) -> dict:
    """The record of a results folder; empty where there is none, or a broken one, which the next run replaces."""
    try:
        return json.loads((Path(results_dir) / NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def git_state() -> dict[str, str | bool | None]:
    """Commit of the working tree, and whether files other than results differ from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


def device_name() -> str:
    """The GPU that torch sees, else the number of CPU cores. Torch is only imported where a GPU can be."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    # Linux alone says
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return f"CPU, {len(usable)} cores"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lock(path: Path) -> FileLock:
    """The lock of `path`, kept in the cache so that no lock file lies among results."""
    folder = paths.cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    return FileLock(folder / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16] + ".lock"))
