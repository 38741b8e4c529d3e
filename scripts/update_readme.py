"""Write the tables of results/README.md, and the findings of README.md, from committed results:
``python -m scripts.update_readme [--check]``.

Between ``<!-- NAME -->`` and ``<!-- /NAME -->`` stands what `BLOCKS` makes of the results of one dataset at `quick` (and of
`results/bench/`); no number in these blocks is typed. ``--check`` writes nothing and ends with status 1 when a
block differs from the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import scripts._study  # noqa: F401
from hrldm import paths
from hrldm.atomic import write_text
from hrldm.config import SUBTYPES
from scripts.readme_downstream import malignancy, scarcity, subtype, turing
from scripts.readme_parts import interval, markdown, read_table
from study.classify.jobs import CLINICAL, FULL
from study.experiments import difference_sentence
from study.judging import summary
from study.measure.statistics import Estimate, holm
from study.report.provenance import read_provenance
from study.report.published import load_published

RESULTS = paths.ROOT / "results"
FRONT, RECORD = paths.ROOT / "README.md", RESULTS / "README.md"
ARTEFACTS = {  # notebook: (what it makes, file below results/<dataset>/<profile>/)
    "00_start_here": ("the paper in a page, one nodule through the pipeline", ""),
    "01_data": ("the data, its split and its limits", ""),
    "02_autoencoder": ("reconstruction by tissue", "tables/autoencoder.csv"),
    "03_hrldm": ("the histogram term at work, loss curves", "tables/losses_by_time.csv"),
    "04_synthesis": ("Fig. 4, subtype × size", "figures/fig4_synthesis.png"),
    "05_fidelity": ("Table 1; HU histograms of lesions; control", "tables/table1_fidelity.csv"),
    "06_turing": ("Table 2, Fig. 5, by a model observer", "tables/table2_turing.csv"),
    "07_subtype": ("Table 3, Fig. 6", "tables/table3_subtype.csv"),
    "08_scarcity": ("Fig. 7", "tables/fig7_scarcity.csv"),
    "09_malignancy": ("Fig. 8", "tables/fig8_malignancy.csv"),
    "10_ablations": ("ablations", "tables/ablations.csv"),
    "11_claims": ("each claim, the evidence, the verdict", "tables/claims.csv"),
}
NAMES = {
    "real": "real, floor",
    "autoencoder": "autoencoder, floor",
    "texture": "texture, no training",
    "transplant": "real lesion, pasted",
    "hr-ldm-template": "hr-ldm, template (ours)",
    "hr-ldm-matched": "hr-ldm, histogram imposed (ours)",
    "released": "hr-ldm, histogram imposed, grain (ours)",
}
INSERTED = {  # benchmark of results/bench/insert.csv: what it is, and the unit of its variants
    "algorithm_2": ("one lesion, placed mask to voxels", ""),
    "insert_file": ("`python -m hrldm insert`, the whole process", " voxels"),
    "volume": ("one nodule, by size of the CT", " voxels"),
    "count": ("nodules in one call", ""),
}
LESION_UNITS = {"jsd": ("JSD", ""), "wasserstein_hu": ("Wasserstein distance", "HU")}
UNITS = {"fid": ("FID", 1.0), "kid": ("KID × 10³", 1e3), "mmd": ("MMD × 10²", 1e2)}


def artefacts(results: Path) -> str:
    """Artefact, notebook, command, minutes and peak memory of each notebook."""
    record = read_provenance(results)
    minutes, memory = record["wall_time_s"], record.get("peak_memory_mb", {})
    rows = []
    for name, (what, file) in ARTEFACTS.items():
        link = f"[`{Path(file).name}`]({results.parent.name}/{results.name}/{file})" if file else ""
        gigabytes = f"{memory[name] / 1024:.1f} GB" if name in memory else ""
        rows.append((what, f"`{name}`", link, f"`make {name}`", f"{minutes[name] / 60:.1f}", gigabytes))
    rows.append(("all", "", "", "`make reproduce`", f"{sum(minutes.values()) / 60:.0f}", ""))
    return markdown(rows, ["artefact", "notebook", "file", "command", "minutes", "memory"])


def fidelity(results: Path) -> str:
    """Table 1, average over planes: ours with its interval beside the paper's value."""
    ours, theirs = (
        t[t.plane == "average"] for t in (read_table(results, "table1_fidelity"), load_published("table1_fidelity"))
    )
    rows = []
    for system in ours.system.unique():
        row = [NAMES.get(system, system)]
        for metric, (_, unit) in UNITS.items():
            r = ours[(ours.system == system) & (ours.metric == metric)].iloc[0]
            row.append(interval(r.value * unit, r.ci_low * unit, r.ci_high * unit))
        for metric, (_, unit) in UNITS.items():
            found = theirs[(theirs.system == system) & (theirs.metric == metric)]
            row.append(f"{found.value.iloc[0] * unit:.3g}" if len(found) else "")
        rows.append(row)
    extractor, n = ours.extractor.iloc[0], ours.groupby("metric").n_synthetic.max()
    own = [f"{title}, {extractor}, n = {n[metric]}" for metric, (title, _) in UNITS.items()]
    head = ["system", *own, *(f"paper: {title}" for title, _ in UNITS.values())]
    return markdown(rows, head)


def lesions(results: Path) -> str:
    """HU histograms inside the lesion, and control, per system."""
    table, control = read_table(results, "lesion_histograms"), read_table(results, "control_summary")
    table = table[table.subtype == "all"]
    control = control[(control.subtype == "all") & (control.quantity == "mean_hu")].set_index("system")
    rows = []
    for system in table.system.unique():
        row = [NAMES.get(system, system)]
        for metric, digits in (("jsd", 3), ("wasserstein_hu", 0)):
            r = table[(table.system == system) & (table.metric == metric)].iloc[0]
            row.append(interval(r.value, r.ci_low, r.ci_high, f".{digits}f"))
        known = system in control.index
        row += [f"{control.slope[system]:.2f}", f"{control.r2[system]:.3f}"] if known else ["", ""]
        rows.append(row)
    head = [f"JSD, n = {table.n.max()}", "Wasserstein distance, HU", f"slope, n = {control.n.max()}", "R²"]
    return markdown(rows, ["system", *head])


def regularisation(results: Path) -> str:
    """HR-LDM against the same network trained with lambda 0, paired over nodules."""
    inside, features = read_table(results, "lesion_differences"), read_table(results, "table1_differences")
    features = features[(features.plane == "average") & (features.a == "maisi-ddpm")]
    n = read_table(results, "table1_fidelity").groupby("metric").n_synthetic.max()
    rows = [(LESION_UNITS[r.metric], r) for r in inside.itertuples() if r.metric in LESION_UNITS]
    rows += [((r.metric.upper(), ""), r) for r in features.itertuples()]
    return "\n".join(
        "- "
        + difference_sentence(
            name, r.b, r.a, Estimate(r.difference, r.ci_low, r.ci_high, int(n.get(r.metric, inside.n.max())), r.p), unit
        )
        for (name, unit), r in rows
    )


def claims(results: Path) -> str:
    """How many claims got which verdict."""
    counts = read_table(results, "claims").verdict.value_counts()
    return markdown([(verdict, str(count)) for verdict, count in counts.items()], ["verdict", "claims"])


COMPARED = {  # benchmark: what is compared
    "histogram": "differentiable histogram, 10⁶ values, 40 bins, forward and backward: dense N × B formula against ours",
    "l_hist": "ℒ_hist: decoding the latent of a whole CT (512 × 512 × 136) against the largest lesion's crop",
    "training_step": "one training step at `quick`: λ = 10 against λ = 0",
    "latents": "one training step: encoding on the fly against cached latents",
}


def benchmarks(results: Path) -> str:
    """What `make bench` measured: the slower variant against ours, time and memory."""
    table = pd.read_csv(results.parents[1] / "bench" / "core.csv")
    rows = []
    for name, what in COMPARED.items():
        ours, other = (table[table.benchmark == name].iloc[k] for k in (0, 1))
        times = f"{other.time_s:.3g} s against {ours.time_s:.3g} s"
        ratios = (f"{r:.0f} ×" if r >= 10 else f"{r:.2f} ×" for r in (other.ratio, other.peak_mb / ours.peak_mb))
        rows.append((what, times, *ratios))
    return markdown(rows, ["compared", f"time, {table.device.iloc[0]}", "time ratio", "memory ratio"])


def inserting(results: Path) -> str:
    """What `make bench` measured of insertion."""
    table = pd.read_csv(results.parents[1] / "bench" / "insert.csv", dtype={"variant": str})
    rows = []
    for r in table.itertuples():
        what, unit = INSERTED[r.benchmark]
        rows.append((f"{what}: {r.variant.replace('_', ' ')}{unit}", f"{r.time_s:.3g} s", f"{r.peak_mb / 1024:.2g} GB"))
    both = table[table.benchmark == "algorithm_2"]
    if len(both) == 2:  # the whole body needs a machine with the memory for it
        ratios = (f"{both.ratio.iloc[1]:.0f} ×", f"{both.peak_mb.iloc[1] / both.peak_mb.iloc[0]:.0f} ×")
        rows.insert(2, ("Algorithm 2 over the whole body against the crop", *ratios))
    return markdown(rows, ["", f"time, {table.device.iloc[0]}", "memory"])


def insertions(results: Path) -> str:
    """Many unselected insertions into each CT, measured."""
    rows = []
    for file in sorted((results.parents[1] / "insert").glob("*/summary.csv")):
        table = pd.read_csv(file)
        for r in table.itertuples():
            name = f"[{file.parent.name}](insert/{file.parent.name}/contact_sheet.png)" if r.subtype == "all" else ""
            fit = f"{r.slope:.2f}, {r.r2:.3f}"
            rows.append((name, r.subtype, r.n, r.failures, f"{r.least_share_in_lung:.0%}", fit, f"{r.median_jsd:.3f}", f"{r.seconds_each:.1f}"))  # fmt: skip
    head = [
        "CT",
        "subtype",
        "n",
        "failed",
        "least share of a lesion in the lung",
        "mean HU: slope, R²",
        "median JSD",
        "seconds each",
    ]
    return markdown(rows, head)


def control(results: Path) -> str:
    """Requested against obtained mean HU by subtype, and the share of triplets that come in order."""
    table = read_table(results, "control_summary")
    table = table[table.quantity == "mean_hu"].set_index(["system", "subtype"])
    order = read_table(results, "triplets_summary")
    order = order[order.side == "obtained"].set_index("system")
    subtypes = [s for s in (*SUBTYPES, "all") if s in table.index.get_level_values("subtype")]
    rows = []
    for system in table.index.get_level_values("system").unique():
        row = [NAMES.get(system, system)]
        row += [f"{table.slope[system, s]:.2f}, {table.r2[system, s]:.3f}" for s in subtypes]
        share = order.loc[system] if system in order.index else None
        row.append("" if share is None else f"{share.value:.0%} ({share.ci_low:.0%} to {share.ci_high:.0%})")
        rows.append(row)
    counts = table.loc[table.index.get_level_values("system")[0]].n
    head = [f"{s}: slope, R², n = {counts[s]}" for s in subtypes]
    return markdown(rows, ["system", *head, f"three subtypes in order, n = {order.n.max()}"])


def separability(results: Path) -> str:
    """AUROC of a straight line between each system's nodules and the real ones."""
    table = read_table(results, "separability")
    rows = [(NAMES.get(r.system, r.system), f"{r.auroc:.2f}") for r in table.itertuples()]
    return markdown(rows, ["system", f"AUROC, {table.extractor.iloc[0]}, n = {table.n.max()}"])


def two_by_two(results: Path) -> str:
    """c_hist and L_hist on and off: each level, and its paired difference to both on."""
    table = read_table(results, "ablations")
    table = table[table.factor == "c_hist x L_hist"].set_index(["level", "metric"])
    rows = []
    for level in table.index.get_level_values("level").unique():
        row = [level]
        for metric, digits in (("jsd", 3), ("wasserstein_hu", 0), ("sd_ratio", 2)):
            r = table.loc[level, metric]
            row.append(interval(r.value, r.ci_low, r.ci_high, f".{digits}f"))
        paired = "jsd_difference"
        if (level, paired) in table.index:
            r = table.loc[level, paired]
            row.append(interval(r.value, r.ci_low, r.ci_high, "+.4f"))
        else:
            row.append("")
        rows.append(row)
    head = ["JSD", "Wasserstein distance, HU", "SD / true SD", "JSD minus both"]
    return markdown(rows, [f"level, {int(table.n_seeds.max())} seeds", *head])


def verdict(results: Path) -> str:
    """Whether the histogram term helps beyond c_hist, in two sentences: the histogram that comes, and the spread."""
    table = read_table(results, "ablations")
    table = table[table.factor == "c_hist x L_hist"].set_index(["level", "metric"])
    both, without = "both (default)", "c_hist only"
    d, s = (_turned(table.loc[without, f"{m}_difference"]) for m in ("jsd", "sd_ratio"))  # both minus c_hist only
    s *= 100
    sure = "improves" if d.value < 0 else "worsens"
    word = "does not change" if d.ci_low <= 0 <= d.ci_high else sure
    jsd, sd = (table.loc[(slice(None), m), "value"].droplevel("metric") for m in ("jsd", "sd_ratio"))
    n = read_table(results, "lesion_differences").n.max()
    closer = "nearer to" if abs(sd[both] - 1) < abs(sd[without] - 1) else "farther from"
    moved = "which no interval can tell from none" if s.ci_low <= 0 <= s.ci_high else f"{closer} the real spread"
    return (
        f"**Beyond c_hist, ℒ_hist {word} the HU histogram of the lesion that comes: JSD {jsd[both]:.3f} with it and "
        f"{jsd[without]:.3f} without (difference {d.value:+.4f}, 95 % interval {d.ci_low:+.4f} to {d.ci_high:+.4f}, n = {n}, "
        f"{int(table.n_seeds.max())} seeds). The standard deviation within the lesion is {100 * sd[both]:.1f} % of the real one "
        f"with it and {100 * sd[without]:.1f} % without (difference {s.value:+.1f} points, {s.ci_low:+.1f} to {s.ci_high:+.1f}), "
        f"{moved}.**"
    )


def released(results: Path) -> str:
    """The released network on test nodules, in one table."""
    names = "lesion_histograms median_jsd control_summary triplets_summary separability".split()
    table = summary({name: read_table(results, name) for name in names})
    return markdown(table.replace({"system": NAMES}).to_numpy().tolist(), list(table.columns))


def grain(results: Path) -> str:
    """Power in the middle of the largest lesions, over that of the real ones."""
    table = read_table(results, "power_spectrum").pivot(index="system", columns="cycles_per_mm", values="power_hu2")
    share = table.div(table.loc["real"]).drop(index="real")
    rows = [
        (NAMES.get(system, system), *(f"{x:.2f}" for x in row))
        for system, row in zip(share.index, share.to_numpy(), strict=True)
    ]
    return markdown(rows, ["power, real = 1", *(f"{f:.2f} / mm" for f in share.columns)])


def told(results: Path) -> str:
    """AUROC of hand-made features, synthetic against real, with their interval."""
    table = read_table(results, "realism")
    sets = {"inside": "inside", "inside_isotropic": "inside, without anisotropy", "edge": "edge"}
    columns = [(f, m) for f in sets for m in table.model.unique()]
    wide = table.set_index(["system", "features", "model"])
    rows = [
        (
            NAMES.get(s, s),
            *(interval(wide.auroc[k], wide.ci_low[k], wide.ci_high[k], ".2f") for k in ((s, *c) for c in columns)),
        )
        for s in table.system.unique()
    ]
    n, patients = table.n_nodules.max(), table.n_patients.max()
    head = [f"n = {n}, {patients} patients", *(f"{sets[f]}: {m}" for f, m in columns)]
    lines = [
        f"- {NAMES.get(s, s)} minus texture, AUROC: "
        + "; ".join(
            f"{sets[f]}, {m} {r.minus_texture:+.2f} ({r.minus_low:+.2f} to {r.minus_high:+.2f})"
            for f, m in columns if f != "edge" for r in [wide.loc[(s, f, m)]]
        )
        for s in ("hr-ldm", "released") if s in wide.index
    ]  # fmt: skip
    return "\n".join([markdown(rows, head), "", *lines])


def steps(results: Path) -> str:
    """The sampler with few steps against 25, on the same nodules and noise."""
    rows = []
    for r in pd.read_csv(results / "steps.csv").itertuples():
        gap = "" if pd.isna(r.jsd_minus_25) else f"{r.jsd_minus_25:+.4f} ({r.jsd_low:+.4f} to {r.jsd_high:+.4f})"
        numbers = (
            f"{r.jsd:.3f}",
            f"{r.jsd_median:.3f}",
            f"{r.wasserstein_hu:.0f}",
            f"{r.roughness_ratio:.2f}",
            f"{r.auroc:.2f}",
        )
        rows.append((f"{r.where}, n = {r.n}", r.histogram, str(r.steps), *numbers, gap))
    head = [
        "nodules",
        "histogram",
        "steps",
        "JSD",
        "median",
        "Wasserstein distance, HU",
        "roughness / real",
        "AUROC of a linear classifier, own histograms",
        "JSD minus that of 25",
    ]
    return markdown(rows, head)


def curve(results: Path) -> str:
    """Validation nodules by training steps."""
    table = pd.read_csv(results / "curve.csv")
    rows = [
        (f"{r.steps:,}", f"{r.jsd:.3f}", f"{r.jsd_median:.3f}", f"{r.mean_error_hu:.0f}", f"{r.roughness_ratio:.2f}")
        for r in table.itertuples()
    ]
    return markdown(
        rows, ["steps", f"JSD, n = {table.n.max()}", "median", "error of the mean, HU (median)", "roughness / real"]
    )


def lambdas(results: Path) -> str:
    """The released network trained on with and without L_hist: both levels, and their paired difference in words."""
    table = (
        pd.read_csv(results / "lambda" / "lambda.csv")
        .groupby(["where", "template", "lambda"], sort=False)
        .mean(numeric_only=True)
    )
    rows = [
        (f"{where}, n = {r.n:.0f}", "with" if template else "without", f"{weight:g}", f"{r.jsd:.3f}", f"{r.wasserstein_hu:.0f}", f"{r.sd_ratio:.2f}", f"{r.roughness_ratio:.2f}")
        for (where, template, weight), r in table.iterrows()
    ]  # fmt: skip
    head = ["nodules", "template", "λ", "JSD", "Wasserstein distance, HU", "SD / true SD", "roughness / real"]
    differences = pd.read_csv(results / "lambda" / "lambda_differences.csv")
    sentences = [
        difference_sentence(
            f"{LESION_UNITS[r.metric][0]}, {r.where}, {'with' if r.template else 'without'} template", "λ = 10", "λ = 0",
            Estimate(r.difference, r.ci_low, r.ci_high, r.n, r.p), LESION_UNITS[r.metric][1],
        )
        for r in differences[differences.metric.isin(LESION_UNITS)].itertuples()
    ]  # fmt: skip
    return markdown(rows, head) + "\n\n" + "\n".join(f"- {s}" for s in sentences)


def autoencoder(results: Path) -> str:
    """The shipped autoencoder on test patients beside a linear code of equal size, from its card."""
    card = json.loads((paths.WEIGHTS / "autoencoder.json").read_text(encoding="utf-8"))
    table = pd.DataFrame(card["results"]).set_index(["region", "metric"])
    rows = []
    for region, metric, what, digits in (
        ("crop", "psnr_db", "PSNR, whole crop (dB, window ±1000 HU)", ".1f"),
        ("lesion", "mae_hu", "mean absolute error in the lesion (HU)", ".0f"),
        ("lesion", "hist_jsd", "JSD of the lesion's HU histogram", ".3f"),
    ):
        found = (table.loc[(f"{region}{code}", metric)] for code in ("", " (linear code)"))
        rows.append((what, *(interval(r.value, r.ci_low, r.ci_high, digits) for r in found)))
    return markdown(rows, [f"n = {table.n.max():.0f}", "autoencoder", "linear code of equal size"])


def findings(results: Path) -> str:
    """Does the paper hold? A line a question, from the tables of all datasets."""
    fit = read_table(results / RELEASED, "control_summary").query("system == 'hr-ldm' and quantity == 'mean_hu'")
    fit = fit.set_index("subtype")
    r2 = ", ".join(f"{fit.r2[s]:.2f} ({s})" for s in SUBTYPES)
    jsd = read_table(results / RELEASED, "lesion_histograms").query("subtype == 'all' and metric == 'jsd'")
    jsd = jsd.set_index("system")
    ours, floor = jsd.loc["hr-ldm"], jsd.value["real"]
    order = read_table(results / CUBES, "table1_differences").query("plane == 'average' and a == 'maisi-ddpm'")
    order = order.set_index("metric").loc["fid"]
    published = (
        load_published("table1_fidelity").query("plane == 'average' and metric == 'fid'").set_index("system").value
    )
    theirs = published["hr-ldm"] - published["maisi-ddpm"]
    told = read_table(results / RELEASED / "displaced", "realism").query("features == 'inside_isotropic'")
    told = told[told.model == "logistic"].set_index("system")
    few = read_table(results / VOIS, "fig7_scarcity").query("metric == 'auroc' and retention == 0.1")
    few = few.set_index(["subtype", "arm"])["mean"]
    gains = ", ".join(f"{s} {few[s, CLINICAL]:.2f} to {few[s, FULL]:.2f}" for s in SUBTYPES)
    cells = read_table(results / VOIS, "table3_subtype").query("metric == 'auroc' and p_bootstrap == p_bootstrap")
    better = int((holm(cells.p_bootstrap.to_numpy()) < 0.05).sum())
    lines = [
        f"**A nodule can be ordered by its histogram.** Obtained against requested mean HU: R² {r2}; JSD "
        f"{interval(ours.value, ours.ci_low, ours.ci_high)} where two halves of one real lesion have {floor:.3f} "
        f"(released network left to itself, {ours.n:.0f} nodules of unseen patients).",
        f"**ℒ_hist, the paper's own term, {_sum_up(results)}",
        f"**The order of Table 1 {'is seen' if order.ci_high < 0 else 'is not seen'}.** FID of HR-LDM minus MAISI-DDPM: "
        f"{order.difference:+.1f} ({order.ci_low:+.1f} to {order.ci_high:+.1f}; paper {theirs:+.1f}), `lidc-cubes`.",
        f"**Synthetic nodules can be told from real ones.** AUROC of a logistic regression on features of the inside "
        f"{interval(*told.loc['released', ['auroc', 'ci_low', 'ci_high']], '.2f')} as `insert` makes them, {told.auroc['hr-ldm']:.2f} left to "
        f"itself, {told.auroc['texture']:.2f} for a texture that was never trained ({told.n_nodules.max()} nodules, {told.n_patients.max()} patients).",
        f"**Classifiers gain where clinical data are scarce, if at all.** With 10 % of them and all synthetic nodules (of a generator that was trained on all clinical ones) AUROC goes from "
        f"{gains} (one run, wide intervals); with all of them {better} of {len(cells)} cells of Table 3 change by Holm's test (`lidc-vois`).",
    ]  # fmt: skip
    return "\n".join(f"{k}. {line}" for k, line in enumerate(lines, start=1))


def _sum_up(results: Path) -> str:
    """What L_hist does beyond c_hist: on the released network in healthy lung, and from scratch on `lidc-cubes`."""
    folder, where = results / RELEASED / "lambda", "where == 'displaced' and template"
    found = pd.read_csv(folder / "lambda_differences.csv").query(where).set_index("metric")
    level = pd.read_csv(folder / "lambda.csv").query(f"{where} and `lambda` == 0").mean(numeric_only=True)
    jsd, hu = found.loc["jsd"], found.loc["wasserstein_hu"]
    table = read_table(results / CUBES, "ablations").query("factor == 'c_hist x L_hist'").set_index(["level", "metric"])
    other = _turned(table.loc[("c_hist only", "jsd_difference")])
    if max(jsd.ci_low, hu.ci_low) > 0:
        word = "harms"
    elif min(jsd.ci_high, hu.ci_high) < 0:
        word = "helps" if hu.difference < -0.05 * level.wasserstein_hu else "helps by next to nothing"
    else:
        word = "adds nothing that could be seen"
    return (
        f"{word}** where the network is given the histogram anyway. With it minus without: JSD {jsd.difference:+.4f} ({jsd.ci_low:+.4f} to "
        f"{jsd.ci_high:+.4f}) of {level.jsd:.3f}, Wasserstein distance {hu.difference:+.1f} HU ({hu.ci_low:+.1f} to {hu.ci_high:+.1f}) of "
        f"{level.wasserstein_hu:.0f} (released network trained on, {jsd.n:.0f} nodules in healthy lung, {jsd.seeds:.0f} seeds); JSD "
        f"{other.value:+.4f} ({other.ci_low:+.4f} to {other.ci_high:+.4f}) for small networks on `lidc-cubes`, {int(table.n_seeds.max())} seeds."
    )


MINI, CUBES, VOIS = "lidc-mini/quick", "lidc-cubes/quick", "lidc-vois/quick"  # folders of results
RELEASED = "released"
BLOCKS: dict[str, tuple[Callable[[Path], str], str]] = {
    **{
        f.__name__: (f, MINI)
        for f in (
            artefacts,
            benchmarks,
            insertions,
            inserting,
            fidelity,
            lesions,
            separability,
            regularisation,
            claims,
            turing,
            subtype,
            scarcity,
            malignancy,
        )
    },
    **{
        f"cubes_{f.__name__}": (f, CUBES)
        for f in (fidelity, lesions, regularisation, two_by_two, control, separability, verdict, claims)
    },
    **{f"vois_{f.__name__}": (f, VOIS) for f in (scarcity, subtype, malignancy)},
    **{f.__name__: (f, RELEASED) for f in (released, curve, grain, steps, lambdas)},
    "told": (told, f"{RELEASED}/displaced"),
    "autoencoder": (autoencoder, ""),
}
FRONT_BLOCKS = {"findings": (findings, "")}


def updated(text: str, results: Path, blocks: dict[str, tuple[Callable[[Path], str], str]]) -> str:
    """The text with every block made anew from `results`, the folder of all results.

    Raises:
        ValueError: a block's markers are absent.
    """
    for name, (make, folder) in blocks.items():
        found = re.search(rf"<!-- {name} -->\n.*?<!-- /{name} -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"no block between <!-- {name} --> and <!-- /{name} -->")
        before, after = found.span()
        text = f"{text[:before]}<!-- {name} -->\n{make(results / folder)}\n<!-- /{name} -->{text[after:]}"
    return text


def _turned(row: pd.Series) -> pd.Series:
    """The interval of b - a from that of a - b."""
    return pd.Series({"value": -row.value, "ci_low": -row.ci_high, "ci_high": -row.ci_low})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when a block is out of date")
    check = parser.parse_args().check
    stale = False
    for file, blocks in ((FRONT, FRONT_BLOCKS), (RECORD, BLOCKS)):
        before = file.read_text(encoding="utf-8")
        after = updated(before, RESULTS, blocks)
        stale |= before != after
        if before != after and not check:
            write_text(file, after)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
