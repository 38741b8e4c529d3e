"""One list of dependencies: what is imported is declared, what is declared is used, pinned and installed."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from scripts.notebook_deps import python_source

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"ipython": "IPython", "scikit-image": "skimage", "scikit-learn": "sklearn", "simpleitk": "SimpleITK"}
RUN_BY_NAME = {
    "einops",
    "ipykernel",
    "ipywidgets",
    "jupyterlab",
    "tabulate",
}  # used without an import of ours (einops by MONAI's attention)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines) -> dict[str, str]:
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([^;\s]+)", line.strip()) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonical(m[1]): m[2] for m in found}


def locked() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


def top_level_imports(paths) -> set[str]:
    names = set()
    for path in paths:
        text = python_source(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names


def product_files():
    return [
        *ROOT.glob("hrldm/**/*.py"),
        *ROOT.glob("notebooks/**/*.py"),
        *ROOT.glob("notebooks/*.ipynb"),
        *ROOT.glob("scripts/*.py"),
    ]


DIRECT = pins(PROJECT["dependencies"])
TEST_ONLY = pins(PROJECT["optional-dependencies"]["test"])
DOCS = pins(PROJECT["optional-dependencies"]["docs"])
OPTIONAL = pins(PROJECT["optional-dependencies"]["viewer"])
SEG = pins(PROJECT["optional-dependencies"]["dicom-seg"])
NOTEBOOKS = pins(PROJECT["optional-dependencies"]["notebooks"])
ALL = DIRECT | NOTEBOOKS | TEST_ONLY | DOCS


def test_direct_pins_are_the_locked_ones():
    lock = locked()
    assert {name: lock.get(name) for name in ALL} == ALL


@pytest.mark.parametrize("name", sorted(ALL))
def test_installed_version_is_the_pinned_one(name):
    installed = metadata.version(name).split("+")[0]  # a CPU build of torch calls itself 2.13.0+cpu
    assert installed == ALL[name]


def test_every_import_of_the_product_is_declared():
    known = set(sys.stdlib_module_names) | {"hrldm"}
    tool, study = (
        {MODULES.get(name, name) for name in names} for names in (DIRECT | SEG, DIRECT | SEG | NOTEBOOKS | OPTIONAL)
    )
    assert top_level_imports(ROOT.glob("hrldm/**/*.py")) - tool - known == set()
    assert top_level_imports(product_files()) - study - known - {"scripts", "study"} == set()


def test_every_declared_dependency_is_used():
    used = top_level_imports(product_files())
    assert {name for name in DIRECT | NOTEBOOKS if MODULES.get(name, name) not in used} - RUN_BY_NAME == set()


def test_neither_torchvision_nor_timm_comes_in():
    assert not {"torchvision", "timm"} & set(locked())


def test_conda_environment_takes_all_versions_from_the_two_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "make", "pip"]
    assert pip == {"pip": ["--constraint constraints.txt", "torch", "--editable .[docs,notebooks,test]"]}


@pytest.mark.parametrize(
    "path", ["Makefile", ".ci/run", "environment.yml", "pyproject.toml", "constraints.txt", "Dockerfile"]
)
def test_no_index_address_is_written_down(path):
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", (ROOT / path).read_text(encoding="utf-8"))
