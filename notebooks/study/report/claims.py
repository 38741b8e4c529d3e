"""`claims.csv`: every claim of the paper beside our evidence, and a verdict by one rule.

The rules are `results/published/claims.csv`, one row a claim, or several that differ in what `over` lists. `side` is where
the quantity must lie: above or below `null` (0 if empty), or near it. The least that counts is half way from `null` to the
paper's effect, or `margin`; for `near`, `margin` is the most that still counts as none. `paper` is the effect as a number
or a quantity in the paper's own tables; empty, the claim's own quantity there. A row without a claim adds to the one
above a quantity that is asked where those before it cannot be.

*Supported*: the interval excludes `null` on the claimed side, and holds effects of at least half of the paper's.
*Contradicted*: it leaves out even half of the paper's effect (for `near`: lies wholly beyond the margin); `note` says where
an effect of the claimed sign is seen all the same. *Undecided*: neither; `note` has the n (patients, and runs in the same
proportion) at which the paper's effect would be found in 4 of 5 studies. *Cannot be tested here*: no such rows, or none
with room for the effect (the queries ask for a level before it that leaves some), an interval of no width, an effect of the
paper's that is nil, or `why`. Both errors are held at 2.5 % a side in each `family` by Holm's method. The paper's own
figures, where they have an interval, are judged alike: `paper_verdict`.

Of several runs that have a quantity, real data count before semi-synthetic, more seeds before fewer, a rule's earlier
quantities before its later ones, more nodules before fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from study.measure.statistics import LEVEL, holm
from study.report.evidence import TERM, Evidence, Tables, load_evidence, measured, published
from study.report.published import load_published

VERDICTS = SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTED = (
    "supported",
    "contradicted",
    "undecided",
    "cannot be tested here",
)
SQUARES = dict(zip(VERDICTS, "🟩🟥🟨⬜", strict=True))
NOT_MEASURED = "not measured, or on a class of fewer than ten patients"
TOO_SMALL = "on the claimed side, but less than what counts"
NIL = 1e-6  # an effect of the paper's below it is the rounding of none
OUT_OF_REACH = 1000  # times the evidence
SEMI_SYNTHETIC = "lidc-mini"
ALPHA, POWER = (1 - LEVEL) / 2, 0.8


@dataclass(frozen=True)
class Rule:
    """One claim; see the module."""

    section: str
    claim: str
    side: str
    paper: str
    null: float
    margin: float
    family: str
    quantities: tuple[str, ...]
    why: str

    def least(self, paper: float) -> float:
        """The least that counts."""
        middle = (self.null + paper) / 2 if np.isfinite(paper) else self.null
        return self.margin if np.isfinite(self.margin) else middle


def load_rules(table: pd.DataFrame | None = None) -> list[Rule]:
    """`results/published/claims.csv`, or a table like it.

    Raises:
        ValueError: a side that is none of above, below and near, or `near` without a margin.
    """
    table = load_published("claims") if table is None else table
    rules = []
    for _, rows in table.groupby(table["claim"].notna().cumsum(), sort=False):
        row, texts = rows.iloc[0], rows.astype(object).where(rows.notna(), "").astype(str)
        if row.side not in ("above", "below", "near") or (row.side == "near" and pd.isna(row.margin)):
            raise ValueError(f"{row.claim!r}: side {row.side!r}; above, below, or near with a margin")
        null = 0.0 if pd.isna(row.null) else float(row.null)
        named = [part.split("=") for part in texts.over.iloc[0].split("; ") if part]
        for values in product(*(listed.split(",") for _, listed in named)):
            known = {name: value for (name, _), value in zip(named, values, strict=True)}
            words = known | {name.upper(): value.upper() for name, value in known.items()}
            first = texts.iloc[0].map(lambda text, words=words: text.format(**words))
            quantities = [
                _within(q, w).format(**words) for q, w in zip(texts.quantity, texts["where"], strict=True) if q
            ]
            paper = _within(first.paper, first["where"]) if "[" in first.paper else first.paper
            rules.append(Rule(first.section, first.claim, row.side, paper, null, float(row.margin),
                              first.family or first.claim, tuple(quantities), first.why))  # fmt: skip
    return rules


def claims_table(evidence: Mapping[str, Tables], rules: Sequence[Rule] | None = None) -> pd.DataFrame:
    """All claims, judged by result tables; evidence: folder, as shown in `based_on`, to its tables by name."""
    rules = load_rules() if rules is None else rules
    tables = published()
    printed = [_printed(rule, tables) for rule in rules]
    effects = np.array([e.value for e in printed])
    theirs, _ = judged(rules, printed, effects)
    nil = [rule.side != "near" and abs(x - rule.null) < NIL for rule, x in zip(rules, effects, strict=True)]
    found = [Evidence(np.nan) if none else _best(rule, evidence) for rule, none in zip(rules, nil, strict=True)]
    verdicts, p = judged(rules, found, effects)
    rows = []
    for rule, e, effect, none, verdict, p_holm, own in zip(
        rules, found, effects, nil, verdicts, p, theirs, strict=True
    ):
        size = "" if np.isnan(e.n) else f", {e.n:.0f} {e.unit}"
        seeds = f", {e.seeds} runs" if e.seeds > 1 and e.unit != "runs" else ""
        kind = ", semi-synthetic" * (e.source.startswith(SEMI_SYNTHETIC))
        family = sum(r.family == rule.family and np.isfinite(f.value) for r, f in zip(rules, found, strict=True))
        note = TOO_SMALL if verdict == CONTRADICTED and p_holm < 2 * ALPHA else ""
        if verdict == UNDECIDED:
            note = _needed(rule, e, effect, family)
        if own == UNTESTED:
            own = "no interval printed" if np.isfinite(effect) else ""
        based_on = f"{e.source}{size}{seeds}{kind}" if e.source else rule.why or NOT_MEASURED
        based_on = "the paper's own figures show no difference" if none else based_on
        rows.append((rule.section, rule.claim, effect, e.value, e.low, e.high, p_holm, verdict, note, own, based_on))
    columns = "section claim published ours ci_low ci_high p_holm verdict note paper_verdict based_on"
    return pd.DataFrame(rows, columns=columns.split())


def judged(rules: Sequence[Rule], found: Sequence[Evidence], effects: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Verdict of each rule, and the two-sided p of "nothing of what is claimed", corrected in its family."""
    p = np.array([_one_sided(*row) for row in zip(rules, found, effects, strict=True)]).T  # (2, n)
    families = np.array([rule.family for rule in rules])
    for family in np.unique(families):
        members = (families == family) & np.isfinite(p[0])
        p[:, members] = [holm(row) for row in p[:, members]]
    verdicts = np.select([np.isnan(p[0]), p[1] < ALPHA, p[0] < ALPHA], [UNTESTED, CONTRADICTED, SUPPORTED], UNDECIDED)
    return verdicts.tolist(), np.minimum(2 * p[0], 1)


def _one_sided(rule: Rule, e: Evidence, effect: float) -> tuple[float, float]:
    """p of "no more than `null`" and of "at least what counts", of the interval's tails; NaN without interval."""
    if not np.isfinite([e.low, e.high]).all():
        return np.nan, np.nan
    z = stats.t.ppf((1 + LEVEL) / 2, e.df)
    below, above = max((e.value - e.low) / z, 1e-12), max((e.high - e.value) / z, 1e-12)

    def no_more(than: float) -> float:  # p of "the quantity is no more than this"
        return float(stats.t.sf((e.value - than) / below, e.df))

    def no_less(than: float) -> float:
        return float(stats.t.cdf((e.value - than) / above, e.df))

    least = rule.least(effect)
    if rule.side == "near":
        low, high = rule.null - least, rule.null + least
        return max(no_more(low), no_less(high)), min(no_more(high), no_less(low))
    if rule.side == "above":
        return no_more(rule.null), no_less(least)
    return no_less(rule.null), no_more(least)


def times_needed(rule: Rule, e: Evidence, effect: float, family: int) -> float:
    """How many times the evidence finds the paper's effect (ours, where it prints none) with power `POWER` at Holm's first step."""
    room = abs((effect if np.isfinite(effect) else e.value) - rule.null)
    if rule.side == "near":
        room = rule.margin - room if room < rule.margin else rule.margin
    se = (e.high - e.low) / 2 / stats.t.ppf((1 + LEVEL) / 2, e.df)
    return float(((stats.norm.isf(ALPHA / family) + stats.norm.ppf(POWER)) * se / max(room, 1e-12)) ** 2)


def _needed(rule: Rule, e: Evidence, effect: float, family: int) -> str:
    if np.isnan(effect) and (e.value - rule.null) * {"above": 1, "below": -1, "near": np.nan}[rule.side] < 0:
        return "it lies on the other side"
    times = times_needed(rule, e, effect, family)
    if times > OUT_OF_REACH:
        return "out of reach: more than 1,000 times as many cases"
    if times <= 1:
        return "n is enough, but the interval, once corrected, holds none of the effect and half of it"
    return "it would take " + (
        f"{np.ceil(times * e.n):,.0f} {e.unit}" if np.isfinite(e.n) else f"{times:.2g} times as many cases"
    )


def _printed(rule: Rule, tables: Tables) -> Evidence:
    """The paper's effect, with an interval where its own figures give one."""
    if rule.paper and "[" not in rule.paper:
        return Evidence(float(rule.paper))
    known = (measured(q, tables) for q in ((rule.paper,) if rule.paper else rule.quantities))
    return next((e for e in known if e), Evidence(np.nan))


def _best(rule: Rule, evidence: Mapping[str, Tables]) -> Evidence:
    """The best evidence there is; one of NaN if there is none."""
    best, key = Evidence(np.nan), ()
    for folder, tables in evidence.items():
        for line, quantity in enumerate(rule.quantities):
            if (e := measured(quantity, tables)) and e.low < e.high:
                own = (SEMI_SYNTHETIC not in folder, e.seeds, -line, e.weight)
                if own > key:
                    best, key = Evidence(**(vars(e) | {"source": f"{folder}/{e.source}.csv"})), own
    return best


def _within(quantity: str, where: str) -> str:
    """The quantity with `where` added to each query."""
    return TERM.sub(lambda m: f"{m[1]} {m[2]}.{m[3]}[{' and '.join(filter(None, [where, m[4]]))}]", quantity)


def gather(results: Path, folders: Sequence[Path] | None = None) -> dict[str, Tables]:
    """Tables of these folders below `results`; by default those of all its runs but `smoke`, and lambda of the released network."""
    names = {name for rule in load_rules() for q in rule.quantities for _, name, _, _ in TERM.findall(q)}
    if folders is None:
        runs = sorted(results.glob("*/*/tables"))
        runs = [f for f in runs if not {"smoke", "released"} & set(f.relative_to(results).parts)]
        folders = [*runs, results / "released" / "lambda"]
    return {f.relative_to(results).as_posix(): load_evidence(f, names) for f in folders}


def sentences(table: pd.DataFrame, results: str = "../../..") -> str:
    """The verdicts as Markdown, grouped by section, with links to the evidence; results: that folder, as seen by the reader."""
    lines = []
    for section, part in table.groupby("section", sort=False):
        lines.append(f"\n#### {section}\n")
        for r in part.itertuples():
            ours = f"here {r.ours:+.3g} ({r.ci_low:+.3g} to {r.ci_high:+.3g})" if np.isfinite(r.ours) else ""
            paper = f"paper {r.published:+.3g}" + f" ({r.paper_verdict})" if np.isfinite(r.published) else ""
            file, comma, rest = str(r.based_on).partition(",")
            source = f"[{file}]({results}/{file}){comma}{rest}" if file.endswith(".csv") else r.based_on
            facts = "; ".join(filter(None, [ours, paper, r.note, source]))
            square = "🟧" if r.note == TOO_SMALL else SQUARES[r.verdict]
            lines.append(f"- {square} **{r.verdict}**: {r.claim}: {facts}")
    return "\n".join(lines)
