"""Fix the patient split once: `python -m scripts.make_split LIDC_CUBES_ROOT` writes hrldm/nodules/lidc_split.csv.

Patients with a cube (few, and the only nodules with full 3D context) are split 60/10/30, stratified by subtype; all other
LIDC patients 70/10/20. LIDC-IDRI-0001 is training: its CT is the embedded dataset. Cubes whose patient is not certain
(`unknown-…`) are training, so that no test patient hides among them under another name on the test side.
"""

import csv
import sys
from pathlib import Path

import numpy as np

SEED = 20261123
TARGET = Path(__file__).parents[1] / "hrldm" / "nodules" / "lidc_split.csv"


def allot(patients: list[str], shares: tuple[float, float, float], rng: np.random.Generator) -> dict[str, str]:
    """Shuffle and cut `patients` into train / val / test by `shares`."""
    order = [patients[i] for i in rng.permutation(len(patients))]
    cuts = np.round(np.cumsum(shares) * len(order)).astype(int)
    names = np.repeat(["train", "val", "test"], np.diff([0, *cuts]))
    return dict(zip(order, names, strict=True))


def main(cubes_root: str) -> None:
    rng = np.random.default_rng(SEED)
    rows = list(csv.DictReader((Path(cubes_root) / "manifest.csv").open()))
    split = {"LIDC-IDRI-0001": "train", "R01-001": "train"}
    split |= {r["patient_id"]: "train" for r in rows if r["patient_id"].startswith("unknown-")}
    for subtype in ("solid", "part-solid", "ground-glass"):
        free = sorted(r["patient_id"] for r in rows if r["subtype"] == subtype and r["patient_id"] not in split)
        split |= allot(free, (0.6, 0.1, 0.3), rng)
    rest = [p for p in (f"LIDC-IDRI-{i:04d}" for i in range(1, 1013)) if p not in split]
    split |= allot(rest, (0.7, 0.1, 0.2), rng)
    with TARGET.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([("patient_id", "split"), *sorted(split.items())])


if __name__ == "__main__":
    main(sys.argv[1])
