"""`claims.csv`: each claim of the paper, the published figure, ours, and a verdict by a rule that is the same for all.

A claim is *supported* when our interval (or, for Table 3, the Holm-corrected p below 0.05 with the claimed sign) lies
wholly on the claimed side (for a claim of no difference: within 0.1 of none), *not supported* when it does not, and *cannot be tested here* when a run lacks what it takes.
"Not supported" is no refutation: at small n most intervals are wide. On `lidc-mini` every verdict says that it is
semi-synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from study.measure.statistics import wilson_interval

COLUMNS = "claim published ours ci_low ci_high verdict based_on".split()
EVIDENCE = (
    "table1_differences", "lesion_differences", "feature_awareness", "control_summary", "table2_turing", "table3_subtype",
    "fig7_scarcity", "fig8_malignancy",
)  # fmt: skip
SUPPORTED, UNSUPPORTED, UNTESTED = "supported", "not supported", "cannot be tested here"
EQUIVALENT = 0.1  # accuracy or AUROC: a claim of no difference needs its whole interval this near to zero
Tables = Mapping[str, pd.DataFrame]  # by result file, ours; an absent one makes its claims untestable


def claims_table(ours: Tables, published: Tables, semi_synthetic: bool) -> pd.DataFrame:
    """All claims. `ours` may lack tables; `published` are those of `study.report.published`.

    Besides the result files of the design, `table1_differences` (metric, plane, a, b, difference, ci_low, ci_high) and
    `lesion_differences` (metric, a, b, difference, …; b - a) are read.
    """
    rows = [
        *_fidelity(ours, published),
        *_regularisation(ours),
        *_control(ours),
        *_turing(ours, published),
        *_subtype(ours, published),
        *_scarcity(ours, published),
        *_malignancy(ours, published),
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    if semi_synthetic:
        tested = table["verdict"] != UNTESTED
        table.loc[tested, "verdict"] += " (semi-synthetic)"
    return table


def _row(claim: str, published: object, ours: float, low: float, high: float, side: str, based_on: str) -> list:
    """side: `below` (the interval must lie below 0), `above` 0, or `within` `EQUIVALENT` of 0."""
    if ours is None or not np.isfinite([ours, low, high]).all():
        return [claim, published, np.nan, np.nan, np.nan, UNTESTED, based_on]
    holds = {"below": high < 0, "above": low > 0, "within": -EQUIVALENT <= low and high <= EQUIVALENT}[side]
    return [claim, published, ours, low, high, SUPPORTED if holds else UNSUPPORTED, based_on]


def _difference(ours: Tables, table: str, value: str = "difference", **where: str) -> tuple[float, float, float]:
    frame = ours.get(table)
    if frame is None:
        return np.nan, np.nan, np.nan
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return tuple(frame.iloc[0][[value, "ci_low", "ci_high"]]) if len(frame) else (np.nan,) * 3


def _fidelity(ours: Tables, published: Tables) -> list[list]:
    table = published["table1_fidelity"]
    average = table[table["plane"] == "average"].set_index(["system", "metric"])["value"]
    rows = []
    for other in ("maisi-ddpm", "maisi-rflow"):
        for metric in ("fid", "kid", "mmd"):
            theirs = average["hr-ldm", metric] - average[other, metric]
            found = _difference(ours, "table1_differences", metric=metric, plane="average", a=other, b="hr-ldm")
            claim = f"Table 1: {metric.upper()} of HR-LDM is lower than that of {other} (difference)"
            rows.append(_row(claim, f"{theirs:.4g}", *found, "below", "table1_fidelity, paired patient bootstrap"))
    return rows


def _regularisation(ours: Tables) -> list[list]:
    rows = []
    for metric, claim in (
        ("jsd", "Section 3.2.3: L_hist brings the lesion's HU histogram closer to its target (JSD difference)"),
        ("wasserstein_hu", "Section 3.2.3: L_hist brings lesion intensities closer to their target (HU difference)"),
    ):
        found = _difference(ours, "lesion_differences", metric=metric, a="maisi-ddpm", b="hr-ldm")
        rows.append(_row(claim, "not measured", *found, "below", "lesion_histograms, paired patient bootstrap"))
    found = _difference(ours, "lesion_differences", metric="sd_hu", a="maisi-ddpm", b="hr-ldm")
    claim = "Section 1: L_hist mitigates over-smoothing (within-lesion SD, HU difference)"
    rows.append(_row(claim, "not measured", *found, "above", "lesion_histograms, paired patient bootstrap"))
    found = _difference(ours, "feature_awareness", "value", feature="feature_jsd", measure="spearman")
    claim = "Section 3.2.3: features at D_trunc retain intensity (Spearman correlation of feature-JSD with HU-JSD)"
    rows.append(_row(claim, "not measured", *found, "above", "02_autoencoder"))
    return rows


def _control(ours: Tables) -> list[list]:
    table = ours.get("control_summary")
    claim = "Section 3.3: the obtained mean HU follows the requested one (R2, all subtypes)"
    if table is None:
        return [_row(claim, "not measured", np.nan, np.nan, np.nan, "above", "control_summary")]
    row = table[(table["system"] == "hr-ldm") & (table["subtype"] == "all") & (table["quantity"] == "mean_hu")].iloc[0]
    r, n = float(np.sqrt(max(row["r2"], 0))), int(row["n"])
    low, high = np.tanh(np.arctanh(min(r, 0.999999)) + np.array([-1.96, 1.96]) / np.sqrt(max(n - 3, 1)))
    return [_row(claim, "not measured", row["r2"], max(low, 0) ** 2, high**2, "above", f"control, n = {n}, Fisher z")]


def _turing(ours: Tables, published: Tables) -> list[list]:
    claim = "Table 2: synthetic nodules are hard to tell from real ones ({}, accuracy minus one half)"
    rows = []
    for condition in ("cropped", "full_context"):
        theirs, _ = _accuracy(published["table2_turing"], "radiologist", condition)
        named = claim.format(condition.replace("_", " "))
        human = [named, f"{theirs - 0.5:.3f}", np.nan, np.nan, np.nan, UNTESTED, "no human reader; see 06_turing"]
        rows.append(human)
        table = ours.get("table2_turing")
        for observer in sorted(table["observer"].unique()) if table is not None else ():
            accuracy, (low, high) = _accuracy(table, observer, condition)
            model = named.replace("(", f"({observer}, ", 1)
            based_on = "table2_turing, Wilson interval"
            rows.append(
                _row(model, f"{theirs - 0.5:.3f} (human)", accuracy - 0.5, low - 0.5, high - 0.5, "within", based_on)
            )
    return rows


def _accuracy(table: pd.DataFrame, observer: str, condition: str) -> tuple[float, tuple[float, float]]:
    rows = table[(table["observer"] == observer) & (table["condition"] == condition)].set_index("truth")
    right = int(rows.loc["real", "called_real"] + rows.loc["synthetic", "called_synthetic"])
    n = int(rows[["called_real", "called_synthetic"]].to_numpy().sum())
    return right / n, wilson_interval(right, n)


def _subtype(ours: Tables, published: Tables) -> list[list]:
    rows = []
    keys = ["metric", "size_mm", "subtype", "arm"]
    theirs = published["table3_subtype"].set_index(keys)["mean"]
    table = ours.get("table3_subtype")
    mine = None if table is None else table.set_index(keys)
    for metric in ("auroc", "auprc"):
        for size in ("10-20", "20-30"):
            for subtype in ("part-solid", "ground-glass"):
                pair = [(metric, size, subtype, arm) for arm in ("Real only", "Real + Synth")]
                printed = f"{theirs[pair[1]] - theirs[pair[0]]:+.3f}"
                claim = f"Table 3: synthetic nodules raise {metric.upper()} of {subtype}, {size} mm (difference)"
                rows.append([claim, printed, *_table3(mine, pair), "table3_subtype, Holm-corrected paired bootstrap"])
    return rows


def _table3(mine: pd.DataFrame | None, pair: list[tuple]) -> list:
    if mine is None or any(key not in mine.index for key in pair):
        return [np.nan, np.nan, np.nan, UNTESTED]
    before, after = (mine.loc[key] for key in pair)
    gain, p = after["mean"] - before["mean"], after["p_bootstrap"]
    if not np.isfinite(gain):
        return [np.nan, np.nan, np.nan, UNTESTED]
    return [gain, np.nan, np.nan, SUPPORTED if gain > 0 and p < 0.05 else UNSUPPORTED]


def _scarcity(ours: Tables, published: Tables) -> list[list]:
    claim = "Fig. 7: with all synthetic nodules, part-solid AUROC at the least real data stays near its value at 100 % (difference)"
    table = ours.get("fig7_scarcity")
    if table is None:
        return [_row(claim, "about 0", np.nan, np.nan, np.nan, "within", "fig7_scarcity")]
    cell = table[(table["subtype"] == "part-solid") & (table["metric"] == "auroc") & table["mean"].notna()]
    cell = cell[cell["arm"] == "Clinical (n%) + Synth (100%)"].sort_values("retention")
    if len(cell) < 2:
        return [_row(claim, "about 0", np.nan, np.nan, np.nan, "within", "fig7_scarcity")]
    least, full = cell.iloc[0], cell.iloc[-1]
    # the two arms share their test patients: adding their half-widths in quadrature is conservative
    half = np.hypot(least["ci_high"] - least["ci_low"], full["ci_high"] - full["ci_low"]) / 2
    gap = least["mean"] - full["mean"]
    return [_row(claim, "about 0", gap, gap - half, gap + half, "within", "fig7_scarcity, intervals in quadrature")]


def _malignancy(ours: Tables, published: Tables) -> list[list]:
    theirs = published["fig8_malignancy"].set_index("arm")["auroc"]
    table = ours.get("fig8_malignancy")
    rows = []
    for worse, better in (("scratch", "subtype-imbalanced"), ("subtype-imbalanced", "subtype-balanced")):
        claim = f"Fig. 8: malignancy AUROC is higher from {better} than from {worse} (difference)"
        printed, found = f"{theirs[better] - theirs[worse]:+.3f}", (np.nan,) * 3
        if table is not None and table["auroc"].notna().all():
            arm = table.set_index("arm")
            half = np.hypot(*[(arm.loc[a, "ci_high"] - arm.loc[a, "ci_low"]) / 2 for a in (worse, better)])
            gap = arm.loc[better, "auroc"] - arm.loc[worse, "auroc"]
            found = (gap, gap - half, gap + half)
        rows.append(_row(claim, printed, *found, "above", "fig8_malignancy, intervals in quadrature; readers' ratings"))
    return rows


def load_evidence(results_dir: Path) -> dict[str, pd.DataFrame]:
    """Our tables that the claims are judged by, those that exist."""
    folder = Path(results_dir) / "tables"
    return {name: pd.read_csv(folder / f"{name}.csv") for name in EVIDENCE if (folder / f"{name}.csv").is_file()}
