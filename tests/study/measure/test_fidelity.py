"""FID, KID and MMD against torchmetrics and closed forms; their intervals against Monte Carlo."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from study.measure import distances as di
from study.measure import fidelity as fi
from study.measure.statistics import cluster_weights, percentile_interval

IDENTITY = torch.nn.Identity()
IDENTITY.num_features = 12


def draw(seed: int, n: int, mean: float = 0.0, scale: float = 1.0, f: int = 12, slices: int | None = None):
    shape = (n, f) if slices is None else (n, slices, f)
    return np.random.default_rng(seed).normal(mean, scale, shape)


def planes(seed: int, n: int = 40, mean: float = 0.0, slices: int = 3) -> dict[str, np.ndarray]:
    return {p: draw(seed + i, n, mean, slices=slices) for i, p in enumerate(("axial", "sagittal", "coronal"))}


def rows_of(real, systems, groups, n_boot: int, seed: int = 0) -> list[fi.Row]:
    """Of systems on the real nodules' own patients."""
    return fi.fidelity_rows(real, systems, groups, dict.fromkeys(systems, groups), n_boot, seed)


def of_torchmetrics(metric, x, y) -> float:
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    found = metric.compute()
    return (found[0] if isinstance(found, tuple) else found).item()


def mmd(a: di.Sample, b: di.Sample, kernel) -> float:
    sums = [di.pair_sums(s, t, kernel) for s, t in ((a, a), (b, b), (a, b))]
    return di.squared_mmd(*sums, *[np.ones((1, a.n_groups))] * 2)[0]


def test_fid_equals_torchmetrics():
    x, y = draw(0, 200), draw(1, 150, 0.3, 1.5)
    metric = FrechetInceptionDistance(feature=IDENTITY, normalize=True).set_dtype(torch.float64)
    assert di.frechet(x, y)[0] == pytest.approx(of_torchmetrics(metric, x, y), rel=1e-6)


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


@pytest.mark.parametrize("n, m, f", [(60, 50, 5), (9, 12, 20)], ids=["more points than dimensions", "fewer"])
def test_fid_of_known_mean_and_covariance_has_its_closed_form(n, m, f):
    rng = np.random.default_rng(0)
    rank = min(n, m, f + 1) - 1  # directions in which the points vary, the same orthogonal ones on both sides
    axes = np.linalg.qr(rng.normal(size=(f, f)))[0][:rank]

    def exact(n, mean, sd):  # points whose sample mean and covariance are exactly these
        white = np.linalg.qr(np.column_stack([np.ones(n), rng.normal(size=(n, rank))]))[0][:, 1:] * np.sqrt(n - 1)
        return mean + white * sd @ axes

    mu, nu = rng.normal(size=(2, f))
    s, t = rng.uniform(0.5, 2, (2, rank))
    expected = ((mu - nu) ** 2).sum() + ((s - t) ** 2).sum()  # covariances that commute
    assert di.frechet(exact(n, mu, s), exact(m, nu, t))[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kernel", [di.cubic_kernel, di.rbf_kernel(4.0)], ids=["kid", "mmd"])
def test_kernel_distances_equal_the_double_loop_and_a_resample_a_set_with_copies(kernel):
    x, y = draw(20, 9), draw(21, 7, 0.5)
    gx, gy = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4]), np.array([1, 1, 2, 3, 5, 5, 5])

    def loop(x, gx, y, gy):
        def mean(a, ga, b, gb):
            pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if ga[i] != gb[j]]
            return np.mean([kernel(a[[i]], b[[j]]) for i, j in pairs])

        return mean(x, gx, x, gx) + mean(y, gy, y, gy) - 2 * mean(x, gx, y, gy)

    a, b = di.Sample(x, gx, 6), di.Sample(y, gy, 6)
    sums = [di.pair_sums(s, t, kernel) for s, t in ((a, a), (b, b), (a, b))]
    drawn = np.array([2, 1, 0, 1, 0, 2])  # how often each group; its copies keep its label
    times_x, times_y = np.repeat(np.arange(9), drawn[gx]), np.repeat(np.arange(7), drawn[gy])
    weights = np.stack([np.ones(6), drawn])
    expected = loop(x, gx, y, gy), loop(x[times_x], gx[times_x], y[times_y], gy[times_y])
    np.testing.assert_allclose(di.squared_mmd(*sums, weights, weights), expected)


def test_kid_equals_torchmetrics_when_every_point_is_its_own_group():
    x, y = draw(7, 80), draw(8, 80, 0.2)
    a, b = di.Sample(x, np.arange(80), 160), di.Sample(y, np.arange(80, 160), 160)
    metric = KernelInceptionDistance(feature=IDENTITY, subsets=1, subset_size=80, normalize=True)
    assert mmd(a, b, di.cubic_kernel) == pytest.approx(of_torchmetrics(metric, x, y), rel=1e-4)


def test_mmd_of_two_gaussians_has_its_closed_form_on_average():
    n, shift, width = 150, 1.5, 1.2
    found = []
    for i in range(40):
        a = di.Sample(draw(i, n, f=1), np.arange(n), n)
        b = di.Sample(draw(1000 + i, n, shift, f=1), np.arange(n), n)
        found.append(mmd(a, b, di.rbf_kernel(width)))
    spread = width**2 + 2  # E exp(-(X - Y)^2 / 2 w^2) for X - Y ~ N(shift, 2)
    expected = 2 * width / np.sqrt(spread) * (1 - np.exp(-(shift**2) / (2 * spread)))
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(40))
    assert np.std(found) < 0.1


@pytest.mark.parametrize("kernel", [di.cubic_kernel, di.rbf_kernel(2.0)], ids=["kid", "mmd"])
def test_what_chance_puts_between_two_halves(kernel):
    """The naive distance, nothing left out, of independent halves of one distribution, against its estimate."""
    sizes = np.array([1, 3, 2, 1, 2, 3] * 4)
    group = np.repeat(np.arange(24), sizes)
    naive, expected = [], []
    for seed in range(100):
        x = (draw(seed, 24, f=3) * 0.7)[group] + draw(500 + seed, len(group), 0.0, 0.7, 3)
        first = np.isin(group, np.arange(24)[:12])
        a, b = x[first], x[~first]
        naive.append(kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())
        sample = di.Sample(x, group, 24)
        expected.append(di.halves_distance(sample, kernel, di.pair_sums(sample, sample, kernel), np.ones((1, 24)))[0])
    assert np.mean(expected) == pytest.approx(np.mean(naive), rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_hold_the_closed_form_about_as_often_as_they_say(shift):
    width, n, held = 1.2, 30, []
    spread = width**2 + 2
    truth = 2 * width / np.sqrt(spread) * (1 - np.exp(-(shift**2) / (2 * spread)))
    for seed in range(120):
        groups = np.arange(2 * n)
        a = di.Sample(draw(seed, n, f=1), groups[:n], 2 * n)
        b = di.Sample(draw(5000 + seed, n, shift, f=1), groups[n:], 2 * n)
        sums = [di.pair_sums(s, t, di.rbf_kernel(width)) for s, t in ((a, a), (b, b), (a, b))]
        weights = cluster_weights(2 * n, 200, np.random.default_rng(seed))
        low, high = percentile_interval(di.squared_mmd(*sums, weights, weights))
        held.append(low <= truth <= high)
    assert 0.88 <= np.mean(held)  # above .95 at no difference, where the statistic is degenerate: on the safe side


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
    table = fi.as_table(rows_of(real, systems, groups, 50), "test")
    assert list(table.columns) == "system extractor metric plane value ci_low ci_high n_real n_synthetic".split()
    assert len(table) == (4 * 3 + 3) * 4 and set(table["extractor"]) == {"test"}  # no fid_whole of the floor
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    average = table[table["plane"] == "average"].set_index(["metric", "system"])["value"]
    for metric in fi.METRICS:
        assert average[metric, "off"] < average[metric, "far"]
        assert average[metric, "copy"] < average[metric, "off"]
        mean = table.query("metric == @metric and system == 'off' and plane != 'average'")["value"].mean()
        assert average[metric, "off"] == pytest.approx(mean)
    fid = table[table["metric"] == "fid"]
    assert set(fid["n_real"]) == set(fid["n_synthetic"]) == {20}  # the same number of nodules for every system
    assert table.equals(fi.as_table(rows_of(real, systems, groups, 50), "test"))


def test_a_perfect_generator_scores_as_the_floor_even_on_the_same_patients():
    real, groups = planes(0, n=60), np.arange(60)
    rng = np.random.default_rng(5)
    twin = {p: x + rng.normal(0, 1e-3, x.shape) for p, x in real.items()}  # paired: each nodule almost copied
    rows = rows_of(real, {"twin": twin}, groups, 20, seed=1)
    value = {(r.system, r.metric): r.value for r in rows if r.plane == "average"}
    assert value["twin", "fid"] == pytest.approx(value["real", "fid"], rel=0.05)
    assert abs(value["twin", "kid"]) < 0.01 and abs(value["real", "kid"]) < 0.05


def test_whole_samples_are_what_the_paper_compares():
    real, groups = planes(0), np.arange(40)
    off = planes(200, mean=0.5)
    rows = rows_of(real, {"off": off}, groups, 50)
    row = next(r for r in rows if (r.system, r.metric, r.plane) == ("off", "fid_whole", "axial"))
    expected, *_ = di.frechet(real["axial"].reshape(-1, 12), off["axial"].reshape(-1, 12))
    assert row.value == pytest.approx(expected) and row.n_real == row.n_synthetic == 40
    half = next(r for r in rows if (r.system, r.metric, r.plane) == ("off", "fid", "axial"))
    assert row.value < half.value  # twice the nodules, half the bias


def test_ratio_is_one_for_a_perfect_generator_and_grows_with_damage():
    real, groups = planes(0, n=60), np.arange(60)
    rng = np.random.default_rng(5)
    twin = {p: x + rng.normal(0, 1e-3, x.shape) for p, x in real.items()}
    rows = rows_of(
        real, {"twin": twin, "off": planes(200, n=60, mean=0.4), "far": planes(300, n=60, mean=1.0)}, groups, 99
    )
    table = fi.floor_ratios(rows, "x").query("plane == 'average'").set_index(["metric", "system"])
    for metric in ("FID", "KID", "MMD"):
        value = table.value[metric]
        assert value["twin"] == pytest.approx(1, abs=0.03) and 1.1 < value["off"] < value["far"]
        assert (
            table.ci_low[metric, "off"] > 1
            and table.ci_low[metric, "far"] < value["far"] < table.ci_high[metric, "far"]
        )
    assert (table.loc["FID"].loc["real", ["value", "ci_low", "ci_high"]] == 1).all()


def test_orders_of_two_extractors_are_compared():
    real, groups = {"axial": draw(0, 40, slices=1)}, np.arange(40)
    systems = {f"s{i}": {"axial": draw(100 * i, 40, 0.5 * i, slices=1)} for i in range(1, 5)}
    names = list(systems)
    backwards = dict(zip(names, reversed(systems.values()), strict=True))
    rows = {"a": rows_of(real, systems, groups, 30), "b": rows_of(real, systems, groups, 30)}
    rows["c"] = rows_of(real, backwards, groups, 30)
    table = fi.same_order(rows).set_index(["metric", "a", "b"])
    assert (
        set(table.index.get_level_values("metric")) == {"fid", "kid", "mmd", "fid_whole"}
        and (table.n_systems == 4).all()
    )
    assert (table.xs(("a", "b"), level=(1, 2))[["tau", "ci_low", "ci_high"]] == 1).all(axis=None)
    assert (table.xs(("a", "c"), level=(1, 2))[["tau", "ci_low", "ci_high"]] == -1).all(axis=None)
    close = {name: {"axial": draw(7 + i, 40, 0.3, slices=1)} for i, name in enumerate(names)}
    unsure = fi.same_order({"a": rows["a"], "d": rows_of(real, close, groups, 30)})
    assert (unsure.ci_high - unsure.ci_low > 0.3).all()
    assert fi.same_order({"a": rows["a"]}).empty


def test_subtypes_are_drawn_uniformly_and_measured_where_patients_suffice(caplog):
    subtype = np.repeat(["solid", "part-solid", "ground-glass"], [70, 30, 30])
    groups = np.concatenate([np.arange(100), np.arange(30) % 7])  # ground-glass: 30 nodules of 7 patients
    drawn = fi.uniform_rows(subtype, 130, 0)
    assert np.unique(subtype[drawn], return_counts=True)[1].tolist() == [30, 30, 30]
    assert len(set(drawn)) == 90 and len(fi.uniform_rows(subtype, 20, 0)) == 18
    assert not np.array_equal(drawn, fi.uniform_rows(subtype, 130, 1))
    real, off = planes(0, n=130, slices=1), planes(100, n=130, slices=1)
    off = {p: x + 2 * (subtype == "solid")[:, None, None] for p, x in off.items()}  # bad at solid ones only
    table = fi.fidelity_by_subtype(real, {"off": off}, groups, subtype, "net", 20, 0)
    assert set(table.subtype) == {"uniform", "solid", "part-solid"}
    assert "ground-glass: 7 patients, too few" in caplog.text
    kid = table.query("metric == 'kid' and plane == 'average' and system == 'off'").set_index("subtype")
    assert kid.n_real.to_dict() == {"uniform": 90, "part-solid": 30, "solid": 70}
    assert kid.value["solid"] > kid.value["uniform"] > 0.1 and abs(kid.value["part-solid"]) < 0.1


def test_differences_are_paired():
    real, groups = planes(0), np.arange(40)
    off = planes(200, mean=0.5)
    systems = {"a": off, "b": {p: x + 0.05 for p, x in off.items()}}
    rows = rows_of(real, systems, groups, 200)
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
        rows = rows_of(real, other, np.arange(40), 100, seed=i)
        row = next(r for r in rows if (r.system, r.metric, r.plane) == ("x", metric, "axial"))
        values.append(row.value)
        widths.append(row.draws.std())
    assert 0.7 < np.mean(widths) / np.std(values) < 1.6


def test_groups_of_several_nodules_widen_the_interval():
    x, y = draw(0, 60, slices=2), draw(1, 60, 0.5, slices=2)
    for a in (x, y):
        a[1::2] = a[::2]  # the second nodule of each patient copies the first

    def width(groups):
        rows = rows_of({"axial": x}, {"s": {"axial": y}}, groups, 300)
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
    assert len(table) == (3 * 3 + 2) * 4 and table[["value", "ci_low", "ci_high"]].isna().all(axis=None)
    assert fi.fidelity_difference(rows, "a", "b")[["difference", "ci_low", "p"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "systems, groups, said",
    [
        ({"real": planes(1)}, None, "no system named 'real'"),
        ({"a": planes(1)}, {"b": np.arange(40)}, "groups for every system"),
        ({"a": {"axial": planes(1)["axial"]}}, None, "a: features.*do not fit"),
        ({"a": planes(1, slices=2)}, None, "a: features.*do not fit"),
        ({"a": planes(1)}, {"a": np.arange(39)}, "a: features.*do not fit"),
        ({"a": planes(1) | {"coronal": np.full((40, 3, 12), np.nan)}}, None, "a: features.*not finite"),
    ],
    ids=["the floor's name", "no groups", "a plane alone", "other slices", "other length", "NaN"],
)
def test_bad_input_is_named(systems, groups, said):
    own = np.arange(40)
    with pytest.raises(ValueError, match=said):
        fi.fidelity_rows(planes(0), systems, own, groups or dict.fromkeys(systems, own), 5, 0)


def test_features_without_variety_are_refused():
    with pytest.raises(ValueError, match="variety"):
        di.median_distance(di.Sample(np.ones((5, 3)), np.arange(5), 5))


def test_separability_is_half_for_one_distribution_and_one_for_two(caplog):
    systems = {"same": {"axial": draw(1, 80, f=50, slices=2)}, "other": {"axial": draw(2, 80, 0.6, f=50, slices=2)}}
    real = {"axial": draw(0, 80, f=50, slices=2)}
    table = fi.separability(real, systems, np.arange(80), "net", 0).set_index("system")
    assert table.auroc["same"] == pytest.approx(0.5, abs=0.12) and table.auroc["other"] > 0.97
    assert set(table.extractor) == {"net"} and set(table.n) == {80} and not caplog.text
    assert fi.separability(real, systems, np.zeros(80), "net", 0).auroc.isna().all()
    assert "nodules of one patient only" in caplog.text
