"""Judge the shipped autoencoder on real nodules of unseen patients: `python -m scripts.judge_autoencoder LIDC_CUBES_ROOT`.

Writes its card, hrldm/weights/autoencoder.json: middle 48 mm of the test patients' cubes, beside the linear code of equal size fitted on the training patients' cubes.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.atomic import write_text
from hrldm.insertion.generator import reconstruct
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.patches import load_patches
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from hrldm.train.latents import weights_digest
from study.measure.reconstruction import autoencoder_table, linear_code, linear_reconstruction, nodule_scores

SIZE, N_BOOT, SEED = 48, 1000, 0
ATTRIBUTION = (
    "Trained on LIDC-IDRI (doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0) and NSCLC Radiogenomics "
    "(doi:10.7937/K9/TCIA.2017.7hs46erv, CC BY 3.0); see NOTICE."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    frame = load_manifest(parser.parse_args().root)
    train, test = (load_patches(frame[frame.split == split], SIZE) for split in ("train", "test"))
    model = load_autoencoder(SHIPPED_AUTOENCODER).eval()
    code = linear_code(train.hu, model.latent_channels)
    made = {"autoencoder": reconstruct(model, test.hu), "linear code": linear_reconstruction(code, test.hu)}
    scores = {name: nodule_scores(hu, test) for name, hu in made.items()}
    table = autoencoder_table(scores, N_BOOT, SEED)
    by_subtype = {
        s: autoencoder_table({"autoencoder": scores["autoencoder"].query("nodule_id in @ids")}, N_BOOT, SEED)
        for s, ids in test.frame.groupby("subtype")["nodule_id"].agg(list).items()
    }
    lesions = pd.concat([t[t.region == "lesion"].assign(region=f"lesion, {s}") for s, t in by_subtype.items()])
    table = pd.concat([table, lesions], ignore_index=True)
    meta = ckpt.load_meta(SHIPPED_AUTOENCODER)
    card = {
        "what": "compact MAISI-style VAE on an overlapping linear code, 4x compression, CT at 1 mm, -1000..1000 HU",
        "training": {k: meta[k] for k in ("step", "seed", "architecture")},
        "weights_sha256_16": weights_digest(model),
        "judged_on": f"lidc-cubes, middle {SIZE} mm of {len(test)} cubes of test patients, none seen in training",
        "results": json.loads(table.round(4).to_json(orient="records")),
        "attribution": ATTRIBUTION,
        "licence": "CC BY 3.0; research only, not a medical device",
    }
    write_text(paths.WEIGHTS / "autoencoder.json", json.dumps(card, indent=1) + "\n")
    print(table[table.metric != "ssim"].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
