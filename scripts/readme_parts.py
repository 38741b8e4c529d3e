"""What the tables of results/README.md are written with."""

from pathlib import Path

import pandas as pd


def read_table(results: Path, name: str) -> pd.DataFrame:
    """A table of a results folder."""
    return pd.read_csv(results / "tables" / f"{name}.csv")


def interval(value: float, low: float, high: float, form: str = ".3g") -> str:
    """`value (low to high)`."""
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def markdown(rows: list, head: list[str]) -> str:
    """A Markdown table of ready-made text."""
    return pd.DataFrame(rows, columns=head).to_markdown(index=False, disable_numparse=True)
