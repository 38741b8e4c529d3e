"""From the `runs` to Table 3 and Figs. 6-8: AUROC, AUPRC, their intervals and tests.

Each run gives scores s (n,) for a class against the rest, labels y in {0, 1} and nodule weights w (1 = every nodule
once; in a bootstrap, how often its patient was drawn). With nodules grouped by equal score,

- AUROC = sum_g P_g (N_<g + N_g / 2) / (P N), P_g and N_g the positive and negative weight of group g;
- AUPRC = sum_g (P_g / P) precision(s >= s_g), the average precision, no interpolation.

Both are NaN where a cell holds a single class. A table's value is the mean over runs. Intervals resample test patients, the
same draw for all runs and arms: they speak of the nodules. Mann-Whitney speaks of the runs, whose training sets overlap and
whose smallest two-sided p at 5 against 5 is .0079; `p_bootstrap` of both (`roc.paired_runs`).
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.classify.jobs import BESIDE, FIG7, FIG8, REAL_ONLY, REAL_SYNTH, RULES, ClassifierData
from study.classify.runs import RunResult
from study.measure.roc import paired_runs
from study.measure.statistics import (
    N_BOOT,
    auroc,
    holm,
    mann_whitney,
    patient_weights,
    percentile_interval,
)


def auprc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision, same arguments as `auroc`; NaN for a single class, though precision alone would exist."""
    labels = np.asarray(labels, bool)
    weights = np.ones((1, len(labels))) if weights is None else np.atleast_2d(weights)
    if len(labels) == 0:
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(np.asarray(scores)[order]) > 0])  # of nodules with equal scores
    labels, weights = labels[order], weights[:, order]
    pos, neg = (np.add.reduceat(weights * chosen, starts, axis=1) for chosen in (labels, ~labels))
    above_pos, above = (np.cumsum(a[:, ::-1], axis=1)[:, ::-1] for a in (pos, pos + neg))
    with np.errstate(invalid="ignore"):
        precision = np.where(above > 0, above_pos / above, 0.0)
        value = (pos * precision).sum(1) / pos.sum(1)
    return np.where(neg.sum(1) > 0, value, np.nan)


METRICS: dict[str, Callable[..., np.ndarray]] = {"auroc": auroc, "auprc": auprc}
GRID = np.linspace(0, 1, 101)  # of the curves


def subtype_table(results: Sequence[RunResult], test: ClassifierData, seed: int, n_boot: int = N_BOOT) -> pd.DataFrame:
    """`table3_subtype.csv` (Table 3): mean and SD over runs of each metric, size, subtype and arm, with p-values.

    Every arm but the rules is tested against `Real only` in the same folds: p_mann_whitney as in the paper, uncorrected; p_bootstrap
    by patients and runs, two-sided, Holm-corrected over all cells of the arm. n_patients counts the test patients of the size bin, n_positive the
    nodules of the cell; a cell of a single class has mean NaN.
    """
    folds = {a: frozenset(r.fold for r in results if r.arm == a) for a in (REAL_ONLY, REAL_SYNTH, *BESIDE, *RULES)}
    folds = {arm: own for arm, own in folds.items() if own or arm in (REAL_ONLY, REAL_SYNTH)}
    rows = []
    for metric in METRICS:
        for size in SIZE_BINS_MM:
            inside = in_bin(test, size)
            groups = test.groups[inside]
            for k, subtype in enumerate(SUBTYPES):
                labels = test.labels[inside] == k
                for arm, own in folds.items():
                    base, runs = (_scores(results, a, own, inside, k) for a in (REAL_ONLY, arm))
                    first, values = (np.array([METRICS[metric](labels, run)[0] for run in x]) for x in (base, runs))
                    row = {"metric": metric, "size_mm": size_name(size), "subtype": subtype, "arm": arm}
                    valid = values[~np.isnan(values)]
                    row |= {"mean": _mean(values), "sd": float(valid.std(ddof=1)) if len(valid) > 1 else np.nan}
                    row |= {"n_runs": len(values), "n_patients": len(set(groups.tolist()))}
                    row["n_positive"] = int(labels.sum())
                    tested = arm not in (REAL_ONLY, *RULES) and len(valid) > 0 and len(first) > 0
                    row["p_mann_whitney"] = mann_whitney(first, values) if tested else np.nan
                    paired = (METRICS[metric], labels, base, runs, groups, n_boot, seed)
                    row["p_bootstrap"] = paired_runs(*paired).p if tested else np.nan
                    rows.append(row)
    table = pd.DataFrame(rows)
    for _, family in table[table.p_bootstrap.notna()].groupby("arm"):
        table.loc[family.index, "p_bootstrap"] = holm(family.p_bootstrap.to_numpy())
    return table


def scarcity_table(
    results: Sequence[RunResult],
    test: ClassifierData,
    retention: Sequence[float],
    seed: int,
    n_boot: int = N_BOOT,
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
                for arm in FIG7:
                    row = {"subtype": subtype, "metric": metric, "retention": share, "arm": arm}
                    rows.append(row | _mean_interval(cell, arm, test, k, metric, weights))
    return pd.DataFrame(rows)


def malignancy_table(
    results: Sequence[RunResult], test: ClassifierData, seed: int, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """`fig8_malignancy.csv` (Fig. 8): AUROC of each initialisation, mean over runs, interval by patient bootstrap."""
    weights = patient_weights(test.groups, n_boot, seed)
    rows = []
    for arm in FIG8:
        row = _mean_interval(results, arm, test, 1, "auroc", weights)
        rows.append({"arm": arm} | row | {"n_patients": len(set(test.groups.tolist()))})
    return pd.DataFrame(rows).rename(columns={"mean": "auroc"})


def pr_curves(results: Sequence[RunResult], test: ClassifierData) -> pd.DataFrame:
    """Fig. 6: subtype, arm, size_mm, recall, precision, sd, prevalence; precision at a recall, mean and SD over runs.

    Precision at recall r is that of the highest threshold reaching r. Cells of a single class are left out.
    """
    recall, rows = GRID[1:], []
    for k, subtype in enumerate(SUBTYPES):
        for arm in (REAL_ONLY, REAL_SYNTH):
            for size in SIZE_BINS_MM:
                inside = in_bin(test, size)
                labels = test.labels[inside] == k
                chosen = [r for r in results if r.arm == arm]
                if chosen and labels.any() and not labels.all():
                    curves = [_precision_at(labels, r.probabilities[inside, k], recall) for r in chosen]
                    cell = {"subtype": subtype, "arm": arm, "size_mm": size_name(size), "recall": recall}
                    cell |= {"precision": np.mean(curves, 0), "sd": np.std(curves, 0), "prevalence": labels.mean()}
                    rows.append(pd.DataFrame(cell))
    columns = ["subtype", "arm", "size_mm", "recall", "precision", "sd", "prevalence"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def roc_curves(results: Sequence[RunResult], test: ClassifierData) -> pd.DataFrame:
    """Fig. 8: arm, fpr, tpr, sd; true-positive rate at a false-positive rate, mean and SD over runs.

    Test nodules of a single class have no curve.
    """
    labels = test.labels == 1
    if labels.all() or not labels.any():
        results = []
    rows = []
    for arm in FIG8:
        runs = [roc_curve(labels, r.probabilities[:, 1], drop_intermediate=False) for r in results if r.arm == arm]
        curves = [np.interp(GRID, fpr, tpr) for fpr, tpr, _ in runs]
        if curves:
            rows.append(pd.DataFrame({"arm": arm, "fpr": GRID, "tpr": np.mean(curves, 0), "sd": np.std(curves, 0)}))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["arm", "fpr", "tpr", "sd"])


def size_name(size: tuple[float, float]) -> str:
    """`6-10`, as in column size_mm."""
    return f"{size[0]:g}-{size[1]:g}"


def in_bin(test: ClassifierData, size: tuple[float, float]) -> np.ndarray:
    """Diameters in [low, high); the last bin also takes its upper end. Those outside all bins are in none."""
    d = test.diameters
    return (d >= size[0]) & ((d < size[1]) | ((size == SIZE_BINS_MM[-1]) & (d == size[1])))


def _scores(results: Sequence[RunResult], arm: str, folds: Collection[int], inside: np.ndarray, k: int) -> np.ndarray:
    """Scores (R, n) of class k for the nodules `inside`, by fold."""
    runs = sorted((r for r in results if r.arm == arm and r.fold in folds), key=lambda r: r.fold)
    return np.array([r.probabilities[inside, k] for r in runs]).reshape(len(runs), int(inside.sum()))


def _measured(
    results: Sequence[RunResult],
    arm: str,
    test: ClassifierData,
    k: int,
    metric: str,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The metric of class k against the rest: one value a run, and (B,) its mean over runs in each resample.

    NaN where a resample holds a single class, or there is no run.
    """
    runs = [(test.labels == k, r.probabilities[:, k]) for r in results if r.arm == arm]
    values = np.array([METRICS[metric](*run)[0] for run in runs])
    draws = [METRICS[metric](*run, weights) for run in runs]
    return values, np.mean(draws, axis=0) if draws else np.full(len(weights), np.nan)


def _mean_interval(
    results: Sequence[RunResult], arm: str, test: ClassifierData, k: int, metric: str, weights: np.ndarray
) -> dict[str, float]:
    values, draws = _measured(results, arm, test, k, metric, weights)
    low, high = percentile_interval(draws)
    return {"mean": _mean(values), "ci_low": low, "ci_high": high, "n_runs": len(values)}


def _mean(values: np.ndarray) -> float:
    """Of what could be computed; NaN if nothing could."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else np.nan


def _precision_at(labels: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> np.ndarray:
    precision, reached, _ = precision_recall_curve(labels, scores)
    return precision[::-1][np.searchsorted(reached[::-1], recall - 1e-9)]
