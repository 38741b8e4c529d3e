"""Which measure of Table 1 notices which damage, and from which strength on (`known_answer.csv`)?

Real lesions are damaged in four known ways inside their masks, where generators write too, and every measure is taken as
of a system: fid against the undamaged nodules of the other half of the patients, kid and mmd without pairs of one
patient, jsd and wasserstein_hu against the lesion's own histogram, auroc of a linear classifier on deep features, out
of fold. A measure notices a damage when the interval by patient of its distance from the floor lies above zero:

    fid                   the undamaged halves of the same splits
    kid, mmd              zero
    jsd, wasserstein_hu   two random halves of one lesion's voxels
    auroc                 0.5

A damaged nodule is a copy, so this is the best a paired comparison can do. `clear` is what two rows of a table show by
themselves: the whole interval lies above the floor's whole interval.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch.nn import functional as F
from tqdm import tqdm

from hrldm.nodules.patches import Patches
from study.measure import intensity
from study.measure.features import Extractor, three_plane_features
from study.measure.fidelity import METRICS, Features, fidelity_rows, told_apart
from study.measure.statistics import auroc, patient_weights, percentile_interval

DAMAGES = {
    "blur_mm": (0.5, 1.0, 1.5, 2.0),  # sigma of a Gaussian
    "noise_hu": (10.0, 20.0, 40.0, 80.0),  # SD of white noise
    "offset_hu": (10.0, 20.0, 50.0, 100.0),
    "mosaic_voxels": (2.0, 4.0, 6.0, 8.0),  # side of blocks of one value, their mean
}


def damaged(patches: Patches, damage: str, strength: float, seed: int) -> np.ndarray:
    """Crops (N, D, D, D) float32 HU at 1 mm whose lesions are damaged, the lung around them untouched.

    The noise of one seed is the same field at all strengths.

    Raises:
        ValueError: a damage that is not in `DAMAGES`.
    """
    hu = patches.hu.astype(np.float32)
    if damage == "blur_mm":
        changed = ndimage.gaussian_filter(hu, (0, *[strength] * 3))
    elif damage == "noise_hu":
        changed = hu + strength * np.random.default_rng(seed).standard_normal(hu.shape, np.float32)
    elif damage == "offset_hu":
        changed = hu + np.float32(strength)
    elif damage == "mosaic_voxels":
        changed = _mosaic(hu, int(strength))
    else:
        raise ValueError(f"unknown damage {damage!r}; choose one of {', '.join(DAMAGES)}")
    return np.where(patches.mask, changed, hu)


def _mosaic(hu: np.ndarray, side: int) -> np.ndarray:
    blocks = F.avg_pool3d(torch.from_numpy(hu), side, ceil_mode=True, count_include_pad=False).numpy()
    for axis in (1, 2, 3):
        blocks = blocks.repeat(side, axis)
    return blocks[:, : hu.shape[1], : hu.shape[2], : hu.shape[3]]


def known_answer(
    patches: Patches,
    groups: np.ndarray,
    extractor: Extractor,
    n_boot: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Every measure of every damage in `DAMAGES`, and of no damage at all (`none`, strength 0) where it has a floor.

    Args:
        patches: real nodules in crops of the size of Table 1.
        groups: (N,) patient of each.
        extractor: of the features of each plane's middle slice; nearly all the time goes into them, 16 times those of one system.

    Returns:
        damage, strength, metric, value, ci_low, ci_high, notices, clear (bool), n. Distances are averages of the planes, not in
        the paper's units.
    """
    patches = replace(patches, frame=patches.frame.assign(patient_id=groups))
    seen = partial(three_plane_features, extractor=extractor, n_slices=1, device=device)
    keys = {f"{damage} {s:g}": (damage, s) for damage, strengths in DAMAGES.items() for s in strengths}
    real, features, lesions = seen(patches.hu), {}, [intensity.lesion_tables({}, patches, seed)]
    for name, (damage, strength) in tqdm(keys.items(), desc="damages", mininterval=10, disable=len(patches) < 20):
        crops = damaged(patches, damage, strength, seed)
        features[name] = seen(crops)
        lesions.append(intensity.lesion_table(name, crops, patches))
    rows = [
        *_distances(real, features, groups, n_boot, seed),
        *_histograms(pd.concat(lesions, ignore_index=True), n_boot, seed),
        *_separability(real, features, groups, n_boot, seed),
    ]
    cells = [(*keys.get(name, ("none", 0.0)), *cell) for name, *cell in rows]
    table = pd.DataFrame(cells, columns="damage strength metric value ci_low ci_high notices".split())
    floor = table[table.damage == "none"].set_index("metric").ci_high
    return table.assign(clear=table.ci_low > table.metric.map(floor).fillna(0.5), n=len(groups))


def first_noticed(table: pd.DataFrame) -> pd.DataFrame:
    """Least strength of each damage from which on a measure sees it, NaN for none: damages by metrics."""
    missed = table[~table.notices].groupby(["damage", "metric"]).strength.max()
    rows = [
        (damage, metric, min((s for s in strengths if s > missed.get((damage, metric), 0.0)), default=np.nan))
        for damage, strengths in DAMAGES.items()
        for metric in table.metric.unique()
    ]
    long = pd.DataFrame(rows, columns=["damage", "metric", "strength"])
    return long.pivot(index="damage", columns="metric", values="strength").loc[list(DAMAGES), table.metric.unique()]


def _distances(
    real: Features, features: dict[str, Features], groups: np.ndarray, n_boot: int, seed: int
) -> list[tuple]:
    rows = fidelity_rows(real, features, groups, dict.fromkeys(features, groups), n_boot, seed)
    return [
        (r.system, r.metric, r.value, *percentile_interval(r.draws), percentile_interval(r.ratio[1:])[0] > 1)
        for r in rows
        if r.plane == "average" and r.metric in METRICS
    ]


def _histograms(lesions: pd.DataFrame, n_boot: int, seed: int) -> list[tuple]:
    table = intensity.lesion_histograms(lesions, n_boot, seed)
    return [
        (r.system, r.metric, r.value, r.ci_low, r.ci_high, r.system != intensity.FLOOR
         and intensity.paired_difference(lesions, intensity.FLOOR, r.system, r.metric, n_boot, seed).ci_low > 0)
        for r in table[table.subtype == intensity.ALL].itertuples()
    ]  # fmt: skip


def _separability(real: Features, features: dict[str, Features], groups: np.ndarray, n_boot: int, seed: int) -> list:
    weights = patient_weights(np.tile(groups, 2), n_boot, seed)
    rows = []
    for name, synthetic in features.items():
        truth, scores = told_apart(real, synthetic, groups, seed)
        low, high = percentile_interval(auroc(truth, scores, weights))
        rows.append((name, "auroc", auroc(truth, scores)[0], low, high, low > 0.5))
    return rows
