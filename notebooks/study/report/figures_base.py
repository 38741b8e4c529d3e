"""What all figures share: style, saving, and patches of CT in radiological orientation.

Arrays are (x, y, z) = RAS voxels: axis 0 runs to the patient's right, axis 1 to anterior, axis 2 to superior. On the
page

- axial:    anterior up,  the patient's right on the image's left;
- coronal:  superior up,  the patient's right on the image's left;
- sagittal: superior up,  anterior on the image's left.

The lung window (level -600, width 1500 HU) is the same in every panel of a figure and named in it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from hrldm.atomic import atomic
from hrldm.ct.geometry import equivalent_diameter

PLANES = ("axial", "sagittal", "coronal")
LUNG_WINDOW = (-600.0, 1500.0)  # level, width in HU
WINDOW_NOTE = "lung window, level −600 HU, width 1500 HU"
# seaborn's "colorblind" without its two colours too light for lines on white
_ORDER = (0, 1, 2, 3, 4, 5, 7, 9)  # of seaborn's ten colour-blind-safe colours: without pale pink and yellow
PALETTE = tuple(sns.color_palette("colorblind").as_hex()[i] for i in _ORDER)
GREY, YELLOW = "#7f7f7f", "#ffe119"
SYSTEM_COLOURS = {  # one colour a system in every figure
    "real": "#4d4d4d",
    "autoencoder": PALETTE[6],
    "transplant": "#a6a6a6",
    "texture": PALETTE[5],
    "maisi-rflow": PALETTE[4],
    "maisi-ddpm": PALETTE[0],
    "hr-ldm": PALETTE[1],
    "hr-ldm-matched": PALETTE[3],
    "hr-ldm-template": "#8c510a",
    "diff-tumor": PALETTE[7],
    "lesion-diffusion": PALETTE[2],
}
SUBTYPE_COLOURS = {"solid": PALETTE[0], "part-solid": PALETTE[1], "ground-glass": PALETTE[2]}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "axes.grid": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "hrldm",
}
MAX_SVG_BYTES = 300_000
MAX_PNG_BYTES = 1_000_000


@dataclass(frozen=True)
class Panel:
    """A volume to be shown."""

    volume: np.ndarray  # (X, Y, Z) HU
    mask: np.ndarray | None = None  # (X, Y, Z) bool, the lesion
    label: str = ""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm

    def centre(self, plane: str) -> tuple[int, float, float]:
        """Slice through the lesion's centre of mass (or of the volume), and that centre in mm on the page (x, y)."""
        shape = self.volume.shape
        lesion = self.mask is not None and self.mask.any()
        point = np.argwhere(self.mask).mean(0) if lesion else (np.array(shape) - 1) / 2
        normal, column, row = {"sagittal": (0, 1, 2), "coronal": (1, 0, 2), "axial": (2, 0, 1)}[plane]
        x, y = ((shape[a] - point[a] - 0.5) * self.spacing[a] for a in (column, row))
        return round(float(point[normal])), float(x), float(y)

    def margin_mm(self, plane: str) -> float:
        """From the lesion's centre to its edge on the page, along the diagonal to the lower right."""
        if self.mask is None or not self.mask.any():
            return self.radius_mm()
        index, x, y = self.centre(plane)
        outline, (row_mm, column_mm) = plane_slice(self.mask, plane, index, self.spacing)
        steps = np.arange(0, 3 * self.radius_mm(), 0.25)
        rows, columns = ((c + steps * np.sqrt(0.5)) / mm for c, mm in ((y, row_mm), (x, column_mm)))
        on_page = (rows < outline.shape[0]) & (columns < outline.shape[1])
        inside = outline[rows[on_page].astype(int), columns[on_page].astype(int)]
        return float(steps[on_page][inside].max(initial=0.5 * self.radius_mm()))

    def radius_mm(self) -> float:
        """Of the sphere of the lesion's volume; a quarter of the patch where there is no mask."""
        if self.mask is None or not self.mask.any():
            return self.volume.shape[0] * self.spacing[0] / 4
        return equivalent_diameter(self.mask.sum() * np.prod(self.spacing)) / 2


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures (seaborn's colour-blind palette), left behind without a trace."""
    with mpl.rc_context(STYLE):
        yield


def new_figure(rows: int, columns: int, size: tuple[float, float], **kwargs) -> tuple[Figure, np.ndarray]:
    """`plt.subplots` with constrained layout, axes always an array (rows, columns). Call it within `style()`."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)


def colour_of(system: str, index: int = 0) -> str:
    """The colour of a named system, or the `index`-th of the palette for any other name."""
    return SYSTEM_COLOURS.get(system, PALETTE[index % len(PALETTE)])


def save_figure(fig: Figure, results_dir: Path, name: str) -> list[Path]:
    """Write `figures/<name>.png`, and `.svg` where it stays under 300 kB, atomically; closes the figure.

    Everything made on `lidc-mini` carries a note that it is semi-synthetic.

    Raises:
        ValueError: `name` holds a folder or an ending.
    """
    if Path(name).name != name or Path(name).suffix:
        raise ValueError(f"figure name {name!r} must be a plain name without folder or ending")
    folder = Path(results_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        if Path(results_dir).resolve().parent.name == "lidc-mini":
            fig.supxlabel("lidc-mini: semi-synthetic", x=0.995, ha="right", fontsize=7.5, color="0.45")
        for ending in ("png", "svg"):
            for dpi in (STYLE["savefig.dpi"], 100, 75):
                buffer = io.BytesIO()
                metadata = {"Date": None} if ending == "svg" else {"Software": None}
                fig.savefig(buffer, format=ending, dpi=dpi, metadata=metadata)
                if ending == "svg" or buffer.tell() <= MAX_PNG_BYTES:
                    break
            path = folder / f"{name}.{ending}"
            if ending == "svg" and buffer.tell() > MAX_SVG_BYTES:
                path.unlink(missing_ok=True)  # of an earlier, smaller version
                continue
            with atomic(path) as part:
                part.write_bytes(buffer.getvalue())
            written.append(path)
    plt.close(fig)
    return written


def plane_slice(
    volume: np.ndarray,
    plane: str,
    index: int | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[np.ndarray, tuple[float, float]]:
    """A slice of a RAS volume (X, Y, Z) as the page shows it (rows from the top), and its (row, column) size in mm.

    `index` counts along the normal of the plane; None = the centre voxel.

    Raises:
        ValueError: unknown plane, or the volume has not three axes.
    """
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; choose one of {', '.join(PLANES)}")
    if volume.ndim != 3:
        raise ValueError(f"a slice needs a volume (X, Y, Z), not {volume.shape}")
    normal = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    chosen = np.take(volume, volume.shape[normal] // 2 if index is None else index, axis=normal)  # (columns, rows)
    sizes = [s for axis, s in enumerate(spacing) if axis != normal]
    return chosen[::-1, ::-1].T, (float(sizes[1]), float(sizes[0]))


def show_patch(
    ax: Axes,
    volume: np.ndarray,
    plane: str = "axial",
    index: int | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    mask: np.ndarray | None = None,
    title: str = "",
    scale_bar_mm: float | None = None,
    window: tuple[float, float] = LUNG_WINDOW,
    colour: str = YELLOW,
    **imshow,
) -> AxesImage:
    """Draw one slice of a volume (X, Y, Z) in HU, with axes in mm, the mask's outline and a scale bar on demand."""
    image, (row_mm, column_mm) = plane_slice(volume, plane, index, spacing)
    extent = (0, image.shape[1] * column_mm, image.shape[0] * row_mm, 0)
    level, width = window
    if "norm" not in imshow:
        imshow = {"vmin": level - width / 2, "vmax": level + width / 2} | imshow
    shown = ax.imshow(image, extent=extent, **({"cmap": "gray", "interpolation": "bilinear"} | imshow))
    if mask is not None and mask.any():
        outline = plane_slice(np.asarray(mask, float), plane, index, spacing)[0]
        if outline.any() and not outline.all():
            x = (np.arange(image.shape[1]) + 0.5) * column_mm
            y = (np.arange(image.shape[0]) + 0.5) * row_mm
            ax.contour(x, y, outline, levels=[0.5], colors=[colour], linewidths=1.0)
    if scale_bar_mm:
        scale_bar(ax, scale_bar_mm)
    if title:
        ax.set_title(title)
    bare(ax)
    return shown


def bare(ax: Axes) -> None:
    """No ticks, no frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def scale_bar(ax: Axes, length_mm: float) -> None:
    """A bar of `length_mm`, half of it where that spans most of the patch, in the lower left corner of what axes show now."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    if length_mm > 0.6 * abs(right - left):
        length_mm /= 2
    x0, y0 = left + 0.05 * (right - left), bottom + 0.06 * (top - bottom)
    for colour, line in (("black", 4.0), ("white", 2.0)):  # readable on lung and on soft tissue
        ax.plot([x0, x0 + length_mm], [y0, y0], color=colour, lw=line, solid_capstyle="butt", zorder=3)
    text = ax.text(x0, y0 + 0.03 * (top - bottom), f"{length_mm:g} mm", color="white", va="bottom", fontsize=8)
    text.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    ax.set(xlim=(left, right), ylim=(bottom, top))
