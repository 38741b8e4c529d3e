"""Downstream classifiers of Sections 6.3-6.5, run as cached, resumable jobs.

`run_jobs` trains the jobs (`jobs`) that are not yet in the cache and predicts the fixed test set with each; `tables` makes
Table 3 and Figs. 6-8 of the results. A run's file is named after all that decides its weights, so a run that two figures
share is trained once, and any change makes a new one.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hrldm.cache import keyed
from hrldm.train import checkpoint as ckpt
from study.classify.jobs import ARMS, ClassifierData, Job, Recipe, Stream
from study.classify.train import VERSION, best_epoch, build_classifier, predict_proba, train_classifier
from study.profiles import Profile


@dataclass(frozen=True)
class RunResult:
    """One finished run and its class probabilities on the fixed test set.

    Raises:
        ValueError: it was not trained as its arm says.
    """

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
    recipe: Recipe  # as found when it was trained

    def __post_init__(self) -> None:
        said = ARMS[self.arm] if self.n_synthetic else replace(ARMS[self.arm], system="")
        if self.recipe != said:
            raise ValueError(
                f"the run {self.weights.stem} of arm {self.arm!r} was trained by {self.recipe}, not by {said}"
            )


def run_jobs(
    jobs: Sequence[Job],
    real: ClassifierData,
    synthetic: Mapping[str, ClassifierData],
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
        ValueError: a test nodule's patient, shape or scan also trains, validates or gave a synthetic nodule its shape or place;
            a synthetic test nodule; a run that was not trained as its arm says.
    """
    _check_disjoint(real, synthetic, test)
    rules = {i: _rule(job, real, test) for i, job in enumerate(jobs) if ARMS[job.arm].rule}
    known = real.digest(), {name: data.digest() for name, data in synthetic.items()}, test.digest()
    files = {i: run_file(job, *known, profile, seed, device) for i, job in enumerate(jobs) if i not in rules}
    todo = {file: jobs[i] for i, file in files.items() if not file.exists()}
    n_jobs = n_jobs or (1 if device != "cpu" else os.cpu_count() or 1)
    workers = max(1, min(n_jobs, len(todo)))
    with parallel_config("loky", inner_max_num_threads=1) if workers > 1 else contextlib.nullcontext():
        tasks = (
            delayed(_run)(file, job, *_sets(job, real, synthetic), test.crops, profile, seed, device)
            for file, job in todo.items()
        )
        runs = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch=workers)(tasks)
        seconds = dict(tqdm(runs, total=len(todo), desc="classifiers", disable=not todo, mininterval=5))
    return [
        rules[i] if i in rules else _result(job, files[i], seconds.get(files[i], 0.0)) for i, job in enumerate(jobs)
    ]


def _check_disjoint(real: ClassifierData, synthetic: Mapping[str, ClassifierData], test: ClassifierData) -> None:
    if (test.source != "").any() or (real.source != "").any():
        raise ValueError("synthetic nodules may only train: give them as `synthetic`, not as real or test data")
    for name, data in {"real": real, **synthetic}.items():
        for what, column in (("patient(s)", "groups"), ("scan(s)", "places")):
            shared = set(getattr(data, column).tolist()) & set(getattr(test, column).tolist())
            if shared:
                raise ValueError(f"{len(shared)} test {what} are in the {name} training data: {sorted(shared)[:3]}")


def _sets(
    job: Job, real: ClassifierData, synthetic: Mapping[str, ClassifierData]
) -> tuple[Sequence[np.ndarray], Recipe]:
    """Training crops and labels, validation crops and labels; and the recipe that these follow."""
    arm = ARMS[job.arm]
    crops, labels, sources = real.crops[job.real], real.labels[job.real], []
    if len(job.synthetic):
        made = synthetic[arm.system].take(job.synthetic)
        crops, labels = np.concatenate([crops, made.crops.astype(crops.dtype)]), np.concatenate([labels, made.labels])
        sources = np.unique(made.source).tolist()
    repeated = len(np.unique(job.real)) < len(job.real)
    found = replace(arm, system="+".join(sources), oversampled=repeated, start="")
    return (crops, labels, real.crops[job.validation], real.labels[job.validation]), found


def _rule(job: Job, real: ClassifierData, test: ClassifierData) -> RunResult:
    """Logistic regression on the one column that the arm names, fitted in a moment and not kept."""
    x, seen = (getattr(data, ARMS[job.arm].rule)[:, None] for data in (real, test))
    labels = real.labels[job.real]
    probabilities = np.zeros((len(test), job.n_classes))
    if len(known := np.unique(labels)) > 1:
        fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[job.real], labels)
        probabilities[:, known] = fitted.predict_proba(seen)
    counts = {"best_epoch": 0, "epochs": 0, "n_real": len(labels), "n_synthetic": 0, "n_synthetic_unique": 0}
    made = {"weights": Path(), "seconds": 0.0, "history": [], "recipe": ARMS[job.arm]}
    return RunResult(job.arm, job.fold, job.retention, probabilities, **counts, **made)


def run_file(
    job: Job, real: str, synthetic: Mapping[str, str], test: str, profile: Profile, seed: int, device: str
) -> Path:
    """A run's place in the cache, by all that decides its weights and nothing else, so that equal runs of two figures are one.

    real, synthetic, test: `ClassifierData.digest`, of each system's nodules
    """
    arm = ARMS[job.arm]
    made = synthetic[arm.system] if len(job.synthetic) else None
    data = (real, made, test, job.real, job.synthetic, job.validation)
    how = (job.fold, job.n_classes, job.steps, job.init and job.init.stem, arm.class_weights, arm.strong, seed, device)
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
    file: Path,
    job: Job,
    sets: Sequence[np.ndarray],
    recipe: Recipe,
    test: np.ndarray,
    profile: Profile,
    seed: int,
    device: str,
) -> tuple[Path, float]:
    """Train one job and write its file, last of all; returns the file and the seconds it took."""
    start = time.perf_counter()
    init = None
    if job.init:
        groups, meta = ckpt.load(job.init)
        init = groups["model"]
        # an arm without synthetic nodules cannot be told from one that needed none
        lender = next((arm for arm, r in ARMS.items() if asdict(r) == meta["recipe"]), "")
        recipe = replace(recipe, start=lender)
    half_done = file.with_suffix(".epoch")
    # arms of one fold share it: they differ in their data only
    own_seed = int(np.random.SeedSequence((seed, job.fold, Stream.TRAINING)).generate_state(1)[0])
    with _one_thread(device):
        epochs = train_classifier(
            *sets, profile.classifier, n_classes=job.n_classes, seed=own_seed, steps_per_epoch=job.steps, init=init,
            device=device, checkpoint=half_done, class_weights=recipe.class_weights, strong=recipe.strong,
        )  # fmt: skip
        last = deque(epochs, maxlen=1)[0]
        model = build_classifier(profile.classifier.arch, job.n_classes, 0).to(device)
        model.load_state_dict(last.best)
        probabilities = torch.from_numpy(predict_proba(model, test))
    spent = time.perf_counter() - start
    meta = {"history": last.history, "seconds": round(spent, 1), "recipe": asdict(recipe)}
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
        recipe=Recipe(**meta["recipe"]),
    )  # fmt: skip
