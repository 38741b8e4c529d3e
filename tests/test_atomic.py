"""A file is the former one or the whole new one, whatever happens in between."""

import errno
import os
import subprocess
import sys

import pytest

from hrldm.atomic import atomic, write_text


def test_the_new_file_takes_the_place_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "table.csv"
    write_text(path, "µ\n")
    write_text(path, "σ\n")
    assert path.read_bytes() == "σ\n".encode() and [p.name for p in path.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("error", [RuntimeError("interrupted"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_former_file(tmp_path, error):
    path = tmp_path / "table.csv"
    write_text(path, "before")
    with pytest.raises(type(error)), atomic(path) as part:
        assert part.suffix == ".csv" and part.parent == tmp_path
        part.write_text("half")
        raise error
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


KILLED = """
import os, sys; from hrldm.atomic import atomic
with atomic(sys.argv[1]) as part:
    part.write_text('half'); os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_cleared_and_a_living_ones_is_not(tmp_path):
    path = tmp_path / "table.csv"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with atomic(path) as mine:
        mine.write_text("mine")
        write_text(path, "between")
        assert mine.exists()
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_said_with_the_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    said = r"table\.csv: cannot be written \(No space left on device\); choose another folder or free space"
    with pytest.raises(OSError, match=said) as found:
        write_text(tmp_path / "table.csv", "x")
    assert found.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_what_stands_there_stays_unless_asked(tmp_path):
    write_text(tmp_path / "x", "before")
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(ValueError, match="exists already"), atomic(path, overwrite=False):
            pytest.fail("entered")
    assert (tmp_path / "x").read_text() == "before"
    with pytest.raises(OSError, match="cannot be written"):
        write_text(tmp_path / "x" / "y", "")
