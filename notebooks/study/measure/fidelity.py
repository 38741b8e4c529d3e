"""Fréchet distance, kernel distance and maximum mean discrepancy in three planes (Section 6.1, Table 1).

Features are (N, S, F) per plane; S slices of one nodule and the nodules of one group (patient, or shape's patient) are
dependent, so the group is the unit everywhere. Each metric is computed so that a perfect generator and real against
real (row `real`, the floor) have the same expectation, paired data included:

- fid  is biased upwards by about 1 / n, so every row uses the same m nodules a side from disjoint halves of the groups:
       real of one half against synthetic of the other (the floor: real against real), averaged over `N_SPLITS` random
       splits, both directions. All F dimensions, no PCA: directions that real data lack are what betrays noise.
- fid_whole  the paper's way, all real against all synthetic nodules. Its bias is smaller than that of `fid`, and on
       the same patients smaller still, so it must not be compared with the floor of halves that stands beside it.
- kid  unbiased squared MMD, k(x, y) = (x.y / F + 1)^3 (Binkowski et al., 2018), all nodules.
- mmd  unbiased squared MMD, k(x, y) = exp(-|x - y|^2 / 2 s^2), s = median distance of real slices of different groups
       in the plane, the same for all systems. Both kernels' means leave out pairs of one group (U-statistic of groups),
       so a value below zero is possible and means "no difference seen".

Intervals are a group bootstrap, one draw for all rows, so that differences are paired. For kid and mmd the weighted
U-statistic is recomputed (a group drawn twice is not paired with itself). For fid, whose naive bootstrap is shifted by
the doubled bias until its interval misses the estimate, the influence function is resampled:
theta(w) = theta + sum_g (w_g - 1) h_g. Values are raw: the paper prints kid times 1e3 and mmd times 1e2.

In a simulation (16 features, a system shifted from real, mostly 1 to 3 nodules a group) 95 % intervals of fid held its
value in .50 of cases with 5 groups, .80 with 8, .91 with 20 and .96 with 40; with no difference in .46, .72, .79, .89.
Those of kid held it in .92 or more, those of mmd in .79 to .89: the width of its kernel is not resampled. Hence
`LEAST_GROUPS` for a subtype of its own.
"""

import logging
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from study.measure.distances import (
    Sample,
    cubic_kernel,
    frechet,
    halves_distance,
    median_distance,
    pair_sums,
    rbf_kernel,
    squared_mmd,
)
from study.measure.intensity import FLOOR
from study.measure.observers import Cases, case_features
from study.measure.statistics import cluster_weights, percentile_interval, two_sided_p

logger = logging.getLogger(__name__)
METRICS = ("fid", "kid", "mmd")
WHOLE = "fid_whole"
Features = dict[str, np.ndarray]  # plane -> (N, S, F)
MIN_GROUPS, N_SPLITS = 4, 4
LEAST_GROUPS = 20  # for a subtype of its own
UNIFORM = "uniform"


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
    halves: np.ndarray  # (1 + n_boot,) estimate and draws of what two halves of the real patients give each other

    @property
    def ratio(self) -> np.ndarray:
        """(1 + n_boot,) over `halves`, estimate and draws: 1 is as far from real as real; `fid_whole` has none, NaN.

        fid and its floor are biased alike. kid and mmd are not biased: what chance would add to both is added here.
        """
        value = np.append(self.value, self.draws)
        return value / self.halves if self.metric == "fid" else 1 + value / self.halves


def fidelity_rows(
    real: Features,
    systems: dict[str, Features],
    groups_real: np.ndarray,
    groups_by_system: dict[str, np.ndarray],
    n_boot: int = 200,
    seed: int = 0,
) -> list[Row]:
    """All metrics of all systems and of the floor (but `fid_whole`), per plane and their average, with their draws.

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
        none = np.full(n_boot + 1, np.nan)
        return _with_averages([
            Row(name, metric, plane, np.nan, none[1:], len(groups_real), len(groups), none)
            for plane in real for name, groups in labels.items() for metric in (*METRICS, WHOLE)
            if (name, metric) != (FLOOR, WHOLE)
        ])  # fmt: skip
    rng = np.random.default_rng(seed)
    union, flat = np.unique(np.concatenate(list(labels.values())), return_inverse=True)
    codes = dict(zip(labels, np.split(flat, np.cumsum([len(v) for v in labels.values()])[:-1]), strict=True))
    splits = _splits(codes, len(union), rng)
    picks, m = _equal_picks(codes, splits, rng)
    weights = np.vstack([np.ones(len(union)), cluster_weights(len(union), n_boot, rng)])  # the estimate is the first
    rows = []
    for plane in real:
        sets = {name: np.asarray(planes[plane], dtype=np.float64) for name, planes in features.items()}
        rows += _fid_rows(sets, codes, picks, weights, plane)
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
        if r.system == a and (r.metric, r.plane) in second:
            other = second[r.metric, r.plane]
            draws = other.draws - r.draws
            out.append((r.metric, r.plane, other.value - r.value, *percentile_interval(draws), two_sided_p(draws)))
    return pd.DataFrame(out, columns="metric plane difference ci_low ci_high p".split())


def floor_ratios(rows: list[Row], extractor: str) -> pd.DataFrame:
    """`table1_ratios.csv`: `Row.ratio` with its interval, in the columns of `table1_fidelity.csv`; metric FID, KID, MMD."""
    cells = [
        (r.system, extractor, r.metric.upper(), r.plane, r.ratio[0], *percentile_interval(r.ratio[1:]))
        + (r.n_real, r.n_synthetic)
        for r in rows if r.metric != WHOLE
    ]  # fmt: skip
    return pd.DataFrame(cells, columns="system extractor metric plane value ci_low ci_high n_real n_synthetic".split())


def same_order(rows: dict[str, list[Row]]) -> pd.DataFrame:
    """Do two extractors put the systems into the same order? Kendall's tau: 1 is the same, 0 unrelated, -1 reversed.

    Args:
        rows: extractor -> its `fidelity_rows`, of the same nodules and seed: their draws share the resampled patients.

    Returns:
        metric, a, b (extractors), tau, ci_low, ci_high, n_systems, of the average of planes and without the floor; no
        row for a single extractor.
    """
    averages = {
        extractor: {(r.metric, r.system): r for r in of_one if r.plane == "average" and r.system != FLOOR}
        for extractor, of_one in rows.items()
    }
    out = []
    for a, b in combinations(averages, 2):
        for metric in (*METRICS, WHOLE):
            names = [s for m, s in averages[a] if m == metric and (m, s) in averages[b]]
            first, second = (
                np.stack([np.append(r.value, r.draws) for r in (averages[x][metric, s] for s in names)], axis=1)
                for x in (a, b)
            )
            tau, *draws = [kendalltau(x, y).statistic for x, y in zip(first, second, strict=True)]
            out.append((metric, a, b, tau, *percentile_interval(draws), len(names)))
    return pd.DataFrame(out, columns="metric a b tau ci_low ci_high n_systems".split())


def uniform_rows(subtype: np.ndarray, n: int, seed: int) -> np.ndarray:
    """As many nodules of each subtype (N,), drawn at random: at most n in all, as many as the rarest allows; sorted."""
    rng = np.random.default_rng(seed)
    names, counts = np.unique(subtype, return_counts=True)
    each = min(counts.min(), n // len(names))
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(subtype == name))[:each] for name in names]))


def fidelity_by_subtype(
    real: Features,
    systems: dict[str, Features],
    groups: np.ndarray,
    subtype: np.ndarray,
    extractor: str,
    n_boot: int,
    seed: int,
) -> pd.DataFrame:
    """`table1_subtypes.csv`: `as_table` with a column `subtype`: `uniform_rows`, and every subtype that is large enough.

    A subtype needs `LEAST_GROUPS` patients, because intervals from fewer are too narrow; those left out are named in
    the log.

    Args:
        real, systems: features of the same N nodules, see `fidelity_rows`.
        groups, subtype: (N,) of each.
    """
    parts = {UNIFORM: uniform_rows(subtype, len(subtype), seed)}
    for name in np.unique(subtype):
        parts[name] = np.flatnonzero(subtype == name)
        if (patients := np.unique(groups[parts[name]]).size) < LEAST_GROUPS:
            logger.warning("%s: %d patients, too few for Table 1 of its own (%d)", name, patients, LEAST_GROUPS)
            del parts[name]
    tables = []
    for name, part in parts.items():
        own, *others = ({p: x[part] for p, x in f.items()} for f in (real, *systems.values()))
        made = dict(zip(systems, others, strict=True))
        rows = fidelity_rows(own, made, groups[part], dict.fromkeys(made, groups[part]), n_boot, seed)
        tables.append(as_table(rows, extractor).assign(subtype=name))
    return pd.concat(tables, ignore_index=True)


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
    rows = []
    for name, features in systems.items():
        auroc = roc_auc_score(*told_apart(real, features, groups, seed)) if several else np.nan
        rows.append((name, extractor, auroc, len(groups)))
    return pd.DataFrame(rows, columns="system extractor auroc n".split())


def told_apart(real: Features, synthetic: Features, groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth (2N,), real nodules (0) before synthetic ones (1), and their scores out of fold; see `separability`."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    cases = Cases(case_features(real), case_features(synthetic), groups, groups).by_patient(seed)
    return cases["y"], cross_val_predict(model, **cases, method="decision_function")


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


def _fid_rows(sets, codes, picks, weights: np.ndarray, plane: str) -> list[Row]:
    """fid of the floor and of every system, half against other half in both directions; fid_whole of every system."""
    floor = _mean_fid(sets, codes, picks[FLOOR], FLOOR, weights)
    m, everything = len(picks[FLOOR][0][0]), {name: np.arange(len(c)) for name, c in codes.items()}
    rows = [Row(FLOOR, "fid", plane, floor[0], floor[1:], m, m, floor)]
    for name in list(sets)[1:]:
        pairs = [(a[i], b[1 - i]) for a, b in zip(picks[FLOOR], picks[name], strict=True) for i in (0, 1)]
        fid = _mean_fid(sets, codes, pairs, name, weights)
        whole = _mean_fid(sets, codes, [(everything[FLOOR], everything[name])], name, weights)
        sizes = len(codes[FLOOR]), len(codes[name])
        rows.append(Row(name, "fid", plane, fid[0], fid[1:], m, m, floor))
        rows.append(Row(name, WHOLE, plane, whole[0], whole[1:], *sizes, np.full_like(floor, np.nan)))
    return rows


def _mean_fid(sets, codes, pairs, name: str, weights: np.ndarray) -> np.ndarray:
    """Mean Fréchet distance of the pairs of (real, other) nodules under weights (K, n_groups), by its influence: (K,)."""
    values, h = [], np.zeros(weights.shape[1])
    for i, j in pairs:
        x, y = sets[FLOOR][i], sets[name][j]
        value, on_x, on_y = frechet(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
        values.append(value)
        np.add.at(h, codes[FLOOR][i], on_x.reshape(x.shape[:2]).sum(1))
        np.add.at(h, codes[name][j], on_y.reshape(y.shape[:2]).sum(1))
    return np.mean(values) + (weights - 1) @ (h / len(values))


def _kernel_rows(sets, codes, splits, weights: np.ndarray, plane: str) -> list[Row]:
    """kid and mmd of every system and of the floor (halves of the real set, averaged over the splits)."""
    n_groups, n_slices = weights.shape[1], sets[FLOOR].shape[1]
    samples = {n: Sample(x.reshape(-1, x.shape[-1]), np.repeat(codes[n], n_slices), n_groups) for n, x in sets.items()}
    real = samples[FLOOR]
    kernels = {"kid": cubic_kernel, "mmd": rbf_kernel(median_distance(real))}
    rows = []
    for metric, kernel in kernels.items():
        within_real = pair_sums(real, real, kernel)
        halves = halves_distance(real, kernel, within_real, weights)
        for name, sample in samples.items():
            if name == FLOOR:
                within, across, masks = within_real, within_real, [(s, ~s) for s in splits]
            else:
                within, across = pair_sums(sample, sample, kernel), pair_sums(real, sample, kernel)
                masks = [(np.ones(n_groups), np.ones(n_groups))]
            parts = [squared_mmd(within_real, within, across, weights * x, weights * y) for x, y in masks]
            value, *draws = np.mean(parts, axis=0)
            rows.append(
                Row(name, metric, plane, float(value), np.array(draws), len(sets[FLOOR]), len(sets[name]), halves)
            )
    return rows


def _with_averages(rows: list[Row]) -> list[Row]:
    """The rows, and the mean over planes of each system and metric (column Avg of Table 1)."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        cells.setdefault((r.system, r.metric), []).append(r)
    averages = [
        replace(cell[0], plane="average", value=float(np.mean([r.value for r in cell])),
                draws=np.mean([r.draws for r in cell], axis=0), halves=np.mean([r.halves for r in cell], axis=0))
        for cell in cells.values()
    ]  # fmt: skip
    return rows + averages
