"""Figures: orientation on an asymmetric phantom, the same window everywhere, what is drawn is what the tables say."""

import itertools
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from skimage.color import rgb2lab

mpl.use("Agg")
from matplotlib import pyplot as plt

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.classify import jobs
from study.classify.tables import size_name
from study.report import figures as F  # noqa: N812
from study.report import figures_base as base
from study.report import figures_images as images
from study.systems.registry import SYSTEMS

SHAPE = (7, 9, 11)


@pytest.fixture(autouse=True)
def closed():
    """Figures are drawn without a warning, and closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def phantom(side: str, plane: str = "axial") -> F.Panel:
    """One bright voxel off centre towards a side of the patient."""
    x, y, z = (n // 2 for n in SHAPE)
    at = {
        "right": (SHAPE[0] - 1, y, z), "left": (0, y, z), "anterior": (x, SHAPE[1] - 1, z), "posterior": (x, 0, z),
        "superior": (x, y, SHAPE[2] - 1), "inferior": (x, y, 0),
    }[side]  # fmt: skip
    volume = np.zeros(SHAPE)
    volume[at] = 1
    return F.Panel(volume, plane=plane)


def ball(side: int = 32, radius: float = 6, shift=(0, 0, 0), **panel) -> F.Panel:
    grid = np.indices((side,) * 3) - side // 2
    mask = np.linalg.norm(grid - np.reshape(shift, (3, 1, 1, 1)), axis=0) <= radius
    return F.Panel(np.where(mask, 30.0, -850.0), mask, **panel)


def shown(fig, cmap: str) -> list:
    return [image for ax in fig.get_axes() for image in ax.images if image.get_cmap().name == cmap]


def words(fig) -> str:
    return " ".join(text.get_text() for text in fig.findobj(mpl.text.Text))


# -- patches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plane", "side", "edge"),
    [
        ("axial", "right", "left"), ("axial", "left", "right"), ("axial", "anterior", "top"),
        ("axial", "posterior", "bottom"),
        ("coronal", "right", "left"), ("coronal", "left", "right"), ("coronal", "superior", "top"),
        ("coronal", "inferior", "bottom"), ("sagittal", "anterior", "left"), ("sagittal", "posterior", "right"),
        ("sagittal", "superior", "top"), ("sagittal", "inferior", "bottom"),
    ],
)  # fmt: skip
def test_orientation_is_radiological(ax, plane, side, edge):
    panel = phantom(side, plane)
    image = panel.page(panel.volume)
    (row,), (column,) = np.nonzero(image)
    last = (image.shape[0] - 1, image.shape[1] - 1)
    assert {"top": row == 0, "bottom": row == last[0], "left": column == 0, "right": column == last[1]}[edge]
    images.show(ax, panel)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # row 0 is drawn on top
    assert ax.get_xlim()[0] < ax.get_xlim()[1]


@pytest.mark.parametrize(
    ("plane", "size"), [("axial", (7 * 0.7, 9 * 0.8)), ("coronal", (7 * 0.7, 11 * 2.5)), ("sagittal", (9 * 0.8, 27.5))]
)
def test_slices_are_in_millimetres(ax, plane, size):
    images.show(ax, F.Panel(np.zeros(SHAPE), spacing=(0.7, 0.8, 2.5), plane=plane))
    assert (ax.get_xlim()[1], ax.get_ylim()[0]) == pytest.approx(size)
    assert ax.get_aspect() == 1


@pytest.mark.parametrize("plane", images.AXES)
def test_centre_and_outline_lie_on_the_lesion(ax, plane):
    panel = ball(radius=6, shift=(7, -4, 2), plane=plane, outline=True)
    _, x, y = panel.centre
    rows, columns = np.nonzero(panel.page(panel.mask))
    assert (x, y) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))
    images.show(ax, panel)
    outline = np.concatenate([p.vertices for p in ax.collections[0].get_paths()])
    assert np.abs(np.linalg.norm(outline - (x, y), axis=1) - 6).max() < 1.1


@pytest.mark.parametrize(
    ("voxels", "spacing", "length"), [(20, 1.5, 10), (48, 1.0, 10), (8, 1.0, 5), (12, 0.6, 5), (300, 1.0, 50)]
)
def test_scale_bar_has_the_length_it_tells(ax, voxels, spacing, length):
    images.show(ax, F.Panel(np.zeros((voxels, voxels, 3)), spacing=(spacing, spacing, 1.0)), bar=True)
    assert [np.ptp(line.get_xdata()) for line in ax.lines] == pytest.approx([length] * 2)
    assert ax.texts[0].get_text() == f"{length} mm"
    assert ax.get_xlim() == pytest.approx((0, voxels * spacing))


THREE = [ball(label=str(k)) for k in range(3)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: F.montage(THREE, title="contact sheet"),
        lambda: F.before_after(THREE[0], ball(radius=4)),
        lambda: F.differences(THREE, {"autoencoder": [p.volume + 10 for p in THREE]}),
        lambda: F.crosstab({("real", "synthetic"): THREE}, ("real", "synthetic"), ("real", "synthetic"), 2, "model"),
        lambda: F.crosstab({("solid", "6-10"): THREE, ("solid", "10-20"): THREE[:1]}, ["solid"], ["6-10", "10-20"], 3, "", zoom=True),
    ],
    ids=["montage", "before_after", "differences", "confusion", "zoomed"],
)  # fmt: skip
def test_every_patch_figure_has_one_window_and_says_so(draw):
    fig = draw()
    assert {image.get_clim() for image in shown(fig, "gray")} == {(-1350.0, 150.0)}
    assert "axial" in fig.get_suptitle() and "level −600 HU, width 1500 HU" in fig.get_suptitle()


def test_latents_share_a_grey_scale_of_their_own():
    fig = F.montage([F.Panel(np.full((4, 4, 4), float(k)), kind="latent") for k in range(3)])
    assert len({image.get_clim() for image in shown(fig, "gray")}) == 1
    assert "common grey scale" in fig.get_suptitle() and "HU" not in fig.get_suptitle()


def test_zoom_and_arrows_show_the_lesion():
    panel = ball(side=48, radius=5, shift=(-15, 10, 3))
    fig = F.crosstab({("part-solid", "10-20"): [panel]}, ["part-solid", "solid"], ["10-20"], 1, "Fig. 4", zoom=True)
    context, close = [ax for ax in fig.get_axes() if ax.images]
    _, x, y = panel.centre
    for ax in (context, close):
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left <= x - 5 and x + 5 <= right and top <= y - 5 and y + 5 <= bottom
        arrow = next(text for text in ax.texts if isinstance(text, mpl.text.Annotation))
        assert np.hypot(arrow.xy[0] - x, arrow.xy[1] - y) == pytest.approx(5, abs=1.8)
    assert np.diff(close.get_xlim()) < 0.5 * np.diff(context.get_xlim())
    assert words(fig).count("no such case") == 1


def test_difference_is_after_minus_before():
    before = ball()
    after = F.Panel(before.volume + 100 * before.mask, before.mask)
    fig = F.before_after(before, after)
    changes = shown(fig, "RdBu_r")
    assert len(changes) == 3
    for image in changes:
        assert image.get_clim() == (-100, 100)
        assert set(np.unique(image.get_array())) == {0.0, 100.0}


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: F.Panel(np.zeros(SHAPE), plane="oblique"), "a plane .axial, sagittal, coronal"),
        (lambda: F.Panel(np.zeros((3, 3))), "a volume"),
        (lambda: F.montage([]), "at least one"),
        (lambda: F.differences([ball(), ball()], {"autoencoder": [ball().volume]}), "shorter"),
        (lambda: F.before_after(ball(side=30), ball()), "broadcast"),
        (lambda: F.save_figure(plt.figure(), "", "a/b.png"), "plain name"),
    ],
    ids=["plane", "axes", "no panel", "a missing volume", "two shapes", "file name"],
)
def test_what_cannot_be_drawn_is_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()


# -- colours, style and files ------------------------------------------------------------------------------------------

VISION = {  # Machado et al. 2009, severity 1, on linear RGB
    "normal": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}

RULES = (jobs.DIAMETER, jobs.MEAN_HU)
ARMS = {
    "Fig. 7": (jobs.CLINICAL, jobs.PROPORTIONAL, jobs.FULL, *RULES),
    "Fig. 8": (jobs.SCRATCH, jobs.IMBALANCED, jobs.BALANCED, *RULES),
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("names", [SYSTEMS, SUBTYPES, *ARMS.values()], ids=["systems", "subtypes", *ARMS])
def test_colours_can_be_told_apart(names, vision):
    """The systems of other authors have one colour together."""
    rgb = np.array([to_rgb(c) for c in sorted({base.COLOURS[name] for name in names})])
    assert len(rgb) >= min(len(names), 9)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 10


def test_names_that_recur_have_a_colour():
    assert {"real", *SYSTEMS, *SUBTYPES, *map(size_name, SIZE_BINS_MM), *itertools.chain(*ARMS.values())} <= set(
        base.COLOURS
    )


CURVE = pd.DataFrame({"step": np.arange(50), "loss": np.arange(50.0)})


def curve() -> mpl.figure.Figure:
    return F.facets(CURVE, (), F.lines, x="step", y="loss")


def test_style_leaves_no_trace():
    before = dict(mpl.rcParams)
    F.montage([ball()])
    curve()
    assert dict(mpl.rcParams) == before


def test_figures_are_saved_whole_small_and_the_same_twice(tmp_path):
    first = [path.read_bytes() for path in F.save_figure(curve(), tmp_path, "loss")]
    written = F.save_figure(curve(), tmp_path, "loss")
    assert [path.name for path in written] == ["loss.png", "loss.svg"]
    assert [path.read_bytes() for path in written] == first
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["loss.png", "loss.svg"]
    assert not plt.get_fignums()


def test_a_large_figure_is_shrunk_and_has_no_svg(tmp_path):
    F.save_figure(curve(), tmp_path, "noise")
    rng = np.random.default_rng(0)
    noise = [F.Panel(rng.normal(-600, 500, (64, 64, 2))) for _ in range(25)]
    (png,) = F.save_figure(F.montage(noise, 5), tmp_path, "noise")
    assert png.stat().st_size < base.MAX_PNG_BYTES
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["noise.png"]


@pytest.mark.parametrize(("dataset", "said"), [("lidc-mini", True), ("lidc-cubes", False)])
def test_semi_synthetic_figures_say_so(tmp_path, dataset, said):
    fig = curve()
    F.save_figure(fig, tmp_path / dataset / "quick", "curve")
    assert ("semi-synthetic" in fig.get_supxlabel()) == said


# -- charts ------------------------------------------------------------------------------------------------------------


def test_facets_keep_colours_and_say_what_is_missing():
    table = pd.DataFrame(
        [("a", "up", "first"), ("a", "up", "second"), ("a", "down", "second"), ("b", "up", "second")],
        columns=["across", "way", "arm"],
    ).assign(x=1.0, y=2.0)
    fig = F.facets(table, ["way", "across"], F.lines, x="x", y="y", hue="arm")
    titles = {ax.get_title(): ax for ax in fig.get_axes()}
    assert list(titles) == ["up: a", "up: b", "down: a", "down: b"]
    assert {ax.lines[-1].get_color() for ax in titles.values() if ax.lines} == {base.PALETTE[1]}
    assert words(titles["down: b"]).count("no such case") == 1
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["first", "second"]
    empty = F.facets(table[:0], ["way", "across"], F.lines, x="x", y="y", hue="arm")
    assert "no such case" in words(empty)


@pytest.mark.parametrize(
    ("share", "below", "aside"), [({"share_y": True}, True, False), ({"share_x": True}, False, True)]
)
def test_only_axes_that_are_shared_lose_their_numbers(share, below, aside):
    table = pd.DataFrame({"x": [0, 1] * 4, "y": [0, 1] * 4, "part": np.repeat(list("abcd"), 2)})
    fig = F.facets(table, "part", F.lines, columns=2, x="x", y="y", **share)
    numbers = [ax.xaxis.get_tick_params()["labelbottom"] for ax in fig.axes[:2]]
    assert numbers == [below] * 2
    assert [ax.yaxis.get_tick_params()["labelleft"] for ax in fig.axes[1::2]] == [aside] * 2


def test_a_panel_of_another_magnification_has_a_bar_of_its_own():
    rng = np.random.default_rng(0)
    made = [F.Panel(rng.normal(size=(20, 20, 20)), spacing=(s,) * 3) for s in (1.0, 1.0, 2.0)]
    fig = F.montage(made, columns=3)
    bars = [any("mm" in text.get_text() for text in ax.texts) for ax in fig.axes[:3]]
    assert bars == [True, False, True]


def test_lines_draw_the_band_the_level_and_the_legend_of_the_table(ax):
    recall = np.linspace(0.01, 1, 100)
    curve = pd.DataFrame({"recall": recall, "precision": 1 - recall / 2, "size": "6-10", "said": "6-10: 0.75"})
    curve = curve.assign(low=curve.precision - 0.1, high=curve.precision + 0.1, prevalence=0.3)
    how = {"band": ("low", "high"), "label": "said", "level": "prevalence", "xlim": (0, 1)}
    F.lines(ax, curve, "recall", "precision", "size", **how)
    drawn, level = ax.lines
    np.testing.assert_array_equal(drawn.get_ydata(), curve.precision)
    assert set(level.get_ydata()) == {0.3} and level.get_color() == drawn.get_color() == base.COLOURS["6-10"]
    corners = ax.collections[0].get_paths()[0].vertices
    assert {(recall[-1], curve.low.iloc[-1]), (recall[0], curve.high.iloc[0])} <= {tuple(v) for v in corners}
    assert ax.get_legend().get_texts()[0].get_text() == "6-10: 0.75" and ax.get_xlim() == (0, 1)


def test_lines_over_words_stand_side_by_side_and_leave_out_what_is_missing(ax):
    arms = (jobs.CLINICAL, jobs.FULL)
    rows = [(k, a, np.nan if (k, a) == ("0", arms[0]) else 0.7) for k in ("100", "20", "0") for a in arms]
    table = pd.DataFrame(rows, columns=["kept", "arm", "auroc"]).assign(low=0.6, high=0.8)
    F.lines(ax, table, "kept", "auroc", "arm", band=("low", "high"))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["100", "20", "0"]
    assert [np.isnan(line.get_ydata()).tolist() for line in ax.lines] == [[False, False, True], [False] * 3]
    for line, bars in zip(ax.lines, ax.collections, strict=True):
        np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[0.6, 0.8]] * 3)
        np.testing.assert_allclose([bar[0, 0] for bar in bars.get_segments()], line.get_xdata())
    assert not set(ax.lines[0].get_xdata()) & set(ax.lines[1].get_xdata())


def test_lines_smooth_fill_and_shade(ax):
    history = pd.DataFrame({"step": range(9), "loss": [0.0, 3.0] * 4 + [0.0]})
    F.lines(ax, history, "step", "loss", smooth=3, shade=6)
    np.testing.assert_allclose(ax.lines[1].get_ydata()[1:-1], [1, 2, 1, 2, 1, 2, 1])
    assert ax.patches[0].get_x() == 6 and ax.patches[0].get_label() == "step > 6: L_hist left out"
    both = pd.concat([history.assign(what="requested"), history.assign(what="obtained")])
    other = plt.figure().subplots()
    F.lines(other, both, "step", "loss", "what", filled="requested")
    assert [drawn.get_label() for drawn in (*other.collections, *other.lines)] == ["requested", "obtained"]


def test_lesion_histograms_draw_the_median_and_tell_how_many():
    centres = np.linspace(-982.5, 382.5, 40)
    rows = np.random.default_rng(0).dirichlet(np.ones(40), 7)
    fig = F.lesion_histograms({"real": {"solid": rows}, "hr-ldm": {"solid": rows[:3]}}, centres)
    (ax,) = fig.get_axes()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(rows, axis=0))
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    low, high = np.percentile(rows, (25, 75), axis=0)
    assert (edges.min(), edges.max()) == pytest.approx((low.min(), high.max()))
    assert ax.get_title() == "solid (up to 7 lesions)"


def test_scatter_fits_the_line(ax):
    x = np.linspace(-700, 0, 30)
    table = pd.DataFrame({"asked": x, "got": 0.8 * x - 20, "subtype": np.resize(SUBTYPES, 30)})
    F.scatter(ax, table, "asked", "got", "subtype", fit=True)
    assert "slope 0.80, R² 1.00, n = 30" in words(ax)
    drawn = [tuple(points.get_facecolor()[0][:3]) for points in ax.collections]
    assert drawn == [to_rgb(base.SUBTYPE_COLOURS[subtype]) for subtype in SUBTYPES]


@pytest.mark.parametrize("bars", [True, False])
def test_intervals_are_where_the_table_says_and_the_floor_is_real(bars):
    values = pd.DataFrame({"system": ["real", "maisi-ddpm", "hr-ldm"], "value": [1.0, 4.0, 3.0]})
    table = pd.concat([values.assign(metric=metric) for metric in ("fid", "kid")])
    table = table.assign(ci_low=table.value - 0.5, ci_high=table.value + 0.5)
    fig = F.facets(table, "metric", F.intervals, rows="system", floor="real", bars=bars)
    assert len(fig.get_axes()) == 2
    for ax in fig.get_axes():
        values = [b.get_width() for b in ax.patches[:2]] if bars else [line.get_xdata()[0] for line in ax.lines[:2]]
        assert values == [4.0, 3.0]
        segments = [s for c in ax.collections for s in c.get_segments()]
        assert [(s[0, 0], s[1, 0], s[0, 1]) for s in segments] == [(3.5, 4.5, 0), (2.5, 3.5, 1)]
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1.0]
        assert (ax.patches[-1].get_x(), ax.patches[-1].get_width()) == (0.5, 1.0)
        assert [t.get_text() for t in ax.get_yticklabels()] == ["maisi-ddpm", "hr-ldm"]


def test_interval_rows_stand_below_their_heading_and_share_a_row_side_by_side(ax):
    names = ["mask: 1", "mask: 1", "c_hist: both", "mask: 4"]
    table = pd.DataFrame({"cell": names, "code": ["here", "linear code", "here", "here"], "value": [1.0, 2, 3, 4]})
    F.intervals(ax, table.assign(ci_low=table.value - 1, ci_high=table.value + 1), "cell", "code")
    labels = ax.get_yticklabels()
    assert [(t.get_text(), t.get_fontweight()) for t in labels] == [
        ("mask", "bold"), ("1", "normal"), ("4", "normal"), ("c_hist", "bold"), ("both", "normal"),
    ]  # fmt: skip
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    at = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in ax.lines}
    assert at["here"] == pytest.approx({1.0: 0.85, 3.0: 4, 4.0: 2}) and at["linear code"] == pytest.approx({2.0: 1.15})


def test_histogram_counts_every_row(ax):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"subtype": rng.choice(SUBTYPES, 60), "diameter": rng.uniform(6, 30, 60)})
    F.histogram(ax, table, "diameter", "subtype", bins=8)
    assert sum(p.get_height() for p in ax.patches) == 60
    assert max(p.get_y() + p.get_height() for p in ax.patches) == np.histogram(table.diameter, 8)[0].max()


def test_soft_histogram_points_are_the_triangular_weights():
    centres = np.linspace(0, 4, 5)
    left = F.soft_histogram(np.array([1.25]), centres, np.full(5, 0.2), np.full(5, 0.2), "HU").get_axes()[0]
    dots = [line.get_xydata() for line in left.lines if line.get_marker() == "o"]
    assert np.concatenate(dots).tolist() == [[1.25, 0.75], [1.25, 0.25]]
