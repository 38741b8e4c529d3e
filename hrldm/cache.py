"""What is made once is kept in the cache, under a hash of everything it was made from.

target = keyed("shapes", VERSION, pin, suffix=".npz")
if not target.exists():
    with atomic(target) as part:  # a file; `atomic_folder` for a folder
        ...
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hrldm import paths
from hrldm.atomic import write_text


def digest(*parts: object) -> str:
    """Hash (16 hex digits) of arrays by type, shape and values, of anything else, settings among it, by its `repr`."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape};".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(f"{part!r};".encode())
    return found.hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """SHA-256 of what a file holds (hex), wherever it lies; read again only when its size or date has changed."""
    seen = os.stat(path)
    key = digest(os.path.abspath(path), seen.st_size, seen.st_mtime_ns)
    known = paths.cache_dir() / "digests" / key[:2] / f"{key}.txt"  # in parts: there may be many thousands
    if not known.exists():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(known, found)
    return known.read_text()


def keyed(kind: str, *parts: object, suffix: str = "") -> Path:
    """The place in the cache of what is made from `parts` (`digest`), a version number among them."""
    return paths.cache_dir() / kind / f"{digest(*parts)}{suffix}"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes its final name only when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield part
        part.chmod(0o755)
        try:
            os.rename(part, target)
        except OSError:
            if not target.exists():  # if it exists, another process made the same thing first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
