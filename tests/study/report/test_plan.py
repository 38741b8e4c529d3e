"""The plan: arithmetic and memory against closed forms, time by a line, and the stages that a profile has."""

import pytest
import torch
from torch import nn

from study import step_cost
from study.profiles import PROFILES, get_profile
from study.report import plan
from study.step_cost import Stage, counted, extrapolated, sides
from tests import tiny


def convolution(channels: int = 8) -> Stage:
    """One update of two convolutions of 3^3 without bias, 1 -> channels -> 1, batch 2."""

    def build(on: str) -> step_cost.Step:
        net = nn.Sequential(*(nn.Conv3d(i, o, 3, padding=1, bias=False) for i, o in ((1, channels), (channels, 1))))
        update = step_cost.updates(net, 1e-3)
        return lambda side: update(net(torch.zeros(2, 1, side, side, side)).sum())

    return Stage("convolution", 10, 64, 1, build)


@pytest.mark.parametrize("side", [8, 16])
def test_arithmetic_and_memory_are_those_of_the_closed_form(side):
    tflop, gb = counted(convolution(8), side, "cpu")
    once = 2 * 2 * 27 * 8 * side**3  # two operations, batch 2; forward, by weights, and by inputs where these need it
    assert tflop * 1e12 == pytest.approx(once * (2 + 3), rel=1e-12)
    voxels, weights = 4 * 2 * side**3, 4 * 2 * 27 * 8
    held = voxels * (1 + 8 + 1)  # input, feature and output
    assert held < gb * 2**30 < held + voxels * (8 + 2) + 8 * weights  # and gradients, moments


def test_what_is_let_go_is_not_counted():
    with step_cost.Live() as live:
        for _ in range(5):
            x = torch.zeros(256)
            x = x.view(16, 16) + 1
    assert live.peak <= 3 * 1024 and live.now == 1024


def test_time_follows_the_line_through_the_two_largest_cubes():
    tflop = {32: 1.0, 64: 8.0, 128: 64.0}
    assert extrapolated({32: 0.3, 64: 1.0}, tflop, 64) == 1.0
    assert extrapolated({32: 0.3, 64: 1.0}, tflop, 128) == pytest.approx(1.0 + 0.1 * 56)
    assert extrapolated({64: 2.0}, tflop, 128) == pytest.approx(16.0)  # in proportion
    assert extrapolated({32: 2.0, 64: 1.0}, tflop, 128) == pytest.approx(8.0)  # a small one slower: not a falling line
    assert sides(convolution()) == [32, 64] and sides(Stage("", 1, 48, 32, None)) == [32, 48]


@pytest.mark.parametrize("name", PROFILES)
def test_stages_are_those_of_the_profile(name):
    p = get_profile(name)
    found = {stage.name.partition(":")[0]: stage for stage in plan.stages(p)} | {s.name: s for s in plan.stages(p)}
    assert ("I: autoencoder" in found) == (name in ("gpu", "paper"))
    assert all(s.steps > 0 and s.side % s.multiple == 0 for s in found.values())
    if name == "paper":
        assert found["II: U-Net"].steps == 590_000 and found["II: U-Net"].side == 128
        assert found["I: autoencoder"].steps == p.vae.steps and found["latents"].steps == 2950


@pytest.mark.slow
def test_a_plan_of_a_small_profile_has_a_row_a_stage(monkeypatch):
    monkeypatch.setattr(step_cost, "PROBE_S", 0.0)  # two cubes a stage
    p = tiny.profile(autoencoder__source="train", downstream__crop_mm=32, data__patch_mm=16)
    table = plan.plan(p, "cpu")
    assert table.columns.tolist() == list(step_cost.Cost._fields) and len(table) == len(list(plan.stages(p)))
    numbers = table[["tflop_per_step", "s_per_step", "days", "memory_gb"]]
    assert (numbers > 0).all().all() and (table.days == table.steps * table.s_per_step / 86400).all()
