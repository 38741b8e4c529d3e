"""Every figure the notebooks draw. They take arrays and tables only and return a matplotlib `Figure`.

`save_figure(fig, results_dir, name)` writes and closes it; a notebook shows it by naming `fig` on the cell's last line.
"""

from hrldm.report.figures_base import (
    LUNG_WINDOW,
    PLANES,
    WINDOW_NOTE,
    Panel,
    new_figure,
    plane_slice,
    save_figure,
    show_patch,
    style,
)
from hrldm.report.figures_charts import (
    control_scatter,
    fidelity_bars,
    lesion_distances,
    lesion_histograms,
    loss_curves,
    soft_histogram,
)
from hrldm.report.figures_downstream import forest, precision_recall, roc, scarcity
from hrldm.report.figures_images import (
    before_after,
    confusion_panels,
    montage,
    reconstructions,
    strip,
    subtype_size_grid,
)

__all__ = [
    "LUNG_WINDOW",
    "PLANES",
    "WINDOW_NOTE",
    "Panel",
    "before_after",
    "confusion_panels",
    "control_scatter",
    "fidelity_bars",
    "forest",
    "lesion_distances",
    "lesion_histograms",
    "loss_curves",
    "montage",
    "new_figure",
    "plane_slice",
    "precision_recall",
    "reconstructions",
    "roc",
    "save_figure",
    "scarcity",
    "show_patch",
    "soft_histogram",
    "strip",
    "style",
    "subtype_size_grid",
]
