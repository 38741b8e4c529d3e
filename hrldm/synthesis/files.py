"""Insertion from disk to disk: one CT into a folder of results, or a folder of CTs into a folder of such folders.

The results of one CT appear together, when all of them are written: `ct.nii.gz` (or `.nii`, as the input) with the
input's affine, header and dtype, `mask.nii.gz` (k for the k-th nodule), `record.json`, and for a DICOM input the derived
series in `dicom/`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from hrldm import __version__
from hrldm.atomic import held, new_folder, write_text
from hrldm.data.beside import read_avoided
from hrldm.data.ct import CT, read_ct, write_nifti
from hrldm.data.dicom_headers import holds_dicom
from hrldm.data.dicom_write import NOTE, PRIVATE, check_source, write_series
from hrldm.data.lungs import lung_labels
from hrldm.synthesis.generate import Generator
from hrldm.synthesis.insert import Inserted, check_retries, insert
from hrldm.synthesis.plan import SEED_RULE, Wish, own_seed, summary
from hrldm.synthesis.whole_volume import insert_whole
from hrldm.train.latents import weights_digest

logger = logging.getLogger(__name__)
RECORD = "record.json"
FORMATS = ("same", "nifti")
_SUFFIX = re.compile(r"\.(nii\.gz|nii|zip)$", re.IGNORECASE)
_WRITTEN = re.compile(r"ct\.nii(\.gz)?|mask\.nii\.gz|record\.json|dicom/\d+\.dcm")  # what `insert_file` writes
PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom")


def insert_file(
    path: str | Path,
    out: str | Path,
    wishes: Sequence[Wish],
    generator: Generator,
    lungs: str | Path | None = None,
    avoid: str | Path | None = None,
    retries: int = 2,
    overwrite: bool = False,
    private: str = "strip",
    series_uid: str | None = None,
    whole_volume: bool = False,
    format: str = "same",
) -> dict:
    """Read a CT, insert the wishes, write the folder `out`; returns the record.

    Args:
        path:      NIfTI file, DICOM folder or zip
        lungs:     lung mask or TotalSegmentator map of this CT; None segments it
        avoid:     mask that no nodule may touch, for example of known lesions
        overwrite: replace a folder that a former insertion wrote
        private:   strip or keep private DICOM tags
        whole_volume: the paper's Algorithm 2 over the whole scan, for comparison: every voxel of the body changes
        format:    "same": a DICOM source gives a derived DICOM series too; "nifti": NIfTI alone

    Raises:
        ValueError: any wrong input, before any long work, named; nothing is written.
        OSError: no room for the results, or they could not be written; nothing of them is left.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    _check(wishes, generator, retries, private, format, whole_volume)
    source, target = (Path(os.path.realpath(p)) for p in (path, out))
    if source in (target, *target.parents) or target in source.parents:
        raise ValueError(f"{out}: the CT and its results cannot lie in one another; choose a folder beside {path}")
    with new_folder(out, lambda folder: check_output(folder, overwrite)) as part:
        ct = read_ct(path, series_uid=series_uid)
        derive = format == "same" and ct.provenance.get("format") == "dicom"
        if derive:
            check_source(path, series_uid)
        need, disk = ct.stored.nbytes * (1 + derive), shutil.disk_usage(part)
        if disk.total and disk.free < need:  # some shared disks say nothing
            raise OSError(
                f"{out}: the results take up to {need / 1e6:.0f} MB, and its disk has {disk.free / 1e6:.0f} MB free"
            )
        labels, found = lung_labels(ct, lungs)
        known = None if avoid is None else read_avoided(avoid, ct, labels)
        with _memory():
            if whole_volume:
                made = insert_whole(ct, wishes, generator, labels, known)
            else:
                made = insert(ct, wishes, generator, labels, known, retries)
        asked = _asked(generator, lungs, avoid, retries, private, whole_volume, format)
        record = _record(ct, made, generator, found) | asked | {"nodules": made.records}
        suffix = ".nii" if str(path).endswith(".nii") else ".nii.gz"
        write_nifti(part / f"ct{suffix}", made.stored, ct)
        write_nifti(part / "mask.nii.gz", made.mask, CT(made.mask, ct.affine))
        if derive:
            key = hashlib.sha256(json.dumps(record["nodules"], sort_keys=True).encode()).hexdigest()
            write_series(path, made.stored, part / "dicom", key, private, series_uid)
        write_text(part / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def insert_folder(
    folder: str | Path,
    out: str | Path,
    wishes: Sequence[Wish],
    generator: Generator,
    lungs: str | Path | None = None,
    overwrite: bool = False,
    **options,
) -> dict[str, str]:
    """`insert_file` for every CT in `folder` into `out/<name>`; those that are there already are left, so a killed run goes on.

    Each CT gets the same wishes with seeds of its own (from its name). lungs: folder with a label map of the same name.
    What `find_cts` passes over is logged.

    Returns:
        name -> "done", "there already" or the error.

    Raises:
        ValueError: no CT in the folder, two of one name, another run into `out`, or results there that were asked for
            otherwise: nothing is begun then.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, where a folder for the results is needed")
    found, passed = find_cts(folder, out)
    if passed:
        logger.warning("%s: passed over, no CT: %s", folder, ", ".join(passed))
    if not found:
        raise ValueError(f"{folder}: no CT in it (.nii, .nii.gz, .zip, or folders of DICOM files)")
    _check(wishes, generator, **options)
    own = {
        name: [replace(w, seed=own_seed(w.seed, *hashlib.sha256(os.fsencode(name)).digest())) for w in wishes]
        for name in found
    }
    said = {}
    with held(out):
        asked = _asked(generator, lungs, **options)
        maps = {name: None if lungs is None else _same_name(Path(lungs), name) for name in found}
        others = [
            name
            for name, path in found.items()
            if not overwrite and not _as_asked(out / name, own[name], asked, (path, maps[name], options.get("avoid")))
        ]
        if others:
            raise ValueError(
                f"{out}: {len(others)} result(s) there were made of another request or version, or before a file they were "
                f"made of changed, first {others[0]}; choose another folder, or overwrite=True"
            )
        for name, path in tqdm(found.items(), desc="CTs", mininterval=5):
            target = out / name
            try:
                with held(target):
                    there = not overwrite and (target / RECORD).exists()
                if not there:
                    if lungs is not None and maps[name] is None:
                        raise ValueError(f"{lungs}: no label map named {name}.nii.gz")
                    insert_file(path, target, own[name], generator, maps[name], overwrite=overwrite, **options)
                said[name] = "there already" if there else "done"
            except (ValueError, OSError) as error:
                logger.error("%s", error)
                said[name] = str(error)
    return said


def find_cts(folder: str | Path, out: Path | None = None) -> tuple[dict[str, Path], list[str]]:
    """CTs of a folder by the name of their result, and what was passed over.

    A CT is a NIfTI file, a zip, or a folder of files that are neither; folders that hold NIfTI files or zips and no DICOM
    are searched through, so names may have parts ("site/scan"). Passed over: other files, hidden ones, empty folders,
    results of insertions, and `out`.

    Raises:
        ValueError: no such folder, or CTs whose results would have one name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found: dict[str, Path] = {}
    passed = []
    for path, is_ct in _entries(root, tuple(Path(os.path.realpath(p)) for p in (root, out) if p is not None)):
        inner = path.relative_to(root)
        if not is_ct:
            passed.append(str(inner))
        elif (name := str(inner.with_name(_SUFFIX.sub("", path.name)))) in found:
            raise ValueError(
                f"{root}: {inner} and {found[name].relative_to(root)} would have one result, {name}; rename or move one"
            )
        else:
            found[name] = path
    if nested := [n for n in found if any(str(above) in found for above in Path(n).parents)]:
        raise ValueError(f"{root}: the result of {nested[0]} would lie within another's; rename or move one")
    return found, passed


def _entries(folder: Path, known: tuple) -> Iterator[tuple[Path, bool]]:
    """What lies in a folder, and whether it is a CT; `known`: folders to leave."""
    for path in sorted(folder.iterdir()):
        try:
            yield from _entry(path, known)
        except OSError as error:  # lost+found, a colleague's
            logger.warning("%s: cannot be read (%s)", path, error.strerror or error)
            yield path, False


def _entry(path: Path, known: tuple) -> Iterator[tuple[Path, bool]]:
    real = Path(os.path.realpath(path))
    if path.name.startswith(".") or real in known or (path / RECORD).exists():
        yield path, False
    elif not path.is_dir():
        yield path, path.is_file() and _SUFFIX.search(path.name) is not None
    else:
        os.listdir(path)  # one that cannot be read says so
        below = list(path.rglob("*"))  # follows no links
        files = [f for f in below if f.is_file()]
        volumes = [f for f in files if _SUFFIX.search(f.name)]
        if (volumes or any(f.is_symlink() and f.is_dir() for f in below)) and not holds_dicom(path):
            yield from _entries(path, (*known, real))
        else:
            yield path, bool(files)
            yield from ((f, False) for f in volumes)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise ValueError when `out` may not be written: it exists, or holds something that no insertion made."""
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink() and not os.listdir(out):  # a job script made it
        return
    if not overwrite:
        raise ValueError(f"{out}: exists already; choose another name or ask to overwrite it (overwrite=True)")
    if out.is_symlink():
        raise ValueError(f"{out}: a link, so it is not overwritten; give the folder it leads to")
    if not out.is_dir() or not (out / RECORD).is_file():
        raise ValueError(f"{out}: not a folder that an insertion wrote (no {RECORD}), so it is not overwritten")
    within = (f.relative_to(out) for f in out.rglob("*") if f.is_symlink() or not f.is_dir())
    if foreign := sorted(str(f) for f in within if not _WRITTEN.fullmatch(f.as_posix())):
        raise ValueError(f"{out}: no insertion wrote {foreign[0]} in it, so it is not overwritten; move that elsewhere")


def _same_name(folder: Path, name: str) -> Path | None:
    return next((f for suffix in (".nii.gz", ".nii") if (f := folder / f"{name}{suffix}").is_file()), None)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Too little memory, of a machine or of a GPU that others use too, is a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else "none left"
        if isinstance(error, RuntimeError) and not re.search("memory|CUDA", said):
            raise
        raise OSError(
            errno.ENOMEM, f"not enough memory, or the GPU is not to be had ({said}); free some, or on='cpu'"
        ) from error


def _check(
    wishes: Sequence[Wish],
    generator: Generator,
    retries: int = 2,
    private: str = PRIVATE[0],
    format: str = FORMATS[0],
    whole_volume: bool = False,
    **_,
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: choose {' or '.join(FORMATS)}, not {format!r}")
    if private not in PRIVATE:
        raise ValueError(f"private tags: choose {' or '.join(PRIVATE)}, not {private!r}")
    check_retries(retries)
    if not wishes:
        raise ValueError("nothing to insert: the plan is empty")
    if whole_volume and len(wishes) > 1:
        raise ValueError(
            "Algorithm 2 over the whole volume makes one nodule; leave out whole_volume=True, or ask for one"
        )
    if any(w.core_mm is not None for w in wishes) and (whole_volume or generator.profile.match_t_max is None):
        raise ValueError("a solid core is made by imposing its histogram while sampling; ask for that, or for no core")


def _asked(
    generator: Generator,
    lungs: str | Path | None = None,
    avoid: str | Path | None = None,
    retries: int = 2,
    private: str = "strip",
    whole_volume: bool = False,
    format: str = "same",
) -> dict:
    """What a record says of the request beside the wishes."""
    p = generator.profile
    if whole_volume:  # the paper's own sampling
        p, generator = replace(p, match_t_max=None), replace(generator, grain=False)
    return {
        "seeds": SEED_RULE,
        "options": {
            "lungs_given": lungs is not None,
            "avoid": avoid and Path(avoid).name,
            "retries": retries,
            "private": private,
            "whole_volume": whole_volume,
            "format": format,
        },
        "weights": {"autoencoder": weights_digest(generator.autoencoder), "unet": weights_digest(generator.unet)},
        "sampling": {
            "sampler": p.sampler,
            "steps": p.sample_steps,
            "background": p.background,
            "match_t_max": p.match_t_max,
            "match_rounds": p.match_rounds,
            "grain": generator.grain,
        },
    }


def told_apart(record: Path, generator: Generator, **options) -> list[str]:
    """Where a request differs from that of a record, beside the wishes: what has to be alike to make the same bytes again."""
    old = json.loads(record.read_text(encoding="utf-8"))
    return [
        f"{part} {name}: {was} there, {now} here"
        for part, values in _asked(generator, **options).items() if isinstance(values, dict)
        for name, now in values.items() if (was := dict(old.get(part) or {}).get(name)) != now
    ]  # fmt: skip


def _as_asked(out: Path, wishes: Sequence[Wish], asked: dict, files: Sequence[str | Path | None]) -> bool:
    """Whether the result in `out` is of this request, and younger than the files it was made of; also where there is none yet."""
    try:
        made = (out / RECORD).stat().st_mtime
        old = json.loads((out / RECORD).read_text(encoding="utf-8"))
        same = [n["wish"] for n in old["nodules"]] == json.loads(json.dumps([w.given() for w in wishes]))
        of = [Path(f) for f in (*files, *(p for w in wishes for p in (w.histogram, w.mask))) if f is not None]
        younger = any(f.stat().st_mtime > made for p in of for f in (p, *(p.rglob("*") if p.is_dir() else ())))
        return same and not younger and all(old.get(key) == value for key, value in asked.items())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no record of ours
        return False


def _record(ct: CT, made: Inserted, generator: Generator, lungs: str) -> dict:
    """With `_asked` and the nodules, everything that makes the result again, without patient data."""
    return {
        "note": NOTE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"name": Path(ct.source).name, "shape": list(ct.shape), "affine": ct.affine.round(6).tolist()},
        "lungs": Path(lungs).name,
        "voxels_changed": int((made.stored != ct.stored).sum()),
        # another number of threads sums in another order: single voxels then differ by 1 HU
        "device": {"name": generator.device, "threads": torch.get_num_threads()},
        "versions": {"hrldm": __version__} | {name: metadata.version(name) for name in PACKAGES},
    }


def described(wishes: Sequence[Wish], record: dict) -> str:
    """What was made, a line a nodule."""
    lines = [summary(wishes)]
    for k, n in enumerate(record["nodules"], start=1):
        q = n["quality"]
        lines.append(
            f"{k}: {n['wish']['subtype']} {n['diameter_mm']:g} mm, {n['lobe']}, at {n['centre_ras_mm']} mm; mean "
            f"{q['requested_mean_hu']:.0f} HU requested, {q['obtained_mean_hu']:.0f} obtained"
            + (f"; MISSED: {'; '.join(n['missed'])}" if n["missed"] else "")
        )
    return "\n".join(lines)
