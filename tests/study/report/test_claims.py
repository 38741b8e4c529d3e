"""Verdicts follow the interval, whichever way it falls; what was not measured is not judged."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from study.report.claims import SUPPORTED, UNSUPPORTED, UNTESTED, claims_table, load_evidence
from study.report.published import load_published
from study.report.tables import save_table


def judged(text, semi_synthetic=False, **tables):
    """The one claim that holds `text`, judged by these tables."""
    table = claims_table(tables, semi_synthetic)
    rows = table[table["claim"].str.contains(text, regex=False)]
    assert len(rows) == 1, f"{len(rows)} claims hold {text!r}"
    return rows.iloc[0]


def difference(value, low, high, metric="fid", other="maisi-ddpm"):
    row = dict(metric=metric, plane="average", a=other, b="hr-ldm", difference=value, ci_low=low, ci_high=high)
    return pd.DataFrame([row])


def test_nothing_measured_nothing_judged():
    table = claims_table({}, semi_synthetic=True)
    assert set(table["verdict"]) == {UNTESTED}
    assert table[["ours", "ci_low", "ci_high"]].isna().all(axis=None)


def test_the_papers_figures_are_what_its_own_tables_give():
    gaps = {"ci_low": 0, "ci_high": 0, "p_bootstrap": 1}  # the paper states none
    names = ("table2_turing", "table3_subtype", "fig8_malignancy")
    tables = {name: load_published(name).fillna(gaps) for name in names}
    fidelity = load_published("table1_fidelity").query("plane == 'average'").set_index(["system", "metric"])["value"]
    tables["table1_differences"] = pd.concat(
        difference(fidelity["hr-ldm", metric] - value, 0, 0, metric, other)
        for (other, metric), value in fidelity.items()
    )
    found = claims_table(tables, semi_synthetic=False).dropna(subset="ours")
    assert len(found) == 12 + 2 + 8 + 2
    assert found["published"].astype(float).tolist() == pytest.approx(found["ours"].tolist(), rel=5e-4)


@pytest.mark.parametrize(
    ("interval", "semi_synthetic", "expected"),
    [
        ((-3, -5, -1), False, SUPPORTED),
        ((-3, -5, -1), True, "supported (semi-synthetic)"),
        ((-3, -5, 1), False, UNSUPPORTED),
        ((3, 1, 5), False, UNSUPPORTED),
        ((-3, np.nan, np.nan), True, UNTESTED),
    ],
)
def test_fidelity_needs_the_whole_interval_below_zero(interval, semi_synthetic, expected):
    row = judged(
        "FID of HR-LDM is lower than that of maisi-ddpm", semi_synthetic, table1_differences=difference(*interval)
    )
    assert row["verdict"] == expected
    assert row["ours"] == interval[0] or expected == UNTESTED


def test_control_has_the_interval_of_fishers_z():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    found = pearsonr(x, x + y)
    fit = pd.DataFrame(
        [("hr-ldm", "all", "mean_hu", found.statistic**2, 50)], columns=["system", "subtype", "quantity", "r2", "n"]
    )
    row = judged("the obtained mean HU follows", control_summary=fit)
    assert (row["verdict"], row["based_on"]) == (SUPPORTED, "control, n = 50, Fisher z")
    expected = [found.statistic**2, *(r**2 for r in found.confidence_interval())]
    assert list(row[["ours", "ci_low", "ci_high"]]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("per_truth", "expected"), [(50, {UNSUPPORTED, SUPPORTED}), (5000, {SUPPORTED})])
def test_turing_needs_an_interval_near_chance(per_truth, expected):
    # coin tosses: 100 of them leave 40 to 60 % open (Wilson), 10,000 settle it
    half = per_truth // 2
    rows = [
        ("model observer (logistic)", c, t, half, half)
        for c in ("cropped", "full_context")
        for t in ("real", "synthetic")
    ]
    counts = pd.DataFrame(rows, columns=load_published("table2_turing").columns)
    counts.loc[0, ["called_real", "called_synthetic"]] = [half + per_truth // 25, half - per_truth // 25]
    table = claims_table({"table2_turing": counts}, semi_synthetic=False)
    assert set(table[table["claim"].str.contains("logistic")]["verdict"]) == expected
    assert set(table[~table["claim"].str.contains("logistic")]["verdict"]) == {UNTESTED}  # no reader, no other observer


def test_table3_uses_the_corrected_p():
    ours = load_published("table3_subtype")
    ours["p_bootstrap"] = np.where(ours["size_mm"] == "20-30", 0.01, 0.2)
    assert judged("AUROC of part-solid, 20-30 mm", table3_subtype=ours)["verdict"] == SUPPORTED
    assert judged("AUROC of part-solid, 10-20 mm", table3_subtype=ours)["verdict"] == UNSUPPORTED
    assert judged("AUROC of part-solid, 20-30 mm", table3_subtype=ours)["ours"] == pytest.approx(0.081)


@pytest.mark.parametrize(
    ("text", "name", "column", "expected", "low"),
    [
        ("from subtype-balanced than", "fig8_malignancy", "auroc", SUPPORTED, 0.671 - 0.627 - 0.01 * np.sqrt(2)),
        ("at the least real data", "fig7_scarcity", "mean", SUPPORTED, -0.01 * np.sqrt(2)),
    ],
)
def test_intervals_of_two_rows_add_in_quadrature(text, name, column, expected, low):
    ours = load_published(name)
    ours = ours.assign(ci_low=ours[column] - 0.01, ci_high=ours[column] + 0.01)
    row = judged(text, **{name: ours})
    assert row["verdict"] == expected and row["ci_low"] == pytest.approx(low)


def test_evidence_is_what_lies_on_disk(tmp_path):
    assert load_evidence(tmp_path) == {}
    frame = difference(-3, -5, -1)
    save_table(frame, tmp_path, "table1_differences")
    assert list(load_evidence(tmp_path)) == ["table1_differences"]
