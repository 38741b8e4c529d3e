"""Does the histogram term (Section 3.2.3) see intensity, and what does it do? Measurements behind notebooks 02 and 03.

The paper takes features of D_trunc as "a proxy for voxel intensities" and does not show it. Here lesions are changed in
HU in a known way (offset and contrast inside the mask), encoded, and two divergences of the changed from the unchanged
lesion are compared:

    hu_jsd       Eq. 8 on the 40-bin HU histograms, what radiologists would call the change
    feature_jsd  Eq. 8 on the soft histograms of D_trunc's channels (Eq. 7), mean over channels: L_hist itself

A term that is aware of intensity ranks the changes alike. Latents are scaled as in training.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from hrldm.config import HU_MAX, HU_MIN
from hrldm.model.autoencoder import FACTOR
from hrldm.model.diffusion import Schedule, blend
from hrldm.model.losses import inpainting_loss, jensen_shannon
from hrldm.model.unet import ConditionalUNet
from hrldm.nodules.histograms import histogram_jsd, hu_histogram
from hrldm.nodules.patches import Patches
from hrldm.train.histogram_term import HistogramTerm, lesion_cubes
from hrldm.train.latents import encode_patches, mask_tensor
from hrldm.train.ldm import network_inputs
from study.measure.statistics import Estimate, cluster_weights, mean_interval, percentile_interval

OFFSETS_HU = (-200.0, -100.0, -50.0, 50.0, 100.0, 200.0)
CONTRASTS = (0.5, 1.5)
BATCH = 8


def change_lesion(hu: np.ndarray, mask: np.ndarray, offset_hu: float = 0.0, contrast: float = 1.0) -> np.ndarray:
    """A crop (D, D, D) whose lesion is stretched about its mean and shifted, clipped to the model's window; float32."""
    out = np.clip(hu, HU_MIN, HU_MAX).astype(np.float32)
    inside = out[mask]
    out[mask] = np.clip(inside.mean() + contrast * (inside - inside.mean()) + offset_hu, HU_MIN, HU_MAX)
    return out


@torch.no_grad()
def feature_histogram(term: HistogramTerm, hu: np.ndarray, mask: np.ndarray) -> Tensor:
    """Soft histograms (C, B) of the lesion of one crop (D, D, D), through encoder and D_trunc."""
    z = encode_patches(term.decoder, hu[None], term.device)[0].to(term.device) * term.scale
    return lesion_histogram(term, z, mask_tensor(mask[None]).to(term.device))[0]


def lesion_histogram(term: HistogramTerm, z: Tensor, mask: Tensor) -> Tensor:
    """Soft histograms (n, C, B) of whole scaled latents (n, c, d, d, d) inside masks (n, 1, 4d, 4d, 4d), differentiable in z."""
    cubes = lesion_cubes(mask, term.config.histogram.max_voxels)
    return term.histogram(cubes.of(z), cubes.of(mask, FACTOR))


def awareness_table(term: HistogramTerm, patches: Patches) -> pd.DataFrame:
    """One row per nodule and change of `OFFSETS_HU` and `CONTRASTS`: nodule_id, patient_id, subtype, offset_hu, contrast,
    hu_jsd, feature_jsd, and `channel_00`… the divergence of each channel alone."""
    changes = [(offset, 1.0) for offset in OFFSETS_HU] + [(0.0, contrast) for contrast in CONTRASTS]
    rows = []
    for row, hu, mask in zip(patches.frame.itertuples(), patches.hu, patches.mask, strict=True):
        truth = change_lesion(hu, mask)
        q_hu, q = hu_histogram(truth[mask]), feature_histogram(term, truth, mask)
        for offset, contrast in changes:
            changed = change_lesion(hu, mask, offset, contrast)
            channels = jensen_shannon(feature_histogram(term, changed, mask), q).cpu().numpy()
            measured = {
                "nodule_id": row.nodule_id,
                "patient_id": row.patient_id,
                "subtype": row.subtype,
                "offset_hu": offset,
                "contrast": contrast,
                "hu_jsd": histogram_jsd(hu_histogram(changed[mask]), q_hu),
                "feature_jsd": float(channels.mean()),
            }
            rows.append(measured | {f"channel_{c:02d}": float(v) for c, v in enumerate(channels)})
    return pd.DataFrame(rows)


def correlations(table: pd.DataFrame, n_boot: int, seed: int) -> pd.DataFrame:
    """Correlation of `hu_jsd` with `feature_jsd` and with each channel, patients resampled.

    Pooled over lesions, a correlation also asks whether two lesions' changes are comparable; `spearman_within` does not:
    it is the mean over lesions of the rank correlation among one lesion's changes, which is what a gradient needs.

    Returns:
        feature, measure (spearman, pearson, spearman_within), value, ci_low, ci_high, n (changes; lesions for
        `spearman_within`). A channel that never moves has NaN; so has the interval of a single patient.
    """
    patients = [np.flatnonzero(table.patient_id == p) for p in table.patient_id.unique()]
    draws = cluster_weights(len(patients), n_boot, np.random.default_rng(seed)) if len(patients) > 1 else []
    samples = [np.concatenate([np.tile(rows, int(k)) for rows, k in zip(patients, w, strict=True)]) for w in draws]
    x = table.hu_jsd.to_numpy()
    rows = []
    for column in ["feature_jsd", *sorted(c for c in table.columns if c.startswith("channel_"))]:
        y = table[column].to_numpy()
        for measure in ("spearman", "pearson"):
            spread = [_correlation(x[i], y[i], measure) for i in samples]
            rows.append((column, measure, _correlation(x, y, measure), *percentile_interval(spread), len(table)))
        each = table.groupby("nodule_id").apply(lambda d, c=column: _correlation(d.hu_jsd, d[c], "spearman")).dropna()
        owner = table.groupby("nodule_id").patient_id.first()[each.index]
        e = mean_interval(each, owner, n_boot, seed) if len(each) else Estimate(*[np.nan] * 3, 0)
        rows.append((column, "spearman_within", e.value, e.ci_low, e.ci_high, e.n))
    return pd.DataFrame(rows, columns="feature measure value ci_low ci_high n".split())


def descend(
    term: HistogramTerm, z0: Tensor, m: Tensor, mask: Tensor, target: Tensor, steps: int, lr: float
) -> tuple[Tensor, list[float]]:
    """Follow the gradient of L_hist alone, over the latent inside M, from z0.

    Args:
        z0: (1, c, d, h, w) scaled latent.
        m: (1, 1, d, h, w) binary.
        mask: (1, 1, 4d, 4h, 4w) voxels of the lesion.
        target: (1, C, B) q of Eq. 8.
        steps, lr: of Adam on the latent.

    Returns:
        The latent after the last step, and L_hist before each step and after the last one.
    """
    z = z0.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr)
    losses = []
    for step in range(steps + 1):
        composed = blend(m, z, z0)
        loss = jensen_shannon(lesion_histogram(term, composed, mask), target).mean()
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return composed.detach(), losses


@torch.no_grad()
def losses_by_time(unet: ConditionalUNet, term: HistogramTerm, times: Sequence[int], seed: int, n: int) -> pd.DataFrame:
    """Both losses of a trained network on the first `n` nodules of `term`, at each of the given times.

    The noise of a nodule is the same for every network and time. The term must accept all times (`histogram.t_max=None`).

    Returns:
        t, inpaint (Eq. 5), hist (Eq. 8).
    """
    config, schedule = term.config, Schedule(term.config.diffusion)
    unet = unet.to(term.device).eval()
    rows = []
    for now in times:
        sums, seen = np.zeros(2), 0
        for group in term.groups:
            own = ((group.index[:, 0] < n) & (group.index[:, 1] == 0)).nonzero()[:, 0]
            for r in own.split(BATCH):
                taken = group.take(r, config.unet.mask_detail) | {"group": group, "rows": r}
                chance = [np.random.default_rng((seed, k)) for k in group.index[r, 0].tolist()]
                noise = [rng.standard_normal(taken["z0"].shape[1:], np.float32) for rng in chance]
                eps = taken["eps"] = torch.from_numpy(np.stack(noise)).to(taken["z0"])
                t = taken["t"] = torch.full((len(r),), int(now), device=eps.device)
                z_t, _, inputs = network_inputs(taken, schedule, config.diffusion)
                eps_hat = schedule.noise(unet(*inputs).float(), z_t, t, config.diffusion.prediction)
                hist = term(schedule.predict_z0(z_t, eps_hat, t), taken)
                inpaint = inpainting_loss(eps, eps_hat, taken["m"], config.ldm.inpaint_norm)
                sums, seen = sums + len(r) * np.array([float(inpaint), float(hist)]), seen + len(r)
        rows.append((int(now), *(sums / seen)))
    return pd.DataFrame(rows, columns="t inpaint hist".split())


def _correlation(x: np.ndarray, y: np.ndarray, measure: str) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float((stats.spearmanr if measure == "spearman" else stats.pearsonr)(x, y).statistic)
