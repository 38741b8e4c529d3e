"""Erase lesions from a CT, from disk to disk: a pair of scans with and without them.

The folder of results is like an insertion's (`files`): `ct.nii.gz` (`.nii`, `.mha` or `.nrrd`, as the input) with the input's affine,
header and dtype, `mask.nii.gz` (k where the k-th lesion and its margin were), `record.json`, and for a DICOM input the
derived series in `dicom/`.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
from scipy import ndimage

from hrldm.atomic import new_folder, write_text
from hrldm.ct.dicom_write import ERASED, check_source, write_series
from hrldm.ct.geometry import to_world
from hrldm.ct.label_maps import read_avoided
from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import CT, read_ct, same_suffix, write_ct, write_nifti
from hrldm.insertion.files import check_output
from hrldm.insertion.record import RECORD, head, stamp
from hrldm.nodules.healthy import Patch, erased

logger = logging.getLogger(__name__)


def erase(ct: CT, labels: np.ndarray, mask: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Erase each lesion (connected part) of `mask`; other lesions of the mask are no source.

    Args:
        labels: (X, Y, Z) lungs or lobes, see `lungs.lung_labels`
        mask:   (X, Y, Z) bool
        seed:   of the places drawn

    Returns:
        (X, Y, Z) values that replace the CT's own, same dtype; (X, Y, Z) uint16, k where the k-th lesion and its margin
        were; and a JSON-able dict per lesion.

    Raises:
        ValueError: a lesion that cannot be erased (see `healthy.erased`), with its place.
    """
    parts, n = ndimage.label(mask, np.ones((3, 3, 3)))
    hu, where, records = ct.array, np.zeros(ct.shape, np.uint16), []
    for k, box in enumerate(ndimage.find_objects(parts), start=1):
        lesion = parts == k
        centre = to_world(ct.affine, np.array(ndimage.center_of_mass(lesion[box])) + [s.start for s in box])
        try:
            after, patches = erased(hu, labels, lesion, ct.spacing, seed, mask & ~lesion)
        except ValueError as error:
            place = ", ".join(f"{x:.0f}" for x in centre)
            raise ValueError(f"lesion {k} of {n} at {place} mm cannot be erased: {error}") from error
        where[after != hu] = k
        hu = after
        records.append(
            {
                "centre_ras_mm": centre.round(2).tolist(),
                "volume_mm3": round(float(lesion.sum() * np.prod(ct.spacing)), 1),
                "mean_hu": round(float(ct.array[lesion].mean()), 1),
                "mean_hu_erased": round(float(hu[lesion].mean()), 1),
                "patches": [_described(patch, ct.affine) for patch in patches],
            }
        )
    stored, changed = ct.stored.copy(order="K"), where > 0
    stored[changed] = ct.to_stored(hu[changed])
    return stored, where, records


def _described(patch: Patch, affine: np.ndarray) -> dict:
    """A patch in a record, with RAS mm instead of voxels."""
    places = {name: to_world(affine, getattr(patch, name)).round(2).tolist() for name in ("target", "source")}
    return places | {
        "mirrored_axes": list(patch.mirrored),
        "voxels": patch.voxels,
        "misfit_hu": round(patch.misfit_hu, 1),
        "places_compared": patch.places,
    }


def erase_file(
    path: str | Path,
    out: str | Path,
    mask: str | Path,
    lungs: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    series_uid: str | None = None,
) -> dict:
    """Read a CT, erase what `mask` marks, write the folder `out`; returns the record.

    Args:
        path, lungs, overwrite, series_uid: as for `files.insert_file`
        mask: of one or more lesions, in the world space of the CT, any grid
        seed: of the places drawn

    Raises:
        ValueError: any wrong input, or a lesion that cannot be erased; nothing is written.
        OSError: the results could not be written; nothing is left behind.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    source, target = (Path(os.path.realpath(p)) for p in (path, out))
    if source in (target, *target.parents) or target in source.parents:
        raise ValueError(f"{out}: the CT and its results cannot lie in one another; choose a folder beside {path}")
    with new_folder(out, lambda folder: check_output(folder, overwrite)) as part:
        ct = read_ct(path, series_uid=series_uid)
        derive = ct.provenance.get("format") == "dicom"
        if derive:
            check_source(path, series_uid)
        labels, found = lung_labels(ct, lungs)
        lesions = read_avoided(mask, ct, labels)
        files = {"ct": path, "mask": mask, "lungs": lungs}
        stamps = {name: stamp(Path(file)) for name, file in files.items() if file is not None}
        stored, where, records = erase(ct, labels, lesions, seed)
        record = head(ERASED, ct, stored, found) | {"files": stamps, "seed": seed, "erased": records}
        write_ct(part / f"ct{same_suffix(path)}", stored, ct)
        write_nifti(part / "mask.nii.gz", where, CT(where, ct.affine))
        if derive:
            key = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
            write_series(path, stored, part / "dicom", key, series_uid=series_uid, note=ERASED)
        write_text(part / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record
