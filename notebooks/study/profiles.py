"""Profiles: every number that a run of the notebooks depends on. Notebooks and library share one code path; only these differ.

`paper` holds the paper's own settings and, where it is silent, named choices: `results/published/settings.csv` has each with its
sentence. Each part is
a small dataclass beside its user (`UnetConfig` in `hrldm/model/unet.py`, …), whose defaults are those of `quick`. Any field
can be changed: ``get_profile("quick", histogram__weight=0.0)``, or ``make reproduce SET="histogram.weight=0"``.
"""

from dataclasses import dataclass, field, replace

from hrldm import paths
from hrldm.config import changed, with_settings
from hrldm.model.autoencoder import MAISI, AutoencoderConfig
from hrldm.model.diffusion import DiffusionConfig, SamplingConfig
from hrldm.model.histogram import HistogramConfig
from hrldm.model.unet import UnetConfig
from hrldm.train.config import LdmConfig, Stage2
from hrldm.train.latents import LatentsConfig
from hrldm.train.vae import VaeConfig


@dataclass(frozen=True)
class DataConfig:
    n_train: int = 480  # lidc-mini nodules in the training split
    n_val: int = 60
    n_test: int = 120
    patch_mm: int = 40  # side of the training crop, voxels at 1 mm; a multiple of 4
    diameters_mm: tuple[float, float] = (0.0, 1000.0)  # nodules of a manifest smaller or larger are left out


@dataclass(frozen=True)
class TablesConfig:
    """Evaluation of Tables 1 and 2."""

    n_synthetic: int = 120  # synthetic nodules in Table 1
    n_boot: int = 200  # bootstrap resamples behind every interval
    fid_slices: int = 5  # slices per plane around the lesion centre
    fid_crop_mm: int = 32


@dataclass(frozen=True)
class AblationConfig:
    steps: int = 100  # 0 = as many as `ldm`
    start: str = "maisi-ddpm"  # every cell continues from this network for `steps` | scratch
    seeds: int = 1
    core_seeds: int = 3  # for the 2 x 2 of c_hist and L_hist, and for the background rule
    n: int = 32  # test nodules sampled per cell


@dataclass(frozen=True)
class DownstreamConfig:
    """Protocol of Table 3 and Figs. 6 to 8."""

    crop_mm: int = 32  # 90 in the paper
    folds: int = 5
    retention: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.0)
    scarcity_folds: int = 3
    beside_folds: int = 3  # of the arms beside the paper's two
    shape_part: int = 5  # one patient in so many gives shapes for synthesis and no real nodule
    equal_updates: bool = True  # every arm makes as many an epoch; False: one pass over its own nodules (paper)


@dataclass(frozen=True)
class ClassifierConfig:
    """Training of their classifiers."""

    arch: str = "densenet-tiny"  # densenet121 in the paper; see study/classify/train.py
    epochs: int = 30  # at most
    batch: int = 16
    lr: float = 3e-3
    patience: int = 5  # epochs without a lower validation loss before training stops


@dataclass(frozen=True, kw_only=True)
class Profile(Stage2):
    """All settings, by part; those of `Stage2` (unet, diffusion, histogram, latents, ldm, mixed_precision) included."""

    name: str
    settings: str = ""  # what SET changed
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


SMOKE = Profile(
    name="smoke",
    data=DataConfig(n_train=24, n_val=9, n_test=18, patch_mm=32),
    vae=VaeConfig(steps=4, adversarial_start=2),
    unet=UnetConfig(channels=(32, 64), norm_groups=8),
    latents=LatentsConfig(variants=2, least=1),
    ldm=LdmConfig(pretrain_steps=6, steps=12, batch=4),
    sampling=SamplingConfig(steps=4),
    tables=TablesConfig(n_synthetic=12, n_boot=20, fid_slices=1),
    ablation=AblationConfig(steps=3, core_seeds=2, n=4),
    downstream=DownstreamConfig(folds=2, retention=(1.0, 0.2, 0.0), scarcity_folds=1, beside_folds=1),
    classifier=ClassifierConfig(epochs=1, batch=8),
)
GPU = Profile(
    name="gpu",
    mixed_precision="bf16",
    data=DataConfig(n_train=1500, n_val=150, n_test=400),
    autoencoder=AutoencoderConfig(source="train", channels=(32, 64, 128), norm_groups=16),
    vae=VaeConfig(steps=12000, batch=16, patch=40, adversarial_start=8000),
    unet=UnetConfig(channels=(128, 256), res_blocks=2, head_channels=64, norm_groups=32, ctx_dim=256, context=2),
    histogram=HistogramConfig(max_voxels=32),
    latents=LatentsConfig(variants=8, least=4000),
    ldm=LdmConfig(pretrain_steps=4000, steps=8000, batch=32, lr=2e-4, ema=0.999),
    sampling=SamplingConfig(steps=25),
    tables=TablesConfig(n_synthetic=400, n_boot=1000),
    ablation=AblationConfig(steps=2000, start="scratch", seeds=3, n=150),
    downstream=DownstreamConfig(crop_mm=40, scarcity_folds=5),
    classifier=ClassifierConfig(arch="densenet121", lr=1e-3, patience=8),
)
PAPER = Profile(
    name="paper",
    mixed_precision="fp16",
    data=DataConfig(n_train=2950, n_val=0, n_test=530, patch_mm=128, diameters_mm=(6.0, 30.0)),
    autoencoder=changed(MAISI, source="maisi"),
    vae=VaeConfig(steps=280 * 58000, batch=1, patch=64, lr=1e-4, perceptual=0.3, adversarial=0.1, adversarial_start=0),
    unet=UnetConfig(
        channels=(64, 128, 256, 512), attention=(False, False, True, True), res_blocks=2, norm_groups=32,
        linear_skip=False, mask_channels=3, mask_detail=1, context=None,
    ),
    diffusion=DiffusionConfig(prediction="eps", background="paper"),
    histogram=HistogramConfig(times_bins=False, t_max=None, max_voxels=64),
    latents=LatentsConfig(variants=1, least=1),
    ldm=LdmConfig(pretrain_steps=0, steps=0, epochs=200, batch=1, lr=1e-5, lr_power=2.0, warm_up=0, clip=None, ema=0.0),
    sampling=SamplingConfig(sampler="ddpm", steps=1000, feather=False),
    tables=TablesConfig(n_synthetic=500, n_boot=2000),
    ablation=AblationConfig(steps=0, start="scratch", seeds=3, n=390),
    downstream=DownstreamConfig(crop_mm=90, scarcity_folds=5, beside_folds=5, equal_updates=False),
    classifier=ClassifierConfig(arch="densenet121", epochs=100, batch=2, lr=1e-4, patience=15),
)  # fmt: skip
PROFILES: dict[str, Profile] = {p.name: p for p in (SMOKE, Profile(name="quick"), GPU, PAPER)}


def get_profile(name: str, settings: str = "", **changes) -> Profile:
    """The named profile with some numbers changed.

    settings: as SET gives them (`hrldm.config.with_settings`); the name then says so, and results get a folder of their own
    changes:  ``part__field=value`` (`hrldm.config.changed`)

    Raises:
        ValueError: unknown profile or setting (a misspelt parameter must not be ignored), or L_hist for a rectified flow.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    profile = changed(PROFILES[name], **changes)
    if settings.strip():
        profile = with_settings(profile, settings)
        profile = replace(profile, name=paths.run_name(name, settings), settings=settings)
    if profile.diffusion.objective != "ddpm" and profile.histogram.weight > 0:
        raise ValueError(
            "L_hist is defined by Eq. 6, which is of DDPM: with diffusion.objective=rflow set histogram.weight=0"
        )
    return profile
