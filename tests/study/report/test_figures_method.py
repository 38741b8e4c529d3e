"""The method's figures draw the numbers they are given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from study.report import figures as F  # noqa: N812


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_shape_library_counts_every_shape(rng):
    table = pd.DataFrame(
        {"subtype": rng.choice(["solid", "part-solid", "ground-glass"], 60), "diameter_mm": rng.uniform(6, 30, 60)}
    )
    table["malignancy"], table["slice_mm"] = rng.choice([1, 2.5, 5], 60), rng.choice([0.6, 2.5], 60)
    axes = F.shape_library(table).axes
    for ax in axes:
        assert sum(p.get_height() for p in ax.patches) == 60
    edges = (6, 10, 20, 30)
    assert [t.get_text() for t in axes[0].texts] == [str(c) for c in np.histogram(table.diameter_mm, edges)[0]]


def test_reconstruction_bars_put_both_codes_at_their_values():
    rows = [("lesion", "psnr_db", 33, 32, 34, 9), ("lesion (linear code)", "psnr_db", 30, 29, 31, 9)]
    rows += [("crop", "psnr_db", 35, 34, 36, 9), ("crop (linear code)", "psnr_db", 31, 30, 32, 9)]
    rows += [("lesion", "hist_jsd", 0.02, 0.01, 0.03, 9), ("lesion (linear code)", "hist_jsd", 0.04, 0.03, 0.05, 9)]
    table = pd.DataFrame(rows, columns="region metric value ci_low ci_high n".split())
    psnr, jsd = F.reconstruction_bars(table).axes
    assert [t.get_text() for t in psnr.get_yticklabels()] == ["lesion", "crop"]
    assert {float(np.ravel(line.get_xdata())[0]) for line in psnr.lines if len(line.get_xdata()) == 1} == {
        33,
        30,
        35,
        31,
    }
    assert jsd.get_xlim()[0] == 0


def test_awareness_states_correlations_and_draws_each_channel(rng):
    x = rng.uniform(0, 0.6, 24)
    table = pd.DataFrame({"subtype": "solid", "hu_jsd": x, "feature_jsd": x / 2, "contrast": 1.0})
    table["offset_hu"] = np.tile([-100.0, 100.0], 12)
    rows = [("feature_jsd", "spearman", 0.91, 0.8, 0.95, 24), ("feature_jsd", "pearson", 0.87, 0.8, 0.9, 24)]
    rows += [(f"channel_{c:02d}", "spearman", 0.1 * c, 0, 0.1 * c + 0.05, 24) for c in range(5)]
    correlations = pd.DataFrame(rows, columns="feature measure value ci_low ci_high n".split())
    scatter, _, bars = F.awareness(table, correlations, linear_channel=4).axes
    assert "Spearman 0.91 (0.80 to 0.95)" in scatter.texts[0].get_text()
    np.testing.assert_allclose([p.get_height() for p in bars.patches], [0, 0.1, 0.2, 0.3, 0.4])
    assert bars.patches[4].get_facecolor() != bars.patches[3].get_facecolor()


def test_curves_carry_their_data():
    h = np.full(40, 1 / 40)
    left, right = F.descent(np.linspace(-982, 382, 40), h, h, h, [0.5, 0.2, 0.1]).axes
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [0.5, 0.2, 0.1])
    curve = pd.DataFrame({"t": [10, 500], "inpaint": [1.0, 2.0], "hist": [0.1, 0.4]})
    inpaint, hist = F.losses_by_time({"hr-ldm": curve, "maisi-ddpm": curve * 2}, t_max=400).axes
    assert len(inpaint.lines) == 2 and list(hist.lines[1].get_ydata()) == [0.2, 0.8]
    ax = F.amplification(np.arange(1000), np.linspace(0.1, 84, 1000), (999,), 400).axes[0]
    assert ax.texts[0].get_text() == "t = 999: 84×"


def test_requested_obtained_has_a_panel_each_and_refuses_misfits(rng):
    h = rng.dirichlet(np.ones(40), 5)
    fig = F.requested_obtained(np.linspace(-982, 382, 40), h, h, list("abcde"))
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == list("abcde")
    with pytest.raises(ValueError, match="5 requests"):
        F.requested_obtained(np.linspace(-982, 382, 40), h, h[:4], list("abcde"))
