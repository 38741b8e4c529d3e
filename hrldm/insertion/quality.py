"""Does a lesion match its request? Measured on its crop, in HU, before insertion into the CT."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from hrldm.nodules.histograms import bin_centres, histogram_jsd, histogram_moments, hu_histogram

HALO_MM = (1.0, 3.0)  # outside the mask, where the feather ends
DENSER_HU = 50.0  # a lesion voxel is this much above the lung around it
LIMITS = {"jsd": 0.1, "mean_error_hu": 40.0, "halo_hu": 80.0, "fill": 0.85}  # fill: minimum; the others: maximum


def assess(
    before: np.ndarray, after: np.ndarray, mask: np.ndarray, histogram: np.ndarray, core: np.ndarray | None = None
) -> dict[str, float]:
    """Compare the lesion of one crop with its request.

    Args:
        before, after: (D, D, D) HU at 1 mm, without and with the lesion.
        mask:          (D, D, D) bool.
        histogram:     (B,) requested.
        core:          (D, D, D) bool, the solid core; None or empty for none.

    Returns:
        requested_mean_hu, obtained_mean_hu, requested_sd_hu, obtained_sd_hu; jsd of the two histograms; mean_error_hu;
        halo_hu, the mean change 1-3 mm outside the mask; fill, the share of lesion voxels denser than the surrounding
        lung, relative to that share of the requested histogram (at most 1). With a core: core_mean_hu, and rim_mean_hu
        if it leaves a rim.
    """
    obtained = hu_histogram(after[mask], len(histogram))
    (asked_mean, asked_sd), (mean, sd) = histogram_moments(histogram), histogram_moments(obtained)
    distance = ndimage.distance_transform_edt(~mask)
    halo = (distance > HALO_MM[0]) & (distance <= HALO_MM[1])
    floor = float(np.median(before[(distance > 0) & (distance <= 6)])) + DENSER_HU
    wished = float(histogram[bin_centres(len(histogram)) > floor].sum() / histogram.sum())
    fill = min(1.0, float((after[mask] > floor).mean()) / wished) if wished > 0.05 else 1.0
    parts = {} if core is None or not core.any() else {"core_mean_hu": core, "rim_mean_hu": mask & ~core}
    return {
        "requested_mean_hu": float(asked_mean),
        "obtained_mean_hu": float(mean),
        "requested_sd_hu": float(asked_sd),
        "obtained_sd_hu": float(sd),
        "jsd": histogram_jsd(histogram, obtained),
        "mean_error_hu": float(abs(mean - asked_mean)),
        "halo_hu": float(np.abs(after - before)[halo].mean()) if halo.any() else 0.0,
        "fill": fill,
    } | {name: float(after[part].mean()) for name, part in parts.items() if part.any()}


def faults(found: dict[str, float]) -> list[str]:
    """The results of `assess` that miss their limits; empty if the lesion passes."""
    return [
        f"{name} {found[name]:.3g} ({'at least' if name == 'fill' else 'at most'} {limit:g})"
        for name, limit in LIMITS.items()
        if (found[name] < limit if name == "fill" else found[name] > limit)
    ]
