"""How strong real lesions' grain is beside that of their surroundings: ``python -m scripts.measure_grain LIDC_CUBES_ROOT``.

Training nodules with at least 100 voxels 2 mm below the surface: standard deviation of r = x - D(E(x)) in there, over
percentiles of r's local standard deviation around the lesion. Writes `results/lidc-cubes/grain/tables/strength.csv`, on which
`QUANTILE` in hrldm/insertion/grain.py was chosen.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import ndimage

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.insertion.generator import reconstruct
from hrldm.insertion.grain import local_sd, residual_of
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.patches import load_patches, manifest_digest
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from study.profiles import get_profile
from study.report.provenance import write_provenance
from study.report.tables import save_table

PERCENTILES, DEPTH, LEAST = (5, 10, 25, 50, 75), 2, 100
OUT = paths.ROOT / "results" / "lidc-cubes" / "grain"


def main(root: tyro.conf.Positional[Path]) -> None:
    frame = load_manifest(root)
    profile = get_profile("quick")
    nodules = load_patches(frame[frame.split == "train"], profile.data.patch_mm)
    plain = reconstruct(load_autoencoder(SHIPPED_AUTOENCODER).eval(), nodules.hu)
    rows = []
    for row, hu, seen, mask in zip(nodules.frame.itertuples(), nodules.hu, plain, nodules.mask, strict=True):
        middle = ndimage.binary_erosion(mask, iterations=DEPTH)
        if middle.sum() >= LEAST:
            residual, around = residual_of(hu, seen, mask)
            ratios = residual[middle].std() / np.percentile(local_sd(residual, around), PERCENTILES)
            rows += [(row.nodule_id, row.subtype, p, ratio) for p, ratio in zip(PERCENTILES, ratios, strict=True)]
    table = pd.DataFrame(rows, columns=["nodule_id", "subtype", "percentile", "ratio"])
    save_table(table, OUT, "strength")
    write_provenance(OUT, profile, "lidc-cubes", 0, manifest_digest(frame))
    medians = table.pivot_table(index="percentile", columns="subtype", values="ratio", aggfunc="median", margins=True)
    print(f"{table.nodule_id.nunique()} nodules; median ratio\n{medians.round(2)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.splitlines()[0])
