"""One place, one shape, one noise, three subtypes: does the intensity that comes follow what is asked for?

Each nodule's place and shape are asked for as ground-glass, part-solid and solid in turn, each with a typical histogram:
the mean over the training nodules of that subtype that are nearest in size. In a lung, the mean HU of the three rises in
this order; a generator that obeys keeps it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.nodules.histograms import histogram_moments, hu_histogram
from hrldm.nodules.patches import Patches
from hrldm.nodules.texture import bins_of, completed
from hrldm.train.latents import lesion_histograms
from study.measure.statistics import wilson_interval
from study.study import Study
from study.systems.registry import request_for

ORDER = ("ground-glass", "part-solid", "solid")  # darkest first
NEAREST, SEED = 8, 5


def typical_histograms(nodules: pd.DataFrame, own: np.ndarray, diameters_mm: np.ndarray) -> np.ndarray:
    """(N, 3, B) for each diameter, in the order of `ORDER`.

    nodules: M rows with subtype and diameter_mm; own: (M, B) their histograms

    Raises:
        ValueError: a subtype without any nodule.
    """
    size = np.log(nodules.diameter_mm.to_numpy())
    out = np.empty((len(diameters_mm), len(ORDER), own.shape[1]))
    for k, subtype in enumerate(ORDER):
        rows = np.flatnonzero(nodules.subtype == subtype)
        if not len(rows):
            raise ValueError(f"no {subtype} nodule among {len(nodules)} to take a typical histogram from")
        for i, diameter in enumerate(diameters_mm):
            near = rows[np.argsort(np.abs(size[rows] - np.log(diameter)), kind="stable")[:NEAREST]]
            out[i, k] = own[near].mean(0)
    return out


def triplet_request(study: Study, truth: Patches, background: Patches) -> tuple[Patches, Request]:
    """Every nodule three times, in the order of `ORDER`: the nodules (3N) and what to make of them."""
    train = study.patches("train")
    own = pd.DataFrame(lesion_histograms(train, study.profile.histogram.bins)).rename(columns="b{:02d}".format)
    library = completed(train.frame[["subtype", "diameter_mm"]].join(own))
    typical = typical_histograms(library, bins_of(library).to_numpy(float), truth.frame.diameter_mm.to_numpy())
    return thrice(request_for(study, truth, background, "target", SEED), truth, typical)


def thrice(plain: Request, truth: Patches, typical: np.ndarray) -> tuple[Patches, Request]:
    """`triplet_request` from one request a nodule and the histograms (N, 3, B) to ask for."""
    rows = np.repeat(np.arange(len(truth)), len(ORDER))
    label = np.tile([SUBTYPES.index(s) for s in ORDER], len(truth))
    histogram = typical.reshape(len(rows), -1)
    return truth[rows], Request(plain.background[rows], plain.mask[rows], label, histogram, plain.seeds[rows])


def triplet_table(system: str, thrice: Patches, request: Request, crops: np.ndarray) -> pd.DataFrame:
    """One row per nodule and subtype asked for: system, nodule_id, asked_subtype, requested_mean_hu, obtained_mean_hu."""
    bins = request.histogram.shape[1]
    return pd.DataFrame(
        {
            "system": system,
            "nodule_id": thrice.frame.nodule_id.to_numpy(),
            "asked_subtype": np.array(SUBTYPES)[request.subtype],
            "requested_mean_hu": [histogram_moments(h)[0] for h in request.histogram],
            "obtained_mean_hu": [
                histogram_moments(hu_histogram(x[m], bins))[0] for x, m in zip(crops, thrice.mask, strict=True)
            ],
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
    return pd.DataFrame(rows, columns=["system", "side", "value", "ci_low", "ci_high", "n"])
