"""Can synthetic nodules be told from real ones without looking at them? From what lies outside the mask alone (`border.csv`).

A classifier that trains on both could learn the border of a synthetic nodule (an edge, a noise that changes, a place where no
nodule was) in place of its subtype. Nothing inside the mask is read, not even by a filter; both sides hold as many nodules
of each subtype, for their edges differ. An AUROC of 0.5 is chance: there is no border to learn.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import ndimage

from study.measure.observers import Cases
from study.measure.realism import out_of_fold
from study.measure.statistics import auroc, patient_weights, percentile_interval

SHELLS_MM = ((0, 1), (1, 2), (2, 4), (4, 7), (7, 11))  # distance from the mask
PARTS = {"border": 0, "beyond 4 mm": 4}  # shells from this distance on; erasing and blending reach less far
GRAIN_MM = 1.0


def border_features(hu: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean, SD, deciles and grain of each shell about a lesion, by `<from mm>_<name>`; hu, mask: (D, D, D) at 1 mm."""
    distance, outside = ndimage.distance_transform_edt(~mask), ~mask
    hu = np.where(outside, hu, 0).astype(np.float64).clip(-1000, 400)
    smooth, weight = (ndimage.gaussian_filter(a, GRAIN_MM) for a in (hu, outside.astype(float)))
    grain, found = hu - smooth / np.maximum(weight, 1e-6), {}
    for low, high in SHELLS_MM:
        shell = (distance > low) & (distance <= high)
        x = hu[shell] if shell.any() else np.zeros(1)
        values = {"mean": x.mean(), "sd": x.std(), "q10": np.quantile(x, 0.1), "q90": np.quantile(x, 0.9)}
        values["grain"] = grain[shell].std() if shell.any() else 0.0
        found |= {f"{low}_{name}": float(value) for name, value in values.items()}
    return found


def border_table(
    real: tuple[np.ndarray, ...], systems: Mapping[str, tuple[np.ndarray, ...]], n_boot: int, seed: int
) -> pd.DataFrame:
    """`border.csv`: system, part, auroc, ci_low, ci_high, n_real, n_synthetic, n_groups.

    Args:
        real, systems: crops (N, D, D, D) HU, masks (N, D, D, D), labels (N,) and groups (N,), by which the classifier is
            judged on others than it learned from and which the interval resamples.
        n_boot: resamples.
        seed: of the choice of nodules, folds and resamples.

    Raises:
        ValueError: fewer than two groups.
    """
    rows = []
    for system, made in systems.items():
        rng = np.random.default_rng(seed)
        chosen = [[], []]
        for label in np.unique(made[2]):
            pools = [rng.permutation(np.flatnonzero(side[2] == label)) for side in (real, made)]
            for rows_of, pool in zip(chosen, pools, strict=True):
                rows_of.extend(pool[: min(map(len, pools))])
        (a, groups), (b, groups_made) = (
            (pd.DataFrame([border_features(side[0][i], side[1][i]) for i in index]), side[3][index])
            for side, index in zip((real, made), chosen, strict=True)
        )
        weights = patient_weights(np.concatenate([groups, groups_made]), n_boot, seed)
        truth = np.repeat([0, 1], [len(a), len(b)])
        for part, nearest in PARTS.items():
            columns = [name for name in a if int(name.split("_")[0]) >= nearest]
            scores = out_of_fold(Cases(a[columns], b[columns], groups, groups_made), "forest", seed)
            value, interval = auroc(truth, scores)[0], percentile_interval(auroc(truth, scores, weights))
            rows.append((system, part, value, *interval, len(a), len(b), len(np.union1d(groups, groups_made))))
    return pd.DataFrame(rows, columns="system part auroc ci_low ci_high n_real n_synthetic n_groups".split())
