"""Figures of the method's parts (notebooks 00 to 04): data, autoencoder, histogram term. They take tables and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.report.figures_base import GREY, PALETTE, SUBTYPE_COLOURS, new_figure, style

_METRICS = {
    "psnr_db": "PSNR, dB (higher is better)",
    "ssim": "SSIM (higher is better)",
    "mae_hu": "mean absolute error, HU (lower is better)",
    "hist_jsd": "HU-histogram JSD, nats (lower is better)",
}


def shape_library(table: pd.DataFrame) -> Figure:
    """The shapes' sizes, malignancy ratings and slice distances, by subtype (`ShapeLibrary.table`)."""
    edges = [SIZE_BINS_MM[0][0], *(high for _, high in SIZE_BINS_MM)]
    panels = (
        ("diameter_mm", edges, "equivalent diameter, mm"),
        ("malignancy", np.arange(0.75, 5.5, 0.5), "malignancy, median of the readers"),
        ("slice_mm", np.arange(0.375, 3.7, 0.25), "distance of the scan's slices, mm"),
    )
    with style():
        fig, axes = new_figure(1, 3, (11.0, 3.2), sharey=False)
        for ax, (column, bins, label) in zip(axes[0], panels, strict=True):
            counts = [np.histogram(table.loc[table["subtype"] == s, column], bins)[0] for s in SUBTYPES]
            centres, width = np.arange(len(bins) - 1), 0.85
            base = np.zeros(len(centres))
            for subtype, count in zip(SUBTYPES, counts, strict=True):
                ax.bar(centres, count, width, base, color=SUBTYPE_COLOURS[subtype], label=subtype)
                base = base + count
            names = [f"{a:g}–{b:g}" for a, b in zip(bins, bins[1:], strict=False)]
            if column != "diameter_mm":
                names = [f"{(a + b) / 2:g}" for a, b in zip(bins, bins[1:], strict=False)]
            every = 1 if len(names) < 10 else 2
            ax.set(xticks=centres[::every], xticklabels=names[::every], xlabel=label, ylim=(0, 1.12 * base.max()))
            if column == "diameter_mm":
                for x, total in zip(centres, base, strict=True):
                    ax.text(x, total, f"{total:.0f}", ha="center", va="bottom", fontsize=9)
        axes[0, 0].set_ylabel("nodules")
        axes[0, 1].legend(loc="upper right")
        return fig


def reconstruction_bars(table: pd.DataFrame, reference: str = "linear code") -> Figure:
    """`autoencoder.csv`: each region's scores with 95 % intervals, the reference code beside the autoencoder."""
    ending = f" ({reference})"
    regions = [r for r in dict.fromkeys(table["region"]) if not r.endswith(ending)]
    metrics = [m for m in _METRICS if m in set(table["metric"])]
    cells = table.set_index(["region", "metric"])
    with style():
        fig, axes = new_figure(1, len(metrics), (3.3 * len(metrics) + 1.4, 3.1), sharey=True)
        for ax, metric in zip(axes[0], metrics, strict=True):
            for y, region in enumerate(regions):
                for name, shift, colour in ((region, -0.16, PALETTE[0]), (region + ending, 0.16, GREY)):
                    if (name, metric) in cells.index:
                        row = cells.loc[(name, metric)]
                        ends = [row["ci_low"], row["ci_high"]]
                        ax.plot(ends, [y + shift] * 2, color=colour, lw=1.8, solid_capstyle="butt")
                        ax.plot(row["value"], y + shift, "s", color=colour, ms=6)
            ax.set(xlabel=_METRICS[metric])
            ax.grid(axis="x", color="0.9", lw=0.8)
            if metric in ("mae_hu", "hist_jsd"):
                ax.set_xlim(left=0)
        axes[0, 0].set(yticks=range(len(regions)), yticklabels=regions, ylim=(len(regions) - 0.5, -0.5))
        handles = [
            axes[0, 0].plot([], [], "s-", color=c, label=n)[0]
            for n, c in (("autoencoder", PALETTE[0]), (reference, GREY))
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        fig.suptitle("Reconstruction by kind of tissue, mean over nodules with 95 % interval", fontsize=10.5)
        return fig


def awareness(table: pd.DataFrame, correlations: pd.DataFrame, linear_channel: int | None = None) -> Figure:
    """Left, middle: HU-JSD against feature-JSD and feature-JSD by offset. Right: each channel's rank correlation.

    Args:
        table: `awareness_table`.
        correlations: `correlations` of it.
        linear_channel: channel to be drawn in orange, the linear code's output.
    """
    with style():
        fig, axes = new_figure(1, 3, (12.0, 3.7))
        scatter, by_offset, bars = axes[0]
        for subtype in SUBTYPES:
            part = table[table["subtype"] == subtype]
            marks = {"s": 12, "lw": 0, "alpha": 0.6, "color": SUBTYPE_COLOURS[subtype]}
            scatter.scatter(part["hu_jsd"], part["feature_jsd"], label=subtype, **marks)
        cell = correlations.set_index(["feature", "measure"])
        lines = []
        names = {"spearman": "Spearman", "pearson": "Pearson", "spearman_within": "Spearman within lesions"}
        for measure, name in names.items():
            if ("feature_jsd", measure) not in cell.index:
                continue
            row = cell.loc[("feature_jsd", measure)]
            lines.append(f"{name} {row['value']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})")
        lines.append(f"n = {len(table)} changes")
        scatter.text(0.03, 0.97, "\n".join(lines), transform=scatter.transAxes, va="top", fontsize=9)
        top = 1.45 * float(table["feature_jsd"].max())
        scatter.set(xlabel="HU-JSD of the change, nats", ylabel="feature-JSD (L_hist), nats", ylim=(0, top))
        fig.legend(*scatter.get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
        shifts = table[table["contrast"] == 1]
        for column, label, colour in (("hu_jsd", "HU-JSD", GREY), ("feature_jsd", "feature-JSD (L_hist)", PALETTE[0])):
            low, middle, high = (shifts.groupby("offset_hu")[column].quantile(q) for q in (0.25, 0.5, 0.75))
            by_offset.fill_between(low.index, low, high, color=colour, alpha=0.2, lw=0)
            by_offset.plot(middle.index, middle, "o-", ms=4, color=colour, label=label)
        by_offset.set(xlabel="offset of the lesion, HU", ylabel="divergence, nats", ylim=(0, None))
        by_offset.set_title("median and quartiles")
        by_offset.legend(loc="upper center")
        channels = correlations[correlations["feature"].str.startswith("channel_")]
        channels = channels[channels["measure"] == "spearman"].reset_index(drop=True)
        for x, row in channels.iterrows():
            bars.bar(x, row["value"], 0.8, color=PALETTE[1] if x == linear_channel else PALETTE[0])
            bars.plot([x, x], [row["ci_low"], row["ci_high"]], color="black", lw=1.0)
        bars.axhline(0, color="black", lw=0.8)
        bars.set(xlabel="channel of D_trunc", ylabel="Spearman with HU-JSD", ylim=(min(0, bars.get_ylim()[0]), 1.05))
        bars.set_xticks(range(0, len(channels), 1 if len(channels) < 10 else 4))
        bars.set_title("per channel" + (" (orange: the linear code)" if linear_channel is not None else ""))
        return fig


def descent(
    centres_hu: np.ndarray, target: np.ndarray, before: np.ndarray, after: np.ndarray, losses: Sequence[float]
) -> Figure:
    """HU histograms of one lesion before and after following the gradient of L_hist, its target, and the loss."""
    with style():
        fig, axes = new_figure(1, 2, (10.0, 3.3), width_ratios=(2, 1))
        left, right = axes[0]
        left.fill_between(centres_hu, target, step="mid", color="0.8", label="target")
        left.step(centres_hu, before, where="mid", color=PALETTE[3], label="before")
        left.step(centres_hu, after, where="mid", color=PALETTE[0], label="after")
        left.set(xlabel="HU", ylabel="share of the lesion", title="HU histogram of the decoded lesion")
        left.legend(loc="upper right")
        right.plot(losses, color=PALETTE[0])
        right.set(xlabel="step of the descent", title="L_hist, nats", ylim=(0, None))
        return fig


def losses_by_time(curves: Mapping[str, pd.DataFrame], t_max: int | None = None) -> Figure:
    """L_inpaint and L_hist of trained networks against t (`losses_by_time`); grey where training leaves L_hist out."""
    titles = {"inpaint": "L_inpaint (Eq. 5)", "hist": "L_hist (Eq. 8), nats"}
    with style():
        fig, axes = new_figure(1, 2, (9.6, 3.3))
        for ax, (column, title) in zip(axes[0], titles.items(), strict=True):
            for k, (name, curve) in enumerate(curves.items()):
                ax.plot(curve["t"], curve[column], "o-", ms=4, color=PALETTE[k], label=name)
            ax.set(xlabel="t", title=title, xlim=ax.get_xlim())
            if t_max is not None and column == "hist":
                ax.axvspan(t_max, ax.get_xlim()[1], color="0.9", lw=0, label=f"t > {t_max}: not in the loss")
            ax.legend(loc="best")
        return fig


def amplification(t: np.ndarray, factor: np.ndarray, marks: Sequence[int], t_max: int | None = None) -> Figure:
    """How much an error of the predicted noise grows in z0_hat (Eq. 6), on a logarithmic axis, with some times marked."""
    with style():
        fig, axes = new_figure(1, 1, (6.2, 3.2))
        ax = axes[0, 0]
        ax.plot(t, factor, color=PALETTE[0])
        for before, mark in pairwise([-np.inf, *marks]):
            value = float(np.interp(mark, t, factor))
            ax.plot(mark, value, "o", color=PALETTE[3])
            crowded = mark - before < 0.2 * t[-1]  # the label below right belongs to the mark before
            side = "right" if crowded or mark > 0.8 * t[-1] else "left"
            place = (-7, 3) if side == "right" else (4, -13)
            ax.annotate(f"t = {mark}: {value:.2g}×", (mark, value), place, textcoords="offset points", ha=side)
        if t_max is not None:
            ax.axvspan(t_max, t[-1], color="0.9", lw=0)
            ax.text(t_max + 10, ax.get_ylim()[0] * 1.5, "L_hist left out", fontsize=9, color="0.35")
        ax.set(xlabel="t", ylabel="error of ẑ0 / error of ε̂", yscale="log", xlim=(t[0], t[-1] * 1.02))
        return fig


def requested_obtained(
    centres_hu: np.ndarray, requested: np.ndarray, obtained: np.ndarray, labels: Sequence[str]
) -> Figure:
    """Requested (grey) and obtained HU histograms (N, B) of N lesions, a panel each.

    Raises:
        ValueError: numbers of requests, histograms and labels differ.
    """
    if not len(requested) == len(obtained) == len(labels):
        raise ValueError(f"{len(requested)} requests, {len(obtained)} histograms and {len(labels)} labels")
    wide = min(len(labels), 4)
    rows = -(-len(labels) // wide)
    with style():
        fig, axes = new_figure(rows, wide, (3.0 * wide, 2.1 * rows + 0.6), sharex=True, sharey=True)
        for ax in axes.flat[len(labels) :]:
            ax.set_axis_off()
        for ax, wish, got, label in zip(axes.flat, requested, obtained, labels, strict=False):
            wished = ax.fill_between(centres_hu, wish, step="mid", color="0.8")
            line = ax.step(centres_hu, got, where="mid", color=PALETTE[1])[0]
            ax.set_title(label)
        for ax in axes[-1]:
            ax.set_xlabel("HU")
        for ax in axes[:, 0]:
            ax.set_ylabel("share")
        fig.legend((wished, line), ("requested", "obtained"), loc="outside lower center", ncols=2)
        return fig
