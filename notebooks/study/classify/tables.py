"""From the runs of `classification` to Table 3 and Figs. 6-8: AUROC, AUPRC, their intervals and tests.

Each run gives scores s (n,) for a class against the rest, labels y in {0, 1} and nodule weights w (1 = every nodule
once; in a bootstrap, how often its patient was drawn). With nodules grouped by equal score,

- AUROC = sum_g P_g (N_<g + N_g / 2) / (P N), P_g and N_g the positive and negative weight of group g;
- AUPRC = sum_g (P_g / P) precision(s >= s_g), the average precision, no interpolation.

Both are NaN where a cell holds a single class. A table's value is the mean over runs. Intervals and `p_bootstrap`
resample test patients, the same draw for all runs and arms (paired): they speak of the nodules, Mann-Whitney of the
runs, whose training sets overlap and whose smallest two-sided p at 5 against 5 is .0079.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.classify.jobs import (
    BALANCED,
    CLINICAL,
    FULL,
    IMBALANCED,
    PROPORTIONAL,
    REAL_ONLY,
    REAL_SYNTH,
    SCRATCH,
    ClassifierData,
)
from study.classify.runs import RunResult
from study.measure.statistics import auroc, holm, mann_whitney, patient_weights, percentile_interval, two_sided_p


def auprc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision, same arguments as `auroc`; NaN for a single class, though precision alone would exist."""
    pos, neg = _grouped(labels, scores, weights)
    above_pos, above = (np.cumsum(a[:, ::-1], axis=1)[:, ::-1] for a in (pos, pos + neg))
    with np.errstate(invalid="ignore"):
        precision = np.where(above > 0, above_pos / above, 0.0)
        value = (pos * precision).sum(1) / pos.sum(1)
    return np.where(neg.sum(1) > 0, value, np.nan)


METRICS: dict[str, Callable[..., np.ndarray]] = {"auroc": auroc, "auprc": auprc}


def subtype_table(results: Sequence[RunResult], test: ClassifierData, n_boot: int, seed: int) -> pd.DataFrame:
    """`table3_subtype.csv` (Table 3): mean and SD over runs of each metric, size, subtype and arm, with p-values.

    The two p-values stand on the rows of `Real + Synth`, which are tested against `Real only`: p_mann_whitney as in the
    paper, uncorrected; p_bootstrap two-sided, Holm-corrected over all cells of the table. n_patients counts the test
    patients of the size bin; a cell of a single class has mean NaN.
    """
    weights = patient_weights(test.groups, n_boot, seed)
    rows = []
    for metric in METRICS:
        for size in SIZE_BINS_MM:
            inside = _in_bin(test, size)
            for k, subtype in enumerate(SUBTYPES):
                per_arm = {arm: _per_run(results, arm, test, k, metric, inside) for arm in (REAL_ONLY, REAL_SYNTH)}
                boot = {arm: _bootstrap(results, arm, test, k, metric, inside, weights) for arm in per_arm}
                for arm, values in per_arm.items():
                    row = {"metric": metric, "size_mm": size_name(size), "subtype": subtype, "arm": arm}
                    row |= _mean_sd(values) | {"n_patients": len(set(test.groups[inside].tolist()))}
                    tested = arm == REAL_SYNTH and not np.isnan(row["mean"]) and len(per_arm[REAL_ONLY]) > 0
                    row["p_mann_whitney"] = mann_whitney(per_arm[REAL_ONLY], values) if tested else np.nan
                    row["p_bootstrap"] = two_sided_p(boot[REAL_SYNTH] - boot[REAL_ONLY]) if tested else np.nan
                    rows.append(row)
    table = pd.DataFrame(rows)
    tested = table["p_bootstrap"].notna()
    if tested.any():
        table.loc[tested, "p_bootstrap"] = holm(table.loc[tested, "p_bootstrap"].to_numpy())
    return table


def scarcity_table(
    results: Sequence[RunResult], test: ClassifierData, retention: Sequence[float], n_boot: int, seed: int
) -> pd.DataFrame:
    """`fig7_scarcity.csv` (Fig. 7): subtype, metric, retention, arm, mean, ci_low, ci_high, n_runs.

    Mean over runs, 95 % interval by patient bootstrap. Combinations that cannot be trained (nothing real, nothing
    synthetic) are kept as rows of NaN with n_runs = 0.
    """
    weights = patient_weights(test.groups, n_boot, seed)
    rows = []
    for k, subtype in enumerate(SUBTYPES):
        for metric in METRICS:
            for share in retention:
                cell = [r for r in results if r.retention == share]
                for arm in (CLINICAL, PROPORTIONAL, FULL):
                    row = {"subtype": subtype, "metric": metric, "retention": share, "arm": arm}
                    rows.append(row | _mean_interval(cell, arm, test, k, metric, weights))
    return pd.DataFrame(rows)


def malignancy_table(results: Sequence[RunResult], test: ClassifierData, n_boot: int, seed: int) -> pd.DataFrame:
    """`fig8_malignancy.csv` (Fig. 8): AUROC of each initialisation, mean over runs, interval by patient bootstrap."""
    weights = patient_weights(test.groups, n_boot, seed)
    rows = []
    for arm in (SCRATCH, IMBALANCED, BALANCED):
        row = _mean_interval(results, arm, test, 1, "auroc", weights)
        row = {"arm": arm, "auroc": row.pop("mean")} | row
        rows.append(row | {"n_patients": len(set(test.groups.tolist()))})
    return pd.DataFrame(rows)


def pr_curves(results: Sequence[RunResult], test: ClassifierData, n_points: int = 101) -> pd.DataFrame:
    """Fig. 6: subtype, arm, size_mm, recall, precision, sd, prevalence; precision at a recall, mean and SD over runs.

    Precision at recall r is that of the highest threshold reaching r. Cells of a single class are left out.
    """
    recall = np.linspace(0, 1, n_points)[1:]
    rows = []
    for k, subtype in enumerate(SUBTYPES):
        for arm in (REAL_ONLY, REAL_SYNTH):
            for size in SIZE_BINS_MM:
                inside = _in_bin(test, size)
                labels = test.labels[inside] == k
                curves = [_precision_at(labels, r.probabilities[inside, k], recall) for r in results if r.arm == arm]
                if curves and labels.any() and not labels.all():
                    cell = {"subtype": subtype, "arm": arm, "size_mm": size_name(size), "recall": recall}
                    cell |= {"precision": np.mean(curves, 0), "sd": np.std(curves, 0), "prevalence": labels.mean()}
                    rows.append(pd.DataFrame(cell))
    columns = ["subtype", "arm", "size_mm", "recall", "precision", "sd", "prevalence"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def roc_curves(results: Sequence[RunResult], test: ClassifierData, n_points: int = 101) -> pd.DataFrame:
    """Fig. 8: arm, fpr, tpr, sd; true-positive rate at a false-positive rate, mean and SD over runs.

    Test nodules of a single class have no curve.
    """
    labels = test.labels == 1
    if labels.all() or not labels.any():
        results = []
    fpr = np.linspace(0, 1, n_points)
    rows = []
    for arm in (SCRATCH, IMBALANCED, BALANCED):
        curves = [_tpr_at(labels, r.probabilities[:, 1], fpr) for r in results if r.arm == arm]
        if curves:
            rows.append(pd.DataFrame({"arm": arm, "fpr": fpr, "tpr": np.mean(curves, 0), "sd": np.std(curves, 0)}))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["arm", "fpr", "tpr", "sd"])


def size_name(size: tuple[float, float]) -> str:
    """`6-10`, as in column size_mm."""
    return f"{size[0]:g}-{size[1]:g}"


def _in_bin(test: ClassifierData, size: tuple[float, float]) -> np.ndarray:
    """Diameters in [low, high); the last bin also takes its upper end."""
    d = test.diameters
    return (d >= size[0]) & ((d < size[1]) | ((size == SIZE_BINS_MM[-1]) & (d == size[1])))


def _grouped(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative weight (B, G) of each of the G distinct scores, ascending."""
    labels = np.asarray(labels, bool)
    weights = np.ones((1, len(labels))) if weights is None else np.atleast_2d(weights)
    if len(labels) == 0:
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(np.asarray(scores)[order]) > 0])
    ordered, w = labels[order], weights[:, order]
    return np.add.reduceat(w * ordered, starts, axis=1), np.add.reduceat(w * ~ordered, starts, axis=1)


def _per_run(
    results: Sequence[RunResult], arm: str, test: ClassifierData, k: int, metric: str, inside: np.ndarray
) -> np.ndarray:
    """The metric of class k against the rest, one value a run."""
    labels = test.labels[inside] == k
    return np.array([METRICS[metric](labels, r.probabilities[inside, k])[0] for r in results if r.arm == arm])


def _bootstrap(
    results: Sequence[RunResult],
    arm: str,
    test: ClassifierData,
    k: int,
    metric: str,
    inside: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """(B,) mean over runs of the metric in each resample; NaN where the resample holds a single class."""
    labels, w = test.labels[inside] == k, weights[:, inside]
    runs = [METRICS[metric](labels, r.probabilities[inside, k], w) for r in results if r.arm == arm]
    return np.mean(runs, axis=0) if runs else np.full(len(weights), np.nan)


def _mean_sd(values: np.ndarray) -> dict[str, float]:
    valid = values[~np.isnan(values)]
    sd = float(valid.std(ddof=1)) if len(valid) > 1 else np.nan
    return {"mean": float(valid.mean()) if len(valid) else np.nan, "sd": sd, "n_runs": len(values)}


def _mean_interval(
    results: Sequence[RunResult], arm: str, test: ClassifierData, k: int, metric: str, weights: np.ndarray
) -> dict[str, float]:
    everyone = np.ones(len(test), bool)
    values = _per_run(results, arm, test, k, metric, everyone)
    boot = _bootstrap(results, arm, test, k, metric, everyone, weights)
    low, high = percentile_interval(boot)
    return {"mean": _mean_sd(values)["mean"], "ci_low": low, "ci_high": high, "n_runs": len(values)}


def _precision_at(labels: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> np.ndarray:
    pos, neg = (a[0, ::-1] for a in _grouped(labels, scores, None))
    tp, fp = np.cumsum(pos), np.cumsum(neg)
    first = np.searchsorted(tp, recall * max(tp[-1], 1) - 1e-9)
    return (tp / np.maximum(tp + fp, 1))[np.minimum(first, len(tp) - 1)]


def _tpr_at(labels: np.ndarray, scores: np.ndarray, fpr: np.ndarray) -> np.ndarray:
    pos, neg = (np.r_[0, np.cumsum(a[0, ::-1])] for a in _grouped(labels, scores, None))
    return np.interp(fpr, neg / neg[-1], pos / pos[-1])
