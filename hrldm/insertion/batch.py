"""Insertion into every CT of a folder: finds the CTs, and the results that already exist."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from hrldm.atomic import held
from hrldm.ct.dicom_headers import LARGEST, holds_dicom
from hrldm.ct.image import IMAGES
from hrldm.insertion.files import check_request, insert_file
from hrldm.insertion.generator import Generator
from hrldm.insertion.plans import NEGATIVE, Case
from hrldm.insertion.record import RECORD, asked_for, inputs, made_of
from hrldm.insertion.summary import write_summary
from hrldm.insertion.wish import Wish, own_seed

logger = logging.getLogger(__name__)
NO_CT = "{}: no CT in it (.nii, .nii.gz, .mha, .mhd, .nrrd, .zip, or folders of DICOM files)"
FINE = ("done", "there already", NEGATIVE)  # what is said of a result without a fault
_SUFFIX = re.compile(f"({'|'.join(map(re.escape, (*IMAGES, '.zip')))})$", re.IGNORECASE)


def insert_folder(
    folder: str | Path,
    out: str | Path,
    wishes: Sequence[Wish] | dict[str, Case],
    generator: Generator,
    lungs: str | Path | None = None,
    overwrite: bool = False,
    **options,
) -> dict[str, str]:
    """`insert_file` for every CT in `folder` into `out/<name>`; existing results are kept, so a killed run resumes.

    Each CT gets the same wishes with its own seeds (from its name), or what the cases of a plan say. lungs: folder with a
    label map of the same name. Of several series in one folder the largest chest CT is taken (`dicom_headers.LARGEST`).
    What `find_cts` skips is logged. `write_summary` lists what there is then.

    Returns:
        name -> one of `FINE`, or the error.

    Raises:
        ValueError: no CT in the folder, or not those of the plan, two of one name, another run into `out`, or results there
            from another request; then nothing is started.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, where a folder for the results is needed")
    found, passed = find_cts(folder, out, lungs)
    if passed:
        logger.warning("%s: passed over, no CT: %s", folder, ", ".join(passed))
    if not found:
        raise ValueError(NO_CT.format(folder))
    cases = _cases(wishes, found, folder)
    check_request([w for case in cases.values() for w in case.wishes], generator, lungs=lungs, **options)
    said = {}
    with held(out):
        asked = asked_for(generator, lungs, **options)
        cts = dict.fromkeys(case.ct for case in cases.values() if case.wishes)
        maps = {ct: None if lungs is None else label_map(lungs, ct) for ct in cts}
        if lungs is not None and (without := [name for name, map_ in maps.items() if map_ is None]):
            more = f", nor {len(without) - 1} other(s)" if len(without) > 1 else ""
            said_of = f"{lungs}: no label map named {without[0]}.nii.gz{more}"
            if len(without) == len(maps):
                raise ValueError(said_of)
            logger.warning("%s", said_of)
        made = {
            name: made_of(out / name, own, asked, inputs(found[ct], own, maps[ct], options.get("avoid")))
            for name, (ct, own) in cases.items()
            if own
        }
        others = [name for name, as_asked in made.items() if as_asked is False and not overwrite]
        if others:
            raise ValueError(
                f"{out}: {len(others)} result(s) there were made of another request, version or file, first {others[0]}; "
                "choose another folder, or overwrite=True"
            )
        for name, (ct, own) in tqdm(cases.items(), desc="CTs", mininterval=5):
            target = out / name
            if not own:
                said[name] = NEGATIVE
                continue
            try:
                with held(target):
                    there = (target / RECORD).exists() and (not overwrite or made[name] is True)
                if not there:
                    if lungs is not None and maps[ct] is None:
                        raise ValueError(f"{lungs}: no label map named {ct}.nii.gz")
                    how = {"overwrite": overwrite, "series_uid": LARGEST} | options
                    insert_file(found[ct], target, own, generator, maps[ct], **how)
                said[name] = "there already" if there else "done"
            except (ValueError, OSError) as error:
                logger.error("%s: %s", name, error)
                said[name] = str(error)
        write_summary(out, {name: case for name, case in cases.items() if said[name] in FINE}, found)
    return said


def _cases(wishes: Sequence[Wish] | dict[str, Case], found: dict[str, Path], folder: str | Path) -> dict[str, Case]:
    """What each result gets. found: the CTs by name."""
    if not isinstance(wishes, dict):
        keys = {name: hashlib.sha256(os.fsencode(name)).digest() for name in found}
        return {
            name: Case(name, tuple(replace(w, seed=own_seed(w.seed, *key)) for w in wishes))
            for name, key in keys.items()
        }
    planned = {case.ct for case in wishes.values()}
    if absent := sorted(planned - found.keys()):
        raise ValueError(
            f"{folder}: no CT named {', '.join(absent[:5])} there, which the plan has ({len(absent)} in all)"
        )
    if left := sorted(found.keys() - planned):
        logger.warning("%s: passed over, not in the plan: %s", folder, ", ".join(left))
    return wishes


def find_cts(
    folder: str | Path, out: Path | None = None, lungs: str | Path | None = None
) -> tuple[dict[str, Path], list[str]]:
    """CTs of a folder by the name of their result, and what was skipped.

    A CT is an image file, a zip, or a folder of other files; folders that hold NIfTI files or zips but no DICOM are
    searched recursively, so names may have parts ("site/scan"). Skipped: other files, hidden ones, empty folders,
    results of insertions, `out`, the folder of label maps, and what lies beside or below a file named ct (ct.nii.gz and
    its masks, a folder a patient).

    Raises:
        ValueError: no such folder, or CTs whose results would have one name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found: dict[str, Path] = {}
    passed = []
    for path, is_ct in _entries(root, tuple(Path(os.path.realpath(p)) for p in (root, out, lungs) if p is not None)):
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
    """The entries of a folder, and whether each is a CT. known: folders to skip."""
    paths = sorted(folder.iterdir())
    cts = [path for path in paths if _SUFFIX.sub("", path.name).lower() == "ct" and path.is_file()]
    for path in paths:
        if cts and path not in cts:
            yield path, False
            continue
        try:
            yield from _entry(path, known)
        except OSError as error:  # lost+found, another user's folder
            logger.warning("%s: cannot be read (%s)", path, error.strerror or error)
            yield path, False


def _entry(path: Path, known: tuple) -> Iterator[tuple[Path, bool]]:
    real = Path(os.path.realpath(path))
    if path.name.startswith(".") or real in known or (path / RECORD).exists():
        yield path, False
    elif not path.is_dir():
        yield path, _SUFFIX.search(path.name) is not None  # also a dangling link, whose error is then reported
    else:
        os.listdir(path)  # raises if unreadable
        below = list(path.rglob("*"))  # follows no links
        files = [f for f in below if not f.is_dir()]
        volumes = [f for f in files if _SUFFIX.search(f.name)]
        if (volumes or any(f.is_symlink() and f.is_dir() for f in below)) and not holds_dicom(path):
            yield from _entries(path, (*known, real))
        else:
            yield path, bool(files)
            yield from ((f, False) for f in volumes)


def label_map(folder: str | Path, name: str) -> Path | None:
    """The label map of a CT in a folder of such; None without."""
    return next((f for suffix in IMAGES if (f := Path(folder) / f"{name}{suffix}").is_file()), None)
