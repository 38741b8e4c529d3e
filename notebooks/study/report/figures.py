"""Every figure the notebooks draw: one function a kind of picture. They take arrays and tables, and return a matplotlib `Figure`.

`save_figure(fig, results_dir, name)` writes and closes it; a notebook shows it by naming `fig` on the cell's last line.
"""

from study.report.figures_base import new_figure, save_figure, style
from study.report.figures_charts import (
    facets,
    histogram,
    intervals,
    legend,
    lesion_histograms,
    lines,
    scatter,
    soft_histogram,
)
from study.report.figures_images import Panel, before_after, crosstab, differences, montage

__all__ = [
    "Panel", "before_after", "crosstab", "differences", "facets", "histogram", "intervals", "legend", "lesion_histograms",
    "lines", "montage", "new_figure", "save_figure", "scatter", "soft_histogram", "style",
]  # fmt: skip
