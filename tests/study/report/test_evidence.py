"""Sums of cells against scipy, and tables that do not fit."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from study.report.evidence import derived, measured, published

RUNS = pd.DataFrame({"arm": ["a", "b"], "mean": [0.8, 0.7], "sd": [0.03, 0.05], "n_runs": [5, 7], "n_patients": 40})
BOUNDS = pd.DataFrame({"arm": ["a", "b"], "x": [3.0, 1.0], "ci_low": [2.0, 0.7], "ci_high": [5.0, 1.4], "n": [9, 8]})


def test_two_means_over_runs_are_welchs_test():
    e = measured("t.mean[arm == 'a'] - t.mean[arm == 'b']", {"t": RUNS})
    known = stats.ttest_ind_from_stats(0.8, 0.03, 5, 0.7, 0.05, 7, equal_var=False)
    z = stats.t.ppf(0.975, e.df)
    assert e.value / ((e.high - e.low) / 2 / z) == pytest.approx(known.statistic)
    assert 2 * stats.t.sf(known.statistic, e.df) == pytest.approx(known.pvalue)
    assert (e.n, e.unit, e.seeds) == (5, "runs", 5)


def test_intervals_add_in_quadrature_each_side_by_itself_and_the_scale_divides():
    e = measured("t.x[arm == 'a'] - t.x[arm == 'b'] per t.x[arm == 'a'] - t.x[arm == 'b']", {"t": BOUNDS})
    assert (e.value, e.n, e.unit, e.source) == (1, 8, "nodules", "t")
    assert [1 - e.low, e.high - 1] == pytest.approx([np.hypot(1, 0.4) / 2, np.hypot(2, 0.3) / 2])
    same = measured("t.x[arm == 'a']", {"t": BOUNDS})
    assert (same.low, same.high) == pytest.approx((2, 5))


@pytest.mark.parametrize(
    "quantity",
    [
        "other.x[arm == 'a']",
        "t.y[arm == 'a']",
        "t.x[arm == 'c']",
        "t.x[size == 3]",
        "t.x[arm == 'a'] per t.x[arm == 'b'] - t.x[arm == 'a']",
    ],
)
def test_what_is_not_there_or_has_no_scale_is_not_measured(quantity):
    assert measured(quantity, {"t": BOUNDS}) is None


def test_a_cell_of_several_rows_is_refused():
    with pytest.raises(ValueError, match="several rows fit"):
        measured("t.x[]".replace("[]", "[x > 0]"), {"t": BOUNDS})


def test_the_papers_runs_are_its_five_folds():
    q = "table3_subtype.mean[metric == 'auroc' and size_mm == '10-20' and subtype == 'part-solid' and arm == '{}']"
    e = measured(f"{q.format('Real + Synth')} - {q.format('Real only')}", published())
    known = stats.ttest_ind_from_stats(0.802, 0.03, 5, 0.753, 0.04, 5, equal_var=False)
    assert e.value == pytest.approx(0.049) and 2 * stats.t.sf(known.statistic, e.df) == pytest.approx(known.pvalue)


def test_control_has_the_interval_of_fishers_z_over_nodules():
    x, noise = np.random.default_rng(0).normal(size=(2, 50))
    known = stats.pearsonr(x, x + noise)
    twice = pd.DataFrame({"system": "s", "nodule_id": [*range(50)] * 2})
    for quantity in ("mean_hu", "sd_hu"):
        twice[f"requested_{quantity}"], twice[f"obtained_{quantity}"] = np.tile(x, 2), np.tile(x + noise, 2)
    row = derived({"control": twice})["control_r2"].iloc[0]
    assert [row.r2, row.ci_low, row.ci_high] == pytest.approx(
        [known.statistic**2, *(r**2 for r in known.confidence_interval())]
    )


@pytest.mark.parametrize(("level", "expected"), [(0.8, (-0.1, -0.15, -0.05)), (1.2, (0.1, 0.05, 0.15)), (0.93, (-0.04, -0.07, 0.01))])  # fmt: skip
def test_more_spread_helps_only_where_there_was_too_little(level, expected):
    keys = {"where": "displaced", "template": False}
    tables = {
        "lambda": pd.DataFrame([keys | {"lambda": 0, "sd_ratio": level}]),
        "lambda_differences": pd.DataFrame([keys | {"metric": "sd_ratio", "difference": 0.1, "ci_low": 0.05, "ci_high": 0.15, "n": 9, "seeds": 3}]),
    }  # fmt: skip
    e = measured("towards_truth.difference[where == 'displaced']", derived(tables))
    assert (e.value, e.low, e.high) == pytest.approx(expected)


def test_features_of_the_papers_network_go_before_others():
    table = pd.DataFrame({"extractor": ["imagenet", "radimagenet-resnet50"], "value": [1.0, 2.0]})
    assert derived({"table1_fidelity": table})["table1_fidelity"]["value"].tolist() == [2.0]
    assert len(derived({"table1_fidelity": table[:1]})["table1_fidelity"]) == 1
