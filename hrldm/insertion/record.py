"""The record of an insertion: what is needed to reproduce its bytes, and whether a result matches a new request."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from hrldm import __version__
from hrldm.ct.dicom_write import NOTE
from hrldm.ct.image import WRITTEN
from hrldm.ct.volume import CT
from hrldm.insertion.generator import Generator
from hrldm.insertion.insert import Inserted
from hrldm.insertion.plans import RECORD
from hrldm.insertion.wish import SEED_RULE, Wish
from hrldm.train.latents import weights_digest

PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom")


def asked_for(
    generator: Generator,
    lungs: str | Path | None = None,
    avoid: str | Path | None = None,
    retries: int = 2,
    private: str = "strip",
    format: str = "same",
    matching: bool = True,
    grain: bool = True,
    seg: bool = False,
) -> dict:
    """What a record says of the request besides the wishes."""
    how = generator.sampling
    return {
        "seeds": SEED_RULE,
        "options": {
            "lungs_given": lungs is not None,
            "avoid": avoid and Path(avoid).name,
            "retries": retries,
            "private": private,
            "format": format,
            "matching": matching,
            "grain": grain,
            **({"seg": True} if seg else {}),
        },
        "weights": {"autoencoder": weights_digest(generator.autoencoder), "unet": weights_digest(generator.unet)},
        "sampling": {
            "sampler": how.sampler,
            "steps": how.steps,
            "background": generator.config.diffusion.background,
            "match_t_max": how.match_t_max,
            "match_rounds": how.match_rounds,
        },
    }


def inputs(
    path: str | Path, wishes: Sequence[Wish], lungs: str | Path | None = None, avoid: str | Path | None = None
) -> dict[str, Path]:
    """The input files of a result, by their names in a record."""
    named = {"ct": path, "lungs": lungs, "avoid": avoid}
    named |= {
        f"{part} of {k}": getattr(w, part) for k, w in enumerate(wishes, start=1) for part in ("histogram", "mask")
    }
    return {name: Path(file) for name, file in named.items() if isinstance(file, str | os.PathLike)}


def stamp(file: Path) -> dict:
    """Size, time and hash of a file, or of all files in a folder except hidden ones."""
    files = _content(file)
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as f:
            while part := f.read(2**22):
                digest.update(part)
    return _size_and_time(files) | {"sha256_16": digest.hexdigest()[:16]}


def _content(file: Path) -> list[Path]:
    return sorted(f for f in file.rglob("*") if f.is_file() and not f.name.startswith(".")) if file.is_dir() else [file]


def _size_and_time(files: Sequence[Path]) -> dict:
    found = [f.stat() for f in files]
    return {"bytes": sum(f.st_size for f in found), "modified": max((f.st_mtime for f in found), default=0.0)}


def _unchanged(file: Path, old: dict) -> bool:
    """Whether a file matches a `stamp`: same size and time, or (a copy) same size and hash."""
    now = _size_and_time(_content(file))
    if now["bytes"] != old["bytes"]:
        return False
    return now["modified"] == old["modified"] or stamp(file)["sha256_16"] == old["sha256_16"]


def told_apart(
    record: Path,
    path: str | Path,
    wishes: Sequence[Wish],
    generator: Generator,
    lungs: str | Path | None = None,
    **options,
) -> list[str]:
    """How a request differs from a record's, besides the wishes, in what must agree to reproduce the same bytes."""
    old = json.loads(record.read_text(encoding="utf-8-sig"))
    there = {part: values for part, values in old.items() if isinstance(values, dict)}
    asked = asked_for(generator, lungs, **options) | {"versions": {"hrldm": __version__}}
    known = {name: of.get("sha256_16") for name, of in there.pop("files", {}).items() if isinstance(of, dict)}
    given = inputs(path, wishes, lungs, options.get("avoid"))
    if known:  # records of earlier versions have none; a missing file is reported when it is read
        there["files"] = known
        asked["files"] = {name: stamp(file)["sha256_16"] for name, file in given.items() if file.exists()}
    return [
        f"{part} {name}: {was} there, {now} here"
        for part, values in asked.items() if isinstance(values, dict)
        for name, now in values.items() if (was := there.get(part, {}).get(name)) != now
    ]  # fmt: skip


def made_of(out: Path, wishes: Sequence[Wish], asked: dict, files: dict[str, Path]) -> bool | None:
    """Whether the result in `out` was made from this request and these files by this version; None if there is none."""
    if not os.path.lexists(out / RECORD):
        return None
    try:
        old = json.loads((out / RECORD).read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps([w.given() for w in wishes]))
        for wish in [*wanted, *(nodule["wish"] for nodule in old["nodules"])]:
            for name in ("histogram", "mask"):  # files may move: their hashes are compared instead
                if isinstance(wish.get(name), str):
                    del wish[name]
        return (
            [nodule["wish"] for nodule in old["nodules"]] == wanted
            and (out / "mask.nii.gz").is_file()
            and any((out / f"ct{end}").is_file() for end in WRITTEN)
            and old["versions"]["hrldm"] == __version__
            and set(old["files"]) == set(files)
            and all(old.get(key) == value for key, value in asked.items())
            and all(_unchanged(file, old["files"][name]) for name, file in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no record of ours
        return False


def head(note: str, ct: CT, stored: np.ndarray, lungs: str, **more) -> dict:
    """What every record begins with; stored: the values that replaced the CT's own."""
    return {
        "note": note,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"name": Path(ct.source).name, "shape": list(ct.shape), "affine": ct.affine.round(6).tolist()},
        "lungs": Path(lungs).name,
        "voxels_changed": int((stored != ct.stored).sum()),
        **more,
        "versions": {"hrldm": __version__} | {name: metadata.version(name) for name in PACKAGES},
    }


def record_of(ct: CT, made: Inserted, generator: Generator, lungs: str) -> dict:
    """The rest of the record: with `asked_for`, the stamps of `inputs` and the nodules, it reproduces the result.

    It holds no patient data.
    """
    # another number of threads sums in another order: single voxels then differ by 1 HU
    device = {"name": generator.device, "threads": torch.get_num_threads()}
    return head(NOTE, ct, made.stored, lungs, device=device)
