"""What a profile costs before it starts, ``make plan PROFILE=paper``: steps, days and memory of each stage on this device.

Nothing is trained and no data are read. Numbers of nodules are those of the profile; a dataset of your own has its own. Training
ends as planned: early stopping can only make it shorter. Left out is what takes little: the perceptual network of Stage I, the
targets of L_hist, all measurements.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hrldm.config import SUBTYPES, changed
from hrldm.model.autoencoder import FACTOR, Autoencoder
from hrldm.model.histogram import masked_soft_histogram
from hrldm.model.window import lesion_window
from hrldm.train.device import autocast
from hrldm.train.ldm import built
from study.ablation import SCRATCH, cells, training
from study.classify.train import build_classifier
from study.profiles import Profile, get_profile
from study.step_cost import Stage, Step, autoencoder_stage, cost, updates
from study.study import SYMMETRIES
from study.systems.latent import CHANGES
from study.systems.registry import PEERS

TYPICAL_MM = 15  # diameter of the nodule whose window stands for all
SAMPLED = 8  # nodules sampled at once


def stages(profile: Profile) -> Iterator[Stage]:
    """All stages in the order in which `make reproduce` comes to them."""
    n = profile.data.n_train
    p = profile.for_nodules(n)
    if p.autoencoder.source in ("train", "maisi"):
        yield autoencoder_stage(p)
    variants = max(p.latents.variants, min(-(-p.latents.least // n), SYMMETRIES))
    yield Stage("latents", n * variants, p.data.patch_mm, FACTOR, lambda on: encoding_step(p))
    side, multiple = FACTOR * window_side(p), FACTOR * 2 ** (len(p.unet.channels) - 1)
    plain = changed(p, histogram__weight=0.0)
    others = len({changed(p, **c).stage2() for c in CHANGES.values()}) - 1 + len(PEERS)
    networks = ablation_networks(p)
    for name, steps, config in (
        ("II: pre-training, before a dataset of your own", p.ldm.pretrain_steps, plain),
        ("II: U-Net", p.ldm.steps, p),
        (f"II: the {others} other networks of Table 1, as one without L_hist", others * p.ldm.steps, plain),
        (f"ablations, {len(networks)} networks", sum(networks), p),
    ):
        if steps:
            yield Stage(name, steps, side, multiple, lambda on, config=config: unet_step(config, on))
    batches = -(-p.tables.n_synthetic // SAMPLED)
    name = f"sampling {p.tables.n_synthetic} nodules of one system, {SAMPLED} at once"
    yield Stage(name, batches * p.sampling.steps, side, multiple, lambda on: sampling_step(p, on))
    runs, folds = classifiers(p), p.downstream.folds
    updated = math.ceil((n + p.data.n_val) * (folds - 1) / folds / p.classifier.batch)
    name = f"classifiers of Table 3, Figs. 7 and 8, {runs} runs"
    yield Stage(name, runs * p.classifier.epochs * updated, p.downstream.crop_mm, 1, lambda on: classifier_step(p))


def window_side(profile: Profile) -> int:
    """Side of the U-Net's window in latent voxels, for a ball of `TYPICAL_MM`."""
    grid = np.indices((profile.data.patch_mm,) * 3) - profile.data.patch_mm // 2
    ball = (grid**2).sum(0) <= (TYPICAL_MM / 2) ** 2
    return lesion_window(ball, profile.unet.context, len(profile.unet.channels)).side


def ablation_networks(profile: Profile) -> list[int]:
    """Steps of each network that the ablations train, equal ones once; those of Table 1 are there already."""
    known = {(changed(profile, **changes).stage2(), SCRATCH, 0) for changes in CHANGES.values()}
    wanted = {}
    for cell in cells(SimpleNamespace(profile=profile)):
        start, steps = training(profile, cell)
        config = changed(profile, ldm__steps=steps, **cell.changes)
        if config.diffusion.background == "paper":  # trained as `clean` is
            config = changed(config, diffusion__background="clean")
        wanted |= {(config.stage2(), start, seed): steps for seed in range(cell.seeds)}
    return [steps for network, steps in wanted.items() if network not in known]


def classifiers(profile: Profile) -> int:
    """Runs of Table 3 (two arms), Fig. 8 (three) and Fig. 7 (three at each share kept, one at none)."""
    d = profile.downstream
    return 5 * d.folds + sum(3 if share else 1 for share in d.retention) * min(d.scarcity_folds, d.folds)


# -- one step of each -----------------------------------------------------------------------------------------------------


def encoding_step(p: Profile) -> Step:
    """One crop encoded."""
    model = Autoencoder(p.autoencoder).eval()
    return torch.no_grad()(lambda side: model.encode(torch.zeros(1, 1, side, side, side)))


def unet_step(p: Profile, on: str) -> Step:
    """One update of Stage II (Algorithm 1), with L_hist as far as its share of a batch goes."""
    network = built(p, p.autoencoder.latent_channels)
    update = updates(network, p.ldm.lr, True)
    decoder = Autoencoder(p.autoencoder).eval().requires_grad_(False) if p.histogram.weight else None
    last = p.diffusion.timesteps if p.histogram.t_max is None else p.histogram.t_max + 1
    decoded = math.ceil(p.ldm.batch * last / p.diffusion.timesteps)

    def step(side: int) -> None:
        with autocast(p.mixed_precision, on):
            out = network(*_inputs(p, p.ldm.batch, side)).float()
        loss = out.abs().sum()
        if decoder is not None:
            cube = min(p.histogram.max_voxels, side) // FACTOR
            read = decoder.decode_truncated if p.histogram.space == "feature" else decoder.decode
            with autocast(p.mixed_precision, on):
                features = read(out[:decoded, :, :cube, :cube, :cube]).float()
            low, high = torch.zeros(features.shape[1]), torch.ones(features.shape[1])
            mask = torch.ones(decoded, 1, *features.shape[2:])
            loss = loss + masked_soft_histogram(features, mask, low, high, p.histogram.bins).square().sum()
        update(loss)

    return step


def sampling_step(p: Profile, on: str) -> Step:
    """One call of the U-Net for `SAMPLED` nodules."""
    network = built(p, p.autoencoder.latent_channels).eval()

    @torch.no_grad()
    def step(side: int) -> None:
        with autocast(p.mixed_precision, on):
            network(*_inputs(p, SAMPLED, side))

    return step


def classifier_step(p: Profile) -> Step:
    """One update of a downstream classifier."""
    model = build_classifier(p.classifier.arch, len(SUBTYPES), 0)
    update, labels = updates(model, p.classifier.lr), torch.zeros(p.classifier.batch, dtype=torch.long)
    return lambda side: update(F.cross_entropy(model(torch.zeros(p.classifier.batch, 1, side, side, side)), labels))


def _inputs(p: Profile, batch: int, side: int) -> tuple[Tensor, ...]:
    """What the U-Net is given: latents, times, masks and template, subtypes, histograms."""
    c, cube = p.autoencoder.latent_channels, [side // FACTOR] * 3
    parts = p.unet.mask_channels * p.unet.mask_detail**3 + 1 + (c if p.histogram.template else 0)
    subtype, histogram = (
        torch.zeros(batch, dtype=torch.long),
        torch.full((batch, p.histogram.bins), 1 / p.histogram.bins),
    )
    return torch.zeros(batch, c, *cube), torch.zeros(batch), torch.zeros(batch, parts, *cube), subtype, histogram


def plan(profile: Profile, on: str | None = None) -> pd.DataFrame:
    """One row a stage, in the fields of `Cost`."""
    return pd.DataFrame([cost(stage, on) for stage in tqdm(list(stages(profile)), desc="plan")])


def main(profile: str = "quick", settings: str = "") -> int:
    """Print what each stage of a profile takes on this device: steps, days, GB. Nothing is trained.

    Args:
        profile: as of `make reproduce`.
        settings: what SET changes.
    """
    table = plan(get_profile(profile, settings))
    print(table.drop(columns="device").to_markdown(index=False, floatfmt=",.3g", intfmt=","))
    print(
        f"{profile} on {table.device[0]}: {table.days.sum():,.3g} days in all; memory of weights, optimizer and activations"
    )
    return 0
