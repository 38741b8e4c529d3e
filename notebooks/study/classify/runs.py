"""Downstream classifiers of Sections 6.3-6.5, run as cached, resumable jobs.

`run_jobs` trains the jobs (`jobs`) that are not yet in the cache and predicts the fixed test set with each; `tables` makes
Table 3 and Figs. 6-8 of the results. A run's file is named after all that decides its weights, so a run that two figures
share is trained once, and any change makes a new one.
"""

from __future__ import annotations

import contextlib
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

from hrldm.cache import keyed
from hrldm.train import checkpoint as ckpt
from study.classify.jobs import ClassifierData, Job, Stream
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
    n_jobs: int | None = None,
    device: str = "cpu",
) -> list[RunResult]:
    """Results of all jobs in their order; those in the cache are read, the others trained, equal ones once.

    Every run on a CPU uses one thread, so results do not depend on `n_jobs` (default: all cores; one on a GPU). Killed
    at any moment, the next call goes on where the last finished epoch was.

    Raises:
        ValueError: a test patient also trains, validates or gave a synthetic nodule its shape; a synthetic test nodule.
    """
    _check_disjoint(real, synthetic, test)
    known = [None if d is None else d.digest() for d in (real, synthetic, test)]
    files = [run_file(job, *known, profile, seed, device) for job in jobs]
    todo = {file: job for file, job in zip(files, jobs, strict=True) if not file.exists()}
    n_jobs = n_jobs or (1 if device != "cpu" else os.cpu_count() or 1)
    workers = max(1, min(n_jobs, len(todo)))
    with parallel_config("loky", inner_max_num_threads=1) if workers > 1 else contextlib.nullcontext():
        tasks = (
            delayed(_run)(file, job, _sets(job, real, synthetic), test.crops, profile, seed, device)
            for file, job in todo.items()
        )
        runs = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch=workers)(tasks)
        seconds = dict(tqdm(runs, total=len(todo), desc="classifiers", disable=not todo, mininterval=5))
    return [_result(job, file, seconds.get(file, 0.0)) for job, file in zip(jobs, files, strict=True)]


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


def run_file(job: Job, real: str, synthetic: str | None, test: str, profile: Profile, seed: int, device: str) -> Path:
    """A run's place in the cache, by all that decides its weights and nothing else, so that equal runs of two figures are one.

    real, synthetic, test: `ClassifierData.digest`
    """
    data = (real, synthetic if len(job.synthetic) else None, test, job.real, job.synthetic, job.validation)
    how = (job.fold, job.n_classes, job.steps, job.init and job.init.stem, seed, device)
    return keyed("classifiers", VERSION, profile.classifier, *data, *how, suffix=".safetensors")


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
    file: Path, job: Job, sets: Sequence[np.ndarray], test: np.ndarray, profile: Profile, seed: int, device: str
) -> tuple[Path, float]:
    """Train one job and write its file, last of all; returns the file and the seconds it took."""
    start = time.perf_counter()
    init = ckpt.load(job.init)[0]["model"] if job.init else None
    half_done = file.with_suffix(".epoch")
    # arms of one fold share it: they differ in their data only
    own_seed = int(np.random.SeedSequence((seed, job.fold, Stream.TRAINING)).generate_state(1)[0])
    with _one_thread(device):
        epochs = train_classifier(
            *sets, profile.classifier, n_classes=job.n_classes, seed=own_seed, steps_per_epoch=job.steps, init=init,
            device=device, checkpoint=half_done,
        )  # fmt: skip
        last = deque(epochs, maxlen=1)[0]
        model = build_classifier(profile.classifier.arch, job.n_classes, 0).to(device)
        model.load_state_dict(last.best)
        probabilities = torch.from_numpy(predict_proba(model, test))
    spent = time.perf_counter() - start
    meta = {"history": last.history, "seconds": round(spent, 1)}
    ckpt.save(file, {"model": last.best, "test": {"probabilities": probabilities}}, meta)
    half_done.unlink(missing_ok=True)
    return file, spent


def _result(job: Job, file: Path, seconds: float) -> RunResult:
    groups, meta = ckpt.load(file)
    history = meta["history"]
    return RunResult(
        arm=job.arm, fold=job.fold, retention=job.retention, probabilities=groups["test"]["probabilities"].numpy(),
        best_epoch=best_epoch(history), epochs=len(history), n_real=len(job.real), n_synthetic=len(job.synthetic),
        n_synthetic_unique=len(np.unique(job.synthetic)), weights=file, seconds=seconds, history=history,
    )  # fmt: skip
