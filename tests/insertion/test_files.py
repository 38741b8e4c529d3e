"""From disk to disk: folders of results that are whole or absent, DICOM in and out, many CTs, and the command line."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

import hrldm.__main__ as cli
from hrldm.ct.volume import read_ct
from hrldm.insertion import batch, files
from hrldm.insertion import record as records
from hrldm.insertion.insert import insert
from hrldm.insertion.wish import Wish, read_plan
from tests import tiny
from tests.insertion.test_insert import LIBRARY, scan


@pytest.fixture(autouse=True)
def _small_library(monkeypatch):
    monkeypatch.setattr("hrldm.insertion.insert.load_shapes", lambda: LIBRARY)


@pytest.fixture
def nifti(tmp_path):
    ct, labels = scan()
    image = nib.Nifti1Image(ct.stored, ct.affine)
    image.header["descrip"] = b"scanner X"
    nib.save(image, tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(labels, ct.affine), tmp_path / "lungs.nii.gz")
    return tmp_path / "scan.nii.gz"


def put(path, out, *wishes, **options):
    return files.insert_file(path, out, wishes or [Wish("solid", 12.0)], tiny.PaintingGenerator(), **options)


def test_nifti_in_nifti_out_with_mask_and_record(nifti, tmp_path):
    record = put(nifti, tmp_path / "out", Wish("solid", 12.0), Wish("ground-glass", 10.0, seed=4))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["ct.nii.gz", "mask.nii.gz", "record.json"]
    before, after, mask = (
        nib.load(p) for p in (nifti, tmp_path / "out" / "ct.nii.gz", tmp_path / "out" / "mask.nii.gz")
    )
    assert before.header.binaryblock == after.header.binaryblock
    changed = np.asarray(before.dataobj) != np.asarray(after.dataobj)
    assert 0 < changed.sum() == record["voxels_changed"]
    assert (np.asarray(mask.affine) == before.affine).all() and set(np.unique(mask.dataobj)) == {0, 1, 2}
    stored = json.loads((tmp_path / "out" / "record.json").read_text())
    assert stored == record and record["lungs"] == "threshold" and len(record["nodules"]) == 2
    assert record["source"]["name"] == "scan.nii.gz" and str(tmp_path) not in json.dumps(record)


def test_the_record_makes_the_same_again(nifti, tmp_path):
    put(
        nifti,
        tmp_path / "a",
        Wish("part-solid", 14.0, core_mm=6.0),
        Wish("ground-glass", 10.0, at=(-70.0, 5.0, 10.0), seed=4),
    )
    put(nifti, tmp_path / "b", *read_plan(tmp_path / "a" / "record.json"))
    for name in ("ct.nii.gz", "mask.nii.gz"):
        first, second = (np.asarray(nib.load(tmp_path / k / name).dataobj) for k in "ab")
        np.testing.assert_array_equal(first, second)


def test_an_existing_output_is_kept_and_only_an_insertions_own_is_replaced(nifti, tmp_path):
    out = tmp_path / "out"
    put(nifti, out)
    with pytest.raises(ValueError, match="exists already"):
        put(nifti, out)
    put(nifti, out, Wish("solid", 8.0), overwrite=True)
    assert json.loads((out / "record.json").read_text())["nodules"][0]["wish"]["diameter_mm"] == 8
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a folder that an insertion wrote"):
        put(nifti, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_former_result_stays_when_the_new_one_cannot_take_its_place(nifti, tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(nifti, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    replace = files.Path.replace

    def fails(self, target):
        if target == out and not self.name.endswith("-former"):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(files.Path, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        put(nifti, out, Wish("solid", 8.0), overwrite=True)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["lungs.nii.gz", "out", "scan.nii.gz"]


class During(tiny.PaintingGenerator):
    """Does something while a nodule is made."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def __call__(self, request, **options):
        self.what()
        return super().__call__(request, **options)


WISHES = [Wish("solid", 12.0)]


def test_a_folder_that_appears_while_a_run_works_stays_and_so_does_the_work(nifti, tmp_path):
    out = tmp_path / "out"

    def appear():
        out.mkdir()
        (out / "thesis.txt").write_text("precious")

    with pytest.raises(ValueError, match=r"out: appeared or changed .* the results are in .*out-\w+$") as error:
        files.insert_file(nifti, out, WISHES, During(appear))
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
    assert (files.Path(str(error.value).rsplit(" ", 1)[1]) / "ct.nii.gz").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_put_into_a_former_result_is_not_overwritten(nifti, tmp_path):
    out = tmp_path / "out"
    put(nifti, out)
    with pytest.raises(ValueError, match="the results are in"):  # put there while the run works
        files.insert_file(nifti, out, WISHES, During(lambda: (out / "notes.txt").write_text("mine")), overwrite=True)
    with pytest.raises(ValueError, match="no insertion wrote notes.txt in it"):
        put(nifti, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and (out / "record.json").exists()


def test_a_second_run_into_a_folder_is_refused_while_the_first_works(nifti, tmp_path):
    said = []

    def second():
        with pytest.raises(ValueError, match="another run is writing it") as error:
            put(nifti, tmp_path / "out", Wish("solid", 8.0))
        said.append(error)

    files.insert_file(nifti, tmp_path / "out", WISHES, During(second))
    assert (
        said and json.loads((tmp_path / "out" / "record.json").read_text())["nodules"][0]["wish"]["diameter_mm"] == 12
    )


def test_leftovers_of_a_killed_run_are_cleared_and_its_former_result_comes_back(nifti, tmp_path):
    out = tmp_path / "out"
    put(nifti, out)
    before = (out / "record.json").read_bytes()
    out.rename(tmp_path / ".hrldm-out-former")  # killed between the two moves
    (tmp_path / ".hrldm-out").mkdir()
    (tmp_path / ".hrldm-out" / "ct.nii.gz").write_text("half")
    (tmp_path / ".hrldm-out-lock").touch()
    with pytest.raises(ValueError, match="exists already"):
        put(nifti, out)
    assert (out / "record.json").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_an_output_that_cannot_be_written_is_found_before_the_work(nifti, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    generator = tiny.PaintingGenerator()
    with pytest.raises(OSError, match="file/out: cannot be written .*; choose another folder"):
        files.insert_file(nifti, tmp_path / "file" / "out", WISHES, generator)
    with pytest.raises(OSError, match="cannot be written"):
        files.insert_file(nifti, tmp_path / ("x" * 250), WISHES, generator)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link: exists already"):
        files.insert_file(nifti, tmp_path / "link", WISHES, generator)
    with pytest.raises(ValueError, match="no such file"):
        files.insert_file(tmp_path / "absent.nii", tmp_path / "new" / "deep" / "out", WISHES, generator)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10_000))
    with pytest.raises(OSError, match=r"new/out: the results take up to \d+ MB, and its disk has 0 MB free"):
        files.insert_file(nifti, tmp_path / "new" / "out", WISHES, generator)
    assert not generator.asked and not (tmp_path / "new").exists()


def test_a_ct_and_its_results_do_not_lie_in_one_another(nifti, tmp_path):
    put(nifti, tmp_path / "out")
    for ct, out in ((tmp_path, tmp_path / "in" / "out"), (tmp_path / "out" / "ct.nii.gz", tmp_path / "out")):
        with pytest.raises(ValueError, match="cannot lie in one another; choose a folder beside"):
            put(ct, out, overwrite=True)
    assert (tmp_path / "out" / "ct.nii.gz").exists()


def test_a_failed_write_leaves_nothing(nifti, tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(files, "write_nifti", full)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        put(nifti, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def series(folder, seed=0):
    """The phantom as a DICOM series with a private tag; returns its HU."""
    ct, _ = scan(np.diag([-1.0, -1.0, 1.0]), (3.0, 3.0, 3.0))
    folder.mkdir()
    for k in range(ct.shape[2]):
        plane = sitk.GetImageFromArray(ct.array[:, :, k].T[None].astype(np.int16))
        place = (ct.affine @ [0, 0, k, 1])[:3] * [-1, -1, 1]
        plane.SetSpacing((3.0, 3.0, 3.0))
        plane.SetOrigin(place)
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3", "0010|0010": "Doe^Jane", "0008|103e": "Chest",
                "0020|0032": "\\".join(f"{v:.4f}" for v in place), "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "3",
                "0028|1052": "-1024", "0028|1053": "1", "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL"}  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(plane)
        data = pydicom.dcmread(folder / f"{k:03d}.dcm")
        data.private_block(0x0009, "VENDOR", create=True).add_new(1, "LO", "secret")
        data.save_as(folder / f"{k:03d}.dcm")
    return ct.array


@pytest.mark.parametrize("private", ["strip", "keep"])
def test_dicom_in_a_derived_series_out_that_two_readers_agree_on(tmp_path, private):
    hu = series(tmp_path / "in")
    put(tmp_path / "in", tmp_path / "out", Wish("solid", 14.0), private=private)
    out = tmp_path / "out" / "dicom"
    nifti = nib.load(tmp_path / "out" / "ct.nii.gz")
    mine, source = read_ct(out), read_ct(tmp_path / "in")
    np.testing.assert_array_equal(mine.array, np.asarray(nifti.dataobj))
    np.testing.assert_allclose(mine.affine, nifti.affine, atol=1e-3)
    np.testing.assert_allclose(mine.affine, source.affine, atol=1e-6)
    assert (mine.array != hu).any() and (mine.array == hu).mean() > 0.99
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(out)))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), mine.array)
    np.testing.assert_allclose(np.array(image.GetOrigin()) * [-1, -1, 1], mine.affine[:3, 3], atol=1e-3)
    uids = set()
    for file in sorted(out.iterdir()):
        data = pydicom.dcmread(file)
        old = pydicom.dcmread(tmp_path / "in" / f"{int(file.stem) - 1:03d}.dcm")
        values = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        np.testing.assert_array_equal(values, mine.array[:, :, int(file.stem) - 1].T)
        assert data.SeriesInstanceUID != old.SeriesInstanceUID and data.StudyInstanceUID == old.StudyInstanceUID
        assert data.SOPInstanceUID == data.file_meta.MediaStorageSOPInstanceUID != old.SOPInstanceUID
        assert data.SourceImageSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
        assert list(data.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"] and data.PatientName == old.PatientName
        assert data.SeriesDescription.startswith("SYNTHETIC NODULE, RESEARCH ONLY: Chest")
        assert ((0x0009, 0x1001) in data) is (private == "keep")
        uids.add(data.SOPInstanceUID)
    assert len(uids) == hu.shape[2] == len(list(out.iterdir()))
    assert "Doe" not in (tmp_path / "out" / "record.json").read_text()


def test_the_same_insertion_gives_the_same_series_uid(tmp_path):
    series(tmp_path / "in")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        put(tmp_path / "in", tmp_path / out, Wish("solid", 10.0, seed=seed))
    a, b, c = (pydicom.dcmread(tmp_path / out / "dicom" / "0001.dcm").SeriesInstanceUID for out in "abc")
    assert a == b != c


def test_a_folder_of_cts_goes_on_where_it_was_and_one_bad_ct_stops_no_other(nifti, tmp_path):
    source = tmp_path / "cts"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.nii.gz").write_bytes(nifti.read_bytes())
    (source / "broken.nii").write_bytes(b"no image")
    series(source / "dicom_case")
    generator = tiny.PaintingGenerator()
    wishes = [Wish("solid", 10.0)]
    said = batch.insert_folder(source, tmp_path / "out", wishes, generator)
    assert (
        said["a"] == said["b"] == said["dicom_case"] == "done" and "broken.nii: not a readable image" in said["broken"]
    )
    places = [
        json.loads((tmp_path / "out" / n / "record.json").read_text())["nodules"][0]["centre_ras_mm"] for n in "ab"
    ]
    assert places[0] != places[1]  # seeds of their own
    again = batch.insert_folder(source, tmp_path / "out", wishes, generator)
    assert again["a"] == again["dicom_case"] == "there already" and "broken" in again
    with pytest.raises(ValueError, match="no CT in it"):
        (tmp_path / "empty").mkdir()
        batch.insert_folder(tmp_path / "empty", tmp_path / "out", wishes, generator)


def test_a_batch_asked_for_otherwise_is_refused_before_anything_is_made(nifti, tmp_path):
    source, out, generator = tmp_path / "cts", tmp_path / "out", tiny.PaintingGenerator()
    source.mkdir()
    (source / "a.nii.gz").write_bytes(nifti.read_bytes())
    batch.insert_folder(source, out, WISHES, generator, retries=0)
    before = (out / "a" / "record.json").read_bytes()
    (source / "b.nii.gz").write_bytes(nifti.read_bytes())
    for wishes, options in (
        ([Wish("solid", 8.0)], {"retries": 0}),
        (WISHES, {"retries": 1}),
        (WISHES * 2, {"retries": 0}),
    ):
        with pytest.raises(
            ValueError, match=r"1 result\(s\) there were made of another request, version or file, first a; choose"
        ):
            batch.insert_folder(source, out, wishes, generator, **options)
    assert (out / "a" / "record.json").read_bytes() == before and not (out / "b").exists()
    said = batch.insert_folder(source, out, WISHES, generator, retries=0)
    assert said == {"a": "there already", "b": "done"}
    (out / "a" / "record.json").write_text("{")
    with pytest.raises(ValueError, match="another request, version or file, first a"):
        batch.insert_folder(source, out, WISHES, generator, retries=0)
    said = []

    def second():
        with pytest.raises(ValueError, match="another run is writing it"):
            batch.insert_folder(source, out, WISHES, tiny.PaintingGenerator())
        said.append(1)

    (out / "a" / "record.json").write_bytes(before)
    assert batch.insert_folder(source, out, WISHES, generator, retries=0, overwrite=True) == dict.fromkeys(
        "ab", "there already"
    )
    batch.insert_folder(source, out, WISHES, During(second), overwrite=True)
    assert said and json.loads((out / "a" / "record.json").read_text())["seeds"] == records.SEED_RULE


def test_a_result_of_other_files_is_not_there_already_and_a_copy_of_them_is(nifti, tmp_path):
    for name, source in (("cts", nifti), ("maps", tmp_path / "lungs.nii.gz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii.gz").write_bytes(source.read_bytes())
    (tmp_path / "h.txt").write_text("1 " * 40)
    call = (tmp_path / "cts", tmp_path / "out", [Wish(histogram=tmp_path / "h.txt")], tiny.PaintingGenerator())
    assert batch.insert_folder(*call, tmp_path / "maps") == {"a": "done"}
    for changed in ("cts/a.nii.gz", "maps/a.nii.gz", "h.txt"):
        file, before = tmp_path / changed, (tmp_path / changed).read_bytes()
        os.utime(file, (1e9, 1e9))  # copied without its time
        assert batch.insert_folder(*call, tmp_path / "maps") == {"a": "there already"}
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if changed != "h.txt" else b"2 " * 40)
        os.utime(file, (1e8, 1e8))  # another one of the same size, and older than the result
        with pytest.raises(ValueError, match="another request, version or file, first a"):
            batch.insert_folder(*call, tmp_path / "maps")
        file.write_bytes(before)


def test_a_batch_says_what_it_lacks_before_it_begins(nifti, tmp_path):
    source, maps = tmp_path / "cts", tmp_path / "cts" / "lungs"
    maps.mkdir(parents=True)
    (source / "a.nii.gz").write_bytes(nifti.read_bytes())
    with pytest.raises(ValueError, match=r"lungs: no label map named a\.nii\.gz"):
        batch.insert_folder(source, tmp_path / "out", WISHES, tiny.PaintingGenerator(), maps)
    shutil.copy(tmp_path / "lungs.nii.gz", maps / "a.nii.gz")  # within the data: no CT of its own
    assert batch.insert_folder(source, tmp_path / "out", WISHES, tiny.PaintingGenerator(), maps) == {"a": "done"}
    with pytest.raises(ValueError, match="a lobe is asked for, and nothing here tells lobes"):
        batch.insert_folder(source, tmp_path / "other", [Wish(lobe="RUL")], tiny.PaintingGenerator())
    with pytest.raises(ValueError, match="/: cannot be replaced"):
        batch.insert_folder(source, "/", WISHES, tiny.PaintingGenerator())


def test_links_to_nothing_do_not_make_a_result_pass_for_one_that_is_asked_for(tmp_path):
    source = tmp_path / "in"
    affine, shape = tiny.chest_grid(np.eye(3), (4.0, 4.0, 5.0))
    tiny.dicom_series(source / "p", tiny.chest(affine, shape), affine)
    (source / "p" / ".notes").symlink_to("nowhere")
    assert batch.insert_folder(source, tmp_path / "out", [Wish()], tiny.PaintingGenerator(), retries=0) == {"p": "done"}
    with pytest.raises(ValueError, match="another request"):
        batch.insert_folder(source, tmp_path / "out", [Wish(seed=5)], tiny.PaintingGenerator(), retries=0)


def test_an_empty_folder_may_be_the_output_and_a_link_is_not_replaced(nifti, tmp_path):
    (tmp_path / "made").mkdir()
    put(nifti, tmp_path / "made")
    assert (tmp_path / "made" / "record.json").exists()
    (tmp_path / "link").symlink_to(tmp_path / "made")
    with pytest.raises(ValueError, match="link: a link, so it is not overwritten; give the folder it leads to"):
        put(nifti, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "made" / "record.json").exists()
    (tmp_path / ".hrldm-made-former").symlink_to(tmp_path)  # nothing that we can clear
    with pytest.raises(OSError, match="hrldm-made-former: left by a former run, and cannot be removed"):
        put(nifti, tmp_path / "made", overwrite=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "none left"), (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "allocate memory")],
)  # fmt: skip
def test_too_little_memory_is_a_sentence_and_stops_one_ct_only(call, nifti, tmp_path, monkeypatch, error, said):
    def fails():
        raise error

    monkeypatch.setattr("hrldm.insertion.released.released", lambda **changes: During(fails))
    (tmp_path / "cts").mkdir()
    shutil.copy(nifti, tmp_path / "cts" / "a.nii.gz")
    status, _, out = call("insert", nifti, tmp_path / "out")
    assert status == 2 and said in out and out.endswith("free some, or --device cpu\n")
    status, out, _ = call("batch", tmp_path / "cts", tmp_path / "out")
    assert status == 1 and "a: " in out and said in out


def test_a_fault_of_ours_stays_one(nifti, tmp_path):
    def fails():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        files.insert_file(nifti, tmp_path / "out", WISHES, During(fails))


def test_what_needs_the_imposed_histogram_is_refused_before_the_lungs(nifti, tmp_path):
    unaided = tiny.PaintingGenerator()
    unaided.sampling = tiny.profile().sampling
    core = [Wish("part-solid", 14.0, core_mm=6.0)]
    with pytest.raises(ValueError, match="solid core is made by imposing"):
        files.insert_file(nifti, tmp_path / "out", core, unaided, lungs="absent.nii")


def test_another_algorithm_is_named_in_the_record(nifti, tmp_path):
    def otherwise(*arguments):
        return insert(*arguments)

    options = {"lungs": tmp_path / "lungs.nii.gz", "algorithm": otherwise}
    record = files.insert_file(nifti, tmp_path / "a", WISHES, tiny.PaintingGenerator(), **options)
    assert record["algorithm"] == "otherwise"


def test_a_record_made_otherwise_is_said(nifti, tmp_path):
    generator = tiny.PaintingGenerator()
    files.insert_file(nifti, tmp_path / "a", WISHES, generator, lungs=tmp_path / "lungs.nii.gz", retries=0)
    record = tmp_path / "a" / "record.json"
    same = {"lungs": shutil.copy(tmp_path / "lungs.nii.gz", tmp_path / "copy.nii.gz"), "retries": 0}
    copy = shutil.copy(nifti, tmp_path / "elsewhere.nii.gz")
    assert records.told_apart(record, copy, WISHES, generator, **same) == []
    assert records.told_apart(record, copy, WISHES, generator, **same | {"retries": 2}) == [
        "options retries: 0 there, 2 here"
    ]
    assert records.told_apart(record, copy, WISHES, generator, retries=0) == [
        "options lungs_given: True there, False here"
    ]
    other = records.told_apart(record, tmp_path / "lungs.nii.gz", WISHES, generator, lungs=nifti, retries=0)
    assert [f.split(":")[0] for f in other] == ["files ct", "files lungs"]
    generator.sampling = tiny.profile(sampling__match_t_max=300, sampling__steps=7).sampling
    assert [f.split(":")[0] for f in records.told_apart(record, copy, WISHES, generator, **same)] == ["sampling steps"]


def test_odd_folders_stop_no_batch(tmp_path, monkeypatch):
    root = tmp_path / "in"
    for name in ("lost+found", "siteA", "archive/p1"):
        (root / name if name != "archive/p1" else tmp_path / name).mkdir(parents=True)
    (tmp_path / "archive" / "p1" / "1").write_bytes(bytes(128) + b"DICM")
    (root / "siteA" / "p1").symlink_to(tmp_path / "archive" / "p1")
    (root / "self").symlink_to(root / "self")
    (root / os.fsdecode(b"M\xfcller.nii")).touch()
    listed = os.listdir

    def denied(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(files.os, "listdir", denied)
    found, passed = batch.find_cts(root)
    assert sorted(found) == [os.fsdecode(b"M\xfcller"), "siteA/p1"] and sorted(passed) == ["lost+found", "self"]
    said = batch.insert_folder(root, tmp_path / "out", WISHES, tiny.PaintingGenerator())
    assert "not a readable image" in said[os.fsdecode(b"M\xfcller")]


def test_every_ct_of_a_folder_is_found_and_what_is_not_one_is_said(tmp_path):
    root = tmp_path / "in"
    for name in ("a.nii", "B.NII.GZ", "c.zip", "site1/ct.nii.gz", "site2/ct.nii.gz", "notes.txt", ".hidden.nii", ".nii.gz",
                 "old/record.json", "out/x/record.json", "mixed/lungs.nii", "plain/readme"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in ("disc/IM00001", "mixed/deep/1.dcm"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(128) + b"DICM")
    (root / "empty").mkdir()
    (root / "loop").mkdir()
    (root / "loop" / "again").symlink_to(root)
    (root / "loop" / "z.nii").touch()
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


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setattr("hrldm.insertion.released.released", lambda **changes: tiny.PaintingGenerator())

    def _call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hrldm", *map(str, arguments)])
        status = cli.main()
        return status, *capsys.readouterr()

    return _call


def test_command_line_inserts_and_says_what_came(call, nifti, tmp_path):
    status, out, _ = call(
        "insert", nifti, tmp_path / "o", "--subtype", "part-solid", "--diameter", 12, "--count", 2, "--seed", 7
    )
    assert status == 0 and "part-solid 12 mm" in out and out.count("requested") == 2
    record = json.loads((tmp_path / "o" / "record.json").read_text())
    assert len(record["nodules"]) == 2 and record["sampling"]["grain"] is False
    (tmp_path / "plan.csv").write_text("subtype,diameter_mm\nsolid,9\n")
    assert call("insert", nifti, tmp_path / "p", "--plan", tmp_path / "plan.csv")[0] == 0
    source = tmp_path / "cts"
    source.mkdir()
    (source / "a.nii.gz").write_bytes(nifti.read_bytes())
    status, out, _ = call("batch", source, tmp_path / "many")
    assert status == 0 and out.strip() == "a: done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diameter", "50"], "diameter 50 mm: nodules have 6 to 30 mm"),
        (["--at", "1,2"], "three numbers"),
        (["--at", "here"], "--at 'here'"),
        (["--at", "500,0,0"], "would leave the lungs; the nearest place"),
        (["--lobe", "RUL"], "nothing here tells lobes; give a TotalSegmentator map (--lungs)"),
        (["--histogram", "absent.txt"], "absent.txt: not a histogram"),
        (["--lungs", "absent.nii.gz"], "absent.nii.gz: no such file"),
        (["--count", "0"], "count must be at least 1"),
        (["--retries", "-1"], "--retries -1: give 0 to 100"),
    ],
)
def test_wrong_arguments_end_with_a_sentence_and_no_output(call, nifti, tmp_path, arguments, message):
    status, _, error = call("insert", nifti, tmp_path / "o", *arguments)
    assert status == 2 and error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_hints_name_the_options_of_the_command_line(call, nifti, tmp_path):
    status, _, error = call("insert", nifti, tmp_path)
    assert status == 2 and "ask to overwrite it (--overwrite)" in error
    assert cli._as_options("leave out on=cuda; give lungs=... or a/lungs=3/b") == (
        "leave out --device cuda; give --lungs or a/lungs=3/b"
    )


def test_an_interrupted_run_ends_with_a_sentence_and_leaves_nothing(call, nifti, tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("hrldm.insertion.released.released", lambda **changes: During(interrupted))
    before = sorted(tmp_path.iterdir())
    status, _, error = call("insert", nifti, tmp_path / "new" / "o")
    assert status == 130 and error.startswith("interrupted") and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


# -- what a DICOM series can hold ----------------------------------------------------------------------------------------


def sharp() -> tuple[np.ndarray, np.ndarray]:
    """A chest with the noise of a sharp kernel, which reaches below the least value that most scanners store."""
    ct, _ = scan(np.diag([-1.0, -1.0, 1.0]), (3.5, 3.5, 3.5))
    return ct.array + np.random.default_rng(1).normal(0, 110, ct.shape), ct.affine


@pytest.mark.parametrize(
    "kind",
    [
        {"signed": False, "bits": 12, "inter": -1024.0},
        {"signed": False, "bits": 16, "inter": -1000.0},
        {"signed": False, "bits": 12, "inter": -1024.0, "slope": 2.0},
        {"signed": True, "bits": 12, "inter": 1024.0},
        {"signed": False, "bits": 8, "allocated": 8, "slope": 10.0, "inter": -1020.0},
    ],
)
def test_air_clipped_at_the_least_storable_value_is_written_and_alike_in_both_formats(tmp_path, kind):
    source = tiny.dicom_series(tmp_path / "in", *sharp(), **kind)
    before = read_ct(source)
    least = before.levels.base + before.levels.step * before.levels.low
    assert (before.array == least).mean() > 0.05
    for seed in range(3):
        record = put(source, tmp_path / f"out{seed}", Wish("ground-glass", 14.0, seed=seed))
        after = read_ct(tmp_path / f"out{seed}" / "dicom")
        np.testing.assert_array_equal(after.array, np.asarray(nib.load(tmp_path / f"out{seed}" / "ct.nii.gz").dataobj))
        assert (after.array != before.array).sum() == record["voxels_changed"] > 30 and after.array.min() == least
        np.testing.assert_array_equal(after.affine, before.affine)


def test_a_series_that_no_other_can_be_derived_from_is_said_before_the_work_and_nifti_alone_works(call, tmp_path):
    source = tiny.dicom_series(tmp_path / "in", *sharp(), syntax=pydicom.uid.ExplicitVRBigEndian)
    generator = tiny.PaintingGenerator()
    with pytest.raises(ValueError, match="in: 0000.dcm cannot be derived from .*format='nifti'"):
        files.insert_file(source, tmp_path / "out", [Wish()], generator)
    assert not generator.asked and not (tmp_path / "out").exists()
    status, _, error = call("insert", source, tmp_path / "out")
    assert status == 2 and "--format nifti" in error and not (tmp_path / "out").exists()
    status, _, error = call("insert", source, tmp_path / "out", "--format", "nifti")
    assert status == 0, error
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["ct.nii.gz", "mask.nii.gz", "record.json"]
    assert call("batch", tmp_path, tmp_path / "many", "--format", "nifti")[1].strip().endswith("in: done")
    with pytest.raises(ValueError, match="format: choose same or nifti, not 'dicom'"):
        put(source, tmp_path / "other", format="dicom")


def test_the_record_says_which_numbers_the_lobes_were_read_in(nifti, tmp_path):
    ct, labels = scan()
    x = (ct.affine[0, 0] * np.arange(ct.shape[0]) + ct.affine[0, 3])[:, None, None]
    lobes = np.where(labels > 0, np.where(x > 0, 17, 14), 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(lobes, ct.affine), tmp_path / "v1.nii.gz")
    record = put(nifti, tmp_path / "out", Wish(lobe="RLL"), lungs=tmp_path / "v1.nii.gz")
    assert record["lungs"] == "v1.nii.gz (TotalSegmentator v1 numbers)"
    assert record["nodules"][0]["lobe"] == "RLL" and record["nodules"][0]["centre_ras_mm"][0] > 0
