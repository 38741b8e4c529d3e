"""The wheel: what it holds, and that the installed tool inserts offline, away from the repository, and leaves nothing about."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.insertion.chests import save, scan

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed package, made from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "hrldm", folder / "source" / "hrldm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True)
    return folder / "site"


def call(installed: Path, here: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in a folder, with the installed package alone on the path, and no way out."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HRLDM", "PYTHON"))}
    environment |= {"PYTHONPATH": str(installed), "https_proxy": "http://127.0.0.1:1", "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)


def test_everything_the_tool_needs_is_in_it_and_the_study_is_not(installed):
    files = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    assert {"hrldm/nodules/shapes.npz", "hrldm/weights/unet.safetensors", "hrldm/nodules/hu_histograms.csv"} <= files
    assert "bin/hrldm" in files and not [f for f in files if f.startswith(("study", "tests", "scripts", "notebooks"))]


@pytest.mark.slow
def test_it_inserts_offline_and_writes_nothing_but_its_results(installed, tmp_path):
    ct, labels = scan(spacing=(2.0, 2.0, 2.5))
    save(tmp_path / "ct.nii.gz", ct.stored, ct.affine)
    save(tmp_path / "lungs.nii.gz", labels, ct.affine)
    before = {p for p in installed.rglob("*") if "__pycache__" not in p.parts}
    wish = ("--subtype", "solid", "--diameter", "10", "--lungs", "lungs.nii.gz", "--steps", "1")
    done = call(installed, tmp_path, "-m", "hrldm", "insert", "ct.nii.gz", "out", *wish)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "lungs.nii.gz", "out"]
    assert {p for p in installed.rglob("*") if "__pycache__" not in p.parts} == before
    where = call(installed, tmp_path, "-c", "import hrldm; print(hrldm.__file__)").stdout
    assert where.startswith(str(installed))


def test_importing_takes_less_than_a_second(installed, tmp_path):
    program = "import time; t = time.perf_counter(); import hrldm.__main__; print(time.perf_counter() - t)"
    seconds = [float(call(installed, tmp_path, "-c", program).stdout) for _ in range(3)]
    assert min(seconds) < 1.0
