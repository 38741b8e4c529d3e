"""Whole command lines of any arguments end with a result or a sentence, and never with a traceback."""

import os
import shutil
import sys

import nibabel as nib
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hrldm.__main__ as cli
from hrldm.insertion import insert, released
from hrldm.insertion.wish import Wish, copies
from tests import tiny
from tests.insertion.test_insert import LIBRARY, scan

FILES = ("ct.nii.gz", "lungs.nii.gz", "plan.csv", "wrong.json", "noise", "folder", "absent", "", ".", "a b'\"c", "x" * 300)  # fmt: skip
path = st.sampled_from(FILES) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=12)
number = (
    st.integers(-3, 40) | st.floats() | st.sampled_from(["", "1e999", "-0", "9" * 400, "10 mm", "0x10", "1_0", "٣"])
)
point = (
    st.tuples(number, number, number).map(lambda p: ",".join(map(str, p))) | st.just("-70,5,10") | st.text(max_size=8)
)
one_of = st.sampled_from(
    ["solid", "part-solid", "ground-glass", "RUL", "inner", "subpleural", "cpu", "cuda", "strip", "keep", "1.2", "é"]
)
SHARED = {
    "subtype": one_of, "diameter": number, "count": number, "seed": number, "plan": path, "lungs": path, "steps": number,
    "device": one_of, "retries": number, "private": one_of,
}  # fmt: skip
OPTIONS = {
    "insert": SHARED | {"lobe": one_of, "location": one_of, "at": point, "histogram": path, "spiculation": number,
                        "core": number, "mask": path, "avoid": path, "series-uid": one_of},
    "batch": SHARED,
}  # fmt: skip


@st.composite
def lines(draw):
    """A command, its two folders, and some of its options."""
    command = draw(st.sampled_from(list(OPTIONS)))
    source = draw(st.sampled_from(["ct.nii.gz", "ct.nii.gz", "folder"]) | path)
    out = draw(st.sampled_from(["o1", "new/o2", "..", "/", "o1/a/b"]) | path)
    names = draw(st.lists(st.sampled_from(list(OPTIONS[command])), max_size=4, unique=True))
    given_ = [f"--{name}={draw(OPTIONS[command][name])}" for name in names]
    flags = draw(
        st.lists(st.sampled_from(["--overwrite", "--no-matching", "--no-grain", "--matching=1", "--"]), max_size=1)
    )
    return [command, source, out, *given_, *flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small CT and files that are something else, to be in."""
    folder = tmp_path_factory.mktemp("commands") / "deep"
    (folder / "folder").mkdir(parents=True)
    ct, labels = scan(spacing=(4.0, 4.0, 5.0))
    nib.save(nib.Nifti1Image(ct.stored, ct.affine), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(labels, ct.affine), folder / "lungs.nii.gz")
    shutil.copy(folder / "ct.nii.gz", folder / "folder" / "one.nii.gz")
    (folder / "plan.csv").write_text("subtype,diameter_mm\nsolid,9\n")
    (folder / "wrong.json").write_text('{"nodules": [{"wish": {"at": [NaN, 1, 1e999], "seed": -1}}]}')
    (folder / "noise").write_bytes(bytes(range(256)))
    return folder


@given(line=lines())
@example(line=["insert", "ct.nii.gz", "o1", "--count=2"])
@example(line=["insert", "ct.nii.gz", "o1", "--steps=0"])
@example(line=["insert", "ct.nii.gz", "", "--plan=wrong.json"])
@example(line=["batch", "folder", "folder"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_line_ends_with_a_result_or_a_sentence(place, monkeypatch, capsys, line):
    class Painting(tiny.PaintingGenerator):
        def __init__(self, **sampling) -> None:
            super().__init__()
            self.sampling = released.sampled(self.sampling, **sampling)

    monkeypatch.setattr(insert, "load_shapes", lambda: LIBRARY)
    monkeypatch.setattr(released, "released", lambda on, grain, **sampling: Painting(**sampling))
    monkeypatch.setattr(sys, "argv", ["hrldm", *line])
    monkeypatch.chdir(place)
    kept = {name: (place / name).read_bytes() for name in ("ct.nii.gz", "lungs.nii.gz", "folder/one.nii.gz", "noise")}
    try:
        status = cli.main()
    except SystemExit as stop:  # tyro's own
        status = stop.code
    out, err = capsys.readouterr()
    assert status in (0, 1, 2) and "Traceback" not in out + err
    if status == 2 and "error: " in err:
        assert err.splitlines()[-1].strip()
    assert {name: (place / name).read_bytes() for name in kept} == kept
    assert not [f for f in os.listdir(place) if f.startswith(".")]


def test_nothing_said_beside_a_plan_is_dropped(tmp_path):
    plan, record = tmp_path / "plan.csv", tmp_path / "record.json"
    plan.write_text("subtype\nsolid\nsolid\n")
    record.write_text('{"nodules": [{"wish": {"subtype": "solid", "seed": 9}}]}')
    assert cli._wishes(plan, Wish(seed=4), 1) == copies(Wish(seed=4), 2)
    assert cli._wishes(record, Wish(), 1) == [Wish(seed=9)]
    refused = (
        (plan, Wish(diameter_mm=12.0, lobe="RUL"), 1, "--diameter, --lobe"),
        (plan, Wish(), 3, "--count"),
        (record, Wish(seed=4), 1, "--seed"),
    )
    for given_plan, wish, count, named in refused:
        with pytest.raises(ValueError, match=f"leave out {named}, or write it"):
            cli._wishes(given_plan, wish, count)
