"""Train, judge and ship the released HR-LDM: `python scripts/train_released.py LIDC_CUBES_ROOT [--seeds 3]`.

Longer than `quick`: pre-training on `lidc-mini`, fine-tuning on the training patients of `lidc-cubes`. Runs of a sixteenth and
a quarter of the steps show what more training brings; at full length HR-LDM and its twin with lambda 0 are fine-tuned from
one pre-trained network with several seeds, two at a time, one thread each. All of it is kept on disk and goes on where it was.
Seed 0 is shipped: hrldm/weights/unet.safetensors (averaged weights, float32; profile, scale and training in the header) and
its card unet.json. Writes `results/lidc-cubes/released/`:

    curve.csv, curve.png   HR-LDM on validation nodules, by training steps
    seeds.csv              both on test nodules, one row per nodule and seed
    differences.csv        HR-LDM minus lambda 0, mean over seeds, patient bootstrap
    tables/                seed 0 on test nodules, as notebook 05 has them
"""

import argparse
import dataclasses
import json
import subprocess
import sys

import pandas as pd
import torch

from hrldm import paths
from hrldm.atomic import write_text
from hrldm.baselines.latent import CHANGES
from hrldm.baselines.systems import request_for, synthesise
from hrldm.evaluate import intensity
from hrldm.evaluate.features import default_extractor
from hrldm.evaluate.judging import Orders, judge
from hrldm.evaluate.triplets import triplet_request
from hrldm.report import figures
from hrldm.report.figures_base import GREY, colour_of
from hrldm.report.provenance import git_state
from hrldm.report.tables import save_tables
from hrldm.synthesis.generate import Generator
from hrldm.synthesis.released import RELEASED_UNET
from hrldm.train import checkpoint as ckpt
from hrldm.train.device import device
from hrldm.train.latents import weights_digest
from hrldm.train.runs import Study, open_study

DATASET = "lidc-cubes"
STEPS = {"pretrain_steps": 5000, "ldm_steps": 1000}
BUDGETS = (1 / 16, 1 / 4, 1.0)
PAIR = ("maisi-ddpm", "hr-ldm")
DRAWS = 4  # noises of each validation nodule, which are few
OUT = paths.ROOT / "results" / DATASET / "released"
ATTRIBUTION = "Trained on LIDC-IDRI (doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0); see NOTICE."


def at_budget(root: str, budget: float) -> Study:
    return open_study("quick", DATASET, root, 0, **{name: round(budget * n) for name, n in STEPS.items()})


def network(study: Study, system: str, seed: int) -> Generator:
    """One network: seeds differ in fine-tuning and share the pre-trained network."""
    start = study.pretrained(study.profile)
    seeded = dataclasses.replace(study, seed=seed)
    unet, scale, profile, _ = seeded.unet(start, **CHANGES[system])
    return Generator(study.autoencoder, unet, scale, profile, device())


def train_in_pairs(root: str, seeds: int, workers: int) -> None:
    """Fine-tune both systems with every seed, `workers` processes at a time with one thread each."""
    jobs = [(system, str(seed)) for seed in range(seeds) for system in PAIR]
    for i in range(0, len(jobs), workers):
        calls = [[sys.executable, __file__, root, "--only", *job] for job in jobs[i : i + workers]]
        running = [subprocess.Popen(call) for call in calls]
        if any([process.wait() for process in running]):
            raise SystemExit("a fine-tuning failed, see above; call again to go on")


# -- judged --------------------------------------------------------------------------------------------------------------


def lesions_of(study: Study, generator: Generator, split: str, draws: int) -> pd.DataFrame:
    """`lesion_table` of a split, each nodule asked for its own histogram, averaged over noises."""
    truth, background = study.patches(split), study.backgrounds(split)
    tables = []
    for draw in range(draws):
        asked = request_for(study, truth, background, "target", seed=draw)
        tables.append(intensity.lesion_table("", generator(asked), truth.hu, truth.mask, truth.frame))
    keys = ["nodule_id", "subtype", "patient_id"]
    return pd.concat(tables).groupby(keys, sort=False, as_index=False).mean(numeric_only=True)


def training_curve(root: str, seeds: int) -> None:
    rows = []
    for budget in BUDGETS:
        study = at_budget(root, budget)
        for seed in range(seeds if budget == 1 else 1):
            t = lesions_of(study, network(study, "hr-ldm", seed), "val", DRAWS)
            row = {name: getattr(study.profile, name) for name in STEPS} | {"seed": seed, "n": len(t)}
            row |= {"jsd": t.jsd.mean(), "jsd_median": t.jsd.median(), "wasserstein_hu": t.wasserstein_hu.mean()}
            row |= {
                "mean_error_hu": (t.mean_hu - t.truth_mean_hu).abs().mean(),
                "sd_ratio": (t.sd_hu / t.truth_sd_hu).mean(),
            }
            rows.append(row)
            print(row, flush=True)
    curve = pd.DataFrame(rows)
    write_text(OUT / "curve.csv", curve.round(5).to_csv(index=False))
    draw_curve(curve)


def draw_curve(curve: pd.DataFrame) -> None:
    steps = curve[list(STEPS)].sum(axis=1)
    titles = {"jsd": "JSD of HU histograms", "mean_error_hu": "error of the mean, HU", "sd_ratio": "SD / true SD"}
    with figures.style():
        fig, axes = figures.new_figure(1, 3, (9.6, 3.4))
        for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
            ax.plot(steps, curve[name], "o", color=colour_of("hr-ldm"))
            mean = curve[name].groupby(steps).mean()
            ax.plot(mean.index, mean, color=colour_of("hr-ldm"))
            ax.set(xscale="log", xlabel="training steps, both stages", title=title)
            ax.minorticks_off()
            ax.set_xticks(mean.index, [f"{x:,}" for x in mean.index])
            if name != "sd_ratio":
                ax.set_ylim(0, 1.1 * curve[name].max())
        axes[0, 2].axhline(1, color=GREY, ls="--", lw=1)
        fig.suptitle(
            f"HR-LDM on {curve.n.iloc[0]} validation nodules of {DATASET}, {DRAWS} noises each; a dot is a run"
        )
        fig.savefig(OUT / "curve.png", dpi=130)


def several_seeds(full: Study, seeds: int) -> None:
    tables = [
        lesions_of(full, network(full, system, seed), "test", 1).assign(system=system, seed=seed)
        for system in PAIR
        for seed in range(seeds)
    ]
    table = pd.concat(tables)
    write_text(OUT / "seeds.csv", table.round(5).to_csv(index=False))
    keys = ["system", "nodule_id", "subtype", "patient_id"]
    mean = table.groupby(keys, sort=False, as_index=False).mean(numeric_only=True)
    metrics = (*intensity.METRICS, "sd_hu")
    found = {m: intensity.paired_difference(mean, *PAIR, m, full.profile.n_boot, 0) for m in metrics}
    rows = [(m, e.value, e.ci_low, e.ci_high, e.p, e.n, seeds) for m, e in found.items()]
    columns = "metric difference ci_low ci_high p n seeds".split()
    write_text(OUT / "differences.csv", pd.DataFrame(rows, columns=columns).round(5).to_csv(index=False))


def judge_on_test(study: Study) -> None:
    """Seed 0 on test nodules: histograms, control, triplets, separability."""
    truth, background = study.patches("test"), study.backgrounds("test")
    own, other = (request_for(study, truth, background, which, 0) for which in ("target", "library"))
    nodules_thrice, triplets = triplet_request(study, truth, background)
    orders = Orders(own, other, triplets, nodules_thrice)
    systems = {
        s: lambda order, nodules, system=s: synthesise(study, system, order, nodules) for s in (*PAIR, "hr-ldm-matched")
    }
    save_tables(judge(study, truth, orders, systems, default_extractor()), OUT)


# -- shipped -------------------------------------------------------------------------------------------------------------


def ship(study: Study) -> None:
    unet, scale, profile, history = study.unet()
    train = study.split("train")
    training = {
        "dataset": DATASET, "data_hash": study.data_hash, "seed": study.seed, "n_train": len(train),
        "patients": int(train.patient_id.nunique()), "pretrained_on": "lidc-mini",
        "pretrain_steps": profile.pretrain_steps, "steps": profile.ldm_steps, "batch": profile.ldm_batch,
    }  # fmt: skip
    stored = dataclasses.replace(profile, **CHANGES["hr-ldm-matched"])
    meta = {
        "stage": "ldm", "scale": scale, "profile": dataclasses.asdict(stored),
        "autoencoder": weights_digest(study.autoencoder), "training": training,
    }  # fmt: skip
    ckpt.save(RELEASED_UNET, {"ema": unet.state_dict()}, meta)
    tables = {
        f.stem: json.loads(pd.read_csv(f).round(4).to_json(orient="records"))
        for f in sorted((OUT / "tables").glob("*.csv"))
    }
    last = history.tail(100).mean(numeric_only=True).drop("step").round(4).to_dict()
    card = {
        "what": "HR-LDM, latent inpainting of lung nodules, conditional on mask, subtype and HU histogram; 1 mm, 8 x 4^3 latents",
        "training": training | {"losses_last_100": last},
        "weights_sha256_16": weights_digest(unet),
        "judged_on": f"{len(study.split('test'))} nodules of test patients of {DATASET}, none seen in training",
        "commit": git_state()["commit"],
        "sampling": "DDIM, 25 steps; `hr-ldm-matched`: requested histogram imposed at t <= 300 (the default of `released()`, which adds grain: synthesis/grain.py)",
        "results": tables,
        "attribution": ATTRIBUTION,
        "licence": "CC BY 3.0; research only, not a medical device",
    }
    write_text(RELEASED_UNET.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    print(f"{RELEASED_UNET}: {RELEASED_UNET.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs=2, metavar=("SYSTEM", "SEED"), help="train one network and stop")
    args = parser.parse_args()
    full = at_budget(args.root, 1.0)
    if args.only:
        torch.set_num_threads(1)
        network(full, args.only[0], int(args.only[1]))
        return
    full.pretrained(full.profile)
    train_in_pairs(args.root, args.seeds, args.workers)
    OUT.mkdir(parents=True, exist_ok=True)
    several_seeds(full, args.seeds)
    judge_on_test(full)
    ship(full)
    training_curve(args.root, args.seeds)


if __name__ == "__main__":
    main()
