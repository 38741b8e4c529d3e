"""Cubes around nodules, as `lidc_mini` and `transplant` cut them from a CT at 1 mm and write them."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from hrldm.ct.geometry import shifted

LOWEST_HU, HIGHEST_HU = -1024, 3071  # what the 12 bits of a scanner hold; the lowest is air outside the CT


def whole_hu(hu: np.ndarray) -> np.ndarray:
    """HU as scanners store them: rounded, limited to 12 bits, int16."""
    return hu.round().clip(LOWEST_HU, HIGHEST_HU).astype(np.int16)


def cube_about(array: np.ndarray, centre: Sequence[int], side: int, fill: int = LOWEST_HU) -> np.ndarray:
    """Cube of `side` whose middle (side // 2) is the voxel `centre`; outside the array `fill`: air of a CT."""
    start = [int(c) - side // 2 for c in centre]
    inner = array[tuple(slice(max(a, 0), a + side) for a in start)]
    beyond = [(max(-a, 0), max(a + side - n, 0)) for a, n in zip(start, array.shape, strict=True)]
    return np.pad(inner, beyond, constant_values=fill)


def write_cubes(folder: Path, name: str, affine: np.ndarray, centre: np.ndarray, **cubes: np.ndarray) -> dict[str, str]:
    """Write a nodule's cubes and return their columns of the manifest.

    affine: of the CT they come from; centre: its voxel in their middle
    cubes:  `image`, `background` (int16 HU) and `mask` (bool)
    """
    files = {}
    for column, array in cubes.items():
        files[column] = f"{column}s/{name}.nii.gz"
        (folder / files[column]).parent.mkdir(exist_ok=True)
        values = array.astype(np.uint8) if array.dtype == bool else array
        corner = np.asarray(centre) - len(values) // 2
        # nibabel: gzip level 1, no time stamp
        nib.Nifti1Image(values, shifted(affine, corner)).to_filename(folder / files[column])
    return files
