"""Section 3's choices, one at a time: what each does to the lesion's HU histogram, everything else equal.

Every cell sees the same nodules, times and noise in training and the same nodules, histograms and noise in sampling, so
its difference to the default cell is paired. A cell is the mean over its seeds; intervals resample patients.
"""

from dataclasses import dataclass, replace

import pandas as pd
from tqdm import tqdm

from hrldm.config import changed
from hrldm.insertion.generator import Generator
from study.measure.intensity import lesion_table
from study.measure.statistics import mean_interval
from study.profiles import Profile
from study.study import Study
from study.systems.latent import CHANGES, trained
from study.systems.registry import request_for, with_components

SCRATCH = "scratch"
METRICS = ("jsd", "wasserstein_hu", "mean_error_hu", "sd_ratio")


@dataclass(frozen=True)
class Cell:
    """One level of one factor: the settings it changes from the profile's."""

    factor: str
    level: str
    changes: dict
    seeds: int = 1
    afresh: bool = False  # trained as the networks of Table 1 where the others go on from one network

    @property
    def name(self) -> str:
        return f"{self.factor}: {self.level}"


def cells(study: Study) -> list[Cell]:
    """Every cell of the study; the first of each factor is the profile's own setting."""
    p = study.profile
    other = "eps" if p.diffusion.prediction == "v" else "v"
    parts = 3 if p.unet.mask_channels == 1 else 1
    scratch = [  # what a trained network cannot turn to in a few steps
        Cell("output of the U-Net", f"{p.diffusion.prediction} (default)", {}),
        Cell("output of the U-Net", other, {"diffusion__prediction": other}),
        Cell("linear denoiser", f"{'yes' if p.unet.linear_skip else 'no'} (default)", {}),
        Cell("linear denoiser", "no" if p.unet.linear_skip else "yes", {"unet__linear_skip": not p.unet.linear_skip}),
        Cell("mask's detail", f"{p.unet.mask_detail} (default)", {}),
        Cell("components of the mask", f"{p.unet.mask_channels} (default)", {}),
        Cell("components of the mask", f"{parts}", {"unet__mask_channels": parts}),
        Cell(
            "mask's detail",
            "4" if p.unet.mask_detail == 1 else "1",
            {"unet__mask_detail": 4 if p.unet.mask_detail == 1 else 1},
        ),
    ]
    core = [
        Cell("background", f"{p.diffusion.background} (default)", {}),
        Cell("background", "noised", {"diffusion__background": "noised"}),
        Cell("background", "paper (Eq. 4, then Eq. 10)", {"diffusion__background": "paper"}),
        Cell("c_hist x L_hist", "both (default)", {}),
        Cell("c_hist x L_hist", "c_hist only", {"histogram__weight": 0.0}),
        Cell("c_hist x L_hist", "L_hist only", {"histogram__vector": False}),
        Cell("c_hist x L_hist", "neither", {"histogram__vector": False, "histogram__weight": 0.0}),
    ]
    rest = [
        Cell("lambda", f"{p.histogram.weight:g} (default)", {}),
        Cell("lambda", "0", {"histogram__weight": 0.0}),
        Cell("lambda", "1", {"histogram__weight": 1.0}),
        Cell("lambda", "100", {"histogram__weight": 100.0}),
        Cell("times of L_hist", f"t <= {p.histogram.t_max} (default)", {}),
        Cell("times of L_hist", "all t (paper)", {"histogram__t_max": None}),
        Cell("space of L_hist", f"{p.histogram.space} (default)", {}),
        Cell("space of L_hist", "HU", {"histogram__space": "hu"}),
        Cell("tokens of c_hist", f"{p.histogram.tokens} (default)", {}),
        Cell("tokens of c_hist", f"{p.histogram.bins}", {"histogram__tokens": p.histogram.bins}),
        Cell("histogram imposed while sampling", "never (default)", {}),
        Cell("histogram imposed while sampling", "t <= 300", CHANGES["hr-ldm-matched"]),
        Cell(
            "histogram imposed while sampling",
            "t <= 300, lambda 0",
            CHANGES["hr-ldm-matched"] | {"histogram__weight": 0.0},
        ),
        Cell("c_hist as", "vector (default)", {}, afresh=True),
        Cell("c_hist as", "template", {"histogram__template": True, "histogram__vector": False}, afresh=True),
        Cell("c_hist as", "both", {"histogram__template": True}, afresh=True),
        Cell("c_hist as", "neither", {"histogram__vector": False}, afresh=True),
        *(scratch if p.ablation.start == SCRATCH else []),
    ]
    given = ((core, p.ablation.core_seeds), (rest, p.ablation.seeds))
    return [replace(cell, seeds=seeds) for group, seeds in given for cell in group]


def training(profile: Profile, cell: Cell) -> tuple[str, int]:
    """The network that a cell's training begins with (`scratch`: none), and its steps."""
    p = profile.ablation
    if cell.afresh and p.start != SCRATCH:
        return SCRATCH, profile.ldm.steps
    return p.start, p.steps or profile.ldm.steps


def generator(study: Study, cell: Cell, seed: int) -> Generator:
    """The network of one cell, trained as `training` says."""
    seeded = study if seed == study.seed else study.with_seed(seed)
    start, steps = training(study.profile, cell)
    network = None if start == SCRATCH else trained(study, start).unet
    return seeded.generator(network, ldm__steps=steps, **cell.changes)


def run_ablations(study: Study) -> dict[str, pd.DataFrame]:
    """Lesion tables of every cell, averaged over its seeds, by cell name; networks are kept on disk, equal ones made once."""
    test, background = (part[: study.profile.ablation.n] for part in study.places("test"))
    request = request_for(study, test, background, condition="target")
    done: dict[tuple, pd.DataFrame] = {}
    out = {}
    keys = ["nodule_id", "subtype", "patient_id"]
    for cell in tqdm(cells(study), desc="ablations", mininterval=5):
        runs = []
        for seed in range(study.seed, study.seed + cell.seeds):
            key = (str(sorted(cell.changes.items())), *training(study.profile, cell), seed)
            if key not in done:
                unet = changed(study.profile, **cell.changes).unet
                crops = generator(study, cell, seed)(with_components(request, test, unet))
                done[key] = lesion_table(cell.name, crops, test)[[*keys, *METRICS]]
            runs.append(done[key])
        mean = pd.concat(runs).groupby(keys, sort=False, as_index=False)[list(METRICS)].mean()
        out[cell.name] = mean.assign(system=cell.name)
    return out


def ablation_table(study: Study, lesions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """`ablations.csv`: each metric of each level, and its paired difference to the factor's default (`…_difference`)."""
    rows = []
    first: dict[str, pd.DataFrame] = {}
    for cell in cells(study):
        table = lesions[cell.name].set_index("nodule_id")
        base = first.setdefault(cell.factor, table)
        for metric in METRICS:
            measured = {metric: table[metric]}
            if base is not table:
                measured[f"{metric}_difference"] = table[metric] - base.loc[table.index, metric]
            for name, values in measured.items():
                e = mean_interval(values, table["patient_id"], study.profile.tables.n_boot, study.seed)
                rows.append((cell.factor, cell.level, name, e.value, e.ci_low, e.ci_high, cell.seeds))
    return pd.DataFrame(rows, columns="factor level metric value ci_low ci_high n_seeds".split())
