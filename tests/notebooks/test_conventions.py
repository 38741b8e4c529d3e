"""Every notebook keeps the conventions that the Makefile, papermill, nbval and reviewers rely on."""

import ast
from pathlib import Path

import nbformat
import pytest

from scripts.notebook_deps import python_source

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
DEFAULTS = {"profile": "smoke", "dataset": "lidc-mini", "data_root": "", "seed": 0, "settings": ""}
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_title_then_parameters_of_plain_literals(path):
    title, parameters = nbformat.read(path, as_version=4).cells[:2]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert parameters.metadata.get("tags") == ["parameters"]
    assignments = ast.parse(parameters.source).body
    assert {a.targets[0].id: ast.literal_eval(a.value) for a in assignments} == DEFAULTS


def test_kernel_is_python3(path):
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


def test_no_outputs_are_committed(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)


def test_no_definitions_and_no_path_literals(path):
    tree = ast.parse(python_source(path))
    assert not [n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [s for s in strings if s.startswith(("/", "../", "results/", ".cache", "notebooks/"))]
