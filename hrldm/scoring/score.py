"""Score a detector on inserted nodules: from records and predictions to tables and a picture."""

import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hrldm.atomic import new_folder
from hrldm.scoring.froc import RATES, Curve, judge, sensitivity
from hrldm.scoring.predictions import read_predictions, read_scans

logger = logging.getLogger(__name__)
WRITTEN = {"froc.csv", "sensitivity.csv", "hits.csv", "froc.png"}
SAME_MM = 5.0  # predictions nearer than this are of one finding, as LUNA16 merges candidates
MOST_WRONG = 1.0  # false positives a scan at the operating point
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito: told apart by the colour-blind


def score(
    records: str | Path,
    predictions: str | Path,
    out: str | Path,
    coordinates: str,
    before: str | Path | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
) -> str:
    """Write froc.csv, sensitivity.csv, hits.csv and froc.png into the new folder `out`; returns what they say in short.

    Nodules that a scan had before insertion are in no record: a prediction there cannot be judged, and counts as a false
    positive. If `before` gives the predictions of the CTs before insertion, those within `SAME_MM` of one are counted, and a
    second curve, of "new" false positives, leaves them out. It leaves out the detector's errors of before, too, so the
    truth lies between both.

    Args:
        records, predictions, coordinates, before: see `read_scans` and `read_predictions`
        threshold: score of the operating point; None: the lowest with at most `MOST_WRONG` false positives a scan
        overwrite: replace a folder that an earlier call wrote

    Raises:
        ValueError: wrong input, named by file and row; nothing is written.
        OSError: the results could not be written; nothing is left behind.
    """
    with new_folder(Path(os.path.abspath(out)), lambda folder: _check(folder, overwrite)) as part:
        scans = read_scans(records)
        nodules = pd.DataFrame([{"scan": i} | nodule for i, scan in enumerate(scans) for nodule in scan.nodules])
        found, radius = read_predictions(predictions, coordinates, scans), nodules["diameter_mm"] / 2
        nodules["score"], wrong = judge(nodules, found, radius)
        if coordinates != "voxel":
            mirrored = judge(nodules, found.assign(x=-found["x"], y=-found["y"]), radius)[0]
            if (hits := np.isfinite(nodules["score"]).sum()) < (others := np.isfinite(mirrored).sum()):
                logger.warning("%d nodules are hit, %d were x and y mirrored: is coordinates=%s right?", hits, others, coordinates)  # fmt: skip
        negatives = sum(not scan.nodules for scan in scans)
        said = [
            f"{len(nodules)} nodules in {len(scans) - negatives} scan(s), {negatives} negative(s); {len(found)} predictions, "
            f"{wrong.sum()} of them on no inserted nodule"
        ]
        curves = {"all": Curve(nodules, found[wrong], len(scans))}
        if before is not None:
            original = read_predictions(before, coordinates, scans, originals=True)
            nodules["score_before"] = judge(nodules, original, radius)[0]
            own = wrong & np.isfinite(judge(found, original, np.full(len(found), SAME_MM))[0])
            curves["new"] = Curve(nodules, found[wrong & ~own], len(scans))
            said.append(f"{own.sum()} of these were there before insertion: new false positives leave them out")
        point = curves["all"].operating_point(MOST_WRONG) if threshold is None else threshold
        nodules["found"] = np.isfinite(nodules["score"]) & (nodules["score"] >= point)
        froc = pd.concat([curve.table().assign(false_positives=name) for name, curve in curves.items()])
        groups, rate = sensitivity(nodules), (found["score"][wrong] >= point).sum() / len(scans)
        for row in froc[froc["rate"] == "mean"].itertuples():
            said.append(f"CPM {_interval(row)}, {row.false_positives} false positives")
        said.append(f"found at scores from {point:g}: {_interval(groups.iloc[0])}, {rate:.3g} false positives a scan")
        hits = nodules.assign(scan=[scans[i].names[0] for i in nodules["scan"]]).replace(-np.inf, np.nan)
        for name, table in (("froc", froc), ("sensitivity", groups), ("hits", hits)):
            table.to_csv(part / f"{name}.csv", index=False, lineterminator="\n")
        _draw(part / "froc.png", curves, froc, said)
    return "\n".join(said)


def _interval(row) -> str:
    low_to_high = f"{row.ci_low:.3f} to {row.ci_high:.3f}" if np.isfinite(row.ci_low) else "one scan has no interval"
    return f"{row.sensitivity:.3f} ({low_to_high})"


def _check(out: Path, overwrite: bool) -> None:
    """Raise ValueError if `out` holds anything that may not be replaced."""
    ours = (
        out.is_dir() and not out.is_symlink() and {f.name for f in out.iterdir()} <= (WRITTEN if overwrite else set())
    )
    if os.path.lexists(out) and not ours:
        raise ValueError(
            f"{out}: exists already; choose another name, or ask to overwrite what score wrote (overwrite=True)"
        )


def _draw(file: Path, curves: dict[str, Curve], froc: pd.DataFrame, said: list[str]) -> None:
    """The curves with their intervals at `RATES`, and below them what they are."""
    fig = Figure(figsize=(7, 5.5), layout="constrained")
    ax, fine = fig.subplots(), np.geomspace(RATES[0], RATES[-1], 400)
    for (name, curve), colour, line in zip(curves.items(), COLOURS, ("-", "--"), strict=False):
        at = froc[(froc["false_positives"] == name) & (froc["rate"] != "mean")]
        ax.plot(fine, np.interp(fine, *curve.points()), line, color=colour, label=f"{name} false positives")
        ax.vlines(RATES, at["ci_low"], at["ci_high"], color=colour, linestyles=line)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="false positives a scan", ylabel="sensitivity", ylim=(0, 1.02))
    ax.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    ax.legend(loc="best")
    fig.supxlabel("\n".join([*said, "Bars: 95 % intervals by bootstrap over scans."]), fontsize=7)
    fig.savefig(file, dpi=120)
