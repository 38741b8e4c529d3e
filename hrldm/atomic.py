"""Writing that a kill, a full disk or a second process cannot leave half done."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

_HOST = platform.node()  # folders may be shared; process numbers are not


@contextlib.contextmanager
def atomic(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """A temporary neighbour to write to, flushed to disk and moved onto `path` only when the block ends well.

    Raises:
        ValueError: `path` is a folder, or exists and `overwrite` is False.
        OSError: the write failed (disk full, …); nothing of it is left and an older file stays as it was.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it (overwrite=True)")
    # the name keeps the suffix, which decides the format
    part = path.with_name(f".{os.getpid()}.{_HOST}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: could not be written ({error.strerror or error}); free space or choose another folder",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _clear(path: Path) -> None:
    """Remove what killed processes of this machine left of `path`."""
    for left in path.parent.glob(f".*.{glob.escape(_HOST)}-*-{glob.escape(path.name)}"):
        pid = left.name[1:].split(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a kill at any moment, finds the former file or the whole new one."""
    with atomic(path) as part:
        part.write_bytes(text.encode())
