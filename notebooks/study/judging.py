"""Networks judged on nodules they have not seen, by the measures a release answers for.

Every nodule's place and shape is ordered three times over: with the nodule's own HU histogram (what comes is held against
the truth, voxel by voxel), with another real nodule's of its subtype and size (control; can features tell it from the
real one?), and as each of the three subtypes (do their means rise in order?). The autoencoder alone is the floor.

With a host CT the nodules are first transplanted into its healthy lung, where nothing of them is left around a synthetic
one, and what is made there is held against the real ones in their own scans.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hrldm.cache import keyed
from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Generator, Request
from hrldm.insertion.released import released
from hrldm.model.diffusion import SamplingConfig
from hrldm.nodules.histograms import histogram_library
from hrldm.nodules.patches import Patches, fitting, load_patches, manifest_digest
from hrldm.nodules.transplant import Host, givers, key_of, transplant
from hrldm.train.config import Stage2
from hrldm.train.device import device
from hrldm.train.latents import weights_digest
from study.classify.jobs import centre_crop
from study.experiments import centre_spectra, shape_patients
from study.measure import intensity
from study.measure.features import Extractor, default_extractor, three_plane_features
from study.measure.fidelity import separability
from study.measure.realism import LEAST_PATIENTS, feature_table, realism
from study.measure.triplets import ordered_share, thrice, triplet_table
from study.profiles import Profile, get_profile
from study.study import Study, checked_manifest, chosen_histograms
from study.systems import reconstruction, texture
from study.systems.inserted import in_crops
from study.systems.registry import request_for

TABLES = (
    "lesions", "lesion_histograms", "median_jsd", "control", "control_summary", "triplets_summary", "power_spectrum", "roughness",
    "separability", "realism",
)  # fmt: skip
IMPOSED_T_MAX = 400  # as the header of the released network has it
N_BOOT = 2000  # resamples of the patients
Maker = Callable[[Request, Patches], np.ndarray]  # the order and the true nodules -> HU crops (N, D, D, D)


def orders_from_library(study: Study, truth: Patches, background: Patches) -> tuple[Request, Request, Patches, Request]:
    """What every system is asked for: each nodule with its own histogram, with another real one, and `thrice`.

    The others come from the shipped library, so that no training split is needed.
    """
    library = histogram_library()
    own = request_for(study, truth, background, "target")
    places, rng = replace(background, frame=truth.frame), np.random.default_rng((study.seed, 0))
    other = replace(own, histogram=chosen_histograms(places, library, rng))
    return own, other, *thrice(own, truth, library)


def judge(
    study: Study,
    truth: Patches,
    background: Patches,
    systems: Mapping[str, Maker],
    extractor: Extractor,
    native: Patches | None = None,
) -> dict[str, pd.DataFrame]:
    """`TABLES`; the spectrum and roughness are of the median lesion, `realism` comes from two patients on. `lesions` and
    `control` have a row for every system and nodule; the others are made from such rows. No interval of fewer than
    `LEAST_PATIENTS`.

    truth, background: the real nodules, and the same places without them
    systems: each makes what it is asked for; the study's autoencoder is added as the floor
    native:  the same nodules in their own scans, where `truth` are transplants
    """
    profile, patients = study.profile, shape_patients(truth.frame)
    makers = {"autoencoder": lambda order, nodules: reconstruction.generate(study, order, nodules.hu), **systems}
    as_own, as_other, nodules_thrice, as_each = orders_from_library(study, truth, background)
    own, other = ({s: make(order, truth) for s, make in makers.items()} for order in (as_own, as_other))
    lesions = intensity.lesion_tables(own, truth, 0)
    control = intensity.control_tables(((as_own.histogram, own), (as_other.histogram, other)), truth, systems)
    triplets = [triplet_table(s, nodules_thrice, as_each, make(as_each, nodules_thrice)) for s, make in systems.items()]
    features = {
        s: three_plane_features(centre_crop(crops, profile.tables.fid_crop_mm), extractor, n_slices=profile.tables.fid_slices, device=device())
        for s, crops in {"real": truth.hu, **other}.items()
    }  # fmt: skip
    tables = {
        "lesions": lesions,
        "lesion_histograms": _histograms(lesions, profile.tables.n_boot),
        "median_jsd": _medians(lesions),
        "control": control,
        "control_summary": intensity.control_summary(control),
        "triplets_summary": ordered_share(pd.concat(triplets, ignore_index=True)).query("side == 'obtained'"),
        "power_spectrum": centre_spectra({"real": truth.hu, **own}, truth.mask, average=np.median),
        "roughness": _roughness({"real": truth.hu, **own}, truth),
        "separability": separability(features.pop("real"), features, patients, extractor.name, 0),
    }
    if len(np.unique(patients)) > 1:
        real, place, made = truth, "in_place", other
        if native is not None:
            real, place, made = native, "displaced", {"transplant": truth.hu, **other}
        told = {s: feature_table(crops, truth.mask) for s, crops in made.items()}
        known = feature_table(real.hu, real.mask), told, shape_patients(real.frame), patients
        tables["realism"] = realism(*known, place, profile.tables.n_boot, 0)
    return tables


def lesions_of(name: str, truth: Patches, crops: np.ndarray) -> pd.DataFrame:
    """`lesion_table` with each lesion's roughness over the real one's."""
    own, real = (feature_table(hu, truth.mask).inside_grain_1_share for hu in (crops, truth.hu))
    return intensity.lesion_table(name, crops, truth).assign(roughness_ratio=(own / real).to_numpy())


def _histograms(lesions: pd.DataFrame, n_boot: int) -> pd.DataFrame:
    """`lesion_histograms`, without the intervals of too few patients."""
    patients = {(s, subtype): part.patient_id.nunique() for s, subtype, part in intensity.by_subtype(lesions)}
    table = intensity.lesion_histograms(lesions, n_boot, 0)
    few = [patients[key] < LEAST_PATIENTS for key in zip(table.system, table.subtype, strict=True)]
    table.loc[few, ["ci_low", "ci_high"]] = np.nan
    return table


def _medians(lesions: pd.DataFrame) -> pd.DataFrame:
    """system, subtype (and `all`), jsd, n_nodules, n_patients."""
    rows = [(s, k, x.jsd.median(), len(x), x.patient_id.nunique()) for s, k, x in intensity.by_subtype(lesions)]
    return pd.DataFrame(rows, columns="system subtype jsd n_nodules n_patients".split())


def _roughness(crops: Mapping[str, np.ndarray], truth: Patches) -> pd.DataFrame:
    """Median over lesions of the SD beyond a Gaussian of 1 mm, over the lesion's SD: system, roughness, of_real, n."""
    values = {s: feature_table(hu, truth.mask)["inside_grain_1_share"].median() for s, hu in crops.items()}
    rows = [(s, v, v / values["real"], len(truth)) for s, v in values.items()]
    return pd.DataFrame(rows, columns="system roughness of_real n".split())


def open_nodules(root: Path, split: str = "test", seed: int = 0) -> Study:
    """A study of nodules to be judged; it trains nothing and needs no training split. `split` may be `all`.

    Raises:
        ValueError: a manifest that does not validate, or no nodule in the split.
    """
    profile = get_profile("quick", tables__n_boot=N_BOOT)
    frame = checked_manifest(root)
    frame = frame.assign(split="all") if split == "all" else frame
    chosen = frame[frame.split == split]
    if chosen.empty:
        raise ValueError(f"{root}: no nodule of split {split!r} in its manifest; choose another, or all")
    if (chosen.diameter_mm > profile.data.patch_mm).all():
        raise ValueError(
            f"{root}: every nodule of split {split!r} is wider than the crop of {profile.data.patch_mm} mm that is judged "
            f"(the first, {chosen.nodule_id.iloc[0]}, has {chosen.diameter_mm.iloc[0]:g} mm)"
        )
    return Study(profile, root.resolve().name, root, seed, fitting(frame, profile.data.patch_mm))


def displaced(study: Study, split: str, host: Host) -> tuple[Study, Patches]:
    """A study of the split's nodules transplanted into a host, and the same nodules where they come from.

    Raises:
        ValueError: no nodule of the split is a giver (`transplant.givers`), or none finds a place.
    """
    # whatever their split is here, they are judged: not turned, not recast
    nodules = givers(study.split(split)).assign(split="test")
    if nodules.empty:
        raise ValueError(
            f"{study.root}: no nodule of split {split!r} can be transplanted (thin slices, whole, 5-30 mm)"
        )
    host = replace(host, splits=("test",))
    folder = keyed("transplants", manifest_digest(nodules), key_of([host]), study.seed)
    moved = open_nodules(transplant(nodules, [host], folder, seed=study.seed), "all")
    moved = replace(moved, seed=study.seed, frame=moved.frame.assign(split=split))
    own = nodules.set_index("nodule_id").loc[moved.split(split).source_id].reset_index()
    return replace(moved, dataset=f"{study.dataset} in {host.patient_id}"), load_patches(
        own, study.profile.data.patch_mm
    )


@dataclass(frozen=True)
class Networks:
    """What was judged and how, for `provenance.json`.

    autoencoder, unet: `weights_digest`
    config:            of the U-Net's training
    sampling:          of each system
    judged_by:         the settings of the study that judges; its networks are not used
    """

    autoencoder: str
    unet: str
    config: Stage2
    sampling: dict[str, SamplingConfig]
    judged_by: Profile


def networks(study: Study, systems: Mapping[str, Generator]) -> Networks:
    """The record of generators that share their networks."""
    one, *_ = systems.values()
    digests = weights_digest(one.autoencoder), weights_digest(one.unet)
    return Networks(*digests, one.config, {name: g.sampling for name, g in systems.items()}, study.profile)


def generators(on: str | None = None, **files: Path) -> dict[str, Generator]:
    """The released network left to itself, and with the histogram imposed while sampling; files: see `released`."""
    return {
        "hr-ldm": released(on=on, **files),
        "hr-ldm-matched": released(on=on, match_t_max=IMPOSED_T_MAX, **files),
    }


def judge_released(
    study: Study, split: str, on: str | None = None, native: Patches | None = None, **files: Path
) -> dict[str, pd.DataFrame]:
    """`judge` texture without training and the released network on a split: left to itself, with the histogram imposed, and
    made part of its scan (`released`, what `insert` ships). native: see `judge`; files: see `released`."""
    alone, imposed = generators(on, **files).values()
    systems: dict[str, Maker] = {
        "texture": lambda order, nodules: texture.generate(study, order, nodules.hu),
        "hr-ldm": lambda order, _: alone(order, progress="hr-ldm"),
        "hr-ldm-matched": lambda order, _: imposed(order, progress="hr-ldm-matched"),
        "released": lambda order, _: in_crops(order, alone(order, paste=False, progress="released")),
    }
    return judge(study, study.patches(split), study.backgrounds(split), systems, default_extractor(), native)


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What `judge` found, one row a system, as text: JSD with its interval, its median, control by subtype, order, AUROC."""
    jsd = tables["lesion_histograms"].query("subtype == 'all' and metric == 'jsd'").set_index("system")
    median = tables["median_jsd"].query("subtype == 'all'").set_index("system").jsd
    fit = tables["control_summary"].query("quantity == 'mean_hu'").set_index(["system", "subtype"])
    order = tables["triplets_summary"].query("side == 'obtained'").set_index("system")
    apart = tables["separability"].set_index("system").auroc
    subtypes = [s for s in SUBTYPES if s in fit.index.unique("subtype")]
    rows = []
    for system, r in jsd.iterrows():
        interval = f" ({r.ci_low:.3f} to {r.ci_high:.3f})" if pd.notna(r.ci_low) else ""
        control = [
            f"{fit.slope[system, s]:.2f}, {fit.r2[system, s]:.3f}" if pd.notna(fit.r2.get((system, s))) else ""
            for s in subtypes
        ]
        ordered = f"{order.value[system]:.0%} of {order.n[system]}" if system in order.index else ""
        told = f"{apart[system]:.2f}" if pd.notna(apart.get(system)) else ""
        rows.append([system, f"{r.value:.3f}{interval}", f"{median[system]:.3f}", *control, ordered, told])
    counts = fit.loc[fit.index[0][0]].n
    head = ["system", f"JSD, n = {jsd.n.max()}", "median", *(f"{s}: slope, R², n = {counts[s]}" for s in subtypes)]
    return pd.DataFrame(rows, columns=[*head, "three subtypes in order", "AUROC of a linear classifier"])
