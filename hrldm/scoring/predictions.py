"""What was inserted, and what a detector says: records and predictions, both as points in RAS mm."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom

from hrldm.config import SIZE_BINS_MM
from hrldm.ct.geometry import LPS_TO_RAS, to_world
from hrldm.insertion.plans import RECORD, SCANS
from hrldm.nodules.spreadsheet import read_spreadsheet
from hrldm.scoring.froc import POINT

logger = logging.getLogger(__name__)
LUNA16 = ("seriesuid", "coordX", "coordY", "coordZ", "probability")
COLUMNS = (LUNA16, ("scan", *POINT, "score"))
READ = ["where", "name", *POINT, "score"]
TO_RAS = {"ras": np.eye(4), "lps": LPS_TO_RAS}
EDGES_MM = sorted({edge for size in SIZE_BINS_MM for edge in size})
SIZES = [f"below {EDGES_MM[0]:g} mm", *(f"{a:g} to {b:g} mm" for a, b in SIZE_BINS_MM), f"from {EDGES_MM[-1]:g} mm"]
SHOWN = 10  # problems listed of one file


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan with inserted nodules, or a negative.

    names, cts: what predictions for it, and for the CT before insertion, may call it
    nodules:    a dict each: x, y, z, diameter_mm, subtype, size, lobe, attachment
    affine, shape: of its voxels, to RAS mm; in a negative, where no place matters, everywhere
    """

    names: tuple[str, ...]
    cts: frozenset[str]
    nodules: list[dict]
    affine: np.ndarray
    shape: tuple[float, ...]


def read_scans(path: str | Path) -> list[Scan]:
    """The scans of a folder that `insert` or `batch` wrote, or of a batch's table: a CSV with `image`, and optionally
    `case`, `ct` and `nodules` (0: a negative). A folder's own scans.csv says which scans it has.

    Raises:
        ValueError: unreadable, no record of an insertion, or no nodule at all.
    """
    path, problems, scans = Path(os.path.abspath(path)), [], {}
    if path.is_dir() and not (path / SCANS).is_file():
        root, found = path, (file.relative_to(path) for file in sorted(path.rglob(RECORD)))
        rows = {str(file): {"image": file} for file in found if not any(part.startswith(".") for part in file.parts)}
    else:
        path = path / SCANS if path.is_dir() else path
        columns, cells, problems = read_spreadsheet(path)
        problems += [] if "image" in columns else ["no column image; give the table of a batch, or its folder"]
        root, good = path.parent, {} if problems else cells
        rows = {f"row {k}": dict(zip(columns, row, strict=True)) for k, row in good.items()}
    for where, row in rows.items():
        folder = Path(os.path.normpath(root / row["image"])).parent
        name = row.get("case") or (folder.name if folder == root else Path(os.path.relpath(folder, root)).as_posix())
        if row.get("nodules") == "0":
            scans[name] = Scan((name,), frozenset({name, row.get("ct")}), [], np.eye(4), (np.inf,) * 3)
        elif name not in scans:  # a manifest has a row a nodule
            try:
                scans[name] = _scan(folder, name, row.get("ct"))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                said = f"{where}: {folder / RECORD} is not the record of an insertion ({type(error).__name__}: {error})"
                problems.append(f"{said}; insert again, or leave it out")
    if not problems and not any(scan.nodules for scan in scans.values()):
        problems.append("no inserted nodule; give what `hrldm insert` or `hrldm batch` wrote")
    _refuse(path, problems)
    return list(scans.values())


def _scan(folder: Path, name: str, ct: str | None) -> Scan:
    """The scan whose record lies in `folder`."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8-sig"))
    source, nodules = record["source"], []
    for nodule in record["nodules"]:
        wish, diameter = nodule["wish"], float(nodule["diameter_mm"])
        placed = {"at", "mask"} & wish.keys()  # nobody knows what that touches
        attachment = f"pleura, {nodule['base']}" if "base" in nodule else "not known" if placed else "none"
        parts = {"diameter_mm": diameter, "subtype": wish["subtype"], "size": SIZES[np.digitize(diameter, EDGES_MM)]}
        place = dict(zip(POINT, nodule["centre_ras_mm"], strict=True))
        nodules.append(place | parts | {"lobe": nodule["lobe"], "attachment": attachment})
    slices = sorted((folder / "dicom").glob("*.dcm"))[:1]
    series = (str(pydicom.dcmread(f, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID) for f in slices)
    cts = frozenset({name, ct, source["name"], Path(source["name"].removesuffix(".gz")).stem})
    return Scan((name, *series), cts, nodules, np.array(source["affine"]).reshape(4, 4), tuple(source["shape"]))


def read_predictions(path: str | Path, coordinates: str, scans: list[Scan], originals: bool = False) -> pd.DataFrame:
    """Predictions in RAS mm: scan (its number in `scans`), x, y, z, score.

    A CSV with LUNA16's columns or scan, x, y, z, score; or nnDetection's boxes as `nndet_boxes2nii` writes them, a file
    or a folder: {"1": {"box": [z, y, z, y, x, x], "score": …}}, in voxels, z being the last axis of the NIfTI file, from
    one voxel before the lesion to one behind it (nnDetection's issues 132 and 218). Its classes count as one.

    coordinates: ras or lps (world mm), or voxel (indices of the inserted CT)
    originals:   the predictions are those of the CTs before insertion, of which several scans may have been made

    Raises:
        ValueError: unreadable, an unknown scan, no number, or no prediction within its scan.
    """
    path = Path(path)
    boxes = path.is_dir() or path.suffix.lower() == ".json"
    if boxes and coordinates != "voxel":
        raise ValueError(f"{path}: nnDetection's boxes are in voxels; give coordinates=voxel")
    read, problems = (_boxes if boxes else _points)(path)
    read[[*POINT, "score"]] = read[[*POINT, "score"]].apply(pd.to_numeric, errors="coerce").astype(float)
    known = [(i, name) for i, scan in enumerate(scans) for name in (scan.cts if originals else scan.names)]
    found = read.merge(pd.DataFrame(known, columns=["scan", "name"]), how="left")
    odd = ~np.isfinite(found[[*POINT, "score"]]).all(axis=1)
    problems += [f"{where}: place and score must be numbers" for where in found["where"][odd]]
    lost, there = found[found["scan"].isna()], f"{scans[0].names[0]!r} and {len(scans) - 1} more"
    problems += [
        f"{where}: no record of a scan {name!r}, but of {there}; mend the name, or leave it out"
        for where, name in zip(lost["where"], lost["name"], strict=True)
    ]
    _refuse(path, problems)
    inside = np.ones(len(found), bool)
    for i, rows in found.groupby("scan").indices.items():
        affine, last = scans[int(i)].affine, np.array(scans[int(i)].shape) - 0.5
        points = to_world((TO_RAS | {"voxel": affine})[coordinates], found[POINT].to_numpy()[rows])
        index = to_world(np.linalg.inv(affine), points)
        inside[rows] = np.isinf(last).all() | ((index >= -0.5) & (index <= last)).all(axis=1)
        found.loc[rows, POINT] = points
    if len(found) and not inside.any():
        others = " or ".join(sorted({"ras", "lps", "voxel"} - {coordinates}))
        raise ValueError(
            f"{path}: coordinates={coordinates} puts every prediction outside its scan; they may be {others}"
        )
    if not inside.all():
        logger.warning("%s: %d of %d predictions lie outside their scans", path, (~inside).sum(), len(inside))
    return found[["scan", *POINT, "score"]].astype({"scan": int})


def _points(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a CSV, and its problems."""
    columns, rows, problems = read_spreadsheet(path)
    names = next((names for names in COLUMNS if set(names) <= set(columns)), ())
    if not names:
        needed = " or ".join(", ".join(each) for each in COLUMNS)
        problems.append(f"needs the columns {needed}; it has {', '.join(columns) or 'none'}")
    cells = ([f"row {k}", *(row[columns.index(name)] for name in names)] for k, row in rows.items() if names)
    return pd.DataFrame(cells, columns=READ), problems


def _boxes(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The middles of nnDetection's boxes, and the problems found."""
    root, files = (path, sorted(path.rglob("*_boxes.json"))) if path.is_dir() else (path.parent, [path])
    rows, problems = [], [] if files else ["no *_boxes.json in it, which `nndet_boxes2nii` writes"]
    for file in files:
        name, where = file.relative_to(root).as_posix().removesuffix(".json").removesuffix("_boxes"), file.name
        try:
            for key, of in json.loads(file.read_text(encoding="utf-8-sig")).items():
                where, box = f"{file.name}, box {key}", np.array(of["box"], float)
                low, high = box[[4, 1, 0]], box[[5, 3, 2]]  # x, y, z
                cut = 0.5 * (box == np.floor(box)).all()  # the tool rounds them down
                rows.append([where, name, *((low + high) / 2 + cut), of["score"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problems.append(f"{where}: not a box of nnDetection ({type(error).__name__}: {error})")
    return pd.DataFrame(rows, columns=READ), problems


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems[:SHOWN], *more]))
