"""Many insertions into one CT, measured: ``python -m scripts.insert_many NAME CT [--lungs MAP] [--n 200] [--rounds-of 10]``.

Writes `results/insert/NAME/`: `insertions.csv` (one row a nodule), `summary.csv` (per subtype: failures, lesion voxels in the
lung, mean HU in the file against the requested one, JSD, the contrast of vessels kept within the lesion, seconds a nodule,
subpleural ones that touch the pleura), `contact_sheet.png` of the first sixty in three planes, `provenance.json` and, for the
embedded CT, `three_subtypes.png`, the README's picture. CT may be `lidc-idri-0001`, the embedded one with its lobes;
``--thicken 2`` averages every two of its slices first.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from scipy import ndimage
from tqdm import tqdm

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.command_line import run
from hrldm.config import SUBTYPES
from hrldm.ct.lungs import lung_labels
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion.insert import insert
from hrldm.insertion.released import released
from hrldm.insertion.wish import Wish
from hrldm.nodules.masks import box_of
from hrldm.nodules.positions import VESSEL_HU
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from study.report import figures
from study.report.provenance import write_provenance
from study.report.tour import around_lesion

EMBEDDED = "lidc-idri-0001"
SHOWN, SHOWN_MM = 60, 40.0
PLANES = ("axial", "coronal", "sagittal")
LEAST_VESSEL = 10  # voxels of vessel in a lesion, from which on its contrast is measured
TISSUE_HU = -500.0  # beyond the lung, at least this is pleura and chest wall
SHOWCASE = [
    Wish("solid", 14.0, seed=1), Wish("part-solid", 18.0, seed=11), Wish("ground-glass", 18.0, seed=21),
]  # fmt: skip


def wishes(n: int, seed: int) -> list[Wish]:
    """Subtypes in turn, log-uniform diameters, a third at the pleura."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(6), np.log(25), n)).round(1)
    return [
        Wish(SUBTYPES[k % 3], float(d), location="subpleural" if k % 9 > 5 else "inner", seed=seed + k)
        for k, d in enumerate(sizes)
    ]


def thickened(ct: CT, slices: int) -> CT:
    """The CT with every `slices` slices along its last axis averaged into one."""
    n = ct.shape[2] // slices
    array = ct.array[:, :, : n * slices].reshape(*ct.shape[:2], n, slices).mean(3)
    step = np.diag([1.0, 1.0, slices, 1.0])
    step[2, 3] = (slices - 1) / 2
    return CT(np.rint(array).astype(np.int16), ct.affine @ step, source=ct.source)


def attached(hu: np.ndarray, labels: np.ndarray, lesion: np.ndarray) -> bool:
    """Whether a lesion touches tissue outside the lungs: within one voxel of each axis."""
    near = ndimage.binary_dilation(lesion, np.ones((3, 3, 3)))
    return bool((near & (labels == 0) & (hu > TISSUE_HU)).any())


def vessel_kept(before: np.ndarray, after: np.ndarray) -> float:
    """Contrast of vessels to the rest of a lesion's voxels (n,) HU with it, relative to that without; NaN for too few."""
    vessel = before > VESSEL_HU
    if vessel.sum() < LEAST_VESSEL or (~vessel).sum() < LEAST_VESSEL:
        return float("nan")
    without, within = (hu[vessel].mean() - np.median(hu[~vessel]) for hu in (before, after))
    return float(within / without)


def main(
    name: tyro.conf.Positional[str],
    ct: tyro.conf.Positional[str],
    lungs: str | None = None,
    n: int = 200,
    rounds_of: int = 10,
    thicken: int = 1,
    seed: int = 0,
) -> None:
    embedded = ct == EMBEDDED
    scan = read_ct(wheel_file(*LIDC_0001_CT) if embedded else ct)
    lungs = wheel_file(*LIDC_0001_LOBES) if embedded else lungs
    if thicken > 1:
        scan = thickened(scan, thicken)
    labels, source = lung_labels(scan, lungs)
    generator, asked = released(), wishes(n, seed)
    rows, panels, began = [], [], time.perf_counter()
    for start in tqdm(range(0, n, rounds_of), desc="rounds", mininterval=10):
        part = asked[start : start + rounds_of]
        begun = time.perf_counter()
        try:
            made = insert(scan, part, generator, labels)
        except ValueError as error:
            rows += [{"subtype": w.subtype, "diameter_mm": w.diameter_mm, "failure": str(error)} for w in part]
            continue
        seconds = (time.perf_counter() - begun) / len(part)
        after = scaled(made.stored, scan.slope, scan.inter)
        for k, (wish, record) in enumerate(zip(part, made.records, strict=True), start=1):
            lesion = made.mask == k
            box = box_of(lesion, 2)
            row = {
                "subtype": wish.subtype,
                "location": wish.location,
                "lobe": record["lobe"],
                "seconds": round(seconds, 2),
                "diameter_mm": record["diameter_mm"],
                "in_lung": float((labels[lesion] > 0).mean()),
                "attached": attached(scan.array[box], labels[box], lesion[box]),
                "vessel_kept": vessel_kept(scan.array[lesion], after[lesion])
                if wish.subtype == "ground-glass"
                else np.nan,
            }
            row |= record["quality"] | record["scan"] | {"psf_mm": " ".join(map(str, record["scan"]["psf_mm"]))}
            rows.append(row | {"missed": "; ".join(record["missed"]), "failure": ""})
            if len(panels) < SHOWN * len(PLANES):
                shown = around_lesion(scan, made, k, SHOWN_MM, f"{wish.subtype}\n{record['diameter_mm']:.0f} mm")[1]
                panels += [
                    replace(shown, plane=plane, label=shown.label if plane == "axial" else "") for plane in PLANES
                ]
    out = paths.ROOT / "results" / "insert" / name
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.round(4).to_csv(out / "insertions.csv", index=False)
    map_name = "TotalSegmentator lobes" if embedded else Path(source).name
    summary = summarised(table).assign(lungs=map_name, threads=torch.get_num_threads())
    summary.round(4).to_csv(out / "summary.csv", index=False)
    title = f"{len(panels) // len(PLANES)} synthetic nodules in {name}, unselected"
    figures.montage(panels, columns=4 * len(PLANES), title=title).savefig(out / "contact_sheet.png", dpi=110)
    wall_time = {"insert_many": round(time.perf_counter() - began, 1)}
    write_provenance(out, generator.config, name, seed, wall_time_s=wall_time)
    print(summary.round(3).to_string(index=False))
    if embedded and thicken == 1:
        made = insert(scan, SHOWCASE, generator, labels)
        labelled = [(k, f"{w.subtype}, {w.diameter_mm:g} mm") for k, w in enumerate(SHOWCASE, start=1)]
        before, after = zip(*(around_lesion(scan, made, k, 2 * SHOWN_MM, text) for k, text in labelled), strict=True)
        shown = figures.montage([*before, *after], columns=3, title=f"{name}, before (above) and after")
        shown.savefig(out / "three_subtypes.png", dpi=110)


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """One row per subtype and for all; errors of the mean are in HU, the others as the module's docstring names them."""
    rows = []
    for subtype, part in [("all", table), *table.groupby("subtype", sort=False)]:
        good = part[part.failure == ""]
        held, kept = good[good.holds_histogram.astype(bool)], good.vessel_kept.dropna()
        pleural = good[good.location == "subpleural"].attached.astype(float)
        rows.append(
            {
                "subtype": subtype, "n": len(part), "failures": len(part) - len(good),
                "least_share_in_lung": good.in_lung.min(), "missed_wish": int((good.missed != "").sum()),
                "n_held": len(held), "largest_error_hu": held.mean_error_hu.max(), "median_jsd": held.jsd.median(),
                "vessel_kept": kept.mean(), "n_on_vessels": len(kept), "attached": pleural.mean(), "n_subpleural": len(pleural),
                "seconds_each": good.seconds.mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(run(main, "python -m scripts.insert_many", __doc__.splitlines()[0]))
