"""What the notebooks import, how they draw and how they end (the rest is in test_conventions)."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest

from scripts.notebook_deps import python_source

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
STACK = {"hrldm", "study", "numpy", "pandas", "torch", "scipy", "IPython"} | sys.stdlib_module_names
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_imports_are_the_library_and_the_standard_stack(path):
    tree = ast.parse(python_source(path))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {m.partition(".")[0] for m in modules} <= STACK


def test_cells_have_ids_of_their_own(path):
    cells = nbformat.read(path, as_version=4).cells
    assert len({c.id for c in cells}) == len(cells)


def test_title_cell_names_the_paper_s_part_and_the_runtime(path):
    title = nbformat.read(path, as_version=4).cells[0].source.lower()
    assert "paper" in title and "runtime" in title


def test_every_figure_is_saved_and_provenance_written(path):
    source = python_source(path)
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    names = [c.func.id if isinstance(c.func, ast.Name) else getattr(c.func, "attr", "") for c in calls]
    drawn = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "fig"]
    assert names.count("show") >= len(drawn)
    assert names.count("finish") == 1
