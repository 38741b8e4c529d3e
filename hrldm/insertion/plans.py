"""Plans: what to insert, from a CSV with a row per nodule (for one CT, or for the CTs of a batch) or from a record to repeat."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path, PurePath
from typing import NamedTuple

from hrldm.insertion.wish import Wish, own_seed
from hrldm.nodules.spreadsheet import read_spreadsheet

logger = logging.getLogger(__name__)
RECORD = "record.json"  # of an insertion
SCANS = "scans.csv"  # of a batch: all its results, negatives among them
NEGATIVE = "negative"  # in the place of a subtype: a CT that gets no nodule
COLUMNS = ("case", "ct")  # of a batch's plan, beside a wish's


class Case(NamedTuple):
    """One result: the name of its CT in the folder, and what it gets; nothing: a negative."""

    ct: str
    wishes: tuple[Wish, ...] = ()


def read_cases(path: str | Path, seed: int = 0) -> list[Wish] | dict[str, Case]:
    """What each result of a plan with a column `ct` gets; of any other plan its wishes, which are for every CT.

    Raises:
        ValueError: as `read_plan`; a result without a CT, of two CTs, both negative and not, or with an unsafe name.
    """
    path = Path(path)
    if path.suffix.lower() == ".json" or not path.is_file() or "ct" not in read_spreadsheet(path)[0]:
        return read_plan(path, seed)
    cases: dict[str, Case] = {}
    for row, wish in read_rows(path, seed, COLUMNS):
        ct = row.get("ct", "")
        name, new = row.get("case", ct), () if wish is None else (wish,)
        parts = PurePath(name)
        if not ct or parts.is_absolute() or ".." in parts.parts:
            raise ValueError(
                f"{path}: case {name!r} of CT {ct!r}; give each row a CT's name, and a case that is a folder's"
            )
        old = cases.get(name)
        if old is not None and (old.ct != ct or not old.wishes or not new):
            raise ValueError(f"{path}: case {name!r} is of two CTs, or negative and not; give each its own name")
        cases[name] = Case(ct, (*(old.wishes if old else ()), *new))
    if inside := [name for name in cases if any(str(above) in cases for above in PurePath(name).parents)]:
        raise ValueError(f"{path}: case {inside[0]!r} would lie within another's result; name it otherwise")
    return cases


def read_plan(path: str | Path, seed: int = 0) -> list[Wish]:
    """Wishes from a CSV with any of `Wish`'s fields as columns (blank: default; `at` as "x y z") and one row per
    nodule, or from the record.json of an earlier insertion, to repeat its nodules.

    seed: for rows without one: the first row's; those of the other rows are derived from it (as in `copies`)

    Raises:
        ValueError: unreadable, unknown column, no rows, or wrong rows, all listed by number.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return _recorded(path)
    wishes = [wish for _, wish in read_rows(path, seed)]
    if len(set(wishes)) < len(wishes):
        logger.warning(
            "%s: rows that are alike, seed and all, make nodules that are alike; give them seeds of their own", path
        )
    return wishes


def read_rows(path: Path, seed: int = 0, beside: Sequence[str] = ()) -> list[tuple[dict[str, str], Wish | None]]:
    """The rows of a plan: their cells, and their wishes; None for a `NEGATIVE`, which a plan with columns `beside` may have.

    Raises:
        ValueError: as `read_plan`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a CSV of wishes, or the record.json of an insertion")
    columns, rows, problems = read_spreadsheet(path)
    known, readable = [*beside, *(f.name for f in fields(Wish))], len(set(columns)) == len(columns)
    if unknown := [c or "(without a name)" for c in columns if c not in known]:
        problems.append(f"unknown column(s) {', '.join(unknown)}; known are {', '.join(known)}")
    if not rows:
        problems.append("no rows; one row a nodule below the header")
    read = []
    for k, (number, cells) in enumerate(rows.items() if readable and not unknown else ()):
        row = {name: text for name, text in zip(columns, cells, strict=True) if text}
        given = {"seed": own_seed(seed, k) if k else seed} | {n: text for n, text in row.items() if n not in beside}
        for name in ("histogram", "mask"):  # relative to the plan, as in a manifest, or to the working folder
            if name in given and os.path.exists(path.parent / given[name]):
                given[name] = path.parent / given[name]
        try:
            read.append((row, None if beside and given.get("subtype") == NEGATIVE else Wish(**given)))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise ValueError(f"{path}: {len(problems)} problem(s)\n" + "\n".join(problems))
    return read


def _recorded(path: Path) -> list[Wish]:
    """The wishes of a record.json, without the fields that earlier versions recorded but ignored."""
    try:
        nodules = [dict(n["wish"]) for n in json.loads(path.read_text(encoding="utf-8-sig"))["nodules"]]
        if unknown := {name for wish in nodules for name in wish} - {f.name for f in fields(Wish)}:
            raise ValueError(f"no wish has {', '.join(sorted(unknown))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the record of an insertion ({type(error).__name__}: {error}); give its record.json"
        ) from error
    wishes = []
    for k, wish in enumerate(nodules, start=1):
        unseen = ("diameter_mm", "location") if "mask" in wish else ("location",) if "at" in wish else ()
        try:
            wishes.append(Wish(**{name: value for name, value in wish.items() if name not in unseen}))
        except ValueError as error:
            raise ValueError(f"{path}: nodule {k}: {error}") from error
    return wishes
