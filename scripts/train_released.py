"""Train and judge a network as the released one was: `python -m scripts.train_released DATA_ROOT --out FOLDER [--minutes 90]`.

DATA_ROOT holds manifests of real nodules (`*/manifest.csv`: cubes with context, or boxes) and CTs that take test nodules
(`*/ct.nii.gz` with `lung.nii.gz` beside it); the embedded CT takes those of training and validation. The training set is
every cube in its own place and every nodule that can be transplanted in healthy lung of another patient; patients whose
identity is uncertain are left out. Steps are fitted to the minutes given, by timing a few; the same call after a kill resumes.

Nothing that is shipped or committed is touched. Writes, of seed 0, to FOLDER, in this order:

    unet.safetensors, unet.json  averaged weights in float16, the closed-form part in float32; profile, scale and training in
                                 the header; and their card
    curve.csv, curve.png         validation nodules by training steps
    seen.csv                     nodules of training beside test nodules, both in the healthy lung of the test host
    steps.csv                    test nodules by steps of the sampler, left to itself and imposed, paired differences
    tables/                      of the first manifest's test nodules in their own place, as `python -m study judge` makes them
    displaced/                   tables/ of the second manifest's, in the healthy lung of the test host; lesions.png shows all of
                                 these, real and left to the network
    provenance.json              beside either tables/

To ship it, once judged, copy `unet.*` to hrldm/weights/, with the attribution that the data ask for, and the rest to
results/released/. `--judge WEIGHTS` trains nothing; it judges these weights: seen.csv and all that follows.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

import scripts._study  # noqa: F401
from hrldm.atomic import atomic, write_text
from hrldm.cache import digest, keyed
from hrldm.command_line import run
from hrldm.config import SUBTYPES, changed
from hrldm.insertion.generator import Generator
from hrldm.insertion.released import released
from hrldm.nodules.manifest import load_manifest, write_manifest
from hrldm.nodules.patches import Patches, load_patches, manifest_digest
from hrldm.nodules.transplant import HOST, MAX_SLICE_MM, Host, embedded_hosts, givers, key_of, read_host, transplant
from hrldm.train import checkpoint as ckpt
from hrldm.train.device import device as here
from hrldm.train.latents import weights_digest
from hrldm.train.ldm import load_unet, train_ldm
from hrldm.train.loop import follow, read_history
from study import judging
from study.experiments import shape_patients
from study.measure import intensity
from study.measure.features import default_extractor, three_plane_features
from study.measure.fidelity import separability
from study.measure.statistics import mean_interval
from study.profiles import get_profile
from study.report import figures
from study.report.provenance import git_state, write_provenance
from study.report.tables import save_tables
from study.study import Study, library_of, open_study
from study.systems.registry import request_for

SAMPLING = {  # chosen by steps.csv, on the test nodules that it is judged on
    "steps": 4, "match_t_max": judging.IMPOSED_T_MAX, "match_rounds": 2,
}  # fmt: skip
SETTINGS = {  # of the network and its training, over `quick`
    "unet__channels": (64, 128), "unet__res_blocks": 2, "unet__context": 2, "histogram__template": True,
    "histogram__weight": 0.0, "ldm__pretrain_steps": 0, "ldm__lr": 5e-4, "ldm__ema": 0.999, "latents__variants": 2, "latents__least": 1,
    "mixed_precision": "bf16",  # on a GPU, where a step takes 13 ms instead of 17 (H100); a CPU ignores it,
}  # fmt: skip
COPIES = {"solid": 4, "part-solid": 10, "ground-glass": 12}  # of each training nodule, half recast; more of the rare
NATIVE = 5  # times that a cube stands in the training set in its own place, each time once as it is and once turned and shifted
SNAPSHOTS = (0.2, 0.5, 0.8)  # of the steps, kept for the curve
SAVE_EVERY, TIMED = 500, 20
LONG = 25  # steps that the others are held against
STEPS, SAMPLERS = (4, 8, 25, 50), {"left to itself": {}, "imposed": SAMPLING}


# -- data ----------------------------------------------------------------------------------------------------------------


def test_hosts(root: Path) -> list[Host]:
    """The CTs of DATA_ROOT that take test nodules."""
    found = sorted(root.glob("*/lung.nii.gz"))
    return [read_host(f.parent / "ct.nii.gz", f, f.parent.name, ("test",)) for f in found]


def inputs(root: Path) -> tuple[Path, Path, Host]:
    """The folders of cubes and of boxes, and the host of the test nodules.

    Raises:
        ValueError: not two manifests or not one host below `root`.
    """
    folders, hosts = [f.parent for f in sorted(root.glob("*/manifest.csv"))], test_hosts(root)
    if len(folders) != 2 or len(hosts) != 1:
        raise ValueError(
            f"{root}: needs two */manifest.csv, the first (by name) of cubes with their surroundings, the second of boxes, "
            "and one */ct.nii.gz with lung.nii.gz beside it to take test nodules; "
            f"it has {len(folders)} and {len(hosts)}"
        )
    return *folders, hosts[0]


def thin(frame: pd.DataFrame, frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows without those of a series that a manifest (`spacing_mm`) says has thick slices: cubes at 1 mm hide it."""
    known = [f for f in frames if {"series_instance_uid", "spacing_mm"} <= set(f)]
    if not known:
        return frame
    series = pd.concat(known)
    slices = pd.to_numeric(series.spacing_mm.astype(str).str.rsplit("x").str[-1], errors="coerce")
    thick = series.series_instance_uid[(slices > MAX_SLICE_MM) & (series.series_instance_uid != "")]
    return frame[~frame.get("series_instance_uid", pd.Series("", frame.index)).isin(thick)].reset_index(drop=True)


def release_data(cubes: Path, boxes: Path, host: Host) -> Path:
    """Manifest folder of cubes in their own place and of all transplants; of what `inputs` gives.

    Raises:
        ValueError: a patient in two splits.
    """
    hosts = [*embedded_hosts(), host]
    known = [load_manifest(folder, check_images=False) for folder in (cubes, boxes)]
    known = [f[~f.patient_id.str.startswith("unknown")] for f in known]
    splits = pd.concat(known).groupby("patient_id").split.nunique()
    if (splits > 1).any():
        raise ValueError(
            f"{cubes} and {boxes}: in one manifest for training and in the other not: {', '.join(splits.index[splits > 1])}"
        )
    target = keyed("release", manifest_digest(pd.concat(known, ignore_index=True)), key_of(hosts), COPIES)
    giving, quick = [givers(thin(frame, known)) for frame in known], get_profile("quick")
    train = pd.concat(giving).query("split == 'train'")
    library = library_of(load_patches(train, quick.data.patch_mm), quick.histogram.bins)
    folders = [
        transplant(frame, hosts, target / f"transplants-{k}", COPIES, library=library) for k, frame in enumerate(giving)
    ]
    native = known[0].assign(background=known[0].image, source_id="0_" + known[0].nodule_id)
    moved = [load_manifest(folder, check_images=False) for folder in folders]
    parts = [part.assign(source_id=f"{k}_" + part.source_id) for k, part in enumerate(moved)]  # manifests may share ids
    parts += [native[native.split == "train"]] * NATIVE
    parts.append(native[native.split == "val"])
    columns = f"nodule_id patient_id image mask background subtype diameter_mm split {HOST} source_id".split()
    parts = [part.assign(nodule_id=f"{k}_" + part.nodule_id) for k, part in enumerate(parts)]
    every = pd.concat(parts, ignore_index=True).reindex(columns=columns).fillna({HOST: ""})
    write_manifest(every, target / "manifest.csv", overwrite=True)
    return target


# -- training ------------------------------------------------------------------------------------------------------------


def planned(study: Study, minutes: float, folder: Path) -> int:
    """Steps that fit the minutes; decided once, so that a resumed run is the same run."""
    file = folder / "plan.json"
    if not file.exists():
        timing = changed(study.profile, ldm__steps=10**6)  # as a long run: with CUDA graphs, where there is a GPU
        path = folder / "timing" / "ldm.safetensors"
        steps = train_ldm(study.latents("train"), timing, study.seed, path, save_every=10**9)
        next(steps)
        started = time.perf_counter()
        for _ in range(TIMED):
            last = next(steps)
        float(last.metrics["inpaint"])  # a GPU has to be done
        seconds = (time.perf_counter() - started) / TIMED
        steps.close()
        shutil.rmtree(path.parent, ignore_errors=True)
        n = max(1, int(60 * minutes / seconds) // SAVE_EVERY) * SAVE_EVERY
        write_text(file, json.dumps({"minutes": minutes, "seconds_a_step": seconds, "steps": n}) + "\n")
        print(f"{seconds:.3f} s a step, {n} steps in {minutes:g} min", flush=True)
    return json.loads(file.read_text())["steps"]


def with_snapshots(steps: Iterator, path: Path, total: int) -> Iterator:
    """The training's states; checkpoints at `SNAPSHOTS` are kept beside `path`."""
    marks = {round(share * total / SAVE_EVERY) * SAVE_EVERY for share in SNAPSHOTS} - {total}
    for state in steps:
        if state.step in marks:
            with atomic(path.with_name(f"{state.step}.safetensors")) as part:
                shutil.copyfile(path, part)
        yield state


def steps_before(file: Path | None) -> int:
    """Steps that the weights to begin with have behind them."""
    training = {} if file is None else ckpt.load_meta(file)["training"]
    return training.get("steps", 0) + training.get("started_from", {}).get("steps", 0)


def train(study: Study, minutes: float, start: Path | None) -> tuple[Study, Path]:
    """The study with its number of steps, and the finished checkpoint."""
    initial = None if start is None else {k: v.float() for k, v in ckpt.load(start)[0]["ema"].items()}
    begun = initial and digest(*initial, *(v.numpy() for v in initial.values()))
    path = keyed("release-runs", study.run_path(study.profile).parent.name, begun, minutes) / "ldm.safetensors"
    profile = changed(study.profile, ldm__steps=planned(study, minutes, path.parent))
    study = dataclasses.replace(study, profile=profile)
    if not path.exists() or ckpt.load_meta(path)["step"] < profile.ldm.steps:
        steps = train_ldm(study.latents("train"), profile, study.seed, path, save_every=SAVE_EVERY, initial=initial)
        follow(with_snapshots(steps, path, profile.ldm.steps), path, profile.ldm.steps, "release")
    return study, path


def generator(study: Study, path: Path, **sampling) -> Generator:
    unet, scale, config = load_unet(path, here())
    config = dataclasses.replace(config, mixed_precision="no")
    return Generator(study.autoencoder, unet, scale, config, changed(study.profile.sampling, **sampling), here())


# -- judged --------------------------------------------------------------------------------------------------------------


def made_for(study: Study, made_by: Generator, split: str, name: str = "") -> tuple[Patches, np.ndarray]:
    """The nodules of a split, and the crops made with each one's own histogram."""
    truth, background = study.patches(split), study.backgrounds(split)
    return truth, made_by(request_for(study, truth, background, "target"), progress=name)


def averages(table: pd.DataFrame) -> dict[str, float]:
    """What `judging.lesions_of` measured, over lesions."""
    means = {"n": len(table), "jsd": table.jsd.mean(), "jsd_median": table.jsd.median()}
    return means | {"wasserstein_hu": table.wasserstein_hu.mean(), "roughness_ratio": table.roughness_ratio.median()}


def training_curve(study: Study, path: Path, start: Path | None, out: Path) -> None:
    """Snapshots on the validation nodules; steps are counted from those of `start` on."""
    rows, before = [], steps_before(start)
    for file in sorted(path.parent.glob("*.safetensors"), key=lambda f: ckpt.load_meta(f)["step"]):
        made_by = generator(study, file, steps=SAMPLING["steps"])
        table = judging.lesions_of("", *made_for(study, made_by, "val"))
        rows.append({"steps": before + ckpt.load_meta(file)["step"]} | averages(table))
        rows[-1]["mean_error_hu"] = table.mean_error_hu.median()  # no histogram asks for lime
        print(rows[-1], flush=True)
    columns = "steps n jsd jsd_median wasserstein_hu mean_error_hu roughness_ratio".split()
    curve = pd.DataFrame(rows)[columns]
    write_text(out / "curve.csv", curve.round(5).to_csv(index=False))
    names = {
        "inpaint": "training loss (Eq. 5), mean of 100", "jsd": "JSD of HU histograms",
        "mean_error_hu": "error of the mean, HU (median)", "roughness_ratio": "roughness / real",
    }  # fmt: skip
    loss = read_history(path.parent)
    loss = loss.groupby(before + (loss.step - 1) // 100 * 100).inpaint.mean().rename_axis("steps").reset_index()
    shown = pd.concat([table.melt("steps") for table in (loss, curve)]).query("variable in @names")
    said = f"The released network on {curve.n.iloc[0]} validation nodules, left to itself; the learning rate falls to zero at the last step"
    how = {"x": "steps", "y": "value", "ylabel": "", "ylim": (0, None), "title": said}
    figures.facets(shown.replace(names), "variable", figures.lines, **how).savefig(out / "curve.png", dpi=130)


def seen_and_unseen(displaced: dict[str, Study], file: Path, out: Path) -> None:
    """`seen.csv`, how the nodules of each split come again, left to the network by their own histograms; and a picture of
    those of the test."""
    rows = []
    for split, nodules in displaced.items():
        truth, crops = made_for(nodules, generator(nodules, file, steps=SAMPLING["steps"]), split, f"{split} nodules")
        if split == "test":
            pictured(truth, crops, out / "displaced")
        table = judging.lesions_of("", truth, crops)
        e = mean_interval(table.jsd, table.patient_id, judging.N_BOOT, 0)
        interval = {"patients": table.patient_id.nunique(), "ci_low": e.ci_low, "ci_high": e.ci_high}
        rows.append({"split": split} | averages(table) | interval)
        print(rows[-1], flush=True)
    write_text(out / "seen.csv", pd.DataFrame(rows).round(5).to_csv(index=False))


def pictured(truth: Patches, crops: np.ndarray, out: Path) -> None:
    """`lesions.png`: nodules above, what was made with their histograms below."""
    panels, rows, columns = [], [], 14
    blank = figures.Panel(np.full(truth.hu.shape[1:], 1000.0))  # white in the lung window
    for subtype in SUBTYPES:
        of_it = np.flatnonzero(truth.frame.subtype == subtype)
        for k in range(0, len(of_it), columns):
            line = of_it[k : k + columns]
            for hu in (truth.hu, crops):
                shown = [figures.Panel(hu[i], truth.mask[i]) for i in line]
                panels += shown + [blank] * (columns - len(line))
            rows += [subtype, "made"]
    title = f"{len(truth)} unselected nodules in healthy lung of another patient; below each, what the network makes of its histogram"
    out.mkdir(exist_ok=True)
    figures.montage(panels, columns, title, rows).savefig(out / "lesions.png", dpi=130)


def sampling_steps(judged: dict[str, Study], file: Path, out: Path) -> None:
    """Few steps against many on the test nodules of each study, the same nodules and noise."""
    extractor, rows = default_extractor(), []
    for where, nodules in judged.items():
        truth = nodules.patches("test")
        real = three_plane_features(truth.hu, extractor)
        for matched, how in SAMPLERS.items():
            tables, features = {}, {}
            for n in STEPS:
                made_by = generator(nodules, file, **(how | {"steps": n}))
                crops = made_for(nodules, made_by, "test", f"{where}, {n} steps, {matched}")[1]
                tables[n] = judging.lesions_of(str(n), truth, crops)
                features[str(n)] = three_plane_features(crops, extractor)
            told = separability(real, features, shape_patients(truth.frame), extractor.name, 0).set_index("system")
            for n, table in tables.items():
                row = {"where": where, "histogram": matched, "steps": n} | averages(table)
                row["auroc"] = told.auroc[str(n)]
                pair = pd.concat([table, tables[LONG]])
                for metric in ("jsd", "wasserstein_hu", "roughness_ratio") if n != LONG else ():
                    e = intensity.paired_difference(pair, str(LONG), str(n), metric, 1000, 0)
                    row |= {f"{metric}_minus_{LONG}": e.value, f"{metric}_low": e.ci_low, f"{metric}_high": e.ci_high}
                rows.append(row)
                print(row, flush=True)
    write_text(out / "steps.csv", pd.DataFrame(rows).round(5).to_csv(index=False))


# -- packed --------------------------------------------------------------------------------------------------------------


def packed(study: Study, path: Path, start: Path | None, out: Path) -> Path:
    """The weights and their card, as `released` reads them."""
    unet, scale, config = load_unet(path)
    frame, profile = study.split("train"), study.profile
    training = {
        "nodules": int(frame.source_id.nunique()), "patients": int(frame.patient_id.nunique()),
        "nodules_in_place": int((frame[HOST] == "").sum()) // NATIVE, "transplants": int((frame[HOST] != "").sum()),
        "nodules_transplanted": int(frame.source_id[frame[HOST] != ""].nunique()),
        "data_hash": study.data_hash, "seed": study.seed, "steps": profile.ldm.steps, "batch": profile.ldm.batch,
        "lambda_hist": profile.histogram.weight, "plan": json.loads((path.parent / "plan.json").read_text()),
    }  # fmt: skip
    if start is not None:
        training["started_from"] = {"steps": steps_before(start)} | {"meta": ckpt.load_meta(start)["training"]}
    stored = dataclasses.replace(config, mixed_precision="no")
    meta = {
        "stage": "ldm", "scale": scale, "latent_channels": unet.latent_channels, "config": dataclasses.asdict(stored),
        "sampling": dataclasses.asdict(changed(profile.sampling, **SAMPLING)),
        "autoencoder": weights_digest(study.autoencoder), "training": training,
    }  # fmt: skip
    # the closed-form part takes small differences of large numbers, for which float16 is too coarse
    half = {k: v if k.startswith("linear.") else v.half() for k, v in unet.state_dict().items()}
    file = out / "unet.safetensors"
    ckpt.save(file, {"ema": half}, meta)
    unet.load_state_dict(half)
    last = read_history(path.parent).tail(100).mean(numeric_only=True).drop(["step", "seconds"]).round(4).to_dict()
    card = {
        "what": "latent inpainting of lung nodules, conditional on mask, subtype and HU histogram (as a vector and as a picture); 1 mm, 8 x 4^3 latents",
        "training": training | {"losses_last_100": last},
        "parameters": sum(p.numel() for p in unet.parameters()),
        "weights_sha256_16": weights_digest(unet),
        "commit": git_state()["commit"],
        "sampling": "DDIM, 4 steps; `insert` imposes the requested histogram on the voxels it writes (insertion/finish.py)",
        "judged": "the tables made with it: test patients of the same manifests, none seen in training",
    }
    write_text(file.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return file


def judge_weights(file: Path, cubes: Path, boxes: Path, host: Host, out: Path, started: float) -> None:
    """What weights are worth on the nodules that `inputs` gives."""
    native, donors = judging.open_nodules(cubes), judging.open_nodules(boxes)
    moved, real = judging.displaced(donors, "test", host)
    seen_and_unseen({"train": judging.displaced(donors, "train", host)[0], "test": moved}, file, out)
    sampling_steps({"own place": native, "displaced": moved}, file, out)
    for judged, own, folder in ((native, None, out), (moved, real, out / "displaced")):
        save_tables(judging.judge_released(judged, "test", native=own, unet=file), folder)
        wall = {"since the call": round(time.perf_counter() - started, 1)}
        how = judging.networks(judged, judging.generators(unet=file))
        write_provenance(folder, how, judged.dataset, judged.seed, judged.data_hash, wall)


def main(
    root: tyro.conf.Positional[Path],
    out: Path,
    minutes: float = 90.0,
    start: Path | None = None,
    judge: Path | None = None,
    device: Literal["cpu", "cuda"] = here(),
) -> None:
    """Train and judge.

    Args:
        out: folder to be made for the weights, their card and what they are worth.
        minutes: of training; with other minutes it is another run.
        start: shipped weights of a former run, to go on from (hrldm/weights/unet.safetensors).
        judge: weights to be judged, instead of training.
        device: must be the one there is.
    """
    if device != here():
        raise ValueError(f"--device {device}: this machine trains on {here()}")
    if start is not None and judge is not None:
        raise ValueError("--judge trains nothing: leave out --start")
    given = inputs(root)
    if judge is not None:
        released(unet=judge)  # or said now what is wrong with it
    if start is not None and released(unet=start).config.unet != get_profile("quick", **SETTINGS).unet:
        raise ValueError(f"{start}: a network of another size, of which nothing could be kept; leave out --start")
    out.mkdir(parents=True, exist_ok=True)  # found now if it cannot be written
    started = time.perf_counter()
    if judge is not None:
        return judge_weights(judge, *given, out, started)
    study = open_study("quick", "release", str(release_data(*given)), 0, **SETTINGS)
    study, path = train(study, minutes, start)
    file = packed(study, path, start, out)
    training_curve(study, path, start, out)
    judge_weights(file, *given, out, started)


if __name__ == "__main__":
    sys.exit(run(main, "python -m scripts.train_released", __doc__.splitlines()[0]))
