"""A study: one dataset, one profile, one seed, and the trained networks they lead to, each made once and kept on disk.

Notebooks open the same study and ask for what they need; what an earlier notebook trained is found by the hash of its
settings, its data and its seed, and is not trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hrldm import paths
from hrldm.cache import keyed
from hrldm.config import changed
from hrldm.ct.geometry import voxel_size
from hrldm.ct.nifti import open_nifti
from hrldm.insertion.generator import Generator
from hrldm.model.autoencoder import Autoencoder
from hrldm.model.perceptual import PerceptualLoss
from hrldm.model.unet import ConditionalUNet
from hrldm.nodules import lidc_mini
from hrldm.nodules.histograms import FLOOR_REACH, choose_histogram, completed, histogram_library, lung_floor, size_bin
from hrldm.nodules.manifest import load_manifest, units
from hrldm.nodules.patches import Patches, fitting, load_patches, manifest_digest
from hrldm.nodules.split import assert_disjoint
from hrldm.nodules.template import template
from hrldm.train import checkpoint as ckpt
from hrldm.train.autoencoders import SHIPPED_AUTOENCODER, load_autoencoder, load_maisi
from hrldm.train.device import device
from hrldm.train.latents import SHIFT, LatentCache, Picture, build_latents, lesion_histograms, weights_digest
from hrldm.train.ldm import VERSION as LDM_VERSION
from hrldm.train.ldm import load_unet, train_ldm
from hrldm.train.loop import follow, read_history
from hrldm.train.vae import VERSION as VAE_VERSION
from hrldm.train.vae import train_autoencoder
from hrldm.wheels import LITE0, wheel_file
from study.places import healthy_images
from study.profiles import Profile, get_profile
from study.step_cost import autoencoder_stage, cost

logger = logging.getLogger(__name__)
SYMMETRIES = 48  # of a cube
WHOLE_CT_MM = 128  # crops from this side on are parts of whole CTs (Section 5)
LEAST_PLACES = 0.25  # share of nodules with a healthy place from which on the others are left out


@dataclass(frozen=True)
class Study:
    """One dataset, profile and seed; see `open_study`."""

    profile: Profile
    dataset: str
    root: Path
    seed: int
    frame: pd.DataFrame

    @property
    def results(self) -> Path:
        return paths.results_dir(self.dataset, self.profile.name)

    @functools.cached_property
    def data_hash(self) -> str:
        return (
            lidc_mini.data_hash(self.root)
            if self.dataset == "lidc-mini"
            else manifest_digest(self.frame, _files(self.frame))
        )

    def split(self, name: str) -> pd.DataFrame:
        return self.frame[self.frame.split == name].reset_index(drop=True)

    def patches(self, split: str, size: int | None = None) -> Patches:
        """Crops of one split; `size` defaults to the profile's training crop."""
        return load_patches(self.split(split), size or self.profile.data.patch_mm)

    @functools.cached_property
    def _healthy(self) -> pd.Series:
        return healthy_images(self.frame)

    def _places(self, split: str) -> pd.Series:
        return self._healthy[self.frame.split == split].reset_index(drop=True)

    def backgrounds(self, split: str, size: int | None = None) -> Patches:
        """The same places without their nodules (`healthy_images`); the images themselves where a nodule cannot be erased."""
        frame, healthy = self.split(split), self._places(split)
        frame = frame.assign(image=healthy.where(healthy != "", frame.image))
        return load_patches(frame, size or self.profile.data.patch_mm)

    def places(self, split: str, size: int | None = None) -> tuple[Patches, Patches]:
        """The nodules of a split whose place is known without them, and these places; the others tell what is asked for.

        Where hardly any is (images with no margin about the nodule), all, in the images that hold them.
        """
        healthy = self._places(split) != ""
        rows = np.flatnonzero(healthy) if healthy.mean() > LEAST_PLACES else np.arange(len(healthy))
        if len(rows) < len(healthy) or not healthy.all():
            logger.warning("%s: healthy places for %d of %d nodules", split, healthy.sum(), len(healthy))
        return self.patches(split, size)[rows], self.backgrounds(split, size)[rows]

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """Stage I as the profile asks, frozen, in evaluation mode; `maisi` is trained where the user has no file of it.

        Raises:
            CheckpointError: missing or corrupt weights; the message says which file.
        """
        source = self.profile.autoencoder.source
        given = os.environ.get(paths.MAISI) if source == "maisi" else None
        if source == "shipped":
            model = load_autoencoder(SHIPPED_AUTOENCODER)
        elif source in ("maisi", "train") and not given:
            model = load_autoencoder(fit_autoencoder(self, self.profile)[0])
        else:
            model = load_maisi(Path(given or source))
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def _latents(self) -> dict[tuple[str, Picture | None], LatentCache]:
        return {}

    def latents(self, split: str, picture: Picture | None = None) -> LatentCache:
        """The encoded crops of a split, made at the first call; the training split in `latent_variants`.

        picture: what a network is shown besides; None as the profile says (the template or nothing)
        """
        if picture is None and self.profile.histogram.template:
            picture = template
        if (split, picture) not in self._latents:
            self._latents[split, picture] = self.encoded(split, picture, self.autoencoder)
        return self._latents[split, picture]

    def encoded(self, split: str, picture: Picture | None, autoencoder: Autoencoder) -> LatentCache:
        """`latents`, of any autoencoder and not kept in memory."""
        p = self.profile
        enough = -(-p.latents.least // len(self.split(split)))
        variants = max(p.latents.variants, min(enough, SYMMETRIES)) if split == "train" else 1
        size = p.data.patch_mm + (2 * SHIFT if variants > 1 else 0)
        patches, background = self.patches(split, size), self.backgrounds(split, size).hu
        settings = (p.data.patch_mm, variants, p.histogram.bins, self.seed, device())
        return build_latents(autoencoder, patches, *settings, background, picture)

    def with_seed(self, seed: int) -> Study:
        """The study with another seed and the same autoencoder: another one's latents would be another language."""
        other = dataclasses.replace(self, seed=seed)
        vars(other)["autoencoder"] = self.autoencoder
        return other

    def unet(self, start: ConditionalUNet | None = None, **changes):
        """A trained U-Net with some settings changed: (network, latent scale, its profile, loss history).

        start: network whose weights the training begins with (those that fit); None begins with one pre-trained on
               lidc-mini as the profile says, or draws them from the seed.
        """
        profile = changed(self.profile, **changes)
        if start is None and (embedded := pretraining_study(self, changed(profile, histogram__weight=0.0))) is not None:
            start = embedded.unet()[0]  # nodules of known truth first, few real ones after
        # the `paper` rule trains as `clean` does and differs in sampling only
        trained = (
            changed(profile, diffusion__background="clean") if profile.diffusion.background == "paper" else profile
        )
        path = self.run_path(trained, start)
        history = fit_ldm(self, trained, path, start)
        return (*load_unet(path, device())[:2], profile, history)

    def generator(self, start: ConditionalUNet | None = None, **changes) -> Generator:
        """The generator around the network of `unet`."""
        unet, scale, profile, _ = self.unet(start, **changes)
        return Generator(self.autoencoder, unet, scale, profile, profile.sampling, device())

    def run_path(self, profile: Profile, start: ConditionalUNet | None = None) -> Path:
        begun = None if start is None else weights_digest(start)
        parts = (profile.stage2(), profile.data.patch_mm, self.data_hash, weights_digest(self.autoencoder), begun)
        return keyed("runs", LDM_VERSION, *parts, self.seed) / "ldm.safetensors"

    @functools.cached_property
    def _library(self) -> pd.DataFrame:
        """Histograms of the training nodules, in the columns of `histogram_library`."""
        if self.dataset == "lidc-mini":  # the sources of the test nodules' histograms stay out of reach
            sources = histogram_library()
            return sources[sources.nodule_id.isin(self.split("train").histogram_id)]
        return completed(library_of(self.patches("train"), self.profile.histogram.bins))

    def library_histograms(self, places: Patches, seed: int) -> np.ndarray:
        """A training nodule's histogram of the same subtype and about the same size for every row (never its own).

        places: rows of subtype and diameter with the crops they go into; histograms darker than the lung there are
                passed over, as `insert` does
        """
        return chosen_histograms(places, self._library, np.random.default_rng((self.seed, seed)))


def library_of(patches: Patches, bins: int) -> pd.DataFrame:
    """The nodules' histograms in the columns of `histogram_library`."""
    table = patches.frame[["nodule_id", "patient_id", "subtype", "diameter_mm"]]
    columns = {f"b{i:02d}": column for i, column in enumerate(lesion_histograms(patches, bins).T)}
    return table.assign(size_bin=table.diameter_mm.map(size_bin), **columns)


def chosen_histograms(places: Patches, library: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """(N, B) out of a library, for each place by `choose_histogram` with the lung about it as the floor; the place's own
    nodule, or the one whose histogram it has, is left out where there are others of its subtype."""
    middle = places.centred(min(2 * FLOOR_REACH, places.hu.shape[1]))
    rows = []
    for r, hu, mask in zip(places.frame.itertuples(), middle.hu, middle.mask, strict=True):
        floor = lung_floor(hu, ~mask)
        own = [getattr(r, name, "") for name in ("nodule_id", "histogram_id")]
        others = library[~library.nodule_id.isin(own)]
        known = others if (others.subtype == r.subtype).any() else library
        rows.append(choose_histogram(r.subtype, r.diameter_mm, rng, known, floor)[1])
    return np.stack(rows)


def open_study(
    profile: str | Profile,
    dataset: str = "lidc-mini",
    data_root: str = "",
    seed: int = 0,
    settings: str = "",
    **changes,
) -> Study:
    """Check everything that can be checked before long work, and open the study.

    dataset:   lidc-mini (embedded, made on first use) or the name of a manifest folder
    data_root: folder with manifest.csv for every other dataset
    settings, changes: see `get_profile`

    Raises:
        ValueError: unknown profile or setting, missing data_root, a manifest that does not validate, or a patient (for
            lidc-mini also a shape or a place) in two splits, naming what and where.
    """
    p = profile if isinstance(profile, Profile) else get_profile(profile, settings, **changes)
    given = paths.check_run(p.name, dataset, data_root)
    sizes = (p.data.n_train, p.data.n_val, p.data.n_test)
    if not given and p.data.patch_mm >= WHOLE_CT_MM:
        raise ValueError(
            f"profile {p.name} takes {p.data.patch_mm} mm of each CT, and {dataset} has cubes of 64 mm: give your own CTs "
            'by DATASET and DATA_ROOT, or SET="data.patch_mm=64"'
        )
    root = Path(given) if given else lidc_mini.prepare(*sizes, seed, n_jobs=os.cpu_count() or 1)
    frame = fitting(checked_manifest(root), p.data.patch_mm, p.data.diameters_mm)
    if p.data.patch_mm >= WHOLE_CT_MM:
        check_whole(frame, p.data.patch_mm)
    assert_disjoint(frame)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: give a whole number from 0 to {2**32 - 1}")
    missing = [s for s in ("train", "test") if not (frame.split == s).any()]
    if missing:
        raise ValueError(f"{root}: no nodule in split(s) {missing}; check the `split` column of the manifest")
    unit = units(frame)
    for name, part in (
        ("train on (train and val)", unit[frame.split != "test"]),
        ("test on", unit[frame.split == "test"]),
    ):
        if part.nunique() < 2:
            raise ValueError(
                f"{root}: nodules of one patient to {name}; cross-validation and intervals need two (`judge` needs one)"
            )
    return Study(p.for_nodules(int((frame.split == "train").sum())), dataset, root, seed, frame)


def pretraining_study(study: Study, profile: Profile) -> Study | None:
    """The embedded dataset with the same autoencoder and the profile's steps of pre-training; None where there are none."""
    if study.dataset == "lidc-mini" or not profile.ldm.pretrain_steps:
        return None
    embedded = open_study(changed(profile, ldm__steps=profile.ldm.pretrain_steps), seed=study.seed)
    vars(embedded)["autoencoder"] = study.autoencoder  # another one's latents would be another language
    return embedded


def check_whole(frame: pd.DataFrame, side_mm: int) -> None:
    """Raise ValueError unless most images are as wide as their crops: the rest of a crop repeats an image's outermost voxels."""
    masks = [(name, open_nifti(Path(name))) for name in frame["mask"]]  # headers; of the images' shape
    narrow = [name for name, mask in masks if min(voxel_size(mask.affine) * mask.shape[:3]) < side_mm]
    if 2 * len(narrow) > len(frame):
        raise ValueError(
            f"{len(narrow)} of {len(frame)} images are narrower than the {side_mm} mm of each CT that are asked for, {narrow[0]} "
            'among them: give whole CTs, or SET="data.patch_mm=…"'
        )


def _files(frame: pd.DataFrame) -> tuple[str, ...]:
    """The columns whose files can be looked at, all rows having one."""
    return tuple(c for c in paths.FILES if c in frame and frame[c].astype(bool).all())


def checked_manifest(root: Path) -> pd.DataFrame:
    """`load_manifest` with every image and mask read, which is done once for the same rows and unchanged files.

    Raises:
        ValueError: see `load_manifest`.
    """
    frame = load_manifest(root, check_images=False)
    stamp = keyed("checked", manifest_digest(frame, _files(frame)))
    if not stamp.exists():
        load_manifest(root)
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
    return frame


def fit_autoencoder(study: Study, profile: Profile) -> tuple[Path, pd.DataFrame]:
    """Train Stage I on the study's training crops (resumable); checkpoint path and loss history."""
    settings = (profile.autoencoder, profile.vae, profile.mixed_precision, profile.data.patch_mm)
    path = keyed("runs", VAE_VERSION, *settings, study.data_hash, study.seed) / "autoencoder.safetensors"
    if profile.autoencoder.source == "maisi" and not path.exists():
        logger.warning("no MAISI weights (%s): trained here; %s", paths.MAISI, cost(autoencoder_stage(profile)))
    crops = study.patches("train", 64 if study.dataset == "lidc-mini" else profile.data.patch_mm).hu
    steps = train_autoencoder(
        list(crops), np.ones(len(crops)), profile.autoencoder, profile.vae, study.seed, path,
        PerceptualLoss(wheel_file(*LITE0)), mixed_precision=profile.mixed_precision,
    )  # fmt: skip
    return path, follow(steps, path, profile.vae.steps, "autoencoder")


def fit_ldm(study: Study, profile: Profile, path: Path, start: ConditionalUNet | None = None) -> pd.DataFrame:
    """Train Stage II unless `path` is finished (resumes where it stopped); the loss history."""
    if path.exists() and ckpt.load_meta(path)["step"] == profile.ldm.steps:
        return read_history(path.parent)
    cache = study.latents("train", template if profile.histogram.template else None)
    initial = None if start is None else start.state_dict()
    steps = train_ldm(cache, profile, study.seed, path, study.autoencoder, initial=initial)
    label = f"{profile.diffusion.objective} lambda={profile.histogram.weight:g}"
    return follow(steps, path, profile.ldm.steps, label)
