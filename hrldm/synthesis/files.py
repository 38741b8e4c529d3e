"""Insertion from disk to disk: one CT into a folder of results, or a folder of CTs into a folder of such folders.

The results of one CT appear together, when all of them are written: `ct.nii.gz` (or `.nii`, as the input) with the
input's affine, header and dtype, `mask.nii.gz` (k for the k-th nodule), `record.json`, and for a DICOM input the derived
series in `dicom/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from hrldm import __version__
from hrldm.data.beside import read_avoided
from hrldm.data.ct import CT, read_ct, write_nifti
from hrldm.data.dicom_write import NOTE, PRIVATE, check_source, write_series
from hrldm.data.lungs import lung_labels
from hrldm.synthesis.generate import Generator
from hrldm.synthesis.insert import Inserted, insert
from hrldm.synthesis.plan import Wish, summary
from hrldm.synthesis.whole_volume import insert_whole
from hrldm.train.latents import weights_digest

logger = logging.getLogger(__name__)
RECORD = "record.json"
FORMATS = ("same", "nifti")
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
        OSError: the results could not be written; nothing of them is left.
    """
    out = Path(out)
    check_output(out, overwrite)
    if private not in PRIVATE:
        raise ValueError(f"private tags: choose {' or '.join(PRIVATE)}, not {private!r}")
    if not wishes:
        raise ValueError("nothing to insert: the plan is empty")
    if format not in FORMATS:
        raise ValueError(f"format: choose {' or '.join(FORMATS)}, not {format!r}")
    ct = read_ct(path, series_uid=series_uid)
    derive = format == "same" and ct.provenance.get("format") == "dicom"
    if derive:
        check_source(path, series_uid)
    labels, source = lung_labels(ct, lungs)
    known = None if avoid is None else read_avoided(avoid, ct, labels)
    if whole_volume:
        made = insert_whole(ct, wishes, generator, labels, known)
    else:
        made = insert(ct, wishes, generator, labels, known, retries)
    record = _record(ct, made, generator, source) | {"whole_volume": whole_volume}
    part = out.with_name(f".{uuid.uuid4().hex[:8]}-{out.name}")
    try:
        part.mkdir(parents=True)
        suffix = ".nii" if str(path).endswith(".nii") else ".nii.gz"
        write_nifti(part / f"ct{suffix}", made.stored, ct)
        write_nifti(part / "mask.nii.gz", made.mask, CT(made.mask, ct.affine))
        if derive:
            key = hashlib.sha256(json.dumps(record["nodules"], sort_keys=True).encode()).hexdigest()
            write_series(path, made.stored, part / "dicom", key, private, series_uid)
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _exchange(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def insert_folder(
    folder: str | Path,
    out: str | Path,
    wishes: Sequence[Wish],
    generator: Generator,
    lungs: str | Path | None = None,
    **options,
) -> dict[str, str]:
    """`insert_file` for every CT in `folder` into `out/<name>`; those that are there already are left, so a killed run goes on.

    Each CT gets the same wishes with seeds of its own (from its name). lungs: folder with a label map of the same name.

    Returns:
        name -> "done", "there already" or the error.

    Raises:
        ValueError: no CT in the folder.
    """
    found = find_cts(folder)
    if not found:
        raise ValueError(f"{folder}: no CT in it (.nii, .nii.gz, .zip, or folders of DICOM files)")
    said = {}
    for name, path in tqdm(found.items(), desc="CTs", mininterval=5):
        target = Path(out) / name
        if (target / RECORD).exists() and not options.get("overwrite"):
            said[name] = "there already"
            continue
        shift = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        own = [dataclasses.replace(w, seed=w.seed + shift) for w in wishes]
        try:
            labels = None if lungs is None else _same_name(Path(lungs), name)
            insert_file(path, target, own, generator, labels, **options)
            said[name] = "done"
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            said[name] = str(error)
    return said


def find_cts(folder: str | Path) -> dict[str, Path]:
    """CTs of a folder by name: NIfTI files, zips, and folders that hold files without being results themselves."""
    found: dict[str, Path] = {}
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for path in sorted(root.iterdir()):
        name = path.name
        for suffix in (".nii.gz", ".nii", ".zip"):
            if path.is_file() and name.lower().endswith(suffix):
                found[name[: -len(suffix)]] = path
                break
        else:
            if path.is_dir() and not name.startswith(".") and not (path / RECORD).exists() and any(path.rglob("*.*")):
                found[name] = path
    return found


def check_output(out: Path, overwrite: bool) -> None:
    """Raise ValueError when `out` may not be written: it exists, or is something that no insertion made."""
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out}: exists already; choose another name or ask to overwrite it")
    if not out.is_dir() or not (out / RECORD).is_file():
        raise ValueError(f"{out}: not a folder that an insertion wrote (no {RECORD}), so it is not overwritten")


def _exchange(part: Path, out: Path) -> None:
    """Move `part` to `out`; a former `out` is there until then, and again if the move fails."""
    aside = part.with_name(f"{part.name}-former")
    if out.exists():
        out.replace(aside)
    try:
        part.replace(out)
    except OSError:
        if aside.exists():
            aside.replace(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _same_name(folder: Path, name: str) -> Path:
    for suffix in (".nii.gz", ".nii"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise ValueError(f"{folder}: no label map named {name}.nii.gz")


def _record(ct: CT, made: Inserted, generator: Generator, lungs: str) -> dict:
    """Everything that makes the result again, without patient data."""
    p = generator.profile
    return {
        "note": NOTE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"name": Path(ct.source).name, "shape": list(ct.shape), "affine": ct.affine.round(6).tolist()},
        "lungs": Path(lungs).name,
        "voxels_changed": int((made.stored != ct.stored).sum()),
        "weights": {"autoencoder": weights_digest(generator.autoencoder), "unet": weights_digest(generator.unet)},
        "sampling": {
            "sampler": p.sampler,
            "steps": p.sample_steps,
            "background": p.background,
            "match_t_max": p.match_t_max,
            "grain": generator.grain,
        },
        # another number of threads sums in another order: single voxels then differ by 1 HU
        "device": {"name": generator.device, "threads": torch.get_num_threads()},
        "versions": {"hrldm": __version__} | {name: metadata.version(name) for name in PACKAGES},
        "nodules": made.records,
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
