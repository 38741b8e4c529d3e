"""The two houses: `hrldm` knows nothing of the study, and within it imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("ct", "nodules", "model", "train", "insertion")  # a room imports from itself and those before it
STUDY = (
    "profiles", "step_cost", "places", "study", "systems", "measure", "classify", "ablation", "experiments", "judging", "report", "notebook", "__main__",
)  # fmt: skip
NEVER = {("model", "nodules"), ("model", "ct")}  # `model` knows nothing of files


def imports(path: Path) -> set[str]:
    """Dotted names of `hrldm` and the study that a file imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n for n in names if n.split(".")[0] in ("hrldm", "study")}


def room(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


@pytest.mark.parametrize("path", sorted(ROOT.glob("hrldm/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_knows_nothing_of_the_study_and_points_one_way(path):
    own = path.relative_to(ROOT / "hrldm").parts[0]
    reached = imports(path)
    assert not [n for n in reached if n.startswith("study")]
    if own in ROOMS:
        later = set(ROOMS[ROOMS.index(own) + 1 :]) | {other for mine, other in NEVER if mine == own}
        assert not [n for n in reached if room(n) in later]


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/study/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_study_points_one_way(path):
    own = path.relative_to(ROOT / "notebooks" / "study").with_suffix("").parts[0]
    if own in STUDY:
        later = STUDY[STUDY.index(own) + 1 :]
        assert not [n for n in imports(path) if n.startswith("study.") and room(n) in later]
