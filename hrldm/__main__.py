"""Command line: ``hrldm insert CT OUT --subtype part-solid --diameter 12``, ``batch FOLDER OUT``, ``erase CT OUT --mask M``;
``python -m hrldm`` is the same."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hrldm import __version__
from hrldm.insertion.wish import Subtype, Wish, copies, read_plan

logger = logging.getLogger(__name__)
_FLAT = tyro.conf.arg(name="")  # --diameter, not --wish.diameter


@dataclass(frozen=True)
class Options:
    """What `insert` and `batch` share.

    Attributes:
        count:    number of such nodules in a CT, each with its own seed
        plan:     CSV of nodules instead, one per row (columns subtype, diameter_mm, lobe, location, at, base, histogram,
            mean_hu, sd_hu, spiculation, core_mm, mask, seed; blank: the default, for seed one per row), or the record.json
            of an earlier insertion to repeat
        steps:    sampling steps; default: those of the released model
        matching: impose the requested histogram on the voxels that are written; --no-matching leaves it to the network
        grain:    give the nodule the noise of the scan around it
        device:   cpu or cuda; default: the GPU if available
        retries:  how often a nodule that misses its target is retried
        private:  strip or keep private DICOM tags
        format:   same (a DICOM input also gives a derived DICOM series), or nifti only
    """

    count: int = 1
    plan: Path | None = None
    steps: int | None = None
    matching: bool = True
    grain: bool = True
    device: Literal["cpu", "cuda"] | None = None
    retries: int = 2
    private: Literal["strip", "keep"] = "strip"
    format: Literal["same", "nifti"] = "same"

    def wishes(self, wish: Wish) -> list[Wish]:
        """The plan's wishes, if given: then only `seed` may be set, for rows without one. Else copies of `wish`."""
        if self.plan is None:
            return copies(wish, self.count)
        said = [name.removesuffix("_mm") for name in wish.said() if name != "seed" or self.repeats]
        if self.count != 1:
            said.append("count")
        if said:
            raise ValueError(
                f"--plan says what nodules there are; leave out --{', --'.join(said)}, or write it into the plan"
            )
        return read_plan(self.plan, wish.seed)

    @property
    def repeats(self) -> bool:
        """Whether the plan is the record of an earlier insertion, which holds all seeds."""
        return self.plan is not None and self.plan.suffix.lower() == ".json"

    def generator(self):
        """The released networks, sampled as asked for."""
        from hrldm.insertion.released import released

        steps = {} if self.steps is None else {"steps": self.steps}
        return released(on=self.device, **steps)

    def file(self) -> dict:
        """Those that `insert_file` takes."""
        names = ("retries", "private", "format", "matching", "grain")
        return {name: getattr(self, name) for name in names}


def insert(
    ct: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    wish: Annotated[Wish, _FLAT],
    options: Annotated[Options, _FLAT],
    lungs: Path | None = None,
    avoid: Path | None = None,
    series_uid: str | None = None,
    overwrite: bool = False,
) -> int:
    """Put lung nodules into a CT and change nothing else. Research only.

    Args:
        ct: NIfTI file, DICOM folder or zip
        out: output folder, created here: ct.nii.gz, mask.nii.gz, core.nii.gz for a solid core, record.json, preview.png, and
            dicom/ for a DICOM input
        lungs: lung mask or lobe map of this CT
        avoid: mask that no nodule may touch
        series_uid: which series to read from a DICOM folder with several
        overwrite: replace the output folder of an earlier insertion
    """
    from hrldm.atomic import held
    from hrldm.insertion.files import check_output, described, insert_file
    from hrldm.insertion.record import told_apart

    out = Path(os.path.abspath(out))
    with held(out):
        check_output(out, overwrite)
    wishes, generator = options.wishes(wish), options.generator()
    asked = {"lungs": lungs, "avoid": avoid} | options.file()
    if options.repeats and (apart := told_apart(options.plan, ct, wishes, generator, **asked)):
        logger.warning("%s was made otherwise, so other voxels may come: %s", options.plan, "; ".join(apart))
    record = insert_file(ct, out, wishes, generator, overwrite=overwrite, series_uid=series_uid, **asked)
    print(described(wishes, record))
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return 0


def batch(
    folder: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    options: Annotated[Options, _FLAT],
    subtype: Subtype = "solid",
    diameter: float = 10.0,
    seed: int = 0,
    lungs: Path | None = None,
    overwrite: bool = False,
) -> int:
    """`insert` for every CT in a folder; run again, it resumes where it stopped.

    Args:
        folder: with NIfTI files, zips and DICOM folders
        out: output folder, with one subfolder per CT
        subtype: of the nodules
        diameter: in mm, of the sphere of equal volume; 6 to 30
        seed: random seed of shape, position, histogram and noise; each CT gets its own seeds
        lungs: folder with a lung mask or lobe map per CT, named like the CT
        overwrite: redo results made with another request, version or file (to redo any other result, delete it)
    """
    from hrldm.insertion.batch import insert_folder

    wishes = options.wishes(Wish(subtype, diameter, seed=seed))
    said = insert_folder(folder, out, wishes, options.generator(), lungs, overwrite=overwrite, **options.file())
    for name, what in said.items():
        print(f"{name}: {_as_options(what)}")
    return int(any(what not in ("done", "there already") for what in said.values()))


def erase(
    ct: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    mask: Path,
    lungs: Path | None = None,
    seed: int = 0,
    series_uid: str | None = None,
    overwrite: bool = False,
) -> int:
    """Replace lesions of a CT by lung of the same scan and change nothing else. Research only.

    Args:
        ct: NIfTI file, DICOM folder or zip
        out: output folder, created here: ct.nii.gz, mask.nii.gz, record.json, and dicom/ for a DICOM input
        mask: mask of the lesion or lesions
        lungs: lung mask or lobe map of this CT
        seed: random seed of the places that lung may come from
        series_uid: which series to read from a DICOM folder with several
        overwrite: replace the output folder of an earlier run
    """
    from hrldm.insertion.erase import erase_file

    record = erase_file(ct, out, mask, lungs, seed, overwrite, series_uid)
    for k, lesion in enumerate(record["erased"], start=1):
        sources = ", ".join(str(patch["source"]) for patch in lesion["patches"])
        print(
            f"{k}: {lesion['volume_mm3']:g} mm³ at {lesion['centre_ras_mm']} mm, mean {lesion['mean_hu']:.0f} HU before, "
            f"{lesion['mean_hu_erased']:.0f} after; lung from {sources} mm"
        )
    return 0


def score(
    records: tyro.conf.Positional[Path],
    predictions: tyro.conf.Positional[Path],
    out: Path,
    coordinates: Literal["ras", "lps", "voxel"],
    before: Path | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
) -> int:
    """Score a detector on inserted nodules: FROC and CPM as in LUNA16, sensitivity by subtype, size, lobe and attachment.

    Args:
        records: folder that insert or batch wrote, or its scans.csv
        predictions: CSV (scan, x, y, z, score; or LUNA16's columns), or nnDetection's *_boxes.json, a file or a folder
        out: output folder, created here: froc.csv, sensitivity.csv, hits.csv, froc.png
        coordinates: of the predictions: mm in RAS (NIfTI) or LPS (DICOM, ITK, LUNA16), or voxels (nnDetection)
        before: the detector's predictions of the CTs before insertion; a second FROC leaves out what it marked there, too
        threshold: score of the operating point; default: the lowest with at most one false positive a scan
        overwrite: replace the output folder of an earlier run
    """
    from hrldm.scoring.score import score

    print(score(records, predictions, out, coordinates, before, threshold, overwrite))
    return 0


def main() -> int:
    if sys.argv[1:] == ["--version"]:
        print(f"hrldm {__version__}")
        return 0
    return run({"insert": insert, "batch": batch, "erase": erase, "score": score}, "hrldm")


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
        name = {"on": "device"}.get(found[1], found[1])
        value = "" if found[2] in ("True", "...") else " " + found[2].strip("'")
        return f"--{name.replace('_', '-')}{value}"

    names = "overwrite|retries|lungs|steps|on|series_uid|format|location|coordinates"
    return re.sub(rf"(?<![^ (])({names})=(\.\.\.|'?[\w.+-]+'?)", option, text)


if __name__ == "__main__":
    sys.exit(main())
