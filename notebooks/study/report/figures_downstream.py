"""Figures of the downstream tasks and the ablations: Figs. 6-8, forest plot. They take result tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hrldm.config import SUBTYPES
from study.report.figures_base import GREY, PALETTE, new_figure, style

ARM_COLOURS = (GREY, "#029e73", "#de8f05")  # Fig. 7: baseline grey, proportional teal, full orange
INIT_COLOURS = ("#d55e00", "#0173b2", "#029e73")  # Fig. 8: scratch red, imbalanced blue, balanced green


def precision_recall(curves: pd.DataFrame, subtypes: Sequence[str] = SUBTYPES[1:]) -> Figure:
    """Fig. 6: precision-recall curves, minority subtypes (rows) x arms (columns), a curve for each size (`pr_curves`).

    Bands are one SD over runs; the dotted line is the prevalence, the precision of chance.
    """
    arms = list(dict.fromkeys(curves["arm"])) or ["no run"]
    sizes = sorted(set(curves["size_mm"]), key=lambda s: float(s.split("-")[0]))
    with style():
        fig, axes = new_figure(len(subtypes), len(arms), (4.3 * len(arms), 3.3 * len(subtypes) + 0.5), sharex=True)
        for i, subtype in enumerate(subtypes):
            for j, arm in enumerate(arms):
                ax = axes[i, j]
                here = curves[(curves["subtype"] == subtype) & (curves["arm"] == arm)]
                for size, colour in zip(sizes, (PALETTE[0], PALETTE[2], PALETTE[1]), strict=False):
                    rows = here[here["size_mm"] == size]
                    if rows.empty:
                        continue
                    low, high = (rows["precision"] - rows["sd"]).clip(0), (rows["precision"] + rows["sd"]).clip(None, 1)
                    ax.fill_between(rows["recall"], low, high, color=colour, alpha=0.18, lw=0)
                    area = rows["precision"].mean()  # mean precision over equally spaced recalls
                    ax.plot(rows["recall"], rows["precision"], color=colour, label=f"{size}: {area:.2f}")
                    ax.axhline(rows["prevalence"].iloc[0], color=colour, ls=":", lw=1)
                ax.set(xlim=(0, 1), ylim=(0, 1.03))
                ax.set_title(f"{subtype}: {arm}", pad=20)
                if here.empty:
                    ax.text(0.5, 0.5, "no such nodule in the test set", ha="center", transform=ax.transAxes)
                else:
                    above = {
                        "loc": "lower left",
                        "bbox_to_anchor": (0, 1),
                        "borderaxespad": 0.2,
                    }  # curves may be anywhere
                    ax.legend(**above, ncols=3, fontsize=8.5, handlelength=1.0, columnspacing=1.0)
        for ax in axes[-1]:
            ax.set_xlabel("recall")
        for ax in axes[:, 0]:
            ax.set_ylabel("precision")
        fig.suptitle(
            "Precision-recall by size (mm), mean ± SD over runs, area below the mean (dotted: prevalence)",
            fontsize=10.5,
        )
        return fig


def scarcity(table: pd.DataFrame) -> Figure:
    """Fig. 7: AUROC and AUPRC (rows) of each subtype (columns) against retained clinical data (`fig7_scarcity.csv`).

    Levels of retention are equally spaced, from all to none; cells that cannot be trained are absent.
    """
    shares = sorted(set(table["retention"]), reverse=True)
    arms = list(dict.fromkeys(table["arm"]))
    metrics = [m for m in ("auroc", "auprc") if m in set(table["metric"])]
    with style():
        fig, axes = new_figure(len(metrics), len(SUBTYPES), (10.4, 2.7 * len(metrics) + 1.1), sharex=True, sharey="row")
        handles = {}
        for i, metric in enumerate(metrics):
            for j, subtype in enumerate(SUBTYPES):
                ax = axes[i, j]
                for k, (arm, colour) in enumerate(zip(arms, ARM_COLOURS, strict=False)):
                    rows = table.query("metric == @metric and subtype == @subtype and arm == @arm")
                    rows = rows.set_index("retention").reindex(shares)
                    x = np.arange(len(shares)) + 0.08 * (k - 1)  # side by side: intervals stay readable
                    handles[arm] = ax.plot(x, rows["mean"], "o-", color=colour, ms=4.5)[0]
                    ax.vlines(x, rows["ci_low"], rows["ci_high"], color=colour, lw=1.1, alpha=0.8)
                if metric == "auroc":
                    ax.axhline(0.5, color="black", ls=":", lw=0.8)
                ax.set_xticks(range(len(shares)), [f"{100 * s:g}" for s in shares])
                if i == 0:
                    ax.set_title(subtype)
            axes[i, 0].set_ylabel(metric.upper())
        for ax in axes[-1]:
            ax.set_xlabel("clinical training data kept, %")
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=3)
        said = "Mean over runs, 95 % interval by patient (0 % without synthetic data cannot be trained)"
        fig.suptitle(said, fontsize=10.5)
        return fig


def roc(curves: pd.DataFrame, table: pd.DataFrame | None = None, title: str = "") -> Figure:
    """Fig. 8: ROC of malignancy from three initialisations (`roc_curves`), AUROC as in `fig8_malignancy.csv`."""
    with style():
        fig, axes = new_figure(1, 1, (5.2, 5.0))
        ax = axes[0, 0]
        for arm, colour in zip(dict.fromkeys(curves["arm"]), INIT_COLOURS, strict=False):
            rows = curves[curves["arm"] == arm]
            label = arm
            if table is not None and arm in set(table["arm"]):
                row = table.set_index("arm").loc[arm]
                label = f"{arm}\nAUROC {row['auroc']:.3f} ({row['ci_low']:.3f}–{row['ci_high']:.3f})"
            low, high = (rows["tpr"] - rows["sd"]).clip(0), (rows["tpr"] + rows["sd"]).clip(None, 1)
            ax.fill_between(rows["fpr"], low, high, color=colour, alpha=0.13, lw=0)
            ax.plot(rows["fpr"], rows["tpr"], color=colour, label=label)
        ax.plot([0, 1], [0, 1], color="black", ls=":", lw=0.8)
        ax.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal", xlabel="1 − specificity", ylabel="sensitivity")
        ax.set_title(title or "Malignancy, mean ± SD over runs")
        if curves.empty:
            ax.text(0.5, 0.6, "no test nodules of both classes", ha="center", transform=ax.transAxes)
        else:
            ax.legend(loc="lower right", labelspacing=0.7)
        return fig


def forest(
    table: pd.DataFrame, references: Mapping[str, str] | None = None, names: Mapping[str, str] | None = None
) -> Figure:
    """Ablations (`ablations.csv`): value and 95 % interval of each level, grouped by factor, a panel for each metric.

    Args:
        references: factor to the level that is the default; it is drawn in orange.
        names:      metric to the axis label, which may say which direction is better.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    cells = list(dict.fromkeys(zip(table["factor"], table["level"].astype(str), strict=True)))
    y, position, last = {}, 0.0, None
    for cell in cells:
        position += 1.9 if last is not None and cell[0] != last else (1.0 if last is not None else 0.0)
        y[cell], last = position, cell[0]
    with style():
        size = (3.1 * len(metrics) + 2.4, 0.3 * (position + 1) + 1.5)
        fig, axes = new_figure(1, len(metrics), size, sharey=True)
        for ax, metric in zip(axes[0], metrics, strict=True):
            for row in table[table["metric"] == metric].itertuples():
                cell = (row.factor, str(row.level))
                colour = PALETTE[1] if (references or {}).get(row.factor) == str(row.level) else PALETTE[0]
                ax.plot([row.ci_low, row.ci_high], [y[cell]] * 2, color=colour, lw=1.6, solid_capstyle="butt")
                ax.plot(row.value, y[cell], "s", color=colour, ms=5.5)
            ax.set_xlabel((names or {}).get(metric, metric))
            ax.grid(axis="x", color="0.9", lw=0.8)
            ax.set_axisbelow(True)
        axes[0, 0].set(yticks=list(y.values()), yticklabels=[level for _, level in y], ylim=(position + 0.7, -1.1))
        for factor in dict.fromkeys(f for f, _ in cells):
            top = min(v for (f, _), v in y.items() if f == factor)
            axes[0, 0].annotate(
                factor, (0, top - 0.62), (-8, 0), ("axes fraction", "data"), "offset points", ha="right", va="center",
                fontweight="bold", fontsize=9, annotation_clip=False,
            )  # fmt: skip
        said = "95 % intervals" + (" (orange: the default)" if references else "")
        fig.suptitle(said, fontsize=10.5)
        return fig
