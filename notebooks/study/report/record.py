"""results/README.md, written whole from `PAGE` and from the views of the committed tables: ``python -m study record``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from hrldm import paths
from hrldm.atomic import write_text
from study.report.tables import page, view

RESULTS = paths.ROOT / "results"
# sections: a heading, what its tables can tell, and which: {{folder: names}}, CSVs unless they have another ending
PAGE = """# The record

Every table that a committed run produced, with 95 % intervals by patient bootstrap. From `notebooks/`, `python -m study record`
writes this page from the CSVs of this folder; each table's name leads to the file, which may hold more than is shown. Below
`<dataset>/<profile>/` stand `tables/` (each CSV with a Markdown view beside it), `figures/`, `runs/` (the executed notebooks) and
`provenance.json` (commit, profile, seed, versions, wall time, memory). The short answer is in the
[README](../README.md#does-the-paper-hold).

| | nodules | what it can tell |
|---|---|---|
| [The released network](#the-released-network) | real, LIDC, test patients | how well a nodule can be controlled, and whether it can be told from a real one |
| [`lidc-cubes`](#results-of-lidc-cubes-at-quick-real-nodules) | real, LIDC | the paper's comparison on real nodules |
| [`lidc-vois`](#what-synthetic-nodules-add-for-classifiers-on-real-nodules) | real, LIDC, boxes | what synthetic nodules add for classifiers |
| [`lidc-mini`](#results-of-lidc-mini-at-quick-beside-the-papers) | semi-synthetic, embedded | that method and measurements work; nothing about patients |
| [The paper's own numbers](#the-papers-own-numbers) | NLST, internal, DLCS | what the paper prints, in the same columns |
| [The shipped autoencoder](#the-shipped-autoencoder) · [Insertion](#insertion) · [What is made where](#what-is-made-where) · [Benchmarks](#benchmarks) | | what the tool does and costs |

## The released network

`insert` uses a network of its own ([card](../hrldm/weights/README.md)), trained on real nodules without ℒ_hist: in their own place, and
**transplanted** into healthy lung, so that the background tells nothing of what is to come. Here 71 nodules of 48 test patients (56 solid,
10 part-solid, 5 ground-glass) stand in healthy lung of **one** CT, R01-001. The split has it for training: 15 % of the autoencoder's patches
are its lung, none of the U-Net's. Floors: the autoencoder; two halves of one lesion, which have half the voxels and so more chance
between them. Slope and R² are of obtained on requested mean HU; then the share of places where the three subtypes, asked in turn, come in
order; then how well a linear classifier tells synthetic nodules from real ones. The Wasserstein distance is not clipped: what
even an exact histogram leaves lies above the 400 HU where it ends.

{{released/displaced/tables: lesion_histograms median_jsd control_summary triplets_summary separability}}

**In their own place**: 26 test nodules (14 solid, 8 part-solid, 4 ground-glass). Here the background is the scan that still holds
the nodule, whose rim beyond the mask tells of it. Inside, the texture never trained is told least (0.57 logistic, 0.68 forest; as inserted
0.67, 0.73; left to itself 0.93, 0.90).

{{released/tables: lesion_histograms control_summary realism}}

**Targets set beforehand and missed**, left to itself: JSD at most 0.045 and 0.040 (0.060 here, 0.058 in healthy lung; medians 0.050); AUROC
inside, without anisotropy, at most 0.80 (0.864 logistic, 0.845 forest, in healthy lung), with the histogram imposed at most 0.70 (0.788, 0.740),
and below the texture's; and the [power spectrum](#is-the-texture-right).

### Can they be told from real ones?

Logistic regression and random forest on some fifty hand-made features: the 71 nodules, asked for other histograms, against real ones in
their own scans, patients kept apart; 0.5 is chance. Inside, a pasted real lesion is the real one itself. One host: nothing here
says how this varies between scans.

**In the crop**, as the notebooks compare systems: left to itself, with the histogram imposed while sampling, and as inserted (ours), the 1 mm
crop in the place of the scan. Left to itself the network is told **more** easily than a texture that was never trained: without
anisotropy, and at the edge, by both classifiers.

{{released/displaced/tables: realism}}

**In the file**, as `insert` writes them (ours): with the scan's own sharpness and noise, the histogram imposed on the written voxels
(`python -m study realism`, from `notebooks/`). Everything, the real nodules too, is seen through one grid: 1 mm, slices of 3 mm, 0.7 mm. `texture`
is pasted at 1 mm; `texture, as inserted` stands in the network's place. Inside, the logistic regression tells the inserted lesion less easily
than the texture at every grid, the forest at 0.7 mm, and at 3 mm without anisotropy; the finish alone does not do it. The edge is told everywhere,
of pasted real lesions too. Two reservations. The lesions were asked for the histograms of *other test nodules*, some of them brighter than
`insert` draws by itself; `study realism` now asks as `insert` does, and these tables are from before. And the share of noise and the blur
that a lesion has already (`OWN_NOISE`, `OWN_BLUR_MM`) were looked at on these 71 nodules.

{{released/in_file/1x1x1/tables: realism}}
{{released/in_file/0.7x0.7x3/tables: realism}}
{{released/in_file/0.7x0.7x0.7/tables: realism}}

Forty unselected ones of each subtype in healthy places, looked at one by one before insertion made them part of their scan (ground-glass: five nodules, each asked for eight
histograms). Left to itself: 3 solid ones with a darker middle, no mottled one, no part-solid or ground-glass one that failed. As shipped, where
the darkest HU asked for must lie somewhere: 2 solid ones with a ring or mottle, 3 times the same part-solid one with a dark spot at its
edge, 4 ground-glass ones with dark holes.

### Is the texture right?

Power in the middle of the largest third of the lesions, median and without interval, to be held against the first row: 23 of the 71 in
healthy lung, then 8 of the 26 in their own place. No: the autoencoder takes the finest texture away; the scan's noise gives it back, but in
between there is too much, as inserted 1.4 and 2.1 times the real power at 0.25 cycles per mm.

{{released/displaced/tables: power_spectrum}}
{{released/tables: power_spectrum}}

### Does ℒ_hist pay?

The weights released before these, with the decoder of then, trained on for 250 steps of 8 with λ = 10 and with λ = 0, three seeds each, all
else equal (`python -m scripts.compare_lambda DATA_ROOT --out FOLDER --steps 250`), left to itself, with the picture (`template`) and without. A
short fine-tuning: what ℒ_hist does over a whole training it cannot tell. Differences are
λ = 10 minus λ = 0, mean over seeds; for JSD and Wasserstein distance, below zero favours ℒ_hist. [Levels](released/lambda/lambda.csv).

{{released/lambda: lambda_differences}}

### How many steps of the sampler?

Asked of the weights released before these, on the same nodules and noise; paired differences to 25 steps. AUROC: a linear classifier,
nodules asked for their own histograms. Four steps were chosen by this table, that is on the test nodules themselves.

{{released: steps}}

### What does more training bring?

First the first 15,500 steps of 8 on two CPU cores, validation nodules, left to itself ([picture](released/curve.png)); the learning rate
falls to zero at the last row only, which is a part of its gain. Then 17,664 steps of 32 on an H100, in under six minutes (13.1 ms a step in
bf16 with CUDA graphs, 79 ms without): `final` is what ships, `shipped` what was shipped before ([settings, losses](released/longer.json)).
On validation nodules no difference can be told. Validation hosts are separate by lung only: the right one of LIDC-IDRI-0001 takes training
nodules, the left one these. On the 71 displaced test nodules, with the decoder trained further too, the JSD left to itself fell from 0.068
([before](released/steps.csv)) to 0.058. The training loss fell from 3.7 to 2.0; how its training nodules come again was not measured.

{{released: curve longer}}

## The shipped autoencoder

Stage I on real nodules of patients it never saw (26 LIDC cubes, middle 48 mm at 1 mm), beside a linear code of equal size (8 : 1);
`python -m scripts.judge_autoencoder` makes the table. It was trained by L1 and KL alone, then its decoder with perceptual and
adversarial terms ([card](../hrldm/weights/README.md)); before that the crop had 35.0 dB (33.5 to 36.4) and the lesion 37 HU (30 to 46).
The adversarial term brings no fine texture back: on 37 validation nodules the power at 0.42 cycles per mm went from 12 % to 14 % of the
real one, and five times its weight changes nothing. At 16 : 1 (MAISI's rate, 4 channels,
1,500 steps from nothing) the network has 31.8 dB (30.5 to 32.9) in the crop and 56 HU (47 to 66) in the lesion, its linear code 29.2 dB.

{{../hrldm/weights: autoencoder.json}}

## Insertion

Unselected insertions, 200 into each of three CTs, ten at a time into the untouched scan, on one core of a busy machine
(`scripts/insert_many.py`); sheets of the first sixty, in three planes: [LIDC-IDRI-0001](insert/lidc-idri-0001/contact_sheet.png)
(0.7 × 0.7 × 2.5 mm), [R01-001](insert/r01-001/contact_sheet.png) (1 mm), [LIDC-IDRI-0001 in slices of 5 mm](insert/lidc-idri-0001-5mm/contact_sheet.png).
The error of the mean and the JSD are of the written voxels, over the nodules whose size this grid can hold (two voxels across); then
how much of a vessel's contrast is left within ground-glass, the share of subpleural nodules that touch the chest wall, seconds a nodule.
Looked at one by one, sixty a sheet, this is what gives a nodule away: a dark middle or ring in a solid one (1 in R01-001, 1 in the slices
of 5 mm), mottle in large solid ones (2 in R01-001), a plate of 20 mm (1 in each of the first two sheets; a rare shape of the library).
Of 10,000 random insertions into tiny phantoms of every orientation, spacing, data type, obliquity and format
(`HRLDM_FUZZ=10000 pytest tests/insertion/test_any_scan.py`, the code before this one) all kept background and geometry exactly. Last, time and
memory on two CPU cores (`make bench`): a placed mask to voxels by Algorithm 2 (network released before the present one), the whole process
of `python -m hrldm insert`, one nodule by size of the CT, nodules in one call.

{{insert/lidc-idri-0001: summary}}
{{insert/r01-001: summary}}
{{insert/lidc-idri-0001-5mm: summary}}
{{bench: insert}}

## Results of `lidc-cubes` at `quick`: real nodules

Real LIDC nodules in 51 mm cubes, split by patient; networks begin on `lidc-mini` and go on here. Not NLST as in the paper, few test
nodules, another extractor: the order of the systems may be compared with [the paper's](#the-papers-own-numbers), the values may not. Inside
the lesion each system is asked for the nodule's own HU histogram; where it is imposed, obedience is by construction and what is left is
the autoencoder's error. `hr-ldm` minus `maisi-ddpm` is what ℒ_hist adds: the same network, data, noise and 1,000 steps with λ = 0. The
ablations are fine-tuned from one network without ℒ_hist, with their differences to the default: what ℒ_hist adds beyond c_hist, see
`c_hist only`. One rule judges [all claims](../notebooks/11_claims.ipynb).

{{lidc-cubes/quick/tables: table1_fidelity table1_differences lesion_histograms lesion_differences}}
{{lidc-cubes/quick/tables: control_summary triplets_summary separability ablations claims}}

### What synthetic nodules add for classifiers, on real nodules

696 real LIDC nodules of 6 to 30 mm (`lidc-vois`, 440 patients, 100 of them for testing). The network goes on from `lidc-mini` on all 485
training nodules, and synthetic nodules have their places and shapes: what they bring where clinical data lack was learned from the data
left out. The boxes end a voxel or two above and below a nodule; beyond them is air, in real and synthetic nodules alike, so this says
nothing about fidelity. Made by `python -m scripts.prepare_vois BOXES FOLDER`, then `make 08_scarcity 09_malignancy DATASET=lidc-vois
DATA_ROOT=FOLDER`. [Fig. 7](lidc-vois/quick/figures/fig7_scarcity.png) has one run a point, Table 3 mean ± SD over runs.

{{lidc-vois/quick/tables: fig7_scarcity table3_subtype fig8_malignancy}}

## Results of `lidc-mini` at `quick`, beside the paper's

Semi-synthetic: the "real" nodules are real shapes painted with real histograms in one real CT. FID, KID and MMD are in another feature
space than [the paper's](#the-papers-own-numbers) and with fewer nodules, so only the order of the systems can be compared. All systems had
1,000 updates here; DiffTumor's and LeFusion's authors took 50,000 and more, so their rows show that the comparison works and not what
these systems can do. Table 2 has a classifier in the radiologist's place. In Table 3, with five runs a side, the smallest p of the
Mann–Whitney test is 0.008; the bootstrap tests the same by patients, with Holm's correction. [Fig. 7](lidc-mini/quick/figures/fig7_scarcity.png)
has three runs a point. Fig. 8 is malignancy by what the weights were trained on before. `border` asks whether a nodule of the classifiers'
pool is told from a real one by what lies about its mask: all but the texture's are, so a gain by synthetic nodules may rest on that, too.

What `quick` changes to fit two cores, all named options in `notebooks/study/profiles.py`: the U-Net predicts v instead of the noise (which follows
from it exactly) and sees the lesion's window of the latent grid; ℒ_hist reads t ≤ 400; a linear denoiser, fitted in closed form, stands
beside the U-Net; the mask's channels keep its shape within a latent voxel; batches of 8. `PROFILE=paper` has the paper's settings.

{{lidc-mini/quick/tables: table1_fidelity table1_differences table1_costs lesion_histograms lesion_differences control_summary}}
{{lidc-mini/quick/tables: separability turing_accuracy table3_subtype table3_differences border fig7_scarcity}}
{{lidc-mini/quick/tables: fig8_malignancy fig8_differences claims}}

## The paper's own numbers

Transcribed from its tables and, for Fig. 7, from its text. Its Table 2 is the radiologist above; what does not add up stands in
[`anomalies.csv`](published/anomalies.csv).

{{published: table1_fidelity table3_subtype fig7_scarcity fig8_malignancy}}

## What is made where

Each [notebook](../README.md#notebooks) can be made alone (`make 05_fidelity`). Time and memory are those of `make reproduce` on two CPU
cores, network training included where a notebook is the first to need it; 08 and 09 were then made again with their classifiers in the cache,
after 332 and 93 s the first time. All together took 125 minutes, on two idle cores.

{{lidc-mini/quick: provenance.json}}

## Benchmarks

`make bench`, two CPU cores; `ratio` is the time over that of the benchmark's first row. Eq. 7 on 10⁶ values and 40 bins, forward and
backward, against the dense N × B formula; ℒ_hist of the largest lesion's crop against decoding the latent of a whole CT; one training
step at `quick` with λ = 0 and λ = 10, with cached latents and encoding on the fly.

{{bench: core}}
"""


def read(file: Path) -> pd.DataFrame:
    """A CSV; the results of a model card; or what each notebook took, of a provenance file."""
    if file.suffix == ".csv":
        return pd.read_csv(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    if "results" in content:
        return pd.DataFrame(content["results"])
    cost = pd.DataFrame({name: content[name] for name in ("wall_time_s", "peak_memory_mb")})
    return cost.rename_axis("notebook").reset_index()


def views(found: re.Match) -> str:
    """The tables that ``{{folder: names}}`` asks for, each below a link to its file."""
    files = [f"{found[1]}/{name}" if "." in name else f"{found[1]}/{name}.csv" for name in found[2].split()]
    return "\n\n".join(f"[`{file}`]({file})\n\n{view(read(RESULTS / file), Path(file).stem)}" for file in files) + "\n"


def main(check: bool = False) -> int:
    """Write results/README.md and the Markdown view beside each table, from the CSVs.

    Args:
        check: write nothing; name the files that are not what the CSVs give, and return 1 if there are any.
    """
    tables = [csv for csv in sorted(RESULTS.glob("**/tables/*.csv")) if "smoke" not in csv.parts]  # never committed
    made = {csv.with_suffix(".md"): page(csv) for csv in tables}
    made[RESULTS / "README.md"] = re.sub(r"\{\{(.+): (.+)\}\}\n", views, PAGE)
    stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(file.relative_to(RESULTS).as_posix())
        if not check:
            write_text(file, made[file])
    return int(check and bool(stale))
