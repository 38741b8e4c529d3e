"""Atomic writes: no kill, full disk or second process leaves a half-written result."""

import contextlib
import errno
import glob
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

_HOST = platform.node()  # hosts may share folders, but not process ids


@contextlib.contextmanager
def atomic(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it is flushed to disk and renamed to `path` only if the block succeeds.

    Raises:
        ValueError: `path` is a folder, or exists and `overwrite` is False.
        OSError: the write failed (disk full, …); no partial file is left and an older file is untouched.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it (overwrite=True)")
    # the name keeps the suffix, which decides the format
    part = path.with_name(f".{os.getpid()}.{_HOST}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear(path)
            yield part
            with part.open("rb") as f:
                os.fsync(f.fileno())
            if path.exists() and not overwrite:
                raise ValueError(f"{path}: appeared meanwhile and is left as it is; choose another name")
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell an OSError of the block with `path`, its reason and what to do."""
    try:
        yield
    except OSError as error:
        said = f"{path}: cannot be written ({error.strerror or error}); choose another folder or free space"
        raise OSError(error.errno, said) from error


def _clear(path: Path) -> None:
    """Remove partial files of `path` left by killed processes of this machine."""
    for left in path.parent.glob(f".*.{glob.escape(_HOST)}-*-{glob.escape(path.name)}"):
        pid = left.name[1:].split(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader, even after a kill, finds the old file or the complete new one."""
    with atomic(path) as part:
        part.write_bytes(text.encode())


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder`, which need not exist, against other runs, and remove what killed runs left of it.

    The kernel releases the lock of a dead process, so what we find under our own lock belongs to no running process.

    Raises:
        ValueError: another run holds it, or it is the root.
        OSError: the location cannot be written.
    """
    if not folder.name:
        raise ValueError(f"{folder}: cannot be replaced; give a new folder")
    missing = [p for p in folder.parents if not p.exists()]
    part, former, lock = (folder.with_name(f".hrldm-{folder.name}{end}") for end in ("", "-former", "-lock"))
    mine = FileLock(lock, timeout=1)  # retries while another run is releasing its lock
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            mine.acquire()
        except Timeout:
            raise ValueError(
                f"{folder}: another run is writing it; wait until it ends, or choose another folder (if there is none, as "
                f"after a job was killed on another machine, remove {lock})"
            ) from None
    try:
        if former.exists() and not os.path.lexists(folder):  # killed between the two moves of `_exchange`
            former.replace(folder)
        for left in (part, former):
            shutil.rmtree(left, ignore_errors=True)
            if os.path.lexists(left):
                raise OSError(errno.EBUSY, f"{left}: left by a former run, and cannot be removed; remove it")
        yield
    finally:
        lock.unlink(missing_ok=True)
        mine.release()
        for parent in missing:
            with contextlib.suppress(OSError):  # keep it if not empty
                parent.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` to fill; it is renamed to `folder` only if the block succeeds.

    check: raises ValueError if an existing `folder` may not be replaced; called before the block and again after it. If
           something has appeared there meanwhile, it stays, and the results go to a new name given in the error.

    Raises:
        ValueError: from `check`, or another run holds the folder.
        OSError: it cannot be written (found before the block where possible); nothing is left behind.
    """
    part = folder.with_name(f".hrldm-{folder.name}")
    with held(folder):
        check(folder)
        try:
            part.mkdir()
            yield part
            _exchange(part, folder, check)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _exchange(part: Path, folder: Path, check: Callable[[Path], None]) -> None:
    """Move `part` to `folder`; an old folder stays until then and is restored if the move fails."""
    former = part.with_name(f"{part.name}-former")
    try:
        if os.path.lexists(folder):
            check(folder)
            folder.replace(former)
        part.replace(folder)
    except (ValueError, OSError) as error:
        if former.exists() and not os.path.lexists(folder):
            former.replace(folder)
        if isinstance(error, OSError) and error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        kept = part.replace(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        raise ValueError(
            f"{folder}: appeared or changed while this run worked, and is left as it is; the results are in {kept}"
        ) from error
    shutil.rmtree(former, ignore_errors=True)
