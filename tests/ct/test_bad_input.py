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
from pydicom.uid import SecondaryCaptureImageStorage

from hrldm.ct.nifti import open_nifti
from hrldm.ct.volume import CT, read_ct, write_nifti
from hrldm.nodules.manifest import load_manifest, write_manifest
from tests import tiny


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


# -- NIfTI -------------------------------------------------------------------------------------------------------------


def lung(shape=(24, 24, 24), dtype=np.int16):
    return np.random.default_rng(0).integers(-1000, 300, shape).astype(dtype)


def nifti(array: np.ndarray, affine=None, **header) -> bytes:
    """A file with its header as given, which nibabel would mend."""
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_qform(np.eye(4), code=0)
    image.header.set_sform(np.eye(4) if affine is None else affine, code=2)
    for key, value in ({"magic": b"n+1", "vox_offset": 352} | header).items():
        image.header[key] = value
    return image.header.binaryblock + b"\0" * 4 + array.tobytes(order="F")


with_nan = lung(dtype=np.float32)
with_nan[0, 0, :2] = np.nan, np.inf
sheared, parallel = np.eye(4), np.diag([1.0, 0, 1, 1])
sheared[1, 2], parallel[0, 1] = 0.3, 1
colour = np.zeros((24, 24, 24), [("R", "u1"), ("G", "u1"), ("B", "u1")])
zipped = gzip.compress(nifti(lung()))
NO_CT = {
    # voxels
    "constant.nii": (nifti(np.full((24, 24, 24), -1000, np.int16)), ("every voxel is -1000", "convert it again")),
    "nan.nii": (nifti(with_nan), ("2 voxels are NaN or infinite", "replace them")),
    "mask.nii": (nifti((lung() > 0).astype(np.uint8)), ("not a chest CT in HU", "a mask", "give the CT in HU")),
    "normalised.nii": (nifti(lung().astype(np.float32) / 1000), ("not a chest CT in HU", "normalised", "give the CT in HU")),
    "without-intercept.nii": (nifti(lung() + np.int16(1024)), ("values 24..1323", "without their intercept", "give the CT in HU")),
    "mri.nii": (nifti(np.abs(lung())), ("another modality", "give the CT in HU")),
    "beyond-hu.nii": (nifti(lung(dtype=np.float32) * 100), ("beyond HU", "apply the rescale")),
    "wrapped-to-unsigned.nii": (nifti(lung().astype(np.uint16)), ("beyond HU", "apply the rescale")),
    "2d.nii": (nifti(lung((24, 24))), ("shape (24, 24) is not one 3D volume", "save a single volume")),
    "4d.nii": (nifti(lung((24, 24, 24, 2))), ("shape (24, 24, 24, 2) is not one 3D volume", "save a single volume")),
    "few-slices.nii": (nifti(lung((24, 24, 19))), ("19 slices", "at least 20", "give the full series")),
    "rgb.nii": (nib.Nifti1Image(colour, np.eye(4)).to_bytes(), ("not a CT", "one real number")),
    # geometry
    "singular.nii": (nifti(lung(), np.diag([1.0, 1, 0, 1])), ("affine is not invertible", "convert from the DICOM")),
    "parallel-axes.nii": (nifti(lung(), parallel), ("affine is not invertible",)),
    "missing.nii": (nifti(lung(), sform_code=0, qform_code=0), ("no affine", "convert from the DICOM")),
    "sheared.nii": (nifti(lung(), sheared), ("sheared affine", "resample to a straight grid")),
    "metres.nii": (nifti(lung(), np.diag([1e-3, 1e-3, 1e-3, 1])), ("voxels of 0.001", "in mm?")),
    "declared-in-metres.nii": (nifti(lung(), xyzt_units=1), ("lengths in meter", "save it in mm")),
    "nan-affine.nii": (nifti(lung(), srow_x=[np.nan, 0, 0, 0]), ("affine is not invertible",)),
    "two-affines.nii": (nifti(lung(), qform_code=1, qoffset_x=30.0), ("sform and qform disagree by 30.0 mm", "keep the right one")),
    # no such file
    "absent.nii.gz": (None, ("no such file", "check the path")),
    "text.nii.gz": (gzip.compress(b"hello"), ("not a readable image", "give .nii")),
    "picture.png": (b"\x89PNG....", ("not a readable image", "DICOM folder")),
    "brain.mgh": (nib.MGHImage(lung(), np.eye(4)).to_bytes(), ("MGHImage instead of NIfTI", "convert it")),
    "cut.nii.gz": (zipped[: len(zipped) // 2], ("damaged or cut short", "download it again")),
    "broken.zip": (b"PK\x03\x04 not a zip", ("cannot be unpacked", "intact zip")),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CT)
def test_a_file_that_is_no_ct(tmp_path, name):
    content, words = NO_CT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(tmp_path, str(tmp_path / name), *words):
        read_ct(tmp_path / name)


def test_a_folder_where_a_file_is_needed(tmp_path):
    with refused(tmp_path, str(tmp_path), "a folder where one NIfTI file is needed", "--ml"):
        open_nifti(tmp_path)


# -- DICOM -------------------------------------------------------------------------------------------------------------


def series(folder: Path, n: int = 24, shift: float = 0.0) -> list[Path]:
    """The files of a CT series, slices 2 mm apart; `shift` moves each in plane (mm) as a tilted gantry does."""
    affine = np.diag([-0.7, -0.7, 2.0, 1.0])
    affine[1, 2] = -shift
    return sorted(tiny.dicom_series(folder, lung((18, 16, n)), affine).iterdir())


def change(*files: Path, **tags) -> None:
    """Set tags of DICOM files, or of their file meta; None deletes."""
    for file in files:
        d = pydicom.dcmread(file)
        for key, value in tags.items():
            if value is None:
                delattr(d, key)
            else:
                setattr(d.file_meta if key.startswith("MediaStorage") else d, key, value)
        d.save_as(file)


def test_the_untouched_series_is_fine(tmp_path):
    series(tmp_path / "s")
    assert read_ct(tmp_path / "s").shape == (18, 16, 24)


AGAIN = "export the original series"
TAGS = {  # tags of slice 5, words
    "no slope": ({"RescaleSlope": None}, ("lacks a usable RescaleSlope", "not HU", AGAIN)),
    "no intercept": ({"RescaleIntercept": None}, ("lacks a usable RescaleIntercept", "not HU", AGAIN)),
    "no position": ({"ImagePositionPatient": None}, ("lacks a usable ImagePositionPatient", AGAIN)),
    "no position, and of no class": ({"SOPClassUID": "1.2.9", "ImagePositionPatient": None}, ("lacks a usable ImagePositionPatient",)),
    "no orientation": ({"ImageOrientationPatient": None}, ("lacks a usable ImageOrientationPatient", AGAIN)),
    "no spacing": ({"PixelSpacing": None}, ("lacks a usable PixelSpacing", AGAIN)),
    "orientation not unit": ({"ImageOrientationPatient": [1, 0, 0, 0, 2, 0]}, ("lacks a usable ImageOrientationPatient",)),
    "multi-frame": ({"NumberOfFrames": 8}, ("multi-frame", "does not say where its frames lie", "dcm2niix")),
    "other spacing": ({"PixelSpacing": [0.9, 0.9]}, ("differs from", "keep the slices of one stack")),
    "other orientation": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, ("differs from", "keep the slices of one stack")),
    "shifted": ({"ImagePositionPatient": [9, 0, 10]}, ("shifted 9.0 mm in plane", "one acquisition")),
    "duplicate": ({"ImagePositionPatient": [0, 0, 8]}, ("twice with other pixels", "0004.dcm", "keep one acquisition")),
    "uneven": ({"ImagePositionPatient": [0, 0, 10.6]}, ("uneven slice spacing (2.60 mm", "resample")),
}  # fmt: skip


@pytest.mark.parametrize("case", TAGS)
def test_one_bad_slice_is_named(tmp_path, case):
    tags, words = TAGS[case]
    change(series(tmp_path / "s")[5], **tags)
    with refused(tmp_path, f"{tmp_path / 's'}: ", "0005.dcm" if case != "uneven" else "0004.dcm", *words):
        read_ct(tmp_path / "s")


ALL_TAGS = {  # tags of every slice, words
    "modality": ({"Modality": "MR"}, ("not a CT (modality MR", "give a CT series")),
    "tilt in the tag alone": ({"GantryDetectorTilt": -8}, ("gantry tilt of 8.0°", "dcm2niix")),
    "no air": ({"RescaleIntercept": 0}, ("no air below", "give the CT in HU")),
}


@pytest.mark.parametrize("case", ALL_TAGS)
def test_a_bad_series_is_named(tmp_path, case):
    tags, words = ALL_TAGS[case]
    change(*series(tmp_path / "s"), **tags)
    with refused(tmp_path, f"{tmp_path / 's'}: ", *words):
        read_ct(tmp_path / "s")


def test_gantry_tilt_in_the_geometry(tmp_path):
    series(tmp_path / "s", shift=2.0 * np.tan(np.radians(12)))
    with refused(tmp_path, f"{tmp_path / 's'}: ", "gantry tilt of 12.0°", "dcm2niix"):
        read_ct(tmp_path / "s")


def test_two_series_in_one_folder(tmp_path):
    series(tmp_path / "s")
    change(*series(tmp_path / "s" / "b", n=20), SeriesInstanceUID="1.2.4", SeriesDescription="chest")
    with refused(
        tmp_path,
        "2 series in one folder",
        "1.2.3 (24 slices, no name, in s)",
        "1.2.4 (20 slices, chest, in b)",
        "series_uid",
    ):
        read_ct(tmp_path / "s")
    assert read_ct(tmp_path / "s", series_uid="1.2.4").shape[2] == 20
    for unknown in ("9.9", ""):
        with refused(tmp_path, f"no CT series {unknown};", "1.2.3, 1.2.4"):
            read_ct(tmp_path / "s", series_uid=unknown)


def test_links_to_slices_that_are_not_there(tmp_path):
    """git-annex and DataLad leave links; without their content a scan would become shorter."""
    files = series(tmp_path / "s", n=30)
    for gone, words in (
        (files[25:], "5 link(s) to files that are not there, first 0025.dcm"),
        (files[:25], "30 link(s)"),
    ):
        for file in gone:
            file.unlink(), file.symlink_to(tmp_path / "annex" / file.name)
        with refused(tmp_path, words, "git annex get"):
            read_ct(tmp_path / "s")


CAPTURE = dict.fromkeys(("SOPClassUID", "MediaStorageSOPClassUID"), SecondaryCaptureImageStorage)
REPORT = CAPTURE | {"ImagePositionPatient": None}
STRANGERS = {  # files beside the slices that call themselves CT
    "dose report in the same series": REPORT,
    "dose report in its own series": REPORT | {"SeriesInstanceUID": "7.7"},
    "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesInstanceUID": "7.8"},
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_report_or_scout_that_calls_itself_ct_is_no_slice(tmp_path, case):
    series(tmp_path / "s")
    change(*series(tmp_path / "s" / "other", n=1), **STRANGERS[case])
    assert read_ct(tmp_path / "s").shape == (18, 16, 24)


def test_an_export_that_calls_every_slice_a_screenshot_is_read(tmp_path):
    change(*series(tmp_path / "s"), **CAPTURE)
    assert read_ct(tmp_path / "s").shape == (18, 16, 24)


def test_slices_that_are_missing(tmp_path):
    files = series(tmp_path / "s", n=26)
    files[7].unlink(), files[8].unlink()
    with refused(tmp_path, "2 slice(s) missing", "0006.dcm and 0009.dcm", "6.00 mm where", "fetch the series again"):
        read_ct(tmp_path / "s")
    series(tmp_path / "few", n=12)
    with refused(tmp_path, "12 slices", "at least 20", "give the full series"):
        read_ct(tmp_path / "few")


def test_folders_and_zips_without_a_series(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.txt").write_text("nothing here")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name in ("folder", "text.zip"):
        with refused(tmp_path, str(tmp_path / name), "no DICOM file", "give the folder or zip of one CT series"):
            read_ct(tmp_path / name)


def test_dicom_pixels_cut_short(tmp_path):
    file = series(tmp_path / "s")[3]
    file.write_bytes(file.read_bytes()[:-300])
    with refused(tmp_path, f"{tmp_path / 's'}: ", "0003.dcm cannot be decoded", "fetch the file again"):
        read_ct(tmp_path / "s")


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk_full(limit: int = 4096):
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
    with disk_full(), pytest.raises(OSError) as caught:
        write_nifti(path, ct.stored, ct, overwrite=True)
    assert caught.value.errno == errno.EFBIG
    assert str(path) in str(caught.value) and "free space" in str(caught.value)
    assert listing(tmp_path) == before


def test_manifest_write_is_atomic_and_keeps_what_is_there(tmp_path):
    row = dict.fromkeys(("nodule_id", "patient_id", "image", "mask", "subtype", "diameter_mm"), "x")
    frame = pd.DataFrame([row] * 2000)
    with disk_full(), pytest.raises(OSError, match="manifest.csv.*free space"):
        write_manifest(frame, tmp_path / "manifest.csv")
    assert listing(tmp_path) == {}
    write_manifest(frame[:1], tmp_path / "manifest.csv")
    with refused(tmp_path, "manifest.csv", "exists already", "overwrite=True"):
        write_manifest(frame, tmp_path / "manifest.csv")
    with refused(tmp_path, "other.csv", "mask missing", "a manifest needs"):
        write_manifest(frame.drop(columns="mask"), tmp_path / "other.csv")


# -- manifest as a file ------------------------------------------------------------------------------------------------

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
