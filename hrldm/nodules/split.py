"""The patient split, fixed by a committed file before anything was trained (see scripts/make_split.py)."""

import csv
import functools
import hashlib
from pathlib import Path

import pandas as pd

_FILE = Path(__file__).with_name("lidc_split.csv")
SPLITS = ("train", "val", "test")
HASH_SHARES = (0.7, 0.8)  # cumulative train, train + val; the rest is test


@functools.cache
def lidc_split() -> dict[str, str]:
    """The split of every LIDC patient."""
    with _FILE.open() as f:
        return {row["patient_id"]: row["split"] for row in csv.DictReader(f)}


def patient_split(patient_id: str) -> str:
    """`train`, `val` or `test` of a LIDC patient.

    Raises:
        ValueError: the patient is not in the committed split; give a `split` column in the manifest instead.
    """
    try:
        return lidc_split()[patient_id]
    except KeyError:
        raise ValueError(
            f"patient {patient_id!r} is not in {_FILE.name}: add a `split` column (train, val, test) to the manifest"
        ) from None


def hash_share(patient_id: str) -> float:
    """A number from 0 to 1 drawn by the patient's id alone, so that adding patients moves no one."""
    return int(hashlib.sha256(patient_id.encode()).hexdigest()[:8], 16) / 16**8


def hash_split(patient_id: str) -> str:
    """`train`, `val` or `test` of a patient whom no one has allotted."""
    return SPLITS[sum(hash_share(patient_id) >= cut for cut in HASH_SHARES)]


def assert_disjoint(frame: pd.DataFrame, column: str = "patient_id") -> None:
    """Raise ValueError if a value of `column` occurs in two splits, naming the first few."""
    seen = frame.groupby(column)["split"].nunique()
    shared = seen[seen > 1].index.tolist()
    if shared:
        raise ValueError(
            f"{len(shared)} {column} value(s) stand in two splits, for example {shared[:3]}; split by patient"
        )
