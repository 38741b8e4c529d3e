"""Command line: ``hrldm insert CT OUT --subtype part-solid --diameter 12``, ``batch FOLDER OUT``, ``plan FOLDER PLAN.csv --preset
twins``, ``erase CT OUT --mask M``; ``python -m hrldm`` is the same."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hrldm import __version__
from hrldm.command_line import as_options, run
from hrldm.insertion.cohorts import Cohort
from hrldm.insertion.plans import read_cases, read_plan
from hrldm.insertion.wish import Subtype, Wish, copies

logger = logging.getLogger(__name__)
_FLAT = tyro.conf.arg(name="")  # --diameter, not --wish.diameter


@dataclass(frozen=True)
class Options:
    """What `insert` and `batch` share.

    Attributes:
        count:    number of such nodules in a CT, each with its own seed
        plan:     CSV of nodules instead, one per row (columns subtype, diameter_mm, lobe, location, at, base, histogram,
            mean_hu, sd_hu, spiculation, core_mm, shape, mask, seed; blank: the default, for seed one per row), or the record.json
            of an earlier insertion to repeat; in a batch, one with a column ct (`hrldm plan`) says what each CT gets
        steps:    sampling steps; default: those of the released model
        matching: impose the requested histogram on the voxels that are written; --no-matching leaves it to the network
        grain:    give the nodule the noise of the scan around it
        device:   cpu or cuda; default: the GPU if available
        retries:  how often a nodule that misses its target is retried
        private:  strip or keep private DICOM tags
        format:   same (a DICOM input also gives a derived DICOM series), or nifti only
        seg:      with a derived DICOM series, its mask as DICOM SEG, seg.dcm (needs highdicom: pip install 'hrldm[dicom-seg]')
        lps:      positions (--at, a plan's column at) are in LPS mm, as in DICOM and LUNA16, not in RAS mm
        json:     print one JSON object, for another program, instead of sentences
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
    seg: bool = False
    lps: bool = False
    json: bool = False

    def wishes(self, wish: Wish, read: Callable = read_plan):
        """What `read` finds in the plan, if given: then only `seed` may be set, for rows without one. Else copies of `wish`.
        Places are in RAS."""
        found = self._wishes(wish, read)
        if not self.lps:
            return found
        each = [case.wishes for case in found.values()] if isinstance(found, dict) else [found]
        if self.repeats or not any(w.at for wishes in each for w in wishes):
            raise ValueError("--lps is for places (--at, or a plan's column at); those of a record are RAS")
        if isinstance(found, dict):
            return {name: case._replace(wishes=tuple(_from_lps(case.wishes))) for name, case in found.items()}
        return _from_lps(found)

    def _wishes(self, wish: Wish, read: Callable):
        if self.plan is None:
            return copies(wish, self.count)
        said = [name.removesuffix("_mm") for name in wish.said() if name != "seed" or self.repeats]
        if self.count != 1:
            said.append("count")
        if said:
            raise ValueError(
                f"--plan says what nodules there are; leave out --{', --'.join(said)}, or write it into the plan"
            )
        return read(self.plan, wish.seed)

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
        names = ("retries", "private", "format", "matching", "grain", "seg")
        return {name: getattr(self, name) for name in names}


def _from_lps(wishes: Sequence[Wish]) -> list[Wish]:
    return [w if w.at is None else replace(w, at=(-w.at[0], -w.at[1], w.at[2])) for w in wishes]


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

    Example: hrldm insert scan.nii.gz OUT --subtype part-solid --diameter 12 --lobe RUL --lungs lobes.nii.gz

    Args:
        ct: NIfTI, MetaImage or NRRD file, DICOM folder or file, or zip
        out: output folder, created here: ct.nii.gz, mask.nii.gz, core.nii.gz for a solid core, record.json, preview.png, and
            dicom/ for a DICOM input
        lungs: lung mask or lobe map of this CT
        avoid: mask that no nodule may touch
        series_uid: which series to read from a DICOM folder with several (UID:2 for its acquisition 2), or largest
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
    files = sorted(p.name for p in out.iterdir())
    if options.json:
        print(json.dumps({"out": str(out), "files": files, "nodules": record["nodules"]}))
    else:
        print(f"{described(wishes, record)}\nwritten to {out}: {', '.join(files)}")
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

    Example: hrldm batch CTS OUT --plan plan.csv --lungs MAPS

    Args:
        folder: with image files, zips and DICOM folders (of several series the largest chest CT); or patient/ct.nii.gz
        out: output folder, with one subfolder per CT
        subtype: of the nodules
        diameter: in mm, of the sphere of equal volume; 3 to 30
        seed: random seed of shape, position, histogram and noise; each CT gets its own seeds
        lungs: folder with a lung mask or lobe map per CT, named like the CT
        overwrite: redo results made with another request, version or file (to redo any other result, delete it)
    """
    from hrldm.insertion.batch import FINE, insert_folder

    wishes = options.wishes(Wish(subtype, diameter, seed=seed), read_cases)
    said = insert_folder(folder, out, wishes, options.generator(), lungs, overwrite=overwrite, **options.file())
    if options.json:
        print(json.dumps({"out": os.path.abspath(out), "results": said}))
    else:
        print("\n".join(f"{name}: {as_options(what)}" for name, what in said.items()))
    return int(any(what not in FINE for what in said.values()))


def plan(
    folder: tyro.conf.Positional[Path],
    path: tyro.conf.Positional[Path],
    cohort: Annotated[Cohort, _FLAT],
    lungs: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Plan a cohort for `batch`; every nodule is tried in its CT before the plan is written.

    Example: hrldm plan CTS plan.csv --preset size-curve --number 2 --diameters 4 20 --prevalence 0.5

    Args:
        folder: with NIfTI files, zips and DICOM folders
        path: the plan to write, a CSV; `hrldm batch FOLDER OUT --plan PATH` makes it
        lungs: folder with a lung mask or lobe map per CT, named like the CT; give it to `batch`, too
        overwrite: replace the file
    """
    from hrldm.insertion.planning import plan_cohort

    cases = plan_cohort(folder, path, cohort, lungs, overwrite)
    nodules = [len(case.wishes) for case in cases.values()]
    print(
        f"{path}: {sum(nodules)} nodule(s) in {len(nodules) - nodules.count(0)} result(s), {nodules.count(0)} negative CT(s)"
    )
    return 0


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

    Example: hrldm erase scan.nii.gz OUT --mask lesions.nii.gz

    Args:
        ct: NIfTI, MetaImage or NRRD file, DICOM folder or file, or zip
        out: output folder, created here: ct.nii.gz, mask.nii.gz, record.json, and dicom/ for a DICOM input
        mask: mask of the lesion or lesions
        lungs: lung mask or lobe map of this CT
        seed: random seed of the places that lung may come from
        series_uid: which series to read from a DICOM folder with several (UID:2 for its acquisition 2), or largest
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

    Example: hrldm score OUT predictions.csv --out SCORES --coordinates lps

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
    return run({"insert": insert, "batch": batch, "plan": plan, "erase": erase, "score": score}, "hrldm")


if __name__ == "__main__":
    sys.exit(main())
