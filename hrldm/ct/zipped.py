"""A zip unpacked to a temporary folder, after a look at what it claims to hold."""

import contextlib
import errno
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

MOST_TIMES = 100  # unpacked over packed size: CTs shrink to a half or a third, masks to a hundredth
FREE_BYTES = 256 * 2**20  # so much may always be unpacked: a small scan that is mostly constant


def is_zip(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".zip"


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A temporary folder with the files of a zip.

    Raises:
        ValueError: damaged, encrypted, or holding far more than a CT's zip of its size can; the path is not in the message.
        OSError: no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="hrldm-zip-") as tmp:
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                # the end record, whose file count zipfile reads but does not check
                archive.fp.seek(-22 - len(archive.comment), 2)
                count = int.from_bytes(archive.fp.read(12)[10:], "little")
                if len(set(names)) < len(names) or count not in (len(names), 0xFFFF):  # 0xFFFF: zip64
                    raise zipfile.BadZipFile(f"its list of files is damaged: {len(set(names))} names of {count} files")
                size = sum(member.file_size for member in archive.infolist())  # zipfile never writes more than these
                if size > max(FREE_BYTES, MOST_TIMES * path.stat().st_size):
                    raise zipfile.BadZipFile(f"it would grow to {size / 1e6:.0f} MB, more than a CT does")
                archive.extractall(tmp)
        except Exception as error:  # zipfile raises many kinds: damaged, encrypted, unknown method
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                said = f"{path}: no room to unpack it in {tmp}; set TMPDIR to a larger disk"
                raise OSError(error.errno, said) from error
            raise ValueError(
                f"cannot be unpacked ({error}); give an intact zip without password, or the folder"
            ) from error
        yield Path(tmp)


def image_within(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a zip holds a file that ends in one of `suffixes` and no DICOM file; False also for a damaged zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            images = [name for name in names if name.lower().endswith(suffixes)]
            return bool(images) and not any(_is_dicom(archive, name) for name in set(names) - set(images))
    except Exception:  # as above; `unpacked` says it
        return False


def _is_dicom(archive: zipfile.ZipFile, name: str) -> bool:
    with archive.open(name) as file:
        return file.read(132)[128:] == b"DICM"
