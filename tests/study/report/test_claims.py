"""Verdicts follow the interval, whichever way it falls; what was not measured is not judged."""

import numpy as np
import pandas as pd
import pytest

from study.report.claims import SUPPORTED, UNSUPPORTED, UNTESTED, claims_table, load_evidence
from study.report.published import load_published
from study.report.tables import save_table

NAMES = ("table1_fidelity", "table2_turing", "table3_subtype", "fig7_scarcity", "fig8_malignancy")


@pytest.fixture(scope="module")
def published():
    return {name: load_published(name) for name in NAMES}


def difference(value, low, high, metric="fid", a="maisi-ddpm"):
    row = {
        "metric": metric,
        "plane": "average",
        "a": a,
        "b": "hr-ldm",
        "difference": value,
        "ci_low": low,
        "ci_high": high,
    }
    return pd.DataFrame([row])


def verdict(table, text):
    rows = table[table["claim"].str.contains(text, regex=False)]
    assert len(rows) == 1, f"{len(rows)} claims hold {text!r}"
    return rows.iloc[0]


def test_nothing_measured_nothing_judged(published):
    table = claims_table({}, published, semi_synthetic=False)
    assert set(table["verdict"]) == {UNTESTED}
    assert table[["ours", "ci_low", "ci_high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("interval", "expected"), [((-3, -5, -1), SUPPORTED), ((-3, -5, 1), UNSUPPORTED), ((3, 1, 5), UNSUPPORTED)]
)
def test_fidelity_needs_the_whole_interval_below_zero(published, interval, expected):
    table = claims_table({"table1_differences": difference(*interval)}, published, semi_synthetic=False)
    row = verdict(table, "FID of HR-LDM is lower than that of maisi-ddpm")
    assert row["verdict"] == expected
    assert row["ours"] == interval[0]
    assert float(row["published"]) == pytest.approx(2.8967 - 3.2614, abs=1e-3)


def test_semi_synthetic_verdicts_say_so(published):
    table = claims_table({"table1_differences": difference(-3, -5, -1)}, published, semi_synthetic=True)
    assert verdict(table, "FID of HR-LDM is lower than that of maisi-ddpm")["verdict"] == "supported (semi-synthetic)"
    assert verdict(table, "over-smoothing")["verdict"] == UNTESTED  # nothing was measured, nothing to label


@pytest.mark.parametrize(("per_truth", "expected"), [(50, {UNSUPPORTED, SUPPORTED}), (5000, {SUPPORTED})])
def test_turing_needs_an_interval_near_chance(published, per_truth, expected):
    # coin tosses: 100 of them leave 40 to 60 % open (Wilson), 10,000 settle it
    half = per_truth // 2
    rows = [
        ("model observer (test)", c, t, half, half) for c in ("cropped", "full_context") for t in ("real", "synthetic")
    ]
    counts = pd.DataFrame(rows, columns=list(published["table2_turing"].columns))
    counts.loc[0, ["called_real", "called_synthetic"]] = [half + per_truth // 25, half - per_truth // 25]
    table = claims_table({"table2_turing": counts}, published, semi_synthetic=False)
    assert set(table[table["claim"].str.contains("model observer")]["verdict"]) == expected


def test_table3_uses_the_corrected_p(published):
    ours = published["table3_subtype"].copy()
    ours["p_bootstrap"] = np.where(ours["size_mm"] == "20-30", 0.01, 0.2)
    table = claims_table({"table3_subtype": ours}, published, semi_synthetic=False)
    assert verdict(table, "AUROC of part-solid, 20-30 mm")["verdict"] == SUPPORTED
    assert verdict(table, "AUROC of part-solid, 10-20 mm")["verdict"] == UNSUPPORTED
    assert verdict(table, "AUROC of part-solid, 20-30 mm")["ours"] == pytest.approx(0.081)


def test_malignancy_intervals(published):
    ours = published["fig8_malignancy"].assign(ci_low=lambda t: t["auroc"] - 0.01, ci_high=lambda t: t["auroc"] + 0.01)
    table = claims_table({"fig8_malignancy": ours}, published, semi_synthetic=False)
    row = verdict(table, "from subtype-balanced than")
    assert row["verdict"] == SUPPORTED
    assert row["ci_low"] == pytest.approx(0.671 - 0.627 - 0.01 * np.sqrt(2))


def test_evidence_is_what_lies_on_disk(tmp_path, published):
    assert load_evidence(tmp_path) == {}
    frame = difference(-3, -5, -1)
    save_table(frame, tmp_path, "table1_differences", list(frame.columns))
    assert list(load_evidence(tmp_path)) == ["table1_differences"]
