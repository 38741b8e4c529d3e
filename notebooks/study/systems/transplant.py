"""The true lesion itself, set into the place of another nodule: real texture in a strange place, without training.

Of the other nodules' backgrounds without their nodules, in an order drawn by the study's seed, it takes the first that is
healthy lung wherever the lesion touches it, as `hrldm.nodules.transplant` asks of a host CT; where none is, its own.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from hrldm.insertion.generator import Request
from hrldm.nodules.transplant import paste, weight
from study.places import healthy_places
from study.study import Study

PLACE_SEED = 13  # keeps the order of the places apart from all other chance


def generate(study: Study, request: Request, truth: np.ndarray) -> np.ndarray:
    """HU crops (N, D, D, D); the requested histogram is not looked at."""
    rng = np.random.default_rng((study.seed, PLACE_SEED))
    made = []
    for i, (hu, mask) in enumerate(zip(truth, request.mask, strict=True)):
        place = next(_places(request, truth, i, rng.permutation(len(truth))), i)
        made.append(paste(request.background[place], hu, mask))
    return np.stack(made).astype(np.float32)


def has_places(request: Request, truth: np.ndarray) -> bool:
    """Whether most lesions find the healthy place of another. Where not (backgrounds that still hold their nodules), `generate`
    gives the truth back, and the row says nothing: leave it out."""
    everywhere = range(len(request))
    found = [next(_places(request, truth, i, everywhere), None) is not None for i in everywhere]
    return float(np.mean(found)) > 0.5


def _places(request: Request, truth: np.ndarray, i: int, order: Iterable[int]) -> Iterator[int]:
    """The other nodules' places that are empty, and healthy wherever lesion `i` touches them."""
    touched = weight(request.mask[i]) > 0
    return healthy_places(touched, (j for j in order if j != i), request.background, truth, request.mask)
