"""The true lesion itself, set into the place of another nodule: what a perfect generator would reach, without any training.

Of the other nodules' backgrounds, in an order drawn by the study's seed, it takes the first that is healthy lung wherever
the lesion touches it, as `data.transplant` asks of a host CT; where none is (images that still hold their nodules), its own.
"""

from __future__ import annotations

import numpy as np

from hrldm.insertion.generator import Request
from hrldm.nodules.positions import VESSEL_HU
from hrldm.nodules.transplant import MAX_MEAN_HU, MIN_LUNG, paste, weight
from study.study import Study

PLACE_SEED = 13  # keeps the order of the places apart from all other chance


def generate(study: Study, request: Request, truth: np.ndarray) -> np.ndarray:
    """HU crops (N, D, D, D); the requested histogram is not looked at."""
    rng = np.random.default_rng((study.seed, PLACE_SEED))
    made = []
    for i, (hu, mask) in enumerate(zip(truth, request.mask, strict=True)):
        touched = weight(mask) > 0
        places = (j for j in rng.permutation(len(truth)) if j != i and _healthy(request.background[j][touched]))
        made.append(paste(request.background[next(places, i)], hu, mask))
    return np.stack(made).astype(np.float32)


def _healthy(hu: np.ndarray) -> bool:
    return bool(hu.mean() < MAX_MEAN_HU and (hu < VESSEL_HU).mean() >= MIN_LUNG)
