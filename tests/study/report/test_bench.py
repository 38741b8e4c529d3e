"""The benchmarks run, in processes of their own, and their table says what it means. No timed assertions."""

import pandas as pd
import pytest

from study.report import bench, bench_insert


def test_every_variant_measures_something():
    for variant in ("sparse", "dense"):
        found = bench.histogram(variant, 1, n=2000)
        assert found["time_s"] > 0 and found["device"] in ("cpu", "cuda")


def test_dense_histogram_needs_ten_times_the_memory():
    sparse, dense = (bench.apart("histogram", v, 1) for v in ("sparse", "dense"))
    assert dense["peak_mb"] > 10 * sparse["peak_mb"] > 0


@pytest.mark.slow
def test_training_benchmarks_run(monkeypatch):
    monkeypatch.setattr(bench, "BLOCK", 1)
    monkeypatch.setattr(bench, "NODULES", 6)
    small = bench.get_profile("quick", unet__channels=(16, 32), ldm__batch=2)
    monkeypatch.setattr(bench, "get_profile", lambda name, **changes: bench.changed(small, **changes))
    for case, variant in (("training_step", "lambda_0"), ("training_step", "lambda_10"), ("latents", "on_the_fly")):
        assert bench.CASES[case](variant, 1)["time_s"] > 0
    assert bench.l_hist("largest_lesion_crop", 1)["time_s"] > 0


def test_failed_variant_is_an_error():
    with pytest.raises(RuntimeError, match="benchmark latents missing"):
        bench.apart("latents", "missing", "no number")


def test_largest_slab_that_fits_memory_and_time():
    probe = {"time_s": 1.0, "peak_mb": 300.0}
    assert bench.largest_slab(probe, 1, 1e6) == 34
    assert bench.largest_slab(probe, 1, 34 * 300 / 0.8 - 1) == 17
    assert bench.largest_slab(probe | {"time_s": 40.0}, 1, 1e6) == 2
    assert bench.largest_slab(probe, 1, 10.0) == 2


def test_ratios_are_over_the_first_row_of_each_benchmark():
    rows = [
        {"benchmark": b, "variant": v, "time_s": t, "peak_mb": m, "device": "cpu"}
        for b, v, t, m in (("a", "ours", 2.0, 5.0), ("a", "theirs", 8.0, 50.0), ("b", "one", 3.0, 1.0), ("b", "two", 4.5, 1.0))
    ]  # fmt: skip
    table = bench.with_ratios(rows)
    assert list(table.columns) == bench.COLUMNS and table.ratio.tolist() == [1.0, 4.0, 1.0, 1.5]
    assert bench.summary(table).splitlines() == [
        "a: theirs takes 4.00x the time and 10.00x the memory of ours",
        "b: two takes 1.50x the time and 1.00x the memory of one",
    ]


def test_all_rows_are_written_to_one_file(tmp_path, monkeypatch):
    asked = []

    def measured(case, variant, repeats):
        asked.append((case, variant))
        return {"benchmark": case, "variant": variant, "time_s": 1.0, "peak_mb": 100.0, "device": "cpu"}

    monkeypatch.setattr(bench, "apart", measured)
    monkeypatch.setattr(bench, "free_memory_mb", lambda: 1e6)
    monkeypatch.setenv("HRLDM_RESULTS", str(tmp_path))
    bench.main(repeats=1)
    table = pd.read_csv(tmp_path / "bench" / "core.csv")
    assert list(table.columns) == bench.COLUMNS and len(table) == 8
    assert "volume_512x512x136_of_136" in table.variant.tolist()
    table = pd.read_csv(tmp_path / "bench" / "insert.csv")
    assert list(zip(table.benchmark, table.variant, strict=True)) == [(c, str(v)) for c, v in bench_insert.VARIANTS]
    assert {c for c, _ in asked} == set(bench.CASES)


def test_variants_run_in_turn_and_the_median_run_of_each_counts(monkeypatch):
    times, asked = {"a": iter((1.0, 9.0, 2.0)), "b": iter((4.0, 3.0, 5.0))}, []

    def measured(case, variant, repeats):
        asked.append(variant)
        return {"variant": variant, "time_s": next(times[variant])}

    monkeypatch.setattr(bench, "apart", measured)
    found = bench.in_turn("case", ("a", "b"), 5)
    assert found == [{"variant": "a", "time_s": 2.0}, {"variant": "b", "time_s": 4.0}] and asked == list("ababab")


def test_the_whole_body_is_left_out_where_memory_is_short(capsys):
    assert bench_insert.affordable(20_000) == list(bench_insert.VARIANTS) and not capsys.readouterr().out
    rest = bench_insert.affordable(8 * 1024)
    assert len(rest) == len(bench_insert.VARIANTS) - 1 and not any(v.startswith("whole") for _, v in rest)
    assert "it takes 16 GB, 8 are free" in capsys.readouterr().out
