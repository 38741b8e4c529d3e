"""The manifest: one row a nodule, from whatever dataset, checked as a whole before anything long begins.

All problems are collected and raised together with their row numbers (the header is row 1, as in a spreadsheet), so
that a user mends a table once. The split is by unit of independence: the nodule's patient, or `shape_patient_id` where
a shape was put into a background of another patient (semi-synthetic data).
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from hrldm.atomic import atomic
from hrldm.config import SUBTYPES
from hrldm.data.ct import check_hu
from hrldm.data.geometry import grid_gap, voxel_size
from hrldm.data.nifti import open_nifti, read_voxels
from hrldm.data.split import SPLITS, patient_split

logger = logging.getLogger(__name__)
REQUIRED = ("nodule_id", "patient_id", "image", "mask", "subtype", "diameter_mm")
RATINGS = (
    "texture",
    "malignancy",
    "spiculation",
    "lobulation",
    "margin",
    "sphericity",
    "subtlety",
)  # 1..5, may be blank
FILES = ("image", "mask", "background")
UNIT = "shape_patient_id"  # stands for the patient in the split where the column is filled
HASH_SHARES = (0.7, 0.8)  # cumulative train, train + val; the rest is test
PROGRESS_ROWS = 200


def load_manifest(path_or_root: str | Path, check_images: bool = True) -> pd.DataFrame:
    """The validated manifest, with absolute paths and a `split` column.

    Args:
        path_or_root:  a manifest CSV, or the folder that holds `manifest.csv`
        check_images:  read every voxel (HU range, empty or non-binary masks); headers and grids are always checked

    Returns:
        One row a nodule; ids, paths, subtype and split are str, sizes, ratings and other all-number columns float
        (NaN where blank).

    Raises:
        ValueError: one message with every problem found, each with row number and file.
    """
    path = Path(path_or_root)
    path = path / "manifest.csv" if path.is_dir() else path
    frame, problems = _read_table(path)
    if len(frame) and frame.columns.is_unique and set(REQUIRED) <= set(frame.columns):
        problems += _check_values(frame)
        frame, split_problems = _with_split(frame, path)
        problems += split_problems + _check_files(frame, path.parent.resolve(), check_images)
    if problems:
        raise ValueError(
            f"{path}: {len(problems)} problem(s), nothing was loaded; mend the rows and try again\n  "
            + "\n  ".join(problems)
        )
    for column in _present(frame, FILES):
        frame[column] = [os.path.normpath(path.parent.resolve() / f) if f else "" for f in frame[column]]
    return frame.reset_index(drop=True)


def write_manifest(frame: pd.DataFrame, path: str | Path, overwrite: bool = False) -> Path:
    """Write `frame` as a manifest CSV, atomically, with file paths relative to it (relative ones are taken as such).

    Raises:
        ValueError: a required column is missing, or the file exists and `overwrite` is False.
    """
    path = Path(path)
    missing = [c for c in REQUIRED if c not in frame]
    if missing:
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


# -- checks, each returning its problems ---------------------------------------------------------------------------------


def _present(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[str]:
    return [c for c in columns if c in frame]


def _rows(numbers) -> str:
    """`row 3` or `rows 3, 7`."""
    numbers = list(numbers)
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """All cells as stripped text, indexed by row number in the file, and the problems of the table as such."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no manifest there; give a CSV or a folder with manifest.csv (columns {', '.join(REQUIRED)}, …)"
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, strict=True)
            lines = [(reader.line_num, [c.strip() for c in line]) for line in reader if any(c.strip() for c in line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV ({error}); save it as comma-separated UTF-8") from error
    columns = lines[0][1] if lines else []
    problems = [f"column {c!r} stands {columns.count(c)} times" for c in dict.fromkeys(columns) if columns.count(c) > 1]
    missing = [c for c in REQUIRED if c not in columns]
    if missing:
        hint = "; separate columns by commas" if len(columns) == 1 and any(d in columns[0] for d in ";\t") else ""
        problems.append(f"missing column(s) {', '.join(missing)}{hint}")
    if len(lines) < 2:
        problems.append("no rows; a manifest needs at least one nodule")
    problems += [
        f"row {n}: {len(line)} fields where the header has {len(columns)}"
        for n, line in lines[1:]
        if len(line) != len(columns)
    ]
    good = [(n, line) for n, line in lines[1:] if len(line) == len(columns)]
    return pd.DataFrame([line for _, line in good], columns=columns, index=[n for n, _ in good]), problems


def _check_values(frame: pd.DataFrame) -> list[str]:
    """Blank, doubled, unknown and non-numeric cells; number columns of `frame` become float in place."""
    problems = []
    for column in REQUIRED:
        problems += [f"row {n}: {column} is empty" for n in frame.index[frame[column] == ""]]
    for nodule, group in frame[frame["nodule_id"] != ""].groupby("nodule_id", sort=False):
        if len(group) > 1:
            problems.append(
                f"{_rows(group.index)}: nodule_id {nodule!r} stands {len(group)} times; give each nodule its own"
            )
    unknown = frame[~frame["subtype"].isin([*SUBTYPES, ""])]
    problems += [f"row {n}: unknown subtype {s!r}; one of {', '.join(SUBTYPES)}" for n, s in unknown["subtype"].items()]
    for column in _present(frame, ("diameter_mm", "volume_mm3", *RATINGS)):
        text, rating = frame[column], column in RATINGS
        values = pd.to_numeric(text, errors="coerce").astype(float)
        bad = (text != "") & ~(values.between(1, 5) if rating else (values > 0) & np.isfinite(values))
        wish = "a number from 1 to 5, or blank" if rating else "a positive number"
        problems += [f"row {n}: {column} {s!r} is not {wish}" for n, s in text[bad].items()]
        frame[column] = values
    for column in frame.columns.drop([*REQUIRED, *FILES, "split", "volume_mm3", *RATINGS], errors="ignore"):
        if not column.endswith(("_id", "_uid")):  # other numbers, such as a centre in mm
            values = pd.to_numeric(frame[column], errors="coerce").astype(float)
            frame[column] = (
                values if (values.notna() | (frame[column] == "")).all() and values.notna().any() else frame[column]
            )
    return problems


def _with_split(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """`frame` with a `split` column (given, from the committed LIDC split, or by hash) and the problems of a given one."""
    unit = frame["patient_id"] if UNIT not in frame else frame[UNIT].where(frame[UNIT] != "", frame["patient_id"])
    if "split" in frame:
        wrong = frame[~frame["split"].isin(SPLITS)]
        problems = [f"row {n}: split {s!r} is not one of {', '.join(SPLITS)}" for n, s in wrong["split"].items()]
        for patient, group in frame[frame["split"].isin(SPLITS)].groupby(unit, sort=False):
            if group["split"].nunique() > 1:
                where = ", ".join(f"{s} in {_rows(g.index)}" for s, g in group.groupby("split", sort=False))
                problems.append(f"patient {patient!r} stands in two splits: {where}; split by patient")
        return frame, problems
    chosen, strangers = {}, []
    for patient in unit.unique():
        try:
            chosen[patient] = patient_split(patient)
        except ValueError:
            chosen[patient] = _hash_split(patient)
            strangers.append(patient)
    if strangers:
        logger.warning(
            "%s: no split column and %d patient(s) unknown to the LIDC split (%s, …): split 70/10/20 by hash of patient_id",
            path, len(strangers), ", ".join(map(repr, strangers[:3])),
        )  # fmt: skip
    return frame.assign(split=unit.map(chosen)), []


def _hash_split(patient: str) -> str:
    """`train`, `val` or `test` from the patient's name alone, so that adding patients moves nobody."""
    share = int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) / 16**8
    return SPLITS[sum(share >= cut for cut in HASH_SHARES)]


def _check_files(frame: pd.DataFrame, root: Path, check_images: bool) -> list[str]:
    """Missing and unreadable files, grids that differ, images that are no CT, masks that are empty or not binary."""
    problems: list[str] = []
    images: dict[str, nib.Nifti1Pair | ValueError] = {}  # one CT may hold many nodules

    def image_at(name: str) -> nib.Nifti1Pair:
        if name not in images:
            try:
                images[name] = open_nifti(root / name)
                if check_images:
                    check_hu(read_voxels(images[name], root / name)[1], root / name)
            except ValueError as error:
                images[name] = error
        if isinstance(images[name], ValueError):
            raise images[name]
        return images[name]

    rows = frame[_present(frame, FILES)].to_dict("index").items()
    for number, row in tqdm(rows, desc="checking manifest", mininterval=10, disable=len(frame) <= PROGRESS_ROWS):
        opened = {}
        for column, name in row.items():
            if not name:
                continue
            try:
                opened[column] = open_nifti(root / name) if column == "mask" else image_at(name)
                if column == "mask" and check_images:
                    _check_mask(read_voxels(opened[column], root / name)[1], root / name)
            except ValueError as error:
                problems.append(f"row {number}: {column} {error}")
        problems += [f"row {number}: {p}" for p in _grid_problems(opened, row)]
    return problems


def _check_mask(mask: np.ndarray, name: Path) -> None:
    """Raise ValueError for a mask (X, Y, Z) that is empty or holds anything but 0 and 1."""
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.size:
        raise ValueError(
            f"{name}: not binary, holds {float(odd.flat[0]):g} beside 0 and 1; save the one nodule as 1, the rest as 0"
        )
    if not mask.any():
        raise ValueError(f"{name}: empty mask; draw the nodule or drop the row")


def _grid_problems(opened: dict[str, nib.Nifti1Pair], row: dict[str, str]) -> list[str]:
    """Where mask or background lie on another grid than the image."""
    if "image" not in opened:
        return []
    image, problems = opened["image"], []
    for column in ("mask", "background"):
        if column not in opened:
            continue
        other = opened[column]
        if other.shape[:3] != image.shape[:3]:
            problems.append(
                f"{column} {row[column]} has shape {other.shape[:3]}, image {row['image']} {image.shape[:3]}; resample it to the image"
            )
            continue
        gap = grid_gap(other.affine, image.affine, image.shape)
        if gap > voxel_size(image.affine).min() / 10:
            problems.append(
                f"{column} {row[column]} is {gap:.2f} mm off image {row['image']} (affines differ); save it with the image's affine"
            )
    return problems
