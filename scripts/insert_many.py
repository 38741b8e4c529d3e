"""Many insertions into one CT, measured: ``python -m scripts.insert_many NAME CT [--lungs MAP] [--n 200] [--rounds-of 10]``.

Writes `results/insert/NAME/`: `insertions.csv` (one row a nodule), `summary.csv` (failures, lesion voxels in the lung, requested
against obtained mean HU with slope and R2, per subtype, seconds a nodule), `contact_sheet.png` of the first hundred,
`provenance.json` and, for the embedded CT, `three_subtypes.png`, the README's picture.
CT may be `lidc-idri-0001`, the embedded one with its lobes.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from tqdm import tqdm

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.config import SUBTYPES
from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import read_ct
from hrldm.insertion.insert import insert
from hrldm.insertion.released import released
from hrldm.insertion.wish import Wish
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from study.measure.statistics import least_squares
from study.report import figures
from study.report.provenance import write_provenance
from study.report.tour import around_lesion

EMBEDDED = "lidc-idri-0001"
SHOWN, SHOWN_MM = 100, 40.0
SHOWCASE = [
    Wish("solid", 14.0, seed=1), Wish("part-solid", 18.0, core_mm=8.0, seed=11), Wish("ground-glass", 18.0, seed=21),
]  # fmt: skip


def wishes(n: int, seed: int) -> list[Wish]:
    """Subtypes in turn, log-uniform diameters, a third at the pleura."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(6), np.log(25), n)).round(1)
    return [
        Wish(SUBTYPES[k % 3], float(d), location="subpleural" if k % 9 > 5 else "inner", seed=seed + k)
        for k, d in enumerate(sizes)
    ]


def main(
    name: tyro.conf.Positional[str],
    ct: tyro.conf.Positional[str],
    lungs: str | None = None,
    n: int = 200,
    rounds_of: int = 10,
    seed: int = 0,
) -> None:
    embedded = ct == EMBEDDED
    scan = read_ct(wheel_file(*LIDC_0001_CT) if embedded else ct)
    lungs = wheel_file(*LIDC_0001_LOBES) if embedded else lungs
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
        for k, (wish, record) in enumerate(zip(part, made.records, strict=True), start=1):
            row = {
                "subtype": wish.subtype,
                "location": wish.location,
                "lobe": record["lobe"],
                "seconds": round(seconds, 2),
            }
            row |= {"diameter_mm": record["diameter_mm"], "in_lung": float((labels[made.mask == k] > 0).mean())}
            row |= record["quality"] | {"times_made": record["times_made"], "missed": "; ".join(record["missed"])}
            rows.append(row | {"failure": ""})
            if len(panels) < SHOWN:
                label = f"{wish.subtype}\n{record['diameter_mm']:.0f} mm"
                panels.append(around_lesion(scan, made, k, SHOWN_MM, label)[1])
    out = paths.ROOT / "results" / "insert" / name
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.round(4).to_csv(out / "insertions.csv", index=False)
    map_name = "TotalSegmentator lobes" if embedded else Path(source).name
    summary = summarised(table).assign(lungs=map_name, threads=torch.get_num_threads())
    summary.round(4).to_csv(out / "summary.csv", index=False)
    title = f"{len(panels)} synthetic nodules in {name}, unselected"
    figures.montage(panels, columns=10, title=title).savefig(out / "contact_sheet.png", dpi=110)
    wall_time = {"insert_many": round(time.perf_counter() - began, 1)}
    write_provenance(out, generator.config, name, seed, wall_time_s=wall_time)
    print(summary.round(3).to_string(index=False))
    if embedded:
        made = insert(scan, SHOWCASE, generator, labels)
        labelled = [(k, f"{w.subtype}, {w.diameter_mm:g} mm") for k, w in enumerate(SHOWCASE, start=1)]
        before, after = zip(*(around_lesion(scan, made, k, 2 * SHOWN_MM, text) for k, text in labelled), strict=True)
        shown = figures.montage([*before, *after], columns=3, title=f"{name}, before (above) and after")
        shown.savefig(out / "three_subtypes.png", dpi=110)


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """One row per subtype and for all: n, failures, least share in the lung, control of the mean, seconds a nodule."""
    rows = []
    for subtype, part in [("all", table), *table.groupby("subtype", sort=False)]:
        good = part[part.failure == ""]
        slope, _, r2 = least_squares(good.requested_mean_hu.to_numpy(), good.obtained_mean_hu.to_numpy())
        missed = int((good.missed != "").sum())
        found = (good.in_lung.min(), slope, r2, good.jsd.median(), missed, good.seconds.mean())
        rows.append((subtype, len(part), len(part) - len(good), *found))
    columns = "subtype n failures least_share_in_lung slope r2 median_jsd missed_wish seconds_each"
    return pd.DataFrame(rows, columns=columns.split())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.splitlines()[0])
