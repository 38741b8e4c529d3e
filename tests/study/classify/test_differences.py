"""Differences of arms: paired by fold, of planted size, and empty where nothing can be compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from study.classify import differences as df
from study.classify.jobs import ARMS, CLINICAL, FULL, REAL_ONLY, REAL_SYNTH, ClassifierData
from study.classify.runs import RunResult
from study.measure.roc import delong

N = 240


@pytest.fixture(scope="module")
def test_set():
    labels = np.arange(N) % 3
    crops = np.zeros((N, 4, 4, 4), np.int16)
    diameters = np.repeat([7.0, 12.0, 30.0], N // 3)  # the last of solid nodules alone, see `labels`
    patients = np.array([f"p{i // 2}" for i in range(N)])
    labels = np.where(diameters == 30, 0, labels)
    return ClassifierData(crops, crops > 0, labels, patients, patients, diameters, np.full(N, "", object))


def run(arm, fold, retention, test, skill):
    rng = np.random.default_rng((fold, int(100 * skill)))
    shared = np.random.default_rng(fold).normal(size=(N, 3))
    scores = shared + 0.3 * rng.normal(size=(N, 3)) + skill * np.eye(3)[test.labels]
    return RunResult(arm, fold, retention, scores, 1, 1, 1, 0, 0, Path("none"), 0.0, [], replace(ARMS[arm], system=""))


def test_planted_gain_of_table_3_is_found_and_a_bin_of_one_class_is_empty(test_set):
    runs = [run(arm, f, 1.0, test_set, s) for f in range(5) for arm, s in ((REAL_ONLY, 0.8), (REAL_SYNTH, 1.6))]
    table = df.subtype_differences(runs, test_set, 0, n_boot=400).set_index(["metric", "size_mm", "subtype"])
    small = table.loc[("auroc", "6-10", "solid")]
    assert small.ci_low > 0.02 and (small.n_runs, small.n_patients) == (5, 40)
    assert small.level_b - small.level_a == pytest.approx(small.difference) and 0.5 < small.level_a < small.level_b
    assert table.loc[("auroc", "20-30", "solid"), "difference"] != table.loc[("auroc", "20-30", "solid"), "difference"]
    inside = test_set.diameters == 7
    one = [r for r in runs if r.fold == 0]
    known = delong(test_set.labels[inside] == 0, *(r.probabilities[inside, 0] for r in one))
    only = df.subtype_differences(one, test_set, 0, n_boot=400).set_index(["metric", "size_mm", "subtype"])
    assert only.loc[("auroc", "6-10", "solid"), "difference"] == pytest.approx(known.value)


def test_table_3_sets_synthetic_nodules_against_every_arm_in_the_folds_that_both_have(test_set):
    arms = {REAL_ONLY: 5, "Oversampling": 3, REAL_SYNTH: 5}
    runs = [run(arm, f, 1.0, test_set, 1.0) for arm, n in arms.items() for f in range(n)]
    table = df.subtype_differences(runs, test_set, 0, n_boot=50)
    assert table.groupby("a").n_runs.unique().map(list).to_dict() == {REAL_ONLY: [5], "Oversampling": [3]}
    assert (table.b == REAL_SYNTH).all()


def test_nodules_beyond_all_size_bins_are_in_no_cell_of_table_3(test_set):
    runs = [run(arm, 0, 1.0, test_set, 1.0) for arm in (REAL_ONLY, REAL_SYNTH)]
    beyond = replace(
        test_set, diameters=np.select([test_set.diameters == 7, test_set.diameters == 30], [5.9, 30.1], 12.0)
    )
    table = df.subtype_differences(runs, beyond, 0, n_boot=50).groupby("size_mm")
    assert table.n_patients.max().to_dict() == {"6-10": 0, "10-20": 40, "20-30": 0}


def test_fig_7_has_every_comparison_that_claims_ask_for(test_set):
    cells = [(CLINICAL, 1.0), (CLINICAL, 0.1), (FULL, 1.0), (FULL, 0.1), (FULL, 0.0)]
    runs = [run(arm, f, share, test_set, 0.4 + share) for arm, share in cells for f in range(2)]
    table = df.scarcity_differences(runs, test_set, 0, n_boot=50)
    pairs = set(table[["a", "retention_a", "b", "retention_b"]].itertuples(index=False, name=None))
    assert pairs == {
        (CLINICAL, 1.0, CLINICAL, 0.1), (CLINICAL, 1.0, FULL, 1.0), (CLINICAL, 1.0, FULL, 0.1), (CLINICAL, 1.0, FULL, 0.0),
        (FULL, 1.0, FULL, 0.1), (FULL, 1.0, FULL, 0.0), (CLINICAL, 0.1, FULL, 0.1),
    }  # fmt: skip
    assert (table["n_runs"] == 2).all()
