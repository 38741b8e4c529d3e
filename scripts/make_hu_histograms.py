"""Measure `hrldm/data/hu_histograms.csv` and `texture_statistics.csv` on real nodules (development only).

    python scripts/make_hu_histograms.py path/to/lidc-vois

Only nodules of training patients (hrldm.data.split), 6-30 mm. Two files of plain numbers come out:

hu_histograms.csv: one row a nodule, its HU histogram (40 bins, -1000..400 HU, values beyond fall in the edge bins) in
counts per 10,000, over every voxel of the mask at native spacing: no erosion, so the partial-volume edge is part of it
as it is part of the mask, and each voxel counts once (a nodule's voxels have one volume).

texture_statistics.csv, in normal scores (the ranks of a nodule's voxels mapped to a standard normal, so that the
histogram plays no part), by subtype and size bin:
  depth  mean score at a depth below the mask surface, mm
  acf    autocorrelation of score minus depth mean at an in-plane lag, mm
  residual_sd  standard deviation of score minus depth mean
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage, stats

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM, SUBTYPES
from hrldm.data.split import patient_split

OUT = Path(__file__).resolve().parents[1] / "hrldm" / "data"
BINS = 40
DEPTH_EDGES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15.0])
LAG_EDGES = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 4.5, 6, 8, 10.0])
SOURCE = (
    "# Real nodules of LIDC-IDRI, training patients only; made by scripts/make_hu_histograms.py, no pixel data.\n"
    "# LIDC-IDRI: Armato III SG et al. (2015) Data From LIDC-IDRI, TCIA, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0;\n"
    "# Armato et al., Med Phys 38:915-931, 2011; Clark et al., J Digit Imaging 26:1045-1057, 2013. The authors acknowledge\n"
    "# the National Cancer Institute and the Foundation for the National Institutes of Health, and their critical role in\n"
    "# the creation of the free publicly available LIDC/IDRI Database. Boxes: PabloLION/ct-slicing (CVC/UAB).\n"
)


def scores_and_depth(hu: np.ndarray, mask: np.ndarray, spacing: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores of the masked voxels and their depth (mm) below the surface, both (n,)."""
    inside = ndimage.distance_transform_edt(np.pad(mask, 1), spacing)[1:-1, 1:-1, 1:-1][mask]
    ranks = stats.rankdata(hu[mask])
    return stats.norm.ppf((ranks - 0.5) / ranks.size), np.maximum(inside - 0.5 * min(spacing), 0)


def main(root: Path) -> None:
    table = pd.read_csv(root / "manifest.csv")
    table = table[table.diameter_mm.between(SIZE_BINS_MM[0][0], SIZE_BINS_MM[-1][1])]
    table = table[table.patient_id.map(patient_split) == "train"]
    lesions, histograms = [], []
    for row in table.itertuples():
        image = nib.load(root / row.image)
        hu, mask = np.asarray(image.dataobj), np.asarray(nib.load(root / row.mask).dataobj) > 0
        spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
        values = np.clip(hu[mask], HIST_HU_MIN, HIST_HU_MAX)
        counts = np.histogram(values, bins=BINS, range=(HIST_HU_MIN, HIST_HU_MAX))[0]
        size = next(i for i, (lo, hi) in enumerate(SIZE_BINS_MM) if row.diameter_mm <= hi)
        histograms.append(
            {"nodule_id": row.nodule_id, "patient_id": row.patient_id, "subtype": row.subtype, "size_bin": size}
            | {"diameter_mm": row.diameter_mm, "mean_hu": round(float(hu[mask].mean()), 1)}
            | {"sd_hu": round(float(hu[mask].std()), 1)}
            | {f"b{i:02d}": int(c) for i, c in enumerate(np.round(counts / counts.sum() * 10_000))}
        )
        lesions.append((row.subtype, size, mask, spacing, *scores_and_depth(hu, mask, spacing)))
    rows = []
    for subtype in SUBTYPES:
        for size in range(len(SIZE_BINS_MM)):
            group = [x[2:] for x in lesions if x[0] == subtype and x[1] == size]
            rows += [{"subtype": subtype, "size_bin": size, "nodules": len(group)} | r for r in statistics_of(group)]
    for name, frame in (
        ("hu_histograms.csv", pd.DataFrame(histograms)),
        ("texture_statistics.csv", pd.DataFrame(rows)),
    ):
        with (OUT / name).open("w") as f:
            f.write(SOURCE + f"# {len(histograms)} nodules. Definitions: module docstring of the script.\n")
            frame.to_csv(f, index=False, lineterminator="\n")
        print(OUT / name, len(frame), "rows")


def statistics_of(group: list[tuple]) -> list[dict]:
    """Depth profile, residual spread and in-plane autocorrelation of a group of nodules (each nodule weighs the same)."""
    n_bins = len(DEPTH_EDGES) - 1
    sums, weights = np.zeros(n_bins), np.zeros(n_bins)
    for _, _, score, depth in group:
        which = np.clip(np.digitize(depth, DEPTH_EDGES) - 1, 0, n_bins - 1)
        np.add.at(sums, which, score / score.size)
        np.add.at(weights, which, 1 / score.size)
    profile = np.divide(sums, weights, out=np.full(n_bins, np.nan), where=weights > 0)
    centres = (DEPTH_EDGES[1:] + DEPTH_EDGES[:-1]) / 2
    known = ~np.isnan(profile)
    products, pairs, lags = np.zeros((3, len(LAG_EDGES) - 1))
    variance = 0.0
    for mask, spacing, score, depth in group:
        residual = np.zeros(mask.shape)
        residual[mask] = score - np.interp(depth, centres[known], profile[known])
        spread = float(residual[mask].std())
        variance += spread**2 / len(group)
        residual[mask] = (residual[mask] - residual[mask].mean()) / spread
        for axis in (0, 1):
            for k in range(int(LAG_EDGES[-1] / spacing[axis]) + 1):
                if k >= mask.shape[axis]:
                    break
                first = np.take(residual, range(mask.shape[axis] - k), axis)
                second = np.take(residual, range(k, mask.shape[axis]), axis)
                both = np.take(mask, range(mask.shape[axis] - k), axis) & np.take(
                    mask, range(k, mask.shape[axis]), axis
                )
                b = np.digitize(k * spacing[axis], LAG_EDGES) - 1
                if b < len(products) and both.any():
                    products[b] += (first * second)[both].sum() / mask.sum()
                    pairs[b] += both.sum() / mask.sum()
                    lags[b] += k * spacing[axis] * both.sum() / mask.sum()
    enough = pairs > 0.05 * len(group)
    acf, lags = (np.divide(v, pairs, out=np.full(len(pairs), np.nan), where=enough) for v in (products, lags))
    out = [{"statistic": "residual_sd", "x_mm": 0.0, "value": round(variance**0.5, 4)}]
    out += [{"statistic": "depth", "x_mm": x, "value": round(v, 4)} for x, v in zip(centres, profile) if v == v]
    return out + [{"statistic": "acf", "x_mm": round(x, 3), "value": round(v, 4)} for x, v in zip(lags, acf) if v == v]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
