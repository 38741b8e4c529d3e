"""Profiles: one flat frozen dataclass; notebooks and library share one code path, and only the numbers differ.

`paper` holds the paper's own settings (Section 5) verbatim and, where the paper is silent, our design decisions. Every
option can be overridden: ``get_profile("quick", lambda_hist=0.0)``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

SUBTYPES = ("solid", "part-solid", "ground-glass")  # labels 0, 1, 2 (Section 5)
SIZE_BINS_MM = ((6.0, 10.0), (10.0, 20.0), (20.0, 30.0))  # columns of Fig. 4, rows of Table 3
HU_MIN, HU_MAX = -1000.0, 1000.0  # intensity window of the model (Section 5)
HIST_HU_MIN, HIST_HU_MAX = -1000.0, 400.0  # HU range of c_hist (Section 5)


@dataclass(frozen=True)
class Profile:
    """Every number a run depends on. Lengths in mm, intensities in HU, times in steps."""

    name: str
    # -- data ------------------------------------------------------------------------------------------------------
    n_train: int = 480  # lidc-mini nodules in the training split
    n_val: int = 60
    n_test: int = 120
    patch_mm: int = 40  # side of the training crop, voxels at 1 mm; a multiple of 4
    # -- stage I: autoencoder (Section 3.1) --------------------------------------------------------------------------
    ae_source: str = "shipped"  # shipped | train | path of a MAISI file
    ae_channels: tuple[int, ...] = (16, 32, 64)
    ae_res_blocks: tuple[int, ...] = (2, 1, 1)  # decoder; two at full resolution: D_trunc ends with the penultimate
    ae_encoder_res_blocks: tuple[int, ...] = (1, 1, 1)
    ae_latent_channels: int = 8
    ae_norm_groups: int = 8
    ae_norm: bool = False  # GroupNorm as in MAISI; without it contrast survives, and a crop decodes as in the whole CT
    ae_linear_skip: bool = True  # linear code of 4x4x4 blocks beside the network (residual autoencoding)
    ae_steps: int = 40
    ae_batch: int = 2
    ae_patch: int = 32
    ae_lr: float = 1e-3
    ae_perceptual: float = 0.01
    ae_adversarial: float = 0.003
    ae_kl: float = 1e-7
    ae_adversarial_start: int = 20
    # -- stage II: latent diffusion (Section 3.2) --------------------------------------------------------------------
    unet_channels: tuple[int, ...] = (48, 96)
    unet_attention: tuple[bool, ...] = (False, True)
    unet_res_blocks: int = 1
    unet_head_channels: int = 32
    unet_norm_groups: int = 16
    ctx_dim: int = 64  # d_ctx of Eq. 3
    unet_linear_skip: bool = True  # a linear denoiser, fitted in closed form, beside the U-Net; False = paper
    hist_tokens: int = 1  # 1 = paper; B = one token per bin
    histogram_template: bool = False  # the requested histogram also as an image (nodules/template.py); False = paper
    mask_channels: int = 1  # C of Section 3.2.1 item 3
    mask_detail: int = 4  # soft-mask subdivisions of a latent voxel's side; 1 = paper
    lesion_context: int | None = 1  # latent voxels around the lesion that the U-Net sees; None = the whole crop (paper)
    latent_sample: bool = False  # draw latents from the posterior at each step instead of using its mean
    latent_variants: int = 4  # encodings per training nodule: itself, and rotated, mirrored and shifted copies
    least_latents: int = 1000  # a small training set gets up to 48 variants to reach this number
    pretrain_steps: int = 2000  # on lidc-mini with lambda 0, before any other dataset; 0 = none (paper)
    ldm_steps: int = 1000
    ldm_batch: int = 8
    ldm_lr: float = 6e-4
    ldm_lr_power: float = 1.0  # polynomial schedule
    ldm_ema: float = 0.998
    mixed_precision: str = "no"  # no | bf16
    num_train_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    objective: str = "ddpm"  # ddpm | rflow
    prediction: str = "v"  # the U-Net's output, compared in Eq. 5: v, from which eps follows exactly | eps (paper)
    background: str = "clean"  # clean | noised | paper
    use_c_hist: bool = True
    lambda_hist: float = 10.0
    hist_bins: int = 40
    hist_space: str = "feature"  # feature | hu
    hist_t_max: int | None = 400  # None = paper (all t)
    hist_max_voxels: int = 16  # side in voxels of the lesion crop for L_hist; larger lesions are sub-cropped
    inpaint_norm: str = "paper"  # paper: per lesion voxel, summed over channels (suits lambda = 10) | voxels_channels
    # -- sampling ----------------------------------------------------------------------------------------------------
    sampler: str = "ddim"  # ddpm | ddim | rflow
    sample_steps: int = 25
    match_t_max: int | None = None  # impose the histogram at t <= this (insertion/matching.py); None = never (paper)
    match_rounds: int = 1  # times per such step, since decoding undoes part of it; the second change is doubled
    # -- evaluation --------------------------------------------------------------------------------------------------
    n_synthetic: int = 120  # synthetic nodules in Table 1
    n_boot: int = 200  # bootstrap resamples behind every interval
    fid_slices: int = 5  # slices per plane around the lesion centre
    fid_crop_mm: int = 32
    ablation_steps: int = 100
    ablation_start: str = "maisi-ddpm"  # every cell continues from this network for ablation_steps | scratch
    ablation_seeds: int = 1
    ablation_core_seeds: int = 3  # for the 2 x 2 of c_hist and L_hist, and for the background rule
    ablation_n: int = 32  # test nodules sampled per ablation cell
    cls_crop_mm: int = 32  # 90 in the paper
    cls_arch: str = "densenet-small"  # densenet121 in the paper; see study/classify/train.py
    cls_epochs: int = 6
    cls_batch: int = 16
    cls_lr: float = 1e-3
    cls_folds: int = 5
    cls_patience: int = 100
    retention: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.0)
    scarcity_folds: int = 1

    def digest(self, *fields: str) -> str:
        """Short hash of the named fields (default: all), the cache key of what depends on them."""
        items = dataclasses.asdict(self)
        chosen = {k: items[k] for k in (fields or items)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:10]


_SMOKE = Profile(
    name="smoke", n_train=24, n_val=9, n_test=18, patch_mm=32, ae_steps=4, ae_adversarial_start=2,
    unet_channels=(32, 64), unet_norm_groups=8, latent_variants=2, least_latents=1, pretrain_steps=6, ldm_steps=12, ldm_batch=4, sample_steps=4, n_synthetic=12, n_boot=20,
    fid_slices=1, ablation_steps=3, ablation_core_seeds=2, ablation_n=4, cls_arch="densenet-tiny", cls_epochs=1, cls_batch=8, cls_folds=2, cls_crop_mm=32,
    retention=(1.0, 0.2, 0.0), scarcity_folds=1,
)  # fmt: skip
_GPU = Profile(
    name="gpu", n_train=1500, n_val=150, n_test=400, patch_mm=40, ae_source="train", ae_channels=(32, 64, 128), ae_norm_groups=16,
    ae_steps=12000, ae_batch=16, ae_patch=40, ae_adversarial_start=8000, unet_channels=(128, 256),
    unet_attention=(False, True), unet_res_blocks=2, unet_head_channels=64, unet_norm_groups=32,
    ctx_dim=256, lesion_context=2, latent_variants=8, least_latents=4000, pretrain_steps=4000, ldm_steps=8000, ldm_batch=32, ldm_lr=2e-4, ldm_ema=0.999, mixed_precision="bf16", hist_max_voxels=32,
    n_synthetic=400, n_boot=1000, ablation_steps=2000, ablation_start="scratch", ablation_seeds=3, ablation_n=150, cls_arch="densenet121", cls_crop_mm=40, cls_epochs=30, cls_patience=10,
    scarcity_folds=5,
)  # fmt: skip
_PAPER = Profile(
    name="paper", n_train=2950, n_val=0, n_test=390, patch_mm=128, ae_source="train", ae_channels=(64, 128, 256), ae_res_blocks=(2, 2, 2), ae_encoder_res_blocks=(2, 2, 2),
    ae_latent_channels=4, ae_norm_groups=32, ae_norm=True, ae_linear_skip=False, ae_steps=280 * 58000, ae_batch=1, ae_patch=64, ae_lr=1e-4,
    ae_perceptual=0.3, ae_adversarial=0.1, ae_kl=1e-7, ae_adversarial_start=0,
    unet_channels=(64, 128, 256, 512), unet_attention=(False, False, True, True), unet_res_blocks=2, unet_head_channels=32,
    unet_norm_groups=32, unet_linear_skip=False, ctx_dim=64, mask_detail=1, lesion_context=None, latent_variants=1, least_latents=1, pretrain_steps=0, ldm_steps=200 * 2950, ldm_batch=1, ldm_lr=1e-5, ldm_lr_power=2.0, ldm_ema=0.0,
    mixed_precision="bf16", prediction="eps", background="paper", lambda_hist=10.0, hist_t_max=None, hist_max_voxels=64,
    sampler="ddpm", sample_steps=1000, n_synthetic=500, n_boot=2000, cls_arch="densenet121", cls_crop_mm=90, cls_epochs=100, cls_batch=2,
    cls_lr=1e-4, cls_folds=5, cls_patience=15, scarcity_folds=5, ablation_steps=200 * 2950, ablation_start="scratch", ablation_seeds=3, ablation_n=390,
)  # fmt: skip
PROFILES: dict[str, Profile] = {p.name: p for p in (_SMOKE, Profile(name="quick"), _GPU, _PAPER)}


def get_profile(name: str, **overrides) -> Profile:
    """The named profile with some numbers changed.

    Raises:
        ValueError: unknown profile or field (a misspelt parameter must not be ignored).
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return replaced(PROFILES[name], **overrides)


def replaced(profile: Profile, **overrides) -> Profile:
    """The profile with some numbers changed.

    Raises:
        ValueError: unknown field.
    """
    unknown = set(overrides) - {f.name for f in dataclasses.fields(Profile)}
    if unknown:
        raise ValueError(f"unknown profile field(s) {sorted(unknown)}; see hrldm/config.py")
    return dataclasses.replace(profile, **overrides)
