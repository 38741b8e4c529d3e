"""Downstream classifiers of Sections 6.3-6.5, run as cached, resumable jobs.

`run_jobs` trains the jobs (`classification_jobs`) that are not yet in the cache and predicts the fixed test set with
each; `classification_tables` makes Table 3 and Figs. 6-8 of the results. A run's file is named after all that decides
its weights, so a run that two figures share is trained once, and any change makes a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from hrldm.config import digest
from hrldm.train import checkpoint as ckpt
from study.classify.jobs import ClassifierData, Job
from study.classify.train import VERSION, best_epoch, build_classifier, predict_proba, train_classifier
from study.profiles import Profile


@dataclass(frozen=True)
class RunResult:
    """One finished run and its class probabilities on the fixed test set."""

    arm: str
    fold: int
    retention: float
    probabilities: np.ndarray  # (n_test, K) float64
    best_epoch: int
    epochs: int
    n_real: int
    n_synthetic: int
    n_synthetic_unique: int
    weights: Path  # checkpoint with group "model"
    seconds: float  # of training, 0 when it came from the cache
    history: list[dict[str, float]]


def run_jobs(
    jobs: Sequence[Job],
    real: ClassifierData,
    synthetic: ClassifierData | None,
    test: ClassifierData,
    profile: Profile,
    seed: int,
    cache: Path,
    n_jobs: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> list[RunResult]:
    """Results of all jobs in their order; those in `cache` are read, the others trained, equal ones once.

    Every run on a CPU uses one thread, so results do not depend on `n_jobs` (default: all cores; one on a GPU). Killed
    at any moment, the next call goes on where the last finished epoch was.

    Raises:
        ValueError: a test patient also trains, validates or gave a synthetic nodule its shape; a synthetic test nodule.
    """
    _check_disjoint(real, synthetic, test)
    cache.mkdir(parents=True, exist_ok=True)
    stamp = [d.digest() if d is not None else "" for d in (real, synthetic, test)]
    keys = [_key(job, stamp, profile, seed, device) for job in jobs]
    todo = {key: job for key, job in zip(keys, jobs, strict=True) if not _file(cache, key).exists()}
    seconds = dict.fromkeys(keys, 0.0)
    n_jobs = n_jobs or (1 if device != "cpu" else os.cpu_count() or 1)
    workers = max(1, min(n_jobs, len(todo)))
    with parallel_config("loky", inner_max_num_threads=1) if workers > 1 else contextlib.nullcontext():
        tasks = (
            delayed(_run)(key, job, _sets(job, real, synthetic), test.crops, profile, seed, cache, device)
            for key, job in todo.items()
        )
        runs = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch=workers)(tasks)
        quiet = not (progress and todo)
        for key, spent in tqdm(runs, total=len(todo), desc="classifiers", disable=quiet, mininterval=5):
            seconds[key] = spent
    return [_result(job, _file(cache, key), seconds[key]) for job, key in zip(jobs, keys, strict=True)]


def _check_disjoint(real: ClassifierData, synthetic: ClassifierData | None, test: ClassifierData) -> None:
    if test.is_synthetic.any() or real.is_synthetic.any():
        raise ValueError("synthetic nodules may only train: give them as `synthetic`, not as real or test data")
    for name, data in (("real", real), ("synthetic", synthetic)):
        shared = set() if data is None else set(data.groups.tolist()) & set(test.groups.tolist())
        if shared:
            raise ValueError(f"{len(shared)} test patient(s) are in the {name} training data: {sorted(shared)[:3]}")


def _sets(job: Job, real: ClassifierData, synthetic: ClassifierData | None) -> tuple[np.ndarray, ...]:
    """Training crops and labels, validation crops and labels."""
    crops, labels = real.crops[job.real], real.labels[job.real]
    if len(job.synthetic):
        crops = np.concatenate([crops, synthetic.crops[job.synthetic].astype(crops.dtype)])
        labels = np.concatenate([labels, synthetic.labels[job.synthetic]])
    return crops, labels, real.crops[job.validation], real.labels[job.validation]


def _key(job: Job, stamp: Sequence[str], profile: Profile, seed: int, device: str) -> str:
    """Name of a run: all that decides its weights and nothing else, so that equal runs of two figures are one."""
    indices = [np.asarray(a).tolist() for a in (job.real, job.synthetic, job.validation)]
    synthetic_stamp = stamp[1] if len(job.synthetic) else ""
    said = [
        VERSION,
        digest(profile.classifier),
        indices,
        stamp[0],
        synthetic_stamp,
        stamp[2],
        job.fold,
        job.n_classes,
        job.steps,
        seed,
        device,
    ]
    said.append(job.init.stem if job.init else "")
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:20]


def _file(cache: Path, key: str) -> Path:
    return cache / f"{key}.safetensors"


@contextlib.contextmanager
def _one_thread(device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    key: str,
    job: Job,
    sets: Sequence[np.ndarray],
    test: np.ndarray,
    profile: Profile,
    seed: int,
    cache: Path,
    device: str,
) -> tuple[str, float]:
    """Train one job and write its file, last of all; returns the key and the seconds it took."""
    start = time.perf_counter()
    init = ckpt.load(job.init)[0]["model"] if job.init else None
    half_done = cache / f"{key}.epoch"
    with _one_thread(device):
        epochs = train_classifier(
            *sets, arch=profile.classifier.arch, n_classes=job.n_classes, epochs=profile.classifier.epochs, batch=profile.classifier.batch,
            lr=profile.classifier.lr, patience=profile.classifier.patience, seed=_run_seed(seed, job.fold), steps_per_epoch=job.steps,
            init=init, device=device, checkpoint=half_done,
        )  # fmt: skip
        last = deque(epochs, maxlen=1)[0]
        model = build_classifier(profile.classifier.arch, job.n_classes, 0).to(device)
        model.load_state_dict(last.best)
        probabilities = torch.from_numpy(predict_proba(model, test))
    spent = time.perf_counter() - start
    meta = {"history": last.history, "seconds": round(spent, 1)}
    ckpt.save(_file(cache, key), {"model": last.best, "test": {"probabilities": probabilities}}, meta)
    half_done.unlink(missing_ok=True)
    return key, spent


def _run_seed(seed: int, fold: int) -> int:
    """Arms of one fold share it: they differ in their data only."""
    return int(np.random.SeedSequence((seed, fold, 5)).generate_state(1)[0])


def _result(job: Job, file: Path, seconds: float) -> RunResult:
    groups, meta = ckpt.load(file)
    history = meta["history"]
    return RunResult(
        arm=job.arm, fold=job.fold, retention=job.retention, probabilities=groups["test"]["probabilities"].numpy(),
        best_epoch=best_epoch(history), epochs=len(history), n_real=len(job.real), n_synthetic=len(job.synthetic),
        n_synthetic_unique=len(np.unique(job.synthetic)), weights=file, seconds=seconds, history=history,
    )  # fmt: skip
