"""Ship the HR-LDM that `make reproduce DATASET=lidc-cubes` trained: `python scripts/ship_unet.py LIDC_CUBES_ROOT [--seed S]`.

Writes hrldm/weights/unet.safetensors (averaged weights, float32; profile, scale and training in the header) and its card
unet.json, whose figures are read from the committed results. Trains the network where it is not there yet.
"""

import argparse
import dataclasses
import json

import pandas as pd

from hrldm import paths
from hrldm.baselines.latent import CHANGES
from hrldm.report.provenance import read_provenance, write_text
from hrldm.synthesis.released import RELEASED_UNET
from hrldm.train import checkpoint as ckpt
from hrldm.train.latents import weights_digest
from hrldm.train.runs import open_study

DATASET, PROFILE = "lidc-cubes", "quick"
ATTRIBUTION = "Trained on LIDC-IDRI (doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0); see NOTICE."
TABLES = {  # of results/lidc-cubes/quick: rows of the card
    "lesion_histograms": ["system", "subtype", "metric", "value", "ci_low", "ci_high", "n"],
    "control_summary": ["system", "subtype", "quantity", "slope", "r2", "n"],
    "triplets_summary": ["system", "side", "value", "ci_low", "ci_high", "n"],
    "separability": ["system", "extractor", "auroc", "n"],
}
SYSTEMS = ("real", "autoencoder", "maisi-ddpm", "hr-ldm", "hr-ldm-matched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    study = open_study(PROFILE, DATASET, args.root, args.seed)
    unet, scale, profile, history = study.unet()
    training = {
        "dataset": DATASET, "data_hash": study.data_hash, "seed": args.seed, "n_train": len(study.split("train")),
        "patients": int(study.split("train").patient_id.nunique()), "pretrained_on": "lidc-mini",
        "pretrain_steps": profile.pretrain_steps, "steps": profile.ldm_steps, "batch": profile.ldm_batch,
    }  # fmt: skip
    meta = {
        "stage": "ldm", "scale": scale, "profile": dataclasses.asdict(dataclasses.replace(profile, **CHANGES["hr-ldm-matched"])),
        "autoencoder": weights_digest(study.autoencoder), "training": training,
    }  # fmt: skip
    ckpt.save(RELEASED_UNET, {"ema": unet.state_dict()}, meta)
    results = paths.results_dir(DATASET, PROFILE)
    card = {
        "what": "HR-LDM, latent inpainting of lung nodules, conditional on mask, subtype and HU histogram; 1 mm, 8 x 4^3 latents",
        "training": training
        | {"losses_last_100": history.tail(100).mean(numeric_only=True).drop("step").round(4).to_dict()},
        "weights_sha256_16": weights_digest(unet),
        "judged_on": f"{len(study.split('test'))} nodules of test patients of {DATASET}, none seen in training",
        "commit_of_results": read_provenance(results)["git"]["commit"],
        "sampling": "DDIM, 25 steps; `hr-ldm-matched`: requested histogram imposed at t <= 300 (the default of `released()`)",
        "results": {name: _rows(results, name, columns) for name, columns in TABLES.items()},
        "attribution": ATTRIBUTION,
        "licence": "CC BY 3.0; research only, not a medical device",
    }
    write_text(RELEASED_UNET.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    print(f"{RELEASED_UNET}: {RELEASED_UNET.stat().st_size / 1e6:.1f} MB")


def _rows(results, name: str, columns: list[str]) -> list[dict]:
    table = pd.read_csv(results / "tables" / f"{name}.csv")
    return json.loads(table[table.system.isin(SYSTEMS)][columns].round(4).to_json(orient="records"))


if __name__ == "__main__":
    main()
