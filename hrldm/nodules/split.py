"""The patient split, fixed by a committed file before anything was trained (see scripts/make_split.py)."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pandas as pd

_FILE = Path(__file__).with_name("lidc_split.csv")
SPLITS = ("train", "val", "test")


@functools.cache
def _table() -> dict[str, str]:
    with _FILE.open() as f:
        return {row["patient_id"]: row["split"] for row in csv.DictReader(f)}


def patient_split(patient_id: str) -> str:
    """`train`, `val` or `test` of a LIDC patient.

    Raises:
        ValueError: the patient is not in the committed split; give a `split` column in the manifest instead.
    """
    try:
        return _table()[patient_id]
    except KeyError:
        raise ValueError(
            f"patient {patient_id!r} is not in {_FILE.name}: add a `split` column (train, val, test) to the manifest"
        ) from None


def assert_disjoint(frame: pd.DataFrame, column: str = "patient_id") -> None:
    """Raise ValueError if a value of `column` occurs in two splits, naming the first few."""
    seen = frame.groupby(column)["split"].nunique()
    shared = seen[seen > 1].index.tolist()
    if shared:
        raise ValueError(
            f"{len(shared)} {column} value(s) stand in two splits, for example {shared[:3]}; split by patient"
        )
