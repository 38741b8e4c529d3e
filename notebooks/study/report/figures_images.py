"""Figures made of CT patches, in radiological orientation: slices side by side, before and after, and cells of examples.

Arrays are (x, y, z) = RAS voxels: axis 0 runs to the patient's right, axis 1 to anterior, axis 2 to superior. On the
page

- axial:    anterior up,  the patient's right on the image's left;
- coronal:  superior up,  the patient's right on the image's left;
- sagittal: superior up,  anterior on the image's left.

The lung window (level -600, width 1500 HU) is the same in every panel of every figure and named in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from hrldm.ct.geometry import equivalent_diameter
from study.report.figures_base import YELLOW, new_figure, style

AXES = {"axial": (2, 0, 1), "sagittal": (0, 1, 2), "coronal": (1, 0, 2)}  # of a plane: normal, across, up the page
LUNG_WINDOW = (-1350.0, 150.0)  # HU
WINDOW_NOTE = "lung window, level −600 HU, width 1500 HU"
BARS_MM = (50, 10, 5)
ZOOM = 1.7  # half the side of a zoomed view, in radii of the lesion
AGREE, DIFFER = "#e8f1f8", "#fbf0dd"


@dataclass(frozen=True)
class Panel:
    """A volume to be shown, by the slice through its lesion.

    Raises:
        ValueError: unknown plane, or the volume has not three axes.
    """

    volume: np.ndarray  # (X, Y, Z)
    mask: np.ndarray | None = None  # (X, Y, Z) bool, the lesion
    label: str = ""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    plane: str = "axial"
    kind: str = "HU"  # in the lung window; "difference": HU from blue to red; "latent": no unit, grey
    outline: bool = False  # draw the mask's
    slices_off: int = 0  # how many slices from the lesion's centre

    def __post_init__(self) -> None:
        if self.plane not in AXES or self.volume.ndim != 3:
            raise ValueError(
                f"a panel needs a volume (X, Y, Z) and a plane ({', '.join(AXES)}), not {self.volume.shape} and {self.plane!r}"
            )

    @property
    def pixel(self) -> tuple[float, float]:
        """Width and height of a pixel on the page, mm."""
        return tuple(self.spacing[axis] for axis in AXES[self.plane][1:])

    @cached_property
    def centre(self) -> tuple[int, float, float]:
        """The slice through the lesion's centre of mass (or the volume's middle), and that centre in mm on the page (x, y)."""
        shape = np.array(self.volume.shape)
        lesion = self.mask is not None and self.mask.any()
        point = np.argwhere(self.mask).mean(0) if lesion else shape // 2
        normal, *on_page = AXES[self.plane]
        x, y = (shape - point - 0.5)[on_page] * self.pixel
        number = round(float(point[normal])) + self.slices_off
        return min(max(number, 0), int(shape[normal]) - 1), float(x), float(y)

    def page(self, array: np.ndarray) -> np.ndarray:
        """The slice of an array (X, Y, Z) as the page shows it: rows from the top."""
        return np.take(array, self.centre[0], axis=AXES[self.plane][0])[::-1, ::-1].T


def show(ax: Axes, panel: Panel, limits: tuple[float, float] = LUNG_WINDOW, bar: bool = False) -> AxesImage:
    """Draw a panel's slice with axes in mm, and a scale bar on demand."""
    image, (width, height) = panel.page(panel.volume), panel.pixel
    rows, columns = image.shape
    colours = "RdBu_r" if panel.kind == "difference" else "gray"
    extent = (0, columns * width, rows * height, 0)
    shown = ax.imshow(image, colours, interpolation="bilinear", vmin=limits[0], vmax=limits[1], extent=extent)
    if panel.outline and panel.mask is not None:
        lesion = panel.page(panel.mask)
        if lesion.any() and not lesion.all():
            x, y = (np.arange(columns) + 0.5) * width, (np.arange(rows) + 0.5) * height
            ax.contour(x, y, lesion, levels=[0.5], colors=[YELLOW], linewidths=1.0)
    ax.set_title(panel.label, fontsize=8.5, pad=2)
    if bar:
        scale_bar(ax)
    return shown


def scale_bar(ax: Axes) -> None:
    """The longest of `BARS_MM` that takes at most 0.6 of what the axes show now, in the lower left corner."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    length = next((mm for mm in BARS_MM if mm <= 0.6 * (right - left)), BARS_MM[-1])
    x0, y0 = left + 0.05 * (right - left), bottom + 0.06 * (top - bottom)
    for colour, line in (("black", 4.0), ("white", 2.0)):  # readable on lung and on soft tissue
        ax.plot([x0, x0 + length], [y0, y0], color=colour, lw=line, solid_capstyle="butt", zorder=3)
    text = ax.text(x0, y0 + 0.03 * (top - bottom), f"{length:g} mm", color="white", va="bottom", fontsize=8)
    text.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    ax.set(xlim=(left, right), ylim=(bottom, top))


def montage(panels: Sequence[Panel], columns: int = 10, title: str = "", rows: Sequence[str] = ()) -> Figure:
    """Panels side by side, each with its label above; a scale bar on the first of each row, which may have a name,
    and where the magnification differs.

    Differences share one scale of colours, latents one of grey.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("a montage needs at least one panel")
    columns = min(columns, len(panels))
    lines, side = -(-len(panels) // columns), 10.0 / max(columns, 4)
    limits, changed = _limits(panels), any(p.kind == "difference" for p in panels)
    with style():
        fig, axes = new_figure(lines, columns, (side * columns + 0.3 + changed, (side + 0.2) * lines + 0.7))
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for k, (ax, panel) in enumerate(zip(axes.flat, panels, strict=False)):
            first = panels[k - k % columns]
            bar = (panel is first or panel.spacing != first.spacing) and panel.kind != "latent"
            shown = show(ax, panel, limits[panel.kind], bar)
            ax.title.set_fontsize(min(9, 4.5 + 2.5 * side))
        for ax, name in zip(axes[:, 0], rows, strict=False):
            ax.set_ylabel(name)
        if changed:
            fig.colorbar(shown, ax=axes[:, -1], label="difference, HU", shrink=0.7, extend="both")
        _heading(fig, title, panels)
        return fig


def differences(
    first: Sequence[Panel], others: Mapping[str, Iterable[np.ndarray]], name: str = "original", title: str = ""
) -> Figure:
    """Each volume (a row, named by its label) beside what became of it, and after them the differences in HU.

    Raises:
        ValueError: something is missing in a row, or shapes differ.
    """
    panels = []
    for panel, *made in zip(first, *others.values(), strict=True):
        row = [replace(panel, label=name, outline=False)]
        row += [replace(panel, volume=v, label=label) for label, v in zip(others, made, strict=True)]
        for after in row[1:]:
            change = np.asarray(after.volume, float) - panel.volume
            row.append(replace(row[0], volume=change, label=f"{after.label}\n− {name}", kind="difference"))
        panels += [replace(p, label="") for p in row] if panels else row
    return montage(panels, 1 + 2 * len(others), title, [p.label for p in first])


def before_after(before: Panel, after: Panel, title: str = "") -> Figure:
    """A CT patch before and after the insertion and the difference, in three planes through the lesion, `after.mask`."""
    rows = [replace(after, volume=before.volume, plane=plane, label=plane, outline=True) for plane in AXES]
    return differences(rows, {"after": [after.volume] * len(rows)}, "before", title)


def crosstab(
    cells: Mapping[tuple[str, str], Sequence[Panel]],
    rows: Sequence[str],
    columns: Sequence[str],
    wide: int,
    title: str,
    name: str = "{}, {}",
    zoom: bool = False,
) -> Figure:
    """Examples of each (row, column), up to two lines of `wide` panels. A cell without an example says so.

    Args:
        name: title of a cell, a format of its row and column.
        zoom: each cell has one line, and below each panel its lesion enlarged, with an arrow at its margin in both.
            Without it the cells are those of a confusion matrix, the diagonal tinted blue and the others orange.
    """
    side = min(1.9, 13 / (wide * len(columns)))
    with style():
        size = (side * wide * len(columns) + 0.3, (2 * side + 0.7) * len(rows) + 0.5)
        fig = plt.figure(figsize=size, layout="constrained")
        blocks = fig.subfigures(len(rows), len(columns), squeeze=False, wspace=0.03, hspace=0.03)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            block, panels = blocks[i, j], cells.get((row, column), ())
            block.suptitle(name.format(row, column), fontweight="bold")
            axes = block.subplots(2, wide, squeeze=False)
            for ax in axes.flat:
                ax.set_axis_off()
            if not panels:
                block.text(0.5, 0.45, "no such case", ha="center", va="center", color="0.35")
            if not zoom:
                block.set_facecolor(AGREE if i == j else DIFFER)
            for k, (ax, panel) in enumerate(zip(axes[0] if zoom else axes.flat, panels, strict=False)):
                show(ax, panel, bar=zoom or k == 0 or panel.spacing != panels[0].spacing)
                if zoom:
                    _enlarge(ax, axes[1, k], panel)
        _heading(fig, title, sum(map(list, cells.values()), []))
        return fig


def _enlarge(context: Axes, close: Axes, panel: Panel) -> None:
    """Draw the panel's lesion enlarged, and in both an arrow from the lower right to the lesion's margin."""
    _, x, y = panel.centre
    radius = equivalent_diameter(panel.mask.sum() * np.prod(panel.spacing)) / 2
    (left, right), (bottom, top) = context.get_xlim(), context.get_ylim()
    half = min(ZOOM * max(radius, 3.0), (right - left) / 2, (bottom - top) / 2)
    cx, cy = np.clip(x, left + half, right - half), np.clip(y, top + half, bottom - half)
    show(close, replace(panel, label=""))
    close.set(xlim=(cx - half, cx + half), ylim=(cy + half, cy - half))
    scale_bar(close)
    down, across = np.nonzero(panel.page(panel.mask))
    width, height = panel.pixel
    margin = np.max(((across + 0.5) * width - x + (down + 0.5) * height - y) * np.sqrt(0.5), initial=0.0)
    for ax, gap, length in ((context, 1.0, 9.0), (close, 0.0, half / 2)):
        near, far = (np.sqrt(0.5) * (margin + gap + more) for more in (0, length))
        arrow = {"arrowstyle": "-|>", "color": YELLOW, "lw": 1.3, "mutation_scale": 9}
        ax.annotate("", (x + near, y + near), (x + far, y + far), arrowprops=arrow)


def _limits(panels: Sequence[Panel]) -> dict[str, tuple[float, float]]:
    """The limits of grey or colour of each kind of panel, the same for all panels of the kind."""
    kinds = ("difference", "latent")
    change, latent = (np.concatenate([[0.0], *(p.volume.ravel() for p in panels if p.kind == k)]) for k in kinds)
    reach = max(50.0, float(np.percentile(np.abs(change), 99.9)))
    return {"HU": LUNG_WINDOW, "difference": (-reach, reach), "latent": tuple(np.percentile(latent, (1, 99)))}


def _heading(fig: Figure, title: str, panels: Sequence[Panel]) -> None:
    """The title, and below it which planes are shown in which window."""
    planes = ", ".join(dict.fromkeys(panel.plane for panel in panels))
    note = "common grey scale" if all(panel.kind == "latent" for panel in panels) else WINDOW_NOTE
    fig.suptitle(f"{title}\n{planes} · {note}".strip())
