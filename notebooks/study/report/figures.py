"""Every figure the notebooks draw. They take arrays and tables only and return a matplotlib `Figure`.

`save_figure(fig, results_dir, name)` writes and closes it; a notebook shows it by naming `fig` on the cell's last line.
"""

from study.report.figures_base import (
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
from study.report.figures_charts import (
    control_scatter,
    fidelity_bars,
    lesion_distances,
    lesion_histograms,
    loss_curves,
    soft_histogram,
)
from study.report.figures_downstream import forest, precision_recall, roc, scarcity
from study.report.figures_images import (
    before_after,
    confusion_panels,
    montage,
    reconstructions,
    strip,
    subtype_size_grid,
)
from study.report.figures_method import (
    amplification,
    awareness,
    descent,
    losses_by_time,
    reconstruction_bars,
    requested_obtained,
    shape_library,
)

__all__ = [
    "LUNG_WINDOW",
    "PLANES",
    "WINDOW_NOTE",
    "Panel",
    "amplification",
    "awareness",
    "before_after",
    "confusion_panels",
    "control_scatter",
    "descent",
    "fidelity_bars",
    "forest",
    "lesion_distances",
    "lesion_histograms",
    "loss_curves",
    "losses_by_time",
    "montage",
    "new_figure",
    "plane_slice",
    "precision_recall",
    "reconstruction_bars",
    "reconstructions",
    "requested_obtained",
    "roc",
    "save_figure",
    "scarcity",
    "shape_library",
    "show_patch",
    "soft_histogram",
    "strip",
    "style",
    "subtype_size_grid",
]
