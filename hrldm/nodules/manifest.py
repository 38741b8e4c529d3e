"""The manifest: one row per nodule, from any dataset, checked as a whole before any long computation.

All problems are raised together with their row numbers (as a spreadsheet shows them: the header is row 1, blank rows
count), so that a user fixes a table once. The split is by unit of independence: the nodule's patient, or
`shape_patient_id` if a shape was put into another patient's background (semi-synthetic data).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from hrldm.atomic import atomic
from hrldm.config import SUBTYPES
from hrldm.ct.geometry import equivalent_diameter, grid_gap, voxel_size
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import check_hu
from hrldm.nodules.split import SPLITS, patient_split
from hrldm.nodules.spreadsheet import read_spreadsheet

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
UNIT = "shape_patient_id"  # replaces the patient in the split, if filled
HASH_SHARES = (0.7, 0.8)  # cumulative train, train + val; the rest is test
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
    frame, problems = _read_table(path)
    problems += _check_values(frame)
    if "patient_id" in frame:
        frame, split_problems = _with_split(frame, path)
        problems += split_problems
    problems += _check_files(frame, path.parent.resolve(), check_images)
    if problems:
        raise ValueError(
            f"{path}: {len(problems)} problem(s), nothing was loaded; mend the rows and try again\n  "
            + "\n  ".join(problems)
        )
    for column in _present(frame, FILES):
        frame[column] = [os.path.normpath(path.parent.resolve() / f) if f else "" for f in frame[column]]
    return frame.reset_index(drop=True)


def write_manifest(frame: pd.DataFrame, path: str | Path, overwrite: bool = False) -> Path:
    """Write `frame` as a manifest CSV, atomically, with file paths relative to it (relative ones are kept).

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


def file_name(nodule_id: str) -> str:
    """A nodule's id made safe for a file name, so that it cannot leave its folder."""
    return re.sub(r"[/\\]", "-", nodule_id)


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
    return frame.loc[:, ~frame.columns.duplicated()], problems


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


def _with_split(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """`frame` with a `split` column (given, from the committed LIDC split, or by hash) and problems of a given one."""
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
    """`train`, `val` or `test` from the patient's id alone, so that adding patients moves no one."""
    share = int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) / 16**8
    return SPLITS[sum(share >= cut for cut in HASH_SHARES)]


def _check_files(frame: pd.DataFrame, root: Path, check_images: bool) -> list[str]:
    """Missing and unreadable files, differing grids, images that are not CT or another patient's, impossible masks."""
    problems: list[str] = []
    images: dict[str, nib.Nifti1Pair | ValueError] = {}  # one CT may hold many nodules
    voxels: dict[str, str] = {}  # hash of each image's voxels
    diameters = frame.get("diameter_mm", pd.Series(dtype=float))

    def image_at(name: str) -> nib.Nifti1Pair:
        if name not in images:
            try:
                images[name] = open_nifti(root / name)
                if check_images:
                    hu = read_voxels(images[name], root / name)[1]
                    check_hu(hu, root / name)
                    voxels[name] = hashlib.blake2b(_whole(hu), digest_size=16).hexdigest()
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
                    mask = read_voxels(opened[column], root / name)[1]
                    mm3 = abs(np.linalg.det(opened[column].affine[:3, :3]))
                    _check_mask(mask, mm3, diameters.get(number, np.nan), root / name)
            except ValueError as error:
                problems.append(f"row {number}: {column} {error}")
        problems += [f"row {number}: {p}" for p in _grid_problems(opened, row)]
    return problems + _leaks(frame, voxels)


def _whole(hu: np.ndarray) -> np.ndarray:
    """The HU as int16, so that one CT saved in two dtypes has one hash."""
    return (np.rint(hu) if hu.dtype.kind == "f" else hu).astype(np.int16, order="C", copy=False)


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
