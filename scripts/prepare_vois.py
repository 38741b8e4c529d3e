"""Nodule boxes made fit for crops: ``python -m scripts.prepare_vois BOXES OUT`` (`lidc-vois`; any manifest of tight boxes).

A box ends a voxel or two above and below its nodule. A crop that reaches beyond an image repeats the image's edge, and would
draw the nodule out into a rod. So each image is padded by -1000 HU, and its mask by nothing, until a crop fits; what lies
beyond the box is then air in real and synthetic nodules alike. Nodules outside 6 to 30 mm, the paper's range, are left out.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrldm.atomic import new_folder
from hrldm.config import HU_MIN, SIZE_BINS_MM
from hrldm.ct.geometry import shifted, voxel_size
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import CT, read_ct, write_nifti
from hrldm.nodules.manifest import file_name, load_manifest, write_manifest

LOW, HIGH = SIZE_BINS_MM[0][0], SIZE_BINS_MM[-1][1]  # mm, the paper's range
SIDE_MM = 72.0  # 40 mm crops about a nodule off the middle of its box, shifted by 4 mm


def padded(array: np.ndarray, affine: np.ndarray, fill: float) -> CT:
    """`array` (X, Y, Z) in the middle of a grid of at least `SIDE_MM` a side, the rest `fill`; every voxel stays in its place."""
    lacking = np.maximum(0, np.ceil(SIDE_MM / voxel_size(affine)).astype(int) - array.shape)
    before = lacking // 2
    pads = list(zip(before, lacking - before, strict=True))
    return CT(np.pad(array, pads, constant_values=fill), shifted(affine, -before))


def prepare(boxes: Path, out: Path) -> int:
    """Write the manifest folder `out`; returns the number of nodules.

    Raises:
        ValueError: a manifest that does not validate, no nodule of that size, or `out` exists and is not empty.
    """

    def fresh(folder: Path) -> None:
        if os.path.lexists(folder) and not (folder.is_dir() and not os.listdir(folder)):
            raise ValueError(f"{folder}: exists already; choose another folder")

    fresh(out)
    frame = load_manifest(boxes).drop(columns="background", errors="ignore")
    frame = frame[frame.diameter_mm.between(LOW, HIGH)].reset_index(drop=True)
    if frame.empty:
        raise ValueError(f"{boxes}: no nodule of {LOW:g} to {HIGH:g} mm")
    with new_folder(out, fresh) as part:
        for i, row in tqdm(frame.iterrows(), total=len(frame), desc="boxes", mininterval=10):
            ct, mask = read_ct(row.image, min_slices=1), open_nifti(row["mask"])
            lesion = padded(read_voxels(mask, row["mask"])[0], mask.affine, 0)
            for column, image in (("image", padded(ct.array, ct.affine, int(HU_MIN))), ("mask", lesion)):
                file = part / f"{column}s" / f"{file_name(row.nodule_id)}.nii.gz"
                write_nifti(file, image.array, image)
                frame.loc[i, column] = str(file.resolve())
        write_manifest(frame, part / "manifest.csv")
    return len(frame)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("boxes", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        n = prepare(args.boxes, args.out.resolve())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{n} nodules of {LOW:g} to {HIGH:g} mm in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
