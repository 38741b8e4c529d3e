"""Whole command lines: what they make and say; any others end with a result or a sentence, and never with a traceback."""

import dataclasses
import json
import os
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hrldm.__main__ as cli
from hrldm.command_line import as_options
from hrldm.insertion import released
from hrldm.insertion.wish import Wish, copies
from tests import tiny
from tests.insertion.chests import drawn, failing, save, scan


def test_the_command_line_inserts_and_says_what_came(call, nifti, tmp_path):
    made = ("--subtype", "part-solid", "--diameter", 12, "--core", 6, "--seed", 7)
    status, out, _ = call("insert", nifti, tmp_path / "o", *made, "--at=-70,5,10", "--retries", 0)
    assert status == 0 and "part-solid, 12 mm" in out and out.count("requested") == 1
    record = json.loads((tmp_path / "o" / "record.json").read_text())
    wish = {
        "subtype": "part-solid",
        "diameter_mm": 12.0,
        "location": "inner",
        "at": [-70, 5, 10],
        "core_mm": 6,
        "seed": 7,
    }
    assert [n["wish"] for n in record["nodules"]] == [wish] and record["options"]["retries"] == 0
    (tmp_path / "plan.csv").write_text("subtype,diameter_mm\nsolid,9\n")
    status, out, _ = call("insert", nifti, tmp_path / "p", "--plan", tmp_path / "plan.csv")
    assert status == 0 and "solid, 9 mm" in out
    (tmp_path / "cts").mkdir()
    shutil.copy(nifti, tmp_path / "cts" / "a.nii.gz")
    status, out, _ = call("batch", tmp_path / "cts", tmp_path / "many", "--count", 2)
    assert status == 0 and out.strip() == "a: done"
    assert len(json.loads((tmp_path / "many" / "a" / "record.json").read_text())["nodules"]) == 2


def test_json_is_all_that_is_printed_for_a_program(call, nifti, tmp_path):
    status, out, _ = call("insert", nifti, tmp_path / "o", "--diameter", 8, "--retries", 0, "--json")
    said, record = json.loads(out), json.loads((tmp_path / "o" / "record.json").read_text())
    assert status == 0 and said["nodules"] == record["nodules"] and said["out"] == str(tmp_path / "o")
    assert said["files"] == sorted(os.listdir(tmp_path / "o"))


def test_a_record_makes_the_same_again_and_what_is_otherwise_is_said(call, nifti, tmp_path, caplog):
    wish = ("--subtype", "part-solid", "--diameter", 14, "--core", 6, "--count", 2)
    call("insert", nifti, tmp_path / "a", *wish, "--seed", 5, "--retries", 0)
    record = tmp_path / "a" / "record.json"
    assert call("insert", nifti, tmp_path / "b", "--plan", record, "--retries", 0)[0] == 0 and not caplog.records
    for name in ("ct.nii.gz", "mask.nii.gz"):
        first, second = (np.asarray(nib.load(tmp_path / out / name).dataobj) for out in "ab")
        np.testing.assert_array_equal(first, second)
    call("insert", nifti, tmp_path / "c", "--plan", record)
    assert "was made otherwise, so other voxels may come: options retries: 0 there, 2 here" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diameter", "50"], "diameter 50 mm: nodules have 3 to 30 mm"),
        (["--at", "1,2"], "three numbers"),
        (["--at", "here"], "at 'here': give three numbers x,y,z in RAS mm"),
        (["--at", "500,0,0"], "would leave the lungs; the nearest place"),
        (["--lobe", "RUL"], "nothing here tells lobes; give a TotalSegmentator map (--lungs)"),
        (["--histogram", "absent.txt"], "absent.txt: not a histogram"),
        (["--lungs", "absent.nii.gz"], "absent.nii.gz: no such file"),
        (["--count", "0"], "count must be at least 1"),
        (["--retries", "-1"], "--retries -1: give 0 to 100"),
        (["--mask", "own.nii.gz", "--diameter", "9"], "says its shape and place; leave out diameter"),
        (["--plan", "plan.csv"], "row 2: diameter_mm 'big': give a number"),  # a column's name, not an option's
        (["--plan", "plan.csv", "--diameter", "12", "--lobe", "RUL"], "leave out --diameter, --lobe, or write it"),
        (["--plan", "plan.csv", "--count", "3"], "leave out --count, or write it"),
        (["--plan", "record.json", "--seed", "4"], "leave out --seed, or write it"),
        (["--lps"], "--lps is for places"),
    ],
)
def test_wrong_arguments_end_with_a_sentence_and_no_output(call, nifti, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    drawn("own.nii.gz", (-70, 5, 10), 5.0)
    (tmp_path / "plan.csv").write_text("diameter_mm\nbig\n")
    status, _, error = call("insert", nifti, tmp_path / "o", *arguments)
    assert status == 2 and error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_a_place_beside_the_lungs_that_is_in_them_as_lps_gives_a_hint(call, nifti, tmp_path):
    image = nib.load(nifti)
    affine = image.affine.copy()
    affine[1, 3] += 80
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).copy(), affine), nifti)
    status, _, error = call("insert", nifti, tmp_path / "o", "--at=70,-80,10")
    assert status == 2 and "as LPS it lies in the lungs: if it is, say so (--lps)" in error
    assert call("insert", nifti, tmp_path / "o", "--at=70,-80,10", "--lps")[0] == 0


def test_a_place_in_lps_is_turned_and_its_side_is_said(call, nifti, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "plan.csv").write_text('at,seed\n"70 -5 10",3\n')
    for k, (place, side) in enumerate(
        {("--at=70,-5,10", "--lps"): "left", ("--at=-70,5,10",): "left", ("--plan", tmp_path / "plan.csv", "--lps"): "left",
         ("--at=70,-5,10",): "right"}.items()
    ):  # fmt: skip
        caplog.clear()
        assert call("insert", nifti, tmp_path / f"o{k}", *place)[0] == 0
        (nodule,) = json.loads((tmp_path / f"o{k}" / "record.json").read_text())["nodules"]
        expected = [70, -5, 10] if side == "right" else [-70, 5, 10]
        assert nodule["wish"]["at"] == expected and np.allclose(nodule["centre_ras_mm"], expected, atol=1)
        assert f"mm (RAS): the patient's {side}" in caplog.text


def test_hints_name_the_options_of_the_command_line(call, nifti, tmp_path):
    status, _, error = call("insert", nifti, tmp_path)
    assert status == 2 and "ask to overwrite it (--overwrite)" in error
    said = as_options("leave out on=cuda; give lungs=... or a/lungs=3/b; the column diameter_mm")
    assert said == "leave out --device cuda; give --lungs or a/lungs=3/b; the column diameter_mm"


def test_the_seed_is_for_rows_of_a_plan_without_one(tmp_path):
    (tmp_path / "plan.csv").write_text("subtype\nsolid\nsolid\n")
    assert cli.Options(plan=tmp_path / "plan.csv").wishes(Wish(seed=4)) == copies(Wish(seed=4), 2)


@pytest.mark.parametrize(
    ("options", "changes"),
    [({}, {}), ({"steps": 7}, {"steps": 7}), ({"steps": 2, "matching": False, "grain": False}, {"steps": 2})],
)
def test_options_reach_the_released_networks_and_the_insertion(options, changes):
    given = cli.Options(device="cpu", **options)
    made, shipped = given.generator(), released.released(on="cpu")
    assert made.sampling == dataclasses.replace(shipped.sampling, **changes)
    assert {name: given.file()[name] for name in ("matching", "grain")} == {
        name: options.get(name, True) for name in ("matching", "grain")
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "none left"), (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "allocate memory")],
)  # fmt: skip
def test_too_little_memory_is_a_sentence_and_stops_one_ct_only(call, nifti, tmp_path, error, said):
    (tmp_path / "cts").mkdir()
    shutil.copy(nifti, tmp_path / "cts" / "a.nii.gz")
    status, _, out = call("insert", nifti, tmp_path / "out", generator=failing(error))
    assert status == 2 and said in out and out.endswith("free some, or --device cpu\n")
    status, out, _ = call("batch", tmp_path / "cts", tmp_path / "out", generator=failing(error))
    assert status == 1 and "a: " in out and said in out


def test_an_interrupted_run_ends_with_a_sentence_and_leaves_nothing(call, nifti, tmp_path):
    before = sorted(tmp_path.iterdir())
    status, _, error = call("insert", nifti, tmp_path / "new" / "o", generator=failing(KeyboardInterrupt()))
    assert status == 130 and error.startswith("interrupted") and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


# -- any command line ----------------------------------------------------------------------------------------------------

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
    "erase": {"mask": path, "lungs": path, "seed": number, "series-uid": one_of},
}  # fmt: skip


@st.composite
def lines(draw):
    """A command, its two folders, and some of its options."""
    command = draw(st.sampled_from(list(OPTIONS)))
    source = draw(st.sampled_from(["ct.nii.gz", "ct.nii.gz", "folder"]) | path)
    out = draw(st.sampled_from(["o1", "new/o2", "..", "/", "o1/a/b"]) | path)
    names = draw(st.lists(st.sampled_from(list(OPTIONS[command])), max_size=4, unique=True))
    flags = st.sampled_from(["--overwrite", "--no-matching", "--no-grain", "--matching=1", "--"])
    options = [f"--{name}={draw(OPTIONS[command][name])}" for name in names]
    return [command, source, out, *options, *draw(st.lists(flags, max_size=1))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small CT and files that are something else, to be in."""
    folder = tmp_path_factory.mktemp("commands") / "deep"
    (folder / "folder").mkdir(parents=True)
    ct, labels = scan(spacing=(4.0, 4.0, 5.0))
    save(folder / "ct.nii.gz", ct.stored, ct.affine)
    save(folder / "lungs.nii.gz", labels, ct.affine)
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
@example(line=["erase", "\x85", "..", "--mask=ct.nii.gz"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_line_ends_with_a_result_or_a_sentence(place, monkeypatch, capsys, line):
    monkeypatch.setattr(released, "released", tiny.painting)
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
        assert err.rstrip("\n").split("\n")[-1].strip()  # a file name may hold other ends of lines
    assert {name: (place / name).read_bytes() for name in kept} == kept
    assert not [f for f in os.listdir(place) if f.startswith(".")]
