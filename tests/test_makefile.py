"""The rules of the Makefile on a toy project: the real Makefile and dependency script, tiny notebooks and library."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["Makefile", "pyproject.toml", "constraints.txt", "scripts/notebook_deps.py", "hrldm/paths.py"]
# takes the place of scripts/run_notebook.py: a cell "raise" fails, everything else succeeds (the real one: test_run_notebook.py)
RUNNER = """
import sys
import time
from pathlib import Path
notebook, out = Path(sys.argv[1]), Path(sys.argv[2])
out.parent.mkdir(parents=True, exist_ok=True)
if "raise" in notebook.read_text(encoding="utf-8"):
    sys.exit(f"{notebook}: no such luck")
out.write_text(" ".join(sys.argv[3:]))
if (mark := Path("edit")).exists():  # somebody saves a module meanwhile
    mark.unlink()
    time.sleep(0.02)
    Path("hrldm/figures.py").touch()
with open("ran.log", "a") as log:
    log.write(notebook.stem + "\\n")
"""


class Toy:
    """A folder with the real Makefile and four notebooks; `make` returns what ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.write("scripts/run_notebook.py", RUNNER)
        self.write("hrldm/__init__.py", "")
        self.write("notebooks/study/__init__.py", "")
        self.write("notebooks/study/report/tables.py", "import sys\nprint('artefacts of', sys.argv[1])\n")
        self.write("hrldm/config.py", "")
        self.write("hrldm/figures.py", "def draw():\n    return 'drawn'\n")
        self.write("hrldm/model.py", "from . import weights\n\n\ndef fit():\n    return weights.load()\n")
        self.write("hrldm/weights.py", "FILE = 'prior.csv'\n\n\ndef load():\n    return FILE\n")
        self.write("hrldm/prior.csv", "a\n1\n")
        self.write("hrldm/unused.py", "")
        self.write("results/published/table1.csv", "system\n")
        self.notebook("01_data", "from hrldm import config")
        self.notebook("02_autoencoder", "from hrldm.model import fit\nfit()")
        self.notebook("03_hrldm", "%matplotlib inline\nimport hrldm.figures as f\nf.draw()")
        self.notebook("99_apart", "from hrldm import config; PUBLISHED = config")
        for file in root.rglob("*"):
            os.utime(file, (0, 0))

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def notebook(self, name: str, code: str) -> None:
        cell = {"cell_type": "code", "source": code.splitlines(keepends=True), "metadata": {}, "outputs": []}
        self.write(f"notebooks/{name}.ipynb", json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4}))

    def touch(self, name: str) -> None:
        """Newer than every stamp; a second make must not find it newer once more, so time itself has to pass."""
        time.sleep(0.02)
        os.utime(self.root / name)

    def make(self, *arguments: str, ok: bool = True, target: str = "reproduce") -> tuple[set[str], str]:
        """Names of the notebooks that ran to their end, and all output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "HRLDM_", "MFLAGS"))}
        command = ["make", target, f"PYTHON={sys.executable}", "PROFILE=smoke", *arguments]
        environment["PYTHONPATH"] = str(self.root)
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        text = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, text
        log = self.root / "ran.log"
        ran = log.read_text(encoding="utf-8").split() if log.exists() else []
        log.unlink(missing_ok=True)
        assert len(ran) == len(set(ran)), ran
        return set(ran), text

    @property
    def results(self) -> Path:
        return self.root / "results" / "lidc-mini" / "smoke"


ALL = {"01_data", "02_autoencoder", "03_hrldm", "99_apart"}


@pytest.fixture
def toy(tmp_path) -> Toy:
    """A toy project after one complete run with two jobs."""
    toy = Toy(tmp_path)
    toy.first = toy.make("-j2")
    return toy


def test_first_run_makes_everything_and_prints_the_artefacts(toy):
    ran, text = toy.first
    assert ran == ALL and f"artefacts of {toy.results}" in text
    assert {p.stem for p in (toy.results / "runs").iterdir()} == ALL


def test_second_run_does_nothing_and_says_so(toy):
    ran, text = toy.make()
    assert ran == set() and "nothing to do: all 4 notebooks are up to date" in text


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        ("hrldm/figures.py", {"03_hrldm"}),
        ("hrldm/weights.py", {"02_autoencoder", "03_hrldm"}),  # reached through model.py; 03 reads the stage of 02
        ("hrldm/prior.csv", {"02_autoencoder", "03_hrldm"}),  # named in weights.py
        ("results/published/table1.csv", {"99_apart"}),  # its folder's constant
        ("hrldm/config.py", ALL),
        ("hrldm/__init__.py", ALL),
        ("notebooks/99_apart.ipynb", {"99_apart"}),
        ("hrldm/unused.py", set()),
    ],
)
def test_a_change_runs_its_users_again_and_only_them(toy, changed, rerun):
    toy.touch(changed)
    assert toy.make()[0] == rerun


def test_failed_notebook_is_not_made_and_stops_what_needs_it(toy):
    toy.notebook("02_autoencoder", "raise")
    for _ in range(2):  # the second call must not count it as made
        ran, text = toy.make(ok=False)
        assert ran == set() and "02_autoencoder.ipynb: no such luck" in text
    toy.notebook("02_autoencoder", "1 + 1")
    assert toy.make()[0] == {"02_autoencoder", "03_hrldm"}


def test_another_seed_runs_all_again_and_reaches_the_notebook(toy):
    assert toy.make("SEED=5")[0] == ALL
    assert "--seed 5" in (toy.results / "runs" / "03_hrldm.ipynb").read_text(encoding="utf-8")
    assert toy.make("SEED=5")[0] == set()


def test_removed_run_is_made_again(toy):
    (toy.results / "runs" / "99_apart.ipynb").unlink()
    assert toy.make()[0] == {"99_apart"}


def test_a_run_that_git_put_back_is_made_again(toy):
    (toy.results / "runs" / "99_apart.ipynb").write_text("the authors' own")
    assert toy.make()[0] == {"99_apart"} and toy.make()[0] == set()


def test_a_module_saved_while_its_notebook_runs_runs_it_again(toy):
    toy.touch("hrldm/figures.py")
    toy.write("edit", "")
    assert toy.make()[0] == {"03_hrldm"} and toy.make()[0] == {"03_hrldm"} and toy.make()[0] == set()


def test_one_notebook_runs_with_those_before_it_only(toy):
    toy.touch("hrldm/config.py")
    assert toy.make(target="02_autoencoder")[0] == {"01_data", "02_autoencoder"}
    assert toy.make(target="02_autoencoder")[0] == set()
    assert toy.make()[0] == ALL - {"01_data", "02_autoencoder"}


def test_committed_runs_do_not_count_as_made_here(toy):
    shutil.rmtree(toy.root / ".cache")
    assert toy.make()[0] == ALL


def test_profiles_and_datasets_are_made_apart(toy):
    assert toy.make("PROFILE=quick")[0] == ALL
    assert toy.make()[0] == set()


def test_changed_manifest_of_the_user_runs_all_again(toy):
    arguments = ("DATASET=mine", "DATA_ROOT=my data")
    toy.write("my data/manifest.csv", "nodule_id\n")
    assert toy.make(*arguments)[0] == ALL
    assert toy.make(*arguments)[0] == set()
    toy.write("my data/manifest.csv", "nodule_id,image\n1,images/a b.nii\n")
    assert toy.make(*arguments)[0] == ALL
    toy.write("my data/images/a b.nii", "redrawn")
    assert toy.make(*arguments)[0] == ALL and toy.make(*arguments)[0] == set()


def test_a_folder_of_data_with_any_name_reaches_the_notebook_in_full(toy):
    toy.write("it's (my) data/manifest.csv", "nodule_id\n")
    assert toy.make("DATASET=mine", "DATA_ROOT=it's (my) data")[0] == ALL
    said = (toy.root / "results" / "mine" / "smoke" / "runs" / "01_data.ipynb").read_text(encoding="utf-8")
    assert f"--data-root {toy.root}/it's (my) data --seed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATASET=../x", "DATA_ROOT=data"], "DATASET '../x' names a folder of results: use letters"),
        (["DATASET=a b", "DATA_ROOT=data"], "DATASET 'a b' names a folder"),
        (["DATASET=it's", "DATA_ROOT=data"], 'DATASET "it\'s" names a folder'),
        (["DATASET=;touch x", "DATA_ROOT=data"], "DATASET ';touch x' names a folder"),
        (["PROFILE=/smoke"], "PROFILE '/smoke' names a folder"),
        (["PROFILE="], "PROFILE '' names a folder"),
        (["DATA_ROOT=data"], "DATA_ROOT 'data' without a name for its nodules: give DATASET=name too"),
        (["SEED=abc"], "SEED 'abc': give a whole number, 0 or more"),
        (["SEED=1.5"], "SEED '1.5': give a whole number"),
        (["DATASET=mine"], "dataset 'mine' is not embedded: give DATA_ROOT"),
        (["DATASET=mine", "DATA_ROOT=no'where"], "no'where: no manifest.csv there"),
        (["HRLDM_RESULTS=Makefile"], "Makefile is no folder; choose another folder"),
        (["HRLDM_CACHE=Makefile/x"], "Makefile is no folder; choose another folder"),
        (["HRLDM_RESULTS=my results"], "make cannot write into 'my results'"),
    ],
)
def test_what_cannot_be_a_run_is_refused_before_anything_is_written(tmp_path, arguments, message):
    toy = Toy(tmp_path / "toy")
    toy.write("data/manifest.csv", "nodule_id\n")
    before = sorted(tmp_path.rglob("*"))
    ran, text = toy.make(*arguments, ok=False)
    assert message in text and "Traceback" not in text and ran == set()
    assert sorted(tmp_path.rglob("*")) == before


def test_notebook_that_does_not_parse_is_named(toy):
    toy.notebook("99_apart", "import (")
    assert "99_apart.ipynb: cannot be parsed" in toy.make(ok=False)[1]


def test_clean_keeps_committed_results(toy):
    toy.write("results/lidc-mini/quick/tables/claims.csv", "claim\n")
    toy.write("results/lidc-mini/quick/runs/03_hrldm.ipynb.part.ipynb", "{}")
    subprocess.run(["make", "clean", f"PYTHON={sys.executable}"], cwd=toy.root, check=True, capture_output=True)
    left = {p.relative_to(toy.root).as_posix() for p in (toy.root / "results").rglob("*") if p.is_file()}
    assert left == {"results/lidc-mini/quick/tables/claims.csv", "results/published/table1.csv"}
    assert not (toy.root / ".cache").exists()
