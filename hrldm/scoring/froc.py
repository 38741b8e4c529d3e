"""Free-response ROC as LUNA16 computes it (Setio et al., Med Image Anal 42:1, 2017), with intervals.

A prediction nearer to a nodule's centre than its radius is a hit. A nodule has the best score of its hits; the others count
neither way. Every other prediction is a false positive. Equal scores are one threshold; between thresholds the curve is
straight, beyond the last one flat. The mean sensitivity at `RATES` is LUNA16's CPM.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives a scan
DRAWS, BOOTSTRAP_SEED = 1000, 0
FACTORS = ["subtype", "size", "lobe", "attachment"]
POINT = ["x", "y", "z"]


def judge(places: pd.DataFrame, predictions: pd.DataFrame, radius_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best score (n,) of the predictions nearer to each place than its radius, -inf without one, and whether each
    prediction (m,) is near none. places, predictions: scan, x, y, z in mm; predictions also score."""
    best, alone = np.full(len(places), -np.inf), np.ones(len(predictions), bool)
    of = predictions.groupby("scan").indices
    points, score = predictions[POINT].to_numpy(), predictions["score"].to_numpy()
    for i, (scan, place, radius) in enumerate(zip(places["scan"], places[POINT].to_numpy(), radius_mm, strict=True)):
        rows = of.get(scan, np.zeros(0, int))
        hits = rows[np.linalg.norm(points[rows] - place, axis=1) < radius]
        alone[hits], best[i] = False, score[hits].max(initial=-np.inf)
    return best, alone


class Curve:
    """The FROC of scans, and of resamples of them.

    nodules: scan and score, of the best hit, -inf without one; wrong: scan and score of each false positive
    """

    def __init__(self, nodules: pd.DataFrame, wrong: pd.DataFrame, n_scans: int) -> None:
        found = nodules[np.isfinite(nodules["score"])]
        events = pd.concat([part[["scan", "score"]].assign(hit=hit) for part, hit in ((found, True), (wrong, False))])
        events = events.sort_values("score", ascending=False)
        self.scan, self.hit = events["scan"].to_numpy(int), events["hit"].to_numpy(bool)
        self.last = np.flatnonzero(np.diff(events["score"], append=-np.inf))  # of equal scores
        self.threshold = np.r_[np.inf, events["score"].to_numpy()[self.last]]
        self.nodules = np.bincount(nodules["scan"], minlength=n_scans)

    def points(self, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """False positives a scan and sensitivity at each threshold, from infinity on. weight: how often a scan counts."""
        weight = np.ones(len(self.nodules)) if weight is None else weight
        hits, wrong = (np.cumsum(weight[self.scan] * kind)[self.last] for kind in (self.hit, ~self.hit))
        return np.r_[0, wrong] / weight.sum(), np.r_[0, hits] / (weight @ self.nodules)

    def operating_point(self, most: float) -> float:
        """Lowest score with at most `most` false positives a scan; inf if there is none."""
        return float(self.threshold[np.flatnonzero(self.points()[0] <= most)[-1]])

    def table(self) -> pd.DataFrame:
        """Sensitivity at each of `RATES`, and their mean, with 95 % percentile intervals by bootstrap over scans; one scan
        has none."""
        n, rng, drawn = len(self.nodules), np.random.default_rng(BOOTSTRAP_SEED), []
        while n > 1 and len(drawn) < DRAWS:
            weight = rng.multinomial(n, np.full(n, 1 / n))
            if weight @ self.nodules:  # not negatives alone
                drawn.append(np.interp(RATES, *self.points(weight)))
        value, drawn = np.interp(RATES, *self.points()), np.reshape(drawn, (-1, len(RATES)))
        value, drawn = np.r_[value, value.mean()], np.c_[drawn, drawn.mean(axis=1)]
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0) if n > 1 else np.full((2, len(value)), np.nan)
        rate = [*(f"{rate:g}" for rate in RATES), "mean"]
        return pd.DataFrame({"rate": rate, "sensitivity": value, "ci_low": low, "ci_high": high})


def sensitivity(nodules: pd.DataFrame) -> pd.DataFrame:
    """Share found in each group of `FACTORS` and of their crossings, with Wilson's 95 % interval. nodules: also found."""
    tables = []
    for factors in (some for n in range(len(FACTORS) + 1) for some in combinations(FACTORS, n)):
        groups = nodules.assign(**{name: "all" for name in FACTORS if name not in factors}).groupby(FACTORS)["found"]
        tables.append(groups.agg(n="size", found="sum").reset_index())
    out = pd.concat(tables, ignore_index=True)
    wilson = [binomtest(k, n).proportion_ci(method="wilson") for k, n in zip(out["found"], out["n"], strict=True)]
    return out.assign(sensitivity=out["found"] / out["n"]).join(pd.DataFrame(wilson, columns=["ci_low", "ci_high"]))
