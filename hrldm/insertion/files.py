"""Insertion from disk to disk: one CT into a folder of results.

The results of one CT appear together, once all are written: `ct.nii.gz` (`.nii`, `.mha` or `.nrrd`, as the input) with the input's
affine, header and dtype, `mask.nii.gz` (k for the k-th nodule; of several also `mask-k.nii.gz`, one each), where a nodule
has a solid core `core.nii.gz` (1 lesion, 2 core: as a wish's `mask` takes it), `record.json`, `preview.png`, and for a
DICOM input the derived series in `dicom/` and, if asked for, the masks in `seg.dcm`.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hrldm.atomic import new_folder, write_text
from hrldm.ct.dicom_seg import check_seg, write_seg
from hrldm.ct.dicom_write import PRIVATE, check_source, write_series
from hrldm.ct.label_maps import read_avoided
from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import CT, read_ct, same_suffix, write_ct, write_nifti
from hrldm.insertion.generator import Generator
from hrldm.insertion.insert import Inserted, check_retries, insert
from hrldm.insertion.preview import draw_preview
from hrldm.insertion.record import RECORD, asked_for, inputs, record_of, stamp
from hrldm.insertion.wish import Wish

logger = logging.getLogger(__name__)
FORMATS = ("same", "nifti")
# what `insert_file` writes
_WRITTEN = re.compile(
    r"ct\.(nii(\.gz)?|mha|nrrd)|(mask(-\d+)?|core)\.nii\.gz|record\.json|preview\.png|seg\.dcm|dicom/\d+\.dcm"
)


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
    format: str = "same",
    matching: bool = True,
    grain: bool = True,
    seg: bool = False,
    algorithm: Callable[..., Inserted] = insert,
) -> dict:
    """Read a CT, insert the wishes, write the folder `out`; returns the record.

    Args:
        path:      image file (.nii, .nii.gz, .mha, .mhd, .nrrd), DICOM folder or file, or zip
        lungs:     lung mask or TotalSegmentator map of this CT; None segments it
        avoid:     mask that no nodule may touch, for example of known lesions
        overwrite: replace a folder that an earlier insertion wrote
        private:   strip or keep private DICOM tags
        format:    "same": that of the source, and of a DICOM source NIfTI and a derived series; "nifti": NIfTI only
        matching, grain: see `hrldm.insertion.finish.finished`
        seg:       with a derived series, its masks as DICOM SEG (see `dicom_seg`)
        algorithm: another function with `insert`'s arguments, to use instead; the record then names it

    Raises:
        ValueError: any wrong input, named, before any long computation; nothing is written.
        OSError: no space for the results, or they could not be written; nothing is left behind.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    check_request(wishes, generator, retries, private, format, lungs, seg)
    source, target = (Path(os.path.realpath(p)) for p in (path, out))
    if source in (target, *target.parents) or target in source.parents:
        raise ValueError(f"{out}: the CT and its results cannot lie in one another; choose a folder beside {path}")
    with new_folder(out, lambda folder: check_output(folder, overwrite)) as part:
        ct = read_ct(path, series_uid=series_uid)
        derive = format == "same" and ct.provenance.get("format") == "dicom"
        if derive:
            check_source(path, series_uid)
            if seg:
                check_seg(path, series_uid)
        elif seg:
            logger.warning("%s: no DICOM series, so no DICOM SEG is written", path)
        need, disk = ct.stored.nbytes * (1 + derive), shutil.disk_usage(part)
        if disk.total and disk.free < need:  # some shared disks report nothing
            raise OSError(f"{out}: needs up to {need / 1e6:.0f} MB, and its disk has {disk.free / 1e6:.0f} MB free")
        labels, found = lung_labels(ct, lungs)
        known = None if avoid is None else read_avoided(avoid, ct, labels)
        files = {name: stamp(file) for name, file in inputs(path, wishes, lungs, avoid).items()}
        with _memory():
            made = algorithm(ct, wishes, generator, labels, known, retries, matching=matching, grain=grain)
        asked = asked_for(generator, lungs, avoid, retries, private, format, matching, grain, seg)
        if algorithm is not insert:
            asked["algorithm"] = algorithm.__name__
        record = record_of(ct, made, generator, found) | asked | {"files": files, "nodules": made.records}
        suffix = same_suffix(path, nifti=format == "nifti")
        write_ct(part / f"ct{suffix}", made.stored, ct)
        write_nifti(part / "mask.nii.gz", made.mask, CT(made.mask, ct.affine))
        for k in range(1, len(made.records) + 1) if len(made.records) > 1 else ():  # as a manifest needs them
            one = (made.mask == k).view(np.uint8)
            write_nifti(part / f"mask-{k}.nii.gz", one, CT(one, ct.affine))
        if made.core.any():
            parts = (made.mask > 0).astype(np.uint8) + made.core
            write_nifti(part / "core.nii.gz", parts, CT(parts, ct.affine))
        if derive:
            key = hashlib.sha256(json.dumps(record["nodules"], sort_keys=True).encode()).hexdigest()
            write_series(path, made.stored, part / "dicom", key, private, series_uid)
            if seg:
                write_seg(part / "dicom", made.mask > 0, made.core, part / "seg.dcm", key)
        draw_preview(part / "preview.png", ct, made.stored, made.records)
        write_text(part / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def check_output(out: Path, overwrite: bool) -> None:
    """Raise ValueError if `out` may not be written: it exists, or holds something that no insertion wrote."""
    empty = out.is_dir() and not out.is_symlink() and not os.listdir(out)  # made by a job script
    if empty or not os.path.lexists(out):
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


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Report too little memory, of the machine or of a shared GPU, in one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else "none left"
        if isinstance(error, RuntimeError) and not re.search("memory|CUDA", said):
            raise
        raise OSError(
            errno.ENOMEM, f"not enough memory, or the GPU is not to be had ({said}); free some, or on='cpu'"
        ) from error


def check_request(
    wishes: Sequence[Wish],
    generator: Generator,
    retries: int = 2,
    private: str = PRIVATE[0],
    format: str = FORMATS[0],
    lungs: str | Path | None = None,
    seg: bool = False,
    **_,
) -> None:
    """Raise ValueError for unknown or incompatible options, before anything is read."""
    if format not in FORMATS:
        raise ValueError(f"format: choose {' or '.join(FORMATS)}, not {format!r}")
    if private not in PRIVATE:
        raise ValueError(f"private tags: choose {' or '.join(PRIVATE)}, not {private!r}")
    if seg and format == "nifti":
        raise ValueError("a DICOM SEG lies on the derived series, which format='nifti' leaves out; leave out seg=True")
    check_retries(retries)
    if not wishes:
        raise ValueError("nothing to insert: the plan is empty")
    check_lobes(wishes, lungs)


def check_lobes(wishes: Sequence[Wish], lungs: str | Path | None) -> None:
    """Raise ValueError for a lobe that nothing can tell."""
    if lungs is None and any(w.lobe for w in wishes) and not shutil.which("TotalSegmentator"):
        raise ValueError("a lobe is asked for, and nothing here tells lobes; give a TotalSegmentator map (lungs=...)")


def described(wishes: Sequence[Wish], record: dict) -> str:
    """What was made, one line per nodule."""
    lines = ["; ".join(w.described() + (f", in {w.lobe}" if w.lobe else "") for w in wishes)]
    for k, n in enumerate(record["nodules"], start=1):
        q = n["quality"]
        lines.append(
            f"{k}: {n['wish']['subtype']} {n['diameter_mm']:g} mm, {n['lobe']}, at {n['centre_ras_mm']} mm; mean "
            f"{q['requested_mean_hu']:.0f} HU requested, {q['obtained_mean_hu']:.0f} obtained"
            + (f"; MISSED: {'; '.join(n['missed'])}" if n["missed"] else "")
        )
    return "\n".join(lines)
