"""Figures: orientation on an asymmetric phantom, the same window everywhere, what is drawn is what the tables say."""

import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")
from matplotlib import pyplot as plt

from study.report import figures as F  # noqa: N812
from study.report import figures_base as base

SHAPE = (7, 9, 11)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def phantom(side: str) -> np.ndarray:
    """One bright voxel off centre towards a side of the patient."""
    x, y, z = (n // 2 for n in SHAPE)
    at = {
        "right": (SHAPE[0] - 1, y, z), "left": (0, y, z), "anterior": (x, SHAPE[1] - 1, z), "posterior": (x, 0, z),
        "superior": (x, y, SHAPE[2] - 1), "inferior": (x, y, 0),
    }[side]  # fmt: skip
    volume = np.zeros(SHAPE)
    volume[at] = 1
    return volume


def ball(side: int = 32, radius: float = 6, shift=(0, 0, 0), label: str = "") -> F.Panel:
    grid = np.stack(np.meshgrid(*[np.arange(side) - side // 2] * 3, indexing="ij"))
    mask = np.linalg.norm(grid - np.reshape(shift, (3, 1, 1, 1)), axis=0) <= radius
    return F.Panel(np.where(mask, 30.0, -850.0), mask, label)


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plane", "side", "corner"),
    [
        ("axial", "right", "left"), ("axial", "left", "right"), ("axial", "anterior", "top"),
        ("axial", "posterior", "bottom"),
        ("coronal", "right", "left"), ("coronal", "left", "right"), ("coronal", "superior", "top"),
        ("coronal", "inferior", "bottom"), ("sagittal", "anterior", "left"), ("sagittal", "posterior", "right"),
        ("sagittal", "superior", "top"), ("sagittal", "inferior", "bottom"),
    ],
)  # fmt: skip
def test_orientation_is_radiological(plane, side, corner):
    image, _ = F.plane_slice(phantom(side), plane)
    (row,), (column,) = np.nonzero(image)
    last = (image.shape[0] - 1, image.shape[1] - 1)
    assert {"top": row == 0, "bottom": row == last[0], "left": column == 0, "right": column == last[1]}[corner]
    fig, ax = plt.subplots()
    F.show_patch(ax, phantom(side), plane, window=(0.5, 1.0))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # row 0 is drawn on top
    assert ax.get_xlim()[0] < ax.get_xlim()[1]


def test_slices_are_in_millimetres():
    spacing = (0.7, 0.8, 2.5)
    for plane, (rows, columns) in {"axial": (0.8, 0.7), "coronal": (2.5, 0.7), "sagittal": (2.5, 0.8)}.items():
        image, size = F.plane_slice(np.zeros(SHAPE), plane, spacing=spacing)
        assert size == (rows, columns)
        fig, ax = plt.subplots()
        F.show_patch(ax, np.zeros(SHAPE), plane, spacing=spacing)
        assert ax.get_xlim()[1] == pytest.approx(image.shape[1] * columns)
        assert ax.get_ylim()[0] == pytest.approx(image.shape[0] * rows)
        assert ax.get_aspect() == 1


@pytest.mark.parametrize("plane", F.PLANES)
def test_centre_margin_and_outline_lie_on_the_lesion(plane):
    panel = ball(radius=6, shift=(7, -4, 2))
    index, x, y = panel.centre(plane)
    image, _ = F.plane_slice(panel.mask, plane, index)
    rows, columns = np.nonzero(image)
    assert (x, y) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))
    assert panel.margin_mm(plane) == pytest.approx(6.0, abs=0.8)
    assert panel.radius_mm() == pytest.approx(6.0, abs=0.2)
    fig, ax = plt.subplots()
    F.show_patch(ax, panel.volume, plane, index, mask=panel.mask)
    outline = np.concatenate([p.vertices for p in ax.collections[0].get_paths()])
    assert np.abs(np.linalg.norm(outline - (x, y), axis=1) - 6).max() < 1.1


def test_scale_bar_has_its_length():
    fig, ax = plt.subplots()
    F.show_patch(ax, np.zeros((20, 20, 20)), spacing=(1.5, 1.5, 1.0), scale_bar_mm=10)
    assert all(np.ptp(line.get_xdata()) == pytest.approx(10) for line in ax.lines)
    assert ax.texts[0].get_text() == "10 mm"


def test_unknown_plane_and_flat_volume_are_named():
    with pytest.raises(ValueError, match="choose one of axial"):
        F.plane_slice(np.zeros(SHAPE), "oblique")
    with pytest.raises(ValueError, match="three axes|volume"):
        F.plane_slice(np.zeros((3, 3)), "axial")


# -- style and files ---------------------------------------------------------------------------------------------------


def test_style_leaves_no_trace():
    before = dict(mpl.rcParams)
    F.montage([ball()])
    F.loss_curves(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}))
    assert dict(mpl.rcParams) == before


def test_figures_are_saved_whole_small_and_the_same_twice(tmp_path):
    def draw():
        return F.loss_curves(pd.DataFrame({"step": np.arange(50), "loss": np.arange(50.0)}))

    first = [p.read_bytes() for p in F.save_figure(draw(), tmp_path, "loss")]
    written = F.save_figure(draw(), tmp_path, "loss")
    assert [p.name for p in written] == ["loss.png", "loss.svg"]
    assert [p.read_bytes() for p in written] == first
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["loss.png", "loss.svg"]
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="plain name"):
        F.save_figure(draw(), tmp_path, "a/b.png")


def test_a_large_figure_is_shrunk_and_has_no_svg(tmp_path):
    rng = np.random.default_rng(0)
    noise = [F.Panel(rng.normal(-600, 500, (64, 64, 2))) for _ in range(25)]
    (png,) = F.save_figure(F.montage(noise, 5), tmp_path, "noise")
    assert png.suffix == ".png"
    assert png.stat().st_size < base.MAX_PNG_BYTES


# -- patches -----------------------------------------------------------------------------------------------------------


def grey_limits(fig) -> set:
    images = [i for ax in fig.get_axes() for i in ax.images]
    return {i.get_clim() for i in images if i.get_cmap().name == "gray"}


def said(fig) -> str:
    return fig.get_suptitle()


def test_every_patch_figure_has_one_window_and_says_so():
    p = [ball(label=str(k)) for k in range(3)]
    cells = {("solid", "6-10"): p, ("ground-glass", "20-30"): p[:1]}
    figures = [
        F.subtype_size_grid(cells),
        F.before_after(p[0], ball(radius=4)),
        F.montage(p, outline=True),
        F.reconstructions(p, {"autoencoder": [q.volume + 10 for q in p]}),
        F.confusion_panels({("real", "synthetic"): p}, "model"),
        F.strip(p),
    ]
    for fig in figures:
        assert grey_limits(fig) == {(-1350.0, 150.0)}
        assert "level −600 HU, width 1500 HU" in said(fig)


def test_grid_zoom_and_arrows_show_the_lesion():
    panel = ball(side=48, radius=5, shift=(-15, 10, 3))
    fig = F.subtype_size_grid({("part-solid", "10-20"): [panel]})
    shown = [ax for ax in fig.get_axes() if ax.images]
    context, close = shown
    _, x, y = panel.centre("axial")
    for ax in shown:
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left <= x - 5 and x + 5 <= right and top <= y - 5 and y + 5 <= bottom
        arrow = next(t for t in ax.texts if t.arrow_patch is not None)
        assert np.hypot(arrow.xy[0] - x, arrow.xy[1] - y) == pytest.approx(5, abs=1.8)
    assert np.diff(close.get_xlim()) < 0.5 * np.diff(context.get_xlim())


def test_difference_is_after_minus_before():
    before = ball()
    after = F.Panel(before.volume + 100 * before.mask, before.mask)
    fig = F.before_after(before, after, limit_hu=300)
    difference = [i for ax in fig.get_axes() for i in ax.images if i.get_cmap().name == "RdBu_r"]
    assert len(difference) == 3
    for image in difference:
        assert image.get_clim() == (-300, 300)
        assert set(np.unique(image.get_array())) == {0.0, 100.0}
    with pytest.raises(ValueError, match="one shape"):
        F.before_after(before, ball(side=30))


def test_patch_figures_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="at least one"):
        F.montage([])
    with pytest.raises(ValueError, match="1 reconstructions of 2"):
        F.reconstructions([ball(), ball()], {"autoencoder": [ball().volume]})


# -- charts ------------------------------------------------------------------------------------------------------------


def control_table(slope: float) -> pd.DataFrame:
    requested = np.linspace(-700, 0, 30)
    return pd.DataFrame(
        {
            "system": "hr-ldm", "nodule_id": range(30),
            "subtype": np.resize(["solid", "part-solid", "ground-glass"], 30),
            "requested_mean_hu": requested, "obtained_mean_hu": slope * requested - 20,
            "requested_sd_hu": 100.0, "obtained_sd_hu": 90.0,
        }
    )  # fmt: skip


def texts(fig) -> str:
    return " ".join(t.get_text() for ax in fig.get_axes() for t in ax.texts)


def test_control_reads_or_fits_the_line():
    assert "slope 0.80, R² 1.00, n = 30" in texts(F.control_scatter(control_table(0.8)))
    summary = pd.DataFrame({"system": ["hr-ldm"], "subtype": ["all"], "slope": [0.5], "r2": [0.25], "n": [30]})
    assert "slope 0.50, R² 0.25" in texts(F.control_scatter(control_table(0.8), summary))
    with pytest.raises(ValueError, match="median"):
        F.control_scatter(control_table(1.0), quantity="median")


def fidelity_table() -> pd.DataFrame:
    rows = [
        (s, "efficientnet-lite0", m, "average", v, v - 0.5, v + 0.5, 10, 10)
        for m in ("fid", "kid", "mmd")
        for s, v in (("real", 1.0), ("maisi-ddpm", 4.0), ("hr-ldm", 3.0))
    ]
    columns = ["system", "extractor", "metric", "plane", "value", "ci_low", "ci_high", "n_real", "n_synthetic"]
    return pd.DataFrame(rows, columns=columns)


def test_fidelity_bars_are_the_values_and_the_floor_is_real():
    fig = F.fidelity_bars(fidelity_table())
    for ax in fig.get_axes():
        assert [b.get_width() for b in ax.patches if b.get_height() == pytest.approx(0.68)] == [4.0, 3.0]
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1.0]
        intervals = [tuple(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "-"]
        assert intervals == [(3.5, 4.5), (2.5, 3.5)]
    assert "efficientnet-lite0" in said(fig)
    two = pd.concat([fidelity_table(), fidelity_table().assign(extractor="radimagenet")])
    with pytest.raises(ValueError, match="one extractor"):
        F.fidelity_bars(two)


def test_lesion_distances_name_missing_subtypes():
    table = pd.DataFrame(
        {"system": ["real", "hr-ldm"], "subtype": "all", "metric": "jsd", "value": [0.03, 0.1], "ci_low": [0.02, 0.05],
         "ci_high": [0.04, 0.2], "n": 9}
    )  # fmt: skip
    assert len(F.lesion_distances(table).get_axes()) == 1
    with pytest.raises(ValueError, match="there are \\['all'\\]"):
        F.lesion_distances(table, subtype="solid")


def test_soft_histogram_points_are_the_triangular_weights():
    centres = np.linspace(0, 4, 5)
    fig = F.soft_histogram(np.array([1.25]), centres, np.full(5, 0.2), np.full(5, 0.2), "HU")
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]) for line in fig.get_axes()[0].lines if line.get_marker() == "o"
    }
    assert points == {(1.25, 0.75), (1.25, 0.25)}


def test_lesion_histograms_draw_the_median():
    centres = np.linspace(-982.5, 382.5, 40)
    rows = np.random.default_rng(0).dirichlet(np.ones(40), 7)
    fig = F.lesion_histograms({"real": {"solid": rows}, "hr-ldm": {"solid": rows[:3]}}, centres)
    lines = fig.get_axes()[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), np.median(rows, axis=0))
    assert len(fig.get_axes()) == 1


def test_loss_curves_smooth_and_refuse_nothing():
    history = pd.DataFrame({"step": range(9), "loss": [0.0, 3.0] * 4 + [0.0]})
    fig = F.loss_curves(history, smooth=3)
    np.testing.assert_allclose(fig.get_axes()[0].lines[1].get_ydata()[1:-1], [1, 2, 1, 2, 1, 2, 1])
    with pytest.raises(ValueError, match="epoch"):
        F.loss_curves(history, x="epoch")


# -- downstream --------------------------------------------------------------------------------------------------------


def test_scarcity_leaves_out_what_cannot_be_trained():
    arms = ("Clinical (n%)", "Clinical (n%) + Synth (100%)")
    rows = [
        (s, m, r, a, np.nan if r == 0 and a == arms[0] else 0.7, 0.6, 0.8, 2)
        for s in ("solid", "part-solid", "ground-glass") for m in ("auroc", "auprc")
        for r in (1.0, 0.2, 0.0) for a in arms
    ]  # fmt: skip
    columns = ["subtype", "metric", "retention", "arm", "mean", "ci_low", "ci_high", "n_runs"]
    fig = F.scarcity(pd.DataFrame(rows, columns=columns))
    assert len(fig.get_axes()) == 6
    for ax in fig.get_axes():
        drawn = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
        assert np.isnan(drawn[0]).tolist() == [False, False, True]
        assert not np.isnan(drawn[1]).any()
    assert [t.get_text() for t in fig.get_axes()[3].get_xticklabels()] == ["100", "20", "0"]


def test_precision_recall_and_roc_panels():
    recall = np.linspace(0.01, 1, 100)
    cell = {"recall": recall, "precision": 1 - recall / 2, "sd": 0.1, "prevalence": 0.3}
    curves = pd.DataFrame({"subtype": "part-solid", "arm": "Real only", "size_mm": "6-10", **cell})
    fig = F.precision_recall(curves)
    assert fig.get_axes()[0].get_legend().get_texts()[0].get_text() == "6-10: 0.75"
    assert "no such nodule" in texts(fig)
    fpr = np.linspace(0, 1, 11)
    roc = pd.DataFrame({"arm": "scratch", "fpr": fpr, "tpr": fpr**0.5, "sd": 0.05})
    table = pd.DataFrame({"arm": ["scratch"], "auroc": [0.667], "ci_low": [0.6], "ci_high": [0.7]})
    legend = F.roc(roc, table).get_axes()[0].get_legend()
    assert "AUROC 0.667 (0.600–0.700)" in legend.get_texts()[0].get_text()


def test_forest_rows_are_the_levels_in_order():
    table = pd.DataFrame(
        {"factor": ["background"] * 2 + ["lambda"], "level": ["clean", "paper", 10], "metric": "jsd",
         "value": [0.1, 0.2, 0.3], "ci_low": [0.05, 0.15, 0.25], "ci_high": [0.15, 0.25, 0.35], "n_seeds": 1}
    )  # fmt: skip
    ax = F.forest(table, {"background": "clean"}).get_axes()[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["clean", "paper", "10"]
    marked = {float(line.get_xdata()[0]): line.get_color() for line in ax.lines if line.get_marker() == "s"}
    assert marked[0.1] == base.PALETTE[1]
    assert marked[0.2] == marked[0.3] == base.PALETTE[0]


def test_drawing_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fig in (F.control_scatter(control_table(1.0)), F.fidelity_bars(fidelity_table()), F.montage([ball()] * 3)):
            fig.canvas.draw()


@pytest.mark.parametrize(("dataset", "said"), [("lidc-mini", True), ("lidc-cubes", False)])
def test_semi_synthetic_figures_say_so(tmp_path, dataset, said):
    history = pd.DataFrame({"step": [1, 2], "inpaint": [2.0, 1.0]})
    figure = F.loss_curves(history)
    base.save_figure(figure, tmp_path / dataset / "quick", "curve")
    assert ("semi-synthetic" in figure.get_supxlabel()) == said
