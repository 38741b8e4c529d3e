"""The tables of what synthetic nodules are good for: Tables 2 and 3, Figs. 7 and 8, beside the paper's values."""

from pathlib import Path

import pandas as pd

import scripts._study  # noqa: F401
from hrldm.config import SUBTYPES
from scripts.readme_parts import interval, markdown, read_table
from study.classify.jobs import CLINICAL, FULL, REAL_ONLY, REAL_SYNTH
from study.measure.statistics import wilson_interval
from study.report.published import load_published


def turing(results: Path) -> str:
    """Table 2: share of nodules that an observer calls rightly."""
    rows = []
    for source, name in ((load_published("table2_turing"), "paper: "), (read_table(results, "table2_turing"), "")):
        for observer, part in source.groupby("observer", sort=False):
            row = [f"{name}{observer}"]
            for condition in ("cropped", "full_context"):
                cell = part[part.condition == condition].set_index("truth")
                right = int(cell.called_real["real"] + cell.called_synthetic["synthetic"])
                n = int(cell[["called_real", "called_synthetic"]].to_numpy().sum())
                row.append(f"{interval(right / n, *wilson_interval(right, n), '.0%')}, n = {n}")
            rows.append(row)
    return markdown(rows, ["observer", "right, cropped", "right, full context"])


def subtype(results: Path) -> str:
    """Table 3: AUROC by size and subtype, without and with synthetic nodules."""
    ours, theirs = (
        t[t.metric == "auroc"].set_index(["size_mm", "subtype", "arm"])
        for t in (read_table(results, "table3_subtype"), load_published("table3_subtype"))
    )
    rows = []
    for size in ours.index.unique("size_mm"):
        for kind in SUBTYPES:
            cells = [_mean_sd(t.loc[(size, kind, arm)]) for t in (ours, theirs) for arm in (REAL_ONLY, REAL_SYNTH)]
            p, p_paper = (t.loc[(size, kind, REAL_SYNTH), "p_mann_whitney"] for t in (ours, theirs))
            n = ours.loc[(size, kind, REAL_ONLY), "n_patients"]
            rows.append((f"{kind}, {size} mm", f"{n:.0f}", *cells[:2], _p(p), *cells[2:], _p(p_paper)))
    runs = int(ours.n_runs.max())
    head = [f"AUROC, {runs} runs: {arm.lower()}" for arm in (REAL_ONLY, REAL_SYNTH)]
    paper = [f"paper: {arm.lower()}" for arm in (REAL_ONLY, REAL_SYNTH)]
    return markdown(rows, ["", "patients", *head, "p, Mann–Whitney", *paper, "paper: p"])


def scarcity(results: Path) -> str:
    """Fig. 7: AUROC with less and less clinical data, without and with all synthetic nodules."""
    columns = ((CLINICAL, 1.0), (CLINICAL, 0.1), (FULL, 0.1), (FULL, 0.0))
    ours = read_table(results, "fig7_scarcity").query("metric == 'auroc'").set_index(["subtype", "arm", "retention"])
    theirs = load_published("fig7_scarcity").query("metric == 'auroc'").set_index(["subtype", "arm", "retention"])
    rows = []
    for kind in (s for s in SUBTYPES if s in ours.index.unique("subtype")):
        found = [ours.loc[(kind, *column)] for column in columns]
        rows.append([kind, *(interval(r["mean"], r.ci_low, r.ci_high, ".2f") for r in found)])
    for kind in theirs.index.unique("subtype"):
        found = [theirs.loc[(kind, *column)] for column in columns]
        rows.append([f"paper: {kind}", *(f"{r.qualifier} {r['mean']:.2f}" for r in found)])
    head = ["all clinical", "10 % clinical", "10 % clinical + all synthetic", "synthetic only"]
    return markdown(rows, [f"AUROC, {int(ours.n_runs.max())} run(s)", *head])


def malignancy(results: Path) -> str:
    """Fig. 8: AUROC of the malignancy classifier by what its weights were trained on before."""
    ours, theirs = (t.set_index("arm") for t in (read_table(results, "fig8_malignancy"), load_published("fig8_malignancy")))  # fmt: skip
    rows = [
        (arm, interval(r.auroc, r.ci_low, r.ci_high, ".2f"), f"{theirs.auroc[arm]:.3f} ± {theirs.sd[arm]:.3f}")
        for arm, r in ours.iterrows()
    ]
    head = f"AUROC, {int(ours.n_runs.max())} runs, {int(ours.n_patients.max())} patients"
    return markdown(rows, ["weights begin from", head, "paper"])


def _mean_sd(row: pd.Series) -> str:
    return "" if pd.isna(row["mean"]) else f"{row['mean']:.3f} ± {row['sd']:.3f}"


def _p(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"
