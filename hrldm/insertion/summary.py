"""What a batch made, in two tables: its nodules as a manifest to train on, and all its scans, negatives among them."""

import json
import logging
import os
from pathlib import Path

import pandas as pd

from hrldm.atomic import atomic
from hrldm.ct.image import NIFTI
from hrldm.insertion.plans import RECORD, SCANS, Case
from hrldm.nodules.manifest import write_manifest

logger = logging.getLogger(__name__)
MANIFEST = "manifest.csv"


def write_summary(out: Path, cases: dict[str, Case], found: dict[str, Path]) -> None:
    """Write `out/manifest.csv`, which `load_manifest` takes, with a row per nodule, and `out/scans.csv` (case, ct, image,
    nodules) with a row per result; the image of a negative is its CT. Nodules in CTs that are no NIfTI files are left out of the
    manifest, which is said; without a nodule there is none.

    A CT's name is its patient, so that the results of one CT fall into one split; name patients with several CTs alike.
    `background` is the CT without its nodules, where that is NIfTI.

    cases: results that are there; found: CTs by name
    """
    if odd := [name for name in cases if not name.isprintable()]:
        logger.warning("%s: left out of the tables, which are UTF-8: %s", out, ", ".join(odd))
    nodules, scans = [], []
    for name, case in ((name, case) for name, case in cases.items() if name not in odd):
        record = json.loads((out / name / RECORD).read_text(encoding="utf-8"))["nodules"] if case.wishes else []
        source = Path(os.path.abspath(found[case.ct]))
        image = next((out / name).glob("ct.*")) if record else source
        scans.append({"case": name, "ct": case.ct, "image": os.path.relpath(image, out), "nodules": len(record)})
        for k, nodule in enumerate(record, start=1):
            wish = nodule["wish"]
            nodules.append(
                {
                    "nodule_id": f"{name}-{k}",
                    "patient_id": case.ct,
                    "image": image,
                    "mask": out / name / ("mask.nii.gz" if len(record) == 1 else f"mask-{k}.nii.gz"),
                    "background": source if source.name.lower().endswith(NIFTI) else "",
                    "subtype": wish["subtype"],
                    "diameter_mm": nodule["diameter_mm"],
                    "volume_mm3": nodule["volume_mm3"],
                    "lobe": nodule["lobe"],
                    "location": wish["location"],
                    **dict(zip(("x_mm", "y_mm", "z_mm"), nodule["centre_ras_mm"], strict=True)),
                    "shape": nodule["shape"],
                    "seed": wish["seed"],
                    "missed": "; ".join(nodule["missed"]),
                }
            )
    if other := [row["nodule_id"] for row in nodules if not row["image"].name.endswith(NIFTI)]:
        logger.warning(
            "%s: without %d nodule(s) whose CT is no NIfTI file; to train on them, write those (format='nifti')",
            out / MANIFEST, len(other),
        )  # fmt: skip
        nodules = [row for row in nodules if row["nodule_id"] not in other]
    if nodules:
        write_manifest(pd.DataFrame(nodules), out / MANIFEST, overwrite=True)
    with atomic(out / SCANS) as part:
        pd.DataFrame(scans, columns=["case", "ct", "image", "nodules"]).to_csv(part, index=False, lineterminator="\n")
