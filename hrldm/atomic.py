"""Writing that a kill, a full disk or a second process cannot leave half done."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


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
    part = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")  # keeps the suffix, which decides the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a kill at any moment, finds the former file or the whole new one."""
    with atomic(path) as part:
        part.write_bytes(text.encode())
