"""Lesion intensities, control and power spectra against closed forms."""

import numpy as np
import pandas as pd
import pytest

from study.measure import intensity as it


def nodules(n: int, per_patient: int = 1) -> pd.DataFrame:
    subtypes = np.array(["solid", "ground-glass"])[np.arange(n) % 2]
    patients = [f"p{i // per_patient}" for i in range(n)]
    return pd.DataFrame({"nodule_id": [f"n{i}" for i in range(n)], "subtype": subtypes, "patient_id": patients})


def crops(n: int, seed: int, mean: float = -300.0, sd: float = 100.0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, sd, (n, side, side, side))


MASK = np.zeros((8, 8, 8), dtype=bool)
MASK[2:6, 2:6, 2:6] = True


def test_wasserstein_of_a_shift_is_the_shift_in_hu():
    values = crops(1, 1).ravel()
    d = it.lesion_distances(values + 50, values)
    assert d["wasserstein_hu"] == pytest.approx(50)
    assert d["mean_hu"] - d["truth_mean_hu"] == pytest.approx(50)
    assert d["sd_hu"] == pytest.approx(d["truth_sd_hu"])
    with pytest.raises(ValueError, match="not empty"):
        it.lesion_distances(values[:0], values)


def test_lesion_table_reads_the_mask_only():
    truth = crops(6, 2)
    obtained = truth + 30.0
    obtained[:, ~MASK] = 3000.0  # outside the lesion nothing counts
    table = it.lesion_table("x", obtained, truth, np.stack([MASK] * 6), nodules(6))
    assert table["wasserstein_hu"].to_numpy() == pytest.approx(np.full(6, 30.0))
    empty = np.stack([MASK] * 5 + [np.zeros_like(MASK)])
    with pytest.raises(ValueError, match="n5.*empty"):
        it.lesion_table("x", obtained, truth, empty, nodules(6))
    with pytest.raises(ValueError, match="do not fit"):
        it.lesion_table("x", obtained[:5], truth, empty, nodules(6))


def test_lesion_histograms_has_the_columns_of_the_design_and_a_floor_below_a_real_difference():
    truth, masks, rows = crops(40, 3), np.stack([MASK] * 40), nodules(40, per_patient=2)
    lesions = pd.concat(
        [
            it.half_lesion_floor(truth, masks, rows, seed=0),
            it.lesion_table("x", crops(40, 4, -200.0), truth, masks, rows),
        ]
    )
    table = it.lesion_histograms(lesions, n_boot=200, seed=0)
    assert list(table.columns) == ["system", "subtype", "metric", "value", "ci_low", "ci_high", "n"]
    assert len(table) == 2 * 3 * 2
    cell = table.set_index(["system", "subtype", "metric"])
    assert (
        cell.loc[("real", "all", "wasserstein_hu"), "ci_high"] < 60 < cell.loc[("x", "all", "wasserstein_hu"), "ci_low"]
    )
    assert cell.loc[("x", "all", "wasserstein_hu"), "value"] == pytest.approx(100, abs=10)
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert cell.loc[("x", "solid", "jsd"), "n"] == 20


def test_paired_difference_pairs_by_nodule():
    truth, masks, rows = crops(30, 5), np.stack([MASK] * 30), nodules(30, per_patient=3)
    offset = np.linspace(10, 200, 30)[:, None, None, None]  # nodules differ far more than the systems do
    near = it.lesion_table("near", truth + offset, truth, masks, rows)
    far = it.lesion_table("far", truth + offset + 5, truth, masks, rows)
    lesions = pd.concat([near, far.sample(frac=1, random_state=0)])
    e = it.paired_difference(lesions, "far", "near", "wasserstein_hu", 300, 0)
    assert (e.value, e.ci_low, e.ci_high) == pytest.approx((-5, -5, -5))
    assert e.n == 30 and e.p == pytest.approx(2 / 301)
    with pytest.raises(ValueError, match="no nodule in common"):
        it.paired_difference(lesions, "far", "absent", "jsd", 10, 0)
    with pytest.raises(ValueError, match="twice"):
        it.paired_difference(pd.concat([lesions, near]), "far", "near", "jsd", 10, 0)


def test_control_recovers_a_known_line():
    rng = np.random.default_rng(6)
    n, masks = 60, np.stack([MASK] * 60)
    wanted = rng.uniform(-700, 50, n)
    requested = np.stack([it.hu_histogram(rng.normal(m, 60, 5000)) for m in wanted])
    obtained = (0.8 * wanted - 40)[:, None, None, None] + rng.normal(0, 60, (n, 8, 8, 8))
    control = it.control_table("x", requested, obtained, masks, nodules(n))
    assert list(control.columns) == it.CONTROL_COLUMNS
    summary = it.control_summary(control).set_index(["subtype", "quantity"])
    line = summary.loc[("all", "mean_hu")]
    assert line["slope"] == pytest.approx(0.8, abs=0.03) and line["intercept"] == pytest.approx(-40, abs=10)
    assert line["r2"] > 0.98 and line["n"] == n
    # against numpy's own least squares
    fit = np.polyfit(control["requested_mean_hu"], control["obtained_mean_hu"], 1)
    assert [line["slope"], line["intercept"]] == pytest.approx(list(fit))


def test_control_with_too_few_nodules_is_empty_not_perfect():
    rows = nodules(2)
    control = it.control_table("x", np.full((2, 40), 1 / 40), crops(2, 7), np.stack([MASK] * 2), rows)
    assert it.control_summary(control)[["slope", "r2"]].isna().all().all()


def test_white_noise_is_flat_at_its_variance_and_a_wave_peaks_at_its_frequency():
    frequency, power = it.power_spectrum(np.random.default_rng(8).normal(0, 20, (32, 32, 32)), spacing_mm=0.5)
    assert frequency[-1] == pytest.approx(1.0) and frequency[0] == pytest.approx(1 / 16)
    assert power[3:].mean() == pytest.approx(400, rel=0.1)
    assert power[8:].max() / power[8:].min() < 1.5
    wave = np.sin(2 * np.pi * np.arange(32) * 6 / 32)[:, None, None] * np.ones((32, 32, 32))
    frequency, power = it.power_spectrum(wave)
    assert frequency[power.argmax()] == pytest.approx(6 / 32)
    with pytest.raises(ValueError, match="cube"):
        it.power_spectrum(np.zeros((8, 8, 4)))
