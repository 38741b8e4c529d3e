"""Zero-training baseline: the requested shape filled with a random texture of the requested histogram."""

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.nodules.texture import texture_nodule
from study.study import Study


def generate(study: Study, request: Request, truth: np.ndarray) -> np.ndarray:
    """HU crops (N, D, D, D); `truth` is not looked at."""
    made = [
        texture_nodule(bg, mask, SUBTYPES[y], h, np.random.default_rng((study.seed, int(s))))
        for bg, mask, y, h, s in zip(
            request.background, request.mask, request.subtype, request.histogram, request.seeds, strict=True
        )
    ]
    return np.stack(made).astype(np.float32)
