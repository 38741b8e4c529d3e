"""Nodule boxes made fit for crops: ``python -m scripts.prepare_vois BOXES OUT`` (`lidc-vois`; any manifest of tight boxes).

A box ends a voxel or two above and below its nodule. A crop that reaches beyond an image repeats the image's edge, and would
draw the nodule out into a rod. So each image is padded by -1000 HU, and its mask by nothing, until a crop fits; what lies
beyond the box is then air in real and synthetic nodules alike. Nodules outside 6 to 30 mm, the paper's range, are left out.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrldm.config import HU_MIN, SIZE_BINS_MM
from hrldm.data.ct import CT, read_ct, write_nifti
from hrldm.data.geometry import shifted, voxel_size
from hrldm.data.manifest import load_manifest, write_manifest
from hrldm.data.nifti import open_nifti, read_voxels

SIDE_MM = 72.0  # 40 mm crops about a nodule off the middle of its box, shifted by 4 mm


def padded(array: np.ndarray, affine: np.ndarray, fill: float) -> CT:
    """`array` (X, Y, Z) in the middle of a grid of at least `SIDE_MM` a side, the rest `fill`; every voxel stays in its place."""
    lacking = np.maximum(0, np.ceil(SIDE_MM / voxel_size(affine)).astype(int) - array.shape)
    before = lacking // 2
    pads = list(zip(before, lacking - before, strict=True))
    return CT(np.pad(array, pads, constant_values=fill), shifted(affine, -before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("boxes", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    frame = load_manifest(args.boxes)
    low, high = SIZE_BINS_MM[0][0], SIZE_BINS_MM[-1][1]
    frame = (
        frame[frame.diameter_mm.between(low, high)].drop(columns="background", errors="ignore").reset_index(drop=True)
    )
    for i, row in tqdm(frame.iterrows(), total=len(frame), desc="boxes", mininterval=10):
        ct = read_ct(row.image, min_slices=1)
        mask = open_nifti(row["mask"])
        images = {
            "image": padded(ct.array, ct.affine, int(HU_MIN)),
            "mask": padded(read_voxels(mask, row["mask"])[0], mask.affine, 0),
        }
        for column, image in images.items():
            file = args.out / f"{column}s" / f"{row.nodule_id}.nii.gz"
            write_nifti(file, image.array, image, overwrite=True)
            frame.loc[i, column] = str(file.resolve())
    write_manifest(frame, args.out / "manifest.csv", overwrite=True)
    print(f"{len(frame)} nodules of {low:g} to {high:g} mm in {args.out}")


if __name__ == "__main__":
    main()
