"""A picture of what an insertion did: each nodule in three planes, before, after and their difference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hrldm.ct.geometry import sample
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT

PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # RAS axes across and up the page
FIELD_MM, PIXEL_MM, BAR_MM = 50.0, 0.5, 10.0
WINDOW, CHANGE = (-1350.0, 150.0), 800.0  # HU; the difference is drawn from -CHANGE to CHANGE
NOTE = "lung window, level -600 HU, width 1500 HU; difference blue -800 to red +800 HU; bar 10 mm"
MOST = 8  # nodules drawn


def draw_preview(file: Path, ct: CT, stored: np.ndarray, nodules: Sequence[dict]) -> None:
    """Write a PNG with a row for each of the first `MOST` nodules.

    stored:  (X, Y, Z), the voxels that were written
    nodules: of the record: wish, diameter_mm, centre_ras_mm, base
    """
    shown = nodules[:MOST]
    fig = Figure(figsize=(12.5, 1.55 * len(shown) + 0.55), layout="constrained")
    axes = fig.subplots(len(shown), 3 * len(PLANES), squeeze=False)
    after = CT(scaled(stored, ct.slope, ct.inter), ct.affine)
    for number, (row, nodule) in enumerate(zip(axes, shown, strict=True), start=1):
        for k, plane in enumerate(PLANES):
            pair = [_slice(scan, nodule["centre_ras_mm"], plane) for scan in (ct, after)]
            for ax, image in zip(row[3 * k : 3 * k + 3], (*pair, pair[1] - pair[0]), strict=True):
                _show(ax, image, change=image is not pair[0] and image is not pair[1])
            for ax, what in zip(row[3 * k :], (f"{plane}, before", "after", "difference"), strict=False):
                ax.set_title(what if number == 1 else "", fontsize=8)
        base = f"\n{nodule['base']} base" if "base" in nodule else ""
        row[0].set_ylabel(f"{number}: {nodule['wish']['subtype']}\n{nodule['diameter_mm']:g} mm{base}", fontsize=8)
    left_out = f"; {len(nodules) - MOST} more nodules are not shown" if len(nodules) > MOST else ""
    fig.suptitle(f"Synthetic, research only. {NOTE}{left_out}", fontsize=8)
    fig.savefig(file, dpi=150)


def _slice(ct: CT, centre_mm: Sequence[float], plane: str) -> np.ndarray:
    """HU (rows from the top, columns) about a place: the patient's right or front on the image's left, head or front up."""
    across, up = PLANES[plane]
    n = int(FIELD_MM / PIXEL_MM)
    shape, affine = np.ones(3, int), np.diag([PIXEL_MM] * 3 + [1.0])
    affine[:3, 3] = centre_mm
    for axis in (across, up):
        shape[axis] = n
        affine[axis, 3] -= PIXEL_MM * (n - 1) / 2
    image = sample(ct.array, ct.affine, tuple(shape.tolist()), affine, outside=float(WINDOW[0]))
    return image.reshape(n, n)[::-1, ::-1].T


def _show(ax: Axes, image: np.ndarray, change: bool) -> None:
    """Draw HU, or a difference in HU, without ticks and with a scale bar."""
    low, high = (-CHANGE, CHANGE) if change else WINDOW
    ax.imshow(image, "RdBu_r" if change else "gray", vmin=low, vmax=high, interpolation="bilinear")
    ax.set(xticks=[], yticks=[])
    x, y = 0.06 * image.shape[1], 0.94 * image.shape[0]
    (bar,) = ax.plot(
        [x, x + BAR_MM / PIXEL_MM], [y, y], color="black" if change else "white", lw=2, solid_capstyle="butt"
    )
    bar.set_path_effects([withStroke(linewidth=4, foreground="black")])  # seen on the chest wall, too
    ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
