"""The requested histogram as an image (the template, our option): a plausible filling for the network to refine.

c_hist enters as one token, without positions; the template shows the network where each requested intensity could lie.
The lesion's voxels get the quantiles of the histogram in the order of

    min(depth, DEPTH_MM) + ROUGHNESS_MM f,    f a unit Gaussian field of `FIELD_MM`,

so that the surface is darkest, the inside bright, and nothing smooth. A solid core gets the highest values. The filled
crop is encoded, and its latent adds c input channels to the U-Net; in training the histogram is the nodule's own.
"""

import numpy as np
from scipy import ndimage

from hrldm.nodules.histograms import quantiles
from hrldm.nodules.masks import depth
from hrldm.nodules.texture import ranked

DEPTH_MM = 4.0  # partial volume and blur darken a nodule to about this depth; deeper, depth has no effect
ROUGHNESS_MM = 0.6
FIELD_MM = 1.5  # grain of lesions at 1 mm
CORE_MM = 8.0  # added to a core's depth: more than depth and field can offset


def template(
    background: np.ndarray,
    mask: np.ndarray,
    histogram: np.ndarray,
    rng: np.random.Generator,
    lead: np.ndarray | None = None,
) -> np.ndarray:
    """HU crop (D, D, D) float32 at 1 mm whose lesion has the histogram exactly; the background elsewhere.

    mask:      (D, D, D) bool, not empty
    histogram: (B,)
    lead:      (D, D, D) from -1 outside a solid core to 1 inside; None or 0 without one
    """
    f = ndimage.gaussian_filter(rng.standard_normal(mask.shape), FIELD_MM, mode="wrap")
    order = np.minimum(depth(mask), DEPTH_MM) + ROUGHNESS_MM * f / f.std()
    if lead is not None:
        order += CORE_MM * lead
    out = background.astype(np.float32)
    out[mask] = ranked(order, mask, quantiles(histogram, int(mask.sum())))
    return out
