"""kill -9 at any moment, two runs on one folder: nothing lost, nothing left, nothing mixed."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import hrldm.__main__ as cli
from hrldm.insertion import record, released
from hrldm.insertion.summary import MANIFEST
from hrldm.nodules.manifest import load_manifest
from tests import tiny
from tests.insertion.chests import save, scan

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(*arguments) -> int:
    """The command line in a process of its own (its number), with a generator that paints."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        released.released = tiny.painting
        sys.argv = ["hrldm", *map(str, arguments)]
        status = cli.main()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Exit status, -9 of a killed one."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(runs: list[int], within_s: float, chance: random.Random) -> list[int]:
    """Exit statuses of two runs of which one or both were killed at some moment."""
    doomed = runs[: chance.choice((1, 2))]
    time.sleep(chance.uniform(0, within_s))
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    return [ended(pid) for pid in runs]


def whole(result: Path, source: Path) -> dict:
    """The record of a result that is complete and of one run."""
    made = json.loads((result / "record.json").read_text())
    files = (source, result / "ct.nii.gz", result / "mask.nii.gz")
    before, after, mask = (np.asarray(nib.load(file).dataobj) for file in files)
    assert (before != after).sum() == made["voxels_changed"] > 0 and mask.max() == len(made["nodules"])
    assert sorted(f.name for f in result.iterdir()) == ["ct.nii.gz", "mask.nii.gz", "preview.png", "record.json"]
    return made


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files but the records, which have the time in them, and the manifest, which says where the CTs lie."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in (record.RECORD, MANIFEST)]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a coarse chest in two files, what a batch makes of them, and how long one takes."""
    folder = tmp_path_factory.mktemp("small")
    ct, _ = scan(spacing=(4.0, 4.0, 5.0))
    (folder / "in").mkdir()
    for name in ("a", "b"):
        save(folder / "in" / f"{name}.nii.gz", ct.stored, ct.affine)
    before = time.perf_counter()
    assert ended(start("batch", folder / "in", folder / "out")) == 0
    return folder, (time.perf_counter() - before) / 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", range(2))
def test_killed_insertions(small, tmp_path, moment, overwrite):
    """Two runs into one folder (that may hold a former result), one or both killed, and one after them."""
    ct, out, more = tmp_path / "a.nii.gz", tmp_path / "out", ["--overwrite"] if overwrite else []
    shutil.copy(small[0] / "in" / "a.nii.gz", ct)
    (tmp_path / "thesis.txt").write_text("precious")
    if overwrite:
        assert ended(start("insert", ct, out, "--diameter", 8)) == 0
    runs = [start("insert", ct, out, "--seed", s, "--retries", 0, *more) for s in (1, 2)]
    statuses = killed(runs, small[1], random.Random(2 * moment + overwrite))
    done = [seed for seed, status in zip((1, 2), statuses, strict=True) if status == 0]
    assert overwrite or len(done) < 2
    there = overwrite or out.exists()  # a former result may be between its two names: it comes back
    assert ended(start("insert", ct, out, "--seed", 3)) == (2 if there else 0)
    if not there:
        possible = () if done else (3,)
    elif overwrite:
        possible = (1, 2) if done else (0, 1, 2)  # a run may be killed after its last move
    else:
        possible = done or (1, 2)
    assert whole(out, ct)["nodules"][0]["wish"]["seed"] in possible
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.nii.gz", "out", "thesis.txt"]


@pytest.mark.parametrize("moment", range(2))
def test_killed_batches(small, tmp_path, moment):
    """Two batches into one folder, one or both killed, and one that goes on."""
    folder, out = small[0], tmp_path / "out"
    killed([start("batch", folder / "in", out) for _ in range(2)], 2 * small[1], random.Random(moment))
    assert ended(start("batch", folder / "in", out)) == 0
    assert content(out) == content(folder / "out") and not list(tmp_path.rglob(".*"))
    assert len(load_manifest(out)) == 2
    for name in ("a", "b"):
        whole(out / name, folder / "in" / f"{name}.nii.gz")
