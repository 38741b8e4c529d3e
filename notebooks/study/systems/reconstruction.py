"""The autoencoder's reconstruction of the true lesion, feathered into its background: the floor of every latent system."""

import numpy as np

from hrldm.insertion.blend import feathered
from hrldm.insertion.generator import Request, reconstruct
from hrldm.train.device import device
from study.study import Study


def generate(study: Study, request: Request, truth: np.ndarray) -> np.ndarray:
    """HU crops (N, D, D, D) of the truth as the autoencoder sees it."""
    return feathered(request.background, reconstruct(study.autoencoder, truth, device=device()), request.mask)
