"""Measure `hrldm/nodules/hu_histograms.csv` and `texture_statistics.csv` on real nodules (development only).

    python -m scripts.make_hu_histograms path/to/lidc-vois path/to/lidc-cubes

Only nodules of training patients (hrldm.nodules.split), 6-30 mm. The first folder has the nodules at native spacing; a
later one adds those of patients without any before, and `UNBOXED`, so that no nodule is in twice. Nodules whose patient
is not certain (unknown-...) stay out: it may be a test patient. Two files of plain numbers come out:

hu_histograms.csv: one row a nodule, its HU histogram (40 bins, -1000..400 HU, values beyond fall in the edge bins) in
counts per 10,000, over every voxel of the mask: no erosion, so the partial-volume edge is part of it as it is part of
the mask, and each voxel counts once (a nodule's voxels have one volume). Readers' ratings of texture and the HU
disagree at times; a row stays if they agree (`disagreement`, on the row's own histogram):
  all           at most 2 % above 365 HU: calcium or metal, for soft tissue with contrast agent ends at about 300
  ground-glass  at most 15 % above -300 HU: vessels, no core (the data have a gap from 13 to 17 %)
  part-solid    15 to 70 % above -300 HU: a core, and a rim about it
  solid         above -300 HU at least 20 %, and at least what a ball has below its outer 2 mm (one voxel of partial
                volume, one of generous outline): 22 % at 10 mm, 51 % at 20 mm, 65 % at 30 mm
  part-solid, solid  at least 5 % above -160 HU: the core of a small one shows its soft tissue, too
Of each subtype and size bin at most `MOST` stay, chosen one by one, each the farthest from those before in (mean, SD).

texture_statistics.csv, of the first folder, medians by subtype and size bin over nodules with at least 30 voxels of
core (1.5 mm or more below the surface), whatever their rating, HU clipped to -1000..400, resampled to 1 mm in plane.
Spreads are robust, for a few edge or cavity voxels must not pass for texture:
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
from hrldm.nodules.histograms import SOLID_HU, bin_centres, hu_histogram, size_bin
from hrldm.nodules.split import patient_split

OUT = Path(__file__).resolve().parents[1] / "hrldm" / "nodules"
BINS = 40
MOST = 60  # rows of one subtype and size bin
# cubes of nodules that no box of their patient shows: at no shift do their voxels correlate by more than 0.4 with one;
# those of the other training cubes do by 0.84 or more (81_nod5_ann0: 0.73, taken for the same nodule)
UNBOXED = ("47_nod3_ann0", "80_nod2_ann0", "629_nod1_ann0")
CALCIUM_HU, CALCIUM_MOST = 365, 0.02
GLASS_MOST = 0.15  # largest share of a ground-glass nodule above SOLID_HU
PART_LEAST, PART_MOST = 0.15, 0.70
SOLID_LEAST, RIM_MM = 0.20, 2.0
CORE_HU, CORE_LEAST = -160, 0.05
CORE_MM = 1.5
GRAIN_MM = (1, 2, 4)
SOURCE = (
    "# Real nodules of LIDC-IDRI, training patients only; made by scripts/make_hu_histograms.py, no pixel data.\n"
    "# LIDC-IDRI: Armato III SG et al. (2015) Data From LIDC-IDRI, TCIA, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0;\n"
    "# Armato et al., Med Phys 38:915-931, 2011; Clark et al., J Digit Imaging 26:1045-1057, 2013. The authors acknowledge\n"
    "# the National Cancer Institute and the Foundation for the National Institutes of Health, and their critical role in\n"
    "# the creation of the free publicly available LIDC/IDRI Database. Boxes: PabloLION/ct-slicing (CVC/UAB).\n"
)
CUBES = "# Cubes at 1 mm, of nodules without a box: franciscapessanha/Pulmonary-nodules-analysis.\n"


def disagreement(subtype: str, diameter_mm: float, histogram: np.ndarray) -> str:
    """Why a histogram (40,) of sum 1 is not what its nodule is rated as; empty if it is."""

    def above(hu: float) -> float:
        return float(histogram[bin_centres(BINS) > hu].sum())

    least, most = {
        "ground-glass": (0.0, GLASS_MOST),
        "part-solid": (PART_LEAST, PART_MOST),
        "solid": (max(SOLID_LEAST, (1 - 2 * RIM_MM / diameter_mm) ** 3), 1.0),
    }[subtype]
    if above(CALCIUM_HU) > CALCIUM_MOST:
        return "calcium"
    if not least <= above(SOLID_HU) <= most:
        return "too little solid tissue" if above(SOLID_HU) < least else "too much solid tissue"
    if subtype != "ground-glass" and above(CORE_HU) < CORE_LEAST:
        return "no core"
    return ""


def spread(cell: pd.DataFrame) -> pd.DataFrame:
    """At most `MOST` rows, from the one nearest to the medians on, each the farthest from those before in (mean, SD)."""
    points = cell[["mean_hu", "sd_hu"]].to_numpy()
    chosen = [int(np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin())]
    while len(chosen) < min(MOST, len(cell)):
        gaps = np.linalg.norm(points[:, None] - points[chosen], axis=2).min(1)
        gaps[chosen] = -1  # a row like another is not that row
        chosen.append(int(gaps.argmax()))
    return cell.iloc[sorted(chosen)]


def nodules(roots: list[Path]) -> pd.DataFrame:
    """The manifests' training nodules of 6-30 mm, each once, with the folder they lie in (`root`)."""
    tables = []
    for root in roots:
        table = pd.read_csv(root / "manifest.csv").assign(root=root)
        known = {patient for earlier in tables for patient in earlier.patient_id}
        tables.append(table[~table.patient_id.isin(known) | table.nodule_id.isin(UNBOXED)])
    table = pd.concat(tables, ignore_index=True)
    table = table[table.diameter_mm.between(SIZE_BINS_MM[0][0], SIZE_BINS_MM[-1][1])]
    table = table[~table.patient_id.str.startswith("unknown-")]
    return table[table.patient_id.map(patient_split) == "train"]


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


def main(roots: list[Path]) -> None:
    table = nodules(roots)
    histograms, textures = [], []
    for row in table.itertuples():
        image = nib.load(row.root / row.image)
        hu, mask = np.asarray(image.dataobj).astype(float), np.asarray(nib.load(row.root / row.mask).dataobj) > 0
        label = {"subtype": row.subtype, "size_bin": size_bin(row.diameter_mm)}
        known = {"nodule_id": row.nodule_id, "patient_id": row.patient_id} | label | {"diameter_mm": row.diameter_mm}
        known |= {"mean_hu": round(float(hu[mask].mean()), 1), "sd_hu": round(float(hu[mask].std()), 1)}
        counts = np.round(hu_histogram(hu[mask], BINS) * 10_000)
        known["why"] = disagreement(row.subtype, row.diameter_mm, counts / counts.sum())
        histograms.append(known | {f"b{i:02d}": int(c) for i, c in enumerate(counts)})
        if row.root == roots[0]:
            clipped = np.clip(hu, HIST_HU_MIN, HIST_HU_MAX)
            if (found := texture_of(clipped, mask, np.array(image.header.get_zooms()[:3], float))) is not None:
                textures.append(label | found)
    cells = pd.DataFrame(textures).groupby(["subtype", "size_bin"])
    summary = cells.median().round(1)
    summary.insert(0, "nodules", cells.size())
    measured = pd.DataFrame(histograms)
    agreeing = measured[measured.why == ""].drop(columns="why")
    thinned = pd.concat(spread(cell) for _, cell in agreeing.groupby(["subtype", "size_bin"])).sort_index()
    kept = measured.nodule_id.isin(thinned.nodule_id)
    measured["why"] = measured.why.replace("", "thinned out").mask(kept, "kept")
    print(pd.crosstab([measured.subtype, measured.size_bin], measured.why, margins=True).to_string())
    for name, frame, said in (
        ("hu_histograms.csv", thinned, f"{CUBES}# {len(thinned)} of {len(measured)} nodules."),
        ("texture_statistics.csv", summary.reset_index(), f"# {(table.root == roots[0]).sum()} nodules."),
    ):
        with (OUT / name).open("w") as f:
            f.write(f"{SOURCE}{said} Definitions: docstring of the script.\n")
            frame.to_csv(f, index=False, lineterminator="\n")
        print(OUT / name, len(frame), "rows")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(root) for root in sys.argv[1:]])
