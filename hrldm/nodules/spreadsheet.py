"""Read CSV as spreadsheets write it, with cells keyed by the row number that a user sees."""

import csv
import io
from pathlib import Path

BLANK = ("nan", "na", "n/a", "#n/a", "<na>", "null", "none")  # what other programs write into an empty cell


def read_spreadsheet(path: Path) -> tuple[list[str], dict[int, list[str]], list[str]]:
    """Column names, stripped cells by row number (the header is row 1, blank rows count), and the problems found.

    Rows of commas only and trailing columns without name and cells, as spreadsheets leave them, are dropped.

    Raises:
        ValueError: not a readable CSV.
    """
    line = 1
    try:
        content = path.read_bytes()
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        rows = {}
        for row, cells in enumerate(reader, start=1):
            line = reader.line_num + 1
            rows[row] = ["" if c.strip().lower() in BLANK else c.strip() for c in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, UnicodeDecodeError):
            line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: not a readable CSV (line {line}: {error}); save it as comma-separated UTF-8"
        ) from error
    rows = {row: cells for row, cells in rows.items() if any(cells)}
    head = rows.pop(min(rows), []) if rows else []
    columns = head[: max((i for i, c in enumerate(head, start=1) if c), default=0)]
    problems = [f"column {c!r} stands {columns.count(c)} times" for c in dict.fromkeys(columns) if columns.count(c) > 1]
    if len(columns) == 1 and any(d in columns[0] for d in ";\t"):
        problems.append("one column only; separate columns by commas")
    good = {
        row: cells[: len(columns)]
        for row, cells in rows.items()
        if len(cells) >= len(columns) and not any(cells[len(columns) :])
    }
    problems += [
        f"row {row}: {len(cells)} fields where the header has {len(columns)}"
        for row, cells in rows.items()
        if row not in good
    ]
    return columns, good, problems
