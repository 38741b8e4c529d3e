"""The README's numbers are those of the committed results."""

import io
import itertools
import re
import subprocess
import tarfile

import pandas as pd
import pytest

from scripts import update_readme
from study.profiles import get_profile
from study.report.provenance import write_provenance
from tests.conftest import ROOT


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with two systems and one notebook of 90 s."""
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(update_readme.paths, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "ARTEFACTS", {"05_fidelity": ("Table 1", "tables/table1_fidelity.csv")})
    folder = tmp_path / "results" / "lidc-mini" / "quick"
    cost = {"wall_time_s": {"05_fidelity": 90.0}, "peak_memory_mb": {"05_fidelity": 1536}}
    write_provenance(folder, get_profile("quick"), "lidc-mini", 0, **cost)
    fidelity = [
        (system, "net", metric, plane, value, value / 2, value * 2, 7, 9)
        for system, value in (("real", 0.001), ("hr-ldm", 0.002))
        for metric in ("fid", "kid", "mmd")
        for plane in ("axial", "average")
    ]
    lesions = [
        (s, "all", m, v, v, v, 9) for s in ("real", "hr-ldm") for m, v in (("jsd", 0.1), ("wasserstein_hu", 40.2))
    ]
    control = [("hr-ldm", "all", "mean_hu", 0.97, 1.0, 0.95, 18), ("hr-ldm", "all", "sd_hu", 0.5, 1.0, 0.4, 18)]
    inside = [("maisi-ddpm", "hr-ldm", m, 2.5, 1.0, 4.0, 0.01, 9) for m in ("jsd", "wasserstein_hu", "sd_hu")]
    features = [
        ("kid", p, -0.5, -1.0, 0.5, 0.3, a, "hr-ldm") for p in ("axial", "average") for a in ("maisi-ddpm", "x")
    ]
    tables = {
        "table1_fidelity": (fidelity, "system extractor metric plane value ci_low ci_high n_real n_synthetic"),
        "lesion_histograms": (lesions, "system subtype metric value ci_low ci_high n"),
        "control_summary": (control, "system subtype quantity slope intercept r2 n"),
        "lesion_differences": (inside, "a b metric difference ci_low ci_high p n"),
        "table1_differences": (features, "metric plane difference ci_low ci_high p a b"),
        "triplets_summary": (
            [("hr-ldm", "requested", 1.0, 0.9, 1.0, 20), ("hr-ldm", "obtained", 0.95, 0.76, 0.99, 20)],
            "system side value ci_low ci_high n",
        ),
        "separability": ([("autoencoder", "net", 0.6123, 9), ("hr-ldm", "net", 0.8, 9)], "system extractor auroc n"),
        "ablations": (
            [
                ("c_hist x L_hist", level, m + d, v, v / 2, 2 * v, 3)
                for level, v in (("both (default)", 0.1), ("neither", 0.2))
                for m in ("jsd", "wasserstein_hu", "sd_ratio")
                for d in (("",) if "default" in level else ("", "_difference"))
            ],
            "factor level metric value ci_low ci_high n_seeds",
        ),
        "table2_turing": (
            [
                ("net", "cropped", "real", 30, 10),
                ("net", "cropped", "synthetic", 15, 25),
                ("net", "full_context", "real", 20, 20),
                ("net", "full_context", "synthetic", 20, 20),
            ],
            "observer condition truth called_real called_synthetic",
        ),
        "table3_subtype": (
            [
                ("auroc", size, kind, arm, mean, 0.02, 5, 12, p, p)
                for size in ("6-10", "20-30")
                for kind in update_readme.SUBTYPES
                for arm, mean, p in (("Real only", 0.7, None), ("Real + Synth", 0.75, 0.0317))
                if (size, kind) != ("20-30", "ground-glass")
            ]
            + [
                ("auroc", "20-30", "ground-glass", arm, None, None, 5, 12, None, None)
                for arm in ("Real only", "Real + Synth")
            ],
            "metric size_mm subtype arm mean sd n_runs n_patients p_mann_whitney p_bootstrap",
        ),
        "fig7_scarcity": (
            [
                ("part-solid", metric, r, arm, m, m - 0.1, m + 0.1, 1)
                for metric, m in (("auroc", 0.7), ("auprc", 0.3))
                for r in (1.0, 0.1, 0.0)
                for arm in ("Clinical (n%)", "Clinical (n%) + Synth (100%)")
            ],
            "subtype metric retention arm mean ci_low ci_high n_runs",
        ),
        "fig8_malignancy": ([("scratch", 0.61, 0.5, 0.7, 5, 43)], "arm auroc ci_low ci_high n_runs n_patients"),
        "claims": ([("a", "supported"), ("b", "not supported"), ("c", "supported")], "claim verdict"),
    }
    (folder / "tables").mkdir()
    for name, (rows, columns) in tables.items():
        pd.DataFrame(rows, columns=columns.split()).to_csv(folder / "tables" / f"{name}.csv", index=False)
    bench = [(b, v, t, 10 * t, t, "cpu") for b in update_readme.COMPARED for v, t in (("ours", 1.0), ("other", 12.5))]
    (tmp_path / "results" / "bench").mkdir()
    columns = "benchmark variant time_s peak_mb ratio device".split()
    pd.DataFrame(bench, columns=columns).to_csv(tmp_path / "results" / "bench" / "core.csv", index=False)
    bench = [("algorithm_2", "own_crop", 0.5, 100.0, 1.0, "cpu"), ("algorithm_2", "whole_body", 50.0, 2048.0, 100.0, "cpu"),
             ("insert_file", "9x9x9", 4.0, 512.0, 1.0, "cpu"), ("count", "16", 8.0, 512.0, 1.0, "cpu")]  # fmt: skip
    pd.DataFrame(bench, columns=columns).to_csv(tmp_path / "results" / "bench" / "insert.csv", index=False)
    (tmp_path / "results" / "insert" / "scan").mkdir(parents=True)
    summary = [("all", 200, 1, 0.97, 1.01, 0.995, 0.0071, 0, 1.84), ("solid", 67, 0, 1.0, 1.0, 0.99, 0.006, 0, 1.8)]
    columns = "subtype n failures least_share_in_lung slope r2 median_jsd missed_wish seconds_each".split()
    pd.DataFrame(summary, columns=columns).to_csv(tmp_path / "results" / "insert" / "scan" / "summary.csv", index=False)
    return folder


def cells(block: str, row: int) -> list[str]:
    return [cell.strip() for cell in block.splitlines()[row].strip("|").split("|")]


def test_blocks_hold_ours_with_interval_and_the_papers_value(results):
    block = update_readme.fidelity(results)
    assert "FID, net, n = 9" in block and "n_real" not in block
    assert (
        cells(block, 2)[:3] == ["real, floor", "0.001 (0.0005 to 0.002)", "1 (0.5 to 2)"] and cells(block, 2)[4] == ""
    )
    assert cells(block, 3)[1:] == ["0.002 (0.001 to 0.004)", "2 (1 to 4)", "0.2 (0.1 to 0.4)", "2.9", "1.1", "0.651"]
    assert cells(update_readme.lesions(results), 3) == [
        "hr-ldm", "0.100 (0.100 to 0.100)", "40 (40 to 40)", "0.97", "0.950",
    ]  # fmt: skip
    assert cells(update_readme.claims(results), 2) == ["supported", "2"]


def test_regularisation_is_said_with_its_paired_interval(results):
    lines = update_readme.regularisation(results).splitlines()
    assert [line.split(",")[0] for line in lines] == ["- JSD", "- Wasserstein distance", "- KID"]
    assert "+2.5 HU (95 % interval +1 to +4, p = 0.01, n = 9): maisi-ddpm is closer" in lines[1]
    assert "-0.5 (95 % interval -1 to +0.5, p = 0.3, n = 9): no difference seen" in lines[2]


def test_minutes_and_memory_come_from_provenance(results):
    block = update_readme.artefacts(results)
    link = "[`table1_fidelity.csv`](lidc-mini/quick/tables/table1_fidelity.csv)"
    assert cells(block, 2) == ["Table 1", "`05_fidelity`", link, "`make 05_fidelity`", "1.5", "1.5 GB"]
    assert cells(block, 3)[3:5] == ["`make reproduce`", "2"]


def test_benchmarks_are_ratios_of_the_other_to_ours(results):
    block = update_readme.benchmarks(results)
    assert cells(block, 2)[1:] == ["12.5 s against 1 s", "12 ×", "12 ×"]


def test_insertions_and_their_cost(results):
    block = update_readme.inserting(results)
    assert cells(block, 2)[1:] == ["0.5 s", "0.098 GB"] and cells(block, 4)[1:] == ["100 ×", "20 ×"]
    assert cells(block, 5)[0].endswith("9x9x9 voxels") and cells(block, 6)[0] == "nodules in one call: 16"
    block = update_readme.insertions(results)
    link = "[scan](insert/scan/contact_sheet.png)"
    assert cells(block, 2) == [link, "all", "200", "1", "97%", "1.01, 0.995", "0.007", "1.8"]
    assert cells(block, 3)[:3] == ["", "solid", "67"]


def test_the_released_network_in_one_table_its_steps_and_its_curve(results):
    control = pd.read_csv(results / "tables" / "control_summary.csv")
    control = pd.concat([control, *(control.assign(subtype=s) for s in update_readme.SUBTYPES)])
    control.to_csv(results / "tables" / "control_summary.csv", index=False)
    median = pd.DataFrame([("real", "all", 0.05), ("hr-ldm", "all", 0.08)], columns=["system", "subtype", "jsd"])
    median.to_csv(results / "tables" / "median_jsd.csv", index=False)
    block = update_readme.released(results)
    fit = ["0.97, 0.950"] * 3
    assert cells(block, 2) == ["real, floor", "0.100 (0.100 to 0.100)", "0.050", "", "", "", "", ""]
    assert cells(block, 3) == ["hr-ldm", "0.100 (0.100 to 0.100)", "0.080", *fit, "95% of 20", "0.80"]
    head = "where histogram steps n jsd jsd_median wasserstein_hu roughness_ratio auroc jsd_minus_25 jsd_low jsd_high".split()
    rows = [("displaced", "imposed", 4, 71, 0.05, 0.04, 45.4, 0.97, 0.7, 0.001, -0.002, 0.004)]
    rows += [("displaced", "imposed", 25, 71, 0.049, 0.04, 45, 0.9, 0.71)]
    pd.DataFrame(rows, columns=head).to_csv(results / "steps.csv", index=False)
    block = update_readme.steps(results)
    assert cells(block, 2)[:7] == ["displaced, n = 71", "imposed", "4", "0.050", "0.040", "45", "0.97"]
    assert cells(block, 2)[7:] == ["0.70", "+0.0010 (-0.0020 to +0.0040)"]
    assert cells(block, 3)[3] == "0.049" and cells(block, 3)[8] == ""
    rows = [("displaced", True, weight, seed, jsd, 40.0, 0.9, 0.8, 71) for weight in (0, 10) for seed, jsd in ((0, 0.05), (1, 0.06))]  # fmt: skip
    head = "where template lambda seed jsd wasserstein_hu sd_ratio roughness_ratio n".split()
    (results / "lambda").mkdir()
    pd.DataFrame(rows, columns=head).to_csv(results / "lambda" / "lambda.csv", index=False)
    rows = [("displaced", True, m, 0.01, 0.005, 0.02, 0.01, 71, 3, 0.04) for m in ("jsd", "roughness_ratio")]
    head = "where template metric difference ci_low ci_high p n seeds p_holm".split()
    pd.DataFrame(rows, columns=head).to_csv(results / "lambda" / "lambda_differences.csv", index=False)
    block = update_readme.lambdas(results)
    assert cells(block, 3) == ["displaced, n = 71", "with", "10", "0.055", "40", "0.90", "0.80"]
    assert block.splitlines()[5:] == [
        "- JSD, displaced, with template, λ = 10 minus λ = 0: +0.01 (95 % interval +0.005 to +0.02, p = 0.01, n = 71): λ = 0 is closer."
    ]
    curve = pd.DataFrame([(500, 40, 0.2, 0.15, 50.4, 0.7), (7000, 40, 0.1, 0.08, 20.4, 0.9)])
    curve.columns = "steps n jsd jsd_median mean_error_hu roughness_ratio".split()
    curve.to_csv(results / "curve.csv", index=False)
    assert cells(update_readme.curve(results), 3) == ["7,000", "0.100", "0.080", "20", "0.90"]


def test_told_from_real_has_a_row_a_system_and_a_column_a_model(results):
    rows = [
        (s, f, m, 0.6 + 0.1 * i, 0.5, 0.9, -0.1, -0.2, 0.01, 70, 50)
        for i, s in enumerate(("transplant", "released"))
        for f in ("inside", "inside_isotropic", "edge")
        for m in ("logistic", "forest")
    ]
    head = "system features model auroc ci_low ci_high minus_texture minus_low minus_high n_nodules n_patients".split()
    pd.DataFrame(rows, columns=head).to_csv(results / "tables" / "realism.csv", index=False)
    block = update_readme.told(results)
    assert cells(block, 0)[0] == "n = 70, 50 patients" and cells(block, 0)[4] == "inside, without anisotropy: forest"
    assert cells(block, 2) == ["real lesion, pasted", *["0.60 (0.50 to 0.90)"] * 6]
    assert cells(block, 3)[1] == "0.70 (0.50 to 0.90)"
    said = block.splitlines()[-1]
    assert said.count("-0.10 (-0.20 to +0.01)") == 4 and "AUROC: inside, logistic -0.10" in said and "edge" not in said


def test_control_separability_and_the_two_by_two(results):
    assert cells(update_readme.control(results), 2) == ["hr-ldm", "0.97, 0.950", "95% (76% to 99%)"]
    assert cells(update_readme.control(results), 0) == [
        "system",
        "all: slope, R², n = 18",
        "three subtypes in order, n = 20",
    ]
    assert cells(update_readme.separability(results), 2) == ["autoencoder, floor", "0.61"]
    block = update_readme.two_by_two(results)
    assert cells(block, 0)[0] == "level, 3 seeds"
    assert cells(block, 2)[1] == "0.100 (0.050 to 0.200)" and cells(block, 2)[4] == ""
    assert cells(block, 3)[0] == "neither" and cells(block, 3)[4] == "+0.2000 (+0.1000 to +0.4000)"


def test_power_is_told_as_a_share_of_the_real_one(results):
    rows = [("real", 0.1, 50.0), ("real", 0.5, 4.0), ("released", 0.1, 25.0), ("released", 0.5, 5.0)]
    table = pd.DataFrame(rows, columns=["system", "cycles_per_mm", "power_hu2"])
    table.to_csv(results / "tables" / "power_spectrum.csv", index=False)
    block = update_readme.grain(results)
    assert cells(block, 0) == ["power, real = 1", "0.10 / mm", "0.50 / mm"]
    assert cells(block, 2) == ["hr-ldm, histogram imposed, grain (ours)", "0.50", "1.25"]


def test_downstream_tables_stand_beside_the_papers(results):
    block = update_readme.turing(results)
    assert cells(block, 2) == ["paper: radiologist", "66% (56% to 75%), n = 100", "56% (46% to 65%), n = 100"]
    assert cells(block, 3)[1].startswith("69% (58% to 78%), n = 80") and cells(block, 3)[2].startswith("50%")
    block = update_readme.subtype(results)
    row = [
        "part-solid, 20-30 mm",
        "12",
        "0.700 ± 0.020",
        "0.750 ± 0.020",
        "0.032",
        "0.750 ± 0.030",
        "0.831 ± 0.030",
        "0.006",
    ]
    assert cells(block, 6) == row and cells(block, 7)[2:5] == ["", "", ""] and cells(block, 7)[7] == "0.004"
    block = update_readme.scarcity(results)
    assert cells(block, 2) == ["part-solid", *["0.70 (0.60 to 0.80)"] * 4]
    assert cells(block, 3) == ["paper: part-solid", "about 0.80", "about 0.64", "about 0.80", "about 0.80"]
    assert cells(update_readme.malignancy(results), 2) == ["scratch", "0.61 (0.50 to 0.70)", "0.569 ± 0.017"]


def test_the_verdict_is_of_both_against_c_hist_alone(results):
    table = pd.read_csv(results / "tables" / "ablations.csv")
    rows = [("c_hist x L_hist", "c_hist only", m, *v, 3) for m, v in (
        ("jsd", (0.11, 0.1, 0.2)), ("jsd_difference", (0.01, -0.02, 0.03)), ("sd_ratio", (0.9, 0.8, 1.0)),
        ("sd_ratio_difference", (-0.05, -0.07, -0.02)))]  # fmt: skip
    table = pd.concat([table, pd.DataFrame(rows, columns=table.columns)])
    table.loc[(table.metric == "sd_ratio") & (table.level == "both (default)"), "value"] = 0.95
    table.to_csv(results / "tables" / "ablations.csv", index=False)
    said = update_readme.verdict(results)
    assert "ℒ_hist does not change the HU histogram" in said and "JSD 0.100 with it and 0.110 without" in said
    assert "difference -0.0100, 95 % interval -0.0300 to +0.0200, n = 9, 3 seeds" in said
    assert "95.0 % of the real one with it and 90.0 % without (difference +5.0 points, +2.0 to +7.0), nearer to" in said


def test_only_the_blocks_change_and_an_absent_marker_is_named(results):
    blocks = {name: block for name, block in update_readme.BLOCKS.items() if block[1] == update_readme.MINI}
    results = results.parents[1]
    text = "before\n" + "".join(f"<!-- {n} -->\nSTALE\n<!-- /{n} -->\nprose of {n}\n" for n in blocks)
    new = update_readme.updated(text, results, blocks)
    assert "STALE" not in new and new.startswith("before\n") and all(f"prose of {n}" in new for n in blocks)
    assert update_readme.updated(new, results, blocks) == new
    with pytest.raises(ValueError, match="<!-- claims -->"):
        update_readme.updated(text.replace("claims", "other"), results, blocks)


def test_committed_readme_is_what_the_committed_results_say(tmp_path):
    """As of the commit: `make reproduce` puts the user's own numbers into results/."""
    done = subprocess.run(["git", "archive", "HEAD", "README.md", "results"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("no repository here")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tmp_path, filter="data")
    for file, blocks in (("README.md", update_readme.FRONT_BLOCKS), ("results/README.md", update_readme.BLOCKS)):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert update_readme.updated(text, tmp_path / "results", blocks) == text, "run python -m scripts.update_readme"


def test_every_link_of_the_readmes_leads_somewhere():
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = file.read_text(encoding="utf-8")
        links = itertools.chain(*re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text))
        for link in (link for link in links if link and not link.startswith("http")):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            assert target.exists(), f"{file.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, f"{file.name}: {link}"
