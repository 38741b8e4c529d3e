"""What the READMEs say is what the committed results give, and their links lead somewhere."""

import itertools
import re
import subprocess

import pandas as pd
import pytest

from study.__main__ import claims
from study.report import record
from tests.conftest import ROOT

FINDINGS = " ".join((ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[0].split())
CONTROL = "system == 'hr-ldm' and quantity == 'mean_hu' and subtype == '{}'"
JSD = "subtype == '{}' and metric == 'jsd' and system == '{}'"
DISPLACED = "where == 'displaced' and template and "
OUT = "released/displaced/tables/"  # in healthy lung, out of their own place
IN_FILE = "released/in_file/1x1x1/tables/realism"
TOLD = "features == '{}' and model == '{}' and system == '{}'"
MINUS = "{minus_texture:+.2f}, {minus_low:+.2f} to {minus_high:+.2f}"
SCARCE = (
    "metric == 'auroc' and subtype == '{}' and retention_a == 0.1 and retention_b == 0.1 and a == 'Clinical (n%)' and "
    "b == 'Clinical (n%) + Synth (100%)'"
)
SMALL = "metric == 'auroc' and size_mm == '6-10' and subtype == 'ground-glass' and a == 'Real only'"
KEPT = "metric == 'auroc' and subtype == '{}' and retention == {} and arm == '{}'"
GAIN = "{difference:+.2f} ({ci_low:+.2f} to {ci_high:+.2f})"
KID = "claim == \"HR-LDM's KID is lower than that of {} as built here, average (share of that system's)\""
CASES = [  # file below results/, its row (of several seeds the mean), and the words with its figures
    (OUT + "control_summary", CONTROL.format("solid"), "R² {r2:.2f} (56 solid)"),
    (OUT + "control_summary", CONTROL.format("part-solid"), "{r2:.2f} (10 part-solid)"),
    (OUT + "control_summary", CONTROL.format("ground-glass"), "{r2:.2f} (5 ground-glass"),
    (OUT + "lesion_histograms", JSD.format("solid", "hr-ldm"), "({n:.0f} solid)"),
    (OUT + "lesion_histograms", JSD.format("part-solid", "hr-ldm"), "({n:.0f} part-solid)"),
    (OUT + "lesion_histograms", JSD.format("ground-glass", "hr-ldm"), "({n:.0f} ground-glass"),
    (OUT + "lesion_histograms", JSD.format("all", "hr-ldm"), "JSD {value:.3f} ({ci_low:.3f} to {ci_high:.3f}), of which"),
    (OUT + "lesion_histograms", JSD.format("all", "autoencoder"), "the autoencoder alone leaves {value:.3f}"),
    (OUT + "realism", TOLD.format("inside", "forest", "hr-ldm"), "{n_nodules:.0f} nodules of {n_patients:.0f} test patients"),
    ("released/lambda/lambda_differences", DISPLACED + "metric == 'jsd'", "without: JSD {difference:+.4f} ({ci_low:+.4f} to {ci_high:+.4f})"),
    ("released/lambda/lambda_differences", DISPLACED + "metric == 'jsd'", "the {n:.0f} nodules of claim 1, {seeds:.0f} seeds)"),
    ("released/lambda/lambda_differences", DISPLACED + "metric == 'wasserstein_hu'", "distance {difference:+.1f} HU ({ci_low:+.1f} to {ci_high:+.1f})"),
    ("released/lambda/lambda", DISPLACED + "`lambda` == 0", "of {jsd:.3f}, Wasserstein"),
    ("released/lambda/lambda", DISPLACED + "`lambda` == 0", "of {wasserstein_hu:.0f} (an exact"),
    (OUT + "lesion_histograms", "subtype == 'all' and metric == 'wasserstein_hu' and system == 'released'", "exact histogram leaves {value:.0f}, since"),
    ("released/lambda/lambda_differences", DISPLACED + "metric == 'sd_ratio'", "lesions {difference:+.3f} ({ci_low:+.3f} to {ci_high:+.3f}) of"),
    ("released/lambda/lambda", DISPLACED + "`lambda` == 0", "towards it from {sd_ratio:.2f} (the"),
    ("lidc-cubes/quick/tables/ablations", "factor == 'c_hist x L_hist' and level == 'c_hist only' and metric == 'jsd_difference'",
     "changes JSD by {value:+.4f} ({ci_low:+.4f} to {ci_high:+.4f}), {n_seeds:.0f} seeds"),
    ("claims", KID.format("maisi-ddpm"), "differs by {ours:+.3f} ({ci_low:+.3f} to {ci_high:+.3f}; paper {published:+.3f})"),
    ("claims", KID.format("diff-tumor"), "DiffTumor's, by {ours:+.3f} ({ci_low:+.3f} to {ci_high:+.3f}) of"),
    ("lidc-cubes/quick/tables/table1_fidelity", "system == 'hr-ldm' and metric == 'kid' and plane == 'average'", "MAISI-DDPM's, {n_synthetic:.0f} nodules"),
    (OUT + "realism", TOLD.format("inside_isotropic", "logistic", "hr-ldm"), "regression {auroc:.2f} (" + MINUS + ", to the texture)"),
    (OUT + "realism", TOLD.format("inside_isotropic", "forest", "hr-ldm"), "forest {auroc:.2f} (" + MINUS + "); with them"),
    (OUT + "realism", TOLD.format("inside", "logistic", "hr-ldm"), "with them {auroc:.2f} (" + MINUS + ") and"),
    (OUT + "realism", TOLD.format("inside", "forest", "hr-ldm"), "and {auroc:.2f} (" + MINUS + "). What"),
    (IN_FILE, TOLD.format("inside_isotropic", "logistic", "inserted"), "without them, {auroc:.2f} ({ci_low:.2f} to {ci_high:.2f}) and"),
    (IN_FILE, TOLD.format("inside_isotropic", "forest", "inserted"), "and {auroc:.2f} ({ci_low:.2f} to {ci_high:.2f}), to"),
    (IN_FILE, TOLD.format("inside_isotropic", "logistic", "inserted"), "texture {minus_texture:+.2f} ({minus_low:+.2f} to {minus_high:+.2f}) and"),
    (IN_FILE, TOLD.format("inside_isotropic", "forest", "inserted"), "and {minus_texture:+.2f} ({minus_low:+.3f} to {minus_high:+.3f}); with"),
    (IN_FILE, TOLD.format("inside", "logistic", "inserted"), "with them {auroc:.2f} and"),
    (IN_FILE, TOLD.format("inside", "forest", "inserted"), "and {auroc:.2f}. The"),
    (IN_FILE.replace("1x1x1", "0.7x0.7x3"), TOLD.format("inside", "logistic", "inserted"), "texture: {auroc:.2f} and"),
    (IN_FILE.replace("1x1x1", "0.7x0.7x3"), TOLD.format("inside", "forest", "inserted"), "and {auroc:.2f}. 5."),
    (IN_FILE, TOLD.format("inside", "forest", "inserted"), "The {n_nodules:.0f} nodules of claim 1, seen"),
    ("lidc-vois/quick/tables/fig7_differences", SCARCE.format("ground-glass"), f"by {GAIN} for ground-glass (17"),
    ("lidc-vois/quick/tables/fig7_differences", SCARCE.format("ground-glass"), "of {n_patients_rarer:.0f} patients, 8"),
    ("lidc-vois/quick/tables/fig7_differences", SCARCE.format("solid"), f"by {GAIN} for solid"),
    ("lidc-vois/quick/tables/fig7_differences", SCARCE.format("part-solid"), f"by {GAIN} for part-solid"),
    ("lidc-vois/quick/tables/fig7_scarcity", KEPT.format("part-solid", 1, "Clinical (n%)"), "clinical data ({mean:.2f}). The"),
    ("lidc-vois/quick/tables/fig7_scarcity", KEPT.format("ground-glass", 0.1, "Mean HU alone"), "nodules has {mean:.2f},"),
    ("lidc-vois/quick/tables/fig7_scarcity", KEPT.format("solid", 0.1, "Mean HU alone"), ", {mean:.2f} and"),
    ("lidc-vois/quick/tables/fig7_scarcity", KEPT.format("part-solid", 0.1, "Mean HU alone"), "and {mean:.2f}, more"),
    ("lidc-vois/quick/tables/table3_differences", SMALL, "nodules of {n_patients_rarer:.0f} patients; by"),
]  # fmt: skip


@pytest.fixture(scope="module")
def committed():
    """The results of the repository: `make reproduce` puts the user's own in their place."""
    changed = ["git", "status", "--porcelain", "-uall", "--", "results/*.csv", "results/*.json"]
    done = subprocess.run(changed, cwd=ROOT, capture_output=True)
    if done.returncode or done.stdout:
        pytest.skip("no repository here, or other results than the committed ones")


@pytest.mark.parametrize(("file", "rows", "words"), CASES, ids=[words for _, _, words in CASES])
def test_figure_of_the_readme_is_that_of_its_table(committed, file, rows, words):
    found = pd.read_csv(ROOT / "results" / f"{file}.csv").query(rows)
    assert len(found) == (found["seed"].nunique() if "seed" in found else 1)
    figures = words.format(**found.apply(pd.to_numeric, errors="coerce").mean())
    literal = map(re.escape, re.split(r"\{.+?\}", words))
    written = re.search(r"[-+]?\d+(?:\.\d+)?".join(literal), FINDINGS)
    assert written and written[0] == figures


def test_cells_of_table_3_that_change(committed):
    table = pd.read_csv(ROOT / "results/lidc-vois/quick/tables/table3_subtype.csv")
    tested = table[(table.arm == "Real + Synth") & table.p_mann_whitney.notna()]
    changed = tested[tested.p_mann_whitney < 0.05]
    assert (
        f"{len(changed)} of {len(tested)} cells of Table 3 change by the paper's Mann–Whitney test, uncorrected"
        in FINDINGS
    )
    assert changed[["size_mm", "subtype", "n_positive"]].drop_duplicates().n_positive.tolist() == [13]
    assert f"by patients and runs, corrected, {(tested.p_bootstrap < 0.05).sum()} (" in FINDINGS


def test_record_and_views_are_what_the_tables_give(committed, capsys):
    assert record.main(check=True) == 0, f"run `python -m study record`: {capsys.readouterr().out}"


def test_verdicts_are_what_the_tables_give(committed, capsys):
    assert claims(check=True) == 0, "run `make claims`"


def test_record_names_what_is_stale_and_writes_it_unless_asked_to_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "PAGE", "# Of {{own/quick/tables: counts}}\n\nEnd\n")
    tables = tmp_path / "own" / "quick" / "tables"
    tables.mkdir(parents=True)
    (tables / "counts.csv").write_text("split,n\ntrain,3\ntest,2\n")
    assert record.main(check=True) == 1 and capsys.readouterr().out.split() == [
        "own/quick/tables/counts.md",
        "README.md",
    ]
    assert not (tmp_path / "README.md").exists()
    assert record.main() == 0 and record.main(check=True) == 0
    text = (tmp_path / "README.md").read_text()
    assert "[`own/quick/tables/counts.csv`](own/quick/tables/counts.csv)\n\n| split   | n   |" in text
    assert text.startswith("# Of [") and text.endswith("| test    | 2   |\n\nEnd\n")
    (tables / "counts.csv").write_text("split,n\ntrain,3\ntest,4\n")
    assert record.main(check=True) == 1


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_link_leads_somewhere(name):
    file = ROOT / name
    links = itertools.chain(*re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", file.read_text(encoding="utf-8")))
    for link in (link for link in links if link and not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link
