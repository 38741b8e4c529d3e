"""Judge the shipped autoencoder on real nodules of unseen patients: `python -m scripts.judge_autoencoder LIDC_CUBES_ROOT`.

`--ship CHECKPOINT` first writes hrldm/weights/autoencoder.safetensors: only the averaged weights, in float32, with the
architecture and the provenance of the training in the header. Where the decoder alone was trained, the shipped U-Net stays
right, and its header is told the new autoencoder's hash.

Writes its card, hrldm/weights/autoencoder.json: middle 48 mm of the test patients' cubes, beside the linear code of equal size
fitted on the training patients' cubes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.atomic import write_text
from hrldm.command_line import run
from hrldm.insertion.generator import decoded_hu, reconstruct
from hrldm.insertion.released import RELEASED_UNET
from hrldm.model.autoencoder import Autoencoder
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.patches import Patches, load_patches
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from hrldm.train.latents import encode_patches, weights_digest
from study.judging import LEAST_PATIENTS
from study.measure.reconstruction import autoencoder_table, linear_code, linear_reconstruction, nodule_scores

SIZE, MORE, N_BOOT, SEED = 48, 8, 1000, 0  # mm, mm on each side
ATTRIBUTION = (
    "Trained on LIDC-IDRI (doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0) and NSCLC Radiogenomics "
    "(doi:10.7937/K9/TCIA.2017.7hs46erv, CC BY 3.0); see NOTICE."
)


def shipped(checkpoint: Path) -> None:
    groups, meta = ckpt.load(checkpoint)
    ckpt.save(SHIPPED_AUTOENCODER, {"ema": groups["ema"]}, meta)
    unet, header = ckpt.load(RELEASED_UNET)
    if header["autoencoder"] == meta.get("start"):
        ckpt.save(RELEASED_UNET, unet, header | {"autoencoder": weights_digest(load_autoencoder(SHIPPED_AUTOENCODER))})
    print(f"{SHIPPED_AUTOENCODER}: {SHIPPED_AUTOENCODER.stat().st_size / 1e6:.1f} MB, {json.dumps(meta)}")


def lesion_rows(name: str, metric: str, error: np.ndarray, nodules: Patches) -> pd.DataFrame:
    """Rows as of `nodule_scores`: the mean of `error` (N, D, D, D) inside each lesion."""
    value = [e[m].mean() for e, m in zip(error, nodules.mask, strict=True)]
    return nodules.frame[["nodule_id", "patient_id"]].assign(region=name, metric=metric, value=value)


@torch.no_grad()
def further(model: Autoencoder, made: np.ndarray, test: Patches, wide: Patches) -> pd.DataFrame:
    """Of the lesions: the mean error from the posterior's mean and from samples of it, and what `MORE` mm of scan around the
    crop change (the convolutions pad)."""
    mu, std = encode_patches(model, test.hu)
    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(SEED))
    sampled = decoded_hu(model, mu + std * noise) - test.hu
    around = replace(wide, hu=reconstruct(model, wide.hu)).centred(SIZE).hu
    rows = [
        lesion_rows("lesion", "mean_error_hu", made - test.hu, test),
        lesion_rows("lesion, sampled latents", "mean_error_hu", sampled, test),
        lesion_rows("lesion, sampled latents", "mae_hu", np.abs(sampled), test),
        lesion_rows(f"lesion, against {MORE} mm more around", "mae_hu", np.abs(made - around), test),
    ]  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def main(root: tyro.conf.Positional[Path], ship: Path | None = None) -> None:
    """Judge, and write the card.

    Args:
        ship: checkpoint of `train_shipped_autoencoder` to ship first.
    """
    frame = load_manifest(root)
    if ship is not None:
        shipped(ship)
    train = load_patches(frame[frame.split == "train"], SIZE)
    wide = load_patches(frame[frame.split == "test"], SIZE + 2 * MORE)
    test = wide.centred(SIZE)
    model = load_autoencoder(SHIPPED_AUTOENCODER).eval()
    code = linear_code(train.hu, model.latent_channels)
    made = {"autoencoder": reconstruct(model, test.hu), "linear code": linear_reconstruction(code, test.hu)}
    scores = {name: nodule_scores(hu, test) for name, hu in made.items()}
    more = further(model, made["autoencoder"], test, wide)
    tables = [autoencoder_table(scores, N_BOOT, SEED), autoencoder_table({"autoencoder": more}, N_BOOT, SEED)]
    for subtype, part in test.frame.groupby("subtype"):
        own = scores["autoencoder"][scores["autoencoder"].nodule_id.isin(part.nodule_id)]
        found = autoencoder_table({"autoencoder": own}, N_BOOT, SEED)
        tables.append(found[found.region == "lesion"].assign(region=f"lesion, {subtype}"))
    table = pd.concat(tables, ignore_index=True)
    table.loc[table.n < LEAST_PATIENTS, ["ci_low", "ci_high"]] = np.nan
    meta = ckpt.load_meta(SHIPPED_AUTOENCODER)
    card = {
        "what": "compact MAISI-style VAE on an overlapping linear code, 4x compression, CT at 1 mm, -1000..1000 HU",
        "training": {k: meta[k] for k in ("step", "seed", "architecture", "decoder") if k in meta},
        "weights_sha256_16": weights_digest(model),
        "judged_on": f"lidc-cubes, middle {SIZE} mm of {len(test)} cubes of test patients, none seen in training",
        "results": json.loads(table.round(4).to_json(orient="records")),
        "attribution": ATTRIBUTION,
        "licence": "CC BY 3.0; research only, not a medical device",
    }
    write_text(paths.WEIGHTS / "autoencoder.json", json.dumps(card, indent=1) + "\n")
    print(table[table.metric != "ssim"].round(3).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run(main, "python -m scripts.judge_autoencoder", __doc__.splitlines()[0]))
