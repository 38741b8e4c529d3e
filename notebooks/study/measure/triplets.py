"""One place, one shape, one noise, three subtypes: does the intensity that comes follow what is asked for?

Each nodule's place and shape are asked for as ground-glass, part-solid and solid in turn, each with a typical histogram:
the mean over the training nodules of that subtype that are nearest in size. In a lung, the mean HU of the three rises in
this order; a generator that obeys keeps it.
"""

import numpy as np
import pandas as pd

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.nodules.histograms import bins_of, completed, histogram_moments, hu_histogram
from hrldm.nodules.patches import Patches
from study.measure.statistics import wilson_interval
from study.study import Study, library_of
from study.systems.registry import request_for

ORDER = ("ground-glass", "part-solid", "solid")  # darkest first
NEAREST, SEED = 8, 5


def typical_histograms(library: pd.DataFrame, diameters_mm: np.ndarray) -> np.ndarray:
    """(N, 3, B) for each diameter, in the order of `ORDER`, of a library in the columns of `histogram_library`.

    Raises:
        ValueError: a subtype without any nodule.
    """
    own, size = bins_of(library).to_numpy(float), np.log(library.diameter_mm.to_numpy())
    out = np.empty((len(diameters_mm), len(ORDER), own.shape[1]))
    for k, subtype in enumerate(ORDER):
        rows = np.flatnonzero(library.subtype == subtype)
        if not len(rows):
            raise ValueError(f"no {subtype} nodule among {len(library)} to take a typical histogram from")
        for i, diameter in enumerate(diameters_mm):
            near = rows[np.argsort(np.abs(size[rows] - np.log(diameter)), kind="stable")[:NEAREST]]
            out[i, k] = own[near].mean(0)
    return out


def triplet_request(study: Study, truth: Patches, background: Patches) -> tuple[Patches, Request]:
    """`thrice` with the histograms of the study's training nodules."""
    library = completed(library_of(study.patches("train"), study.profile.histogram.bins))
    return thrice(request_for(study, truth, background, "target", SEED), truth, library)


def thrice(plain: Request, truth: Patches, library: pd.DataFrame) -> tuple[Patches, Request]:
    """Every nodule three times, in the order of `ORDER`: the nodules (3N) and what to make of them.

    plain: asks for each nodule once; library: see `typical_histograms`
    """
    rows = np.repeat(np.arange(len(truth)), len(ORDER))
    label = np.tile([SUBTYPES.index(s) for s in ORDER], len(truth))
    histogram = typical_histograms(library, truth.frame.diameter_mm).reshape(len(rows), -1)
    return truth[rows], Request(plain.background[rows], plain.mask[rows], label, histogram, plain.seeds[rows])


def triplet_table(system: str, thrice: Patches, request: Request, crops: np.ndarray) -> pd.DataFrame:
    """One row per nodule and subtype asked for: system, nodule_id, asked_subtype, requested_mean_hu, obtained_mean_hu."""
    bins = request.histogram.shape[1]
    obtained = [hu_histogram(x[m], bins) for x, m in zip(crops, thrice.mask, strict=True)]
    return pd.DataFrame(
        {
            "system": system,
            "nodule_id": thrice.frame.nodule_id,
            "asked_subtype": np.array(SUBTYPES)[request.subtype],
            "requested_mean_hu": [histogram_moments(h)[0] for h in request.histogram],
            "obtained_mean_hu": [histogram_moments(h)[0] for h in obtained],
        }
    )


def ordered_share(table: pd.DataFrame) -> pd.DataFrame:
    """Share of nodules whose three means rise in the order of `ORDER`, requested and obtained, per system.

    Columns: system, side, value, ci_low, ci_high (Wilson, 95 %), n.
    """
    rows = []
    for system, part in table.groupby("system", sort=False):
        for side in ("requested", "obtained"):
            means = part.pivot(index="nodule_id", columns="asked_subtype", values=f"{side}_mean_hu")[list(ORDER)]
            rising = (np.diff(means.to_numpy(), axis=1) > 0).all(1)
            rows.append((system, side, rising.mean(), *wilson_interval(int(rising.sum()), len(rising)), len(rising)))
    return pd.DataFrame(rows, columns="system side value ci_low ci_high n".split())
