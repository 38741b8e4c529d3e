"""How much one arm exceeds another, with runs and test patients resampled together: what the verdicts on Table 3 and Figs. 7
and 8 rest on. Arms are compared in the folds that both have."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.classify.jobs import (
    BALANCED,
    CLINICAL,
    FULL,
    IMBALANCED,
    PROPORTIONAL,
    REAL_SYNTH,
    RULES,
    SCRATCH,
    ClassifierData,
)
from study.classify.runs import RunResult
from study.classify.tables import METRICS, in_bin, size_name
from study.measure.roc import paired_runs
from study.measure.statistics import N_BOOT

Arm = tuple[str, float]  # arm, retention
# n_patients_rarer: of the class that fewer patients have, of both that are told apart
COLUMNS = "level_a level_b difference ci_low ci_high p n_runs n_patients n_patients_rarer".split()


def subtype_differences(
    results: Sequence[RunResult], test: ClassifierData, seed: int, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """`table3_differences.csv`: metric, size_mm, subtype, a, b, then both levels and b minus a (`COLUMNS`), of `Real + Synth`
    against every arm that trains a network."""
    arms = [arm for arm in dict.fromkeys(r.arm for r in results) if arm not in (*RULES, REAL_SYNTH)]
    rows = []
    for metric, size, (k, subtype), arm in product(METRICS, SIZE_BINS_MM, enumerate(SUBTYPES), arms):
        key = {"metric": metric, "size_mm": size_name(size), "subtype": subtype, "a": arm, "b": REAL_SYNTH}
        pair = {"a": (arm, 1.0), "b": (REAL_SYNTH, 1.0)}
        rows.append(key | _difference(results, test, pair, k, metric, in_bin(test, size), seed, n_boot))
    return pd.DataFrame(rows)


def scarcity_differences(
    results: Sequence[RunResult], test: ClassifierData, seed: int, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """`fig7_differences.csv`: subtype, metric, a, retention_a, b, retention_b, then both levels and b minus a (`COLUMNS`).

    Each arm at each retention against all clinical data, against its own value there, and against clinical data alone.
    """
    rows = []
    for (a, share_a), (b, share_b) in _scarcity_pairs({(r.arm, r.retention) for r in results}):
        for k, subtype in enumerate(SUBTYPES):
            for metric in METRICS:
                key = {
                    "subtype": subtype,
                    "metric": metric,
                    "a": a,
                    "retention_a": share_a,
                    "b": b,
                    "retention_b": share_b,
                }
                pair = {"a": (a, share_a), "b": (b, share_b)}
                rows.append(key | _difference(results, test, pair, k, metric, np.ones(len(test), bool), seed, n_boot))
    return pd.DataFrame(rows)


def malignancy_differences(
    results: Sequence[RunResult], test: ClassifierData, seed: int, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """`fig8_differences.csv`: a, b, then both AUROC and b's minus a's (`COLUMNS`), of the three initialisations."""
    rows = []
    for a, b in ((SCRATCH, IMBALANCED), (IMBALANCED, BALANCED), (SCRATCH, BALANCED)):
        pair = {"a": (a, 1.0), "b": (b, 1.0)}
        rows.append(
            {"a": a, "b": b} | _difference(results, test, pair, 1, "auroc", np.ones(len(test), bool), seed, n_boot)
        )
    return pd.DataFrame(rows)


def _scarcity_pairs(known: set[Arm]) -> Iterator[tuple[Arm, Arm]]:
    arms = sorted((arm for arm in known if arm[0] in (CLINICAL, PROPORTIONAL, FULL)), key=lambda x: (x[0], -x[1]))
    for arm, share in arms:
        for reference in dict.fromkeys([(CLINICAL, 1.0), (arm, 1.0), (CLINICAL, share)]):
            if reference in known and reference != (arm, share):
                yield reference, (arm, share)


def _difference(
    results: Sequence[RunResult],
    test: ClassifierData,
    pair: Mapping[str, Arm],
    k: int,
    metric: str,
    inside: np.ndarray,
    seed: int,
    n_boot: int,
) -> dict:
    """NaN where the nodules `inside` are of one class, or no fold has both arms."""
    scores = {
        side: {r.fold: r.probabilities[inside, k] for r in results if (r.arm, r.retention) == arm}
        for side, arm in pair.items()
    }
    folds = sorted(set(scores["a"]) & set(scores["b"]))
    labels, groups = test.labels[inside] == k, test.groups[inside]
    rarer = min(len(set(groups[own].tolist())) for own in (labels, ~labels))
    counts = (len(folds), len(set(groups.tolist())), rarer)
    if not folds or labels.all() or not labels.any():
        return dict(zip(COLUMNS, (*[np.nan] * 6, *counts), strict=True))
    first, second = (np.stack([scores[side][fold] for fold in folds]) for side in ("a", "b"))
    e = paired_runs(METRICS[metric], labels, first, second, groups, n_boot, seed)
    levels = (float(np.mean([METRICS[metric](labels, run)[0] for run in side])) for side in (first, second))
    return dict(zip(COLUMNS, (*levels, e.value, e.ci_low, e.ci_high, e.p, *counts), strict=True))
