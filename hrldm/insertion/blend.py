"""Feather a generated lesion into the crop it was made in; `finish` puts it into a CT.

d is the distance (mm) of a voxel to the lesion mask, 0 inside it. The weight is a Gaussian cut at the margin m = 3σ and
shifted so that it ends in zero without a step:

    w(d) = (exp(−d²/2σ²) − exp(−m²/2σ²)) / (1 − exp(−m²/2σ²))  for d < m,   w = 0 for d ≥ m,   hence w = 1 on the mask.
"""

import numpy as np
from scipy import ndimage

FEATHER_MM = 1.0  # σ
MARGIN_SIGMAS = 3.0  # the weight is exactly 0 from this many σ outside the mask


def feather(mask: np.ndarray) -> np.ndarray:
    """Weights w(d) (D, D, D) float32 of a lesion mask (D, D, D) at 1 mm that is not empty."""
    distance, end = ndimage.distance_transform_edt(~mask), np.exp(-(MARGIN_SIGMAS**2) / 2)
    w = (np.exp(-(distance**2) / (2 * FEATHER_MM**2)) - end) / (1 - end)
    return np.clip(w, 0, 1).astype(np.float32)


def feathered(background: np.ndarray, lesion_hu: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paste lesions (N, D, D, D) into their backgrounds; voxels beyond the feather are the background's own."""
    out = background.astype(np.float32)
    for i in range(len(out)):
        w = feather(mask[i])
        out[i] = np.where(w > 0, (1 - w) * out[i] + w * lesion_hu[i], out[i])
    return out
