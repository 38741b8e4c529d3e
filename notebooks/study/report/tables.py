"""Result tables: long-form CSV with fixed columns, and a Markdown view of each for reading.

``tables/<name>.csv`` is the result; ``tables/<name>.md`` is made from it (interval beside its value, one row per system
where the paper's table has one) and is never read back. Columns are those of `SCHEMAS`; a table under another name says
its columns when it is saved.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from hrldm.atomic import write_text

SEMI_SYNTHETIC = (
    "Semi-synthetic data (`lidc-mini`: real shapes textured to real histograms in one real CT). "
    "These numbers show the machinery; they are no finding about patients."
)
MAX_VIEW_ROWS = 60


@dataclass(frozen=True)
class Schema:
    """Columns of one table in order, the values allowed in some of them, and how its view is laid out."""

    columns: tuple[str, ...]
    allowed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[str, ...] = ()  # view: one row per value of these columns (empty: the long form)
    across: tuple[str, ...] = ()  # view: these columns' values become column titles


def _schema(columns: str, allowed: dict | None = None, rows: str = "", across: str = "") -> Schema:
    return Schema(tuple(columns.split()), allowed or {}, tuple(rows.split()), tuple(across.split()))


_AUC = {"metric": ("auroc", "auprc")}
SCHEMAS: dict[str, Schema] = {
    "autoencoder": _schema(
        "region metric value ci_low ci_high n",
        {"metric": ("psnr_db", "ssim", "mae_hu", "hist_jsd")},
        rows="region",
        across="metric",
    ),
    "table1_fidelity": _schema(
        "system extractor metric plane value ci_low ci_high n_real n_synthetic",
        {"metric": ("fid", "kid", "mmd"), "plane": ("axial", "sagittal", "coronal", "average")},
        rows="system",
        across="metric extractor plane",
    ),
    "lesion_histograms": _schema(
        "system subtype metric value ci_low ci_high n",
        {"metric": ("jsd", "wasserstein_hu")},
        rows="system",
        across="metric subtype",
    ),
    "control": _schema(
        "system nodule_id subtype requested_mean_hu obtained_mean_hu requested_sd_hu obtained_sd_hu",
    ),
    "control_summary": _schema("system subtype quantity slope intercept r2 n"),
    "table2_turing": _schema(
        "observer condition truth called_real called_synthetic",
        {"condition": ("cropped", "full_context"), "truth": ("real", "synthetic")},
    ),
    "table3_subtype": _schema(
        "metric size_mm subtype arm mean sd n_runs n_patients p_mann_whitney p_bootstrap",
        _AUC,
    ),
    "fig7_scarcity": _schema("subtype metric retention arm mean ci_low ci_high n_runs", _AUC),
    "fig8_malignancy": _schema("arm auroc ci_low ci_high n_runs n_patients"),
    "ablations": _schema("factor level metric value ci_low ci_high n_seeds"),
    "claims": _schema("claim published ours ci_low ci_high verdict based_on"),
}


def save_table(table: pd.DataFrame, results_dir: Path | str, name: str, columns: Sequence[str] | None = None) -> Path:
    """Write ``tables/<name>.csv`` and its view ``tables/<name>.md``, each atomically.

    Args:
        table: the rows; the order of the columns does not matter, it is brought to the schema's.
        results_dir: results/<dataset>/<profile>/.
        name: key of `SCHEMAS`, or a new name together with `columns`.
        columns: columns of a table that `SCHEMAS` does not know.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: unknown name without `columns`, no rows, columns or values that differ from the schema.
    """
    schema = _find_schema(name, columns)
    check_table(table, name, schema)
    table = table[list(schema.columns)]
    folder = Path(results_dir) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    write_text(path, table.to_csv(index=False, float_format="%.8g", lineterminator="\n"))
    label = f"{SEMI_SYNTHETIC}\n\n" if Path(results_dir).resolve().parent.name == "lidc-mini" else ""
    write_text(folder / f"{name}.md", f"# {name}\n\n{label}{view(table, schema)}\n")
    return path


def save_tables(tables: Mapping[str, pd.DataFrame], results_dir: Path | str) -> None:
    """`save_table` of each; those that `SCHEMAS` does not know with the columns they have."""
    for name, table in tables.items():
        save_table(table, results_dir, name, None if name in SCHEMAS else list(table.columns))


def drop_table(results_dir: Path | str, name: str) -> None:
    """Remove a table that a former run left and this one cannot make."""
    for suffix in (".csv", ".md"):
        (Path(results_dir) / "tables" / f"{name}{suffix}").unlink(missing_ok=True)


def check_table(table: pd.DataFrame, name: str, schema: Schema) -> None:
    """All differences between `table` and `schema` in one error.

    Raises:
        ValueError: no rows; missing or unknown columns; values that the schema does not allow; ci_low > ci_high.
    """
    wrong = []
    if missing := [c for c in schema.columns if c not in table.columns]:
        wrong.append(f"missing columns {missing}")
    if unknown := [c for c in table.columns if c not in schema.columns]:
        wrong.append(f"unknown columns {unknown}")
    if table.empty:
        wrong.append("no rows")
    for column, values in schema.allowed.items():
        if column in table.columns and (odd := sorted(set(table[column].astype(str)) - set(values))):
            wrong.append(f"column {column!r} holds {odd}, allowed are {list(values)}")
    if {"ci_low", "ci_high"} <= set(table.columns):
        low, high = (pd.to_numeric(table[c], errors="coerce") for c in ("ci_low", "ci_high"))
        if crossed := list(table.index[low > high]):
            wrong.append(f"ci_low > ci_high in rows {crossed[:10]}")
    if wrong:
        raise ValueError(f"table {name}: " + "; ".join(wrong))


def view(table: pd.DataFrame, schema: Schema) -> str:
    """The Markdown text of `table`: ``value (ci_low to ci_high)`` in one cell, laid out as `schema` says."""
    shown = table.copy()
    for centre in ("value", "mean", "auroc", "ours"):
        if {centre, "ci_low", "ci_high"} <= set(shown.columns):
            cells = [_with_interval(*row) for row in shown[[centre, "ci_low", "ci_high"]].itertuples(index=False)]
            shown[centre] = cells
            shown = shown.drop(columns=["ci_low", "ci_high"])
    if schema.rows:
        counts = [c for c in shown.columns if c not in (*schema.rows, *schema.across, "value")]
        shown["_title"] = shown[list(schema.across)].astype(str).agg(" · ".join, axis=1)
        rows, titles = (list(dict.fromkeys(shown[c])) for c in (schema.rows[0], "_title"))
        sizes = ", ".join(f"{c} {_span(shown[c])}" for c in counts)
        wide = shown.pivot(index=list(schema.rows), columns="_title", values="value").reindex(
            index=rows, columns=titles
        )
        return wide.reset_index().to_markdown(index=False) + f"\n\n{sizes}"
    more = len(shown) - MAX_VIEW_ROWS
    text = shown.head(MAX_VIEW_ROWS).map(_number).to_markdown(index=False, disable_numparse=True)
    return text + (f"\n\n{more} more rows in the CSV." if more > 0 else "")


def artefacts(results_dir: Path | str) -> pd.DataFrame:
    """Files of a results folder that exist: columns file (relative), kind, rows (tables only) and size_kb."""
    folder = Path(results_dir)
    found = []
    for kind, pattern in (("table", "tables/*.csv"), ("figure", "figures/*.*"), ("run", "runs/*.ipynb")):
        for path in sorted(folder.glob(pattern)):
            if path.name.endswith(".part.ipynb"):
                continue
            rows = len(pd.read_csv(path)) if kind == "table" else pd.NA
            found.append((path.relative_to(folder).as_posix(), kind, rows, round(path.stat().st_size / 1024, 1)))
    return pd.DataFrame(found, columns=["file", "kind", "rows", "size_kb"])


def main(results_dir: str) -> None:
    """Print the verdicts of a results folder, where its files lie, and the designed tables that are not there."""
    folder = Path(results_dir)
    if (claims := folder / "tables" / "claims.csv").exists():
        for row in pd.read_csv(claims).itertuples():
            ours = _with_interval(row.ours, row.ci_low, row.ci_high)
            print(f"{row.verdict}: {row.claim}: {ours or 'not measured'}; paper {_number(row.published)}")
    for kind, pattern in (("tables", "*.csv"), ("figures", "*.png"), ("runs", "*.ipynb")):
        print(f"{len(list((folder / kind).glob(pattern))):4d} {kind} in {folder / kind}")
    if absent := [name for name in SCHEMAS if not (folder / "tables" / f"{name}.csv").exists()]:
        print(f"not there: {', '.join(absent)}")


def _find_schema(name: str, columns: Sequence[str] | None) -> Schema:
    if columns is not None:
        if name in SCHEMAS:
            raise ValueError(f"table {name}: its columns are fixed, leave `columns` out")
        return Schema(tuple(columns))
    if name not in SCHEMAS:
        raise ValueError(f"unknown table {name!r}; known are {', '.join(SCHEMAS)}. For a new one give `columns`")
    return SCHEMAS[name]


def _number(value: object) -> str:
    """Four significant digits for floats, nothing for missing values."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_interval(value: object, low: object, high: object) -> str:
    interval = "" if pd.isna(low) or pd.isna(high) else f" ({_number(low)} to {_number(high)})"
    return _number(value) + interval


def _span(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main(sys.argv[1])
