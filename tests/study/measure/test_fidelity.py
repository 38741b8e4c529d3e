"""FID, KID and MMD against torchmetrics and closed forms; their intervals against Monte Carlo."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from study.measure import distances as di
from study.measure import fidelity as fi


class Identity(torch.nn.Module):
    num_features = 12

    def forward(self, x):
        return x


def draw(seed: int, n: int, mean: float = 0.0, scale: float = 1.0, f: int = 12, slices: int | None = None):
    shape = (n, f) if slices is None else (n, slices, f)
    return np.random.default_rng(seed).normal(mean, scale, shape)


def planes(seed: int, n: int = 40, mean: float = 0.0, slices: int = 3, f: int = 12) -> dict[str, np.ndarray]:
    return {p: draw(seed + i, n, mean, f=f, slices=slices) for i, p in enumerate(("axial", "sagittal", "coronal"))}


def test_fid_equals_torchmetrics():
    x, y = draw(0, 200), draw(1, 150, 0.3, 1.5)
    metric = FrechetInceptionDistance(feature=Identity(), normalize=True).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert di.frechet(x, y)[0] == pytest.approx(metric.compute().item(), rel=1e-6)


def test_fid_with_fewer_points_than_dimensions_equals_the_matrix_root():
    x, y = draw(2, 20, f=30), draw(3, 25, 0.5, f=30)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    # (S T)^(1/2) has the trace of (S^(1/2) T S^(1/2))^(1/2), which is symmetric and safe at low rank
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b @ root).clip(0)
    expected = gap @ gap + np.trace(a) + np.trace(b) - 2 * np.sqrt(inner).sum()
    assert di.frechet(x, y)[0] == pytest.approx(expected, rel=1e-5)
    assert di.frechet(y, x)[0] == pytest.approx(expected, rel=1e-5)


def test_influence_is_the_derivative_of_fid_with_respect_to_a_points_weight():
    x, y = draw(5, 60, f=5), draw(6, 50, 0.4, f=5)
    value, on_x, on_y = di.frechet(x, y)
    assert on_x.sum() == pytest.approx(0, abs=1e-9) and on_y.sum() == pytest.approx(0, abs=1e-9)

    def weighted(w):  # FID with weights on x, scaled as frechet scales it at equal weights
        p = w / w.sum()
        mu = p @ x
        s = ((x - mu) * p[:, None]).T @ (x - mu) * 60 / 59
        t, gap = np.cov(y, rowvar=False), mu - y.mean(0)
        return gap @ gap + np.trace(s) + np.trace(t) - 2 * np.sqrt(np.linalg.eigvals(s @ t).real).sum()

    step = np.zeros(60)
    step[7] = 1e-5
    slope = (weighted(np.ones(60) + step) - weighted(np.ones(60) - step)) / 2e-5
    assert weighted(np.ones(60)) == pytest.approx(value)
    assert on_x[7] == pytest.approx(slope, rel=1e-3)


def test_kid_equals_torchmetrics_when_every_point_is_its_own_group():
    x, y = draw(7, 80), draw(8, 80, 0.2)
    a, b = di.Sample(x, np.arange(80), 160), di.Sample(y, np.arange(80, 160), 160)
    sums = [di.pair_sums(s, t, di.cubic_kernel) for s, t in ((a, a), (b, b), (a, b))]
    ones = np.ones((1, 160))
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=80, normalize=True)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert di.squared_mmd(*sums, ones, ones)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_mmd_of_two_gaussians_has_its_closed_form_on_average():
    n, shift, width = 150, 1.5, 1.2
    found = []
    for i in range(40):
        a = di.Sample(draw(i, n, f=1), np.arange(n), n)
        b = di.Sample(draw(1000 + i, n, shift, f=1), np.arange(n), n)
        sums = [di.pair_sums(s, t, di.rbf_kernel(width)) for s, t in ((a, a), (b, b), (a, b))]
        found.append(di.squared_mmd(*sums, np.ones((1, n)), np.ones((1, n)))[0])
    spread = width**2 + 2  # E exp(-(X - Y)^2 / 2 w^2) for X - Y ~ N(shift, 2)
    expected = 2 * width / np.sqrt(spread) * (1 - np.exp(-(shift**2) / (2 * spread)))
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(40))
    assert np.std(found) < 0.1


def test_pairs_of_one_group_do_not_count():
    group = np.repeat(np.arange(5), 2)
    x = draw(11, 10)
    sums = di.pair_sums(di.Sample(x, group, 5), di.Sample(x, group, 5), di.cubic_kernel)
    gram = di.cubic_kernel(x, x)
    expected = gram[group[:, None] != group].mean()
    assert sums.kernel.sum() / sums.pairs.sum() == pytest.approx(expected)


def test_table_has_the_columns_of_the_design_and_orders_damage():
    real, groups = planes(0), np.arange(40)
    systems = {"copy": planes(100), "off": planes(200, mean=0.5), "far": planes(300, mean=1.5)}
    table = fi.as_table(
        fi.fidelity_rows(real, systems, groups, dict.fromkeys(systems, groups), n_boot=50, seed=0), "test"
    )
    assert list(table.columns) == "system extractor metric plane value ci_low ci_high n_real n_synthetic".split()
    assert len(table) == 4 * 3 * 4 and set(table["extractor"]) == {"test"}
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    average = table[table["plane"] == "average"].set_index(["metric", "system"])["value"]
    for metric in fi.METRICS:
        assert average[metric, "off"] < average[metric, "far"]
        assert average[metric, "copy"] < average[metric, "off"]
        mean = table.query("metric == @metric and system == 'off' and plane != 'average'")["value"].mean()
        assert average[metric, "off"] == pytest.approx(mean)
    fid = table[table["metric"] == "fid"]
    assert set(fid["n_real"]) == set(fid["n_synthetic"]) == {20}  # the same number of nodules for every system
    again = fi.as_table(
        fi.fidelity_rows(real, systems, groups, dict.fromkeys(systems, groups), n_boot=50, seed=0), "test"
    )
    assert table.equals(again)


def test_a_perfect_generator_scores_as_the_floor_even_on_the_same_patients():
    real, groups = planes(0, n=60), np.arange(60)
    rng = np.random.default_rng(5)
    twin = {p: x + rng.normal(0, 1e-3, x.shape) for p, x in real.items()}  # paired: each nodule almost copied
    rows = fi.fidelity_rows(real, {"twin": twin}, groups, {"twin": groups}, n_boot=20, seed=1)
    value = {(r.system, r.metric): r for r in rows if r.plane == "average"}
    assert value["twin", "fid"].value == pytest.approx(value["real", "fid"].value, rel=0.05)
    assert abs(value["twin", "kid"].value) < 0.01 and abs(value["real", "kid"].value) < 0.05


def test_differences_are_paired():
    real, groups = planes(0), np.arange(40)
    off = planes(200, mean=0.5)
    systems = {"a": off, "b": {p: x + 0.05 for p, x in off.items()}}
    rows = fi.fidelity_rows(real, systems, groups, dict.fromkeys(systems, groups), n_boot=200, seed=0)
    paired = fi.fidelity_difference(rows, "a", "b").set_index(["metric", "plane"])
    single = fi.as_table(rows, "x").query("system == 'a'").set_index(["metric", "plane"])
    assert (paired["ci_low"] > 0).all() and (paired["p"] < 0.02).all()
    width = (paired["ci_high"] - paired["ci_low"]) / (single["ci_high"] - single["ci_low"])
    assert (width < 0.5).all()
    with pytest.raises(ValueError, match="no such system"):
        fi.fidelity_difference(rows, "a", "c")


@pytest.mark.parametrize("metric", ["fid", "mmd"])
def test_intervals_have_the_width_of_repeated_experiments(metric):
    values, widths = [], []
    for i in range(40):
        real, other = {"axial": draw(i, 40, slices=2)}, {"x": {"axial": draw(1000 + i, 40, 0.5, slices=2)}}
        rows = fi.fidelity_rows(real, other, np.arange(40), {"x": np.arange(40)}, n_boot=100, seed=i)
        row = next(r for r in rows if (r.system, r.metric, r.plane) == ("x", metric, "axial"))
        values.append(row.value)
        widths.append(row.draws.std())
    assert 0.7 < np.mean(widths) / np.std(values) < 1.6


def test_groups_of_several_nodules_widen_the_interval():
    x, y = draw(0, 60, slices=2), draw(1, 60, 0.5, slices=2)
    for a in (x, y):
        a[1::2] = a[::2]  # the second nodule of each patient copies the first
    options = {"n_boot": 300, "seed": 0}

    def width(groups):
        rows = fi.fidelity_rows({"axial": x}, {"s": {"axial": y}}, groups, {"s": groups}, **options)
        return {r.metric: r.draws.std() for r in rows if r.system == "s" and r.plane == "axial"}

    single, paired = width(np.arange(60)), width(np.arange(60) // 2)
    assert all(paired[m] > 1.2 * single[m] for m in ("kid", "mmd"))


def test_systems_on_other_patients_and_of_other_size_are_compared_at_equal_n():
    real = planes(0, n=40)
    systems = {"few": planes(100, n=24), "other": planes(200, n=60)}
    groups = {"few": np.arange(24), "other": np.array([f"q{i}" for i in range(60)])}
    table = fi.as_table(fi.fidelity_rows(real, systems, np.arange(40).astype(str), groups, n_boot=10, seed=0), "x")
    fid = table[table["metric"] == "fid"]
    assert fid["n_real"].nunique() == 1 and fid["n_real"].iloc[0] == 12
    assert table["value"].notna().all()


def test_too_few_patients_leave_the_table_empty_and_say_so(caplog):
    real, groups = planes(0), np.arange(40) % (fi.MIN_GROUPS - 1)
    rows = fi.fidelity_rows(real, {"a": planes(1), "b": planes(2)}, groups, {"a": groups, "b": np.arange(40)}, 5, 0)
    assert "3 patients, and to halve and resample them takes 4" in caplog.text
    table = fi.as_table(rows, "x")
    assert len(table) == 3 * 3 * 4 and table[["value", "ci_low", "ci_high"]].isna().all(axis=None)
    assert fi.fidelity_difference(rows, "a", "b")[["difference", "ci_low", "p"]].isna().all(axis=None)


def test_bad_input_is_named():
    real, groups = planes(0), np.arange(40)

    def call(systems, groups_of=None, groups_real=groups):
        return fi.fidelity_rows(real, systems, groups_real, groups_of or dict.fromkeys(systems, groups), 5, 0)

    with pytest.raises(ValueError, match="no system named 'real'"):
        call({"real": planes(1)})
    with pytest.raises(ValueError, match="planes"):
        call({"a": {"axial": planes(1)["axial"]}})
    with pytest.raises(ValueError, match="a, axial.*do not fit"):
        call({"a": planes(1, slices=2)})
    broken = planes(1)
    broken["coronal"][3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="a, coronal.*not finite"):
        call({"a": broken})
    with pytest.raises(ValueError, match="variety"):
        di.median_distance(di.Sample(np.ones((5, 3)), np.arange(5), 5))


def test_linear_separability_is_half_for_one_distribution_and_one_for_two():
    a, groups = draw(0, 80, f=50, slices=2), np.arange(80)
    assert fi.linear_separability(a, draw(1, 80, f=50, slices=2), groups, 0) == pytest.approx(0.5, abs=0.12)
    assert fi.linear_separability(a, draw(2, 80, 0.6, f=50, slices=2), groups, 0) > 0.97
    with pytest.raises(ValueError, match="two groups"):
        fi.linear_separability(a, a, np.zeros(80), 0)
