"""What the readers' CSVs say: Table 2 of the paper, and what it leaves out.

Intervals of a proportion are Wilson's, accuracy is tested against guessing by the exact binomial test. Where all readers
are taken together, and for the AUC and Fleiss' kappa, cases are drawn with replacement: readers saw the same ones.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa
from statsmodels.stats.power import NormalIndPower

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from hrldm.nodules.histograms import size_bin
from hrldm.nodules.spreadsheet import read_spreadsheet
from study.measure.observers import COLUMNS, CONDITIONS, WORDS, accuracy_table
from study.measure.statistics import LEVEL, auroc, mean_interval, patient_weights, percentile_interval
from study.readers.page import KEY_COLUMNS
from study.report.tables import save_tables, view

READING_COLUMNS = "case phase answer confidence seconds reader page".split()
TOGETHER = "all readers"
SIZES = [f"{low:g}-{high:g}" for low, high in SIZE_BINS_MM]
N_BOOT, SEED = 2000, 0
CLAIM = 0.60  # "accuracy under 60 %"
POWER = 0.80


def score(files: list[Path], key: Path, out: Path | None = None) -> dict[str, pd.DataFrame]:
    """The tables of a study, written to `out`/tables if given.

    Returns:
        `readers_table2`, counts in the layout of Table 2; `readers_accuracy` (see `accuracies`), `readers_auc`,
        `readers_kappa` (two readers or more) and `readers_needed`.

    Raises:
        ValueError: what is wrong in which line of which file.
    """
    readings = read_readings(files, key)
    tables = {
        "readers_table2": confusion(readings),
        "readers_accuracy": accuracies(readings),
        "readers_auc": confidence_auc(readings),
        "readers_needed": needed(readings),
    }
    if readings.reader.nunique() > 1:
        tables["readers_kappa"] = agreement(readings)
    if out is not None:
        save_tables(tables, out)
    return tables


def summary(tables: dict[str, pd.DataFrame]) -> str:
    """The tables in Markdown, and what a claim would take."""
    about, exact = readings_needed()
    claim = (
        f"To show that readers are right in under {CLAIM:.0%} takes about {about} independent readings of a condition "
        f"({exact} by the exact test; one-sided 95 % limit, power {POWER:.0%} if they guess)."
    )
    return "\n\n".join([*(f"# {name}\n\n{view(table, name)}" for name, table in tables.items()), claim])


# -- reading -----------------------------------------------------------------------------------------------------------


def read_key(path: Path) -> pd.DataFrame:
    """The key of a page, one row a case, with `size_mm`.

    Raises:
        ValueError: no key of one page.
    """
    columns, rows, problems = read_spreadsheet(Path(path))
    if problems or columns != KEY_COLUMNS:
        raise ValueError(f"{path}: no key of a reader study (columns {', '.join(KEY_COLUMNS)}); give its key.csv")
    key = pd.DataFrame(rows.values(), columns=columns, index=list(rows))
    for line, row in key.iterrows():
        known = row.truth in WORDS and row.subtype in SUBTYPES and row.page == key.page.iloc[0]
        if not known or (key.case == row.case).sum() > 1:
            raise ValueError(f"{path}, line {line}: not as the page's maker wrote it; take the original key.csv")
    diameter = key.diameter_mm.astype(float)
    return key.assign(diameter_mm=diameter, size_mm=[SIZES[size_bin(d)] for d in diameter]).reset_index(drop=True)


def read_readings(files: list[Path], key: Path) -> pd.DataFrame:
    """All readers' answers with the truth beside: reader, phase, case, answer, confidence, seconds, and the key's columns.

    Raises:
        ValueError: one message with every problem found: file, line, what is wrong and what to do.
    """
    truth = read_key(key)
    parts, problems, whose = [], [], {}
    for file in map(Path, files):
        columns, rows, wrong = read_spreadsheet(file)
        if missing := [c for c in READING_COLUMNS if c not in columns]:
            wrong.append(f"missing column(s) {', '.join(missing)}; give the file as the page saved it")
        problems += [f"{file}: {text}" for text in wrong]
        if missing:
            continue
        part = pd.DataFrame(rows.values(), columns=columns, index=list(rows))
        problems += [f"{file}{text}" for text in _problems(part, truth)]
        for reader in part.reader.unique():
            if reader in whose:
                problems.append(f"{file}: reader {reader!r} stands in {whose[reader]} too; give each file once")
            whose[reader] = file
        parts.append(part[READING_COLUMNS])
    if not files or problems:
        said = problems or ["no file of answers was given"]
        raise ValueError(f"{len(said)} problem(s), nothing was scored\n  " + "\n  ".join(said))
    table = pd.concat(parts, ignore_index=True).astype({"confidence": int, "seconds": float})
    return table.merge(truth.drop(columns="page"), on="case", validate="many_to_one")


def _problems(part: pd.DataFrame, key: pd.DataFrame) -> list[str]:
    """What is wrong in one file; part: its cells as text, by line."""
    if (other := part.page[part.page != key.page[0]]).any():
        return [f", line {other.index[0]}: answers to page {other.iloc[0]}, the key is of page {key.page[0]}"]
    allowed = {
        "case": (set(key.case), "is not in the key"),
        "phase": (CONDITIONS, f"is not {' or '.join(CONDITIONS)}"),
        "answer": (WORDS, f"is not {' or '.join(WORDS)}"),
        "confidence": (set("12345"), "is not a whole number from 1 to 5"),
    }
    found = [
        f", line {line}: {column} {value!r} {text}"
        for column, (values, text) in allowed.items()
        for line, value in part[column].items()
        if value not in values
    ]
    seconds = pd.to_numeric(part.seconds, errors="coerce")
    found += [f", line {n}: seconds {s!r} is not a number" for n, s in part.seconds[~(seconds >= 0)].items()]
    if part.reader.nunique() != 1:
        found.append(f": {part.reader.nunique()} readers; give one file a reader")
    for line, row in part[part.duplicated(["phase", "case"])].iterrows():
        found.append(f", line {line}: case {row.case} is answered twice in {row.phase}; keep one answer")
    for phase in CONDITIONS:
        if missing := sorted(set(key.case) - set(part.case[part.phase == phase])):
            named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            found.append(f": {len(missing)} case(s) without an answer in {phase} ({named}); let the reader finish")
    return found


# -- Table 2 -----------------------------------------------------------------------------------------------------------


def confusion(readings: pd.DataFrame) -> pd.DataFrame:
    """Counts as in Table 2, one observer a reader: observer, condition, truth, called_real, called_synthetic."""
    levels = pd.MultiIndex.from_product([readings.reader.unique(), CONDITIONS, WORDS], names=COLUMNS[:3])
    counts = readings.groupby(["reader", "phase", "truth", "answer"]).size().unstack("answer", fill_value=0)
    counts = counts.rename_axis(COLUMNS[:3]).reindex(index=levels, columns=list(WORDS), fill_value=0)
    return counts.set_axis(COLUMNS[3:], axis=1).reset_index()


def with_chance(accuracy: pd.DataFrame) -> pd.DataFrame:
    """`accuracy_table` with the two-sided p of guessing (exact binomial test against 1/2) on the rows of accuracy."""
    p = [
        stats.binomtest(round(r.value * r.n), r.n).pvalue if r.quantity == "accuracy" else np.nan
        for r in accuracy.itertuples()
    ]
    return accuracy.assign(p_chance=p)


def accuracies(readings: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, sensitivities and fooling rate: of all nodules, by subtype and by size; each reader and all together.

    Returns:
        nodules (all, a subtype or a size in mm), then as `accuracy_table`, p_chance. No p for all readers together.
    """
    groups = {"all": readings} | dict(tuple(readings.groupby("subtype"))) | dict(tuple(readings.groupby("size_mm")))
    parts = []
    for name in ["all", *SUBTYPES, *SIZES]:
        if name not in groups or groups[name].truth.nunique() < 2:
            continue
        parts.append(with_chance(accuracy_table(confusion(groups[name]))).assign(nodules=name))
        if readings.reader.nunique() > 1:
            parts.append(_together(groups[name]).assign(nodules=name))
    table = pd.concat(parts, ignore_index=True)
    return table[["nodules", *table.columns.drop("nodules")]]


def _together(readings: pd.DataFrame) -> pd.DataFrame:
    """The rows of all readers together, intervals by case."""
    rows = []
    for condition in CONDITIONS:
        shown = readings[readings.phase == condition]
        right = shown.answer == shown.truth
        real, synthetic = shown.truth == "real", shown.truth == "synthetic"
        for quantity, hits, of in (
            ("accuracy", right, real | synthetic),
            ("sensitivity_real", right, real),
            ("sensitivity_synthetic", right, synthetic),
            ("fooled", ~right, synthetic),
        ):
            e = mean_interval(hits[of], shown.case[of], N_BOOT, SEED)
            rows.append((TOGETHER, condition, quantity, e.value, e.ci_low, e.ci_high, e.n))
    return pd.DataFrame(rows, columns="observer condition quantity value ci_low ci_high n".split())


# -- confidence, agreement, readings to be had -------------------------------------------------------------------------


def confidence_auc(readings: pd.DataFrame) -> pd.DataFrame:
    """Area under the ROC curve of "synthetic", answers ordered from a certain "real" (-5) to a certain "synthetic" (5).

    Returns:
        observer, condition, value, ci_low, ci_high (cases drawn with replacement), n, seconds (median a case).
    """
    rows = []
    for (reader, condition), part in readings.groupby(["reader", "phase"], sort=False):
        signed = part.confidence * np.where(part.answer == "synthetic", 1, -1)
        is_synthetic = part.truth == "synthetic"
        draws = auroc(is_synthetic, signed, patient_weights(part.case, N_BOOT, SEED))
        value, seconds = auroc(is_synthetic, signed)[0], part.seconds.median()
        rows.append((reader, condition, value, *percentile_interval(draws), len(part), seconds))
    return pd.DataFrame(rows, columns="observer condition value ci_low ci_high n seconds".split())


def agreement(readings: pd.DataFrame) -> pd.DataFrame:
    """Agreement beyond chance between readers: Cohen's kappa of two, Fleiss' of more (statsmodels).

    Returns:
        condition, kappa (cohen or fleiss), value, ci_low, ci_high, n (cases), readers. NaN where all say the same.
    """
    rows = []
    for condition, part in readings.groupby("phase", sort=False):
        called = (part.pivot(index="case", columns="reader", values="answer") == "synthetic").to_numpy(int)
        n, readers = called.shape
        if readers == 2:
            with np.errstate(invalid="ignore"):
                k = cohens_kappa(np.bincount(2 * called[:, 0] + called[:, 1], minlength=4).reshape(2, 2))
            found = ("cohen", k.kappa, k.kappa_low, k.kappa_upp)
        else:
            found = ("fleiss", *_fleiss(called))
        rows.append((condition, *found, n, readers))
    return pd.DataFrame(rows, columns="condition kappa value ci_low ci_high n readers".split())


def _fleiss(called: np.ndarray) -> tuple[float, float, float]:
    """Fleiss' kappa of calls (cases, readers) 0 or 1, and its interval by case."""
    counts = aggregate_raters(called, n_cat=2)[0]
    rng = np.random.default_rng(SEED)
    with np.errstate(invalid="ignore"):
        draws = [fleiss_kappa(rng.choice(counts, len(counts))) for _ in range(N_BOOT)]
        return float(fleiss_kappa(counts)), *percentile_interval(draws)


def readings_needed() -> tuple[int, int]:
    """Independent readings with which "accuracy is under `CLAIM`" would be shown, by a normal approximation and exactly.

    Shown is it when the exact one-sided 95 % upper limit (Clopper-Pearson) lies under the claim; it must do so with
    probability `POWER` for a guesser. The approximation, n = ((z.95 + z.80) / 2 / (CLAIM - 0.5))² with the spread of
    guessing, gives 154.6 for .60; the smallest n of the exact test is 158.
    """
    effect = (CLAIM - 0.5) / 0.5
    about = NormalIndPower().solve_power(effect, alpha=1 - LEVEL, power=POWER, ratio=0, alternative="larger")
    n = 1
    while stats.binom.cdf(_most_right(n), n, 0.5) < POWER:
        n += 1
    return int(np.ceil(about)), n


def _most_right(n: int) -> int:
    """The largest number right of n whose exact one-sided upper limit lies under `CLAIM`; -1 if none."""
    k = int(stats.binom.ppf(1 - LEVEL, n, CLAIM))
    return k if stats.binom.cdf(k, n, CLAIM) <= 1 - LEVEL else k - 1


def needed(readings: pd.DataFrame) -> pd.DataFrame:
    """Whether each reader's accuracy is shown to be under `CLAIM`, and how many readings that would take of a guesser.

    Returns:
        observer, condition, n, right, upper (exact one-sided 95 % limit), claim, shown, readings_about, readings_exact.
    """
    about, exact = readings_needed()
    rows = []
    for (reader, condition), part in readings.groupby(["reader", "phase"], sort=False):
        right, n = int((part.answer == part.truth).sum()), len(part)
        upper = stats.binomtest(right, n, CLAIM, "less").proportion_ci(LEVEL).high
        rows.append((reader, condition, n, right, upper, CLAIM, upper < CLAIM, about, exact))
    return pd.DataFrame(
        rows, columns="observer condition n right upper claim shown readings_about readings_exact".split()
    )
