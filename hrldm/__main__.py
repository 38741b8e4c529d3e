"""Command line: ``python -m hrldm insert CT OUT --subtype part-solid --diameter 12``, ``batch FOLDER OUT``."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from hrldm.insertion.wish import Wish

logger = logging.getLogger(__name__)
Subtype = Literal["solid", "part-solid", "ground-glass"]
Lobe = Literal["LUL", "LLL", "RUL", "RML", "RLL"]


def insert(
    ct: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    subtype: Subtype = "solid",
    diameter: float = 10.0,
    lobe: Lobe | None = None,
    location: Literal["inner", "subpleural"] = "inner",
    at: str | None = None,
    count: int = 1,
    histogram: Path | None = None,
    spiculation: float | None = None,
    core: float | None = None,
    mask: Path | None = None,
    seed: int = 0,
    plan: Path | None = None,
    lungs: Path | None = None,
    avoid: Path | None = None,
    steps: int | None = None,
    matching: bool = True,
    grain: bool = True,
    device: Literal["cpu", "cuda"] | None = None,
    retries: int = 2,
    private: Literal["strip", "keep"] = "strip",
    format: Literal["same", "nifti"] = "same",
    series_uid: str | None = None,
    overwrite: bool = False,
) -> int:
    """Put lung nodules into a CT and change nothing else. Research only.

    Args:
        ct: NIfTI file, DICOM folder or zip.
        out: output folder, created here: ct.nii.gz, mask.nii.gz, record.json, and dicom/ for a DICOM input.
        subtype: of the nodule.
        diameter: in mm, of the sphere of equal volume; 6 to 30.
        lobe: target lobe; needs a lobe map (--lungs with a TotalSegmentator map, or TotalSegmentator installed).
        location: inner, or at the pleura.
        at: centre "x,y,z" in RAS mm instead of a random position.
        count: number of such nodules, each with its own seed.
        histogram: text file with 40 numbers, the requested HU histogram over -1000..400; default: a real one.
        spiculation: 1 (none) to 5 (marked).
        core: diameter in mm of a part-solid nodule's solid core.
        mask: NIfTI mask of the lesion on this CT (1 lesion, 2 solid core) instead of shape, size and position.
        seed: random seed of shape, position, histogram and noise.
        plan: CSV of nodules instead, one per row (columns subtype, diameter_mm, lobe, location, at, histogram,
            spiculation, core_mm, mask, seed; blank: the default, for seed one per row), or the record.json of an
            earlier insertion to repeat.
        lungs: lung mask or lobe map of this CT.
        avoid: mask that no nodule may touch.
        steps: sampling steps; default: those of the released model.
        matching: impose the requested histogram while sampling; --no-matching leaves it to the network.
        grain: give the nodule the grain of its surroundings, which the autoencoder smooths away.
        device: cpu or cuda; default: the GPU if available.
        retries: how often a nodule that misses its target is retried.
        private: strip or keep private DICOM tags.
        format: same (a DICOM input also gives a derived DICOM series), or nifti only.
        series_uid: which series to read from a DICOM folder with several.
        overwrite: replace the output folder of an earlier insertion.
    """
    from hrldm.atomic import held
    from hrldm.insertion.files import check_output, described, insert_file
    from hrldm.insertion.record import told_apart
    from hrldm.insertion.wish import Wish

    out = Path(os.path.abspath(out))
    with held(out):
        check_output(out, overwrite)
    wish = Wish(
        subtype=subtype,
        diameter_mm=diameter,
        lobe=lobe,
        location=location,
        at=_point(at),
        histogram=histogram,
        spiculation=spiculation,
        core_mm=core,
        mask=mask,
        seed=seed,
    )
    wishes = _wishes(plan, wish, count)
    options = {
        "lungs": lungs,
        "avoid": avoid,
        "retries": retries,
        "private": private,
        "format": format,
    }
    generator = _generator(steps, matching, grain, device)
    if (
        plan is not None
        and plan.suffix.lower() == ".json"
        and (apart := told_apart(plan, ct, wishes, generator, **options))
    ):
        logger.warning("%s was made otherwise, so other voxels may come: %s", plan, "; ".join(apart))
    record = insert_file(ct, out, wishes, generator, overwrite=overwrite, series_uid=series_uid, **options)
    print(described(wishes, record))
    return 0


def batch(
    folder: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    subtype: Subtype = "solid",
    diameter: float = 10.0,
    count: int = 1,
    seed: int = 0,
    plan: Path | None = None,
    lungs: Path | None = None,
    steps: int | None = None,
    matching: bool = True,
    grain: bool = True,
    device: Literal["cpu", "cuda"] | None = None,
    retries: int = 2,
    private: Literal["strip", "keep"] = "strip",
    format: Literal["same", "nifti"] = "same",
    overwrite: bool = False,
) -> int:
    """`insert` for every CT in a folder; run again, it resumes where it stopped.

    Args:
        folder: with NIfTI files, zips and DICOM folders.
        out: output folder, with one subfolder per CT.
        subtype: see insert.
        diameter: see insert.
        count: nodules per CT.
        seed: see insert; each CT gets its own seeds.
        plan: CSV of nodules, inserted into each CT.
        lungs: folder with a lung mask or lobe map per CT, named like the CT.
        steps: see insert.
        matching: see insert.
        grain: see insert.
        device: see insert.
        retries: see insert.
        private: see insert.
        format: see insert.
        overwrite: redo results made with another request, version or file (to redo any other result, delete it).
    """
    from hrldm.insertion.batch import insert_folder
    from hrldm.insertion.wish import Wish

    wishes = _wishes(plan, Wish(subtype=subtype, diameter_mm=diameter, seed=seed), count)
    options = {"retries": retries, "private": private, "format": format, "overwrite": overwrite}
    said = insert_folder(folder, out, wishes, _generator(steps, matching, grain, device), lungs, **options)
    for name, what in said.items():
        print(f"{name}: {_as_options(what)}")
    return int(any(what not in ("done", "there already") for what in said.values()))


def _generator(steps: int | None, matching: bool, grain: bool, device: str | None):
    from hrldm.insertion.released import released

    changes = {} if steps is None else {"steps": steps}
    return released(on=device, grain=grain, **changes, **({} if matching else {"match_t_max": None}))


def _wishes(plan: Path | None, wish: Wish, count: int) -> list[Wish]:
    """The plan's wishes, if given: then only `seed` may be set, for rows without one. Else `count` copies of `wish`."""
    from hrldm.insertion.wish import Wish, copies, read_plan

    if plan is None:
        return copies(wish, count)
    taken = () if plan.suffix.lower() == ".json" else ("seed",)  # a record holds all seeds
    own, options = Wish(), {"diameter_mm": "diameter", "core_mm": "core"}
    said = [f.name for f in fields(Wish) if f.name not in taken and getattr(wish, f.name) != getattr(own, f.name)]
    said = [options.get(name, name) for name in said] + ["count"] * (count != 1)
    if said:
        raise ValueError(
            f"--plan says what nodules there are; leave out --{', --'.join(said)}, or write it into the plan"
        )
    return read_plan(plan, wish.seed)


def _point(text: str | None) -> tuple[float, ...] | None:
    from hrldm.insertion.wish import point

    if text is None:
        return None
    try:
        return point(text)
    except ValueError:
        raise ValueError(f"--at {text!r}: give three numbers x,y,z in RAS mm") from None


def main() -> int:
    return run({"insert": insert, "batch": batch}, "python -m hrldm")


def run(commands: dict[str, Callable], prog: str) -> int:
    """Run the requested command; an error that the user can fix prints one line and returns status 2."""
    with contextlib.suppress(AttributeError):  # file names may hold characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_log_options)
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, prog=prog)
    except (ValueError, OSError) as error:
        print(f"error: {_as_options(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing of the unfinished result is left; call again to make it", file=sys.stderr)
        return 130


def _log_options(record: logging.LogRecord) -> bool:
    """Apply `_as_options` to log messages."""
    with contextlib.suppress(TypeError):  # another library's call with wrong arguments; logging reports it
        record.msg, record.args = _as_options(record.getMessage()), None
    return True


def _as_options(text: str) -> str:
    """Replace the argument names in a library message (overwrite=True) by command-line options (--overwrite)."""

    def option(found: re.Match) -> str:
        name = {"match_t_max": "matching", "on": "device"}.get(found[1], found[1])
        value = "" if found[2] in ("True", "...") else " " + found[2].strip("'")
        return f"--{name.replace('_', '-')}{value}"

    names = r"overwrite|retries|lungs|avoid|match_t_max|steps|on|series_uid|private|format|mask"
    text = text.replace("core_mm", "--core").replace("diameter_mm", "--diameter")
    return re.sub(rf"(?<![^ (])({names})=(\.\.\.|'?[\w.+-]+'?)", option, text)


if __name__ == "__main__":
    sys.exit(main())
