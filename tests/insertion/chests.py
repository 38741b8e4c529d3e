"""A chest with its lungs on any grid, lesions drawn on it, and a library of balls, for the tests of insertion."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from hrldm.ct.geometry import to_world
from hrldm.ct.volume import CT
from hrldm.nodules.shapes import ShapeLibrary
from tests import tiny

LIBRARY = ShapeLibrary(
    pd.DataFrame(
        {"nodule_id": [f"shape{i}" for i in range(9)], "subtype": np.resize(["solid", "part-solid", "ground-glass"], 9),
         "diameter_mm": np.repeat([8.0, 14.0, 20.0], 3), "spiculation": 2.0}
    ),
    [tiny.ball(25, r) for r in (4, 7, 10) for _ in range(3)],
)  # fmt: skip


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """RAS mm (X, Y, Z, 3) of every voxel."""
    return to_world(affine, np.stack(np.indices(shape), -1))


def scan(turn: np.ndarray | None = None, spacing: tuple[float, ...] = (2.5, 2.5, 3.0)) -> tuple[CT, np.ndarray]:
    """A chest as int16 HU, and its lungs (X, Y, Z) uint8."""
    affine, shape = tiny.chest_grid(np.eye(3) if turn is None else turn, spacing)
    radii, world = np.array([50, 60, 90]), places(affine, shape)
    lungs = sum((((world - [side, 0, 0]) / radii) ** 2).sum(-1) < 1 for side in (-70, 70))
    return CT(tiny.chest(affine, shape), affine), lungs.astype(np.uint8)


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def drawn(path: Path, at, radius: float, core: float = -1.0) -> Path:
    """A ball of `radius` mm around `at` with its core, in a file with a grid of its own."""
    shape, affine = (40, 40, 30), np.diag([-0.9, 0.9, 1.3, 1.0])
    affine[:3, 3] = np.array(at) - affine[:3, :3] @ (np.array(shape) // 2)
    distance = np.linalg.norm(places(affine, shape) - at, axis=-1)
    return save(path, (distance <= radius).astype(np.uint8) + (distance <= core), affine)


class During(tiny.PaintingGenerator):
    """Does something while a nodule is made."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def __call__(self, request, **options):
        self.what()
        return super().__call__(request, **options)


def failing(error: BaseException) -> During:
    """A generator that raises `error`."""

    def fail():
        raise error

    return During(fail)
