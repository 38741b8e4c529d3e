"""Whole folders, damaged at random: `load_manifest` and `open_study` give every nodule of the table, or one ValueError that
names the manifest and, line by line, the row of each problem."""

import csv
import io
import os
import re

import nibabel as nib
import numpy as np
import pytest
from hypothesis import strategies as st

from hrldm.config import SUBTYPES
from hrldm.nodules.manifest import REQUIRED, load_manifest
from hrldm.nodules.split import SPLITS
from hrldm.nodules.spreadsheet import BLANK
from study.study import open_study
from tests import tiny
from tests.ct.test_fuzz import BITS, PART, flipped, fuzz, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # nibabel and numpy warn of what is then refused
HEADS = r"one column only; |row \d+: |rows \d+, [\d, ]+: nodule_id|column '|missing column|no rows|patient '|image .* one CT under"
NAMES = [f"n{i}_{kind}.nii.gz" for i in range(4) for kind in ("image", "mask", "background")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a good folder by name."""
    root = tiny.manifest(tmp_path_factory.mktemp("good"), {"train": 2, "test": 2}, size=12)
    return {p.name: p.read_bytes() for p in root.iterdir()}


def nifti(array, affine=None) -> bytes:
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()


def noise(shape=(12, 12, 12), dtype=np.int16):
    return np.random.default_rng(0).integers(-1000, 100, shape).astype(dtype)


WITH_NAN = np.where(np.arange(12) == 3, np.nan, noise().astype(np.float32))
FILES = {  # what stands where an image or a mask should
    "gone": None, "empty": b"", "text": b"see the other folder", "folder": "folder", "loop": "loop",
    "other shape": nifti(noise((12, 12, 11))), "flat": nifti(noise((12, 12))), "4D": nifti(noise((12, 12, 12, 2))),
    "nan": nifti(WITH_NAN), "float": nifti(noise(dtype=np.float64)), "bytes": nifti(noise(dtype=np.uint8)),
    "complex": nifti(noise(dtype=np.complex64)), "constant": nifti(np.zeros((12, 12, 12), np.int16)),
    "moved": nifti(noise(), np.diag([1.0, 1, 2, 1])), "sheared": nifti(noise(), np.eye(4) + np.eye(4, k=1)),
    "cut": nifti(noise())[:900], "good CT": nifti(noise()), "full mask": nifti(np.ones((12, 12, 12), np.uint8)),
    "half mask": nifti(np.full((12, 12, 12), 0.5, np.float32)), "labels": nifti(np.eye(12)[:, None] * np.ones((1, 12, 1)) * 3),
}  # fmt: skip
CELLS = ["", " ", "nan", "NaN", "N/A", "inf", "-inf", "1e400", "0", "-3", "8,5", "n0", "p0", "p1", "test", "val", "Solid", "solid",
         "part-solid", "10", "30.5", "9" * 30, "gone.nii.gz", ".", "..", "/", "n1_mask.nii.gz", "a\nb", 'a"b', '"', "é", "#", "=1+1",
         "\0", "x" * 300, "1_0", "0x10", "٣"]  # fmt: skip
LINES = ["", ",,,,,,,,", ",,", "# remark", " , ,", "a,b", '"open']
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]
DAMAGE = {  # kind: where, how
    "file": (st.sampled_from(NAMES), st.sampled_from(list(FILES))),
    "cell": (st.tuples(st.integers(0, 4), st.integers(0, 9)), st.sampled_from(CELLS)),
    "row": (st.integers(0, 4), st.sampled_from(["drop", "double"])),
    "column": (st.integers(0, 9), st.sampled_from(["drop", "double", "blank", "last"])),
    "line": (st.integers(0, 6), st.sampled_from(LINES)),
    "text": (st.sampled_from([",", ";", "\t"]), st.sampled_from(ENCODINGS)),
    "ends": (st.sampled_from(["\n", "\r\n", "\r"]), st.booleans()),
    "bytes": (st.none() | PART, st.just([]) | BITS),
}
STEP = st.one_of([st.tuples(st.just(kind), where, how) for kind, (where, how) in DAMAGE.items()])


def damage(root, folder, steps) -> bytes:
    """The folder with its damages written to `root`; the manifest's bytes."""
    files, lines, last = dict(folder), [], {"text": (",", "utf-8"), "ends": ("\n", False), "bytes": (None, [])}
    table = list(csv.reader(io.StringIO(files.pop("manifest.csv").decode(), newline="")))
    for kind, where, how in steps:
        if kind == "file":
            files[where] = FILES[how]
        elif kind == "cell" and table and table[where[0] % len(table)]:
            row = table[where[0] % len(table)]
            row[where[1] % len(row)] = how
        elif kind == "row" and table:
            table.insert(where, list(table[where % len(table)])) if how == "double" else table.pop(where % len(table))
        elif kind == "column" and table and table[0]:
            k = where % len(table[0])
            for row in table:
                cell = row[k] if k < len(row) else ""
                row[k : k + 1] = {"drop": [], "double": [cell] * 2, "blank": [""], "last": [cell, ""]}[how]
        elif kind == "line":
            lines.append((where, how))
        elif kind in last:
            last[kind] = (where, how)
    (delimiter, encoding), (end, blanks), (part, bits) = last.values()
    csv.writer(out := io.StringIO(), delimiter=delimiter, lineterminator=end).writerows(table)
    written = out.getvalue().split(end)
    for where, line in lines:
        written.insert(where, line)
    content = end.join(written if blanks else [w for w in written if w] + [""]).encode(encoding, "replace")
    content = flipped(content, bits) if content else content
    content = content if part is None else content[: int(part * len(content))]
    (root / "manifest.csv").write_bytes(content)
    for name, what in files.items():
        if what == "folder":
            (root / name).mkdir()
        elif what == "loop":
            os.symlink(root / name, root / name)
        elif what is not None:
            (root / name).write_bytes(what)
    return content


@fuzz(
    120,
    ([("file", "n0_mask.nii.gz", "loop")],),
    ([("file", "n0_image.nii.gz", "good CT"), ("file", "n3_image.nii.gz", "good CT")],),
    ([("text", ";", "cp1252"), ("cell", (1, 1), "é")],),
    ([("line", 3, ",,,,,,,,"), ("ends", "\r", True)],),
    ([("cell", (1, 5), "x" * 300)],),  # a name too long for the file system
    steps=st.lists(STEP, max_size=4),
)
def test_any_folder(folder, tmp_path_factory, steps):
    root = tmp_path_factory.mktemp("damaged")
    content = damage(root, folder, steps)
    if (frame := outcome(load_manifest, root)) is None:
        with pytest.raises(ValueError, match=re.escape(str(root / "manifest.csv"))) as refused:
            load_manifest(root)
        first, *problems = str(refused.value).splitlines()
        known = [p for p in problems if p.startswith("  ")]
        assert "not a readable CSV (line " in first or f"{len(known)} problem(s)" in first, refused
        assert all(re.match(HEADS, p.strip()) for p in known), refused
        return
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    filled = [r for r in rows if any(c.strip() and c.strip().lower() not in BLANK for c in r)]
    assert len(frame) == len(filled) - 1  # every nodule, and nothing else
    assert set(REQUIRED) <= set(frame) and frame.nodule_id.is_unique and frame.split.isin(SPLITS).all()
    assert (frame[list(REQUIRED)].drop(columns="diameter_mm") != "").all(axis=None)
    assert frame.subtype.isin(SUBTYPES).all() and frame.diameter_mm.between(0, 1e9, "neither").all()
    assert (frame.groupby("patient_id").split.nunique() == 1).all()
    assert all(os.path.isfile(f) for column in ("image", "mask") for f in frame[column])


@fuzz(15, steps=st.lists(STEP, max_size=3))
def test_any_study(folder, tmp_path_factory, steps):
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRLDM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        damage(root, folder, steps)
        study = outcome(lambda path: open_study(tiny.profile(data__patch_mm=12), "mine", str(path)), root)
        if study is not None:
            for split in ("train", "test"):
                truth, places = study.patches(split), study.backgrounds(split)
                assert len(truth) == len(places) == (study.frame.split == split).sum() > 0
                assert truth.mask.any((1, 2, 3)).all()
