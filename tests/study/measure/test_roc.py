"""DeLong's test and the bootstrap of patients and runs against definitions, and against each other."""

import numpy as np
import pytest
from scipy import stats

from study.measure.roc import delong, paired_runs
from study.measure.statistics import auroc


def two_scores(n, seed, gain=0.0):
    """Labels and two correlated scores, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    labels, shared = np.arange(n) % 3 == 0, rng.normal(size=n)
    a, b = (np.round(labels * (1 + g) + shared + rng.normal(size=n), 1) for g in (0, gain))
    return labels, a, b


def test_delong_equals_its_definition_pair_by_pair():
    labels, a, b = two_scores(60, 0, 0.5)
    psi = [np.array([[(p > q) + (p == q) / 2 for q in s[~labels]] for p in s[labels]]) for s in (a, b)]  # (20, 40)
    over_pos, over_neg = (np.array([x.mean(axis) for x in psi]) for axis in (1, 0))
    covariance = np.cov(over_pos) / 20 + np.cov(over_neg) / 40
    gap, se = psi[1].mean() - psi[0].mean(), np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = delong(labels, a, b)
    assert found.value == pytest.approx(gap) and found.p == pytest.approx(2 * stats.norm.sf(abs(gap) / se))
    assert (found.ci_high - found.ci_low) / 2 == pytest.approx(1.959964 * se)
    assert delong(labels, a, a) == delong(labels, b, b) and delong(labels, a, a).p == 1


def test_delong_needs_two_of_each_class():
    with pytest.raises(ValueError, match="two nodules of each class"):
        delong(np.array([True, False, False]), np.arange(3), np.arange(3))


def test_bootstrap_of_single_nodules_and_one_run_has_the_width_of_delong():
    labels, a, b = two_scores(300, 1, 0.3)
    theirs, ours = delong(labels, a, b), paired_runs(auroc, labels, a, b, np.arange(300), 4000)
    assert ours.value == pytest.approx(theirs.value)
    assert ours.ci_high - ours.ci_low == pytest.approx(theirs.ci_high - theirs.ci_low, rel=0.1)
    assert ours.p == pytest.approx(theirs.p, abs=0.05)


def test_runs_that_differ_widen_the_interval_and_equal_ones_do_not():
    labels, a, b = two_scores(120, 2)
    alone = paired_runs(auroc, labels, a, b, np.arange(120), 2000)
    equal = paired_runs(auroc, labels, [a] * 5, [b] * 5, np.arange(120), 2000)
    skill = np.array([[-2], [-1], [0], [1], [2]])
    runs = paired_runs(auroc, labels, [a] * 5, b + skill * labels, np.arange(120), 2000)
    assert (equal.ci_low, equal.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    assert runs.ci_high - runs.ci_low > 1.3 * (alone.ci_high - alone.ci_low)
    with pytest.raises(ValueError, match="both arms"):
        paired_runs(auroc, labels, [a] * 2, [b] * 3, np.arange(120))
