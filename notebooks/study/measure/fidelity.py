"""Fréchet distance, kernel distance and maximum mean discrepancy in three planes (Section 6.1, Table 1).

Features are (N, S, F) per plane; S slices of one nodule and the nodules of one group (patient, or shape's patient) are
dependent, so the group is the unit everywhere. Each metric is computed so that a perfect generator and real against
real (row `real`, the floor) have the same expectation, paired data included:

- fid  is biased upwards by about 1 / n, so every row uses the same m nodules a side from disjoint halves of the groups:
       real of one half against synthetic of the other (the floor: real against real), averaged over `N_SPLITS` random
       splits, both directions. All F dimensions, no PCA: directions that real data lack are what betrays noise.
- kid  unbiased squared MMD, k(x, y) = (x.y / F + 1)^3 (Binkowski et al., 2018), all nodules.
- mmd  unbiased squared MMD, k(x, y) = exp(-|x - y|^2 / 2 s^2), s = median distance of real slices of different groups
       in the plane, the same for all systems. Both kernels' means leave out pairs of one group (U-statistic of groups),
       so a value below zero is possible and means "no difference seen".

Intervals are a group bootstrap, one draw for all rows, so that differences are paired. For kid and mmd the weighted
U-statistic is recomputed (a group drawn twice is not paired with itself). For fid, whose naive bootstrap is shifted by
the doubled bias until its interval misses the estimate, the influence function is resampled:
theta(w) = theta + sum_g (w_g - 1) h_g. Values are raw: the paper prints kid times 1e3 and mmd times 1e2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from study.measure.distances import Sample, cubic_kernel, frechet, median_distance, pair_sums, rbf_kernel, squared_mmd
from study.measure.intensity import FLOOR
from study.measure.observers import Cases, case_features
from study.measure.statistics import cluster_weights, percentile_interval, two_sided_p

logger = logging.getLogger(__name__)
METRICS = ("fid", "kid", "mmd")
Features = dict[str, np.ndarray]  # plane -> (N, S, F)
MIN_GROUPS, N_SPLITS = 4, 4


@dataclass(frozen=True)
class Row:
    """One cell of Table 1 with its bootstrap draws (n_boot,); draws of all rows share the resampled groups."""

    system: str
    metric: str
    plane: str
    value: float
    draws: np.ndarray
    n_real: int
    n_synthetic: int


def fidelity_rows(
    real: Features,
    systems: dict[str, Features],
    groups_real: np.ndarray,
    groups_by_system: dict[str, np.ndarray],
    n_boot: int = 200,
    seed: int = 0,
) -> list[Row]:
    """All metrics of all systems and of the floor, per plane and averaged over planes, with their draws.

    Args:
        real: plane -> (N, S, F) features of real crops.
        systems: name -> plane -> (N', S, F).
        groups_real: (N,) group label of each real nodule.
        groups_by_system: name -> (N',) group labels; a label shared with the real set is the same patient.

    Raises:
        ValueError: planes, shapes or labels that do not fit, or non-finite features.

    With fewer than `MIN_GROUPS` groups, too few to halve and resample, all is NaN and a warning says so.
    """
    if not real or FLOOR in systems or not set(systems) <= set(groups_by_system):
        raise ValueError(f"need real features, groups for every system, and no system named {FLOOR!r}")
    features = {FLOOR: real, **systems}
    labels = {FLOOR: np.asarray(groups_real), **{name: np.asarray(groups_by_system[name]) for name in systems}}
    for name, planes in features.items():
        shapes = {plane: np.shape(x) for plane, x in planes.items()}
        fitting = {plane: (len(labels[name]), *np.shape(x)[1:]) for plane, x in real.items()}
        if shapes != fitting:
            raise ValueError(f"{name}: features {shapes} do not fit the real ones and the groups, {fitting}")
        if not all(np.isfinite(x).all() for x in planes.values()):
            raise ValueError(f"{name}: features hold values that are not finite")
    if (fewest := min(np.unique(g).size for g in labels.values())) < MIN_GROUPS:
        logger.warning(
            "FID, KID and MMD are left empty: %d patients, and to halve and resample them takes %d", fewest, MIN_GROUPS
        )
        none = np.full(n_boot, np.nan)
        return _with_averages([
            Row(name, metric, plane, np.nan, none, len(groups_real), len(groups))
            for plane in real for name, groups in labels.items() for metric in METRICS
        ])  # fmt: skip
    rng = np.random.default_rng(seed)
    union, flat = np.unique(np.concatenate(list(labels.values())), return_inverse=True)
    codes = dict(zip(labels, np.split(flat, np.cumsum([len(v) for v in labels.values()])[:-1]), strict=True))
    splits = _splits(codes, len(union), rng)
    picks, m = _equal_picks(codes, splits, rng)
    weights = cluster_weights(len(union), n_boot, rng)
    rows = []
    for plane in real:
        sets = {name: np.asarray(planes[plane], dtype=np.float64) for name, planes in features.items()}
        for name in sets:
            value, h = _fid_over_splits(sets, codes, picks, name, len(union))
            rows.append(Row(name, "fid", plane, value, value + (weights - 1) @ h, m, m))
        rows += _kernel_rows(sets, codes, splits, weights, plane)
    return _with_averages(rows)


def as_table(rows: list[Row], extractor: str) -> pd.DataFrame:
    """Rows of :func:`fidelity_rows` in the columns of `table1_fidelity.csv`."""
    cells = [
        (r.system, extractor, r.metric, r.plane, r.value, *percentile_interval(r.draws), r.n_real, r.n_synthetic)
        for r in rows
    ]
    return pd.DataFrame(cells, columns="system extractor metric plane value ci_low ci_high n_real n_synthetic".split())


def fidelity_difference(rows: list[Row], a: str, b: str) -> pd.DataFrame:
    """b minus a, paired (below 0: b is closer to real): metric, plane, difference, ci_low, ci_high, p.

    Raises:
        ValueError: a system that is not among the rows.
    """
    if missing := {a, b} - {r.system for r in rows}:
        raise ValueError(f"no such system among the rows: {sorted(missing)}")
    second = {(r.metric, r.plane): r for r in rows if r.system == b}
    out = []
    for r in rows:
        if r.system == a:
            other = second[r.metric, r.plane]
            draws = other.draws - r.draws
            out.append((r.metric, r.plane, other.value - r.value, *percentile_interval(draws), two_sided_p(draws)))
    return pd.DataFrame(out, columns="metric plane difference ci_low ci_high p".split())


def separability(
    real: Features, systems: dict[str, Features], groups: np.ndarray, extractor: str, seed: int
) -> pd.DataFrame:
    """`separability.csv`: system, extractor, auroc of a linear classifier that tells synthetic from real, n.

    It sees all planes together, averaged over slices, and is cross-validated by group: 0.5 = cannot be told apart,
    1 = always. NaN, with a warning, where there are fewer than two groups.

    Args:
        real: plane -> (N, S, F) features of real crops.
        systems: name -> plane -> (N, S, F), of the same nodules.
        groups: (N,) group of each.
    """
    several = np.unique(groups).size > 1
    if not several:
        logger.warning("nodules of one patient only: whether features tell real from synthetic ones is left out")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    rows = []
    for name, features in systems.items():
        auroc = np.nan
        if several:
            told = Cases(case_features(real), case_features(features), groups, groups).by_patient(seed)
            auroc = roc_auc_score(told["y"], cross_val_predict(model, **told, method="decision_function"))
        rows.append((name, extractor, auroc, len(groups)))
    return pd.DataFrame(rows, columns="system extractor auroc n".split())


def _splits(codes: dict[str, np.ndarray], n_groups: int, rng: np.random.Generator) -> np.ndarray:
    """(N_SPLITS, n_groups) bool: first half of the groups, balanced within each pattern of who has the group."""
    has = np.stack([np.isin(np.arange(n_groups), c) for c in codes.values()], axis=1)
    _, stratum = np.unique(has, axis=0, return_inverse=True)
    first = np.zeros((N_SPLITS, n_groups), dtype=bool)
    for row in first:
        shuffled = rng.permutation(n_groups)
        ordered = shuffled[np.argsort(stratum[shuffled], kind="stable")]
        row[ordered[::2]] = True
    return first


def _equal_picks(
    codes: dict[str, np.ndarray], splits: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, list[tuple[np.ndarray, np.ndarray]]], int]:
    """Per set and split the nodules of either half, the same number m of them everywhere."""
    halves = {
        name: [(np.flatnonzero(first[c]), np.flatnonzero(~first[c])) for first in splits] for name, c in codes.items()
    }
    m = min(len(side) for pairs in halves.values() for pair in pairs for side in pair)
    picks = {name: [tuple(rng.permutation(s)[:m] for s in pair) for pair in pairs] for name, pairs in halves.items()}
    return picks, m


def _fid_over_splits(sets, codes, picks, name: str, n_groups: int) -> tuple[float, np.ndarray]:
    """Mean Fréchet distance over splits and directions, and its influence by group (n_groups,)."""
    values, h = [], np.zeros(n_groups)
    for real_pair, other_pair in zip(picks[FLOOR], picks[name], strict=True):
        for side in (0, 1) if name != FLOOR else (0,):
            i, j = real_pair[side], other_pair[1 - side]
            x, y = sets[FLOOR][i], sets[name][j]
            value, on_x, on_y = frechet(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            values.append(value)
            np.add.at(h, codes[FLOOR][i], on_x.reshape(x.shape[:2]).sum(1))
            np.add.at(h, codes[name][j], on_y.reshape(y.shape[:2]).sum(1))
    return float(np.mean(values)), h / len(values)


def _kernel_rows(sets, codes, splits, weights: np.ndarray, plane: str) -> list[Row]:
    """kid and mmd of every system and of the floor (halves of the real set, averaged over the splits)."""
    n_groups, n_slices = weights.shape[1], sets[FLOOR].shape[1]
    samples = {n: Sample(x.reshape(-1, x.shape[-1]), np.repeat(codes[n], n_slices), n_groups) for n, x in sets.items()}
    real = samples[FLOOR]
    kernels = {"kid": cubic_kernel, "mmd": rbf_kernel(median_distance(real))}
    weights = np.vstack([np.ones(n_groups), weights])  # the first "draw" is the estimate itself
    rows = []
    for metric, kernel in kernels.items():
        within_real = pair_sums(real, real, kernel)
        for name, sample in samples.items():
            if name == FLOOR:
                within, across, masks = within_real, within_real, [(s, ~s) for s in splits]
            else:
                within, across = pair_sums(sample, sample, kernel), pair_sums(real, sample, kernel)
                masks = [(np.ones(n_groups), np.ones(n_groups))]
            parts = [squared_mmd(within_real, within, across, weights * x, weights * y) for x, y in masks]
            value, *draws = np.mean(parts, axis=0)
            rows.append(Row(name, metric, plane, float(value), np.array(draws), len(sets[FLOOR]), len(sets[name])))
    return rows


def _with_averages(rows: list[Row]) -> list[Row]:
    """The rows, and the mean over planes of each system and metric (column Avg of Table 1)."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        cells.setdefault((r.system, r.metric), []).append(r)
    averages = [
        replace(cell[0], plane="average", value=float(np.mean([r.value for r in cell])),
                draws=np.mean([r.draws for r in cell], axis=0))
        for cell in cells.values()
    ]  # fmt: skip
    return rows + averages
