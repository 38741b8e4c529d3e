"""The reader study of Section 6.2 as one HTML page: real and synthetic nodules, seen cropped and then in context (Table 2).

`page.html` is the viewer. What it shows of a case is its number and its voxels; the key stays in a file apart. Nothing else
in the page depends on the truth: numbers and orders are drawn, both kinds are packed alike, and every case takes up the same
number of bytes (a smooth lesion compresses better).

A volume is packed in steps of 2 HU from -1024 to 3071: differences to the neighbours along each axis (what
remains is noise), as high and low bytes, deflated, in base64.
"""

import base64
import hashlib
import json
import logging
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from hrldm.atomic import new_folder, write_text
from hrldm.config import SUBTYPES
from hrldm.nodules.histograms import size_bin
from hrldm.nodules.patches import Patches
from study.experiments import evaluation_nodules
from study.measure.observers import CONDITIONS, WORDS
from study.study import Study
from study.systems.registry import request_for, synthesise

logger = logging.getLogger(__name__)
CROP_MM = 40  # side of the first condition, `cropped`
CONTEXT_MM = 64  # side of the second, `full_context`, where the caller has no wider field
LOWEST_HU, HIGHEST_HU, STEP_HU = -1024, 3071, 2
BLOCK = 65535  # bytes in a stored block of deflate, at most
PADDED_P = 0.01  # padded sides that tell the truth with a smaller p are reported
KEY_COLUMNS = "case truth nodule_id subtype diameter_mm system page".split()
PAGE, KEY = "readers.html", "key.csv"


def study_nodules(study: Study, system: str, side: int = CONTEXT_MM) -> tuple[Patches, Patches]:
    """The real nodules of Table 2 in crops of `side` mm, and those places with the nodules that a system makes there."""
    truth, background = evaluation_nodules(study)
    made = synthesise(study, system, request_for(study, truth, background, seed=study.seed), truth)
    real, places = (part[: len(truth)] for part in study.places("test", side))
    hu = places.hu.copy()
    start = (side - made.shape[1]) // 2
    if start > 0:
        hu[(slice(None), *[slice(start, start + made.shape[1])] * 3)] = made
    else:
        hu = replace(truth, hu=made).centred(side).hu
    return real, replace(real, hu=hu)


def make(real: Patches, synthetic: Patches, out: Path, n: int = 50, seed: int = 0, system: str = "hr-ldm") -> Path:
    """Write the folder `out` with `readers.html` (for the readers) and `key.csv` (not for them).

    Args:
        real, synthetic: crops (N, D, D, D) at 1 mm, D > 40 and as wide as the second condition is to be.
        n: of each kind, balanced over subtypes and sizes; a nodule_id is shown as real or as synthetic, never as both.
        seed: of the choice, the numbers of the cases and their order; the same seed gives the same bytes.
        system: what made the synthetic ones, for the key.

    Returns:
        The page.

    Raises:
        ValueError: `out` exists, crops that do not fit, or fewer nodules than asked for.
    """
    side = real.hu.shape[1]
    if real.hu.shape[1:] != synthetic.hu.shape[1:] or side <= CROP_MM:
        raise ValueError(
            f"crops of {side} and {synthetic.hu.shape[1]} mm: both kinds need one side, wider than the {CROP_MM} mm of "
            "the first condition"
        )
    with new_folder(Path(out).absolute(), _must_be_new) as part:
        rng = np.random.default_rng(seed)
        rows = chosen(real.frame, synthetic.frame, n, rng)
        kinds = [patches[index] for patches, index in zip((real, synthetic), rows, strict=True)]
        _report_padding(*(_padded(kind.hu) for kind in kinds))
        frame = pd.concat([kind.frame.assign(truth=word) for kind, word in zip(kinds, WORDS, strict=True)])
        number = rng.permutation(2 * n)
        key = frame.iloc[number].assign(case=[f"{i:03d}" for i in range(1, 2 * n + 1)], system="")
        key.loc[key.truth == "synthetic", "system"] = system
        blobs = [_packed(hu) for hu in np.concatenate([kind.hu for kind in kinds])[number]]
        length = max(map(len, blobs)) + 5
        cases = {c: base64.b64encode(_sealed(b, length, rng)).decode() for c, b in zip(key.case, blobs, strict=True)}
        order = {condition: rng.permutation(key.case).tolist() for condition in CONDITIONS}
        shown = {"side": side, "crop": CROP_MM, "lowest": LOWEST_HU, "highest": HIGHEST_HU, "step": STEP_HU}
        text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        data = "\n".join(f'<script type="text/plain" id="case-{case}">{code}</script>' for case, code in cases.items())
        text = text.replace("@STUDY@", json.dumps(shown | {"order": order})).replace("@CASES@", data)
        page = hashlib.sha256(text.encode()).hexdigest()[:12]
        write_text(part / PAGE, text.replace("@PAGE@", page))
        write_text(part / KEY, key.assign(page=page)[KEY_COLUMNS].to_csv(index=False, lineterminator="\n"))
    return Path(out) / PAGE


def chosen(
    real: pd.DataFrame, synthetic: pd.DataFrame, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `n` real and `n` synthetic nodules: in each cell of subtype and size as many of both, cells as equal as can be.

    Raises:
        ValueError: fewer can be had, since no nodule_id may be on both sides.
    """
    cells = {}
    for subtype in SUBTYPES:
        for size in range(3):
            # shuffled; what is on one side alone comes first, so that the other can have the rest
            sides = []
            for frame, other in ((real, synthetic), (synthetic, real)):
                fits = (frame.subtype == subtype) & (frame.diameter_mm.map(size_bin) == size)
                index = rng.permutation(np.flatnonzero(fits))
                shared = frame.nodule_id.iloc[index].isin(other.nodule_id)
                sides.append(index[np.argsort(shared, kind="stable")])
            ids = {*real.nodule_id.iloc[sides[0]], *synthetic.nodule_id.iloc[sides[1]]}
            cells[subtype, size] = (*sides, min(len(sides[0]), len(sides[1]), len(ids) // 2))
    room = np.array([most for *_, most in cells.values()])
    if n < 1 or room.sum() < n:
        raise ValueError(
            f"{n} real and {n} synthetic nodules wanted, {room.sum()} of each can be had with one subtype and size for "
            "both and no nodule on both sides; ask for fewer or give more nodules"
        )
    counts = np.zeros(len(cells), int)
    for _ in range(n):
        counts[np.argmin(np.where(counts < room, counts, n))] += 1
    rows: tuple[list, list] = ([], [])
    for count, (of_real, of_synthetic, _) in zip(counts, cells.values(), strict=True):
        taken = of_real[:count]
        free = of_synthetic[~synthetic.nodule_id.iloc[of_synthetic].isin(real.nodule_id.iloc[taken])]
        rows[0].extend(taken)
        rows[1].extend(free[:count])
    return np.array(rows[0]), np.array(rows[1])


def _packed(hu: np.ndarray) -> bytes:
    """A crop (x, y, z), RAS, deflated up to a byte's end. Stored from head to feet, front to back, right to left."""
    rest = (np.clip(hu, LOWEST_HU, HIGHEST_HU).astype(np.int16) - LOWEST_HU) // STEP_HU
    rest = rest.T[::-1, ::-1, ::-1]
    for axis in range(3):
        rest = np.diff(rest, axis=axis, prepend=np.int16(0))
    folded = ((rest << 1) ^ (rest >> 15)).astype(np.uint16)  # 0, -1, 1, -2, … as 0, 1, 2, 3, …
    deflate = zlib.compressobj(9, wbits=-15)
    return deflate.compress((folded >> 8).astype(np.uint8).tobytes() + (folded & 255).astype(np.uint8).tobytes()) + (
        deflate.flush(zlib.Z_SYNC_FLUSH)
    )


def _sealed(body: bytes, length: int, rng: np.random.Generator) -> bytes:
    """The stream brought to `length` bytes by random ones behind the voxels, in blocks that deflate stores as they are."""
    blocks = -(-(length - len(body)) // (BLOCK + 5))
    filling = rng.bytes(length - len(body) - 5 * blocks)
    for i in range(blocks):
        part = filling[i * BLOCK : (i + 1) * BLOCK]
        size = len(part).to_bytes(2, "little")
        body += bytes([i == blocks - 1]) + size + bytes(255 - b for b in size) + part
    return body


def _padded(hu: np.ndarray) -> np.ndarray:
    """(N,) whether a crop reaches beyond its scan: one of its faces repeats the slice inside."""
    faces = [(hu.take(a, axis) == hu.take(b, axis)).all((1, 2)) for axis in (1, 2, 3) for a, b in ((0, 1), (-1, -2))]
    return np.any(faces, axis=0)


def _report_padding(real: np.ndarray, synthetic: np.ndarray) -> None:
    """Say that padded sides tell which crops are real, where they do (Fisher's exact test)."""
    p = fisher_exact([[part.sum(), (~part).sum()] for part in (real, synthetic)]).pvalue
    if p < PADDED_P:
        logger.warning(
            "%d of %d real and %d of %d synthetic crops reach beyond their scan, and readers can see it: give crops that do not",
            real.sum(), len(real), synthetic.sum(), len(synthetic),
        )  # fmt: skip


def _must_be_new(out: Path) -> None:
    if out.exists():
        raise ValueError(
            f"{out}: exists already, and its key belongs to a page that readers may have; choose another folder"
        )
