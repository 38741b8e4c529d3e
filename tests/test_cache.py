"""What is kept in the cache: another input is another place, and a folder is there complete or not at all."""

import hashlib
import os

import numpy as np
import pytest

from hrldm import paths
from hrldm.cache import atomic_folder, digest, file_digest, keyed

ARRAY = np.arange(6, dtype=np.int16)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("ab", "c"), ("a", "bc"), id="cut elsewhere"),
        pytest.param((1, 2), (2, 1), id="order"),
        pytest.param((1,), ("1",), id="number and text"),
        pytest.param((ARRAY,), (ARRAY.astype(np.int32),), id="type of an array"),
        pytest.param((ARRAY,), (ARRAY.reshape(2, 3),), id="shape of an array"),
        pytest.param((ARRAY,), (ARRAY + 1,), id="values of an array"),
    ],
)
def test_other_parts_have_another_place(one, other, tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    assert keyed("kind", *one, suffix=".npz") == paths.cache_dir() / "kind" / f"{digest(*one)}.npz"
    assert keyed("kind", *one) != keyed("kind", *other)


def test_an_arrays_order_in_memory_is_no_part_of_it():
    square = np.arange(9.0).reshape(3, 3)
    assert digest(square) == digest(np.asfortranarray(square))


def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "scan.nii.gz"
    file.write_bytes(b"abc")
    assert file_digest(file) == hashlib.sha256(b"abc").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert file_digest(str(file)) == hashlib.sha256(b"abc").hexdigest()
    file.write_bytes(b"abd")
    os.utime(file, ns=(1, 1))
    assert file_digest(file) == hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")


def test_a_folder_is_there_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="disk full"), atomic_folder(tmp_path / "kind" / "key") as part:
        (part / "half").touch()
        raise RuntimeError("disk full")
    assert list((tmp_path / "kind").iterdir()) == []
    for name in ("first", "second"):  # the second process finds the work of the first, and keeps it
        with atomic_folder(tmp_path / "kind" / "key") as part:
            (part / name).touch()
            assert not (tmp_path / "kind" / "key" / "second").exists()
    assert [f.name for f in (tmp_path / "kind").rglob("*")] == ["key", "first"]
