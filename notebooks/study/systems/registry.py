"""Every system of Table 1 by name. A new one is a function (study, request, truth) -> HU crops and a line here; one with a
network of its own is a subclass of `Peer` in a file of its own, and a line of `GENERATORS`."""

import functools
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np

from hrldm.atomic import atomic
from hrldm.cache import keyed
from hrldm.insertion.generator import Generator, Request
from hrldm.model.unet import UnetConfig
from hrldm.nodules.cubes import whole_hu
from hrldm.nodules.masks import solid_part
from hrldm.nodules.patches import Patches
from hrldm.train.latents import lesion_histograms, weights_digest
from hrldm.train.ldm import VERSION as TRAINING
from study.study import Study
from study.systems import energy, latent, peer, reconstruction, texture, transplant
from study.systems.diff_tumor import DiffTumor, DiffTumor200
from study.systems.inserted import edged
from study.systems.lefusion import LeFusion
from study.systems.lesion_diffusion import LesionDiffusion
from study.systems.maisi_v2 import MaisiV2

PEERS = {system.name: system for system in (DiffTumor, DiffTumor200, LesionDiffusion, LeFusion, MaisiV2)}
GENERATORS: dict[str, Callable[[Study], Generator]] = {  # trained at the first call
    **{name: functools.partial(peer.trained, system=system) for name, system in PEERS.items()},
    **{name: functools.partial(latent.trained, system=name) for name in latent.CHANGES},
    "energy": energy.guided,
}


def generate(study: Study, request: Request, truth: np.ndarray, system: str) -> np.ndarray:
    """HU crops (N, D, D, D) of a trained system; `truth` is not looked at."""
    return GENERATORS[system](study)(request, progress=system)


SYSTEMS = {  # in the order of the tables
    "autoencoder": reconstruction.generate,
    "transplant": transplant.generate,
    "texture": texture.generate,
    **{name: functools.partial(generate, system=name) for name in GENERATORS},
}
# no histogram
NOT_ASKED = {"autoencoder", "transplant", "diff-tumor", "diff-tumor-200", "lesion-diffusion", "maisi-v2"}

VERSION = f"{TRAINING}.2"  # raise the last when the same networks would give other crops


def comparable(request: Request, truth: Patches) -> list[str]:
    """Names of the systems that say something about these nodules: all, but for `transplant` where no place is healthy."""
    return [name for name in SYSTEMS if name != "transplant" or transplant.has_places(request, truth.hu)]


def request_for(
    study: Study, patches: Patches, background: Patches, condition: str = "library", seed: int = 0
) -> Request:
    """What to ask of every system for these nodules.

    condition: library: a training nodule's histogram of the same subtype and size, as for new nodules (decision 10)
               target:  the nodule's own histogram, to compare what comes with what was asked

    Raises:
        ValueError: unknown condition.
    """
    if condition not in ("library", "target"):
        raise ValueError(f"unknown condition {condition!r}; choose library or target")
    if condition == "target":
        histogram = lesion_histograms(patches, study.profile.histogram.bins)
    else:
        histogram = study.library_histograms(replace(background, frame=patches.frame), seed)
    seeds = np.random.SeedSequence((study.seed, seed)).generate_state(len(patches))
    request = Request(background.hu, patches.mask, patches.subtype, histogram, seeds)
    return with_components(request, patches, study.profile.unet)


def with_components(request: Request, patches: Patches, unet: UnetConfig) -> Request:
    """The request with the solid parts of these nodules as cores if the network is shown components, else without."""
    solid = None
    if unet.mask_channels > 1:
        solid = np.stack([solid_part(hu, mask) for hu, mask in zip(patches.hu, patches.mask, strict=True)])
    return replace(request, core=solid)


def synthesise(study: Study, system: str, request: Request, truth: Patches, edge: bool = False) -> np.ndarray:
    """Crops (N, D, D, D) int16 HU of a system, kept on disk by study, request and system.

    edge: give each lesion the edge of `insert` (`inserted.edged`), in place of the system's own

    Raises:
        ValueError: unknown system.
    """
    if system not in SYSTEMS:
        raise ValueError(f"unknown system {system!r}; choose one of {', '.join(SYSTEMS)}")
    if system in NOT_ASKED:
        request = replace(request, histogram=np.zeros_like(request.histogram))  # the same crops, whatever is asked for
    p = study.profile
    settings = (p.stage2(), p.sampling, p.data.patch_mm, study.data_hash, study.seed, weights_digest(study.autoencoder))
    asked = (getattr(request, f.name) for f in fields(request))
    file = keyed("synthetic", VERSION, system, *settings, *asked, *(["edge"] if edge else []), suffix=".npy")
    if not file.exists():
        if edge:
            made = edged(request, synthesise(study, system, request, truth))
        else:
            made = SYSTEMS[system](study, request, truth.hu)
        with atomic(file) as part:
            np.save(part, whole_hu(made))
    return np.load(file)
