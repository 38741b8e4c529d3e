"""Jobs, caching and tables of Sections 6.3-6.5."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from hrldm.config import changed
from study.classify import differences
from study.classify import jobs as jb
from study.classify import runs as cl
from study.classify import tables as tables
from study.measure.statistics import holm
from study.profiles import get_profile

PROFILE = get_profile(
    "smoke",
    classifier__arch="densenet-tiny",
    classifier__epochs=2,
    classifier__batch=8,
    downstream__folds=2,
    downstream__retention=(1.0, 0.5, 0.0),
    downstream__scarcity_folds=1,
    downstream__beside_folds=1,
)


def data(counts=(12, 6, 4), seed=0, prefix="p", source="", side=32) -> jb.ClassifierData:
    """Balls whose brightness is the label; two nodules a patient."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    grid = np.stack(np.meshgrid(*[np.arange(side) - side / 2] * 3, indexing="ij"))
    inside = np.linalg.norm(grid, axis=0) < 6
    crops = rng.normal(-850, 40, (len(labels), side, side, side))
    crops[:, inside] += np.array([850.0, 550.0, 300.0])[labels][:, None]
    groups = np.array([f"{prefix}{i // 2}" for i in range(len(labels))])
    diameters = np.resize([7.0, 12.0, 25.0], len(labels))
    masks = np.broadcast_to(inside, crops.shape)
    columns = (labels, groups, np.char.add("scan of ", groups), diameters, np.full(len(labels), source, object))
    return jb.ClassifierData(crops.astype(np.int16), masks, *columns)


def made(counts=(6, 3, 3), systems=("hr-ldm", "texture", "transplant", "maisi-ddpm")) -> dict[str, jb.ClassifierData]:
    return {name: data(counts, seed=i + 1, prefix="s", source=name) for i, name in enumerate(systems)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sets():
    return data(), made(), data((6, 6, 6), seed=2, prefix="t")


@pytest.fixture(scope="module")
def subtype_runs(sets, tmp_path_factory):
    jobs = jb.subtype_jobs(sets[0], sets[1], PROFILE, 0)
    cache, jobs = tmp_path_factory.mktemp("runs"), [job for job in jobs if job.arm in (jb.REAL_ONLY, jb.REAL_SYNTH)]
    return cache, jobs, run_in(cache, jobs, *sets)


def run_in(cache: Path, jobs: list[jb.Job], *sets, profile=PROFILE, n_jobs: int = 1) -> list[cl.RunResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRLDM_CACHE", str(cache))
        return cl.run_jobs(jobs, *sets, profile, 0, n_jobs=n_jobs)


def key(job: jb.Job, test="c", profile=PROFILE, seed=0) -> str:
    systems = {recipe.system: recipe.system for recipe in jb.ARMS.values()}
    return cl.run_file(job, "a", systems, test, profile, seed, "cpu").stem


def fake_run(arm, probabilities, retention=1.0, fold=0) -> cl.RunResult:
    made = int(bool(jb.ARMS[arm].system))
    return cl.RunResult(arm, fold, retention, probabilities, 1, 1, 1, made, made, Path("none"), 0.0, [], jb.ARMS[arm])


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_folds_part_patients_and_cover_everything(sets):
    folds = jb.patient_folds(sets[0], 2, 0)
    assert np.array_equal(np.sort(np.concatenate([val for _, val in folds])), np.arange(len(sets[0])))
    for train, val in folds:
        assert not set(sets[0].groups[train]) & set(sets[0].groups[val])


def test_fewer_patients_than_folds_are_a_fold_each_and_one_patient_is_none(sets, caplog):
    data = sets[0]
    two = data.take(np.flatnonzero(np.isin(data.groups, np.unique(data.groups)[:2])))
    folds = jb.patient_folds(two, 50, 0)
    assert [len(np.unique(two.groups[val])) for _, val in folds] == [1, 1]
    assert "2 folds instead of 50" in caplog.text
    with pytest.raises(ValueError, match="of one patient"):
        jb.patient_folds(two.take(np.flatnonzero(two.groups == two.groups[0])), 2, 0)


def test_every_balancing_arm_has_as_many_of_each_subtype_as_of_the_largest(sets):
    real, synthetic, _ = sets
    jobs = jb.subtype_jobs(real, synthetic, PROFILE, 0)
    assert [j.arm for j in jobs] == [
        jb.REAL_ONLY,
        jb.REAL_SYNTH,
        *jb.RULES,
        *jb.BESIDE,
        jb.REAL_ONLY,
        jb.REAL_SYNTH,
        *jb.RULES,
    ]
    for job in jobs:
        recipe, counts = jb.ARMS[job.arm], np.bincount(real.labels[job.real], minlength=3)
        if recipe.system:
            counts += np.bincount(synthetic[recipe.system].labels[job.synthetic], minlength=3)
        else:
            assert len(job.synthetic) == 0
        assert (len(set(counts)) == 1) == bool(recipe.system or recipe.oversampled)
    first = {j.arm: j for j in jobs if j.fold == 0}
    assert np.array_equal(first[jb.REAL_SYNTH].synthetic, first["Real + texture"].synthetic)  # same shapes, same places
    assert set(first["Oversampling"].real) == set(first[jb.REAL_ONLY].real)


def test_synthetic_of_validation_patients_stays_out_by_shape_and_by_place(sets):
    real = sets[0]
    for column, there in (("groups", real.groups), ("places", real.places)):
        related = replace(made()["hr-ldm"], **{column: np.resize(np.unique(there), 12)})
        jobs = [j for j in jb.subtype_jobs(real, made() | {"hr-ldm": related}, PROFILE, 0) if j.arm == jb.REAL_SYNTH]
        assert all(len(job.synthetic) for job in jobs)
        for job in jobs:
            assert not set(getattr(related, column)[job.synthetic]) & set(there[job.validation])


def test_plain_epochs_pass_once_over_the_own_nodules_of_each_arm(sets):
    plain = changed(PROFILE, downstream__equal_updates=False)
    assert {j.steps for j in jb.subtype_jobs(sets[0], sets[1], plain, 0)} == {None}
    assert all(j.steps == 2 for j in jb.subtype_jobs(sets[0], sets[1], PROFILE, 0))  # 11 nodules, batches of 8


def test_draw_repeats_only_when_it_must():
    pool = np.array([4, 7, 9])
    drawn = jb.draw(pool, 7, np.random.default_rng(0))
    assert len(drawn) == 7
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == pool.tolist()
    assert len(jb.draw(pool[:0], 0, np.random.default_rng(0))) == 0
    with pytest.raises(ValueError, match="none exists"):
        jb.draw(pool[:0], 1, np.random.default_rng(0))


def test_retained_subsets_are_nested_and_stratified():
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    index = np.arange(80)
    kept = {f: jb.retain(labels, index, f, np.random.default_rng(5)) for f in (1.0, 0.5, 0.2, 0.1, 0.0)}
    assert np.array_equal(kept[1.0], index)
    for larger, smaller in ((1.0, 0.5), (0.5, 0.2), (0.2, 0.1), (0.1, 0.0)):
        assert set(kept[smaller]) < set(kept[larger])
    assert np.bincount(labels[kept[0.1]]).tolist() == [5, 2, 1]
    assert len(kept[0.0]) == 0


def test_scarcity_has_no_run_without_training_data(sets):
    jobs = jb.scarcity_jobs(sets[0], sets[1], PROFILE, 0)
    assert [(j.arm, j.retention) for j in jobs if j.retention == 0] == [(jb.FULL, 0.0)]
    assert len(jobs) == 5 + 5 + 1
    assert all(len(j.real) + len(j.synthetic) > 0 for j in jobs)
    full = {j.retention: j.synthetic for j in jobs if j.arm == jb.FULL}
    assert all(np.array_equal(full[1.0], f) for f in full.values())
    half = next(j for j in jobs if j.arm == jb.PROPORTIONAL and j.retention == 0.5)
    assert abs(len(half.synthetic) - len(full[1.0]) / 2) <= 1.5


def test_equal_runs_of_two_figures_share_a_key(sets):
    def keys(jobs):
        return {(j.arm, j.retention, j.fold): key(j) for j in jobs}

    subtype = keys(jb.subtype_jobs(sets[0], sets[1], PROFILE, 0))
    scarcity = keys(jb.scarcity_jobs(sets[0], sets[1], PROFILE, 0))
    assert scarcity[jb.CLINICAL, 1.0, 0] == subtype[jb.REAL_ONLY, 1.0, 0]
    assert scarcity[jb.PROPORTIONAL, 1.0, 0] == scarcity[jb.FULL, 1.0, 0]
    trained = {at: stem for at, stem in subtype.items() if at[0] not in jb.RULES}
    assert len(set(trained.values())) == len(trained)


@pytest.mark.parametrize("column", ["groups", "places"])
@pytest.mark.parametrize("where", ["real", *made()])
def test_a_leaked_run_is_refused_by_patient_shape_and_place(sets, tmp_path, where, column):
    """One nodule of a test patient among those that train, or one with the shape or in the scan of a test patient."""
    real, synthetic, test = sets
    leaky = real if where == "real" else synthetic[where]
    values = getattr(leaky, column).copy().astype(object)
    values[-1] = getattr(test, column)[0]
    leaky = replace(leaky, **{column: values})
    real, synthetic = (leaky, synthetic) if where == "real" else (real, synthetic | {where: leaky})
    what = {"groups": "patient", "places": "scan"}[column]
    with pytest.raises(ValueError, match=rf"1 test {what}\(s\) are in the {where} training data"):
        run_in(tmp_path, jb.subtype_jobs(real, synthetic, PROFILE, 0), real, synthetic, test)
    assert not list(tmp_path.iterdir())


def test_synthetic_nodules_may_only_train(sets, tmp_path):
    real, synthetic, _ = sets
    with pytest.raises(ValueError, match="may only train"):
        run_in(tmp_path, [], real, synthetic, data(prefix="t", source="hr-ldm"))


def test_a_mislabelled_arm_is_refused(sets, subtype_runs, tmp_path):
    """An arm that holds what another made, a result under another arm's name, weights of another start."""
    real, synthetic, test = sets
    cache, jobs, runs = subtype_runs
    swapped = synthetic | {"hr-ldm": synthetic["texture"]}
    with pytest.raises(ValueError, match=r"arm 'Real \+ Synth' was trained by Recipe\(system='texture'"):
        run_in(tmp_path, jobs[1:2], real, swapped, test)
    for run, arm in (
        (runs[0], "Oversampling"),
        (runs[0], "Class weights"),
        (runs[1], jb.REAL_ONLY),
        (runs[1], "Real + texture"),
    ):
        with pytest.raises(ValueError, match="was trained by"):
            replace(run, arm=arm)
    mal, mal_test = (jb.malignancy_data(d, np.resize([1.0, 5.0, 3.0, 2.0, 4.0], len(d))) for d in (real, test))
    weights = {(run.arm, run.fold): run.weights for run in runs}
    weights[jb.REAL_SYNTH, 0], weights[jb.REAL_ONLY, 0] = weights[jb.REAL_ONLY, 0], weights[jb.REAL_SYNTH, 0]
    started = [j for j in jb.malignancy_jobs(mal, weights, PROFILE, 0) if j.arm == jb.BALANCED and j.fold == 0]
    with pytest.raises(ValueError, match="start='Real only'"):
        run_in(cache, started, mal, {}, mal_test)


def test_a_rule_needs_no_network_and_knows_its_own_column(sets, tmp_path):
    real, synthetic, test = sets
    jobs = [j for j in jb.subtype_jobs(real, synthetic, PROFILE, 0) if j.arm in jb.RULES and j.fold == 0]
    by_size, by_hu = run_in(tmp_path, jobs, *sets)
    assert not list(tmp_path.iterdir()) and (by_size.arm, by_hu.arm) == (jb.DIAMETER, jb.MEAN_HU)
    np.testing.assert_allclose(by_size.probabilities.sum(1), 1)
    assert (by_hu.probabilities.argmax(1) == test.labels).mean() > 0.95  # brightness is the label
    assert len(np.unique(by_size.probabilities.round(9), axis=0)) == 3  # three diameters, no more


def test_bad_data_is_refused(sets):
    with pytest.raises(ValueError, match="differ in length"):
        replace(sets[0], labels=sets[0].labels[:-1])
    with pytest.raises(ValueError, match="NaN"):
        replace(sets[0], crops=np.full(sets[0].crops.shape, np.nan, np.float32))
    with pytest.raises(ValueError, match="smaller than"):
        jb.centre_crop(sets[0].crops, 33)


def test_centre_crop_keeps_the_centre_voxel():
    crops = np.zeros((1, 41, 41, 41))
    crops[0, 20, 20, 20] = 1
    assert jb.centre_crop(crops, 32)[0, 16, 16, 16] == 1
    crops = np.zeros((1, 40, 40, 40))
    crops[0, 20, 20, 20] = 1
    assert jb.centre_crop(crops, 32)[0, 16, 16, 16] == 1


def test_malignancy_leaves_out_the_indeterminate(sets):
    ratings = np.resize([1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0], len(sets[0]))
    kept = jb.malignancy_data(sets[0], ratings)
    assert len(kept) == ((ratings <= 2) | (ratings >= 4)).sum()
    assert kept.labels.tolist() == [int(r >= 4) for r in ratings if r <= 2 or r >= 4]


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_cached(sets, subtype_runs):
    cache, jobs, first = subtype_runs
    again = run_in(cache, jobs, *sets)
    assert all(r.seconds == 0 for r in again)
    assert all(r.seconds > 0 for r in first)
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(first, again, strict=True))
    assert [(r.arm, r.fold) for r in first] == [(j.arm, j.fold) for j in jobs]
    assert all(r.probabilities.shape == (len(sets[2]), 3) for r in first)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(sets, subtype_runs, tmp_path):
    _, jobs, first = subtype_runs
    parallel = run_in(tmp_path, jobs[:2], *sets, n_jobs=2)
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(first[:2], parallel, strict=True))


def test_other_data_or_settings_are_other_runs(sets, subtype_runs):
    _, jobs, _ = subtype_runs
    same, job = key(jobs[1]), jobs[1]
    others = ({"test": "x"}, {"profile": changed(PROFILE, classifier__lr=0.5)}, {"seed": 1})
    assert same not in {key(job, **other) for other in others}
    assert same == key(job, profile=changed(PROFILE, ldm__lr=0.5, name="other"))
    other = replace(sets[0], crops=sets[0].crops + np.int16(1))
    assert other.digest() != sets[0].digest()


def test_malignancy_starts_from_the_subtype_runs(sets, subtype_runs):
    cache, _, runs = subtype_runs
    real, _, test = sets
    ratings = np.resize([1.0, 5.0, 3.0, 2.0, 4.0], len(real))
    weights = {(run.arm, run.fold): run.weights for run in runs}
    jobs = jb.malignancy_jobs(jb.malignancy_data(real, ratings), weights, PROFILE, 0)
    started = {arm: arm in (jb.IMBALANCED, jb.BALANCED) for arm in (jb.SCRATCH, jb.IMBALANCED, jb.BALANCED, *jb.RULES)}
    assert {j.arm: j.init is not None for j in jobs} == started
    mal_test = jb.malignancy_data(test, np.resize([1.0, 5.0], len(test)))
    mal = jb.malignancy_data(real, ratings)
    results = run_in(cache, jobs, mal, {}, mal_test)
    table = tables.malignancy_table(results, mal_test, 0, 50)
    assert table.columns.tolist() == ["arm", "auroc", "ci_low", "ci_high", "n_runs", "n_patients"]
    assert table.arm.tolist() == [jb.SCRATCH, jb.IMBALANCED, jb.BALANCED, *jb.RULES]
    first = {r.arm: r.history[0]["train_loss"] for r in results if r.fold == 0 and r.history}
    assert len(set(first.values())) == 3
    with pytest.raises(ValueError, match="no subtype run"):
        jb.malignancy_jobs(mal, {}, PROFILE, 0)


@pytest.mark.slow
def test_killed_runs_go_on_where_they_were(sets, tmp_path):
    """kill -9 in the middle of a run; the next call ends in the same predictions as one that was left alone."""
    profile = changed(PROFILE, classifier__epochs=5)
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_classification import *
sets = data(), made(), data((6, 6, 6), seed=2, prefix="t")
profile = changed(PROFILE, classifier__epochs=5)
jobs = jb.subtype_jobs(sets[0], sets[1], profile, 0)[:1]
run_in(Path({str(tmp_path / "a")!r}), jobs, *sets, profile=profile)
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while (
            not list(tmp_path.glob("a/classifiers/[!.]*.epoch"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        process.kill()
    assert list(tmp_path.glob("a/classifiers/[!.]*.epoch")), "killed too late to be a test"
    jobs = jb.subtype_jobs(sets[0], sets[1], profile, 0)[:1]
    resumed, whole = (run_in(tmp_path / name, jobs, *sets, profile=profile)[0] for name in "ab")
    assert np.array_equal(resumed.probabilities, whole.probabilities)
    assert json.dumps(resumed.history) == json.dumps(whole.history)
    assert not list(tmp_path.glob("a/classifiers/*.epoch"))


# -- metrics and tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 8])  # 1: many ties
def test_metrics_equal_scikit_learn_with_weights(decimals):
    rng = np.random.default_rng(0)
    labels = rng.random(80) < 0.3
    scores = (rng.random(80) + 0.4 * labels).round(decimals)
    weights = rng.integers(0, 4, (6, 80)).astype(float)
    for ours, theirs in ((tables.auroc, roc_auc_score), (tables.auprc, average_precision_score)):
        np.testing.assert_allclose(ours(labels, scores), [theirs(labels, scores)], atol=1e-12)
        expected = [theirs(labels, scores, sample_weight=w) for w in weights]
        np.testing.assert_allclose(ours(labels, scores, weights), expected, atol=1e-12)


@pytest.mark.parametrize("metric", [tables.auroc, tables.auprc])
def test_a_single_class_has_no_value(metric):
    for labels in (np.ones(5, bool), np.zeros(5, bool), np.zeros(0, bool)):
        assert np.isnan(metric(labels, np.arange(len(labels)))).all()


def test_patient_bootstrap_draws_whole_patients():
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    w = tables.patient_weights(groups, 500, 0)
    assert (w[:, 0] == w[:, 1]).all()
    assert (w[:, [0, 2, 3]].sum(1) == 3).all()
    np.testing.assert_allclose(w.mean(0), 1, atol=0.15)


def scores_for(test, quality, seed):
    rng = np.random.default_rng(seed)
    p = np.exp(rng.normal(0, 1, (len(test), 3)) + quality * np.eye(3)[test.labels])
    return p / p.sum(1, keepdims=True)


def test_table3_has_its_columns_and_sees_a_real_gain():
    test = data((60, 60, 60), prefix="t", side=2)
    runs = [fake_run(jb.REAL_ONLY, scores_for(test, 0.5, s), fold=s) for s in range(5)]
    runs += [fake_run(jb.REAL_SYNTH, scores_for(test, 4.0, s + 9), fold=s) for s in range(5)]
    table = tables.subtype_table(runs, test, 0, 400)
    assert table.columns.tolist() == (
        [
            "metric",
            "size_mm",
            "subtype",
            "arm",
            "mean",
            "sd",
            "n_runs",
            "n_patients",
            "n_positive",
            "p_mann_whitney",
            "p_bootstrap",
        ]
    )
    assert len(table) == 2 * 3 * 3 * 2
    assert set(table.size_mm) == {"6-10", "10-20", "20-30"}
    tested = table[table.arm == jb.REAL_SYNTH]
    np.testing.assert_allclose(tested.p_mann_whitney, 0.00794, atol=1e-5)  # exact two-sided minimum, 5 against 5
    assert (tested.p_bootstrap < 0.1).all()  # 18 cells: Holm times 2/401
    assert (tested.p_bootstrap >= 18 * 2 / 401 - 1e-9).all()
    assert table[table.arm == jb.REAL_ONLY][["p_mann_whitney", "p_bootstrap"]].isna().all(axis=None)
    inside = test.diameters == 12.0
    cell = "metric == 'auroc' and size_mm == '10-20' and subtype == 'part-solid' and arm == 'Real only'"
    row = table.query(cell).iloc[0]
    expected = [roc_auc_score(test.labels[inside] == 1, r.probabilities[inside, 1]) for r in runs[:5]]
    assert row["mean"] == pytest.approx(np.mean(expected))
    assert row["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert row["n_patients"] == len(set(test.groups[inside]))


def test_table3_and_its_differences_give_one_p():
    """Of patients and runs: runs that lie far apart decide nothing, however many nodules there are."""
    test = data((60, 60, 60), prefix="t", side=2)
    runs = [fake_run(jb.REAL_ONLY, scores_for(test, 4.0 * (s % 2), s), fold=s) for s in range(5)]
    runs += [fake_run(jb.REAL_SYNTH, scores_for(test, 4.0, s + 9), fold=s) for s in range(5)]
    table, pairs = tables.subtype_table(runs, test, 0, 400), differences.subtype_differences(runs, test, 0, 400)
    tested = table[table.arm == jb.REAL_SYNTH]
    np.testing.assert_allclose(tested.p_bootstrap, holm(pairs.p.to_numpy()))
    assert (tested.p_bootstrap > 0.2).all()


def test_table3_tests_an_arm_of_few_folds_against_the_same_folds_and_in_a_family_of_its_own():
    test = data((60, 60, 60), prefix="t", side=2)
    runs = [fake_run(jb.REAL_ONLY, scores_for(test, 0.5 if s else 4.0, s), fold=s) for s in range(5)]
    runs += [fake_run(jb.REAL_SYNTH, scores_for(test, 4.0, s + 9), fold=s) for s in range(5)]
    alone = tables.subtype_table(runs, test, 0, 400)
    runs.append(fake_run("Oversampling", runs[0].probabilities, fold=0))  # as good as Real only of that fold
    table = tables.subtype_table(runs, test, 0, 400)
    assert (table[table.arm == "Oversampling"].p_bootstrap == 1).all()
    kept = table[table.arm != "Oversampling"].reset_index(drop=True)
    assert kept.equals(alone)  # the paper's comparison does not pay for ours


def test_table3_equal_arms_are_not_different_and_empty_cells_are_nan():
    test = data((60, 60, 0), prefix="t", side=2)
    p = [scores_for(test, 1.0, s) for s in range(3)]
    runs = [fake_run(arm, q) for arm in (jb.REAL_ONLY, jb.REAL_SYNTH) for q in p]
    table = tables.subtype_table(runs, test, 0, 100)
    ggn = table[table.subtype == "ground-glass"]
    assert ggn[["mean", "sd", "p_mann_whitney", "p_bootstrap"]].isna().all(axis=None)
    assert (ggn.n_patients > 0).all()
    assert (ggn.n_runs == 3).all()
    rest = table[(table.subtype != "ground-glass") & (table.arm == jb.REAL_SYNTH)]
    assert (rest.p_bootstrap == 1).all()
    assert (rest.p_mann_whitney == 1).all()


def test_scarcity_keeps_impossible_cells_as_nan():
    test = data((20, 20, 20), prefix="t", side=2)
    runs = [fake_run(jb.FULL, scores_for(test, 2.0, 0), retention=0.0), fake_run(jb.CLINICAL, scores_for(test, 2.0, 1))]
    table = tables.scarcity_table(runs, test, (1.0, 0.0), 0, 100)
    assert table.columns.tolist() == ["subtype", "metric", "retention", "arm", "mean", "ci_low", "ci_high", "n_runs"]
    assert len(table) == 3 * 2 * 2 * 5
    nothing = table.query(f"retention == 0 and arm == {jb.CLINICAL!r}")
    assert nothing["mean"].isna().all()
    assert (nothing.n_runs == 0).all()
    kept = table.query(f"retention == 0 and arm == {jb.FULL!r}")
    assert ((kept.ci_low <= kept["mean"]) & (kept["mean"] <= kept.ci_high)).all()


def test_curves_go_with_the_areas():
    test = data((40, 40, 40), prefix="t", side=2)
    runs = [fake_run(jb.REAL_ONLY, scores_for(test, 1.0, s)) for s in range(3)]
    pr = tables.pr_curves(runs, test).query("subtype == 'part-solid' and size_mm == '10-20'")
    inside = test.diameters == 12.0
    average = np.mean([average_precision_score(test.labels[inside] == 1, r.probabilities[inside, 1]) for r in runs])
    assert pr.precision.mean() == pytest.approx(average, abs=0.03)
    binary = replace(test, labels=(test.labels > 0).astype(int))
    runs = [fake_run(jb.SCRATCH, scores_for(binary, 1.0, s)[:, :2]) for s in range(3)]
    roc = tables.roc_curves(runs, binary)
    area = np.mean([roc_auc_score(binary.labels, r.probabilities[:, 1]) for r in runs])
    assert np.trapezoid(roc.tpr, roc.fpr) == pytest.approx(area, abs=0.02)


def test_test_nodules_of_one_class_or_none_give_empty_cells_and_no_curve():
    test = data((40, 0, 0), prefix="t", side=2)
    runs = [fake_run(arm, scores_for(test, 1.0, 0)) for arm in (jb.REAL_ONLY, jb.REAL_SYNTH)]
    table = tables.subtype_table(runs, test, 0, 20)
    assert table["mean"].isna().all() and table.p_bootstrap.isna().all() and (table.n_runs == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning names files of the machine, and notebooks are published
        assert tables.pr_curves(runs, test).empty
    binary = replace(test, labels=np.ones(40, int))
    runs = [fake_run(jb.SCRATCH, scores_for(binary, 1.0, 0)[:, :2])]
    assert tables.roc_curves(runs, binary).empty
    assert tables.malignancy_table(runs, binary, 0, 20).auroc.isna().all()
    none = tables.malignancy_table([], binary.take(np.zeros(40, bool)), 0, 20)
    assert none.auroc.isna().all() and (none.n_runs == 0).all() and (none.n_patients == 0).all()


def test_a_subtype_without_synthetic_nodules_is_left_as_it_is(sets):
    real, synthetic, _ = sets
    part = {name: nodules.take(nodules.labels != 2) for name, nodules in synthetic.items()}
    for job in jb.subtype_jobs(real, part, PROFILE, 0):
        if job.arm == jb.REAL_SYNTH:
            added = np.bincount(part["hr-ldm"].labels[job.synthetic], minlength=3)
            counts = np.bincount(real.labels[job.real], minlength=3) + added
            assert counts[0] == counts[1] > counts[2]
    full = next(j for j in jb.scarcity_jobs(real, part, PROFILE, 0) if j.arm == jb.FULL and j.retention == 0)
    assert np.bincount(part["hr-ldm"].labels[full.synthetic], minlength=3)[2] == 0 and len(full.synthetic)
    none = {name: nodules.take(np.zeros(len(nodules), bool)) for name, nodules in synthetic.items()}
    assert all(not len(j.synthetic) for j in jb.subtype_jobs(real, none, PROFILE, 0))
