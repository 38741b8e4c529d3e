"""The simulations themselves: the data have the truth they claim, and the committed tables keep their promises."""

import numpy as np
import pandas as pd
import pytest

from study import simulations
from study.measure.statistics import auroc
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tables():
    return {f.stem: pd.read_csv(f) for f in (ROOT / "results" / "simulations").glob("*.csv")}


def test_planted_data_have_the_truth_they_claim():
    rng = np.random.default_rng(0)
    labels, a, b = simulations.two_arms(rng, 20_000, simulations.GAIN)
    assert auroc(labels[::8], a[0, ::8]) == pytest.approx(simulations.BASE, abs=0.03)
    assert auroc(labels[::8], b[0, ::8]) - auroc(labels[::8], a[0, ::8]) == pytest.approx(simulations.GAIN, abs=0.02)
    _, a, b = simulations.two_arms(rng, 3000, simulations.GAIN, 200)
    one, other = ([auroc(np.arange(3000) < 600, x)[0] for x in s] for s in (a, b))
    assert np.mean(other) - np.mean(one) == pytest.approx(simulations.GAIN, abs=0.025) and np.std(one) == pytest.approx(
        0.03, abs=0.012
    )
    values, _, truth = simulations.patients(rng, 20_000, True)
    assert values.mean() == pytest.approx(truth, rel=0.02)


def test_a_few_draws_give_every_column(monkeypatch):
    monkeypatch.setattr(simulations, "SIMULATIONS", 18)
    monkeypatch.setattr(simulations, "FIDELITY_SIMULATIONS", 1)
    monkeypatch.setattr(simulations, "RESAMPLES", 20)
    made = simulations.all_tables()
    assert all(table.notna().all(axis=None) for table in made.values())
    assert made["coverage"][["coverage", "too_high", "too_low"]].sum(axis=1).to_numpy() == pytest.approx(1)


def test_no_test_rejects_the_truth_more_often_than_it_says(tables):
    rejected = tables["type_1"].set_index("test")["rejected"]
    assert (rejected < 0.05 + 3.5 * np.sqrt(0.05 * 0.95 / simulations.SIMULATIONS)).all(), rejected


def test_planted_nulls_are_not_supported_and_planted_effects_are_at_the_n_it_takes(tables):
    table = tables["verdicts"]
    chance = 3 * np.sqrt(0.05 * 0.95 / simulations.SIMULATIONS)
    assert (table.query("behind == 'nothing'")["any_supported"] < 0.05 + chance * np.sqrt(table["family"].max())).all()
    planted = table.query("behind != 'nothing'")
    assert (planted["contradicted"] < 0.05 + chance).all()
    enough = planted.groupby(["claim", "family", "truth"]).last()
    assert (enough["supported"] > 0.75).all(), enough
