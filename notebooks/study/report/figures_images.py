"""Figures made of CT patches (Figs. 4 and 5, before/after, montages). See `figures_base` for orientation and window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hrldm.config import SIZE_BINS_MM, SUBTYPES
from study.report.figures_base import PLANES, WINDOW_NOTE, YELLOW, Panel, bare, new_figure, scale_bar, show_patch, style


def subtype_size_grid(
    cells: Mapping[tuple[str, str], Sequence[Panel]], per_cell: int = 3, note: str = "", zoom: float = 1.7
) -> Figure:
    """Fig. 4: subtypes (rows) x sizes (columns); in each cell one real and two synthetic nodules with their zooms.

    Args:
        cells: (subtype, size such as `6-10`) to its panels, the real one first; a missing cell is left empty.
        zoom:  half the side of the zoomed view in lesion radii.
    """
    sizes = [f"{low:g}-{high:g}" for low, high in SIZE_BINS_MM]
    with style():
        columns = len(sizes) * per_cell
        fig, axes = new_figure(2 * len(SUBTYPES), columns, (1.35 * columns + 0.5, 1.42 * 2 * len(SUBTYPES) + 0.8))
        for ax in axes.flat:
            bare(ax)
        for row, subtype in enumerate(SUBTYPES):
            axes[2 * row, 0].set_ylabel(subtype, fontsize=11, fontweight="bold")
            axes[2 * row + 1, 0].set_ylabel("zoom", fontsize=9)
            for column, size in enumerate(sizes):
                for k, panel in enumerate(cells.get((subtype, size), ())[:per_cell]):
                    _with_zoom(
                        axes[2 * row, column * per_cell + k], axes[2 * row + 1, column * per_cell + k], panel, zoom
                    )
        for column, size in enumerate(sizes):
            middle = axes[0, column * per_cell + per_cell // 2]
            middle.annotate(
                f"{size} mm", (0.5, 1.0), (0, 17), "axes fraction", "offset points", ha="center", fontsize=11,
                fontweight="bold",
            )  # fmt: skip
        _heading(fig, "Real and synthetic nodules, axial", note)
        return fig


def _with_zoom(context: Axes, close: Axes, panel: Panel, zoom: float) -> None:
    """A panel in its context and, below, its lesion, an arrow at its margin in both."""
    index, x, y = panel.centre("axial")
    margin = panel.margin_mm("axial")
    for ax, title in ((context, panel.label), (close, "")):
        show_patch(ax, panel.volume, "axial", index, panel.spacing, title=title)
    (left, right), (bottom, top) = context.get_xlim(), context.get_ylim()
    half = min(zoom * max(panel.radius_mm(), 3.0), (right - left) / 2, (bottom - top) / 2)
    cx, cy = np.clip(x, left + half, right - half), np.clip(y, top + half, bottom - half)
    close.set(xlim=(cx - half, cx + half), ylim=(cy + half, cy - half))
    _arrow(context, x, y, margin + 1, 9.0)
    _arrow(close, x, y, margin, 0.5 * half)
    scale_bar(context, 10)
    scale_bar(close, 5)


def before_after(
    before: Panel,
    after: Panel,
    limit_hu: float | None = None,
    note: str = "",
    titles: Sequence[str] = ("before", "after"),
) -> Figure:
    """A CT patch before and after the insertion and their difference in HU, in three planes through the lesion.

    The lesion is `after.mask` (or `before.mask`); `limit_hu` bounds the colours (default: the 99.9 percentile).

    Raises:
        ValueError: the two volumes differ in shape.
    """
    if before.volume.shape != after.volume.shape:
        raise ValueError(f"before {before.volume.shape} and after {after.volume.shape} must have one shape")
    lesion = after if after.mask is not None else before
    difference = after.volume.astype(float) - before.volume.astype(float)
    limit = limit_hu or max(50.0, float(np.percentile(np.abs(difference), 99.9)))
    with style():
        fig, axes = new_figure(3, 3, (8.6, 8.2))
        for row, plane in enumerate(PLANES):
            index = lesion.centre(plane)[0]
            common = {"plane": plane, "index": index, "spacing": after.spacing}
            show_patch(axes[row, 0], before.volume, **common, scale_bar_mm=10)
            show_patch(axes[row, 1], after.volume, **common, mask=lesion.mask)
            colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            shown = show_patch(axes[row, 2], difference, **common, **colours)
            axes[row, 0].set_ylabel(plane)
        for ax, title in zip(axes[0], (*titles, "difference"), strict=True):
            ax.set_title(title)
        fig.colorbar(shown, ax=axes[:, 2], label="difference, HU", shrink=0.6, extend="both")
        _heading(fig, "", note)
        return fig


def montage(
    panels: Sequence[Panel], columns: int = 10, plane: str = "axial", title: str = "", outline: bool = False
) -> Figure:
    """Contact sheet: one slice through each lesion, its label above, one scale bar on the first.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("a montage needs at least one panel")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        side = 10.0 / max(columns, 4)
        fig, axes = new_figure(rows, columns, (side * columns, (side + 0.2) * rows + 0.7))
        for ax in axes.flat:
            ax.set_axis_off()
        for k, (ax, panel) in enumerate(zip(axes.flat, panels, strict=False)):
            mask = panel.mask if outline else None
            index = panel.centre(plane)[0]
            show_patch(ax, panel.volume, plane, index, panel.spacing, mask, scale_bar_mm=10 if k == 0 else None)
            ax.set_title(panel.label, fontsize=min(9, 4.5 + 2.5 * side), pad=2)
        _heading(fig, title, plane)
        return fig


def reconstructions(
    originals: Sequence[Panel],
    others: Mapping[str, Sequence[np.ndarray]],
    limit_hu: float = 200.0,
    plane: str = "axial",
) -> Figure:
    """Each original (rows) beside its reconstructions and, after them, each reconstruction's error in HU.

    Raises:
        ValueError: a reconstruction is missing for an original.
    """
    for name, volumes in others.items():
        if len(volumes) != len(originals):
            raise ValueError(f"{name}: {len(volumes)} reconstructions of {len(originals)} originals")
    with style():
        n = 1 + 2 * len(others)
        fig, axes = new_figure(len(originals), n, (1.9 * n + 0.9, 1.9 * len(originals) + 0.7))
        shown = None
        for row, (original, *made) in enumerate(zip(originals, *others.values(), strict=True)):
            common = {"plane": plane, "index": original.centre(plane)[0], "spacing": original.spacing}
            show_patch(axes[row, 0], original.volume, **common, scale_bar_mm=10 if row == 0 else None)
            axes[row, 0].set_ylabel(original.label)
            for k, volume in enumerate(made):
                show_patch(axes[row, 1 + k], volume, **common)
                error = np.asarray(volume, float) - original.volume
                colours = {"cmap": "RdBu_r", "vmin": -limit_hu, "vmax": limit_hu}
                shown = show_patch(axes[row, 1 + len(others) + k], error, **common, **colours)
        names = ["original", *others, *(f"{name}\n− original" for name in others)]
        for ax, title in zip(axes[0], names, strict=True):
            ax.set_title(title)
        if shown is not None:
            fig.colorbar(shown, ax=axes[:, -1], label="error, HU", shrink=0.8, extend="both")
        _heading(fig, "", plane)
        return fig


def confusion_panels(panels: Mapping[tuple[str, str], Sequence[Panel]], observer: str, per_cell: int = 4) -> Figure:
    """Fig. 5: examples in a confusion-matrix layout; keys are (truth, called), each `real` or `synthetic`.

    Cells without an example say so. The observer (radiologist or model) is named in the title.
    """
    kinds = ("real", "synthetic")
    with style():
        fig = new_figure(1, 1, (1.85 * 2 * -(-per_cell // 2) + 0.4, 8.8))[0]
        fig.clear()
        blocks = fig.subfigures(2, 2, wspace=0.03, hspace=0.04)
        for i, truth in enumerate(kinds):
            for j, called in enumerate(kinds):
                block = blocks[i, j]
                block.set_facecolor("#e8f1f8" if i == j else "#fbf0dd")
                block.suptitle(f"truth: {truth} · called: {called}", fontsize=10.5)
                chosen = panels.get((truth, called), ())[:per_cell]
                axes = block.subplots(2, -(-per_cell // 2), squeeze=False)
                for k, ax in enumerate(axes.flat):
                    ax.set_axis_off()
                    if k < len(chosen):
                        index = chosen[k].centre("axial")[0]
                        bar = 10 if k == 0 else None
                        show_patch(ax, chosen[k].volume, "axial", index, chosen[k].spacing, scale_bar_mm=bar)
                        ax.set_title(chosen[k].label, fontsize=8.5)
                if not chosen:
                    block.text(0.5, 0.45, "no such case", ha="center", va="center", color="0.35")
        _heading(fig, f"Real or synthetic? Observer: {observer}", "axial")
        return fig


def strip(volumes: Sequence[Panel], plane: str = "axial", title: str = "", windowed: bool = True) -> Figure:
    """A row of volumes, for example z_t of Eq. 4 at growing t; each panel's label (`t = 250`) above it.

    With `windowed` False the volumes are not HU (latents): one common grey scale over their 1-99 percentiles.
    """
    with style():
        n = len(volumes)
        fig, axes = new_figure(1, n, (min(1.9 * n, 12.0), 12.0 / max(n, 6.3) + 0.6))
        stacked = np.concatenate([p.volume.ravel() for p in volumes])
        low, high = np.percentile(stacked, (1, 99))
        window = {} if windowed else {"vmin": low, "vmax": high}
        for k, (ax, panel) in enumerate(zip(axes[0], volumes, strict=True)):
            index = panel.centre(plane)[0]
            bar = 10 if k == 0 and windowed else None
            show_patch(ax, panel.volume, plane, index, panel.spacing, panel.mask, panel.label, bar, **window)
        note = f"{plane}, common grey scale" if not windowed else plane
        _heading(fig, title, note, window_note=windowed)
        return fig


def _heading(fig: Figure, title: str, note: str, window_note: bool = True) -> None:
    """Title in one line, and below it what is shown and in which window."""
    said = " · ".join(part for part in (note, WINDOW_NOTE if window_note else "") if part)
    fig.suptitle(f"{title}\n{said}" if title else said, fontsize=10.5)


def _arrow(ax: Axes, x: float, y: float, radius: float, length: float) -> None:
    """A yellow arrow from the lower right to the lesion's margin, in mm of the page."""
    d = np.sqrt(0.5)
    tip, tail = (x + d * radius, y + d * radius), (x + d * (radius + length), y + d * (radius + length))
    ax.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "color": YELLOW, "lw": 1.3, "mutation_scale": 9})
