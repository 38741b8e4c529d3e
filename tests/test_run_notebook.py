"""The runner of one notebook: parameters, a failed run, what is published, and what is refused beforehand."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from hrldm import paths
from scripts import run_notebook
from study.report.provenance import read_provenance

PARAMETERS = 'profile = "smoke"\ndataset = "lidc-mini"\ndata_root = ""\nseed = 0\nsettings = ""'


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a notebook of one cell in a results folder; returns exit status and that folder."""
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))

    def _call(code, *arguments, parameters=PARAMETERS):
        cell = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[new_markdown_cell("# toy"), cell, new_code_cell(code)])
        notebook.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "x", "language": "python"}
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        source, results = tmp_path / "notebooks" / "01_toy.ipynb", tmp_path / "lidc-mini" / "quick"
        nbformat.write(notebook, source)
        command = ["run_notebook.py", str(source), str(results / "runs" / "01_toy.ipynb")]
        monkeypatch.setattr(sys, "argv", [*command, "--profile", "quick", "--dataset", "lidc-mini", *arguments])
        return run_notebook.main(), results

    return _call


def test_parameters_reach_the_cells_and_the_result_names_no_folder(call):
    code = f"from pathlib import Path\nprint(profile, seed, Path.cwd().name, {str(paths.ROOT)!r} + '/hrldm/x.py')"
    status, results = call(code, "--seed", "7")
    assert status == 0
    executed = nbformat.read(results / "runs" / "01_toy.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "quick 7 notebooks hrldm/x.py\n"
    assert [p.name for p in (results / "runs").iterdir()] == ["01_toy.ipynb"]
    record = read_provenance(results)
    assert record["seed"] == 7 and record["profile"] == "quick" and record["wall_time_s"]["01_toy"] > 0


def test_folder_of_the_data_is_not_published(call, tmp_path):
    root = tmp_path / "my-patients"
    root.mkdir()
    (root / "manifest.csv").write_text("nodule_id\n")
    status, results = call("print(data_root)", "--dataset", "mine", "--data-root", str(root))
    text = (results / "runs" / "01_toy.ipynb").read_text(encoding="utf-8")
    assert status == 0 and "my-patients" not in text and "DATA_ROOT" in text


def test_memory_of_a_process_and_of_what_it_starts_is_recorded(call):
    """In a process of its own: this one has grown, and has workers, by the tests before."""
    child = "import time; x = bytearray(300 * 2**20); time.sleep(1)"
    code = f"""
import subprocess, sys
from scripts.run_notebook import TreeMemory
with TreeMemory() as memory:
    subprocess.run([sys.executable, "-c", {child!r}], check=True)
print(memory.peak_mb)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert 300 < int(done.stdout) < 1500
    status, results = call("1")
    assert status == 0 and read_provenance(results)["peak_memory_mb"]["01_toy"] > 50


def test_failed_run_leaves_only_its_copy_for_reading(call, capsys):
    status, results = call("raise RuntimeError('no such luck')")
    assert status == 1
    assert [p.name for p in (results / "runs").iterdir()] == ["01_toy.ipynb.part.ipynb"]
    assert "no such luck" in (results / "runs" / "01_toy.ipynb.part.ipynb").read_text(encoding="utf-8")
    assert "01_toy.ipynb.part.ipynb" in capsys.readouterr().err
    assert not (results / "provenance.json").exists()


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        (["--profile", "quik"], PARAMETERS, "unknown profile 'quik'"),
        (["--dataset", "lidc-cubes"], PARAMETERS, "'lidc-cubes' is not embedded: give DATA_ROOT"),
        (["--dataset", "mine", "--data-root", "no/such"], PARAMETERS, "no manifest.csv there"),
        (["--data-root", "no/such"], PARAMETERS, "DATA_ROOT 'no/such' without a name for its nodules: give DATASET"),
        (["--dataset", "../mine", "--data-root", "no/such"], PARAMETERS, "DATASET '../mine' names a folder of results"),
        ([], PARAMETERS.replace("seed", "sed"), "missing ['seed'], unknown ['sed']"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(call, capsys, arguments, parameters, message):
    status, results = call("1", *arguments, parameters=parameters)
    assert status == 2 and message in capsys.readouterr().err
    assert not results.exists()


def test_links_lead_to_the_same_file_from_the_run():
    text = "[01 →](01_data.ipynb) · [the executed run](../results/lidc-mini/quick/runs/00_start_here.ipynb) · [r](../results/README.md)"
    there = run_notebook.with_links_of_the_run(text)
    assert (
        there
        == "[01 →](01_data.ipynb) · [the notebook](../../../../notebooks/00_start_here.ipynb) · [r](../../../README.md)"
    )


def test_of_bars_within_a_bar_the_outer_one_is_left():
    text = "all:   0%\nstep: 10%\x1b[A\nstep: 100%\n\nother: 100%\n\rall:  50%\nstep: 5%\x1b[A\n\rall: 100%\n"
    bar = nbformat.v4.new_output("stream", name="stderr", text=text)
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[bar])])
    outputs = nbformat.reads(run_notebook.with_last_bars(nbformat.writes(notebook)), as_version=4).cells[0].outputs
    assert [o.text for o in outputs] == ["all: 100%\n"]


def test_a_progress_bar_leaves_its_last_line():
    bar = [nbformat.v4.new_output("stream", name="stderr", text=t) for t in ("\ra: 0%", "\ra: 50%", "\ra: 100%", "\n")]
    said = nbformat.v4.new_output("stream", name="stdout", text="said\r\nand more\n")
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[*bar, said]), new_markdown_cell("text")])
    outputs = nbformat.reads(run_notebook.with_last_bars(nbformat.writes(notebook)), as_version=4).cells[0].outputs
    assert [o.text for o in outputs] == ["a: 100%\n", "said\r\nand more\n"]
