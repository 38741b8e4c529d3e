"""kill -9 at any moment, two runs on one folder: nothing lost, nothing left, nothing mixed."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import hrldm.__main__ as cli
from hrldm.insertion import insert, record, released
from tests import tiny
from tests.insertion.test_insert import LIBRARY, scan

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(*arguments) -> int:
    """The command line in a process of its own (its number), with a generator that paints."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        insert.load_shapes = lambda: LIBRARY
        released.released = lambda **changes: tiny.PaintingGenerator()
        sys.argv = ["hrldm", *map(str, arguments)]
        status = cli.main()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Exit status, -9 of a killed one."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole(result: Path, source: Path) -> dict:
    """The record of a result that is complete and of one run."""
    record = json.loads((result / "record.json").read_text())
    before, after, mask = (
        np.asarray(nib.load(p).dataobj) for p in (source, result / "ct.nii.gz", result / "mask.nii.gz")
    )
    assert (before != after).sum() == record["voxels_changed"] > 0 and mask.max() == len(record["nodules"])
    assert sorted(f.name for f in result.iterdir()) == ["ct.nii.gz", "mask.nii.gz", "record.json"]
    return record


def content(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != record.RECORD  # which has the time in it
    }


def killed_inserts(root: Path, overwrite: bool, run_s: float, chance: random.Random) -> None:
    """Two runs into one folder (that may hold a former result), one or both killed, and one after them."""
    ct, out, own = root / "a.nii.gz", root / "out", root / "thesis.txt"
    own.write_text("precious")
    if overwrite:
        assert ended(start("insert", ct, out, "--diameter", 8)) == 0
    more = ["--overwrite"] if overwrite else []
    runs = [start("insert", ct, out, "--seed", s, "--retries", 0, *more) for s in (1, 2)]
    doomed = runs[: chance.choice((1, 2))]
    time.sleep(chance.uniform(0, run_s))
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    done = [s for s, pid in zip((1, 2), runs, strict=True) if ended(pid) == 0]
    assert overwrite or len(done) < 2
    there = overwrite or out.exists()  # a former result may be between its two names: it comes back
    assert ended(start("insert", ct, out, "--seed", 3)) == (2 if there else 0)
    seed = whole(out, ct)["nodules"][0]["wish"]["seed"]
    if not there:
        assert seed == 3 and not done
    elif overwrite:
        assert seed in ((1, 2) if done else (0, 1, 2))  # a run may be killed after its last move
    else:
        assert seed in (done or (1, 2))
    assert own.read_text() == "precious" and sorted(f.name for f in root.iterdir()) == ["a.nii.gz", "out", "thesis.txt"]


def killed_batches(root: Path, reference: dict[str, str], run_s: float, chance: random.Random) -> None:
    """Two batches into one folder, one or both killed, and one that goes on."""
    source, out = root / "in", root / "out"
    runs = [start("batch", source, out) for _ in range(2)]
    doomed = runs[: chance.choice((1, 2))]
    time.sleep(chance.uniform(0, 2 * run_s))
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    for pid in runs:
        ended(pid)
    assert ended(start("batch", source, out)) == 0
    assert content(out) == reference and not [f for f in root.rglob(".*")]
    for name in ("a", "b"):
        whole(out / name, source / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A coarse chest in a file, what a batch of two makes of it, and how long a run takes."""
    folder = tmp_path_factory.mktemp("small")
    ct, _ = scan(spacing=(4.0, 4.0, 5.0))
    (folder / "in").mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(ct.stored, ct.affine), folder / "in" / f"{name}.nii.gz")
    before = time.perf_counter()
    assert ended(start("batch", folder / "in", folder / "out")) == 0
    return folder, (time.perf_counter() - before) / 2


@pytest.mark.parametrize("moment", range(4))
def test_killed_insertions(small, tmp_path, moment):
    folder, run_s = small
    (tmp_path / "a.nii.gz").write_bytes((folder / "in" / "a.nii.gz").read_bytes())
    killed_inserts(tmp_path, moment % 2 == 1, run_s, random.Random(moment))


@pytest.mark.parametrize("moment", range(2))
def test_killed_batches(small, tmp_path, moment):
    folder, run_s = small
    (tmp_path / "in").symlink_to(folder / "in")
    killed_batches(tmp_path, content(folder / "out"), run_s, random.Random(moment))
