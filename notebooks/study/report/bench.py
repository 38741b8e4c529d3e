"""Speed and memory of what the method adds, as ratios: ``make bench``.

    histogram      Eq. 7 in O(N) against the dense N x B formula, forward and backward, N = 1e6, B = 40
    l_hist         L_hist of one lesion (crop, truncated decoder, histogram, backward) against decoding the latent of a
                   whole 512 x 512 x 133 CT, forward only, which flatters the latter
    training_step  one step of Stage II at `quick` size with lambda = 10 against lambda = 0
    latents        one step of Stage II (lambda = 0) with cached latents against encoding on the fly

and what insertion costs, see `bench_insert`.

Every variant runs in a process of its own, so that its peak memory is its own. `time_s` is the median of the repeats (of the
median of three runs, where variants are compared in turn), `peak_mb` what memory grew by, `ratio` the time over that of the benchmark's first row.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hrldm import paths
from hrldm.atomic import write_text
from hrldm.config import SIZE_BINS_MM, changed
from hrldm.model.autoencoder import FACTOR, Autoencoder
from hrldm.model.histogram import dense_histogram, soft_histogram
from hrldm.train.device import device, free_memory_mb
from hrldm.train.histogram_term import HistogramTerm
from hrldm.train.latents import LatentCache, encode_patches
from hrldm.train.ldm import Batches, train_ldm
from study.measure.timing import measure
from study.profiles import Profile, get_profile
from study.report import bench_insert
from study.report.provenance import write_provenance

COLUMNS = ["benchmark", "variant", "time_s", "peak_mb", "ratio", "device"]
VOLUME = (128, 128, 34)  # latent of 512 x 512 x 133, the last side padded to a multiple of 4
SLABS = (34, 17, 8, 4, 2)  # latent slices tried, the largest that fits is taken
WHOLE_S, WHOLE_MEMORY = 120.0, 0.8  # seconds, and share of the free memory, that the whole volume may take
BLOCK = 4  # training steps per repeat
ROUNDS = 3  # of variants that are compared
NODULES, SIZE_SHARE = 96, (0.4, 0.4, 0.2)  # of the bench's nodules in the three size bins


# -- training: four benchmarks: (variant, repeats) -> measurement, each called in a fresh process ------------------------------


def histogram(variant: str, repeats: int, n: int = 1_000_000, bins: int = 40) -> dict:
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device()).requires_grad_()
    direction = torch.linspace(0, 1, bins, device=device())
    lo, hi = (torch.full((1, 1), x, device=device()) for x in (-3.0, 3.0))

    def step() -> None:
        values.grad = None
        h = dense_histogram(values, -3.0, 3.0, bins) if variant == "dense" else soft_histogram(values[None], lo, hi, bins)[0]  # fmt: skip
        (h @ direction).backward()

    return measure(step, repeats)


def l_hist(variant: str, repeats: int) -> dict:
    profile = get_profile("quick")
    torch.manual_seed(0)
    model = Autoencoder(profile.autoencoder).to(device()).eval().requires_grad_(False)
    if variant.startswith("volume"):
        z = torch.randn(
            1, profile.autoencoder.latent_channels, *VOLUME[:2], int(variant.rsplit("_", 1)[1]), device=device()
        )
        return measure(torch.no_grad()(lambda: model.decode(z)), 0, warm_up=1)
    # latents drawn anew at each step: the target is decoded each time as well; one nodule at t = 0
    profile = changed(profile, latents__sample=True, histogram__t_max=None, ldm__batch=1)
    batches = Batches(_nodules(profile), profile, device())
    term = HistogramTerm(model, batches.groups, 1.0, profile)
    batch = batches.draw(np.random.default_rng(0))

    def step() -> None:
        term((batch["z0"] + 0.1).requires_grad_(), batch).backward()

    return measure(step, 5 * repeats)


def training_step(variant: str, repeats: int) -> dict:
    profile = get_profile("quick", histogram__weight=float(variant.removeprefix("lambda_")))
    return _train(profile, _nodules(profile), repeats)


def latents(variant: str, repeats: int) -> dict:
    profile = get_profile("quick", histogram__weight=0.0)
    if variant == "cached":
        return _train(profile, _nodules(profile), repeats)
    torch.manual_seed(0)
    model = Autoencoder(profile.autoencoder).to(device()).eval()
    size = (profile.ldm.batch, *[profile.data.patch_mm] * 3)
    hu = np.random.default_rng(1).integers(-1000, 400, size, np.int16)
    return _train(profile, _nodules(profile), repeats, lambda: encode_patches(model, hu, device(), len(hu)))


CASES = {"histogram": histogram, "l_hist": l_hist, "training_step": training_step, "latents": latents}
CASES |= bench_insert.CASES


def _nodules(profile: Profile) -> LatentCache:
    """Balls with the sizes of `lidc-mini` and random latents: what they show does not change the time they take."""
    rng = np.random.default_rng(0)
    size, low = profile.data.patch_mm, profile.data.patch_mm // FACTOR
    bins = rng.choice(len(SIZE_BINS_MM), NODULES, p=SIZE_SHARE)
    radius = [rng.uniform(*SIZE_BINS_MM[b]) / 2 for b in bins]
    distance = np.linalg.norm(np.indices((size,) * 3) - size // 2, axis=0)
    mask = np.stack([distance <= r for r in radius])[:, None]
    mean = rng.standard_normal((NODULES, 1, profile.autoencoder.latent_channels, low, low, low), np.float32)
    shape = (NODULES, profile.latents.variants)
    histogram = np.full((NODULES, profile.histogram.bins), 1 / profile.histogram.bins)
    mean, mask = (np.broadcast_to(a, (*shape, *a.shape[2:])) for a in (mean, mask))
    return LatentCache(mean, np.zeros_like(mean), mask, histogram, rng.integers(3, size=NODULES), 1.0)


def _train(
    profile: Profile, cache: LatentCache, repeats: int, before_each: Callable[[], object] = lambda: None
) -> dict:
    """Seconds of one training step: median over blocks of `BLOCK`, after a first block that is not counted."""
    torch.manual_seed(0)
    model = Autoencoder(profile.autoencoder).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        steps = train_ldm(cache, profile, 0, Path(folder) / "bench.safetensors", model, save_every=10**9)

        def block() -> None:
            for _ in range(BLOCK):
                before_each()
                next(steps)

        found = measure(block, repeats, warm_up=1)
        steps.close()
    return found | {"time_s": found["time_s"] / BLOCK}


# -- the table -------------------------------------------------------------------------------------------------------------


def apart(case: str, variant: str, repeats: int) -> dict:
    """One variant in a fresh process.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """
    call = f"bench.CASES[{case!r}]({variant!r}, {repeats})"
    code = f"import json; from study.report import bench; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT / "notebooks", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmark {case} {variant} failed ({done.returncode}): {done.stderr[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {case:14s} {variant:26s} {found['time_s']:9.4f} s {found['peak_mb']:9.1f} MB", flush=True)
    return {"benchmark": case, "variant": variant} | found


def in_turn(case: str, variants: tuple[str, ...], repeats: int) -> list[dict]:
    """The median run of each variant, all run `ROUNDS` times in turn: what else the machine does falls on all alike."""
    rounds = [[apart(case, v, repeats) for v in variants] for _ in range(ROUNDS)]
    return [sorted(runs, key=lambda run: run["time_s"])[ROUNDS // 2] for runs in zip(*rounds, strict=True)]


def largest_slab(probe: dict, probe_slices: int, free_mb: float) -> int:
    """Latent slices of the volume that, by a measured probe, fit into memory and time; time and memory grow linearly."""
    for slices in SLABS:
        scale = slices / probe_slices
        if probe["peak_mb"] * scale <= WHOLE_MEMORY * free_mb and probe["time_s"] * scale <= WHOLE_S:
            return slices
    return SLABS[-1]


def with_ratios(rows: list[dict]) -> pd.DataFrame:
    """The table of measurements; `ratio` is the time over that of the benchmark's first row."""
    table = pd.DataFrame(rows)
    first = table.groupby("benchmark", sort=False)["time_s"].transform("first")
    return table.assign(ratio=table.time_s / first)[COLUMNS]


def summary(table: pd.DataFrame) -> str:
    """One line a comparison: what the other way costs in time and memory."""
    lines = []
    for name, group in table.groupby("benchmark", sort=False):
        base, *others = group.itertuples()
        for row in others:
            times = f"{row.ratio:.2f}x the time and {row.peak_mb / max(base.peak_mb, 0.1):.2f}x the memory"
            lines.append(f"{name}: {row.variant} takes {times} of {base.variant}")
    return "\n".join(lines)


def write_table(name: str, rows: list[dict]) -> None:
    """`results/bench/<name>.csv`, its summary printed."""
    table = with_ratios(rows)
    write_text(paths.bench_dir() / f"{name}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    print(summary(table))


def main(repeats: int = 5) -> int:
    """Run all benchmarks (about twenty-five minutes on two idle cores); writes results/bench/core.csv, insert.csv and provenance.json."""
    started = time.perf_counter()
    rows = in_turn("histogram", ("sparse", "dense"), 2 * repeats)
    rows.append(apart("l_hist", "largest_lesion_crop", repeats))
    slices = largest_slab(apart("l_hist", "volume_128x128x_1", 1), 1, free_memory_mb())
    rows.append(apart("l_hist", f"volume_128x128x_{slices}", 1))
    rows[-1]["variant"] = f"volume_{4 * VOLUME[0]}x{4 * VOLUME[1]}x{4 * slices}_of_{4 * VOLUME[2]}"
    rows += in_turn("training_step", ("lambda_0", "lambda_10"), repeats)
    rows += in_turn("latents", ("cached", "on_the_fly"), repeats)
    write_table("core", rows)
    write_table("insert", [apart(*which, repeats) for which in bench_insert.affordable(free_memory_mb())])
    wall_time = {"bench": round(time.perf_counter() - started, 1)}
    write_provenance(paths.bench_dir(), get_profile("quick"), "none", 0, wall_time_s=wall_time)
    return 0
