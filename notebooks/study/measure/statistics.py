"""Intervals and tests shared by the tables (Section 6).

The unit of resampling is the patient (or whatever `groups` names): nodules of one patient and slices of one nodule are
not independent. A cluster bootstrap draws G of the G groups with replacement; w_g counts how often group g was drawn,
so a statistic that accepts weights needs no copying of data.

The paper tests with Mann-Whitney U across runs. Its smallest two-sided exact p at n against n runs is 2 / C(2n, n):
.0079 at 5 against 5, and runs on one test set are not independent; `roc.paired_runs` stands beside it, which takes
patients and runs together.

How often each interval holds what it promises is in `study.simulations`.
"""

from dataclasses import dataclass
from math import comb

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
N_BOOT = 10_000  # resamples: the smallest p, 2 / (N_BOOT + 1), outlives Holm's correction over any table of the paper
FEW = 10  # groups, below which too few different resamples exist: a mean has Student's interval there


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `p` is two-sided, NaN where nothing is tested, and `n` counts what `value` is over."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    p: float = float("nan")


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion count / n.

    Raises:
        ValueError: n < 1 or count outside 0..n.
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"a proportion needs 0 <= count <= n and n >= 1, got {count} of {n}")
    low, high = proportion_confint(count, n, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p of the Mann-Whitney U test, exact (Section 6.3: metric values of independent runs).

    Without ties the exact null distribution; with ties, up to 8 against 8, all splits of the pooled values are
    enumerated; larger tied samples use the normal approximation. All values equal gives 1.

    Raises:
        ValueError: an empty sample or NaN.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not a.size or not b.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"Mann-Whitney needs two samples of finite values, got {a.size} and {b.size}")
    distinct = np.unique(np.concatenate([a, b])).size
    if distinct == 1:
        return 1.0
    if distinct == a.size + b.size:
        method = "exact"
    elif max(a.size, b.size) <= 8:
        method = stats.PermutationMethod(n_resamples=comb(a.size + b.size, a.size))  # every split
    else:
        method = "asymptotic"
    return float(stats.mannwhitneyu(a, b, method=method).pvalue)


def smallest_mann_whitney_p(n_a: int, n_b: int) -> float:
    """What `mann_whitney` gives at the least when all of one sample lie above all of the other."""
    return min(1.0, 2 / comb(n_a + n_b, n_a))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm-adjusted p-values of one family of tests, in the order given.

    Raises:
        ValueError: a value outside [0, 1] or NaN (leave untested cells out of the family).
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("Holm's correction needs a vector of p-values in [0, 1]")
    order = np.argsort(p, kind="stable")  # statsmodels' own collects garbage at each call, a third of a second
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return adjusted


def cluster_weights(n_groups: int, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """How often each group was drawn: (n_boot, n_groups) float, every row summing to n_groups.

    NaN for a single group: to draw it again says nothing of others, so what is computed from it has no interval.

    Raises:
        ValueError: no group or no resample.
    """
    if n_groups < 1 or n_boot < 1:
        raise ValueError(f"a bootstrap needs groups and resamples, got {n_groups} groups and {n_boot} resamples")
    if n_groups == 1:
        return np.full((n_boot, 1), np.nan)
    return rng.multinomial(n_groups, np.full(n_groups, 1.0 / n_groups), size=n_boot).astype(float)


def patient_weights(groups: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """(n_boot, n) how often each nodule's patient was drawn, patients resampled with replacement."""
    if not len(groups):
        return np.ones((n_boot, 0))
    patients, of_nodule = np.unique(groups, return_inverse=True)
    return cluster_weights(len(patients), n_boot, np.random.default_rng(seed))[:, of_nodule]


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """Percentile interval of bootstrap draws without those that could not be computed (NaN); NaN if none is left."""
    draws = np.asarray(draws, dtype=float)
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def two_sided_p(draws: np.ndarray) -> float:
    """Bootstrap p of "the difference is 0": twice the smaller share of draws on a side, never below 2 / (n + 1)."""
    draws = np.asarray(draws, dtype=float)
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return float("nan")
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (draws.size + 1)))


def mean_interval(values: np.ndarray, groups: np.ndarray, n_boot: int, seed: int) -> Estimate:
    """Mean of `values` (n,) with its interval, groups resampled (bootstrap-t), and the p of "the mean is 0".

    Resampled is t* = (m* - m) / se*, with the standard error of a ratio of group sums, since plain percentiles are too
    narrow and too symmetric. Fewer than `FEW` groups have Student's interval with that error; one has none.

    Raises:
        ValueError: lengths differ, no values, or NaN among them.
    """
    values, groups = np.asarray(values, dtype=float), np.asarray(groups)
    if values.ndim != 1 or not values.size or groups.shape != values.shape or not np.isfinite(values).all():
        raise ValueError(f"expected finite values (n,) with a group each, got {values.shape} and {groups.shape}")
    labels, codes = np.unique(groups, return_inverse=True)
    mean, n = float(values.mean()), labels.size
    if n == 1:
        return Estimate(mean, *[float("nan")] * 2, values.size)
    rest, counts = np.bincount(codes, values - mean), np.bincount(codes).astype(float)
    drawn = cluster_weights(n, n_boot, np.random.default_rng(seed))
    weights = np.vstack([np.ones(n), drawn])  # the estimate is the first
    total = weights @ counts
    shift = weights @ rest / total  # m* - m
    squares = weights @ rest**2 - 2 * shift * (weights @ (rest * counts)) + shift**2 * (weights @ counts**2)
    errors = np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total
    se, known = float(errors[0]), (errors > 1e-9 * errors[0]) & (errors > 0)
    if not known[0]:  # all groups alike
        return Estimate(mean, mean, mean, values.size, float(mean == 0))
    if n < FEW:
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * se
        return Estimate(mean, mean - half, mean + half, values.size, float(2 * stats.t.sf(abs(mean) / se, n - 1)))
    t = (shift[known] / errors[known])[1:]
    low, high = percentile_interval(t)
    return Estimate(mean, mean - high * se, mean - low * se, values.size, two_sided_p(mean / se - t))


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of y on x; NaN where fewer than three points, or equal x, fix no line."""
    if x.size < 3 or np.ptp(x) == 0:
        return (np.nan,) * 3
    fit = stats.linregress(x, y)
    return float(fit.slope), float(fit.intercept), float(fit.rvalue**2)


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve for labels (n,) bool, scores (n,), weights (B, n); returns (B,), or (1,) unweighted.

    The weighted share of pairs (positive, negative) in the right order, ties counting one half; NaN for a single class.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    weights = np.ones((1, labels.size)) if weights is None else np.asarray(weights, dtype=float)
    gap = scores[labels][:, None] - scores[~labels]
    positive, negative = weights[:, labels], weights[:, ~labels]
    with np.errstate(invalid="ignore"):
        total = positive.sum(1) * negative.sum(1)
        return ((positive @ ((gap > 0) + 0.5 * (gap == 0))) * negative).sum(1) / total
