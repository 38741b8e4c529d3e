"""Healthy places: where a manifest gives no background, the nodule is erased from its own image (`hrldm.nodules.healthy`).

An image that still holds its nodule tells what is asked for: the partial-volume shell beyond the mask knows its mean HU.
New nodules go to random ones (`random_places`): anywhere in the training lung of `lidc-mini`, else where another nodule was.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from hrldm.atomic import write_text
from hrldm.cache import file_digest, keyed
from hrldm.ct.geometry import shifted
from hrldm.ct.label_maps import LEFT, LOBE_NAMES
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import CT, read_ct, write_nifti
from hrldm.nodules.cubes import cube_about, whole_hu
from hrldm.nodules.healthy import SEARCH_MM, erased, lung_of
from hrldm.nodules.lidc_mini import PATIENT
from hrldm.nodules.manifest import UNIT
from hrldm.nodules.masks import box_of
from hrldm.nodules.patches import Patches
from hrldm.nodules.positions import LOCATIONS, VESSEL_HU, sample_position
from hrldm.nodules.transplant import HOST, MAX_MEAN_HU, MIN_LUNG, Host, embedded_hosts, weight

VERSION = 1  # raise when the same images would give other places


def healthy_images(frame: pd.DataFrame) -> pd.Series:
    """For each row of a manifest the file of its place without the nodule: its `background`, or made here and kept in the
    cache; "" where the nodule cannot be erased (too near to the pleura or the hilum, or no place like it in the image)."""
    given = frame.background.fillna("") if "background" in frame else pd.Series("", frame.index)
    todo = frame[given == ""]
    made = Parallel(os.cpu_count(), prefer="threads")(delayed(_erased_file)(r.image, r.mask) for r in todo.itertuples())
    return given.where(given != "", pd.Series(made, todo.index, dtype=object).reindex(frame.index))


def _erased_file(image: str, mask: str) -> str:
    file = keyed("erased", VERSION, file_digest(image), file_digest(mask), suffix=".nii.gz")
    refused = file.with_name(file.name.replace(".nii.gz", ".txt"))
    if not file.exists() and not refused.exists():
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
            write_nifti(file, part.array, part, overwrite=True)
    return str(file) if file.exists() else ""


def scans_of(frame: pd.DataFrame) -> np.ndarray:
    """(N,) the scan that each nodule lies in, by its patient; of the one CT of `lidc-mini`, the lung."""
    if HOST in frame:
        return frame[HOST].to_numpy(str)
    if UNIT in frame and "lobe" in frame:
        left = frame.lobe.isin([LOBE_NAMES[label] for label in LEFT])
        return np.where(left, f"{PATIENT} left lung", f"{PATIENT} right lung")
    return frame.patient_id.to_numpy(str)


def random_places(
    masks: np.ndarray, own: np.ndarray, known: Patches, behind: np.ndarray, embedded: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random healthy place of a training scan for each mask.

    Args:
        masks:  (N, D, D, D) bool, lesions that need a place.
        own:    (N,) row in `known` of the nodule that each is of; its place is taken where no other is healthy.
        known, behind: the training nodules, and (M, D, D, D) int16 HU of their places without them.
        embedded: `lidc-mini`, whose training lung is known as a whole.

    Returns:
        (N, D, D, D) int16 HU and (N,) `scans_of` them.
    """
    scans, places = scans_of(known.frame), own.copy()
    if embedded:
        host, where = embedded_hosts()[0], known.frame.location.iloc[own]
        return np.stack([_in_lung(host, *asked, rng) for asked in zip(masks, where, strict=True)]), scans[own]
    for i, mask in enumerate(masks):
        others = rng.permutation(np.flatnonzero(scans != scans[own[i]]))
        places[i] = next(healthy_places(weight(mask) > 0, others, behind, known.hu, known.mask), own[i])
    return behind[places], scans[places]


def healthy_places(
    touched: np.ndarray, order: Iterable[int], behind: np.ndarray, truth: np.ndarray, masks: np.ndarray
) -> Iterator[int]:
    """Those of the places `behind` that no longer hold their nodule (`truth` in `masks`) and are healthy lung wherever a
    lesion touches them, as `hrldm.nodules.transplant` asks of a host CT."""
    for j in order:
        hu = behind[j][touched]
        healthy = hu.mean() < MAX_MEAN_HU and (hu < VESSEL_HU).mean() >= MIN_LUNG
        if healthy and not np.array_equal(behind[j][masks[j]], truth[j][masks[j]]):
            yield j


def _in_lung(host: Host, mask: np.ndarray, location: str, rng: np.random.Generator) -> np.ndarray:
    """Cube (D, D, D) about a random place at the pleura or away from it, as asked; where none is, the other."""
    for wanted in sorted(LOCATIONS, key=lambda name: name != location):
        try:
            centre, _ = sample_position(host.hu, host.lung_map, mask, rng, wanted)
        except ValueError as error:
            none = error
        else:
            return cube_about(host.hu, centre, len(mask))
    raise none
