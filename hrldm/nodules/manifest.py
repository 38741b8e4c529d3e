"""The manifest: one row per nodule, from any dataset, checked as a whole before any long computation.

All problems are raised together with their row numbers (as a spreadsheet shows them: the header is row 1, blank rows
count), so that a user fixes a table once. The split is by unit of independence: the nodule's patient, or
`shape_patient_id` if a shape was put into another patient's background (semi-synthetic data).
"""

import functools
import logging
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from hrldm.atomic import atomic
from hrldm.cache import digest
from hrldm.config import SUBTYPES
from hrldm.ct.geometry import equivalent_diameter, grid_gap, voxel_size
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import check_hu
from hrldm.nodules.cubes import whole_hu
from hrldm.nodules.split import SPLITS, hash_split, lidc_split
from hrldm.nodules.spreadsheet import read_spreadsheet
from hrldm.paths import FILES

logger = logging.getLogger(__name__)
REQUIRED = ("nodule_id", "patient_id", "image", "mask", "subtype", "diameter_mm")
# 1..5, may be blank; LIDC's, in another order and without calcification, whose scale ends at 6
RATINGS = ("texture", "malignancy", "spiculation", "lobulation", "margin", "sphericity", "subtlety")
UNIT = "shape_patient_id"  # replaces the patient in the split, if filled
PROGRESS_ROWS = 200
SIZES_DIFFER = 4  # a mask this many times wider or narrower than diameter_mm is of something else


def load_manifest(path_or_root: str | Path, check_images: bool = True) -> pd.DataFrame:
    """The validated manifest, with absolute paths and a `split` column.

    Args:
        path_or_root:  a manifest CSV, or the folder that holds `manifest.csv`
        check_images:  read every voxel (HU range, empty or non-binary masks); headers and grids are always checked

    Returns:
        One row per nodule; ids, paths, subtype and split are str, sizes, ratings and other all-number columns float
        (NaN where blank).

    Raises:
        ValueError: one message with every problem found, each with row number and file.
    """
    path = Path(path_or_root)
    path = path / "manifest.csv" if path.is_dir() else path
    root = path.parent.resolve()
    frame, problems = _read_table(path)
    problems += _check_values(frame)
    if "patient_id" in frame:
        problems += _set_split(frame, path)
    problems += _check_files(frame, root, check_images)
    if problems:
        raise ValueError(
            f"{path}: {len(problems)} problem(s), nothing was loaded; mend the rows and try again\n  "
            + "\n  ".join(problems)
        )
    for column in _present(frame, FILES):
        frame[column] = [os.path.normpath(root / f) if f else "" for f in frame[column]]
    return frame.reset_index(drop=True)


def write_manifest(frame: pd.DataFrame, path: str | Path, overwrite: bool = False) -> Path:
    """Write `frame` as a manifest CSV, atomically, with file paths relative to it (relative ones are kept).

    Raises:
        ValueError: a required column is missing, or the file exists and `overwrite` is False.
    """
    path = Path(path)
    if missing := [c for c in REQUIRED if c not in frame]:
        raise ValueError(
            f"{path}: column(s) {', '.join(missing)} missing from the table; a manifest needs {', '.join(REQUIRED)}"
        )
    frame = frame.copy()
    for column in _present(frame, FILES):
        frame[column] = [
            os.path.relpath(f, path.parent.resolve()) if isinstance(f, str | Path) and os.path.isabs(f) else f
            for f in frame[column]
        ]
    with atomic(path, overwrite) as part:
        frame.to_csv(part, index=False, lineterminator="\n")
    return path


def file_name(nodule_id: str) -> str:
    """A nodule's id made safe for a file name, so that it cannot leave its folder."""
    return re.sub(r"[/\\]", "-", nodule_id)


def units(frame: pd.DataFrame) -> pd.Series:
    """The unit of independence of each row: `shape_patient_id` where it is filled, else the patient."""
    patients = frame["patient_id"]
    return frame[UNIT].where(frame[UNIT].fillna("") != "", patients) if UNIT in frame else patients


# -- checks, each returning its problems -------------------------------------------------------------------------------


def _present(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[str]:
    return [c for c in columns if c in frame]


def _rows(numbers) -> str:
    """`row 3` or `rows 3, 7`."""
    numbers = list(numbers)
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """All cells as stripped text, indexed by spreadsheet row, and the problems of the table itself."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no manifest there; give a CSV or a folder with manifest.csv (columns {', '.join(REQUIRED)}, …)"
        )
    columns, rows, problems = read_spreadsheet(path)
    if missing := [c for c in REQUIRED if c not in columns]:
        problems.append(f"missing column(s) {', '.join(missing)}")
    if not rows:
        problems.append("no rows; a manifest needs at least one nodule")
    frame = pd.DataFrame(list(rows.values()), columns=columns, index=list(rows), dtype=object)
    return frame.loc[:, ~frame.columns.duplicated()].copy(), problems


def _check_values(frame: pd.DataFrame) -> list[str]:
    """Blank, duplicate, unknown and non-numeric cells; numeric columns of `frame` become float in place."""
    problems = []
    for column in _present(frame, REQUIRED):
        problems += [f"row {n}: {column} is empty" for n in frame.index[frame[column] == ""]]
    ids, subtypes = (frame.get(c, pd.Series(dtype=object)) for c in ("nodule_id", "subtype"))
    for nodule, group in ids[ids != ""].groupby(ids, sort=False):
        if len(group) > 1:
            problems.append(
                f"{_rows(group.index)}: nodule_id {nodule!r} stands {len(group)} times; give each nodule its own"
            )
    unknown = subtypes[~subtypes.isin([*SUBTYPES, ""])]
    problems += [f"row {n}: unknown subtype {s!r}; one of {', '.join(SUBTYPES)}" for n, s in unknown.items()]
    for column in _present(frame, ("diameter_mm", "volume_mm3", *RATINGS)):
        text, rating = frame[column], column in RATINGS
        values = pd.to_numeric(text, errors="coerce").astype(float)
        bad = (text != "") & ~(values.between(1, 5) if rating else (values > 0) & np.isfinite(values))
        wish = "a number from 1 to 5, or blank" if rating else "a positive number"
        problems += [f"row {n}: {column} {s!r} is not {wish}" for n, s in text[bad].items()]
        frame[column] = values.mask(bad)
    for column in frame.columns.drop([*REQUIRED, *FILES, "split", "volume_mm3", *RATINGS], errors="ignore"):
        if not column.endswith(("_id", "_uid")):  # other numbers, such as a centre in mm
            text = frame[column]
            values = pd.to_numeric(text, errors="coerce").astype(float)
            if (values.notna() | (text == "")).all() and values.notna().any():
                problems += [f"row {n}: {column} {s!r} is not finite" for n, s in text[np.isinf(values)].items()]
                frame[column] = values
    return problems


def _set_split(frame: pd.DataFrame, path: Path) -> list[str]:
    """Add a `split` column (from the committed LIDC split, or by hash) in place, or return the problems of a given one."""
    unit = units(frame)
    if "split" in frame:
        fits = frame["split"].isin(SPLITS)
        problems = [f"row {n}: split {s!r} is not one of {', '.join(SPLITS)}" for n, s in frame["split"][~fits].items()]
        for patient, group in frame[fits].groupby(unit, sort=False):
            if group["split"].nunique() > 1:
                where = ", ".join(f"{s} in {_rows(g.index)}" for s, g in group.groupby("split", sort=False))
                problems.append(f"patient {patient!r} stands in two splits: {where}; split by patient")
        return problems
    known = lidc_split()
    if strangers := [patient for patient in unit.unique() if patient not in known]:
        logger.warning(
            "%s: no split column and %d patient(s) unknown to the LIDC split (%s, …): split 70/10/20 by hash of patient_id",
            path, len(strangers), ", ".join(map(repr, strangers[:3])),
        )  # fmt: skip
    frame["split"] = unit.map(lambda patient: known.get(patient) or hash_split(patient))
    return []


def _check_files(frame: pd.DataFrame, root: Path, check_images: bool) -> list[str]:
    """Missing and unreadable files, differing grids, images that are not CT or another patient's, impossible masks."""
    problems: list[str] = []
    voxels: dict[str, str] = {}  # hash of each image's voxels, the same in every dtype

    @functools.cache  # one CT may hold many nodules
    def opened_image(name: str) -> nib.Nifti1Pair:
        image = open_nifti(root / name)
        if check_images:
            hu = read_voxels(image, root / name)[1]
            check_hu(hu, root / name)
            voxels[name] = digest(whole_hu(hu))
        return image

    def opened_mask(name: str, diameter_mm: float) -> nib.Nifti1Pair:
        mask = open_nifti(root / name)
        if check_images:
            mm3 = abs(np.linalg.det(mask.affine[:3, :3]))
            _check_mask(read_voxels(mask, root / name)[1], mm3, diameter_mm, root / name)
        return mask

    diameters = frame.get("diameter_mm", pd.Series(np.nan, frame.index))
    rows = frame[_present(frame, FILES)].to_dict("index").items()
    for number, row in tqdm(rows, desc="checking manifest", mininterval=10, disable=len(frame) <= PROGRESS_ROWS):
        opened = {}
        for column, name in row.items():
            try:
                if name:
                    opened[column] = opened_mask(name, diameters[number]) if column == "mask" else opened_image(name)
            except ValueError as error:
                problems.append(f"row {number}: {column} {error}")
        problems += [f"row {number}: {p}" for p in _grid_problems(opened, row)]
    return problems + _leaks(frame, voxels)


def _leaks(frame: pd.DataFrame, voxels: dict[str, str]) -> list[str]:
    """One CT listed under several patients in different splits. voxels: image -> hash of its voxels."""
    if not {"patient_id", "image"} <= set(frame):
        return []
    problems = []
    for _, rows in frame.groupby(frame["image"].map(voxels), sort=False):
        if rows["patient_id"].nunique() > 1 and rows["split"].nunique() > 1:
            of = ", ".join(f"{p!r} in {_rows(g.index)}" for p, g in rows.groupby("patient_id", sort=False))
            problems.append(
                f"image {rows['image'].iloc[0]}: one CT under {rows['patient_id'].nunique()} patients in different splits "
                f"({of}); give them one patient_id"
            )
    return problems


def _check_mask(mask: np.ndarray, mm3: float, diameter_mm: float, name: Path) -> None:
    """Raise ValueError for a mask (X, Y, Z) that is empty, holds anything but 0 and 1, or is far from the diameter."""
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.size:
        raise ValueError(
            f"{name}: not binary, holds {float(odd.flat[0]):g} beside 0 and 1; save the one nodule as 1, the rest as 0"
        )
    if not mask.any():
        raise ValueError(f"{name}: empty mask; draw the nodule or drop the row")
    width = equivalent_diameter(mm3 * np.count_nonzero(mask))
    if width > SIZES_DIFFER * diameter_mm or diameter_mm > SIZES_DIFFER * width:
        raise ValueError(
            f"{name}: holds a lesion of {width:.3g} mm where diameter_mm says {diameter_mm:g}; is it this nodule's mask?"
        )


def _grid_problems(opened: dict[str, nib.Nifti1Pair], row: dict[str, str]) -> list[str]:
    """Masks and backgrounds on another grid than the image."""
    problems = []
    for column, other in opened.items():
        if column == "image" or "image" not in opened:
            continue
        image, name = opened["image"], f"{column} {row[column]}"
        gap = grid_gap(other.affine, image.affine, image.shape)
        if other.shape[:3] != image.shape[:3]:
            problems.append(
                f"{name} has shape {other.shape[:3]}, image {row['image']} {image.shape[:3]}; resample it to the image"
            )
        elif gap > voxel_size(image.affine).min() / 10:
            problems.append(
                f"{name} is {gap:.2f} mm off image {row['image']} (affines differ); save it with the image's affine"
            )
    return problems
