"""How well Stage I keeps a CT: PSNR, SSIM, MAE and the lesion's histogram, by kind of tissue, with a linear sanity line.

With x the CT and y its reconstruction, both clipped to the model's window of -1000..1000 HU (Section 5), and R a region
of one crop:

    psnr_db   10 log10(W^2 / mean_R (y - x)^2), W = 2000 HU
    ssim      mean over R of the structural similarity map (torchmetrics, Gaussian window of 1.5 voxels, range W)
    mae_hu    mean_R |y - x|
    hist_jsd  Jensen-Shannon divergence (Eq. 8) of the 40-bin HU histograms of the lesion (Section 5), nats

Each is computed per nodule, then averaged; intervals resample patients. The floor of every latent system is here.

The sanity line is the best linear code of the same size: the leading principal components of 4x4x4 blocks, as many as
the latent has channels, fitted on training crops. An autoencoder below it is not trained.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from hrldm.config import HU_MAX, HU_MIN
from hrldm.model.autoencoder import LinearCode, denormalise_hu, normalise_hu
from hrldm.nodules.histograms import histogram_jsd, hu_histogram
from hrldm.nodules.patches import Patches
from study.measure.intensity import lesion_pairs
from study.measure.statistics import mean_interval

TISSUE_HU = -400.0  # parenchyma below, vessels and soft tissue above
MIN_VOXELS = 8  # smaller regions are left out: their PSNR is noise
MAX_FIT_BLOCKS = 200_000


def regions(hu: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Kinds of tissue of one crop (D, D, D), judged on the original: crop, lung, vessels and soft tissue, lesion.

    Lung, and vessels and soft tissue, share what is not lesion between them.
    """
    lesion = np.asarray(mask, bool)
    dense = np.asarray(hu) >= TISSUE_HU
    return {
        "crop": np.ones(lesion.shape, bool),
        "lung": ~dense & ~lesion,
        "vessels and soft tissue": dense & ~lesion,
        "lesion": lesion,
    }


def similarity_map(reconstruction: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """Structural similarity at each voxel of two crops (D, D, D) in HU."""
    x, y = (normalise_hu(torch.from_numpy(np.asarray(a, np.float32)))[None, None] for a in (hu, reconstruction))
    return structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)[1][0, 0].numpy()


def nodule_scores(reconstruction: np.ndarray, nodules: Patches) -> pd.DataFrame:
    """One row per nodule, region and metric: nodule_id, patient_id, region, metric, value.

    reconstruction: (N, D, D, D) HU of the nodules' crops; raises as `lesion_pairs`
    """
    rows = []
    for row, *crops, lesion in lesion_pairs("reconstruction", reconstruction, nodules):
        made, truth = (np.clip(np.asarray(a, np.float64), HU_MIN, HU_MAX) for a in crops)
        error, similarity = made - truth, similarity_map(made, truth)
        for region, inside in regions(truth, lesion).items():
            if inside.sum() < MIN_VOXELS and region != "lesion":
                continue
            mse = max(float(np.mean(error[inside] ** 2)), 1e-12)
            values = {
                "psnr_db": 10 * np.log10((HU_MAX - HU_MIN) ** 2 / mse),
                "ssim": float(similarity[inside].mean()),
                "mae_hu": float(np.abs(error[inside]).mean()),
            }
            if region == "lesion":
                values["hist_jsd"] = histogram_jsd(hu_histogram(made[inside]), hu_histogram(truth[inside]))
            rows += [(row.nodule_id, row.patient_id, region, metric, value) for metric, value in values.items()]
    return pd.DataFrame(rows, columns="nodule_id patient_id region metric value".split())


def autoencoder_table(scores: Mapping[str, pd.DataFrame], n_boot: int, seed: int) -> pd.DataFrame:
    """`autoencoder.csv`: region, metric, value (mean over nodules), ci_low, ci_high (patient bootstrap), n.

    Args:
        scores: system to its `nodule_scores`. The first one's regions keep their names, those of the others carry the
            system's: `lesion`, then `lesion (linear code)`.
    """
    rows = []
    for k, (system, table) in enumerate(scores.items()):
        for (region, metric), part in table.groupby(["region", "metric"], sort=False):
            e = mean_interval(part["value"], part["patient_id"], n_boot, seed)
            name = region if k == 0 else f"{region} ({system})"
            rows.append((name, metric, e.value, e.ci_low, e.ci_high, e.n))
    return pd.DataFrame(rows, columns="region metric value ci_low ci_high n".split())


def linear_code(train_hu: np.ndarray, channels: int) -> LinearCode:
    """The best linear code with `channels` numbers for each 4x4x4 block of the training crops (N, D, D, D) in HU.

    Crops are thinned out evenly to about `MAX_FIT_BLOCKS` blocks.

    Raises:
        ValueError: fewer blocks than a block has voxels.
    """
    per_crop = int(np.prod([n // 4 for n in train_hu.shape[1:]]))
    n = min(len(train_hu), max(1, MAX_FIT_BLOCKS // max(per_crop, 1)))
    if n * per_crop < 64:
        raise ValueError(f"a linear code needs at least 64 blocks of 4x4x4 voxels, got crops {train_hu.shape}")
    chosen = train_hu[np.linspace(0, len(train_hu) - 1, n).astype(int)]
    return LinearCode(channels, overlap=False).fit(normalise_hu(torch.from_numpy(chosen.astype(np.float32)))[:, None])


@torch.no_grad()
def linear_reconstruction(code: LinearCode, hu: np.ndarray) -> np.ndarray:
    """HU crops (N, D, D, D) through a linear code and back, float32."""
    volumes = (normalise_hu(torch.from_numpy(crop.astype(np.float32)))[None, None] for crop in hu)
    return np.stack([denormalise_hu(code.decode(code.analysis(x)).clamp(0, 1))[0, 0].numpy() for x in volumes])
