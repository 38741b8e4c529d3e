"""results/README.md, written whole from record.md beside this file and the views of the committed tables: ``python -m study record``."""

import json
import re
from pathlib import Path

import pandas as pd

from hrldm import paths
from hrldm.atomic import write_text
from study.report.tables import page, view

RESULTS = paths.ROOT / "results"
# sections: a heading, what its tables can tell, and which: {{folder: names}}, CSVs unless they have another ending
PAGE = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")


def read(file: Path) -> pd.DataFrame:
    """A CSV; the results of a model card; or what each notebook took, of a provenance file."""
    if file.suffix == ".csv":
        return pd.read_csv(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    if "results" in content:
        return pd.DataFrame(content["results"])
    cost = pd.DataFrame({name: content[name] for name in ("wall_time_s", "peak_memory_mb")})
    return cost.rename_axis("notebook").reset_index()


def views(found: re.Match) -> str:
    """The tables that ``{{folder: names}}`` asks for, each below a link to its file."""
    files = [f"{found[1]}/{name}" if "." in name else f"{found[1]}/{name}.csv" for name in found[2].split()]
    return "\n\n".join(f"[`{file}`]({file})\n\n{view(read(RESULTS / file), Path(file).stem)}" for file in files) + "\n"


def main(check: bool = False) -> int:
    """Write results/README.md and the Markdown view beside each table, from the CSVs.

    Args:
        check: write nothing; name the files that are not what the CSVs give, and return 1 if there are any.
    """
    tables = [csv for csv in sorted(RESULTS.glob("**/tables/*.csv")) if "smoke" not in csv.parts]  # never committed
    made = {csv.with_suffix(".md"): page(csv) for csv in tables}
    made[RESULTS / "README.md"] = re.sub(r"\{\{(.+): (.+)\}\}\n", views, PAGE)
    stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(file.relative_to(RESULTS).as_posix())
        if not check:
            write_text(file, made[file])
    return int(check and bool(stale))
