"""Does a lesion match its request? Measured in HU on the voxels that are written."""

import numpy as np
from scipy import ndimage

from hrldm.nodules.histograms import histogram_jsd, histogram_moments, hu_histogram

HALO_MM = 2.0  # beyond the voxels about the lesion (1 mm at least), which hold its partial volume
LIMITS = {"jsd": 0.1, "mean_error_hu": 40.0, "halo_hu": 80.0}  # at most


def assess(
    before: np.ndarray,
    after: np.ndarray,
    lesion: np.ndarray,
    spacing: np.ndarray,
    histogram: np.ndarray,
    core: np.ndarray | None = None,
) -> dict[str, float]:
    """Compare a lesion with its request.

    Args:
        before, after: (x, y, z) HU without and with the lesion.
        lesion:        (x, y, z) bool.
        spacing:       (3,) mm.
        histogram:     (B,) requested.
        core:          (x, y, z) bool, the solid core; None or empty for none.

    Returns:
        requested_mean_hu, obtained_mean_hu, requested_sd_hu, obtained_sd_hu; jsd of the two histograms; mean_error_hu;
        halo_hu, the mean change in `HALO_MM` beyond the voxels about the lesion. With a core: core_mean_hu, and rim_mean_hu if it leaves a rim.
    """
    values = after[lesion]
    asked_mean, asked_sd = histogram_moments(histogram)
    distance, near = ndimage.distance_transform_edt(~lesion, spacing), max(1.0, float(np.max(spacing)))
    halo = (distance > near) & (distance <= near + HALO_MM)
    parts = {} if core is None or not core.any() else {"core_mean_hu": core, "rim_mean_hu": lesion & ~core}
    return {
        "requested_mean_hu": asked_mean,
        "obtained_mean_hu": float(values.mean()),
        "requested_sd_hu": asked_sd,
        "obtained_sd_hu": float(values.std()),
        "jsd": histogram_jsd(histogram, hu_histogram(values, len(histogram))),
        "mean_error_hu": float(abs(values.mean() - asked_mean)),
        "halo_hu": float(np.abs(after - before)[halo].mean()) if halo.any() else 0.0,
    } | {name: float(after[part].mean()) for name, part in parts.items() if part.any()}


def faults(found: dict[str, float]) -> list[str]:
    """The results of `assess` that miss their limits; empty if the lesion passes."""
    return [f"{name} {found[name]:.3g} (at most {limit:g})" for name, limit in LIMITS.items() if found[name] > limit]
