"""Do the intervals, the tests and the verdicts hold what they promise? ``python -m study simulate``, about a minute.

Data of known truth are drawn many times. `coverage`: how often a 95 % interval holds it. `type_1`: how often a test at .05
rejects what is true. `verdicts`: how often a claim is called supported or contradicted when nothing is behind it, when the
paper's effect is, and with as many nodules as `claims` says it takes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from study.measure import fidelity
from study.measure.roc import delong, paired_runs
from study.measure.statistics import (
    LEVEL,
    Estimate,
    auroc,
    holm,
    mann_whitney,
    mean_interval,
    patient_weights,
    percentile_interval,
    smallest_mann_whitney_p,
    wilson_interval,
)
from study.report.claims import CONTRADICTED, SUPPORTED, Rule, judged, times_needed
from study.report.evidence import Evidence, r2_interval

SIMULATIONS, RESAMPLES, SEED = 600, 400, 0
FIDELITY_SIMULATIONS = 60
RUNS, CELLS = 5, 18  # of Table 3
BASE, GAIN = 0.753, 0.049  # its part-solid AUROC at 10-20 mm, and what synthetic nodules add
SHARE = 0.2  # of positives
SKILL = 0.14  # SD between runs, whence one of .03 in AUROC, as Table 3 prints
SKEW = 0.7  # SD of the logarithm of a skewed measure, about that of the lesions' JSD
Draw = Callable[[np.random.Generator], tuple[Estimate | tuple[float, float], float]]  # an interval and the truth


def all_tables() -> dict[str, pd.DataFrame]:
    """The three tables by name."""
    return {"coverage": coverage(), "type_1": type_1(), "verdicts": verdicts()}


# -- data of known truth -----------------------------------------------------------------------------------------------


def patients(rng: np.random.Generator, n: int, skewed: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """One to three values of each of n patients, alike within a patient; their patients, and the true mean."""
    groups = np.repeat(np.arange(n), rng.integers(1, 4, n))
    z = (rng.normal(size=n)[groups] + rng.normal(size=groups.size)) / np.sqrt(2)
    return (np.exp(SKEW * z), groups, np.exp(SKEW**2 / 2)) if skewed else (z, groups, 0.0)


def two_arms(rng: np.random.Generator, n: int, gain: float, runs: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (n,) and scores (runs, n) of two classifiers with AUROC `BASE` and `BASE` + `gain`, correlated by .5.

    Several runs differ in their skill, by `SKILL` in the distance of the classes, and so in AUROC by about .03.
    """
    labels = np.arange(n) < max(2, round(SHARE * n))
    spread = SKILL if runs > 1 else 0.0
    centre = np.sqrt(2 + spread**2) * stats.norm.ppf([BASE, BASE + gain])  # so that their mean AUROC is as said
    shared = rng.normal(size=n)
    a, b = (
        labels * rng.normal(s, spread, (runs, 1)) + (shared + rng.normal(size=(runs, n))) / np.sqrt(2) for s in centre
    )
    return labels, a, b


def features(rng: np.random.Generator, n: int, shift: float) -> tuple[fidelity.Features, np.ndarray]:
    """One plane of 16 features of n patients with one to three nodules."""
    groups = np.repeat(np.arange(n), rng.integers(1, 4, n))
    x = rng.normal(size=(n, 16))[groups] / np.sqrt(2) + rng.normal(size=(groups.size, 16)) / np.sqrt(2) + shift
    return {"axial": x[:, None]}, groups


# -- coverage ----------------------------------------------------------------------------------------------------------


def coverage() -> pd.DataFrame:
    """interval, n (of the unit that is resampled), coverage and the share that lies below and above the truth."""
    rows = [(f"Wilson, accuracy {p}", n, *_wilson(n, p)) for n in (50, 100, 240) for p in (0.56, 0.66)]
    rows += [(name, n, *_held(draw)) for name, n, draw in _intervals()]
    rows += [row for n in (20, 40) for row in _fidelity(n)]
    return pd.DataFrame(rows, columns="interval n coverage too_high too_low".split())


def _intervals() -> Iterator[tuple[str, int, Draw]]:
    for n in (6, 12, 26, 48, 120):
        yield "mean", n, partial(_mean, n=n, skewed=False)
        yield "mean, skewed", n, partial(_mean, n=n, skewed=True)
    for n in (12, 48):
        yield "mean, skewed (plain percentiles, not used)", n, partial(_mean, n=n, skewed=True, plain=True)
    for n in (16, 36, 100):
        yield "AUROC (percentiles)", n, partial(_auroc, n=n)
        yield "AUROC difference (DeLong)", n, lambda rng, n=n: (_delong(rng, n, GAIN), GAIN)
        yield f"AUROC difference over {RUNS} runs (patients and runs)", n, lambda rng, n=n: (_runs(rng, n, GAIN), GAIN)
    for n in (26, 120):
        yield "R2 (Fisher's z)", n, partial(_r2, n=n)


def _mean(rng: np.random.Generator, n: int, skewed: bool, plain: bool = False) -> tuple:
    values, groups, truth = patients(rng, n, skewed)
    if not plain:
        return mean_interval(values, groups, RESAMPLES, int(rng.integers(2**31))), truth
    weights = patient_weights(groups, RESAMPLES, int(rng.integers(2**31)))
    return percentile_interval(weights @ values / weights.sum(1)), truth


def _auroc(rng: np.random.Generator, n: int) -> tuple:
    labels, scores, _ = two_arms(rng, n, 0)
    draws = auroc(labels, scores[0], patient_weights(np.arange(n), RESAMPLES, int(rng.integers(2**31))))
    return percentile_interval(draws), BASE


def _delong(rng: np.random.Generator, n: int, gain: float) -> Estimate:
    labels, a, b = two_arms(rng, n, gain)
    return delong(labels, a[0], b[0])


def _runs(rng: np.random.Generator, n: int, gain: float) -> Estimate:
    labels, a, b = two_arms(rng, n, gain, RUNS)
    return paired_runs(auroc, labels, a, b, np.arange(n), RESAMPLES, int(rng.integers(2**31)))


def _r2(rng: np.random.Generator, n: int) -> tuple:
    x = rng.normal(size=n)
    return r2_interval(np.corrcoef(x, x + 0.5 * rng.normal(size=n))[0, 1] ** 2, n), 0.8


def _wilson(n: int, p: float) -> tuple[float, float, float]:
    """Exact, over all counts."""
    low, high = np.array([wilson_interval(k, n) for k in range(n + 1)]).T
    chance = stats.binom.pmf(np.arange(n + 1), n, p)
    return chance[(low <= p) & (p <= high)].sum(), chance[low > p].sum(), chance[high < p].sum()


def _held(draw: Draw) -> tuple[float, float, float]:
    rng = np.random.default_rng(SEED)
    pairs = [draw(rng) for _ in range(SIMULATIONS)]
    ends = np.array([(e.ci_low, e.ci_high, t) if isinstance(e, Estimate) else (*e, t) for e, t in pairs])
    above, below = (ends[:, 0] > ends[:, 2]).mean(), (ends[:, 1] < ends[:, 2]).mean()
    return 1 - above - below, above, below


def _fidelity(n: int) -> Iterator[tuple]:
    """FID, KID and MMD of a system that is shifted and of one as real; the truth is their mean over all simulations."""
    found: dict[tuple[str, str], list] = {}
    for i in range(FIDELITY_SIMULATIONS):
        rng = np.random.default_rng((SEED, n, i))
        (real, groups), *made = (features(rng, n, shift) for shift in (0, 0.3, 0))
        names = ("shifted", "as real")
        systems, labels = ({name: x[k] for name, x in zip(names, made, strict=True)} for k in (0, 1))
        for row in fidelity.fidelity_rows(real, systems, groups, labels, 100, i):
            if row.system in names and row.plane == "axial" and row.metric in fidelity.METRICS:
                found.setdefault((row.metric, row.system), []).append((row.value, *percentile_interval(row.draws)))
    for (metric, system), rows in found.items():
        value, low, high = np.array(rows).T
        above, below = (low > value.mean()).mean(), (high < value.mean()).mean()
        yield f"{metric.upper()} of a system {system} (percentiles)", n, 1 - above - below, above, below


# -- tests -------------------------------------------------------------------------------------------------------------


def type_1() -> pd.DataFrame:
    """test, n, how often it rejects a true null hypothesis at .05, and the smallest p that it can give."""
    tests: list[tuple[str, int, Callable, float]] = [
        (f"Mann-Whitney, {n} against {n} runs", n, lambda rng, n=n: mann_whitney(*rng.normal(size=(2, n))), smallest_mann_whitney_p(n, n))
        for n in (3, 5, 10)
    ]  # fmt: skip
    for n in (12, 26, 48):
        tests.append(("mean is 0 (bootstrap-t)", n, lambda rng, n=n: _mean(rng, n, False)[0].p, 2 / (RESAMPLES + 1)))
    for n in (36, 100):
        tests.append(("DeLong", n, lambda rng, n=n: _delong(rng, n, 0).p, 0))
        tests.append((f"AUROC over {RUNS} runs (patients and runs)", n, lambda rng, n=n: _runs(rng, n, 0).p, 2 / (RESAMPLES + 1)))  # fmt: skip
    tests.append((f"any of {CELLS}, DeLong and Holm", 100, lambda rng: holm([_delong(rng, 100, 0).p for _ in range(CELLS)]).min(), 0))  # fmt: skip
    rows = []
    for name, n, test, smallest in tests:
        rng = np.random.default_rng(SEED)
        rows.append((name, n, np.mean([test(rng) <= 1 - LEVEL for _ in range(SIMULATIONS)]), smallest))
    return pd.DataFrame(rows, columns="test n rejected smallest_p".split())


# -- verdicts ----------------------------------------------------------------------------------------------------------


def verdicts() -> pd.DataFrame:
    """Claims of three kinds with nothing, and with the paper's effect, behind them.

    Columns: claim, family (claims judged together), behind (nothing, or the paper's effect), n, supported, contradicted
    (share of claims), any_supported (share of families). The larger n is what `times_needed` makes of the smaller.
    """
    gain = Rule("", "gain in AUROC, one run", "above", "", 0.0, np.nan, "f", (), "")
    less = Rule("", "relative loss of a distance", "below", "", 0.0, np.nan, "f", (), "")
    near = {p: Rule("", f"accuracy {p} is near one half", "near", "", 0.5, 0.25, "f", (), "") for p in (0.66, 0.56)}
    kinds = [  # rule, the paper's effect, what stands for nothing, n, a study, claims together
        (gain, GAIN, 0.0, 36, _gain, 1),
        (gain, GAIN, 0.0, 36, _gain, 9),
        (less, -0.112, 0.0, 71, _less, 1),
        (less, -0.112, 0.0, 71, _less, 4),
        *((rule, p, 0.75, 100, _same, 1) for p, rule in near.items()),
    ]
    rows = []
    for rule, effect, nothing, n, study, family in kinds:
        rng = np.random.default_rng(SEED)
        times = np.median([times_needed(rule, study(rng, n, effect), effect, family) for _ in range(50)])
        for size in (n, int(np.ceil(times * n))):
            for behind, truth in (("nothing", nothing), ("the paper's effect", effect)):
                together = [
                    judged([rule] * family, [study(rng, size, truth) for _ in range(family)], np.full(family, effect))[
                        0
                    ]
                    for _ in range(SIMULATIONS // family)
                ]
                found = np.array(together)
                any_supported = (found == SUPPORTED).any(1).mean()
                rows.append((rule.claim, family, behind, truth, size, (found == SUPPORTED).mean(), (found == CONTRADICTED).mean(), any_supported))  # fmt: skip
    return pd.DataFrame(rows, columns="claim family behind truth n supported contradicted any_supported".split())


def _gain(rng: np.random.Generator, n: int, truth: float) -> Evidence:
    e = _delong(rng, n, truth)
    return Evidence(e.value, e.ci_low, e.ci_high, n=n)


def _less(rng: np.random.Generator, n: int, truth: float) -> Evidence:
    """Differences as a share of the distance, spread as those of KID on `lidc-mini`: +-.04 from 120 nodules."""
    values = rng.normal(truth, 0.2, n)
    e = mean_interval(values, np.arange(n), RESAMPLES, int(rng.integers(2**31)))
    return Evidence(e.value, e.ci_low, e.ci_high, n=n)


def _same(rng: np.random.Generator, n: int, truth: float) -> Evidence:
    right = int(rng.binomial(n, truth))
    return Evidence(right / n, *wilson_interval(right, n), n=n)
