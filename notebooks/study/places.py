"""Healthy places: where a manifest gives no background, the nodule is erased from its own image (`hrldm.nodules.healthy`).

An image that still holds its nodule tells what is asked for: the partial-volume shell beyond the mask knows its mean HU.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from hrldm.atomic import atomic, write_text
from hrldm.cache import keyed
from hrldm.ct.geometry import shifted
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import CT, read_ct, write_nifti
from hrldm.nodules.cubes import whole_hu
from hrldm.nodules.healthy import SEARCH_MM, erased, lung_of
from hrldm.nodules.masks import box_of

VERSION = 1  # raise when the same images would give other places


def healthy_images(frame: pd.DataFrame) -> pd.Series:
    """For each row of a manifest the file of its place without the nodule: its `background`, or made here and kept in the
    cache; "" where the nodule cannot be erased (too near to the pleura or the hilum, or no place like it in the image)."""
    given = frame.background.fillna("") if "background" in frame else pd.Series("", frame.index)
    todo = frame[given == ""]
    made = Parallel(os.cpu_count(), prefer="threads")(delayed(_erased_file)(r.image, r.mask) for r in todo.itertuples())
    return given.where(given != "", pd.Series(made, todo.index, dtype=object).reindex(frame.index))


def _erased_file(image: str, mask: str) -> str:
    stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in (image, mask)]
    file = keyed("erased", VERSION, *stamps, suffix=".nii.gz")
    refused = file.with_name(file.name.replace(".nii.gz", ".txt"))
    if not file.exists() and not refused.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        ct, opened = read_ct(Path(image), min_slices=1), open_nifti(Path(mask))
        lesion = read_voxels(opened, Path(mask))[1] > 0
        box = box_of(lesion, int(np.ceil(SEARCH_MM / ct.spacing.min())))
        hu, lesion = ct.array[box].astype(np.float32), lesion[box]
        try:
            healthy, _ = erased(hu, lung_of(hu, lesion, ct.spacing), lesion, ct.spacing)
        except ValueError as error:
            write_text(refused, str(error))
        else:
            part = CT(whole_hu(healthy), shifted(ct.affine, [s.start for s in box]))
            with atomic(file) as temporary:
                write_nifti(temporary, part.array, part)
    return str(file) if file.exists() else ""
