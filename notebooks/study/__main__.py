"""Command line of the study, from `notebooks/`: ``python -m study judge ROOT``, ``realism``, ``algorithm2 CT OUT``, ``readers OUT``,
``readers-score CSV``, ``claims``, ``simulate``, ``bench``, ``plan``, ``record``."""

import functools
import os
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from hrldm import paths
from hrldm.atomic import held, write_text
from hrldm.command_line import run
from hrldm.insertion.files import described, insert_file
from hrldm.insertion.released import released
from hrldm.insertion.wish import Subtype, Wish
from hrldm.nodules.transplant import read_host
from study import judging, simulations
from study.in_file import realism_in_file
from study.readers import page, score
from study.report import bench, plan, record
from study.report import claims as report_claims
from study.report.provenance import write_provenance
from study.report.tables import drop_table, save_tables
from study.study import open_study
from study.systems.algorithm2 import insert_whole


def judge(
    root: tyro.conf.Positional[Path],
    out: Path | None = None,
    split: Literal["train", "val", "test", "all"] = "test",
    host: Path | None = None,
    host_lungs: Path | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    overwrite: bool = False,
) -> int:
    """Judge the released network on real nodules: HU histograms, control, three subtypes in order, separability.

    Args:
        root: folder with manifest.csv, one row a nodule (README, Your own data).
        out: folder for the tables and their provenance; default: print the summary only.
        split: which nodules of the manifest.
        host: CT of another patient (NIfTI, DICOM folder, zip): judge in its healthy lung, into which the nodules are set.
        host_lungs: lung mask or lobe map of the host.
        seed: of noise and of the histograms asked for.
        device: cpu or cuda; default: the GPU where there is one.
        overwrite: replace the tables of a former run.
    """
    started = time.perf_counter()
    if (host is None) != (host_lungs is None):
        raise ValueError("--host and --host-lungs go together")
    if out is not None:
        out = Path(os.path.abspath(out))
        with held(out):  # found now if it cannot be written
            if out.is_file() or (out / "tables").exists() and not overwrite:
                raise ValueError(
                    f"{out}: exists already; choose another folder or ask to overwrite it (overwrite=True)"
                )
    study, native = judging.open_nodules(root, split, seed), None
    if host is not None:
        taker = read_host(host, host_lungs, host.resolve().parent.name, (split,))
        study, native = judging.displaced(study, split, taker)
    tables = judging.judge_released(study, split, device, native)
    print(judging.summary(tables).to_markdown(index=False, disable_numparse=True))
    if out is not None:
        for name in judging.TABLES:  # none of another run may stay beside these
            drop_table(out, name)
        save_tables(tables, out)
        wall_time = {f"judge {split}": round(time.perf_counter() - started, 1)}
        write_provenance(
            out,
            judging.networks(study, judging.generators(device)),
            study.dataset,
            study.seed,
            study.data_hash,
            wall_time,
        )
    return 0


def realism(
    root: tyro.conf.Positional[Path],
    host: tyro.conf.Positional[Path],
    host_lungs: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    split: Literal["train", "val", "test", "all"] = "test",
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
) -> int:
    """Can lesions be told from real ones in the file that `insert` writes? Writes tables/realism.csv.

    Args:
        root: folder with manifest.csv, one row a nodule (README, Your own data).
        host: CT of another patient, into whose healthy lung they are put.
        host_lungs: lung mask or lobe map of the host.
        out: folder for the table and its provenance.
        split: which nodules of the manifest.
        spacing: voxel size in mm of the scan in which everything is seen.
        seed: of noise and of the histograms asked for.
        device: cpu or cuda; default: the GPU where there is one.
    """
    started = time.perf_counter()
    taker = read_host(host, host_lungs, host.resolve().parent.name, (split,))
    study, native = judging.displaced(judging.open_nodules(root, split, seed), split, taker)
    generator = released(on=device)
    made = functools.partial(generator, paste=False, progress="inserted")
    table = realism_in_file(study, split, native, taker, made, np.array(spacing))
    save_tables({"realism": table}, out)
    wall_time = {"realism": round(time.perf_counter() - started, 1)}
    write_provenance(
        out, judging.networks(study, {"inserted": generator}), study.dataset, study.seed, study.data_hash, wall_time
    )
    print(
        table[["system", "features", "model", "auroc", "ci_low", "ci_high", "minus_texture"]].to_markdown(
            index=False, floatfmt=".3f"
        )
    )
    return 0


def algorithm2(
    ct: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    subtype: Subtype = "solid",
    diameter: float = 10.0,
    seed: int = 0,
    lungs: Path | None = None,
    steps: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    overwrite: bool = False,
) -> int:
    """Put one nodule into a CT the paper's way, for comparison: Algorithm 2 over the whole scan. Slow, and every voxel changes.

    Args:
        ct: NIfTI file, DICOM folder or zip.
        out: folder to be made, as of `python -m hrldm insert`.
        subtype: of the nodule.
        diameter: mm, of the sphere of equal volume, 6 to 30.
        seed: of shape, place, histogram and noise.
        lungs: lung mask or lobe map of this CT.
        steps: of the sampler; default as trained.
        device: cpu or cuda; default: the GPU where there is one.
        overwrite: replace the folder of a former insertion.
    """
    wishes = [Wish(subtype, diameter, seed=seed)]
    changes = {} if steps is None else {"steps": steps}
    generator = released(on=device, **changes)
    record = insert_file(ct, out, wishes, generator, lungs, overwrite=overwrite, algorithm=insert_whole)
    print(described(wishes, record))
    return 0


def readers(
    out: tyro.conf.Positional[Path],
    system: str = "hr-ldm",
    profile: str = "quick",
    dataset: str = "lidc-mini",
    data_root: str = "",
    settings: str = "",
    n: int = 50,
    seed: int = 0,
) -> int:
    """Write a page on which readers tell real from synthetic nodules (Table 2), and its key.

    Args:
        out: new folder for readers.html and key.csv; give readers the page alone.
        system: what makes the synthetic nodules, as named in Table 1.
        profile: as of `make reproduce`, like the next three.
        dataset: lidc-mini or the name of a manifest folder.
        data_root: that folder.
        settings: what SET changes.
        n: nodules of each kind.
        seed: of the study, the choice and the order.
    """
    study = open_study(profile, dataset, data_root, seed, settings)
    print(page.make(*page.study_nodules(study, system), out, n, seed, system))
    return 0


def readers_score(files: tyro.conf.Positional[tuple[Path, ...]], key: Path, out: Path | None = None) -> int:
    """Score the CSVs that readers send back.

    Args:
        files: one CSV a reader.
        key: key.csv of their page.
        out: folder for the tables; default: print them only.
    """
    print(score.summary(score.score(list(files), key, out)))
    return 0


def claims(check: bool = False) -> int:
    """Judge the paper's claims by the committed tables of all runs; writes results/claims.csv.

    Args:
        check: write nothing; return 1 if the file is not what the tables give.
    """
    results = paths.ROOT / "results"
    table = report_claims.claims_table(report_claims.gather(results))
    print(report_claims.sentences(table, "results"))
    print(f"\n{table['verdict'].value_counts().to_markdown()}")
    text, file = table.to_csv(index=False, float_format="%.4g", lineterminator="\n"), results / "claims.csv"
    if check:
        return int(not file.is_file() or file.read_text(encoding="utf-8") != text)
    write_text(file, text)
    return 0


def simulate() -> int:
    """Coverage of the intervals, errors of the tests, power of the verdicts; writes results/simulations/."""
    for name, table in simulations.all_tables().items():
        print(f"# {name}\n\n{table.to_markdown(index=False, floatfmt='.3f')}\n")
        text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        write_text(paths.ROOT / "results" / "simulations" / f"{name}.csv", text)
    return 0


def main() -> int:
    commands = {
        "judge": judge,
        "realism": realism,
        "algorithm2": algorithm2,
        "readers": readers,
        "readers-score": readers_score,
        "claims": claims,
        "simulate": simulate,
        "bench": bench.main,
        "plan": plan.main,
        "record": record.main,
    }
    return run(commands, "python -m study")


if __name__ == "__main__":
    sys.exit(main())
