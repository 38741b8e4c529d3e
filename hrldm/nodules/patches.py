"""Lesion-centred 1 mm RAS crops from a manifest: the input of every network in this project."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm import tqdm

from hrldm.atomic import atomic
from hrldm.cache import file_digest, keyed
from hrldm.config import SUBTYPES
from hrldm.ct.geometry import crop_affine, sample, to_world
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import read_ct
from hrldm.nodules.cubes import whole_hu
from hrldm.paths import FILES

logger = logging.getLogger(__name__)
VERSION = 1  # raise when the same files would give different crops


@dataclass(frozen=True, eq=False)
class Patches:
    """Crops of N nodules.

    hu:    (N, D, D, D) int16 HU
    mask:  (N, D, D, D) bool
    frame: the N rows of the manifest, index 0..N-1
    """

    hu: np.ndarray
    mask: np.ndarray
    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows) -> Patches:
        """The chosen rows (mask, indices or slice) as new Patches."""
        index = np.arange(len(self))[rows]
        return Patches(self.hu[index], self.mask[index], self.frame.iloc[index].reset_index(drop=True))

    def centred(self, size: int) -> Patches:
        """The middle `size` voxels of each crop."""
        start = (self.hu.shape[1] - size) // 2
        if start < 0:
            raise ValueError(f"crops of {self.hu.shape[1]} mm cannot be cut to {size} mm; load them larger")
        cut = (slice(None), *[slice(start, start + size)] * 3)
        return Patches(self.hu[cut], self.mask[cut], self.frame)

    @property
    def subtype(self) -> np.ndarray:
        """Labels 0 solid, 1 part-solid, 2 ground-glass (Section 5)."""
        return self.frame.subtype.map(SUBTYPES.index).to_numpy()


def manifest_digest(frame: pd.DataFrame, columns: tuple[str, ...] = ("image", "mask")) -> str:
    """Hash (16 hex digits) of the rows and of what their files hold, wherever the files lie and whenever they were copied."""
    rows = frame.drop(columns=list(FILES), errors="ignore")
    found = hashlib.sha256(pd.util.hash_pandas_object(rows, index=False).values.tobytes())
    for column in columns:
        for name in frame[column]:
            found.update(file_digest(name).encode())
    return found.hexdigest()[:16]


def fitting(frame: pd.DataFrame, size: int, diameters_mm: tuple[float, float] = (0.0, np.inf)) -> pd.DataFrame:
    """The rows whose nodule is of these diameters and no wider than a crop of `size` mm; a warning names the others."""
    wide, other = frame.diameter_mm > size, ~frame.diameter_mm.between(*diameters_mm)
    bounds = "not of {:g} to {:g} mm".format(*diameters_mm)
    for why, rows in ((f"wider than the crop of {size} mm", frame[wide]), (bounds, frame[other & ~wide])):
        if len(rows):
            names = ", ".join(f"{r.nodule_id} ({r.diameter_mm:g} mm)" for r in rows.itertuples())
            logger.warning("left out, %s: %s", why, names)
    return frame[~(wide | other)].reset_index(drop=True)


def load_patches(frame: pd.DataFrame, size: int) -> Patches:
    """Crops of `size` mm around each lesion's centre of mass, cached by content.

    Raises:
        ValueError: no rows, or a lesion outside its crop.
    """
    if not len(frame):
        raise ValueError("the manifest has no rows for this split; check its `split` column")
    frame = frame.reset_index(drop=True)
    file = keyed("patches", VERSION, manifest_digest(frame), size, suffix=".npz")
    if not file.exists():
        hu = np.empty((len(frame), size, size, size), np.int16)
        mask = np.empty(hu.shape, bool)
        rows = tqdm(frame.iterrows(), total=len(frame), desc="crops", mininterval=10, disable=len(frame) < 200)
        for i, row in rows:
            hu[i], mask[i] = _crop(Path(row["image"]), Path(row["mask"]), size)
        with atomic(file) as part:
            np.savez(part, hu=hu, mask=np.packbits(mask))
    with np.load(file) as stored:
        hu = stored["hu"]
        mask = np.unpackbits(stored["mask"], count=hu.size).astype(bool).reshape(hu.shape)
    return Patches(hu, mask, frame)


def _crop(image: Path, mask: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    ct, opened = read_ct(image, min_slices=1), open_nifti(mask)
    label = read_voxels(opened, mask)[1] > 0
    # the nearest voxel, not the exact centre of mass: images at 1 mm are then copied, not interpolated
    centre = np.rint(ndimage.center_of_mass(label))
    grid = crop_affine(to_world(opened.affine, centre), (size,) * 3)
    hu = sample(ct.array, ct.affine, (size,) * 3, grid)
    inside = sample(label.astype(np.float32), opened.affine, (size,) * 3, grid, outside=0.0) > 0.5
    if not inside.any():
        raise ValueError(f"{mask}: the lesion vanishes at 1 mm; remove this nodule from the manifest")
    return whole_hu(hu), inside
