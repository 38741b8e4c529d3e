"""The model observer finds what is there, finds nothing where nothing is, and the counts add up."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from study.measure import observers as tu
from study.report.published import load_published


def cases(n: int, shift: float, seed: int = 0, groups: np.ndarray | None = None) -> tu.Cases:
    rng = np.random.default_rng(seed)
    groups = np.arange(n) if groups is None else groups
    return tu.Cases(rng.normal(0, 1, (n, 30)), rng.normal(shift, 1, (n, 30)), groups, groups)


def accuracy(table: pd.DataFrame) -> pd.Series:
    out = tu.accuracy_table(table)
    return out[out["quantity"] == "accuracy"].set_index("observer")["value"]


def test_observer_is_at_chance_without_a_difference_and_right_with_one():
    same = tu.turing_table({"cropped": cases(80, 0.0)}, seed=0)
    apart = tu.turing_table({"full_context": cases(80, 0.8)}, seed=0)
    assert list(same.columns) == tu.COLUMNS
    assert accuracy(same).between(0.37, 0.63).all()
    assert (accuracy(apart) > 0.9).all()
    assert (same["called_real"] + same["called_synthetic"] == 80).all()
    assert all(name.startswith("model observer") for name in same["observer"])
    pd.testing.assert_frame_equal(same, tu.turing_table({"cropped": cases(80, 0.0)}, seed=0))


def test_a_patient_never_teaches_the_call_on_itself():
    # patients with a signature of their own and one truth each: an observer that saw the patient would be right
    rng = np.random.default_rng(1)
    signature = rng.normal(0, 5, (20, 40))
    groups_real, groups_synthetic = np.repeat(np.arange(10), 8), np.repeat(np.arange(10, 20), 8)
    x = {k: signature[g] + rng.normal(0, 0.1, (80, 40)) for k, g in (("r", groups_real), ("s", groups_synthetic))}
    table = tu.turing_table({"cropped": tu.Cases(x["r"], x["s"], groups_real, groups_synthetic)}, seed=0)
    assert (accuracy(table) < 0.85).all()


def test_accuracy_of_the_radiologist_as_published():
    out = tu.accuracy_table(load_published("table2_turing")).set_index(["condition", "quantity"])
    cropped = out.loc[("cropped", "accuracy")]
    assert (cropped["value"], cropped["n"]) == (0.66, 100)
    assert (cropped["ci_low"], cropped["ci_high"]) == pytest.approx((0.563, 0.745), abs=1e-3)
    assert out.loc[("full_context", "accuracy"), "value"] == 0.56
    assert out.loc[("full_context", "fooled"), "value"] == 0.44
    assert out.loc[("cropped", "sensitivity_real"), "value"] == 0.72


def test_incomplete_tables_and_misfits_are_named():
    good = cases(10, 0)
    with pytest.raises(ValueError, match="one row for truth real"):
        tu.accuracy_table(load_published("table2_turing").iloc[:1])
    with pytest.raises(ValueError, match="unknown condition"):
        tu.turing_table({"blurred": good}, 0)
    with pytest.raises(ValueError, match="do not fit"):
        dataclasses.replace(good, groups_synthetic=good.groups_real[:9])
    with pytest.raises(ValueError, match="two patients"):
        tu.turing_table({"cropped": cases(10, 0, groups=np.zeros(10, int))}, 0)
    with pytest.raises(ValueError, match="no observer 'nobody'"):
        tu.observer_calls(good, 3, "nobody")


def test_calls_add_up_to_the_table():
    shown, name = cases(36, 0.7, groups=np.repeat([f"p{i}" for i in range(12)], 3)), "model observer (logistic)"
    calls = tu.observer_calls(shown, 3, name)
    table = tu.turing_table({"cropped": shown}, seed=3).query("observer == @name").set_index("truth")
    counted = pd.crosstab(calls.truth, calls.called)
    assert counted.to_numpy().tolist() == table[["called_real", "called_synthetic"]].to_numpy().tolist()
    assert calls.case.tolist() == [*range(36), *range(36)]


def test_tight_crop_shows_the_lesion_and_its_margin_only():
    crop, mask = np.full((2, 20, 20, 20), -900.0), np.zeros((2, 20, 20, 20), dtype=bool)
    mask[0, 12:17, 12:17, 12:17] = mask[1, 4:, 4:, 4:] = True
    crop[mask] = 40.0
    small, large = tu.tight_crops(crop, mask)
    assert small[9, 9, 9] == 40 and small[0, 0, 0] == -900
    # 16 voxels and 2 on each side: no interpolation, and beyond the crop its border repeats
    np.testing.assert_allclose(large, np.pad(crop[1], (0, 2), mode="edge")[2:, 2:, 2:], atol=1e-3)
    with pytest.raises(ValueError, match="case 0.*empty"):
        tu.tight_crops(crop, np.zeros_like(mask))


def test_tight_spacing_is_what_a_ramp_shows():
    masks = np.zeros((2, 40, 40, 40), bool)
    masks[0, 15:24, 18:21, 18:21] = True
    masks[1, 10:30, 10:30, 12:28] = True
    ramp = np.broadcast_to(np.arange(40.0)[:, None, None], masks.shape)
    steps = np.diff(tu.tight_crops(ramp, masks)[:, :, 16, 16], axis=1)
    assert np.allclose(steps, tu.tight_spacing(masks)[:, None], atol=1e-4)


def test_crop_statistics_of_a_ramp():
    ramp = np.broadcast_to(np.arange(32.0)[:, None, None] * 10, (2, 32, 32, 32))
    mean, sd, *percentiles, gradient, sharp = tu.crop_statistics(ramp)[0]
    assert mean == pytest.approx(155) and sd == pytest.approx(10 * np.sqrt((16**2 - 1) / 12))
    assert percentiles == pytest.approx(np.percentile(np.repeat(np.arange(80, 240, 10), 256), [5, 25, 50, 75, 95]))
    assert gradient == pytest.approx(10) and sharp == pytest.approx(10 * 2 / 16)  # at the two edges alone


def test_case_features_put_planes_side_by_side():
    features = {p: np.full((4, 3, 2), i, float) for i, p in enumerate(("axial", "sagittal", "coronal"))}
    x = tu.case_features(features, np.full((4, 9), 7.0))
    assert x.shape == (4, 15) and x[0].tolist() == [0, 0, 1, 1, 2, 2] + [7] * 9
    np.testing.assert_array_equal(tu.case_features(features), x[:, :6])
