"""`claims.csv`: each claim of the paper, the published figure, ours, and a verdict by a rule that is the same for all.

`CLAIMS` says for each what is measured, in which rows of which table, and on which side of zero the paper claims it. A
claim is *supported* when our interval (or, for Table 3, the Holm-corrected p below 0.05 with the claimed sign) lies
wholly on the claimed side (for a claim of no difference: within 0.1 of none), *not supported* when it does not, and
*cannot be tested here* when a run lacks what it takes. "Not supported" is no refutation: at small n most intervals are
wide. On `lidc-mini` every verdict says that it is semi-synthetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from study.measure.statistics import Estimate, wilson_interval

COLUMNS = "claim published ours ci_low ci_high verdict based_on".split()
SUPPORTED, UNSUPPORTED, UNTESTED = "supported", "not supported", "cannot be tested here"
EQUIVALENT = 0.1  # accuracy or AUROC: a claim of no difference needs its whole interval this near to zero
SIDES: dict[str, Callable[[Estimate], bool]] = {
    "below": lambda e: e.ci_high < 0,
    "above": lambda e: e.ci_low > 0,
    "above, by p": lambda e: e.value > 0 and e.p < 0.05,
    "within": lambda e: -EQUIVALENT <= e.ci_low and e.ci_high <= EQUIVALENT,
}


# -- what is measured in the rows of a table ------------------------------------------------------------------------------


def stated(column: str, row: pd.Series) -> Estimate:
    """A value with the interval that stands beside it."""
    return Estimate(row[column], row.ci_low, row.ci_high, 0)


def gap(column: str, after: pd.Series, before: pd.Series) -> Estimate:
    """`after` minus `before`. Both share their test patients: adding half-widths in quadrature is conservative."""
    value = after[column] - before[column]
    half = np.hypot(after.ci_high - after.ci_low, before.ci_high - before.ci_low) / 2
    return Estimate(value, value - half, value + half, 0)


def tested_gap(column: str, after: pd.Series, before: pd.Series) -> Estimate:
    """`after` minus `before`; the table has a p in the place of an interval."""
    return Estimate(after[column] - before[column], np.nan, np.nan, 0, after.p_bootstrap)


def correlation(column: str, row: pd.Series) -> Estimate:
    """R2 with the interval of Fisher's z."""
    r, n = float(np.sqrt(max(row[column], 0))), int(row.n)
    low, high = np.tanh(np.arctanh(min(r, 0.999999)) + np.array([-1.96, 1.96]) / np.sqrt(max(n - 3, 1)))
    return Estimate(row[column], max(low, 0) ** 2, high**2, n)


def accuracy(column: str, real: pd.Series, synthetic: pd.Series) -> Estimate:
    """Share of right calls minus one half, Wilson interval; `column` counts the calls "real"."""
    right = int(real[column] + synthetic.called_synthetic)
    n = int(sum(row.called_real + row.called_synthetic for row in (real, synthetic)))
    low, high = wilson_interval(right, n)
    return Estimate(right / n - 0.5, low - 0.5, high - 0.5, n)


# -- the claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One row of `claims.csv`.

    text:     names the section, table or figure of the paper
    paper:    its figure, from results/published/
    side:     of zero, where the quantity must lie (`SIDES`)
    measure:  of the rows below
    quantity: table.column
    where:    the row, as a pandas query
    pair:     of two rows: the column in which they differ, and its two values
    based_on: in words; {n} is what the quantity is over
    """

    text: str
    paper: str
    side: str
    measure: Callable[..., Estimate]
    quantity: str
    where: str
    based_on: str
    pair: tuple = ()


PAIRED = "lesion_histograms, paired patient bootstrap"
LAMBDA = "a == 'maisi-ddpm' and b == 'hr-ldm'"  # lambda = 10 minus lambda = 0
HARD = "Table 2: synthetic nodules are hard to tell from real ones"
# fmt: off
CLAIMS = [
    *(Claim(f"Table 1: {metric.upper()} of HR-LDM is lower than that of {other} (difference)", paper, "below",
            stated, "table1_differences.difference", f"metric == '{metric}' and plane == 'average' and a == '{other}' and b == 'hr-ldm'",
            "table1_fidelity, paired patient bootstrap")
      for other, metric, paper in (
          ("maisi-ddpm", "fid", "-0.3647"), ("maisi-ddpm", "kid", "-0.0003638"), ("maisi-ddpm", "mmd", "-0.0013"),
          ("maisi-rflow", "fid", "-1.072"), ("maisi-rflow", "kid", "-0.001034"), ("maisi-rflow", "mmd", "-0.00394"),
          ("diff-tumor", "fid", "-5.859"), ("diff-tumor", "kid", "-0.006239"), ("diff-tumor", "mmd", "-0.02187"),
          ("lesion-diffusion", "fid", "-2.982"), ("lesion-diffusion", "kid", "-0.002972"), ("lesion-diffusion", "mmd", "-0.01043"))),
    Claim("Section 3.2.3: L_hist brings the lesion's HU histogram closer to its target (JSD difference)", "not measured", "below",
          stated, "lesion_differences.difference", f"metric == 'jsd' and {LAMBDA}", PAIRED),
    Claim("Section 3.2.3: L_hist brings lesion intensities closer to their target (HU difference)", "not measured", "below",
          stated, "lesion_differences.difference", f"metric == 'wasserstein_hu' and {LAMBDA}", PAIRED),
    Claim("Section 1: L_hist mitigates over-smoothing (within-lesion SD, HU difference)", "not measured", "above",
          stated, "lesion_differences.difference", f"metric == 'sd_hu' and {LAMBDA}", PAIRED),
    Claim("Section 3.2.3: features at D_trunc retain intensity (Spearman correlation of feature-JSD with HU-JSD)", "not measured", "above",
          stated, "feature_awareness.value", "feature == 'feature_jsd' and measure == 'spearman'", "02_autoencoder"),
    Claim("Section 3.3: the obtained mean HU follows the requested one (R2, all subtypes)", "not measured", "above",
          correlation, "control_summary.r2", "system == 'hr-ldm' and subtype == 'all' and quantity == 'mean_hu'", "control, n = {n}, Fisher z"),
    *(Claim(f"{HARD} ({named}{condition.replace('_', ' ')}, accuracy minus one half)", paper + printed, "within",
            accuracy, "table2_turing.called_real", f"observer == '{observer}' and condition == '{condition}'", based_on,
            ("truth", "real", "synthetic"))
      for condition, paper in (("cropped", "0.160"), ("full_context", "0.060"))
      for observer, named, printed, based_on in (
          ("radiologist", "", "", "no human reader; see 06_turing"),
          ("model observer (boosting)", "model observer (boosting), ", " (human)", "table2_turing, Wilson interval"),
          ("model observer (logistic)", "model observer (logistic), ", " (human)", "table2_turing, Wilson interval"))),
    *(Claim(f"Table 3: synthetic nodules raise {metric.upper()} of {subtype}, {size} mm (difference)", paper, "above, by p",
            tested_gap, "table3_subtype.mean", f"metric == '{metric}' and size_mm == '{size}' and subtype == '{subtype}'",
            "table3_subtype, Holm-corrected paired bootstrap", ("arm", "Real + Synth", "Real only"))
      for metric, size, subtype, paper in (
          ("auroc", "10-20", "part-solid", "+0.049"), ("auroc", "10-20", "ground-glass", "+0.011"),
          ("auroc", "20-30", "part-solid", "+0.081"), ("auroc", "20-30", "ground-glass", "+0.046"),
          ("auprc", "10-20", "part-solid", "+0.077"), ("auprc", "10-20", "ground-glass", "+0.010"),
          ("auprc", "20-30", "part-solid", "+0.125"), ("auprc", "20-30", "ground-glass", "+0.062"))),
    Claim("Fig. 7: with all synthetic nodules, part-solid AUROC at the least real data stays near its value at 100 % (difference)", "about 0", "within",
          gap, "fig7_scarcity.mean", "subtype == 'part-solid' and metric == 'auroc' and arm == 'Clinical (n%) + Synth (100%)'",
          "fig7_scarcity, intervals in quadrature", ("retention", 0, 1)),
    *(Claim(f"Fig. 8: malignancy AUROC is higher from {better} than from {worse} (difference)", paper, "above",
            gap, "fig8_malignancy.auroc", f"arm in ['{better}', '{worse}']", "fig8_malignancy, intervals in quadrature; readers' ratings", ("arm", better, worse))
      for better, worse, paper in (("subtype-imbalanced", "scratch", "+0.058"), ("subtype-balanced", "subtype-imbalanced", "+0.044"))),
]
# fmt: on


def claims_table(tables: Mapping[str, pd.DataFrame], semi_synthetic: bool) -> pd.DataFrame:
    """All claims, judged by our result tables by name; an absent one makes its claims untestable."""
    rows = []
    for claim in CLAIMS:
        found = _measured(claim, tables)
        verdict = SUPPORTED if SIDES[claim.side](found) else UNSUPPORTED
        verdict = UNTESTED if np.isnan(found.value) else verdict + " (semi-synthetic)" * semi_synthetic
        based_on = claim.based_on.format(n=found.n)
        rows.append((claim.text, claim.paper, found.value, found.ci_low, found.ci_high, verdict, based_on))
    return pd.DataFrame(rows, columns=COLUMNS)


def _measured(claim: Claim, tables: Mapping[str, pd.DataFrame]) -> Estimate:
    """The claim's quantity; NaN where a table or a row is lacking, or a value has neither interval nor p."""
    name, column = claim.quantity.split(".")
    if name in tables:
        found = tables[name].query(claim.where)
        rows = [found[found[claim.pair[0]] == value] for value in claim.pair[1:]] if claim.pair else [found]
        if all(len(row) for row in rows):
            estimate = claim.measure(column, *(row.iloc[0] for row in rows))
            if np.isfinite(estimate.value) and np.isfinite([estimate.ci_low, estimate.p]).any():
                return estimate
    return Estimate(np.nan, np.nan, np.nan, 0)


def load_evidence(results_dir: Path) -> dict[str, pd.DataFrame]:
    """Our tables that the claims are judged by, those that exist."""
    names = dict.fromkeys(claim.quantity.split(".")[0] for claim in CLAIMS)
    files = {name: Path(results_dir) / "tables" / f"{name}.csv" for name in names}
    return {name: pd.read_csv(path) for name, path in files.items() if path.is_file()}
