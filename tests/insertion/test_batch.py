"""A folder of CTs: which are found, what is made, and what a second run takes for done."""

import json
import os
import re
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from hrldm.ct.volume import read_ct
from hrldm.insertion import batch
from hrldm.insertion.cohorts import Cohort
from hrldm.insertion.planning import plan_cohort
from hrldm.insertion.record import RECORD
from hrldm.insertion.wish import Wish
from tests import tiny
from tests.insertion.chests import During

WISHES, PAINTING = [Wish("solid", 12.0)], tiny.PaintingGenerator()
OTHERWISE = "1 result(s) there were made of another request, version or file, first a; choose"


@pytest.fixture
def cts(nifti, tmp_path):
    """A folder with the chest as a.nii.gz."""
    (tmp_path / "cts").mkdir()
    shutil.copy(nifti, tmp_path / "cts" / "a.nii.gz")
    return tmp_path / "cts"


def run(folder, *lungs, wishes=WISHES, generator=PAINTING, **options):
    return batch.insert_folder(folder, folder.parent / "out", wishes, generator, *lungs, **options)


def dicom(folder):
    affine, shape = tiny.chest_grid(np.eye(3), (4.0, 4.0, 5.0))
    return tiny.dicom_series(folder, tiny.chest(affine, shape), affine)


def test_a_folder_of_cts_goes_on_where_it_was_and_one_bad_ct_stops_no_other(cts, tmp_path):
    shutil.copy(cts / "a.nii.gz", cts / "b.nii.gz")
    (cts / "broken.nii").write_bytes(b"no image")
    dicom(cts / "dicom_case")
    said = run(cts)
    assert "broken.nii: not a readable image" in said.pop("broken")
    assert said == dict.fromkeys(("a", "b", "dicom_case"), "done")
    a, b = (json.loads((tmp_path / "out" / n / RECORD).read_text())["nodules"][0]["centre_ras_mm"] for n in "ab")
    assert a != b  # seeds of their own
    again = run(cts)
    assert again["a"] == again["dicom_case"] == "there already" and "broken" in again


def test_a_folder_without_a_ct_or_without_a_place_for_results_is_refused(cts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CT in it"):
        run(tmp_path / "empty")
    with pytest.raises(ValueError, match="absent: no such folder"):
        run(tmp_path / "absent")
    with pytest.raises(ValueError, match="/: cannot be replaced"):
        batch.insert_folder(cts, "/", WISHES, PAINTING)
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out: a file, where a folder for the results is needed"):
        run(cts)


def test_a_batch_asked_for_otherwise_is_refused_before_anything_is_made(cts, tmp_path):
    record = tmp_path / "out" / "a" / RECORD
    run(cts, retries=0)
    before = record.read_bytes()
    shutil.copy(cts / "a.nii.gz", cts / "b.nii.gz")
    for wishes, retries in (([Wish("solid", 8.0)], 0), (WISHES, 1), (WISHES * 2, 0)):
        with pytest.raises(ValueError, match=re.escape(OTHERWISE)):
            run(cts, wishes=wishes, retries=retries)
    assert record.read_bytes() == before and not (tmp_path / "out" / "b").exists()
    assert run(cts, retries=0) == {"a": "there already", "b": "done"}
    record.write_text("{")
    with pytest.raises(ValueError, match=re.escape(OTHERWISE)):
        run(cts, retries=0)
    record.write_bytes(before)
    assert run(cts, retries=0, overwrite=True) == dict.fromkeys("ab", "there already")


def test_a_second_batch_is_refused_while_the_first_works(cts):
    said = []

    def second():
        with pytest.raises(ValueError, match="another run is writing it") as error:
            run(cts)
        said.append(error)

    assert run(cts, generator=During(second)) == {"a": "done"} and said


@pytest.mark.parametrize("changed", ["cts/a.nii.gz", "maps/a.nii.gz", "h.txt"])
def test_a_result_of_other_files_is_not_there_already_and_a_copy_of_them_is(cts, tmp_path, changed):
    (tmp_path / "maps").mkdir()
    shutil.copy(tmp_path / "lungs.nii.gz", tmp_path / "maps" / "a.nii.gz")
    (tmp_path / "h.txt").write_text("1 " * 40)
    wishes, maps, file = [Wish(histogram=tmp_path / "h.txt")], tmp_path / "maps", tmp_path / changed
    assert run(cts, maps, wishes=wishes) == {"a": "done"}
    os.utime(file, (1e9, 1e9))  # copied without its time
    assert run(cts, maps, wishes=wishes) == {"a": "there already"}
    before = file.read_bytes()
    file.write_bytes(b"2 " * 40 if changed == "h.txt" else before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(file, (1e8, 1e8))  # another one of the same size, and older than the result
    with pytest.raises(ValueError, match=re.escape(OTHERWISE)):
        run(cts, maps, wishes=wishes)


def test_links_to_nothing_do_not_make_a_result_pass_for_one_that_is_asked_for(tmp_path):
    (dicom(tmp_path / "in" / "p") / ".notes").symlink_to("nowhere")
    assert run(tmp_path / "in", retries=0) == {"p": "done"}
    with pytest.raises(ValueError, match="another request"):
        run(tmp_path / "in", wishes=[Wish(seed=5)], retries=0)


def test_a_batch_says_what_it_lacks_before_it_begins(cts, tmp_path, caplog):
    maps = cts / "lungs"
    maps.mkdir()
    with pytest.raises(ValueError, match=r"lungs: no label map named a\.nii\.gz$"):
        run(cts, maps)
    shutil.copy(tmp_path / "lungs.nii.gz", maps / "a.nii.gz")  # within the data: no CT of its own
    shutil.copy(cts / "a.nii.gz", cts / "b.nii.gz")
    said = run(cts, maps)
    assert said["a"] == "done" and said["b"].endswith("no label map named b.nii.gz") and said["b"] in caplog.text
    with pytest.raises(ValueError, match="a lobe is asked for, and nothing here tells lobes"):
        run(cts, wishes=[Wish(lobe="RUL")])


def test_of_several_series_the_largest_is_taken_and_of_a_patients_folder_its_ct(cts, tmp_path, caplog):
    large, _ = dicom(cts / "study" / "1"), dicom(cts / "study" / "2")
    for file in sorted((cts / "study" / "2").iterdir()):
        data = pydicom.dcmread(file)
        data.SeriesInstanceUID = "1.2.4"
        data.save_as(file)
    next(iter(sorted((cts / "study" / "2").iterdir(), reverse=True))).unlink()
    for name in ("ct.nii.gz", "lobes.nii.gz", "segmentations/heart.nii.gz"):
        (cts / "p1" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cts / "a.nii.gz", cts / "p1" / name)
    image = sitk.ReadImage(str(cts / "a.nii.gz"))
    sitk.WriteImage(image, str(cts / "scan.mhd"))
    (cts / "a.nii.gz").unlink()
    assert run(cts) == dict.fromkeys(("p1/ct", "scan", "study"), "done")
    for words in (
        "passed over, no CT: p1/lobes.nii.gz, p1/segmentations, scan.raw",
        "the largest chest CT is taken, 1.2.3,",
    ):
        assert words in caplog.text
    np.testing.assert_array_equal(*(read_ct(p).affine for p in (tmp_path / "out" / "study" / "dicom", large)))
    assert {"ct.mha", "mask.nii.gz"} < {f.name for f in (tmp_path / "out" / "scan").iterdir()}
    assert run(cts) == dict.fromkeys(("p1/ct", "scan", "study"), "there already")
    cases = plan_cohort(cts, tmp_path / "plan.csv", Cohort("size-curve", diameters=(8, 8)))
    assert sorted(cases) == ["p1/ct", "scan", "study"]


def test_odd_folders_stop_no_batch(tmp_path, monkeypatch):
    root, listed, bad_name = tmp_path / "in", os.listdir, os.fsdecode(b"M\xfcller")
    for folder in (root / "lost+found", root / "siteA", tmp_path / "archive" / "p1"):
        folder.mkdir(parents=True)
    (tmp_path / "archive" / "p1" / "1").write_bytes(bytes(128) + b"DICM")
    (root / "siteA" / "p1").symlink_to(tmp_path / "archive" / "p1")
    (root / "self").symlink_to(root / "self")
    (root / f"{bad_name}.nii").touch()

    def denied(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(batch.os, "listdir", denied)
    found, passed = batch.find_cts(root)
    assert sorted(found) == [bad_name, "siteA/p1"] and sorted(passed) == ["lost+found", "self"]
    assert "not a readable image" in run(root)[bad_name]


def test_every_ct_of_a_folder_is_found_and_what_is_not_one_is_said(tmp_path):
    root = tmp_path / "in"
    for name in ("a.nii", "B.NII.GZ", "c.zip", "site1/ct.nii.gz", "site2/ct.nii.gz", "notes.txt", ".hidden.nii", ".nii.gz",
                 "old/record.json", "out/x/record.json", "mixed/lungs.nii", "plain/readme", "disc/IM00001", "mixed/deep/1.dcm",
                 "loop/z.nii"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(128) + b"DICM" if name in ("disc/IM00001", "mixed/deep/1.dcm") else b"")
    (root / "empty").mkdir()
    (root / "loop" / "again").symlink_to(root)
    found, passed = batch.find_cts(root, root / "out")
    assert sorted(found) == ["B", "a", "c", "disc", "loop/z", "mixed", "plain", "site1/ct", "site2/ct"]
    assert found["site1/ct"] == root / "site1" / "ct.nii.gz" and found["disc"] == root / "disc"
    assert sorted(passed) == [
        ".hidden.nii",
        ".nii.gz",
        "empty",
        "loop/again",
        "mixed/lungs.nii",
        "notes.txt",
        "old",
        "out",
    ]
    (root / "a.nii.gz").touch()
    with pytest.raises(
        ValueError, match=r"a.nii.gz and a.nii would have one result, a; rename|a.nii and a.nii.gz would"
    ):
        batch.find_cts(root)
    (root / "a.nii.gz").rename(root / "site1.nii.gz")
    with pytest.raises(ValueError, match="the result of site1/ct would lie within another's"):
        batch.find_cts(root)
