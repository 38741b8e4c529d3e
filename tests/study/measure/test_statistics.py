"""Intervals and tests against closed forms and enumeration."""

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from study.measure import statistics as st


def test_wilson_equals_its_closed_form():
    n, p, z = 100, 0.66, stats.norm.ppf(0.975)
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert st.wilson_interval(66, 100) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count, n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_rejects_what_is_no_proportion(count, n):
    with pytest.raises(ValueError, match="proportion"):
        st.wilson_interval(count, n)


@pytest.mark.parametrize("n, smallest", [(5, 0.0079), (6, 0.0022)])
def test_smallest_exact_p(n, smallest):
    p = st.mann_whitney(np.arange(n), np.arange(n) + 100.5)
    assert p == pytest.approx(2 / comb(2 * n, n), abs=1e-12) and p == pytest.approx(st.smallest_mann_whitney_p(n, n))
    assert round(p, 4) == smallest


def test_mann_whitney_with_ties_enumerates_every_split():
    a, b = [1.0, 2.0, 3.0, 3.0], [3.0, 7.0, 8.0, 9.0, 9.0]
    ranks = stats.rankdata(a + b)
    middle, observed = len(a) * (len(a) + len(b) + 1) / 2, ranks[: len(a)].sum()
    sums = [ranks[list(pick)].sum() for pick in combinations(range(9), 4)]
    expected = np.mean([abs(s - middle) >= abs(observed - middle) - 1e-9 for s in sums])
    assert st.mann_whitney(a, b) == pytest.approx(expected, abs=0.02)  # two-sided as twice a tail, or as |gap|
    assert st.mann_whitney(a, b) == st.mann_whitney(b, a)


def test_mann_whitney_of_equal_values_is_one_and_nan_is_refused():
    assert st.mann_whitney([0.5] * 5, [0.5] * 5) == 1.0
    with pytest.raises(ValueError, match="finite"):
        st.mann_whitney([1.0, np.nan], [2.0])


def test_holm_by_hand():
    # sorted .01 .02 .04 -> x3, x2, x1, made monotone
    assert st.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    many = np.random.default_rng(0).random(30) ** 3
    assert st.holm(many) == pytest.approx(multipletests(many, method="holm")[1])
    with pytest.raises(ValueError, match="p-values"):
        st.holm([0.1, np.nan])


def test_mean_interval_has_the_normal_width_when_groups_are_single():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    e = st.mean_interval(values, np.arange(400), n_boot=4000, seed=0)
    half = 1.96 * values.std() / 20
    assert e.value == pytest.approx(values.mean())
    assert (e.ci_high - e.ci_low) / 2 == pytest.approx(half, rel=0.06)
    assert e == st.mean_interval(values, np.arange(400), n_boot=4000, seed=0)


def test_clusters_widen_the_interval_by_their_size():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 10)
    values = rng.normal(size=60)[groups]  # ten copies of each: only 60 values are known
    clustered = st.mean_interval(values, groups, 3000, 0)
    naive = st.mean_interval(values, np.arange(600), 3000, 0)
    ratio = (clustered.ci_high - clustered.ci_low) / (naive.ci_high - naive.ci_low)
    assert ratio == pytest.approx(sqrt(10), rel=0.12)


def test_mean_of_few_groups_has_students_interval():
    values = np.array([1.0, 2.5, 0.5, 3.0, 2.0])
    e = st.mean_interval(values, np.arange(5), 50, 0)
    known = stats.ttest_1samp(values, 0)
    assert (e.ci_low, e.ci_high) == pytest.approx(tuple(known.confidence_interval())) and e.p == pytest.approx(
        known.pvalue
    )


def test_bootstrap_t_reaches_further_to_the_side_of_the_long_tail():
    values = np.random.default_rng(4).lognormal(size=40)
    e = st.mean_interval(values, np.arange(40), 4000, 0)
    assert e.ci_high - e.value > 1.3 * (e.value - e.ci_low)
    assert e.p < 0.01 and st.mean_interval(values - values.mean(), np.arange(40), 4000, 0).p > 0.9


def test_cluster_weights_draw_all_groups_alike():
    weights = st.cluster_weights(7, 5000, np.random.default_rng(0))
    assert (weights.sum(1) == 7).all()
    assert weights.mean(0) == pytest.approx(np.ones(7), abs=0.06)


def test_resampled_auroc_difference_agrees_with_the_delong_variance():
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 150)
    a, b = labels * 0.8 + rng.normal(size=300), labels * 1.0 + rng.normal(size=300)
    placements = [(s[150:, None] > s[None, :150]).astype(float) for s in (a, b)]
    gap = placements[1] - placements[0]  # DeLong: variance from the two sets of placement means
    sd = sqrt(gap.mean(1).var(ddof=1) / 150 + gap.mean(0).var(ddof=1) / 150)
    value = st.auroc(labels, b) - st.auroc(labels, a)
    assert value.item() == pytest.approx(gap.mean())
    weights = st.cluster_weights(300, 1000, np.random.default_rng(0))
    low, high = st.percentile_interval(st.auroc(labels, b, weights) - st.auroc(labels, a, weights))
    assert (high - low) / (2 * 1.96) == pytest.approx(sd, rel=0.12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="group each"):
        st.mean_interval(np.ones(3), np.arange(2), 10, 0)
    assert all(np.isnan(st.percentile_interval(np.array([np.nan]))))


def test_one_group_has_a_mean_and_no_interval():
    e = st.mean_interval(np.array([1.0, 2.0]), np.array(["p", "p"]), 50, 0)
    assert e.value == 1.5 and np.isnan([e.ci_low, e.ci_high, e.p]).all()
