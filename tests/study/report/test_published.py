"""The transcription of the paper's numbers: complete, consistent, and its own inconsistencies as noted."""

from functools import cache
from math import comb

import numpy as np
import pytest

from hrldm import paths
from study.report.published import COLUMNS, load_published

PLANES = ["axial", "sagittal", "coronal"]
PRINTED_SCALE = {"fid": 1.0, "kid": 1e3, "mmd": 1e2}
OFF_AVERAGES = {("maisi-ddpm", "mmd"), ("hr-ldm", "mmd")}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_table_reads_with_its_columns(name):
    assert len(load_published(name)) > 0


def test_table1_is_complete_and_averages_are_the_means_of_the_planes_but_for_two():
    table = load_published("table1_fidelity")
    wide = table.pivot(index=["system", "metric"], columns="plane", values="value")
    assert len(wide) == 15 and not wide.isna().any().any()
    off = set()
    for (system, metric), row in wide.iterrows():
        gap = abs(row[PLANES].mean() - row["average"]) * PRINTED_SCALE[metric]
        if gap > 0.5001e-4:  # printed with four digits
            off.add((system, metric))
    assert off == OFF_AVERAGES
    ddpm = wide.loc[("maisi-ddpm", "mmd")] * 1e2
    assert ddpm["average"] == pytest.approx(0.7807) and ddpm[PLANES].mean() == pytest.approx(0.7874, abs=5e-5)


def test_table1_says_what_the_paper_says():
    table = load_published("table1_fidelity")
    best = table.loc[table.groupby(["metric", "plane"])["value"].idxmin(), "system"]
    assert set(best) == {"hr-ldm"}
    ours = table.query("system == 'hr-ldm' and plane == 'average'").set_index("metric")["value"]
    assert dict(ours) == pytest.approx({"fid": 2.8967, "kid": 1.0992e-3, "mmd": 0.6507e-2})


def test_table2_adds_to_fifty_and_gives_the_percentages_of_the_text():
    table = load_published("table2_turing")
    assert (table["called_real"] + table["called_synthetic"] == 50).all()
    counts = table.set_index(["condition", "truth"])
    right = {
        c: counts.loc[(c, "real"), "called_real"] + counts.loc[(c, "synthetic"), "called_synthetic"]
        for c in ("cropped", "full_context")
    }
    assert right == {"cropped": 66, "full_context": 56}
    fooled = [counts.loc[(c, "synthetic"), "called_real"] / 50 for c in ("cropped", "full_context")]
    assert fooled == [0.40, 0.44]


def test_table3_is_complete_and_its_p_values_stand_on_the_augmented_arm():
    table = load_published("table3_subtype")
    assert len(table) == 2 * 3 * 3 * 2
    assert not table.duplicated(["metric", "size_mm", "subtype", "arm"]).any()
    assert table["mean"].between(0, 1).all() and table["sd"].between(0, 0.1).all()
    by_arm = table.groupby("arm")["p_mann_whitney"]
    assert by_arm.count().to_dict() == {"Real only": 0, "Real + Synth": 18}
    assert table["p_mann_whitney"].dropna().between(0, 1).all()
    cell = table.query("metric == 'auprc' and size_mm == '20-30' and subtype == 'part-solid' and arm == 'Real + Synth'")
    assert cell[["mean", "sd", "p_mann_whitney"]].to_numpy().tolist() == [[0.657, 0.05, 0.002]]


@cache
def arrangements(n: int, m: int, u: int) -> int:
    """In how many orders of n and m values the Mann-Whitney statistic is u."""
    if u < 0:
        return 0
    if n == 0 or m == 0:
        return int(u == 0)
    return arrangements(n - 1, m, u - m) + arrangements(n, m - 1, u)


def test_printed_p_values_fit_no_exact_test_across_runs():
    printed = set(load_published("table3_subtype")["p_mann_whitney"].dropna())
    fits = {}
    for n in range(3, 11):
        tail = np.cumsum([arrangements(n, n, u) for u in range(n * n // 2 + 1)])
        fits[n] = printed & {round(min(1.0, 2 * t / comb(2 * n, n)), 3) for t in tail}
    assert fits[5] == {0.032}
    assert max(len(found) for found in fits.values()) == 3


def test_counts_add_up_to_the_totals_of_the_text():
    totals = load_published("dataset_counts").groupby("use")["n"].sum()
    assert totals["generator training"] == totals["subtype training"] == 2950
    assert totals["synthesis (held out)"] == 390
    assert totals["subtype test"] == 530
    assert totals["malignancy"] == 2487


def test_scarcity_has_no_baseline_without_data_and_malignancy_rises():
    scarcity = load_published("fig7_scarcity")
    assert set(scarcity.query("retention == 0")["arm"]) == {"Clinical (n%) + Synth (100%)"}
    assert set(scarcity["qualifier"]) == {"about", "above", "below"}
    fig8 = load_published("fig8_malignancy")
    assert fig8["auroc"].tolist() == [0.569, 0.627, 0.671]


def test_arms_are_named_as_our_tables_name_them():
    from study.classify import jobs as arms

    assert set(load_published("table3_subtype")["arm"]) == {arms.REAL_ONLY, arms.REAL_SYNTH}
    assert set(load_published("fig7_scarcity")["arm"]) <= {arms.CLINICAL, arms.PROPORTIONAL, arms.FULL}
    assert load_published("fig8_malignancy")["arm"].tolist() == [arms.SCRATCH, arms.IMBALANCED, arms.BALANCED]


def test_missing_and_altered_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no published table"):
        load_published("table9")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    with pytest.raises(ValueError, match=r"fig8_malignancy\.csv"):
        load_published("fig8_malignancy")
    (tmp_path / "fig8_malignancy.csv").write_text("arm,auroc\nscratch,0.5\n")
    with pytest.raises(ValueError, match="expected"):
        load_published("fig8_malignancy")
