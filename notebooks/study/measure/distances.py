"""Distances between two samples of feature vectors, with what a group bootstrap needs of them.

Fréchet: d = |mu - nu|^2 + tr S + tr T - 2 tr (S T)^(1/2). With A, B the centred samples divided by sqrt(n - 1) and
sqrt(m - 1), the last trace is the nuclear norm of C = A B^T: exact also for n < F and without a matrix root. The shares
of the points in it are l = diag (C C^T)^(1/2), and the influence of point i (derivative with respect to its weight) is

    2 (x_i - mu).(mu - nu) + n |a_i|^2 - tr S - (n l_i - |C|_*).

Kernel: squared MMD = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), every mean over pairs of *different groups*, from
sums K of the Gram matrix and counts P over pairs of groups, so that weights w cost nothing: mean = w^T K w / w^T P w.
Its expectation for two samples of one distribution is zero. What chance alone puts between two halves of the groups is
the bias that leaving out those pairs removes, 4 / G (mean k within a group - mean k between groups).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Sample:
    """Points (n, F) with the group (n,) of each, numbered 0..n_groups - 1 alike in all samples compared."""

    points: np.ndarray
    group: np.ndarray
    n_groups: int


@dataclass(frozen=True)
class PairSums:
    """Kernel sums and pair counts (G, G) over the slices of two groups, zero on the diagonal."""

    kernel: np.ndarray
    pairs: np.ndarray


def frechet(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Squared Fréchet distance of (n, F) and (m, F), and each point's influence divided by n, m; each set sums to 0.

    Raises:
        ValueError: fewer than two points on a side.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"a Fréchet distance needs at least two points a side, got {n} and {m}")
    mu, nu = x.mean(0), y.mean(0)
    a, b = (x - mu) / np.sqrt(n - 1), (y - nu) / np.sqrt(m - 1)
    share_a, share_b = _nuclear_shares(a @ b.T)
    gap, nuclear = mu - nu, share_a.sum()
    size_a, size_b = (a**2).sum(1), (b**2).sum(1)  # their sums are the traces
    value = gap @ gap + size_a.sum() + size_b.sum() - 2 * nuclear
    on_x = 2 * (x - mu) @ gap + n * size_a - size_a.sum() - n * share_a + nuclear
    on_y = -2 * (y - nu) @ gap + m * size_b - size_b.sum() - m * share_b + nuclear
    return float(value), on_x / n, on_y / m


def _nuclear_shares(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals of (C C^T)^(1/2) and (C^T C)^(1/2), by one symmetric eigenproblem (three times faster than an SVD)."""
    if c.shape[0] > c.shape[1]:
        return _nuclear_shares(c.T)[::-1]
    square, u = np.linalg.eigh(c @ c.T)
    keep = square > square[-1] * 1e-14  # what is left out of the trace is below 1e-7 of the largest singular value
    s, u = np.sqrt(square[keep]), u[:, keep]
    return u**2 @ s, (c.T @ u) ** 2 @ (1 / s)


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel of KID (Binkowski et al., 2018): (x.y / F + 1)^3; (n, F), (m, F) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf_kernel(width: float) -> Kernel:
    """exp(-|x - y|^2 / 2 width^2) as a function of (n, F), (m, F)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        square = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return np.exp(-square.clip(0) / (2 * width**2))

    return kernel


def median_distance(sample: Sample) -> float:
    """Median Euclidean distance of points of different groups, from 1000 evenly spaced points where there are more.

    Raises:
        ValueError: all points are the same, so that no kernel width follows.
    """
    keep = np.unique(np.linspace(0, len(sample.points) - 1, min(len(sample.points), 1000)).astype(int))
    different = pdist(sample.group[keep, None].astype(float)) > 0
    median = float(np.median(pdist(sample.points[keep])[different]))
    if not median > 0:
        raise ValueError("the median distance of the real features is 0: they hold no variety to measure against")
    return median


def pair_sums(a: Sample, b: Sample, kernel: Kernel) -> PairSums:
    """Sums of kernel(a, b) over the points of each pair of different groups."""
    in_a, in_b = (np.eye(s.n_groups)[s.group] for s in (a, b))  # (n, G) indicators
    gram, pairs = in_a.T @ kernel(a.points, b.points) @ in_b, np.outer(in_a.sum(0), in_b.sum(0))
    np.fill_diagonal(gram, 0.0)
    np.fill_diagonal(pairs, 0.0)
    return PairSums(gram, pairs)


def squared_mmd(xx: PairSums, yy: PairSums, xy: PairSums, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD (n_draws,) with group weights wx, wy (n_draws, G); NaN where a draw leaves no pair."""

    return _mean(xx, wx, wx) + _mean(yy, wy, wy) - 2 * _mean(xy, wx, wy)


def halves_distance(sample: Sample, kernel: Kernel, within: PairSums, weights: np.ndarray) -> np.ndarray:
    """Expected squared MMD (n_draws,) between two halves of the groups, when pairs of one group are not left out.

    sample, within: points and their `pair_sums` with themselves; weights: (n_draws, G)
    """
    groups = [sample.points[sample.group == g] for g in range(sample.n_groups)]
    squares = np.array([len(x) for x in groups]) ** 2.0
    own = weights @ np.array([kernel(x, x).sum() for x in groups]) / (weights @ squares)
    effective = len(sample.points) ** 2 / squares.sum()  # number of groups, were they of equal size
    return 4 / effective * (own - _mean(within, weights, weights))


def _mean(sums: PairSums, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return ((left @ sums.kernel) * right).sum(1) / ((left @ sums.pairs) * right).sum(1)
