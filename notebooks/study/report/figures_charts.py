"""Figures made of numbers: curves, points, values with their intervals, histograms. They take tables in long form.

`lines`, `scatter`, `intervals` and `histogram` draw into one `Axes`; `facets` draws one of them for each part of a table.
Their `hue` is a column whose values have a colour and a legend entry each (`colour_of`), in order of appearance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from study.measure.statistics import least_squares
from study.report.figures_base import GREY, PALETTE, colour_of, new_figure, style

FEW = 12  # points of a curve that are marked


def facets(
    table: pd.DataFrame,
    by: str | Sequence[str],
    draw: Callable,
    columns: int = 4,
    title: str = "",
    size: tuple[float, float] = (3.4, 2.8),
    share_x: bool | str = False,
    share_y: bool | str = False,
    **how,
) -> Figure:
    """A panel for each value of a column, or for each pair of values of two (down, across): `draw(ax, part, **how)`.

    A name keeps its colour and its row in all panels. A pair without rows, or an empty table, says so.

    Args:
        by: one column or two; none for a single panel.
        columns: panels side by side, where `by` is one column.
        size: of a panel, inches.
    """
    words = {c: pd.Categorical(v, v.dropna().unique()) for c, v in table.items() if not is_numeric_dtype(v)}
    table = table.assign(**words)
    by = [by] if isinstance(by, str) else list(by)
    values = [list(table[column].unique()) or ["none"] for column in by]
    keys = list(product(*values))
    wide = len(values[1]) if len(by) == 2 else min(columns, len(keys))
    high = -(-len(keys) // wide)
    with style():
        whole = (size[0] * wide + 0.6, size[1] * high + 0.6)
        fig, axes = new_figure(high, wide, whole, sharex=share_x, sharey=share_y)
        for ax in axes.flat[len(keys) :]:
            ax.set_axis_off()
        for ax, key in zip(axes.flat, keys, strict=False):
            part = table
            for column, value in zip(by, key, strict=True):
                part = part[part[column] == value]
            if part.empty:
                ax.text(0.5, 0.5, "no such case", ha="center", transform=ax.transAxes)
            else:
                draw(ax, part, **how)
            ax.set_title(": ".join(map(str, key)))
            place = ax.get_subplotspec()
            if share_x and not place.is_last_row():
                ax.set_xlabel("")
                ax.tick_params(axis="x", labelbottom=False)
            if share_y and not place.is_first_col():
                ax.set_ylabel("")
                ax.tick_params(axis="y", labelleft=False)
        legend(fig)
        fig.suptitle(title, wrap=True)
        return fig


def legend(fig: Figure) -> None:
    """One legend below for all panels that have none of their own, each name once."""
    handles = {}
    for ax in fig.axes:
        if ax.get_legend() is None:
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
    if handles:
        wide = fig.get_figwidth() / (0.6 + 0.08 * max(map(len, handles)))
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, int(wide)), markerscale=1.5)


def lines(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    band: tuple[str, str] | None = None,
    quartiles: bool = False,
    smooth: int = 1,
    filled: str = "",
    label: str | None = None,
    level: str | None = None,
    shade: float | None = None,
    **settings,
) -> None:
    """A curve of `y` over `x` for each hue. Where `x` holds words they stand at equal distances, in order of appearance.

    Args:
        band: columns of the lower and upper end of an interval; a bar at each point where `x` holds words.
        quartiles: there are several rows for an `x`; draw their median, and the quartiles as a band.
        smooth: over so many rows a running mean is drawn before the faint curve itself.
        filled: hue that is drawn as a grey area, to be compared with.
        label: column with what the legend of this panel says instead of the hue.
        level: column with the height of a dotted line.
        shade: the panel is grey from this `x` on.
        settings: what else `ax.set` takes.
    """
    words = not is_numeric_dtype(table[x])
    if words:
        places = _order(table[x])
        ax.set_xticks(range(len(places)), places)
    for k, (name, colour, part) in enumerate(_hues(table, hue)):
        first, real = part.iloc[0], name == "real"  # the others are compared with it
        if quartiles:
            part = part.groupby(x)[y].quantile([0.25, 0.5, 0.75]).unstack().set_axis(["low", y, "high"], axis=1)
            part, band = part.reset_index(), ("low", "high")
        at = part[x].map(places.index).astype(float) + 0.08 * (k - 1) if words else part[x]  # bars stand side by side
        if name == filled:
            ax.fill_between(at, part[y], color="0.8", label=name)
            continue
        if band and words:
            ax.vlines(at, part[band[0]], part[band[1]], color=colour, lw=1.1, alpha=0.8)
        elif band:
            ax.fill_between(at, part[band[0]], part[band[1]], color=colour, alpha=0.28 if real else 0.15, lw=0)
        height, said = part[y], first[label] if label else name
        if smooth > 1:
            ax.plot(at, height, color=colour, lw=0.8, alpha=0.35)
            height, said = height.rolling(smooth, min_periods=1, center=True).mean(), f"mean of {smooth}"
        marker = "o" if len(part) <= FEW else ""
        ax.plot(at, height, marker=marker, ms=4.5, lw=2.4 if real else 1.6, color=colour, label=said)
        if level:
            ax.axhline(first[level], color=colour, ls=":", lw=1)
    ax.set(**{"xlabel": x, "ylabel": y} | settings)
    if shade is not None:
        ax.axvspan(shade, ax.get_xlim()[1], color="0.9", lw=0, label=f"{x} > {shade:g}: L_hist left out")
    if label:
        ax.legend(loc="best", frameon=True, framealpha=0.7, edgecolor="none")


def scatter(
    ax: Axes, table: pd.DataFrame, x: str, y: str, hue: str | None = None, fit: bool = False, **settings
) -> None:
    """A point for each row; with `fit` the identity, and slope, R² and n of the least-squares line of all of them."""
    for name, colour, part in _hues(table, hue):
        ax.scatter(part[x], part[y], s=14, alpha=0.75, lw=0, color=colour, label=name)
    if fit:
        slope, _, r2 = least_squares(table[x].to_numpy(), table[y].to_numpy())
        ax.axline((0, 0), slope=1, color=GREY, ls="--", lw=1, label="identity")
        said = f"slope {slope:.2f}, R² {r2:.2f}, n = {len(table)}"
        ax.text(0.04, 0.99, said, transform=ax.transAxes, va="top", fontsize=9)
        ax.margins(y=0.12)
    ax.set(**{"xlabel": x, "ylabel": y} | settings)


def intervals(
    ax: Axes, table: pd.DataFrame, rows: str, hue: str | None = None, floor: str = "", bars: bool = False, **settings
) -> None:
    """`value` with `ci_low` and `ci_high` for each name in column `rows`, from top to bottom in order of appearance.

    A row named `heading: name` stands below its heading.

    Args:
        hue: without it each row has a colour of its own.
        floor: the row that is drawn as a dashed line and a band over all others.
        bars: bars from zero instead of squares.
        settings: what else `ax.set` takes.
    """
    names = [name for name in _order(table[rows]) if name != floor]
    headings = dict.fromkeys(name.rpartition(": ")[0] for name in names)
    ticks, at = [], {}
    for heading in headings:
        ticks += [heading] if heading else []
        for name in names:
            if name.rpartition(": ")[0] == heading:
                at[name] = len(ticks)
                ticks.append(name.rpartition(": ")[2])
    drawn = table[table[rows] != floor]
    in_row = drawn.groupby(rows, observed=True)[rows]  # several values in a row stand one below the other
    shift = 0.3 * (in_row.cumcount() - (in_row.transform("size") - 1) / 2)
    drawn = drawn.assign(at=drawn[rows].map(at).astype(float) + shift)
    for name, colour, part in _hues(drawn, hue or rows):
        if bars:
            ax.barh(part["at"], part["value"], 0.68, color=colour, alpha=0.85)
        else:
            ax.plot(part["value"], part["at"], "s", color=colour, ms=5.5, label=name if hue else None)
        ax.hlines(part["at"], part["ci_low"], part["ci_high"], color="black" if bars else colour, lw=1.4)
    for row in table[table[rows] == floor].itertuples():
        ax.axvspan(row.ci_low, row.ci_high, color=GREY, alpha=0.2, lw=0)
        said = f"floor: {floor} against {floor} (band: 95 % interval)"
        ax.axvline(row.value, color="black", ls="--", lw=1.2, label=said)
    ax.set(**{"yticks": range(len(ticks)), "yticklabels": ticks, "ylim": (len(ticks) - 0.5, -0.5)} | settings)
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", nbins=5)  # long numbers would overlap
    for tick in ax.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in headings else "normal")
    ax.grid(axis="x", color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def histogram(ax: Axes, table: pd.DataFrame, x: str, hue: str, bins: int = 24, **settings) -> None:
    """Counts of `x` in equal bins, those of the hues one upon the other."""
    names, colours, parts = zip(*_hues(table, hue), strict=True)
    ax.hist([part[x] for part in parts], bins, stacked=True, color=colours, label=names)
    ax.set(**{"xlabel": x} | settings)


def lesion_histograms(histograms: Mapping[str, Mapping[str, np.ndarray]], centres_hu: np.ndarray) -> Figure:
    """HU histograms inside the lesions, `histograms[system][subtype]` (n, B) with rows of sum 1, a panel for each subtype."""
    share = "share of the lesion's voxels"
    parts = []
    for system, of_subtype in histograms.items():
        for subtype, rows in of_subtype.items():
            n = max(len(of.get(subtype, ())) for of in histograms.values())
            part = pd.DataFrame(rows, columns=centres_hu).melt(var_name="HU", value_name=share)
            parts.append(part.assign(system=system, lesions=f"{subtype} (up to {n} lesions)"))
    said = "HU inside the lesions: median and quartiles over lesions"
    how = {"x": "HU", "y": share, "hue": "system", "quartiles": True, "share_y": True}
    return facets(pd.concat(parts), "lesions", lines, title=said, **how)


def soft_histogram(values: np.ndarray, centres: np.ndarray, soft: np.ndarray, hard: np.ndarray, unit: str) -> Figure:
    """Fig. 3: the triangular kernels with a few values and their two weights, and soft beside hard histogram.

    Args:
        values:     a few values (n,) to be followed through the kernels, inside the range of the centres.
        centres:    equally spaced bin centres (B,); the kernel's width is their spacing.
        soft, hard: the two histograms (B,) of the whole lesion, each of sum 1.
        unit:       of the values, for the axis.
    """
    width = centres[1] - centres[0]
    weights = np.maximum(0, 1 - np.abs(np.asarray(values)[:, None] - centres) / width)  # Eq. 7
    with style():
        fig, ((left, right),) = new_figure(1, 2, (10.0, 3.3))
        for k, centre in enumerate(centres):
            colour = PALETTE[k % len(PALETTE)]
            left.plot(centres, centres == centre, color=colour, lw=1.2)
            left.text(centre, 1.03, rf"$\mu_{{{k + 1}}}$", color=colour, ha="center", fontsize=9)
            given = weights[:, k] > 0
            left.plot(values[given], weights[given, k], "o", color=colour, ms=5)
        for value in values:
            left.axvline(value, color=GREY, lw=0.9, ls=":")
        left.set(xlabel=f"value, {unit}", ylabel="weight", ylim=(0, 1.14), title="each value is shared by two bins")
        right.bar(centres, hard, width=0.9 * width, color="#d0d0d0", label="hard bins")
        right.plot(centres, soft, "o-", color=PALETTE[0], ms=4, label="soft bins (differentiable)")
        right.set(xlabel=f"value, {unit}", ylabel="share of the lesion", title="histogram of the lesion")
        right.set_ylim(0, 1.25 * max(np.max(soft), np.max(hard)))
        right.legend(loc="upper right")
        return fig


def _order(column: pd.Series) -> list[str]:
    """Names in order of appearance, in the whole table where `facets` has cut this part out of it."""
    return list(column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.unique())


def _hues(table: pd.DataFrame, hue: str | None) -> Iterator[tuple[str | None, str, pd.DataFrame]]:
    """Each name in column `hue` with its colour and its rows; all rows at once where there is no such column."""
    if hue is None:
        yield None, PALETTE[0], table
        return
    for k, name in enumerate(_order(table[hue])):
        part = table[table[hue] == name]
        if len(part):
            yield name, colour_of(name, k), part
