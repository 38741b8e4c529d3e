"""Verdicts follow the interval, whichever way it falls; what was not measured is not judged."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from study.report import claims
from study.report.claims import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTED, Rule, judged, load_rules, times_needed
from study.report.evidence import Evidence
from study.report.published import load_published

ABOVE = Rule("", "", "above", "", 0.0, np.nan, "f", (), "")
NEAR = replace(ABOVE, side="near", null=0.5, margin=0.25)
PAPER = 0.05


def verdict(rule, value, half, effect=PAPER, **more):
    return judged([rule], [Evidence(value, value - half, value + half, **more)], np.array([effect]))[0][0]


@pytest.fixture(scope="module")
def of_paper():
    """All claims without any evidence of ours, by claim."""
    return claims.claims_table({}).set_index("claim")


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (0.05, 0.04, SUPPORTED),
        (0.02, 0.015, SUPPORTED),  # less than the paper's, but half of it is not left out
        (0.02, 0.03, UNDECIDED),  # zero and the paper's effect both in the interval
        (0.0, 0.02, CONTRADICTED),  # leaves out half of it
        (0.01, 0.008, CONTRADICTED),  # of the claimed sign, too small
        (-0.05, 0.04, CONTRADICTED),
        (0.05, np.nan, UNTESTED),
    ],
)
def test_the_interval_decides_on_either_side(value, half, expected):
    assert verdict(ABOVE, value, half) == expected
    assert verdict(replace(ABOVE, side="below"), -value, half, -PAPER) == expected


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [(0.6, 0.1, SUPPORTED), (0.4, 0.1, SUPPORTED), (0.7, 0.1, UNDECIDED), (0.9, 0.1, CONTRADICTED), (0.1, 0.1, CONTRADICTED)],
)  # fmt: skip
def test_near_needs_the_whole_interval_within_the_margin(value, half, expected):
    assert verdict(NEAR, value, half) == expected


def test_what_the_paper_does_not_print_is_judged_by_its_side_and_harm_by_its_margin():
    assert verdict(ABOVE, 0.001, 0.0005, np.nan) == SUPPORTED and verdict(ABOVE, -0.001, 0.0005, np.nan) == CONTRADICTED
    harmless = replace(ABOVE, null=-0.025, margin=-0.025)
    assert [verdict(harmless, v, 0.02, -0.006) for v in (0, -0.02, -0.05)] == [SUPPORTED, UNDECIDED, CONTRADICTED]


def test_few_runs_have_students_tails():
    assert verdict(ABOVE, 0.05, 0.049, df=4) == SUPPORTED
    two = [Evidence(0.05, 0.005, 0.095, df=df) for df in (np.inf, 4)]
    first, second = (judged([ABOVE] * 8, [e] * 8, np.full(8, PAPER))[1][0] for e in two)
    assert first < second  # the same interval, but corrected for eight it says less of five runs


def test_holm_spares_what_stands_out_of_its_family():
    found = [Evidence(v, v - 0.04, v + 0.04) for v in (0.09, *[0.045] * 9)]
    assert judged([ABOVE] * 10, found, np.full(10, PAPER))[0] == [SUPPORTED] + [UNDECIDED] * 9
    alone = [replace(ABOVE, family=str(i)) for i in range(10)]
    assert set(judged(alone, found, np.full(10, PAPER))[0]) == {SUPPORTED}


def test_needed_n_is_that_of_the_normal_theory():
    e = Evidence(0.01, 0.01 - 1.96 * 0.02, 0.01 + 1.96 * 0.02, n=100, unit="nodules")
    assert times_needed(ABOVE, e, PAPER, 1) == pytest.approx(((1.96 + 0.8416) * 0.02 / PAPER) ** 2, rel=1e-3)
    assert times_needed(ABOVE, e, PAPER, 9) > 1.5 * times_needed(ABOVE, e, PAPER, 1)
    assert times_needed(NEAR, e, 0.66, 1) == pytest.approx(((1.96 + 0.8416) * 0.02 / 0.09) ** 2, rel=1e-3)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_nothing_measured_nothing_judged(of_paper):
    assert set(of_paper["verdict"]) == {UNTESTED}
    assert of_paper[["ours", "ci_low", "ci_high"]].isna().all(axis=None) and of_paper.index.is_unique
    assert (of_paper["based_on"] != "").all()


@pytest.mark.parametrize(
    ("words", "effect", "expected"),
    [
        ("FID is lower than that of maisi-ddpm as built here, average", 2.8967 / 3.2614 - 1, "no interval printed"),
        ("MMD is lower than that of diff-tumor as built here, axial", 0.5568 / 2.6418 - 1, "no interval printed"),
        ("hardly tell synthetic nodules from real ones, cropped (", 0.66, SUPPORTED),
        ("hardly tell synthetic nodules from real ones, full_context (", 0.56, SUPPORTED),
        ("accuracy approaches chance", 0.56, UNDECIDED),
        ("Context lowers the expert's accuracy", -0.1, UNDECIDED),
        ("raise AUROC of part-solid, 20-30", 0.081, SUPPORTED),
        ("raise AUPRC of ground-glass, 10-20", 0.01, UNDECIDED),
        ("AUROC of solid, 6-10 mm (loses", -0.006, UNDECIDED),  # "p > 0.05" is not "no difference"
        ("AUROC from subtype-balanced minus from subtype-imbalanced", 0.044, UNDECIDED),
        ("part-solid AUROC collapses", -0.16, "no interval printed"),
    ],
)
def test_the_papers_own_figures_pass_through_the_rules(of_paper, words, effect, expected):
    found = of_paper[of_paper.index.str.contains(words, regex=False)]
    assert len(found) == 1 and found["published"].iloc[0] == pytest.approx(effect)
    assert found["paper_verdict"].iloc[0] == expected


def test_every_cell_of_the_papers_tables_is_claimed():
    rules = load_rules()
    asked = " ".join(q for rule in rules for q in (*rule.quantities, rule.paper))
    for name, columns in (
        ("table1_fidelity", ["metric", "plane"]),
        ("table3_subtype", ["metric", "size_mm", "subtype"]),
    ):
        for row in load_published(name)[columns].drop_duplicates().itertuples(index=False):
            assert all(f"{c} == '{v}'" in asked for c, v in zip(columns, row, strict=True))
    assert len(rules) > 130


def test_a_rule_that_cannot_be_judged_is_refused():
    row = dict.fromkeys(load_published("claims").columns, np.nan) | {"claim": "x", "side": "near"}
    with pytest.raises(ValueError, match="near with a margin"):
        load_rules(pd.DataFrame([row]))


# -- which evidence counts -----------------------------------------------------------------------------------------------


def fidelity(difference, half=0.1):
    keys = dict(metric="kid", plane="average")
    gap = keys | {"a": "maisi-ddpm", "b": "hr-ldm", "difference": difference}
    return {
        "table1_differences": pd.DataFrame([gap | {"ci_low": difference - half, "ci_high": difference + half}]),
        "table1_fidelity": pd.DataFrame([keys | {"system": "maisi-ddpm", "value": 2.0, "n_real": 30}]),
    }


def one(evidence, words):
    rules = [rule for rule in load_rules() if words in rule.claim]
    return claims.claims_table(evidence, rules).iloc[0]


def test_real_data_count_before_semi_synthetic_and_say_so():
    mini, real = fidelity(-0.6), fidelity(0.6)
    row = one({"lidc-mini/quick/tables": mini}, "KID is lower than that of maisi-ddpm as built here, average")
    assert (row.verdict, row.ours) == (SUPPORTED, pytest.approx(-0.3))
    assert row.based_on == "lidc-mini/quick/tables/table1_differences.csv, semi-synthetic"
    both = {"lidc-mini/quick/tables": mini, "lidc-cubes/quick/tables": real}
    row = one(both, "KID is lower than that of maisi-ddpm as built here, average")
    assert row.verdict == CONTRADICTED and row.based_on == "lidc-cubes/quick/tables/table1_differences.csv"


def test_three_seeds_are_not_outvoted_by_one():
    keys = {"factor": "c_hist x L_hist", "level": "c_hist only", "n_seeds": 3}
    rows = [("jsd", 0.1, 0.09, 0.11), ("jsd_difference", 0.03, 0.02, 0.04)]  # without L_hist minus with
    ablations = pd.DataFrame([keys | dict(zip("metric value ci_low ci_high".split(), r, strict=True)) for r in rows])
    gap = {
        "a": "maisi-ddpm",
        "b": "hr-ldm",
        "metric": "jsd",
        "difference": 0.05,
        "ci_low": 0.04,
        "ci_high": 0.06,
        "n": 99,
    }
    level = {"system": "maisi-ddpm", "subtype": "all", "metric": "jsd", "value": 0.1, "ci_low": 0.09, "ci_high": 0.11}
    single = {"lesion_differences": pd.DataFrame([gap]), "lesion_histograms": pd.DataFrame([level])}
    assert one({"own": single}, "HU histogram closer").verdict == CONTRADICTED
    row = one({"own": single | {"ablations": ablations}}, "HU histogram closer")
    assert (row.verdict, row.ours) == (SUPPORTED, pytest.approx(-0.3)) and "3 runs" in row.based_on


def gained(difference, half, level=0.7, n=40, **key):
    key = {"metric": "auroc", "size_mm": "10-20", "subtype": "part-solid", "a": "Real only", "b": "Real + Synth"} | key
    row = key | {"level_a": level, "difference": difference, "ci_low": difference - half, "ci_high": difference + half}
    return {"table3_differences": pd.DataFrame([row | {"n_runs": 5, "n_patients": n}])}


def test_more_patients_count_before_fewer():
    few, many = gained(0.2, 0.05, n=14), gained(0.1, 0.05, n=49)
    row = one(
        {"a/quick/tables": few, "b/quick/tables": many, "c/quick/tables": few}, "raise AUROC of part-solid, 10-20"
    )
    assert row.ours == pytest.approx(0.1)
    assert row.based_on == "b/quick/tables/table3_differences.csv, 49 patients, 5 runs"


@pytest.mark.parametrize("blind", [gained(0, 0), gained(0.001, 0.01, level=0.99)], ids=["no width", "no room to gain"])
def test_where_nothing_could_be_gained_nothing_is_contradicted(blind):
    words = "raise AUROC of part-solid, 10-20"
    row = one({"a/quick/tables": blind}, words)
    assert row.verdict == UNTESTED and "room" in row.based_on
    assert one({"a/quick/tables": blind, "lidc-mini/quick/tables": gained(0.1, 0.05)}, words).verdict == SUPPORTED


def test_a_class_of_few_patients_decides_nothing():
    words, few = "raise AUROC of part-solid, 10-20", gained(0.1, 0.05)
    few["table3_differences"]["n_patients_rarer"] = 7
    assert one({"a/quick/tables": few}, words).verdict == UNTESTED
    row = one({"a/quick/tables": few, "lidc-mini/quick/tables": gained(0.2, 0.05)}, words)
    assert row.verdict == SUPPORTED and row.based_on.startswith("lidc-mini")


def test_a_fall_that_cannot_be_as_deep_as_the_papers_is_no_evidence():
    key = {"subtype": "ground-glass", "metric": "auroc", "a": "Clinical (n%)", "retention_a": 1.0}
    key |= {"b": "Clinical (n%)", "retention_b": 0.1, "n_runs": 3, "n_patients": 26}
    for level, verdict in ((0.07, UNTESTED), (0.6, UNTESTED), (0.9, SUPPORTED)):
        row = key | {"level_a": level, "difference": 0.05, "ci_low": 0.02, "ci_high": 0.08}
        found = one({"a/quick/tables": {"fig7_differences": pd.DataFrame([row])}}, "AUROC of ground-glass hardly falls")
        assert found.verdict == verdict


def test_no_verdict_on_a_difference_that_the_paper_itself_does_not_have():
    rules = [rule for rule in load_rules() if "raise AUROC of part-solid, 10-20" in rule.claim]
    nil = [replace(rules[0], paper="0.0")]
    row = claims.claims_table({"a/quick/tables": gained(0.1, 0.05)}, nil).iloc[0]
    assert row.verdict == UNTESTED and "no difference" in row.based_on and np.isnan(row.ours)


@pytest.mark.parametrize(
    ("value", "half", "effect", "said"),
    [
        (-0.01, 0.05, np.nan, "other side"),  # more cases would not bring it over
        (0.01, 0.05, np.nan, "it would take "),
        (0.01, 0.05, 0.05, "times as many cases"),
        (1e-5, 1.0, 1e-5, "out of reach"),
        (0.02, 0.021, 0.5, "n is enough, but"),
    ],
)
def test_what_an_undecided_claim_would_take(value, half, effect, said):
    assert said in claims._needed(ABOVE, Evidence(value, value - half, value + half), effect, 1)


def test_an_effect_of_the_claimed_sign_that_is_too_small_looks_different():
    small = claims.claims_table({"lidc-cubes/quick/tables": fidelity(-0.05, 0.04)})
    assert "🟧 **contradicted**" in claims.sentences(small) and claims.TOO_SMALL in claims.sentences(small)
    assert "🟧" not in claims.sentences(claims.claims_table({"lidc-cubes/quick/tables": fidelity(0.6)}))


def test_sentences_are_grouped_coloured_and_linked():
    table = claims.claims_table({"lidc-mini/quick/tables": fidelity(-0.1, 0.6)})
    text = claims.sentences(table)
    assert text.count("#### ") == table["section"].nunique() and text.count("⬜") == len(table) - 1
    line = next(line for line in text.splitlines() if "🟨" in line)
    assert (
        "[lidc-mini/quick/tables/table1_differences.csv](../../../lidc-mini/quick/tables/table1_differences.csv)"
        in line
    )
    assert (
        "here -0.05 (-0.35 to +0.25); paper -0.249 (no interval printed); it would take 3 times as many cases" in line
    )


def test_tables_are_gathered_from_all_runs_but_smoke(tmp_path):
    for folder in ("mine/quick/tables", "mine/smoke/tables", "released/x/tables", "released/lambda"):
        (tmp_path / folder).mkdir(parents=True)
        fidelity(1)["table1_fidelity"].to_csv(tmp_path / folder / "table1_fidelity.csv", index=False)
    found = claims.gather(tmp_path)
    assert list(found) == ["mine/quick/tables", "released/lambda"] and list(found["mine/quick/tables"]) == [
        "table1_fidelity"
    ]
    assert list(claims.gather(tmp_path, [tmp_path / "mine/smoke/tables"])) == ["mine/smoke/tables"]
