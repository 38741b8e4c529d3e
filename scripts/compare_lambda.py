"""Does L_hist pay? Asked again of the released network: `python -m scripts.compare_lambda DATA_ROOT --out FOLDER [--steps 250]`.

The released weights are trained on with lambda = 0 and with lambda = 10, three seeds each, with the template and without it
(its input cut off, then as many steps to get used to that). All else is equal: data of `train_released.py`, nodules, times,
noise. The answer is the JSD in the healthy place, with the template; the other rows stand beside it. Test nodules are asked
for their own histograms and left to the network, in their own place (first manifest) and in the healthy lung of the test
host (second). A call after a kill goes on. Writes to FOLDER (the committed ones, `results/released/lambda/`, are of 250 steps,
from the weights and the decoder that were shipped before):

    lambda.csv              template, lambda, seed: JSD, Wasserstein distance, spread and roughness over the real ones
    lambda_differences.csv  lambda = 10 minus lambda = 0: mean over nodules and seeds, interval by patient, p and p by Holm
"""

import dataclasses
import sys
from pathlib import Path

import pandas as pd
import tyro

import scripts._study  # noqa: F401
from hrldm.atomic import write_text
from hrldm.command_line import run
from hrldm.insertion.generator import Generator
from hrldm.insertion.released import RELEASED_UNET
from hrldm.train.ldm import load_unet
from scripts.train_released import SAMPLING, SETTINGS, inputs, made_for, release_data
from study import judging
from study.measure import intensity
from study.measure.statistics import holm
from study.report.provenance import write_provenance
from study.study import Study, open_study

LAMBDAS, SEEDS = (0.0, 10.0), 3
LEARNING_RATE = 1e-4  # of a network that is trained already
METRICS = ("jsd", "wasserstein_hu", "sd_ratio", "roughness_ratio")


def seeded(study: Study, seed: int) -> Study:
    """The study with another seed of training, on the latents of the first."""
    other = study.with_seed(seed)
    vars(other)["_latents"] = study._latents
    return other


def judged(study: Study, made_by: Generator, nodules: list[Study]) -> pd.DataFrame:
    parts = []
    for where, part in zip(("own place", "displaced"), nodules, strict=True):
        truth, crops = made_for(dataclasses.replace(part, profile=study.profile), made_by, "test")
        parts.append(judging.lesions_of("", truth, crops).assign(where=where))
    return pd.concat(parts, ignore_index=True)


def main(root: tyro.conf.Positional[Path], out: Path, steps: int = 250) -> None:
    """Train, judge and compare.

    Args:
        out: folder for the two tables.
        steps: of each of the runs.
    """
    changes = SETTINGS | {"sampling__steps": SAMPLING["steps"], "ldm__lr": LEARNING_RATE, "ldm__steps": steps}
    cubes, boxes, host = inputs(root)
    study = open_study("quick", "release", str(release_data(cubes, boxes, host)), 0, **changes)
    nodules = [judging.open_nodules(cubes), judging.displaced(judging.open_nodules(boxes), "test", host)[0]]
    study.latents("train")  # once and for all seeds
    released = load_unet(RELEASED_UNET)[0]
    used_to_it = seeded(study, SEEDS).unet(released, histogram__template=False)[0]

    tables = []
    for template, start in ((True, released), (False, used_to_it)):
        for seed in range(SEEDS):
            for weight in LAMBDAS:
                own = seeded(study, seed)
                made_by = own.generator(start, histogram__template=template, histogram__weight=weight)
                table = judged(own, made_by, nodules).assign(template=template, system=f"{weight:g}", seed=seed)
                print(template, seed, weight, table[list(METRICS)].mean().round(4).to_dict(), flush=True)
                tables.append(table)
    every = pd.concat(tables, ignore_index=True)
    keys = ["where", "template", "system", "seed"]
    means = every.groupby(keys)[list(METRICS)].mean().assign(n=every.groupby(keys).size()).reset_index()
    means = means.rename(columns={"system": "lambda"})
    write_text(out / "lambda.csv", means.round(5).to_csv(index=False))
    rows = []
    for (where, template), part in every.groupby(["where", "template"], sort=False):
        of_nodules = part.groupby(["system", "nodule_id", "patient_id"], as_index=False)[list(METRICS)].mean()
        for metric in METRICS:
            e = intensity.paired_difference(of_nodules, "0", "10", metric, 1000, 0)
            rows.append((where, template, metric, e.value, e.ci_low, e.ci_high, e.p, e.n, SEEDS))
    columns = ["where", "template", "metric", "difference", "ci_low", "ci_high", "p", "n", "seeds"]
    table = pd.DataFrame(rows, columns=columns).assign(p_holm=lambda t: holm(t.p.to_numpy()))
    write_text(out / "lambda_differences.csv", table.round(6).to_csv(index=False))
    write_provenance(out, study.profile, "release", study.seed, study.data_hash)


if __name__ == "__main__":
    sys.exit(run(main, "python -m scripts.compare_lambda", __doc__.splitlines()[0]))
