"""Every bad CT and every bad manifest is refused with file, fault and remedy, and nothing is written.

`refused` is the common assertion; each case names the words its message must hold. Manifest rows are in test_manifest.py.
"""

import errno
import gzip
import resource
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from hrldm.ct.nifti import open_nifti
from hrldm.ct.volume import CT, read_ct, write_nifti
from hrldm.nodules.manifest import load_manifest, write_manifest


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextmanager
def refused(folder: Path, *words: str):
    """The block raises a ValueError holding `words` and changes no file in `folder`."""
    before = listing(folder)
    with pytest.raises(ValueError) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert listing(folder) == before


def lung(shape=(24, 24, 24), dtype=np.int16):
    return np.random.default_rng(0).integers(-1000, 300, shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine=None, **header) -> Path:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    image.to_filename(path)
    return path


# -- NIfTI -------------------------------------------------------------------------------------------------------------


def with_nan(array):
    array = array.astype(np.float32)
    array[0, 0, :2] = np.nan, np.inf
    return array


VOXELS = {
    "constant": (np.full((24, 24, 24), -1000, np.int16), ("every voxel is -1000", "convert it again")),
    "nan": (with_nan(lung()), ("2 voxels are NaN or infinite", "replace them")),
    "mask": ((lung() > 0).astype(np.uint8), ("not a chest CT in HU", "a mask", "give the CT in HU")),
    "normalised": (lung().astype(np.float32) / 1000, ("not a chest CT in HU", "normalised", "give the CT in HU")),
    "without intercept": (lung() + np.int16(1024), ("values 24..1323", "without their intercept", "give the CT in HU")),
    "mri": (np.abs(lung()), ("another modality", "give the CT in HU")),
    "beyond HU": (lung().astype(np.float32) * 100, ("beyond HU", "apply the rescale")),
    "wrapped to unsigned": (lung().astype(np.uint16), ("beyond HU", "apply the rescale")),
    "2D": (lung((24, 24)), ("shape (24, 24) is not one 3D volume", "save a single volume")),
    "4D": (lung((24, 24, 24, 2)), ("shape (24, 24, 24, 2) is not one 3D volume", "save a single volume")),
    "few slices": (lung((24, 24, 19)), ("19 slices", "at least 20", "give the full series")),
}  # fmt: skip


@pytest.mark.parametrize("case", VOXELS)
def test_voxels_that_are_no_ct(tmp_path, case):
    array, words = VOXELS[case]
    save(tmp_path / "bad.nii.gz", array)
    with refused(tmp_path, "bad.nii.gz", *words):
        read_ct(tmp_path / "bad.nii.gz")


def sheared():
    affine = np.eye(4)
    affine[1, 2] = 0.3
    return affine


GEOMETRY = {
    "singular": (np.diag([1.0, 1.0, 0.0, 1.0]), {}, ("affine is not invertible", "convert from the DICOM")),
    "parallel axes": (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), {}, ("affine is not invertible",)),
    "missing": (None, {"sform_code": 0, "qform_code": 0}, ("no affine", "convert from the DICOM")),
    "sheared": (sheared(), {}, ("sheared affine", "resample to a straight grid")),
    "metres": (np.diag([1e-3, 1e-3, 1e-3, 1]), {}, ("voxels of 0.001", "in mm?")),
    "declared in metres": (None, {"xyzt_units": 1}, ("lengths in meter", "save it in mm")),
    "nan": (None, {"srow_x": [np.nan, 0, 0, 0]}, ("affine is not invertible",)),
    "two affines": (None, {"qform_code": 1, "sform_code": 1, "qoffset_x": 30.0}, ("sform and qform disagree by 30.0 mm", "keep the right one")),
}  # fmt: skip


@pytest.mark.parametrize("case", GEOMETRY)
def test_geometry_that_cannot_be_trusted(tmp_path, case):
    affine, header, words = GEOMETRY[case]
    image = nib.Nifti1Image(lung(), np.eye(4))
    image.header.set_qform(np.eye(4), code=0)
    image.header.set_sform(np.eye(4) if affine is None else affine, code=2)
    for key, value in header.items():
        image.header[key] = value
    raw = bytearray(image.header.binaryblock) + b"\0" * 4 + image.get_fdata().astype(np.int16).tobytes(order="F")
    raw[108:112] = np.float32(352).tobytes()  # vox_offset; written by hand, since nibabel would mend the header
    raw[344:348] = b"n+1\0"
    (tmp_path / "odd.nii").write_bytes(raw)
    with refused(tmp_path, "odd.nii", *words):
        read_ct(tmp_path / "odd.nii")


def test_files_that_cannot_be_read(tmp_path):
    with refused(tmp_path, "absent.nii.gz", "no such file", "check the path"):
        read_ct(tmp_path / "absent.nii.gz")
    (tmp_path / "folder").mkdir()
    with refused(tmp_path, str(tmp_path / "folder"), "a folder where one NIfTI file is needed", "--ml"):
        open_nifti(tmp_path / "folder")
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"hello"))
    with refused(tmp_path, "text.nii.gz", "not a readable image", "give .nii"):
        read_ct(tmp_path / "text.nii.gz")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG....")
    with refused(tmp_path, "picture.png", "not a readable image", "DICOM folder"):
        read_ct(tmp_path / "picture.png")
    nib.save(nib.MGHImage(lung(), np.eye(4)), tmp_path / "brain.mgz")
    with refused(tmp_path, "brain.mgz", "MGHImage instead of NIfTI", "convert it"):
        read_ct(tmp_path / "brain.mgz")
    whole = save(tmp_path / "whole.nii.gz", lung())
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with refused(tmp_path, "cut.nii.gz", "damaged or cut short", "download it again"):
        read_ct(tmp_path / "cut.nii.gz")
    colour = np.zeros((24, 24, 24), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with refused(save(tmp_path / "rgb.nii", colour).parent, "rgb.nii", "not a CT", "one real number"):
        read_ct(tmp_path / "rgb.nii")


# -- DICOM -------------------------------------------------------------------------------------------------------------


def series(folder: Path, n=24, uid="1.2.3", step=2.0, shift=0.0) -> list[Path]:
    """An uncompressed CT series written by pydicom; `shift` moves each slice in plane (mm) as a tilted gantry does."""
    folder.mkdir(exist_ok=True)
    files = []
    for k in range(n):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        file = folder / f"{uid}-{k:03d}.dcm"
        d = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID, uid
        d.Modality, d.PatientID, d.SeriesDescription = "CT", "P1", f"chest {uid}"
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, shift * k, step * k], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing, d.SliceThickness, d.Rows, d.Columns = [0.7, 0.7], step, 16, 18
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 12, 11
        d.RescaleSlope, d.RescaleIntercept = 1, -1024
        d.PixelData = np.random.default_rng(k).integers(0, 1400, (16, 18)).astype(np.uint16).tobytes()
        d.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def change(file: Path, **tags) -> None:
    """Set tags of a DICOM file; None deletes."""
    d = pydicom.dcmread(file)
    for key, value in tags.items():
        if value is None:
            delattr(d, key)
        else:
            setattr(d, key, value)
    d.save_as(file)


def test_the_untouched_series_is_fine(tmp_path):
    series(tmp_path / "s")
    assert read_ct(tmp_path / "s").shape == (18, 16, 24)


TAGS = {  # tags of slice 5, words
    "no slope": ({"RescaleSlope": None}, ("lacks RescaleSlope", "export the original series")),
    "no intercept": ({"RescaleIntercept": None}, ("RescaleIntercept", "not HU", "export the original series")),
    "no position": ({"ImagePositionPatient": None}, ("lacks a usable ImagePositionPatient", "export the original series")),
    "no orientation": ({"ImageOrientationPatient": None}, ("lacks a usable ImageOrientationPatient", "export the original series")),
    "no spacing": ({"PixelSpacing": None}, ("lacks a usable PixelSpacing", "export the original series")),
    "orientation not unit": ({"ImageOrientationPatient": [1, 0, 0, 0, 2, 0]}, ("lacks a usable ImageOrientationPatient",)),
    "multi-frame": ({"NumberOfFrames": 8}, ("multi-frame", "dcm2niix")),
    "other spacing": ({"PixelSpacing": [0.9, 0.9]}, ("differs from", "keep the slices of one stack")),
    "other orientation": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, ("differs from", "keep the slices of one stack")),
    "shifted": ({"ImagePositionPatient": [9, 0, 10]}, ("shifted 9.0 mm in plane", "one acquisition")),
    "duplicate": ({"ImagePositionPatient": [0, 0, 8]}, ("twice", "1.2.3-004.dcm", "remove the duplicates")),
    "uneven": ({"ImagePositionPatient": [0, 0, 10.6]}, ("uneven slice spacing (2.60 mm", "resample")),
}  # fmt: skip


@pytest.mark.parametrize("case", TAGS)
def test_one_bad_slice_is_named(tmp_path, case):
    tags, words = TAGS[case]
    change(series(tmp_path / "s")[5], **tags)
    with refused(tmp_path, str(tmp_path / "s"), "1.2.3-005.dcm" if case != "uneven" else "dcm", *words):
        read_ct(tmp_path / "s")


def test_wrong_modality(tmp_path):
    for file in series(tmp_path / "s"):
        change(file, Modality="MR")
    with refused(tmp_path, str(tmp_path / "s"), "not a CT (modality MR", "give a CT series"):
        read_ct(tmp_path / "s")


def test_two_series_in_one_folder(tmp_path):
    series(tmp_path / "s", uid="1.2.3"), series(tmp_path / "s", n=20, uid="1.2.4")
    with refused(
        tmp_path, "2 series in one folder", "1.2.3 (24 slices, chest 1.2.3, in s)", "1.2.4 (20 slices", "series_uid"
    ):
        read_ct(tmp_path / "s")
    assert read_ct(tmp_path / "s", series_uid="1.2.4").shape[2] == 20
    with refused(tmp_path, "no CT series 9.9", "1.2.3"):
        read_ct(tmp_path / "s", series_uid="9.9")


def test_links_to_slices_that_are_not_there(tmp_path):
    """git-annex and DataLad leave links; without their content a scan would become shorter."""
    files = series(tmp_path / "s", n=30)
    for file in files[25:]:
        file.unlink(), file.symlink_to(tmp_path / "annex" / file.name)
    with refused(tmp_path, "5 link(s) to files that are not there, first 1.2.3-025.dcm", "git annex get"):
        read_ct(tmp_path / "s")
    for file in files[:25]:
        file.unlink(), file.symlink_to(tmp_path / "annex" / file.name)
    with refused(tmp_path, "30 link(s) to files that are not there"):
        read_ct(tmp_path / "s")


def test_a_dose_report_that_calls_itself_ct_is_no_slice(tmp_path):
    series(tmp_path / "s")
    for name, uid in (("own", "1.2.3"), ("other", "7.7")):  # in the CT's own series, and in one of its own
        report = series(tmp_path / "reports", n=1, uid=f"1.2.{uid}")[0]
        change(report, SOPClassUID=SecondaryCaptureImageStorage, SeriesInstanceUID=uid, ImagePositionPatient=None)
        report.rename(tmp_path / "s" / f"{name}.dcm")
    assert read_ct(tmp_path / "s").shape == (18, 16, 24)
    for file in series(tmp_path / "all"):  # an export that calls every slice so
        change(file, SOPClassUID=SecondaryCaptureImageStorage)
    assert read_ct(tmp_path / "all").shape == (18, 16, 24)


def test_hole_in_the_series(tmp_path):
    files = series(tmp_path / "s", n=26)
    files[7].unlink(), files[8].unlink()
    with refused(
        tmp_path, "2 slice(s) missing", "1.2.3-006.dcm and 1.2.3-009.dcm", "6.00 mm where", "fetch the series again"
    ):
        read_ct(tmp_path / "s")


def test_gantry_tilt_in_geometry_and_in_tag_alone(tmp_path):
    series(tmp_path / "s", shift=2.0 * np.tan(np.radians(12)))
    with refused(tmp_path, str(tmp_path / "s"), "gantry tilt of 12.0°", "dcm2niix"):
        read_ct(tmp_path / "s")
    for file in series(tmp_path / "t"):
        change(file, GantryDetectorTilt=-8)
    with refused(tmp_path, str(tmp_path / "t"), "gantry tilt of 8.0°", "dcm2niix"):
        read_ct(tmp_path / "t")


def test_too_few_dicom_slices_and_values_without_air(tmp_path):
    series(tmp_path / "s", n=12)
    with refused(tmp_path, "12 slices", "at least 20", "give the full series"):
        read_ct(tmp_path / "s")
    for file in series(tmp_path / "t"):
        change(file, RescaleIntercept=0)
    with refused(tmp_path, str(tmp_path / "t"), "no air below", "give the CT in HU"):
        read_ct(tmp_path / "t")


def test_folders_and_zips_without_a_series(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("nothing here")
    with refused(tmp_path, str(tmp_path / "empty"), "no DICOM file", "give the folder"):
        read_ct(tmp_path / "empty")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not a zip")
    with refused(tmp_path, "broken.zip", "cannot be unpacked", "intact zip"):
        read_ct(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with refused(tmp_path, "text.zip", "no DICOM file", "one CT series"):
        read_ct(tmp_path / "text.zip")


def test_dicom_pixels_cut_short(tmp_path):
    file = series(tmp_path / "s")[3]
    file.write_bytes(file.read_bytes()[:-300])
    with refused(tmp_path, str(tmp_path / "s"), "1.2.3-003.dcm cannot be decoded", "fetch the file again"):
        read_ct(tmp_path / "s")


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk_full(limit: int):
    """Writes beyond `limit` bytes a file fail in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_existing_output_is_kept_unless_asked(tmp_path):
    ct = CT(lung(), np.eye(4))
    (tmp_path / "out.nii.gz").write_bytes(b"precious")
    with refused(tmp_path, "out.nii.gz", "exists already", "overwrite=True"):
        write_nifti(tmp_path / "out.nii.gz", ct.stored, ct)
    write_nifti(tmp_path / "out.nii.gz", ct.stored, ct, overwrite=True)
    np.testing.assert_array_equal(read_ct(tmp_path / "out.nii.gz").array, ct.array)
    assert len(listing(tmp_path)) == 1


def test_output_name_and_shape(tmp_path):
    ct = CT(lung(), np.eye(4), source="in.nii.gz")
    with refused(tmp_path, "out.png", "must end in .nii"):
        write_nifti(tmp_path / "out.png", ct.stored, ct)
    with refused(tmp_path, "out.nii", "shape (2, 24, 24)", "in.nii.gz (24, 24, 24)", "give an array of that shape"):
        write_nifti(tmp_path / "out.nii", ct.stored[:2], ct)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "deeper/out.nii.gz"])
@pytest.mark.parametrize("existing", [None, b"precious"])
def test_disk_full_leaves_nothing_half_written(tmp_path, name, existing):
    ct, path = CT(lung(), np.eye(4)), tmp_path / name
    if existing:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(existing)
    before = listing(tmp_path)
    with disk_full(4096), pytest.raises(OSError) as caught:
        write_nifti(path, ct.stored, ct, overwrite=True)
    assert caught.value.errno == errno.EFBIG
    assert str(path) in str(caught.value) and "free space" in str(caught.value)
    assert listing(tmp_path) == before


def test_manifest_write_is_atomic_and_keeps_what_is_there(tmp_path):
    row = {c: "x" for c in ("nodule_id", "patient_id", "image", "mask", "subtype", "diameter_mm")}
    frame = pd.DataFrame([row] * 2000)
    with disk_full(4096), pytest.raises(OSError, match="manifest.csv.*free space"):
        write_manifest(frame, tmp_path / "manifest.csv")
    assert listing(tmp_path) == {}
    write_manifest(frame[:1], tmp_path / "manifest.csv")
    with refused(tmp_path, "manifest.csv", "exists already", "overwrite=True"):
        write_manifest(frame, tmp_path / "manifest.csv")
    with refused(tmp_path, "other.csv", "mask missing", "a manifest needs"):
        write_manifest(frame.drop(columns="mask"), tmp_path / "other.csv")


# -- manifest as a file --------------------------------------------------------------------------------------------------


MANIFESTS = {
    "absent": (None, ("no manifest there", "give a CSV or a folder")),
    "empty": (b"", ("missing column(s) nodule_id", "no rows")),
    "header only": (b"nodule_id,patient_id,image,mask,subtype,diameter_mm\n", ("no rows", "at least one nodule")),
    "semicolons": (b"nodule_id;patient_id;image;mask;subtype;diameter_mm\n1;2;3;4;5;6\n", ("missing column(s)", "by commas")),
    "columns missing": (b"nodule_id,patient_id,image\n1,2,3\n", ("missing column(s) mask, subtype, diameter_mm", "mend")),
    "column twice": (b"nodule_id,nodule_id,image\n1,2,3\n", ("column 'nodule_id' stands 2 times", "mend")),
    "latin-1": ("nodule_id,patient_id\n1,Müller\n".encode("latin-1"), ("not a readable CSV", "UTF-8")),
    "quotes open": (b'nodule_id,patient_id\n1,"open\n', ("not a readable CSV", "comma-separated")),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_file_that_is_no_manifest(tmp_path, case):
    content, words = MANIFESTS[case]
    if content is not None:
        (tmp_path / "manifest.csv").write_bytes(content)
    with refused(tmp_path, str(tmp_path / "manifest.csv"), *words):
        load_manifest(tmp_path)
