"""Lesion intensities, control and power spectra against closed forms."""

import numpy as np
import pandas as pd
import pytest

from hrldm.nodules.patches import Patches
from study.measure import intensity as it


def nodules(n: int, per_patient: int = 1) -> pd.DataFrame:
    subtypes = np.array(["solid", "ground-glass"])[np.arange(n) % 2]
    patients = [f"p{i // per_patient}" for i in range(n)]
    return pd.DataFrame({"nodule_id": [f"n{i}" for i in range(n)], "subtype": subtypes, "patient_id": patients})


def crops(n: int, seed: int, mean: float = -300.0, sd: float = 100.0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, sd, (n, side, side, side))


MASK = np.zeros((8, 8, 8), dtype=bool)
MASK[2:6, 2:6, 2:6] = True


def masks(n: int) -> np.ndarray:
    return np.stack([MASK] * n)


def test_wasserstein_of_a_shift_is_the_shift_in_hu():
    values = crops(1, 1).ravel()
    d = it.lesion_distances(values + 50, values)
    assert d["wasserstein_hu"] == pytest.approx(50)
    assert d["mean_hu"] - d["truth_mean_hu"] == pytest.approx(50)
    assert d["mean_error_hu"] == pytest.approx(50) and d["sd_ratio"] == pytest.approx(1)
    assert d["sd_hu"] == pytest.approx(d["truth_sd_hu"])
    assert it.lesion_distances(values, np.zeros(1))["sd_ratio"] == np.inf
    with pytest.raises(ValueError, match="not empty"):
        it.lesion_distances(values[:0], values)


def test_lesion_table_reads_the_mask_only():
    truth = crops(6, 2)
    obtained = truth + 30.0
    obtained[:, ~MASK] = 3000.0  # outside the lesion nothing counts
    patches = Patches(truth, masks(6), nodules(6))
    table = it.lesion_table("x", obtained, patches)
    assert table["wasserstein_hu"].to_numpy() == pytest.approx(np.full(6, 30.0))
    with pytest.raises(ValueError, match="do not fit"):
        it.lesion_table("x", obtained[:5], patches)
    patches.mask[5] = False
    with pytest.raises(ValueError, match="x, nodule n5.*empty"):
        it.lesion_table("x", obtained, patches)


def test_lesion_histograms_has_the_columns_of_the_design_and_a_floor_below_a_real_difference():
    truth = Patches(crops(40, 3), masks(40), nodules(40, per_patient=2))
    lesions = it.lesion_tables({"x": crops(40, 4, -200.0)}, truth, seed=0)
    table = it.lesion_histograms(lesions, n_boot=200, seed=0)
    assert list(table.columns) == ["system", "subtype", "metric", "value", "ci_low", "ci_high", "n"]
    assert len(table) == 2 * 3 * 2
    cell = table.set_index(["metric", "subtype", "system"]).sort_index()
    floor, x = cell.loc["wasserstein_hu", "all", "real"], cell.loc["wasserstein_hu", "all", "x"]
    assert floor.ci_high < 60 < x.ci_low and x.value == pytest.approx(100, abs=10)
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert cell.n["jsd", "solid", "x"] == 20


def test_a_lesion_of_one_voxel_has_no_floor():
    truth = Patches(crops(3, 3), masks(3), nodules(3))
    truth.mask[1] = False
    truth.mask[1, 4, 4, 4] = True
    assert it.lesion_tables({}, truth, seed=0).nodule_id.tolist() == ["n0", "n2"]


def test_paired_difference_pairs_by_nodule():
    truth = Patches(crops(30, 5), masks(30), nodules(30, per_patient=3))
    offset = np.linspace(10, 200, 30)[:, None, None, None]  # nodules differ far more than the systems do
    near = it.lesion_table("near", truth.hu + offset, truth)
    far = it.lesion_table("far", truth.hu + offset + 5, truth)
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
    n = 60
    wanted = rng.uniform(-700, 50, n)
    requested = np.stack([it.hu_histogram(rng.normal(m, 60, 5000)) for m in wanted])
    obtained = (0.8 * wanted - 40)[:, None, None, None] + rng.normal(0, 60, (n, 8, 8, 8))
    control = it.control_tables([(requested, {"x": obtained})], Patches(obtained, masks(n), nodules(n)), ["x"])
    assert list(control.columns) == it.CONTROL_COLUMNS
    summary = it.control_summary(control).set_index(["subtype", "quantity"])
    line = summary.loc[("all", "mean_hu")]
    assert line["slope"] == pytest.approx(0.8, abs=0.03) and line["intercept"] == pytest.approx(-40, abs=10)
    assert line["r2"] > 0.98 and line["n"] == n
    # against numpy's own least squares
    fit = np.polyfit(control["requested_mean_hu"], control["obtained_mean_hu"], 1)
    assert [line["slope"], line["intercept"]] == pytest.approx(list(fit))


def test_control_with_too_few_nodules_is_empty_not_perfect():
    truth, flat = Patches(crops(2, 7), masks(2), nodules(2)), np.full((2, 40), 1 / 40)
    control = it.control_tables([(flat, {"x": truth.hu})], truth, ["x"])
    assert it.control_summary(control)[["slope", "r2"]].isna().all().all()


def test_white_noise_is_flat_at_its_variance_and_a_wave_peaks_at_its_frequency():
    frequency, power = it.power_spectrum(np.random.default_rng(8).normal(0, 20, (32, 32, 32)))
    assert frequency[-1] == pytest.approx(0.5) and frequency[0] == pytest.approx(1 / 32)
    assert power[3:].mean() == pytest.approx(400, rel=0.1)
    assert power[8:].max() / power[8:].min() < 1.5
    wave = np.sin(2 * np.pi * np.arange(32) * 6 / 32)[:, None, None] * np.ones((32, 32, 32))
    frequency, power = it.power_spectrum(wave)
    assert frequency[power.argmax()] == pytest.approx(6 / 32)
    with pytest.raises(ValueError, match="cube"):
        it.power_spectrum(np.zeros((8, 8, 4)))
