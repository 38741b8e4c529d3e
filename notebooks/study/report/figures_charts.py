"""Figures made of numbers: losses, histograms, control, Table 1, Figs. 3, 6-8, ablations. They take result tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hrldm.config import SUBTYPES
from study.measure.statistics import least_squares
from study.report.figures_base import GREY, PALETTE, SUBTYPE_COLOURS, colour_of, new_figure, style

METRIC_NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "fid": "FID", "kid": "KID", "mmd": "MMD", "jsd": "JSD"}
METRIC_NAMES |= {"wasserstein_hu": "Wasserstein distance, HU"}


def loss_curves(history: pd.DataFrame, x: str = "step", smooth: int = 1, log: bool = False) -> Figure:
    """One panel for each numeric column of `history` but `x`; `smooth` > 1 adds a running mean over so many rows.

    Raises:
        ValueError: no column `x` or nothing to draw.
    """
    columns = [c for c in history.select_dtypes("number").columns if c != x]
    if x not in history or not columns:
        raise ValueError(f"loss curves need column {x!r} and at least one more number, not {list(history.columns)}")
    with style():
        wide = min(len(columns), 3)
        rows = -(-len(columns) // wide)
        fig, axes = new_figure(rows, wide, (3.6 * wide + 0.6, 2.6 * rows + 0.2))
        for ax in axes.flat[len(columns) :]:
            ax.set_axis_off()
        for ax, column, colour in zip(axes.flat, columns, _cycle(len(columns)), strict=False):
            ax.plot(history[x], history[column], color=colour, lw=0.8, alpha=0.35 if smooth > 1 else 1)
            if smooth > 1:
                mean = history[column].rolling(smooth, min_periods=1, center=True).mean()
                ax.plot(history[x], mean, color=colour, label=f"mean of {smooth}")
                ax.legend(loc="upper right")
            ax.set(xlabel=x, title=column, yscale="log" if log else "linear")
        return fig


def soft_histogram(values: np.ndarray, centres: np.ndarray, soft: np.ndarray, hard: np.ndarray, unit: str) -> Figure:
    """Fig. 3: the triangular kernels with a few values and their two weights, and soft beside hard histogram.

    Args:
        values:     a few values (n,) to be followed through the kernels, inside the range of the centres.
        centres:    equally spaced bin centres (B,); the kernel's width is their spacing.
        soft, hard: the two histograms (B,) of the whole lesion, each of sum 1.
        unit:       of the values, for the axis.
    """
    width = centres[1] - centres[0]
    with style():
        fig, axes = new_figure(1, 2, (10.0, 3.3))
        left, right = axes[0]
        for k, (centre, colour) in enumerate(zip(centres, _cycle(len(centres)), strict=True)):
            left.plot([centre - width, centre, centre + width], [0, 1, 0], color=colour, lw=1.2)
            left.text(centre, 1.03, rf"$\mu_{{{k + 1}}}$", color=colour, ha="center", fontsize=9)
        weights = np.maximum(0, 1 - np.abs(np.asarray(values)[:, None] - centres) / width)  # triangular kernel
        for value, row in zip(values, weights, strict=True):
            left.axvline(value, color=GREY, lw=0.9, ls=":")
            for k in np.flatnonzero(row):
                left.plot(value, row[k], "o", color=PALETTE[k % len(PALETTE)], ms=5)
        left.set(
            xlim=(centres[0], centres[-1]), ylim=(0, 1.14), xlabel=f"value, {unit}", ylabel="weight",
            title="each value is shared by two bins",
        )  # fmt: skip
        right.bar(centres, hard, width=0.9 * width, color="#d0d0d0", label="hard bins")
        right.plot(centres, soft, "o-", color=PALETTE[0], ms=4, label="soft bins (differentiable)")
        right.set(xlabel=f"value, {unit}", ylabel="share of the lesion", title="histogram of the lesion")
        right.set_ylim(0, 1.25 * max(np.max(soft), np.max(hard)))
        right.legend(loc="upper right")
        return fig


def lesion_histograms(histograms: Mapping[str, Mapping[str, np.ndarray]], centres_hu: np.ndarray) -> Figure:
    """HU histograms inside the lesions, a panel for each subtype: median and quartiles over lesions.

    `histograms[system][subtype]` is (n, B), each row of sum 1; the first system is drawn filled (the reference).
    """
    subtypes = [s for s in SUBTYPES if any(len(h.get(s, ())) for h in histograms.values())]
    with style():
        fig, axes = new_figure(1, max(len(subtypes), 1), (3.9 * max(len(subtypes), 1), 3.5), sharey=True)
        handles = {}
        for ax, subtype in zip(axes[0], subtypes, strict=False):
            for k, (system, per_subtype) in enumerate(histograms.items()):
                rows = per_subtype.get(subtype)
                if rows is None or len(rows) == 0:
                    continue
                low, middle, high = np.percentile(rows, (25, 50, 75), axis=0)
                colour = colour_of(system, k)
                ax.fill_between(centres_hu, low, high, color=colour, alpha=0.28 if k == 0 else 0.12, lw=0)
                handles[system] = ax.plot(centres_hu, middle, color=colour, lw=2.2 if k == 0 else 1.4)[0]
            n = max(len(h.get(subtype, ())) for h in histograms.values())
            ax.set(title=f"{subtype} (up to {n} lesions)", xlabel="HU")
        axes[0, 0].set_ylabel("share of the lesion's voxels")
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 6))
        fig.suptitle("HU inside the lesions: median and quartiles over lesions", fontsize=10.5)
        return fig


def control_scatter(control: pd.DataFrame, summary: pd.DataFrame | None = None, quantity: str = "mean") -> Figure:
    """Requested against obtained mean (or `sd`) HU of each nodule, a panel for each system (`control.csv`).

    `summary` is `control_summary.csv`; slope and R^2 are read from its row `all` of the system, otherwise from a
    straight line fitted here.

    Raises:
        ValueError: `quantity` is neither mean nor sd, or the table is empty.
    """
    if quantity not in ("mean", "sd") or control.empty:
        raise ValueError(f"control scatter needs rows and quantity mean or sd, not {len(control)} and {quantity!r}")
    wanted, got = f"requested_{quantity}_hu", f"obtained_{quantity}_hu"
    systems = list(dict.fromkeys(control["system"]))
    both = control[[wanted, got]].to_numpy()
    low, high = np.nanmin(both), np.nanmax(both)
    pad = 0.05 * max(high - low, 1.0)
    with style():
        fig, axes = new_figure(1, len(systems), (3.7 * len(systems) + 0.4, 4.2), sharey=True)
        for ax, system in zip(axes[0], systems, strict=True):
            rows = control[control["system"] == system].dropna(subset=[wanted, got])
            ax.plot([low - pad, high + pad], [low - pad, high + pad], color=GREY, ls="--", lw=1, label="identity")
            for subtype in SUBTYPES:
                part = rows[rows["subtype"] == subtype]
                ax.scatter(
                    part[wanted], part[got], s=14, alpha=0.75, lw=0, color=SUBTYPE_COLOURS[subtype], label=subtype
                )
            slope, r2 = _line(rows[wanted].to_numpy(), rows[got].to_numpy(), system, summary, quantity)
            said = f"slope {slope:.2f}, R² {r2:.2f}, n = {len(rows)}"
            ax.text(0.04, 0.96, said, transform=ax.transAxes, va="top", fontsize=9)
            ax.set(title=system, xlabel=f"requested {quantity}, HU", aspect="equal")
            ax.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad + 0.12 * (high - low)))
        axes[0, 0].set_ylabel(f"obtained {quantity}, HU")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4)
        return fig


def fidelity_bars(table: pd.DataFrame, plane: str = "average", floor: str = "real") -> Figure:
    """Table 1 (`table1_fidelity.csv`): FID, KID, MMD of each system with 95 % intervals, the real-real floor a line.

    Raises:
        ValueError: no row of that plane, or more than one extractor (their numbers must never share an axis).
    """
    rows = table[table["plane"] == plane]
    extractors = sorted(set(rows["extractor"]))
    if len(extractors) != 1:
        raise ValueError(f"fidelity bars need rows of plane {plane!r} of one extractor, not of {extractors}")
    title = f"Distance to real nodules, features of {extractors[0]}, {plane} of planes"
    return _interval_bars(rows, title, floor, "metric", ("fid", "kid", "mmd"))


def lesion_distances(table: pd.DataFrame, floor: str = "real", subtype: str = "all") -> Figure:
    """HU-histogram JSD and Wasserstein distance of each system with 95 % intervals (`lesion_histograms.csv`).

    Raises:
        ValueError: no row of that subtype.
    """
    rows = table[table["subtype"] == subtype]
    if rows.empty:
        raise ValueError(f"no lesion distances of subtype {subtype!r}; there are {sorted(set(table['subtype']))}")
    title = f"HU histogram inside the lesion against the same nodule's truth, {subtype}"
    return _interval_bars(rows, title, floor, "metric", ("jsd", "wasserstein_hu"))


def _interval_bars(rows: pd.DataFrame, title: str, floor: str, by: str, order: Sequence[str]) -> Figure:
    """Horizontal bars with intervals, a panel for each value of `by`, systems from top to bottom as in the table."""
    metrics = [m for m in order if m in set(rows[by])]
    systems = [s for s in dict.fromkeys(rows["system"]) if s != floor]
    with style():
        fig, axes = new_figure(1, len(metrics), (3.4 * len(metrics) + 1.2, 0.42 * len(systems) + 1.7), sharey=True)
        for ax, metric in zip(axes[0], metrics, strict=True):
            cell = rows[rows[by] == metric].set_index("system")
            for k, system in enumerate(systems):
                if system in cell.index:
                    _bar(ax, k, cell.loc[system], colour_of(system, k))
            if floor in cell.index:
                _floor(ax, cell.loc[floor])
            ax.set(xlabel=f"{METRIC_NAMES.get(metric, metric)} (lower is better)")
            ax.set_xlim(left=min(0.0, float(np.nanmin(cell[["value", "ci_low"]].to_numpy()))))
        axes[0, 0].set(yticks=range(len(systems)), yticklabels=systems, ylim=(len(systems) - 0.5, -0.5))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if handles:
            fig.legend(handles, labels, loc="outside lower center", ncols=2)
        fig.suptitle(title, fontsize=10.5)
        return fig


def _bar(ax: Axes, y: float, row: pd.Series, colour: str) -> None:
    ax.barh(y, row["value"], height=0.68, color=colour, alpha=0.85)
    ax.plot([row["ci_low"], row["ci_high"]], [y, y], color="black", lw=1.2, solid_capstyle="butt")


def _floor(ax: Axes, row: pd.Series) -> None:
    ax.axvspan(row["ci_low"], row["ci_high"], color=GREY, alpha=0.2, lw=0)
    ax.axvline(row["value"], color="black", ls="--", lw=1.2, label="floor: real against real (band: 95 % interval)")


def _line(
    requested: np.ndarray, obtained: np.ndarray, system: str, summary: pd.DataFrame | None, quantity: str
) -> tuple[float, float]:
    """Slope and R^2: from the summary where it has the pooled row of the mean, else by least squares."""
    if summary is not None and quantity == "mean":
        pooled = summary[(summary["system"] == system) & (summary["subtype"] == "all")]
        if len(pooled):
            return float(pooled["slope"].iloc[0]), float(pooled["r2"].iloc[0])
    slope, _, r2 = least_squares(np.asarray(requested), np.asarray(obtained))
    return slope, r2


def _cycle(n: int) -> list[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(n)]
