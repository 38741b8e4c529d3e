"""Ship a trained autoencoder: `python -m scripts.ship_autoencoder CHECKPOINT` writes hrldm/weights/autoencoder.safetensors.

Only the averaged weights travel, in float32, with the architecture and the provenance of the training in the header. Where the
decoder alone was trained, the shipped U-Net stays right, and its header is told the new autoencoder's hash.
"""

import argparse
import json
from pathlib import Path

from hrldm.insertion.released import RELEASED_UNET
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder
from hrldm.train.latents import weights_digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    groups, meta = ckpt.load(args.checkpoint)
    ckpt.save(SHIPPED_AUTOENCODER, {"ema": groups["ema"]}, meta)
    unet, header = ckpt.load(RELEASED_UNET)
    if header["autoencoder"] == meta.get("start"):
        ckpt.save(RELEASED_UNET, unet, header | {"autoencoder": weights_digest(load_autoencoder(SHIPPED_AUTOENCODER))})
    print(f"{SHIPPED_AUTOENCODER}: {SHIPPED_AUTOENCODER.stat().st_size / 1e6:.1f} MB, {json.dumps(meta)}")


if __name__ == "__main__":
    main()
