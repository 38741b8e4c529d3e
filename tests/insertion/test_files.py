"""From disk to disk: folders of results that are whole or absent, NIfTI and DICOM in and out, and the record."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from hrldm.ct.volume import read_ct
from hrldm.insertion import files
from hrldm.insertion.insert import insert
from hrldm.insertion.plans import read_plan
from hrldm.insertion.record import asked_for, inputs, made_of, told_apart
from hrldm.insertion.wish import Wish
from tests import tiny
from tests.insertion.chests import During, failing, places, save, scan

WISHES = [Wish("solid", 12.0)]


def put(path, out, *wishes, generator=None, **options):
    return files.insert_file(path, out, wishes or WISHES, generator or tiny.PaintingGenerator(), **options)


def recorded(out):
    return json.loads((out / "record.json").read_text())


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def voxels(file):
    return np.asarray(nib.load(file).dataobj)


def test_nifti_in_nifti_out_with_mask_and_record(nifti, tmp_path):
    out = tmp_path / "out"
    record = put(nifti, out, Wish("solid", 12.0), Wish("ground-glass", 10.0, seed=4))
    masks = ["mask-1.nii.gz", "mask-2.nii.gz", "mask.nii.gz"]
    assert names(out) == ["ct.nii.gz", *masks, "preview.png", "record.json"]
    before, after, mask = (nib.load(p) for p in (nifti, out / "ct.nii.gz", out / "mask.nii.gz"))
    assert before.header.binaryblock == after.header.binaryblock
    assert 0 < (np.asarray(before.dataobj) != np.asarray(after.dataobj)).sum() == record["voxels_changed"]
    assert (mask.affine == before.affine).all() and set(np.unique(mask.dataobj)) == {0, 1, 2}
    assert recorded(out) == record and record["lungs"] == "threshold" and len(record["nodules"]) == 2
    assert record["source"]["name"] == "scan.nii.gz" and str(tmp_path) not in json.dumps(record)


def test_the_record_says_which_numbers_the_lobes_were_read_in(nifti, chest, tmp_path):
    ct, labels = chest
    right = places(ct.affine, ct.shape)[..., 0] > 0
    v1 = save(tmp_path / "v1.nii.gz", np.where(labels > 0, np.where(right, 17, 14), 0).astype(np.uint8), ct.affine)
    record = put(nifti, tmp_path / "out", Wish(lobe="RLL"), lungs=v1)
    assert record["lungs"] == "v1.nii.gz (TotalSegmentator v1 numbers)"
    assert record["nodules"][0]["lobe"] == "RLL" and record["nodules"][0]["centre_ras_mm"][0] > 0


def test_another_algorithm_is_named_in_the_record(nifti, tmp_path):
    def otherwise(*arguments, **how):
        return insert(*arguments, **how)

    record = put(nifti, tmp_path / "a", lungs=tmp_path / "lungs.nii.gz", algorithm=otherwise)
    assert record["algorithm"] == "otherwise"


def test_a_record_made_otherwise_is_said(nifti, tmp_path):
    generator, lungs = tiny.PaintingGenerator(), tmp_path / "lungs.nii.gz"
    put(nifti, tmp_path / "a", generator=generator, lungs=lungs, retries=0)
    copies = [shutil.copy(file, tmp_path / f"copy of {file.name}") for file in (nifti, lungs)]

    def apart(ct, lungs, retries=0):
        return told_apart(tmp_path / "a" / "record.json", ct, WISHES, generator, lungs=lungs, retries=retries)

    assert apart(*copies) == []
    assert apart(*copies, retries=2) == ["options retries: 0 there, 2 here"]
    assert apart(nifti, None) == ["options lungs_given: True there, False here"]
    assert [said.split(":")[0] for said in apart(lungs, nifti)] == ["files ct", "files lungs"]
    generator.sampling = tiny.profile(sampling__match_t_max=300, sampling__steps=7).sampling
    assert [said.split(":")[0] for said in apart(*copies)] == ["sampling steps"]


def test_the_record_of_an_earlier_version_is_read_and_what_is_new_is_said(nifti, tmp_path):
    """Before the scan's noise was measured, grain was a setting of the sampling, and matching no option."""
    generator = tiny.PaintingGenerator()
    record = put(nifti, tmp_path / "a", generator=generator, retries=0)
    for name in ("matching", "grain"):
        del record["options"][name]
    record["sampling"]["grain"] = True
    for nodule in record["nodules"]:
        del nodule["scan"]
        nodule["quality"]["fill"] = 1.0
    (tmp_path / "a" / "record.json").write_text(json.dumps(record))
    assert read_plan(tmp_path / "a" / "record.json") == WISHES
    assert told_apart(tmp_path / "a" / "record.json", nifti, WISHES, generator, retries=0) == [
        "options matching: None there, True here", "options grain: None there, True here",
    ]  # fmt: skip
    asked, given = asked_for(generator, retries=0), inputs(nifti, WISHES)
    assert made_of(tmp_path / "a", WISHES, asked, given) is False  # a batch does not take it for its own


# -- what may be written, and when ---------------------------------------------------------------------------------------


def result(folder):
    """As an insertion writes one."""
    for name in ("ct.nii.gz", "record.json", "dicom/0001.dcm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "overwrite", "said"),
    [
        ("absent", False, None),
        ("empty", False, None),  # a job script made it
        ("result", False, r"exists already.*overwrite=True"),
        ("result", True, None),
        ("noted", True, "no insertion wrote notes.txt in it"),
        ("thesis", True, "not a folder that an insertion wrote"),
        ("file", True, "not a folder that an insertion wrote"),
        ("link", True, "a link, so it is not overwritten; give the folder it leads to"),
        ("dangling", False, "exists already"),
    ],
)
def test_only_an_insertions_own_result_is_replaced_and_only_if_asked(tmp_path, name, overwrite, said):
    for folder in ("empty", "thesis"):
        (tmp_path / folder).mkdir()
    for folder in ("result", "noted"):
        result(tmp_path / folder)
    for file in ("noted/notes.txt", "thesis/chapter.txt", "file"):
        (tmp_path / file).touch()
    (tmp_path / "link").symlink_to(tmp_path / "result")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{name}: {said}") if said else contextlib.nullcontext():
        files.check_output(tmp_path / name, overwrite)


def test_a_result_is_kept_or_replaced_as_asked(nifti, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    put(nifti, out)
    with pytest.raises(ValueError, match="exists already"):
        put(nifti, out, Wish("solid", 8.0))
    assert recorded(out)["nodules"][0]["wish"]["diameter_mm"] == 12
    put(nifti, out, Wish("solid", 8.0), overwrite=True)
    assert recorded(out)["nodules"][0]["wish"]["diameter_mm"] == 8
    (tmp_path / ".hrldm-out-former").symlink_to(tmp_path)  # nothing that we can clear
    with pytest.raises(OSError, match="hrldm-out-former: left by a former run, and cannot be removed"):
        put(nifti, out, overwrite=True)


def test_a_former_result_stays_when_the_new_one_cannot_take_its_place(nifti, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", files.Path.replace
    result(out)
    (out / "record.json").write_text("the former")

    def fails(self, target):
        if target == out and not self.name.endswith("-former"):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(files.Path, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        put(nifti, out, Wish("solid", 8.0), overwrite=True)
    assert (out / "record.json").read_text() == "the former"
    assert names(tmp_path) == ["lungs.nii.gz", "out", "scan.nii.gz"]


def test_a_folder_that_appears_while_a_run_works_stays_and_so_does_the_work(nifti, tmp_path):
    out = tmp_path / "out"

    def appear():
        out.mkdir()
        (out / "thesis.txt").write_text("precious")

    with pytest.raises(ValueError, match=r"out: appeared or changed .* the results are in .*out-\w+$") as error:
        put(nifti, out, generator=During(appear))
    assert names(out) == ["thesis.txt"] and not list(tmp_path.glob(".*"))
    assert (files.Path(str(error.value).rsplit(" ", 1)[1]) / "ct.nii.gz").exists()


def test_what_is_put_into_a_former_result_while_a_run_works_is_not_overwritten(nifti, tmp_path):
    out = tmp_path / "out"
    result(out)
    with pytest.raises(ValueError, match="the results are in"):
        put(nifti, out, generator=During(lambda: (out / "notes.txt").write_text("mine")), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and (out / "record.json").exists()


def test_a_second_run_into_a_folder_is_refused_while_the_first_works(nifti, tmp_path):
    said = []

    def second():
        with pytest.raises(ValueError, match="another run is writing it") as error:
            put(nifti, tmp_path / "out", Wish("solid", 8.0))
        said.append(error)

    put(nifti, tmp_path / "out", generator=During(second))
    assert said and recorded(tmp_path / "out")["nodules"][0]["wish"]["diameter_mm"] == 12


def test_leftovers_of_a_killed_run_are_cleared_and_its_former_result_comes_back(nifti, tmp_path):
    out = tmp_path / "out"
    result(tmp_path / ".hrldm-out-former")  # killed between the two moves
    result(tmp_path / ".hrldm-out")
    (tmp_path / ".hrldm-out-lock").touch()
    with pytest.raises(ValueError, match="exists already"):
        put(nifti, out)
    assert (out / "record.json").exists() and not list(tmp_path.glob(".*"))


def test_an_output_that_cannot_be_written_is_found_before_the_work(nifti, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    generator = tiny.PaintingGenerator()
    for ct, out, error, said in (
        (nifti, "file/out", OSError, "file/out: cannot be written .*; choose another folder"),
        (nifti, "x" * 250, OSError, "cannot be written"),
        (tmp_path / "absent.nii", "new/deep/out", ValueError, "no such file"),
    ):
        with pytest.raises(error, match=said):
            put(ct, tmp_path / out, generator=generator)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10_000))
    with pytest.raises(OSError, match=r"new/out: needs up to \d+ MB, and its disk has 0 MB free"):
        put(nifti, tmp_path / "new" / "out", generator=generator)
    assert not generator.asked and not (tmp_path / "new").exists()


def test_a_ct_and_its_results_do_not_lie_in_one_another(nifti, tmp_path):
    result(tmp_path / "out")
    for ct, out in ((tmp_path, tmp_path / "in" / "out"), (tmp_path / "out" / "ct.nii.gz", tmp_path / "out")):
        with pytest.raises(ValueError, match="cannot lie in one another; choose a folder beside"):
            put(ct, out, overwrite=True)
    assert (tmp_path / "out" / "ct.nii.gz").exists()


def test_a_failed_write_leaves_nothing(nifti, tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(files, "write_nifti", full)
    with pytest.raises(OSError, match="No space left"):
        put(nifti, tmp_path / "out")
    assert names(tmp_path) == ["lungs.nii.gz", "scan.nii.gz"]


def test_a_fault_of_ours_stays_one(nifti, tmp_path):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        put(nifti, tmp_path / "out", generator=failing(RuntimeError("shapes do not fit")))


def test_a_core_is_marked_in_a_file_that_a_wish_takes_and_its_quality_is_that_of_the_files(nifti, tmp_path):
    wish = Wish("part-solid", 16.0, core_mm=8.0)
    record = put(nifti, tmp_path / "a", wish, lungs=tmp_path / "lungs.nii.gz")["nodules"][0]
    ct, mask, parts = (
        np.asarray(nib.load(tmp_path / "a" / f"{name}.nii.gz").dataobj) for name in ("ct", "mask", "core")
    )
    assert set(np.unique(parts)) == {0, 1, 2} and ((parts > 0) == (mask > 0)).all()
    quality = record["quality"]
    assert ct[mask == 1].mean() == pytest.approx(quality["obtained_mean_hu"], abs=0.01)
    assert ct[parts == 2].mean() == pytest.approx(quality["core_mean_hu"], abs=0.01)
    assert quality["core_mean_hu"] > quality["rim_mean_hu"] and quality["mean_error_hu"] < 3 and quality["jsd"] < 0.012
    again = Wish("part-solid", mask=tmp_path / "a" / "core.nii.gz")
    other = put(nifti, tmp_path / "b", again, lungs=tmp_path / "lungs.nii.gz")["nodules"][0]
    assert other["volume_mm3"] == pytest.approx(record["volume_mm3"], rel=0.1)
    assert other["core_mm3"] == pytest.approx(record["core_mm3"], rel=0.3)  # of 14 voxels
    put(nifti, tmp_path / "c", Wish("solid", 10.0), lungs=tmp_path / "lungs.nii.gz")
    assert not (tmp_path / "c" / "core.nii.gz").exists()


@pytest.mark.parametrize(
    ("name", "format", "ending"), [("a.mha", "same", "mha"), ("a.nrrd", "same", "nrrd"), ("a.mhd", "nifti", "nii.gz")]
)
def test_other_formats_in_and_out(nifti, tmp_path, name, format, ending):
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(tmp_path / name))
    record = put(tmp_path / name, tmp_path / "out", Wish("solid", 4.0), format=format)
    assert names(tmp_path / "out") == [f"ct.{ending}", "mask.nii.gz", "preview.png", "record.json"]
    before, after = (sitk.ReadImage(str(p)) for p in (tmp_path / name, tmp_path / "out" / f"ct.{ending}"))
    changed = (sitk.GetArrayFromImage(before) != sitk.GetArrayFromImage(after)).transpose(2, 1, 0)
    assert 0 < changed.sum() == record["voxels_changed"] < 500
    assert changed[voxels(tmp_path / "out" / "mask.nii.gz") > 0].any()
    np.testing.assert_allclose(before.GetDirection(), after.GetDirection(), atol=1e-6)
    put(tmp_path / name, tmp_path / "out", format=format, overwrite=True)  # knows its own


def test_a_padded_scan_keeps_its_padding(nifti, tmp_path):
    image = nib.load(nifti)
    hu = np.asarray(image.dataobj).copy()
    hu[:3] = hu[:, :, :1] = -32768
    nib.save(nib.Nifti1Image(hu, image.affine), tmp_path / "a.nii.gz")
    record = put(tmp_path / "a.nii.gz", tmp_path / "out", Wish("solid", 12.0, location="subpleural"))
    after = voxels(tmp_path / "out" / "ct.nii.gz")
    np.testing.assert_array_equal(after == -32768, hu == -32768)
    assert (after != hu).sum() == record["voxels_changed"]


# -- DICOM ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path):
    """The chest as a DICOM series of a patient, with a private tag."""
    ct, _ = scan(np.diag([-1.0, -1.0, 1.0]), (3.0, 3.0, 3.0))
    folder = tiny.dicom_series(tmp_path / "in", ct.array, ct.affine)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.PatientName = "Doe^Jane"
        data.private_block(0x0009, "VENDOR", create=True).add_new(1, "LO", "secret")
        data.save_as(file)
    return folder


@pytest.mark.parametrize("private", ["strip", "keep"])
def test_dicom_in_a_derived_series_out_that_two_readers_agree_on(series, tmp_path, private):
    put(series, tmp_path / "out", Wish("solid", 14.0), private=private)
    folder, nifti = tmp_path / "out" / "dicom", nib.load(tmp_path / "out" / "ct.nii.gz")
    mine, source = read_ct(folder), read_ct(series)
    np.testing.assert_array_equal(mine.array, np.asarray(nifti.dataobj))
    np.testing.assert_allclose(mine.affine, nifti.affine, atol=1e-3)
    np.testing.assert_allclose(mine.affine, source.affine, atol=1e-6)
    assert 0.99 < (mine.array == source.array).mean() < 1
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), mine.array)
    np.testing.assert_allclose(np.array(image.GetOrigin()) * [-1, -1, 1], mine.affine[:3, 3], atol=1e-3)
    assert len(names(folder)) == mine.shape[2]
    for k, (file, before) in enumerate(zip(sorted(folder.iterdir()), sorted(series.iterdir()), strict=True)):
        data, old = pydicom.dcmread(file), pydicom.dcmread(before)
        values = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        np.testing.assert_array_equal(values, mine.array[:, :, k].T)
        assert data.SourceImageSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID != data.SOPInstanceUID
        assert data.PatientName == old.PatientName and ((0x0009, 0x1001) in data) is (private == "keep")
    assert "Doe" not in (tmp_path / "out" / "record.json").read_text()


def test_the_mask_is_also_written_as_dicom_seg_where_asked_for(series, tmp_path):
    hd = pytest.importorskip("highdicom")
    record = put(series, tmp_path / "out", Wish("part-solid", 14.0, core_mm=8.0), seg=True)
    assert record["options"]["seg"] is True and "seg.dcm" in names(tmp_path / "out")
    seg = hd.seg.segread(tmp_path / "out" / "seg.dcm")
    parts = voxels(tmp_path / "out" / "core.nii.gz")
    mm3 = seg.get_volume(allow_missing_positions=True).array.sum((0, 1, 2))
    assert mm3.tolist() == [(parts > 0).sum(), (parts == 2).sum()]
    derived = {pydicom.dcmread(f).SOPInstanceUID for f in (tmp_path / "out" / "dicom").iterdir()}
    assert {i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence} <= derived
    put(series, tmp_path / "out", overwrite=True)
    assert "seg.dcm" not in names(tmp_path / "out")


def test_a_segmentation_without_a_series_for_it_is_refused_or_said(nifti, tmp_path, caplog):
    with pytest.raises(ValueError, match="leave out seg=True"):
        put(nifti, tmp_path / "out", seg=True, format="nifti")
    put(nifti, tmp_path / "out", seg=True)
    assert "no DICOM series, so no DICOM SEG is written" in caplog.text and "seg.dcm" not in names(tmp_path / "out")


def test_the_same_insertion_gives_the_same_series_uid(series, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        put(series, tmp_path / out, Wish("solid", 10.0, seed=seed))
    a, b, c = (pydicom.dcmread(tmp_path / out / "dicom" / "0001.dcm").SeriesInstanceUID for out in "abc")
    assert a == b != c


@pytest.fixture
def sharp():
    """HU and affine of a chest with the noise of a sharp kernel, which reaches below the least value of most scanners."""
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
def test_air_clipped_at_the_least_storable_value_is_written_and_alike_in_both_formats(sharp, tmp_path, kind):
    source = tiny.dicom_series(tmp_path / "in", *sharp, **kind)
    before = read_ct(source)
    least = before.levels.base + before.levels.step * before.levels.low
    assert (before.array == least).mean() > 0.05
    record = put(source, tmp_path / "out", *(Wish("ground-glass", 14.0, seed=seed) for seed in range(3)))
    after = read_ct(tmp_path / "out" / "dicom")
    np.testing.assert_array_equal(after.array, voxels(tmp_path / "out" / "ct.nii.gz"))
    assert (after.array != before.array).sum() == record["voxels_changed"] > 90 and after.array.min() == least
    np.testing.assert_array_equal(after.affine, before.affine)


def test_a_series_that_no_other_can_be_derived_from_is_said_before_the_work_and_nifti_alone_works(
    sharp, call, tmp_path
):
    source, generator = tmp_path / "in", tiny.PaintingGenerator()
    tiny.dicom_series(source, *sharp, syntax=pydicom.uid.ExplicitVRBigEndian)
    with pytest.raises(ValueError, match="in: 0000.dcm cannot be derived from .*format='nifti'"):
        put(source, tmp_path / "out", generator=generator)
    assert not generator.asked and not (tmp_path / "out").exists()
    status, _, error = call("insert", source, tmp_path / "out")
    assert status == 2 and "--format nifti" in error and not (tmp_path / "out").exists()
    assert call("insert", source, tmp_path / "out", "--format", "nifti")[0] == 0
    assert names(tmp_path / "out") == ["ct.nii.gz", "mask.nii.gz", "preview.png", "record.json"]
    assert call("batch", tmp_path, tmp_path / "many", "--format", "nifti")[1].strip().endswith("in: done")
    with pytest.raises(ValueError, match="format: choose same or nifti, not 'dicom'"):
        put(source, tmp_path / "other", format="dicom")
