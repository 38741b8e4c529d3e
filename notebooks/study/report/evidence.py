"""What a rule of `claims` asks of result tables: a sum of cells, with its interval.

A quantity is written ``table.column[query] - table.column[query] per table.column[query]``. Each cell of the sum is one
row of a table and has an interval in ci_low and ci_high, or a standard deviation over runs in sd and n_runs. Errors of
several cells add in quadrature, which is too wide where they share their test nodules. What follows `per` is a scale, a
mean over the rows that fit, and counts as known.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from study.measure.observers import accuracy_table
from study.measure.statistics import FEW, LEVEL, least_squares
from study.report.published import load_published

TERM = re.compile(r"([+-]?)\s*(\w+)\.(\w+)\[(.*?)\]")
UNITS = {"n_patients": "patients", "n": "nodules", "n_calls": "calls", "n_real": "nodules", "n_runs": "runs"}
SEEDS = ("seeds", "n_seeds", "n_runs")
PAPER_RUNS = 5  # of a table of the paper that prints an SD and no number of runs: its five folds
EXTRACTOR = "radimagenet-resnet50"  # the paper's; its rows go before those of others
Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Evidence:
    """A quantity with its 95 % interval; `df` of Student's t behind it, n of `unit`, the number of seeds or runs.

    weight: patients or nodules behind it, also where the interval is of runs
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    df: float = np.inf
    n: float = np.nan
    unit: str = ""
    seeds: int = 1
    source: str = ""
    weight: float = 0.0


def measured(quantity: str, tables: Tables) -> Evidence | None:
    """The quantity by these tables; None where a table, a row or a value is lacking, the scale is not above zero, or a class
    that is told apart has fewer than `FEW` patients: resampling them, too few are different.

    Raises:
        ValueError: a cell that several rows fit.
    """
    total, _, scale = quantity.partition(" per ")
    cells = [(-1 if sign == "-" else 1, column, _rows(tables, name, column, query))
             for sign, name, column, query in TERM.findall(total)]  # fmt: skip
    if any(len(rows) > 1 for _, _, rows in cells):
        raise ValueError(f"several rows fit a cell of {quantity!r}, which needs one each: make its query narrower")
    parts = [(-1 if sign == "-" else 1) * _rows(tables, name, column, query)[column].mean()
             for sign, name, column, query in TERM.findall(scale)]  # fmt: skip
    if any(rows.empty for _, _, rows in cells) or not (unit := sum(parts) if scale else 1.0) > 0:
        return None
    rows = [rows.iloc[0] for _, _, rows in cells]
    if any(row.get("n_patients_rarer", FEW) < FEW for row in rows):
        return None
    errors = [_errors(row, column, sign) for row, (sign, column, _) in zip(rows, cells, strict=True)]
    value = sum(sign * row[column] for row, (sign, column, _) in zip(rows, cells, strict=True))
    below, above, df = np.array(errors).T
    variance = ((below + above) / 2) ** 2
    with np.errstate(invalid="ignore"):  # Welch and Satterthwaite; infinite where the interval was not of runs
        df = float(variance.sum() ** 2 / (variance**2 / df).sum()) if np.isfinite(df).all() else np.inf
    z = stats.t.ppf((1 + LEVEL) / 2, df)
    low, high = value - z * np.sqrt((below**2).sum()), value + z * np.sqrt((above**2).sum())
    size = {
        c: w for c, w in UNITS.items() if all(pd.notna(row.get(c)) for row in rows) and (w == "runs") == np.isfinite(df)
    }
    column, word = next(iter(size.items()), ("", ""))
    seeds = [next((row[c] for c in SEEDS if pd.notna(row.get(c))), 1) for row in rows]
    n = min(row[column] for row in rows) if size else np.nan
    return Evidence(
        value / unit,
        low / unit,
        high / unit,
        df,
        n,
        word,
        int(min(seeds)),
        rows[0].get("file", TERM.findall(total)[0][1]),
        float(min(next((row[c] for c in UNITS if c != "n_runs" and pd.notna(row.get(c))), 0) for row in rows)),
    )


def _rows(tables: Tables, name: str, column: str, query: str) -> pd.DataFrame:
    """Rows with a value; none where the table is of an older layout."""
    table = tables.get(name, pd.DataFrame())
    try:
        return (
            table.query(query).dropna(subset=column) if column in table else pd.DataFrame(columns=[column], dtype=float)
        )
    except pd.errors.UndefinedVariableError:
        return table.iloc[:0]


def _errors(row: pd.Series, column: str, sign: int) -> tuple[float, float, float]:
    """Standard errors below and above `sign` times the cell, and the degrees of freedom behind them; NaN without."""
    if pd.notna(row.get("ci_low")):
        z = stats.norm.ppf((1 + LEVEL) / 2)
        below, above = (row[column] - row.ci_low) / z, (row.ci_high - row[column]) / z
        return (below, above, np.inf) if sign > 0 else (above, below, np.inf)
    runs = row.get("n_runs", np.nan)
    runs = PAPER_RUNS if pd.isna(runs) else runs
    se = row.get("sd", np.nan) / np.sqrt(runs)
    return se, se, runs - 1 if np.isfinite(se) else np.inf


# -- tables ------------------------------------------------------------------------------------------------------------


def load_evidence(folder: Path, names: Iterable[str]) -> Tables:
    """Those of the tables that lie in `folder` or can be derived from what lies there."""
    files = {path.stem: path for path in sorted(folder.glob("*.csv"))}
    wanted = {*names, "table2_turing", "control", "control_crossed", "lambda", "ablations"}
    return derived({name: pd.read_csv(path) for name, path in files.items() if name in wanted})


def published() -> Tables:
    """The paper's tables."""
    names = ("table1_fidelity", "table2_turing", "table3_subtype", "fig7_scarcity", "fig8_malignancy")
    return derived({name: load_published(name) for name in names})


def derived(tables: Tables) -> Tables:
    """With what is computed from rows: accuracies of Table 2, R2 of control, the lesions' SD seen from the real one's; `file` names
    the table behind it."""
    tables = {name: _one_extractor(table) for name, table in tables.items()}
    if "table2_turing" in tables:
        calls = accuracy_table(tables["table2_turing"]).rename(columns={"n": "n_calls"})
        tables["turing_accuracy"] = calls.assign(file="table2_turing")
    fits = [_fit(*key, part) for name in ("control", "control_crossed") if name in tables
            for key, part in tables[name].assign(order=name).groupby(["order", "system"], sort=False)]  # fmt: skip
    if fits:
        tables["control_r2"] = pd.DataFrame([row for rows in fits for row in rows])
    if spreads := [*_spreads(tables)]:
        tables["towards_truth"] = pd.DataFrame(spreads)
    return tables


def _one_extractor(table: pd.DataFrame) -> pd.DataFrame:
    if "extractor" not in table or table.empty:
        return table
    known = table["extractor"].unique()
    return table[table["extractor"] == (EXTRACTOR if EXTRACTOR in known else known[0])]


def _fit(order: str, system: str, part: pd.DataFrame) -> list[dict]:
    """R2 of obtained on requested; a nodule asked twice counts once."""
    n, rows = part["nodule_id"].nunique(), []
    for quantity in ("mean_hu", "sd_hu"):
        _, _, r2 = least_squares(*(part[f"{side}_{quantity}"].to_numpy() for side in ("requested", "obtained")))
        low, high = r2_interval(r2, n)
        key = {"file": order, "order": order, "system": system, "quantity": quantity}
        rows.append(key | {"r2": r2, "ci_low": low, "ci_high": high, "n": n})
    return rows


def r2_interval(r2: float, n: int) -> tuple[float, float]:
    """Interval of a squared correlation of n points by Fisher's z."""
    half = stats.norm.ppf((1 + LEVEL) / 2) / np.sqrt(max(n - 3, 1))
    z = np.arctanh(min(np.sqrt(r2), 1 - 1e-12))
    return float(np.tanh(max(z - half, 0)) ** 2), float(np.tanh(z + half) ** 2)


def _spreads(tables: Tables) -> Iterable[dict]:
    """|SD over the real SD - 1| with L_hist minus that without: a rise helps only where the SD was too small."""
    if {"lambda", "lambda_differences"} <= set(tables):
        levels = tables["lambda"].query("`lambda` == 0").groupby(["where", "template"])["sd_ratio"].mean()
        for row in tables["lambda_differences"].query("metric == 'sd_ratio'").itertuples():
            bounds = (row.difference, row.ci_low, row.ci_high)
            yield {
                "file": "lambda_differences",
                "where": row.where,
                "template": row.template,
                "n": row.n,
                "seeds": row.seeds,
            } | _nearer(levels[row.where, row.template], *bounds)
    if "ablations" in tables:
        cell = tables["ablations"].query("factor == 'c_hist x L_hist' and level == 'c_hist only'").set_index("metric")
        if {"sd_ratio", "sd_ratio_difference"} <= set(cell.index):
            d = cell.loc["sd_ratio_difference"]  # without minus with
            yield {"file": "ablations", "where": "ablation", "template": False, "seeds": d.n_seeds} | _nearer(
                cell.loc["sd_ratio", "value"], -d.value, -d.ci_high, -d.ci_low
            )


def _nearer(level: float, value: float, low: float, high: float) -> dict:
    """By how much the distance from 1 changes when `level`, taken as known, changes by `value` (`low` to `high`)."""
    ends = [abs(level + low - 1), abs(level + high - 1)]
    nearest = 0.0 if low <= 1 - level <= high else min(ends)
    was = abs(level - 1)
    return {
        "level": was,
        "difference": abs(level + value - 1) - was,
        "ci_low": nearest - was,
        "ci_high": max(ends) - was,
    }
