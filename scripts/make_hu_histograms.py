"""Measure `hrldm/nodules/hu_histograms.csv` and `texture_statistics.csv` on real nodules (development only).

    python -m scripts.make_hu_histograms path/to/lidc-vois

Only nodules of training patients (hrldm.nodules.split), 6-30 mm. Two files of plain numbers come out:

hu_histograms.csv: one row a nodule, its HU histogram (40 bins, -1000..400 HU, values beyond fall in the edge bins) in
counts per 10,000, over every voxel of the mask at native spacing: no erosion, so the partial-volume edge is part of it
as it is part of the mask, and each voxel counts once (a nodule's voxels have one volume).

texture_statistics.csv, medians by subtype and size bin over nodules with at least 30 voxels of core (1.5 mm or more
below the surface), HU clipped to -1000..400, resampled to 1 mm in plane. Spreads are robust, for a few edge or cavity
voxels must not pass for texture:
  core_sd  the smaller of (q90 - q50) and (q50 - q10) of the core, / 1.2816, HU
  grain_1, grain_2, grain_4  1.4826 MAD of the core minus its in-plane Gaussian mean (sigma 1, 2, 4 mm), HU
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage, stats

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM
from hrldm.nodules.histograms import hu_histogram, size_bin
from hrldm.nodules.split import patient_split

OUT = Path(__file__).resolve().parents[1] / "hrldm" / "nodules"
BINS = 40
CORE_MM = 1.5
GRAIN_MM = (1, 2, 4)
SOURCE = (
    "# Real nodules of LIDC-IDRI, training patients only; made by scripts/make_hu_histograms.py, no pixel data.\n"
    "# LIDC-IDRI: Armato III SG et al. (2015) Data From LIDC-IDRI, TCIA, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0;\n"
    "# Armato et al., Med Phys 38:915-931, 2011; Clark et al., J Digit Imaging 26:1045-1057, 2013. The authors acknowledge\n"
    "# the National Cancer Institute and the Foundation for the National Institutes of Health, and their critical role in\n"
    "# the creation of the free publicly available LIDC/IDRI Database. Boxes: PabloLION/ct-slicing (CVC/UAB).\n"
)


def texture_of(hu: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> dict[str, float] | None:
    """Core spread and grain of one nodule; None when its core is too small."""
    hu, soft = (ndimage.zoom(x, (spacing[0], spacing[1], 1), order=1) for x in (hu, mask.astype(float)))
    mask, spacing = soft > 0.5, np.array([1, 1, spacing[2]])
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), spacing)[1:-1, 1:-1, 1:-1] - 0.5
    core = mask & (depth >= CORE_MM)
    if core.sum() < 30:
        return None
    low, middle, high = np.percentile(hu[core], [10, 50, 90])
    out = {"core_sd": min(high - middle, middle - low) / 1.2816}
    for sigma in GRAIN_MM:
        weight = ndimage.gaussian_filter(core.astype(float), (sigma, sigma, 0))
        mean = ndimage.gaussian_filter(np.where(core, hu, 0.0), (sigma, sigma, 0)) / np.maximum(weight, 1e-6)
        out[f"grain_{sigma}"] = 1.4826 * stats.median_abs_deviation((hu - mean)[core])
    return out


def main(root: Path) -> None:
    table = pd.read_csv(root / "manifest.csv")
    table = table[table.diameter_mm.between(SIZE_BINS_MM[0][0], SIZE_BINS_MM[-1][1])]
    table = table[table.patient_id.map(patient_split) == "train"]
    histograms, textures = [], []
    for row in table.itertuples():
        image = nib.load(root / row.image)
        hu, mask = np.asarray(image.dataobj).astype(float), np.asarray(nib.load(root / row.mask).dataobj) > 0
        clipped = np.clip(hu, HIST_HU_MIN, HIST_HU_MAX)
        label = {"subtype": row.subtype, "size_bin": size_bin(row.diameter_mm)}
        known = {"nodule_id": row.nodule_id, "patient_id": row.patient_id} | label | {"diameter_mm": row.diameter_mm}
        known |= {"mean_hu": round(float(hu[mask].mean()), 1), "sd_hu": round(float(hu[mask].std()), 1)}
        counts = np.round(hu_histogram(hu[mask], BINS) * 10_000)
        histograms.append(known | {f"b{i:02d}": int(c) for i, c in enumerate(counts)})
        if (found := texture_of(clipped, mask, np.array(image.header.get_zooms()[:3], float))) is not None:
            textures.append(label | found)
    cells = pd.DataFrame(textures).groupby(["subtype", "size_bin"])
    summary = cells.median().round(1)
    summary.insert(0, "nodules", cells.size())
    tables = {"hu_histograms.csv": pd.DataFrame(histograms), "texture_statistics.csv": summary.reset_index()}
    for name, frame in tables.items():
        with (OUT / name).open("w") as f:
            f.write(SOURCE + f"# {len(histograms)} nodules. Definitions: docstring of the script.\n")
            frame.to_csv(f, index=False, lineterminator="\n")
        print(OUT / name, len(frame), "rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
