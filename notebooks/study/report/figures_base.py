"""What all figures share: one colour a name, the style, and saving."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hrldm.atomic import atomic

_ORDER = (0, 1, 2, 3, 4, 5, 7, 9)  # of seaborn's ten colour-blind-safe colours: without pale pink and yellow
PALETTE = tuple(sns.color_palette("colorblind").as_hex()[i] for i in _ORDER)
GREY, YELLOW = "#7f7f7f", "#ffe119"
SYSTEM_COLOURS = {
    "real": "#4d4d4d",
    "autoencoder": PALETTE[6],
    "transplant": "#332288",
    "texture": PALETTE[5],
    "maisi-rflow": PALETTE[4],
    "maisi-ddpm": PALETTE[0],
    "hr-ldm": PALETTE[1],
    "hr-ldm-matched": PALETTE[3],
    "hr-ldm-template": "#8c510a",
    # more cannot be told apart: these share one, and are drawn only where a label names them
    **dict.fromkeys(("diff-tumor", "diff-tumor-200", "lesion-diffusion", "lefusion", "maisi-v2", "energy"), "#bdbdbd"),
}
SUBTYPE_COLOURS = {"solid": PALETTE[0], "part-solid": PALETTE[1], "ground-glass": PALETTE[2]}
COLOURS = SYSTEM_COLOURS | SUBTYPE_COLOURS | {  # a name has one colour in every figure
    "6-10": PALETTE[0], "10-20": PALETTE[2], "20-30": PALETTE[1],
    "Clinical (n%)": "#4d4d4d", "Clinical (n%) + Synth (n%)": PALETTE[2], "Clinical (n%) + Synth (100%)": PALETTE[1],
    "scratch": PALETTE[3], "subtype-imbalanced": PALETTE[0], "subtype-balanced": PALETTE[2],
    "Diameter alone": PALETTE[5], "Mean HU alone": PALETTE[4],
    "this autoencoder": PALETTE[0], "linear code": GREY, "feature-JSD (L_hist)": PALETTE[0], "HU-JSD": GREY,
    "default": PALETTE[1], "changed": PALETTE[0], "before": PALETTE[3], "after": PALETTE[0], "obtained": PALETTE[1],
}  # fmt: skip
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
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "hrldm",
}
MAX_SVG_BYTES = 300_000
MAX_PNG_BYTES = 1_000_000


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, left behind without a trace."""
    with mpl.rc_context(STYLE):
        yield


def new_figure(rows: int, columns: int, size: tuple[float, float], **kwargs) -> tuple[Figure, np.ndarray]:
    """`plt.subplots` with constrained layout, axes always an array (rows, columns). Call it within `style()`."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)


def colour_of(name: str, index: int = 0) -> str:
    """The colour of a known name, or the `index`-th of the palette for any other."""
    return COLOURS.get(name, PALETTE[index % len(PALETTE)])


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
    with style():
        if Path(results_dir).resolve().parent.name == "lidc-mini":
            fig.supxlabel("lidc-mini: semi-synthetic", x=0.995, ha="right", fontsize=7.5, color="0.45")
        for dpi in (STYLE["savefig.dpi"], 100, 75):
            png = _rendered(fig, format="png", dpi=dpi, metadata={"Software": None})
            if len(png) <= MAX_PNG_BYTES:
                break
        files = {folder / f"{name}.png": png}
        svg = _rendered(fig, format="svg", metadata={"Date": None})
        if len(svg) <= MAX_SVG_BYTES:
            files[folder / f"{name}.svg"] = svg
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)  # of an earlier, smaller version
    for path, data in files.items():
        with atomic(path) as part:
            part.write_bytes(data)
    plt.close(fig)
    return list(files)


def _rendered(fig: Figure, **how) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, **how)
    return buffer.getvalue()
