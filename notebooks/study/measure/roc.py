"""Two classifiers on the same test nodules: DeLong's test of one run each, and a bootstrap of patients and runs of several."""

from collections.abc import Callable
from math import sqrt

import numpy as np
from scipy import stats

from study.measure.statistics import LEVEL, N_BOOT, Estimate, patient_weights, percentile_interval, two_sided_p


def delong(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate:
    """AUROC of scores `second` minus that of `first`, both (n,) of the same nodules, with DeLong's interval and p.

    DeLong et al., Biometrics 44 (1988) 837, by midranks (Sun and Xu, 2014): an AUROC is the mean of its placement values,
    over the positives and over the negatives; nodules count as independent.

    Raises:
        ValueError: fewer than two nodules of a class.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.stack([first, second]).astype(float)
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    if min(n_pos, n_neg) < 2:
        raise ValueError(f"DeLong's variance needs two nodules of each class, got {n_pos} and {n_neg}")
    of_all = stats.rankdata(scores, axis=1)
    of_pos, of_neg = (stats.rankdata(scores[:, chosen], axis=1) for chosen in (labels, ~labels))
    positive = np.diff((of_all[:, labels] - of_pos) / n_neg, axis=0)
    negative = np.diff(1 - (of_all[:, ~labels] - of_neg) / n_pos, axis=0)
    value, se = float(positive.mean()), sqrt(positive.var(ddof=1) / n_pos + negative.var(ddof=1) / n_neg)
    half = stats.norm.ppf((1 + LEVEL) / 2) * se
    p = 2 * stats.norm.sf(abs(value) / se) if se else float(value == 0)
    return Estimate(value, value - half, value + half, labels.size, float(p))


def paired_runs(
    metric: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray],
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    groups: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Estimate:
    """Mean over runs of metric(second) - metric(first) on the same nodules: patients resampled, runs taken into account.

    The draws of patients are stretched by what runs add beyond them: the variance between runs of what
    each would reach on endless test nodules, which is that of their values less the part that the same few patients
    explain (variance components, as in studies of several readers: Obuchowski and Rockette, 1995), and to the tails of
    Student's t. To resample the runs as well would count that part twice. A single run speaks of the patients alone.

    Args:
        metric: of labels, scores and weights (B, n), such as `auroc`.
        labels: (n,) bool.
        first, second: (R, n) scores, run r of both from the same fold.
        groups: (n,) patient of each nodule.

    Raises:
        ValueError: other shapes.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape != second.shape or first.shape[1] != len(labels):
        raise ValueError(f"expected scores (runs, {len(labels)}) of both arms, got {first.shape} and {second.shape}")
    weights, n_runs = patient_weights(groups, n_boot, seed), len(first)
    both = np.vstack([np.ones(len(labels)), weights])  # the estimate is the first
    gaps = np.stack([metric(labels, b, both) - metric(labels, a, both) for a, b in zip(first, second, strict=True)])
    mean, n = gaps.mean(0), len(np.unique(groups))
    value, draws = float(mean[0]), mean[1:]
    if n > 1 and (of_patients := np.nanvar(draws)) > 0:
        between = 0.0
        if n_runs > 1:  # less how far runs lie apart by the draw of patients
            apart = np.nanvar(gaps[:, 1:] - draws, axis=1).sum() / (n_runs - 1)
            between = max(0.0, gaps[:, 0].var(ddof=1) - apart) / n_runs
        total = of_patients + between
        df = total**2 / (of_patients**2 / (n - 1) + between**2 / max(n_runs - 1, 1))  # Satterthwaite
        tail = (1 - LEVEL) / 2
        draws = value + (draws - value) * sqrt(total / of_patients) * stats.t.isf(tail, df) / stats.norm.isf(tail)
    interval = percentile_interval(draws)
    return Estimate(value, *interval, len(labels), two_sided_p(draws))
