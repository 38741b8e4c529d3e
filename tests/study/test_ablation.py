"""The ablation table: paired, complete, and equal settings made once."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hrldm.insertion.generator import Request
from study import ablation
from study.profiles import get_profile
from study.study import Study
from study.systems.latent import CHANGES
from tests import tiny


@pytest.fixture
def study(tmp_path):
    return Study(get_profile("smoke", ablation__seeds=1, tables__n_boot=200), "test", tmp_path, 0, pd.DataFrame())


def lesions(study, shift: dict[str, float]) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    base = pd.DataFrame({m: rng.random(12) for m in ablation.METRICS})
    base["nodule_id"] = [f"n{i}" for i in range(12)]
    base["patient_id"] = [f"p{i // 2}" for i in range(12)]
    out = {}
    for cell in ablation.cells(study):
        moved = base.copy()
        moved["jsd"] += shift.get(cell.name, 0.0)
        out[cell.name] = moved.sample(frac=1, random_state=1)  # rows in another order must be matched by nodule
    return out


def test_every_factor_starts_at_the_default(study):
    first = {}
    for cell in ablation.cells(study):
        first.setdefault(cell.factor, cell)
    assert all(cell.changes == {} and "(default)" in cell.level for cell in first.values())
    assert len({c.name for c in ablation.cells(study)}) == len(ablation.cells(study))


def test_differences_are_paired(study):
    table = ablation.ablation_table(study, lesions(study, {"lambda: 0": 0.25}))
    row = table[(table["factor"] == "lambda") & (table["level"] == "0") & (table["metric"] == "jsd_difference")].iloc[0]
    # the same shift for every nodule leaves no uncertainty in a paired difference
    assert row["value"] == pytest.approx(0.25)
    assert row["ci_low"] == pytest.approx(0.25) and row["ci_high"] == pytest.approx(0.25)
    still = table[
        table["metric"].str.endswith("_difference") & ~((table["factor"] == "lambda") & (table["level"] == "0"))
    ]
    assert np.allclose(still["value"], 0)


def test_equal_networks_are_made_once_and_a_cell_is_the_mean_of_its_seeds(study, monkeypatch):
    calls, test = [], tiny.patches(study.profile.ablation.n)

    def generator(study, cell, seed):
        calls.append((str(cell.changes), cell.afresh, seed))
        weight = cell.changes.get("histogram__weight", 10.0)
        return lambda request: test.hu + 100.0 * seed + weight + 1000.0 * cell.afresh

    monkeypatch.setattr(ablation, "generator", generator)
    monkeypatch.setattr(ablation, "request_for", lambda *a, **k: None)
    monkeypatch.setattr(ablation, "with_components", lambda request, *_: request)
    monkeypatch.setattr(Study, "places", lambda self, split: (test, test))
    out = ablation.run_ablations(study)
    assert len(calls) == len(set(calls)) < sum(c.seeds for c in ablation.cells(study))
    assert all((frame["system"] == name).all() for name, frame in out.items())
    error = {name: frame["mean_error_hu"].to_numpy() for name, frame in out.items()}
    np.testing.assert_allclose(error["c_hist x L_hist: neither"], 50)  # seeds 0 and 1, lambda 0
    np.testing.assert_allclose(error["lambda: 1"], 1)
    np.testing.assert_allclose(error["lambda: 10 (default)"], 10)
    np.testing.assert_allclose(error["c_hist as: vector (default)"], 1010)  # the same changes, another training
    table = ablation.ablation_table(study, out).set_index(["factor", "level"])["n_seeds"]
    assert set(table["background"]) == set(table["c_hist x L_hist"]) == {2} and set(table["lambda"]) == {1}


def test_a_network_that_is_shown_components_is_asked_with_the_solid_parts(study, monkeypatch):
    n, seen = study.profile.ablation.n, []
    test = tiny.patches(n)
    request = Request(test.hu, test.mask, test.subtype, np.ones((n, 40)) / 40, np.arange(n))
    monkeypatch.setattr(ablation, "request_for", lambda *a, **k: request)
    monkeypatch.setattr(Study, "places", lambda self, split: (test, test))
    monkeypatch.setattr(ablation, "generator", lambda *_: lambda asked: seen.append(asked.core) or test.hu)
    changed = get_profile("smoke", ablation__start="scratch", ablation__seeds=1, tables__n_boot=200)
    study = Study(changed, "test", study.root, 0, pd.DataFrame())
    cells = [c for c in ablation.cells(study) if c.factor == "components of the mask"]
    assert [c.changes for c in cells] == [{}, {"unet__mask_channels": 3}]
    monkeypatch.setattr(ablation, "cells", lambda _: cells)
    ablation.run_ablations(study)
    one, three = seen
    assert one is None and not (three & ~test.mask).any()
    share = three.sum((1, 2, 3)) / test.mask.sum((1, 2, 3))
    assert (share[test.subtype == 0] > 0.9).all() and (share[test.subtype == 2] == 0).all()


def test_all_seeds_of_a_cell_learn_the_latents_that_are_decoded(study, monkeypatch):
    vars(study)["autoencoder"] = own = object()
    used = []

    def unet(self, start, **changes):
        used.append((self.seed, self.autoencoder is own))
        return None, 1.0, self.profile, None

    monkeypatch.setattr(Study, "unet", unet)
    monkeypatch.setattr(ablation, "trained", lambda *_: SimpleNamespace(unet=None))
    made = [ablation.generator(study, ablation.Cell("lambda", "10", {}), seed) for seed in (0, 1, 2)]
    assert used == [(0, True), (1, True), (2, True)] and all(g.autoencoder is own for g in made)


def test_what_the_network_is_shown_is_learnt_afresh_and_shares_the_networks_of_table_1(study, monkeypatch):
    asked = []
    monkeypatch.setattr(Study, "generator", lambda self, start=None, **changes: asked.append((start, changes)))
    monkeypatch.setattr(ablation, "trained", lambda *_: SimpleNamespace(unet="maisi-ddpm"))
    shown = {c.level: c for c in ablation.cells(study) if c.factor == "c_hist as"}
    assert list(shown) == ["vector (default)", "template", "both", "neither"]
    for cell in [*shown.values(), ablation.Cell("lambda", "1", {"histogram__weight": 1.0})]:
        ablation.generator(study, cell, 0)
    starts, changes = zip(*asked, strict=True)
    assert starts == (None, None, None, None, "maisi-ddpm")
    assert [c.pop("ldm__steps") for c in changes] == 4 * [study.profile.ldm.steps] + [study.profile.ablation.steps]
    assert changes[0] == CHANGES["hr-ldm"] and changes[2] == CHANGES["hr-ldm-template"]
    given = [get_profile("smoke", **c).histogram for c in changes[:4]]
    assert [(h.vector, h.template) for h in given] == [(True, False), (False, True), (True, True), (False, False)]
