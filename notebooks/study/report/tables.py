"""Result tables: long-form CSV with fixed columns, and a Markdown view of each for reading.

``tables/<name>.csv`` is the result; ``tables/<name>.md`` is made from it (`view`) and is never read back. Columns are those
of `SCHEMAS`; a table under another name has the columns it comes with. `VIEWS` lays out what is too wide or too long.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from hrldm.atomic import write_text

SEMI_SYNTHETIC = (
    "Semi-synthetic data (`lidc-mini`: real shapes textured to real histograms in one real CT). "
    "These numbers show the machinery; they are no finding about patients."
)
MAX_VIEW_ROWS = 30


@dataclass(frozen=True)
class Schema:
    """Columns of one table in order, and the values allowed in some of them."""

    columns: tuple[str, ...]
    allowed: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _schema(columns: str, allowed: dict | None = None) -> Schema:
    return Schema(tuple(columns.split()), allowed or {})


_AUC = {"metric": ("auroc", "auprc")}
SCHEMAS: dict[str, Schema] = {
    "autoencoder": _schema(
        "region metric value ci_low ci_high n", {"metric": ("psnr_db", "ssim", "mae_hu", "hist_jsd")}
    ),
    "table1_fidelity": _schema(
        "system extractor metric plane value ci_low ci_high n_real n_synthetic",
        {"metric": ("fid", "fid_whole", "kid", "mmd"), "plane": ("axial", "sagittal", "coronal", "average")},
    ),
    "lesion_histograms": _schema("system subtype metric value ci_low ci_high n", {"metric": ("jsd", "wasserstein_hu")}),
    "control": _schema("system nodule_id subtype requested_mean_hu obtained_mean_hu requested_sd_hu obtained_sd_hu"),
    "control_summary": _schema("system subtype quantity slope intercept r2 n"),
    "table2_turing": _schema(
        "observer condition truth called_real called_synthetic",
        {"condition": ("cropped", "full_context"), "truth": ("real", "synthetic")},
    ),
    "table3_subtype": _schema(
        "metric size_mm subtype arm mean sd n_runs n_patients n_positive p_mann_whitney p_bootstrap", _AUC
    ),
    "fig7_scarcity": _schema("subtype metric retention arm mean ci_low ci_high n_runs", _AUC),
    "fig8_malignancy": _schema("arm auroc ci_low ci_high n_runs n_patients"),
    "ablations": _schema("factor level metric value ci_low ci_high n_seeds"),
    "claims": _schema("section claim published ours ci_low ci_high p_holm verdict note paper_verdict based_on"),
}


@dataclass(frozen=True)
class View:
    """Which part of a table is shown, and how; names of columns, separated by spaces.

    rows:   one row per value of these; none: the long form
    across: their values become column titles
    values: what stands in the cells; in the long form the columns, none: those that vary
    where:  a column, and those of its values that are shown
    """

    rows: str = ""
    across: str = ""
    values: str = "value"
    where: str = ""


LONG = View(values="")
VIEWS: dict[str, View] = {
    "autoencoder": View("region", "metric"),
    "table1_fidelity": View("system", "metric extractor n_synthetic", where="plane average"),
    "table1_differences": View(values="b a metric difference p", where="plane average"),
    "table1_ratios": View("system", "metric extractor", where="plane average"),
    "table1_subtypes": View("system subtype", "metric extractor", where="plane average"),
    "known_answer": View("damage strength", "metric"),
    "extractors": View(values="metric a b tau n_systems"),
    "separability": View("system", "extractor", "auroc"),
    "readers_accuracy": View("nodules observer condition", "quantity"),
    "lesion_histograms": View("system", "metric", where="subtype all"),
    "lesion_differences": View(values="b a metric difference p"),
    "lesion_texture": View("system subtype", "metric"),
    "median_jsd": View("system", "subtype", "jsd"),
    "power_spectrum": View("system", "cycles_per_mm", "power_hu2"),
    "control_summary": View("system", "subtype n", "slope r2", "quantity mean_hu"),
    "triplets_summary": View("system", "side"),
    "realism": View("system features", "model", "auroc minus_texture"),
    "turing_accuracy": View("observer condition", "quantity"),
    "table3_subtype": View("metric size_mm subtype n_patients", "arm", "mean p_mann_whitney p_bootstrap"),
    "table3_differences": View("metric size_mm subtype n_patients n_patients_rarer", "a", "difference"),
    "table3_arms": View("metric size_mm subtype", "arm", "mean"),
    "fig7_scarcity": View("subtype retention", "arm", "mean", "metric auroc"),
    "ablations": View(
        "factor level",
        "metric",
        where="metric jsd jsd_difference wasserstein_hu sd_ratio sd_ratio_difference",
    ),
    "data_counts": View("split subtype", "size_mm", "n"),
    "feature_awareness": View("feature", "measure"),
    "lambda_differences": View(values="where template n metric difference p p_holm"),
    "steps": View(
        values="where n histogram steps jsd wasserstein_hu roughness_ratio auroc jsd_minus_25 roughness_ratio_minus_25"
    ),
    "seen": View(values="split n patients jsd jsd_median wasserstein_hu roughness_ratio"),
    "longer": View(values="network steps_of_32 histogram jsd wasserstein_hu roughness_ratio jsd_minus_before"),
    "summary": View(
        values="subtype n failures least_share_in_lung n_held largest_error_hu median_jsd vessel_kept n_on_vessels attached "
        "n_subpleural seconds_each"
    ),
}
SYSTEM_NAMES = {
    "real": "real (floor)",
    "autoencoder": "autoencoder (floor)",
    "texture": "texture, no training",
    "transplant": "real lesion, pasted",
    "diff-tumor": "DiffTumor-style, T = 4",
    "diff-tumor-200": "DiffTumor-style, T = 200",
    "lesion-diffusion": "LesionDiffusion-style",
    "lefusion": "LeFusion-style",
    "maisi-v2": "MAISI-v2 (stands apart)",
    "energy": "maisi-ddpm, energy-guided",
    "hr-ldm-template": "hr-ldm, template (ours)",
    "hr-ldm-matched": "hr-ldm, histogram imposed (ours)",
    "released": "hr-ldm, as inserted (ours)",
    "inserted": "hr-ldm, as inserted (ours)",
    "texture-inserted": "texture, as inserted (ours)",
}
TITLES = {"value": "", "mean": "", "a": "minus", "b": "system", "cycles_per_mm": "cycles / mm"}  # else word by word:
WORDS = {
    "fid": "FID", "kid": "KID × 10³", "mmd": "MMD × 10²", "jsd": "JSD", "wasserstein": "Wasserstein distance", "sd": "SD",
    "psnr": "PSNR", "ssim": "SSIM", "mae": "mean absolute error", "hist": "histogram", "auroc": "AUROC", "auprc": "AUPRC",
    "r2": "R²", "whole": "whole sample", "mann": "Mann", "whitney": "Whitney", "holm": "Holm",
}  # fmt: skip
UNITS = {"hu": "HU", "hu2": "HU²", "mm": "mm", "db": "dB", "s": "s", "mb": "MB"}
SCALES = {"kid": 1e3, "mmd": 1e2}  # shown in the units of the paper's Table 1
INTERVALS = {  # value: its bounds are <name>_low and <name>_high
    "value": "ci", "mean": "ci", "auroc": "ci", "ours": "ci", "difference": "ci", "minus_texture": "minus",
    "jsd_minus_25": "jsd", "roughness_ratio_minus_25": "roughness_ratio", "jsd_minus_before": "jsd", "jsd": "ci", "tau": "ci",
}  # fmt: skip


def save_table(table: pd.DataFrame, results_dir: Path | str, name: str) -> Path:
    """Write ``tables/<name>.csv`` and its view ``tables/<name>.md``, each atomically.

    Args:
        table: the rows; the order of the columns does not matter, it is brought to the schema's.
        results_dir: results/<dataset>/<profile>/.
        name: key of `SCHEMAS`, or a new name, whose columns are then as they come.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: no rows, columns or values that differ from the schema.
    """
    schema = SCHEMAS.get(name) or Schema(tuple(table.columns))
    check_table(table, name, schema)
    path = Path(results_dir) / "tables" / f"{name}.csv"
    csv = table[list(schema.columns)].to_csv(index=False, float_format="%.8g", lineterminator="\n")
    write_text(path, csv)
    write_text(path.with_suffix(".md"), page(path))
    return path


def save_tables(tables: Mapping[str, pd.DataFrame], results_dir: Path | str) -> None:
    """`save_table` of each."""
    for name, table in tables.items():
        save_table(table, results_dir, name)


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


def page(csv: Path) -> str:
    """The Markdown file beside a table: its view, and that it is semi-synthetic where it is."""
    label = f"{SEMI_SYNTHETIC}\n\n" if csv.resolve().parents[2].name == "lidc-mini" else ""
    return f"# [{csv.stem}]({csv.name})\n\n{label}{view(pd.read_csv(csv), csv.stem)}\n"


def view(table: pd.DataFrame, name: str) -> str:
    """A table for reading, in Markdown: laid out by `VIEWS`, ``value (low to high)`` in one cell, one name per system.

    Columns of a single value, and the span of counts, are said below; what is left out stands in the CSV.
    """
    layout = VIEWS.get(name, LONG)
    rows, across, values = layout.rows.split(), layout.across.split(), layout.values.split()
    column, *wanted = layout.where.split() or [""]
    chosen = table[table[column].isin(wanted)] if column in table else table
    if layout is not LONG and (chosen.empty or not {*rows, *across, *values} <= set(table)):  # not the table it is for
        return view(table, "")
    cells = _cells(chosen)
    if rows:
        columns = {}
        for keys, group in cells.groupby(across, sort=False):
            known = [(c, key) for c, key in zip(across, keys, strict=True) if key]
            of = [f"{title(c)} = {key}" if is_numeric_dtype(table[c]) else title(key) for c, key in known]
            of = [f"minus {name}" if c == "a" else name for (c, _), name in zip(known, of, strict=True)]
            for value in values:
                columns[", ".join(filter(None, [title(value), *of]))] = group.set_index(rows)[value]
        shown = pd.concat(columns, axis=1).reset_index().fillna("")
        shown = shown.loc[:, (shown != "").any()]
    else:
        shown = cells[values or [c for c in cells if len(cells) == 1 or cells[c].nunique() > 1]]
    text = shown.head(MAX_VIEW_ROWS).rename(columns=title).to_markdown(index=False, disable_numparse=True)
    notes = [
        f"{title(c)} = {_span(chosen[c])}"
        for c in cells.columns.difference([*rows, *across, *values, *shown], sort=False)
        if chosen[c].notna().all() and (chosen[c].nunique() == 1 or c == "n" or c.startswith("n_"))
    ]
    if len(shown) > MAX_VIEW_ROWS:
        notes.append(f"{len(shown) - MAX_VIEW_ROWS} more rows in the CSV")
    return "\n\n".join([text, ", ".join(notes)]).rstrip()


def title(name: str) -> str:
    """A column or metric in words, its unit behind a comma."""
    head, _, tail = name.rpartition("_")
    unit = f", {UNITS[tail]}" if head and tail in UNITS else ""
    words = (head if unit else name).split("_")
    return TITLES.get(name, " ".join(WORDS.get(word, word) for word in words) + unit)


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
    """Print how many claims of a results folder got which verdict, where its files lie, and the designed tables that are not there."""
    folder = Path(results_dir)
    if (claims := folder / "tables" / "claims.csv").exists():
        counts = pd.read_csv(claims)["verdict"].value_counts()
        print(f"claims: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}")
        print(f"  each with its evidence in {folder / 'runs' / '11_claims.ipynb'}")
    for kind, pattern in (("tables", "*.csv"), ("figures", "*.png"), ("runs", "*.ipynb")):
        print(f"{len(list((folder / kind).glob(pattern))):4d} {kind} in {folder / kind}")
    if absent := [name for name in SCHEMAS if not (folder / "tables" / f"{name}.csv").exists()]:
        print(f"not there: {', '.join(absent)}")


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text; bounds and SDs stand beside their values."""
    cells = table.map(_number)
    scale = table["metric"].map(SCALES).fillna(1) if "metric" in table else 1
    for centre, name in INTERVALS.items():
        bounds = [centre, f"{name}_low", f"{name}_high"]
        if set(bounds) <= set(table):
            sign = "+" if "minus" in centre or centre == "difference" else ""
            numbers = table[bounds].mul(scale, axis=0).itertuples(index=False)
            cells[centre] = [_with_interval(*row, sign) for row in numbers]
            cells = cells.drop(columns=bounds[1:])
    if "sd" in table:
        centre = "mean" if "mean" in table else "auroc"
        cells[centre] = cells[centre].where(table["sd"].isna(), cells[centre] + " ± " + cells["sd"])
        cells = cells.drop(columns="sd")
    for column in {"system", "a", "b"} & set(cells):
        cells[column] = cells[column].replace(SYSTEM_NAMES)
    if "metric" in cells:
        cells["metric"] = cells["metric"].map(title)
    return cells


def _number(value: object, sign: str = "") -> str:
    """Three significant digits for floats, whole from a thousand on, nothing for missing values."""
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:{sign}.3g}" if abs(value) < 999.5 else f"{value:{sign},.0f}"


def _with_interval(value: object, low: object, high: object, sign: str = "") -> str:
    interval = "" if pd.isna(low) or pd.isna(high) else f" ({_number(low, sign)} to {_number(high, sign)})"
    return _number(value, sign) + interval


def _span(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main(sys.argv[1])
