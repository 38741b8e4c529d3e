"""Tables: what is written is what was given, and what does not fit the schema is refused before anything is written."""

import pandas as pd
import pytest

from study.report import tables
from study.report.tables import SCHEMAS, artefacts, save_table


def read(folder, name) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / f"{name}.csv")


def fidelity() -> pd.DataFrame:
    rows = [
        (system, "efficientnet-lite0", metric, plane, value + 0.25, value, value + 0.5, 150, 150)
        for system, value in (("real", 1.0), ("hr-ldm", 3.0))
        for metric in ("fid", "kid")
        for plane in ("axial", "average")
    ]
    return pd.DataFrame(rows, columns=SCHEMAS["table1_fidelity"].columns)


def test_round_trip_keeps_values_and_column_order(tmp_path):
    table = fidelity()
    save_table(table[table.columns[::-1]], tmp_path, "table1_fidelity")
    pd.testing.assert_frame_equal(read(tmp_path, "table1_fidelity"), table, check_dtype=False)


def shown(folder, name) -> list[list[str]]:
    """The lines of a table's view, those of a Markdown table cut into cells."""
    lines = (folder / "tables" / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line and not line.startswith("|:")]


def test_view_has_one_row_per_system_with_extractor_and_n_in_each_title(tmp_path):
    save_table(fidelity(), tmp_path, "table1_fidelity")
    heading, titles, real, ours, note = shown(tmp_path, "table1_fidelity")
    assert heading == ["# [table1_fidelity](table1_fidelity.csv)"]
    assert titles[1:] == [f"{m}, efficientnet-lite0, n synthetic = 150" for m in ("FID", "KID × 10³")]
    assert real == ["real (floor)", "1.25 (1 to 1.5)", "1,250 (1,000 to 1,500)"]
    assert ours == ["hr-ldm", "3.25 (3 to 3.5)", "3,250 (3,000 to 3,500)"]
    assert note == ["plane = average, n real = 150"]


def test_long_view_names_units_and_systems_signs_differences_and_says_constants_below(tmp_path):
    rows = [("maisi-ddpm", "hr-ldm-matched", m, -0.5, -1, 0.5, 0.25, n) for m, n in (("kid", 7), ("wasserstein_hu", 9))]
    columns = "a b metric difference ci_low ci_high p n".split()
    save_table(pd.DataFrame(rows, columns=columns), tmp_path, "lesion_differences")
    system = ["hr-ldm, histogram imposed (ours)", "maisi-ddpm"]
    assert shown(tmp_path, "lesion_differences")[1:] == [
        ["system", "minus", "metric", "difference", "p"],
        [*system, "KID × 10³", "-500 (-1,000 to +500)", "0.25"],
        [*system, "Wasserstein distance, HU", "-0.5 (-1 to +0.5)", "0.25"],
        ["n = 7 to 9"],
    ]


def test_differences_to_several_arms_stand_side_by_side(tmp_path):
    rows = [
        ("auroc", "6-10", "solid", arm, "Real + Synth", d, d - 1, d + 1, 9, 4)
        for arm, d in (("Real only", 2), ("Class weights", -1))
    ]
    columns = "metric size_mm subtype a b difference ci_low ci_high n_patients n_patients_rarer".split()
    save_table(pd.DataFrame(rows, columns=columns), tmp_path, "table3_differences")
    _, titles, cells, *_ = shown(tmp_path, "table3_differences")
    assert titles[5:] == ["difference, minus Real only", "difference, minus Class weights"]
    assert cells[5:] == ["+2 (+1 to +3)", "-1 (-2 to +0)"]


def test_view_joins_sds_leaves_out_empty_columns_and_shows_no_row_twice(tmp_path):
    rows = [
        ("auroc", "6-10", "solid", arm, 0.75, 0.125, 5, 12, 4, p, p) for arm, p in (("Real only", None), ("Both", 0.5))
    ]
    save_table(pd.DataFrame(rows, columns=SCHEMAS["table3_subtype"].columns), tmp_path, "table3_subtype")
    titles, row, note = shown(tmp_path, "table3_subtype")[1:]
    assert titles == [
        *"metric|size, mm|subtype|n patients|Real only|Both|p Mann Whitney, Both|p bootstrap, Both".split("|")
    ]
    assert row == ["AUROC", "6-10", "solid", "12", "0.75 ± 0.125", "0.75 ± 0.125", "0.5", "0.5"]
    assert note == ["n runs = 5, n positive = 4"]


def test_another_table_under_a_known_name_is_shown_in_its_long_form(tmp_path):
    save_table(pd.DataFrame({"where": ["here", "there"], "n": [1, 2]}), tmp_path, "steps")
    assert shown(tmp_path, "steps")[1:] == [["where", "n"], ["here", "1"], ["there", "2"]]


@pytest.mark.parametrize(("dataset", "labelled"), [("lidc-mini", True), ("lidc-cubes", False)])
def test_view_says_semi_synthetic_where_it_is(tmp_path, dataset, labelled):
    folder = tmp_path / dataset / "quick"
    save_table(fidelity(), folder, "table1_fidelity")
    assert ("Semi-synthetic" in (folder / "tables" / "table1_fidelity.md").read_text(encoding="utf-8")) is labelled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="ci_low"), r"missing columns \['ci_low'\]"),
        (lambda t: t.assign(mood=1), r"unknown columns \['mood'\]"),
        (lambda t: t.rename(columns={"value": "vale"}), r"missing columns \['value'\]; unknown columns \['vale'\]"),
        (lambda t: t.assign(plane="oblique"), r"'plane' holds \['oblique'\]"),
        (lambda t: t.assign(ci_low=9.0), r"ci_low > ci_high in rows \[0, 1, 2"),
        (lambda t: t.iloc[:0], "no rows"),
    ],
)
def test_misfit_is_refused_with_all_differences_and_nothing_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_table(change(fidelity()), tmp_path, "table1_fidelity")
    assert not list(tmp_path.rglob("*.csv"))


def test_a_new_table_is_kept_as_it_comes(tmp_path):
    counts = pd.DataFrame({"split": ["train", "test"], "n": [3, 2]})
    save_table(counts, tmp_path, "counts")
    pd.testing.assert_frame_equal(read(tmp_path, "counts"), counts)


def test_failed_write_keeps_the_former_table(tmp_path, monkeypatch):
    path = save_table(fidelity(), tmp_path, "table1_fidelity")
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr("hrldm.atomic.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_table(fidelity().assign(n_real=7), tmp_path, "table1_fidelity")
    assert path.read_text(encoding="utf-8") == before


def test_missing_interval_leaves_the_value_alone_and_long_tables_are_cut(tmp_path):
    rows = [("lambda", str(i), "fid", float(i), float("nan"), float("nan"), 3) for i in range(tables.MAX_VIEW_ROWS + 5)]
    save_table(pd.DataFrame(rows, columns=SCHEMAS["ablations"].columns), tmp_path, "ablations")
    text = (tmp_path / "tables" / "ablations.md").read_text(encoding="utf-8")
    assert "nan" not in text and "5 more rows in the CSV" in text
    assert len(read(tmp_path, "ablations")) == tables.MAX_VIEW_ROWS + 5


def test_artefacts_lists_what_exists_and_not_a_failed_run(tmp_path):
    save_table(fidelity(), tmp_path, "table1_fidelity")
    for name in ("figures/fig4_synthesis.png", "runs/05_fidelity.ipynb", "runs/06_turing.ipynb.part.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 2048)
    found = artefacts(tmp_path)
    assert found["file"].tolist() == [
        "tables/table1_fidelity.csv",
        "figures/fig4_synthesis.png",
        "runs/05_fidelity.ipynb",
    ]
    assert found["rows"].tolist()[0] == 8 and found["size_kb"].tolist()[1:] == [2.0, 2.0]


def test_the_end_of_a_run_says_the_verdicts_and_where_everything_lies(tmp_path, capsys):
    save_table(fidelity(), tmp_path, "table1_fidelity")
    measured = ("Table 1", "FID is lower", -0.3647, -2.5201661, -3.1650212, -1.5, 0.01)
    claim = (*measured, "supported", "", "no interval printed", "table1_fidelity")
    save_table(pd.DataFrame([claim], columns=SCHEMAS["claims"].columns), tmp_path, "claims")
    tables.main(str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith("claims: 1 supported\n") and "11_claims.ipynb" in said
    assert f"   2 tables in {tmp_path / 'tables'}" in said
    assert "not there: autoencoder, lesion_histograms" in said
