"""Whatever happens to an input file, the readers give what is truly in it or refuse it by a sentence that names it.

`outcome` is the contract: a value, or None for a ValueError with the path and some words. What is accepted is compared
with another reading of the same damaged file (nibabel, pydicom), or with the undamaged one where damage must not pass.
"""

import csv
import functools
import gzip
import io
import json
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from hrldm.config import SUBTYPES
from hrldm.ct.dicom_headers import holds_dicom
from hrldm.ct.dicom_read import read_series
from hrldm.ct.lungs import lung_labels, read_labels
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion.wish import Wish, read_histogram, read_plan
from hrldm.nodules.manifest import REQUIRED, load_manifest
from hrldm.nodules.split import SPLITS
from tests import tiny
from tests.ct.test_bad_input import series

pytestmark = pytest.mark.filterwarnings("ignore")  # nibabel, pydicom and numpy warn of what is then refused


def fuzz(examples: int):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def outcome(read, path: Path):
    """What `read` returns; None where it refuses, with the path and a reason in its words."""
    try:
        return read()
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and str(path) in message, repr(error)
        assert len(message.replace(str(path), "").split()) >= 3, message
        return None


@contextmanager
def written(content: bytes, name: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def flipped(content: bytes, bits: list[int]) -> bytes:
    """`content` with these bits turned over, counted around its length."""
    out = bytearray(content)
    for bit in bits:
        bit %= 8 * len(out)
        out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


BITS = st.lists(st.integers(0, 2**24), min_size=1, max_size=3)
PART = st.floats(0, 1, exclude_max=True)  # where to cut, of the length

# -- NIfTI -------------------------------------------------------------------------------------------------------------

HU = np.random.default_rng(0).integers(-1000, 300, (6, 7, 8)).astype(np.int16)
AFFINE = np.array([[-0.7, 0, 0, 40], [0, 0.7, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1.0]])


def nifti(kind, sform: int, qform: int, order: str) -> tuple[bytes, np.dtype]:
    """A file's bytes and its header's dtype."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    image = kind(HU, AFFINE, header)
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE, qform)
    image.header.set_xyzt_units("mm")
    return image.to_bytes(), image.header.structarr.dtype


FILES = {
    "both": nifti(nib.Nifti1Image, 1, 1, "<"), "qform": nifti(nib.Nifti1Image, 0, 1, ">"),
    "sform": nifti(nib.Nifti1Image, 2, 0, "<"), "nifti2": nifti(nib.Nifti2Image, 1, 1, "<"),
}  # fmt: skip
FIELDS = (
    "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "xyzt_units", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "sizeof_hdr", "magic",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 4, 7, 16, 64, 352, 512, 2**15 - 1, 2**31, 0.5, 1e9, 1e38, 1e-45, np.nan, np.inf, -np.inf)


def with_field(name: str, field: str, k: int, value: float) -> bytes:
    """One of `FILES` with the k-th number of a header field replaced, as far as its type can hold it."""
    content, dtype = FILES[name]
    header = np.frombuffer(content[: dtype.itemsize], dtype).copy()
    if dtype[field].base.kind == "S":
        header[field] = bytes([int(np.nan_to_num(value)) % 256]) + header[field].tobytes()[1:]
    else:
        with np.errstate(all="ignore"):
            header[field].reshape(-1)[k % header[field].size] = np.float64(value).astype(dtype[field].base)
    return header.tobytes() + content[dtype.itemsize :]


def check_nifti(content: bytes, compressed: bool) -> CT | None:
    """All readers keep the contract, and what they accept is what nibabel finds there."""
    with written(gzip.compress(content, 1) if compressed else content, f"x.nii{'.gz' * compressed}") as path:
        ct = outcome(lambda: read_ct(path, min_slices=1), path)
        outcome(lambda: read_voxels(open_nifti(path), path), path)
        outcome(lambda: lung_labels(CT(HU, AFFINE), path), path)
        labels = outcome(lambda: read_labels(path, CT(HU, AFFINE)), path)
        assert labels is None or labels.shape == HU.shape and labels.dtype == np.uint8 and labels.any()
        if ct is not None:
            image = nib.load(path)
            np.testing.assert_array_equal(ct.affine, image.affine)
            stored = np.asanyarray(image.dataobj.get_unscaled()).reshape(image.shape[:3])
            np.testing.assert_array_equal(ct.stored, stored)
            expected = stored * float(image.dataobj.slope) + float(image.dataobj.inter)
            np.testing.assert_allclose(ct.array, expected, rtol=1e-5, atol=1e-2)
            assert np.isfinite(ct.array).all() and np.isfinite(ct.affine).all()
            left = HU.nbytes - ct.stored.nbytes  # of a smaller shape than was written, voxels would be left
            assert 0 <= left < ct.stored.nbytes / max(ct.shape)
        return ct


@given(name=st.sampled_from(sorted(FILES)), bits=BITS, compressed=st.booleans())
@fuzz(100)
def test_nifti_header_with_flipped_bits(name, bits, compressed):
    content, dtype = FILES[name]
    head = dtype.itemsize + 4
    check_nifti(flipped(content[:head], bits) + content[head:], compressed)


@given(
    name=st.sampled_from(sorted(FILES)),
    field=st.sampled_from(FIELDS),
    k=st.integers(0, 7),
    value=st.sampled_from(NUMBERS),
    compressed=st.booleans(),
)
@fuzz(200)
@example("qform", "quatern_b", 0, 1, False)  # a quaternion longer than 1: no file named
@example("both", "quatern_b", 0, np.inf, False)
@example("both", "xyzt_units", 0, 4, False)  # an unknown unit: KeyError
@example("both", "vox_offset", 0, np.inf, False)  # OverflowError
@example("both", "vox_offset", 0, 1e38, False)
@example("both", "vox_offset", 0, np.nan, True)
@example("both", "dim", 3, 4, False)  # half of the slices: accepted
@example("both", "dim", 3, 2**15 - 1, True)
def test_nifti_header_with_other_numbers(name, field, k, value, compressed):
    check_nifti(with_field(name, field, k, value), compressed)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nifti_voxel_size_0_is_not_taken_for_1_mm(k):
    assert check_nifti(with_field("qform", "pixdim", k, 0), False) is None
    assert check_nifti(with_field("sform", "pixdim", k, 0), False) is not None  # the sform says it all


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_nifti_header_that_says_less_than_the_file_holds(axis):
    assert check_nifti(with_field("both", "dim", axis, HU.shape[axis - 1] - 1), False) is None
    ct = check_nifti(FILES["both"][0] + b"\0" * 16, False)  # a padded end is no harm
    np.testing.assert_array_equal(ct.array, HU)


@given(name=st.sampled_from(sorted(FILES)), part=PART, compressed=st.booleans())
@fuzz(60)
def test_nifti_cut_anywhere_is_refused(name, part, compressed):
    content = FILES[name][0]
    content = gzip.compress(content, 1) if compressed else content
    with written(content[: int(part * len(content))], f"x.nii{'.gz' * compressed}") as path:
        assert outcome(lambda: read_ct(path, min_slices=1), path) is None
        assert outcome(lambda: read_labels(path, CT(HU, AFFINE)), path) is None


@given(bits=BITS)
@fuzz(120)
@example([8 * 600])  # in the voxels: was read without the checksum
def test_gzip_with_flipped_bits_never_gives_other_voxels(bits):
    with written(flipped(gzip.compress(FILES["both"][0], 1, mtime=0), bits), "x.nii.gz") as path:
        for read in (lambda: read_ct(path, 1).array, lambda: read_voxels(open_nifti(path), path)[0]):
            array = outcome(read, path)
            assert array is None or np.array_equal(array, HU)


@given(bits=BITS)
@fuzz(20)
def test_flipped_voxels_leave_the_geometry(bits):
    content = FILES["both"][0]
    ct = check_nifti(content[: -HU.nbytes] + flipped(content[-HU.nbytes :], bits), False)
    assert ct is None or ct.shape == HU.shape and np.allclose(ct.affine, AFFINE, atol=1e-6)


NAMES = ("x.nii", "x.nii.gz", "x.zip", "x", "x.img", "x.hdr", "x.mgh", "x.mgz", "x.gii", "x.mnc", "x.par", "x.dcm",
         "x.BRIK", "x.nii.bz2", "x.nii.zst", "x" * 300 + ".nii")  # fmt: skip


@given(content=st.binary(max_size=700) | st.just(FILES["both"][0]), name=st.sampled_from(NAMES[:-1]))
@fuzz(80)
def test_any_bytes_by_any_name(content, name):
    with written(content, name) as path:
        ct = outcome(lambda: read_ct(path, min_slices=1), path)
        assert ct is None or np.array_equal(ct.array, HU)


def test_overlong_name(tmp_path):
    path = tmp_path / NAMES[-1]
    assert outcome(lambda: read_ct(path), path) is outcome(lambda: open_nifti(path), path) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_label_maps_must_be_finite(tmp_path, value):
    labels = np.ones(HU.shape, np.float32)
    labels[0, 0, 0] = value
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "lungs.nii")
    assert outcome(lambda: read_labels(tmp_path / "lungs.nii", CT(HU, AFFINE)), tmp_path / "lungs.nii") is None


def test_large_labels_are_no_lobes_but_lung(tmp_path):
    labels = np.zeros(HU.shape, np.float64)
    labels[2:4], labels[4:] = 2.0**40, -3
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "lungs.nii")
    np.testing.assert_array_equal(read_labels(tmp_path / "lungs.nii", CT(HU, np.eye(4))), labels > 0)


# -- DICOM -------------------------------------------------------------------------------------------------------------


@functools.cache
def stack() -> list[bytes]:
    """The 24 slices of a series."""
    with tempfile.TemporaryDirectory() as folder:
        return [file.read_bytes() for file in series(Path(folder))]


@contextmanager
def folder_of(slices: dict[str, bytes]):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in slices.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def named(slices: list[bytes]) -> dict[str, bytes]:
    return {f"{k:03d}.dcm": content for k, content in enumerate(slices)}


def edited(content: bytes, tag: str, value) -> bytes:
    """A slice with a tag set to whatever (text, or a number where the tag holds a binary one), or deleted for None."""
    data = pydicom.dcmread(io.BytesIO(content))
    if value is None:
        data.pop(tag, None)
    else:
        raw = value.to_bytes(2, "little") if isinstance(value, int) else value.encode()
        data[tag] = RawDataElement(Tag(tag), dictionary_VR(tag), len(raw), raw + b" " * (len(raw) % 2), 0, False, True)
    data.save_as(out := io.BytesIO())
    return out.getvalue()


def check_dicom(folder: Path, n: int | None) -> CT | None:
    """The contract, and what is accepted has `n` slices (None: any), each with pydicom's HU at its own position."""
    ct = outcome(lambda: read_ct(folder, min_slices=1), folder)
    if ct is None:
        return None
    assert n is None or ct.shape[2] == n
    slices = [pydicom.dcmread(f) for f in folder.iterdir() if f.suffix == ".dcm"]
    slices = [d for d in slices if d.Modality == "CT" and "LOCALIZER" not in (d.get("ImageType") or "")]
    turn = np.diag([-1.0, -1.0, 1.0])  # LPS to RAS
    normal = np.cross(*np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3))
    slices.sort(key=lambda d: float(normal @ np.array(d.ImagePositionPatient, float)))
    for k, d in enumerate(slices):
        row, column = np.array(d.ImageOrientationPatient, float).reshape(2, 3)
        np.testing.assert_allclose(ct.affine[:3, 0], turn @ row * d.PixelSpacing[1], atol=0.02)
        np.testing.assert_allclose(ct.affine[:3, 1], turn @ column * d.PixelSpacing[0], atol=0.02)
        off = turn @ np.array(d.ImagePositionPatient, float) - (ct.affine @ [0, 0, k, 1])[:3]
        limits = np.append(ct.spacing[[0, 0] if row @ column else [0, 1]].max().repeat(2), ct.spacing[2] / 2)
        assert (np.abs(np.linalg.solve(ct.affine[:3, :3] / ct.spacing, off)) <= limits + 1e-6).all()
        expected = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
        np.testing.assert_allclose(ct.array[:, :, k].T, expected, rtol=1e-6, atol=1e-3)
    assert len(slices) == ct.shape[2]
    return ct


TEXTS = ("0", "1", "-1", "2", "0.5", "1e30", "NaN", "inf", "-1024", "", "abc", "16", "1e-9", "3.5")
SHORTS = (0, 1, 2, 3, 8, 11, 12, 15, 16, 17, 18, 32, 64, 65535)


@st.composite
def edits(draw) -> tuple[str, object]:
    """A tag and what to set it to."""
    texts = {"PixelSpacing": 2, "ImageOrientationPatient": 6, "ImagePositionPatient": 3, "RescaleSlope": 1, "RescaleIntercept": 1,
             "NumberOfFrames": 1, "SliceThickness": 1, "SpacingBetweenSlices": 1, "GantryDetectorTilt": 1}  # fmt: skip
    shorts = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
    words = {"Modality": ("MR", "ct", ""), "PhotometricInterpretation": ("RGB", "MONOCHROME1", "PALETTE COLOR", "x"),
             "SeriesInstanceUID": ("1.2.9", "", "x"), "ImageType": ("ORIGINAL", "", "A\\B\\AXIAL")}  # fmt: skip
    tag = draw(st.sampled_from([*texts, *shorts, *words]))
    if draw(st.integers(0, 7)) == 0:
        return tag, None
    if tag in shorts:
        return tag, draw(st.sampled_from(SHORTS))
    if tag in words:
        return tag, draw(st.sampled_from(words[tag]))
    n = texts[tag] + draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
    return tag, "\\".join(draw(st.sampled_from(TEXTS)) for _ in range(n))


@given(edit=edits(), where=st.none() | st.integers(0, 5))
@fuzz(150)
@example(("PixelSpacing", "0.7\\-0.7"), None)  # mirrored
@example(("Rows", 8), None)  # half of each slice
@example(("Rows", 17), None)  # a row of nothing
@example(("Columns", 9), None)
@example(("BitsAllocated", 8), None)
@example(("BitsStored", 15), None)
@example(("HighBit", 15), None)
@example(("RescaleIntercept", "NaN"), 5)
@example(("RescaleIntercept", "abc"), 5)
@example(("RescaleSlope", "inf"), 5)
@example(("RescaleSlope", "0"), 5)
@example(("RescaleSlope", "-1"), 5)
@example(("NumberOfFrames", "abc"), None)
@example(("NumberOfFrames", "inf"), None)
@example(("GantryDetectorTilt", "abc"), None)
@example(("GantryDetectorTilt", "1\\2"), None)
@example(("PhotometricInterpretation", "MONOCHROME1"), 5)  # the decoder inverts it
@example(("PhotometricInterpretation", "RGB"), None)
@example(("Modality", None), 5)  # the last slice was left out
@example(("Modality", "OT"), 0)
@example(("SeriesInstanceUID", None), None)
def test_dicom_tags_of_one_slice_or_of_all(edit, where):
    slices = [edited(s, *edit) if where in (None, k) else s for k, s in enumerate(stack()[:6])]
    with folder_of(named(slices)) as folder:
        check_dicom(folder, 6)


@given(gone=st.sets(st.integers(0, 23), min_size=1, max_size=4))
@fuzz(20)
@example({11})
def test_missing_slices_within_the_stack_are_noticed(gone):
    left = sorted(set(range(24)) - gone)
    with folder_of({f"{k:03d}.dcm": stack()[k] for k in left}) as folder:
        ct = outcome(lambda: read_ct(folder), folder)
        assert (ct is not None) is (left[-1] - left[0] == len(left) - 1)  # fewer at an end is a shorter scan
        assert ct is None or ct.affine[2, 3] == 2 * left[0]


@given(k=st.integers(0, 5), name=st.sampled_from(["a.dcm", "z.dcm", "sub.dcm", "copy"]))
@fuzz(10)
def test_a_slice_twice_is_refused(k, name):
    with folder_of(named(stack()[:6]) | {name: stack()[k]}) as folder:
        assert outcome(lambda: read_ct(folder, 1), folder) is None


@given(order=st.permutations(range(6)))
@fuzz(15)
def test_the_position_and_not_the_file_decides_where_a_slice_lies(order):
    slices = [edited(s, "ImagePositionPatient", f"0\\0\\{2 * k}") for s, k in zip(stack()[:6], order, strict=True)]
    with folder_of(named(slices)) as folder:
        assert check_dicom(folder, 6) is not None


@pytest.mark.parametrize("late", [0.1, 0.0])
def test_small_uneven_steps_must_not_add_up(late):
    z = np.cumsum([0.0] + [1.0] * 11 + [1 + late] * 12)
    slices = [edited(s, "ImagePositionPatient", f"0\\0\\{z[k]:.3f}") for k, s in enumerate(stack())]
    with folder_of(named(slices)) as folder:
        assert (check_dicom(folder, 24) is None) is (late > 0)


@given(k=st.integers(0, 5), part=PART)
@fuzz(60)
@example(5, 0.0)  # an empty file at the end: the scan became shorter
@example(5, 0.2)
@example(5, 0.99)
def test_a_slice_cut_anywhere_is_refused(k, part):
    slices = list(stack()[:6])
    slices[k] = slices[k][: int(part * len(slices[k]))]
    with folder_of(named(slices)) as folder:
        assert outcome(lambda: read_ct(folder, 1), folder) is None


@given(where=st.none() | st.integers(0, 5), bits=BITS)
@fuzz(120)
def test_dicom_header_with_flipped_bits(where, bits):
    slices = list(stack()[:6])
    for k in range(6) if where is None else [where]:
        head = len(slices[k]) - 16 * 18 * 2
        slices[k] = slices[k][:128] + flipped(slices[k][128:head], bits) + slices[k][head:]
    with folder_of(named(slices)) as folder:
        check_dicom(folder, 6)


@given(content=st.binary(max_size=300), dicom=st.booleans(), name=st.sampled_from(["x", "x.dcm", "._x.dcm", "x.txt"]))
@fuzz(50)
@example(b"\0\5\x16\7", False, "._000.dcm")
def test_strangers_in_the_folder_change_nothing(content, dicom, name):
    content = b"\0" * 128 + b"DICM" + content if dicom else content
    with folder_of(named(stack()[:6]) | {name: content}) as folder:
        ct = outcome(lambda: read_ct(folder, 1), folder)
        assert ct is not None or dicom or name == "x.dcm"
        assert ct is None or ct.shape == (18, 16, 6) and ct.affine[2, 3] == 0


@given(
    k=st.integers(0, 5),
    content=st.sampled_from([b"", b"\0" * 200, b"no DICOM", b"\0" * 128 + b"DICX" + b"\0" * 500]),
    name=st.sampled_from(
        ["IM{:04d}", "{:d}", "1.2.840.{:d}", "I.{:03d}.ima", "CT_{:d}.img", "1f3a{:08x}", "a-{:d}/slice"]
    ),
)
@fuzz(40)
@example(5, b"", "IM{:04d}")  # the last: the scan became shorter
@example(0, b"", "IM{:04d}")
def test_a_slice_that_is_no_dicom_is_missed_whatever_the_names(k, content, name):
    with tempfile.TemporaryDirectory() as tmp:
        for j, slice_ in enumerate(stack()[:6]):
            file = Path(tmp) / name.format(j)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(slice_)
        for stranger in ("README", "DICOMDIR", "notes.txt", "._IM0001", "VERSION"):
            (Path(tmp) / stranger).write_bytes(b"hello")
        assert holds_dicom(Path(tmp)) and read_ct(tmp, 1).shape == (18, 16, 6)
        (Path(tmp) / name.format(k)).write_bytes(content)
        if "/" not in name:  # there, each slice is alone in its folder
            assert outcome(lambda: read_ct(tmp, 1), Path(tmp)) is None


def test_a_folder_holds_dicom_by_its_files_and_not_by_their_names(tmp_path):
    for name, content in (("a.dcm", b"text"), ("._b", b"\0" * 128 + b"DICM"), ("DICOMDIR", b"\0" * 128 + b"DICM")):
        (tmp_path / name).write_bytes(content)
    assert not holds_dicom(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0001").write_bytes(stack()[0])
    assert holds_dicom(tmp_path)


@given(k=st.integers(1, 5))
@fuzz(5)
def test_two_series_are_never_mixed(k):
    slices = [edited(s, "SeriesInstanceUID", "1.2.9") if j >= k else s for j, s in enumerate(stack()[:6])]
    with folder_of(named(slices)) as folder:
        assert outcome(lambda: read_ct(folder, 1), folder) is None
        assert read_series(folder, "1.2.9")[0].shape[2] == 6 - k


@given(bits=BITS, from_end=st.booleans(), part=st.none() | PART)
@fuzz(100)
@example([17 * 8 + 1], True, 0.5)
def test_a_damaged_zip_gives_the_series_or_nothing(bits, from_end, part):
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in named(stack()[:6]).items():
            archive.writestr(name, content)
    content = out.getvalue()
    end = len(content) - 400  # the list of files
    content = content[:end] + flipped(content[end:], bits) if from_end else flipped(content, bits)
    content = content if part is None else content[: int(part * len(content))]
    with written(content, "s.zip") as path:
        ct = outcome(lambda: read_ct(path, 1), path)
        assert ct is None or ct.shape == (18, 16, 6) and ct.affine[2, 3] == 0


@pytest.mark.parametrize("kept", ["002 twice, 000 never", "000 alone"])
def test_a_zip_whose_list_of_files_is_wrong(tmp_path, kept):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, content in named(stack()[:6]).items():
            archive.writestr(name, content)
    content = bytearray((tmp_path / "s.zip").read_bytes())
    start = content.index(b"PK\1\2")  # its first entry
    if kept == "000 alone":
        content[start + 32 : start + 34] = (5 * (46 + 7)).to_bytes(2, "little")  # the others as a comment
    else:
        third = content.index(b"002.dcm", start) - 46
        content[start : start + 53] = content[third : third + 53]
    (tmp_path / "s.zip").write_bytes(content)
    assert outcome(lambda: read_ct(tmp_path / "s.zip", 1), tmp_path / "s.zip") is None


# -- plans, histograms and manifests -----------------------------------------------------------------------------------

CELLS = st.sampled_from(["", "solid", "part-solid", "10", "6", "30.5", "nan", "inf", "-1", "1e400", "9" * 30, "LUL", "inner",
                         "1 2 3", "1,2", "x.nii", "\0", "x" * 300, '"', "é", "0x10", "1_0"])  # fmt: skip
COLUMNS = ("subtype", "diameter_mm", "lobe", "location", "at", "histogram", "spiculation", "core_mm", "mask", "seed")


def table(rows: list[list[str]]) -> bytes:
    csv.writer(out := io.StringIO()).writerows(rows)
    return out.getvalue().encode()


PLANS = st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True).flatmap(
    lambda head: st.lists(st.lists(CELLS, min_size=len(head), max_size=len(head)), max_size=3).map(lambda b: table([head, *b]))
)  # fmt: skip


@given(content=PLANS | st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
@fuzz(200)
@example(table([["mask"], ["x" * 300]]))
def test_any_plan(content):
    with written(content, "plan.csv") as path:
        wishes = outcome(lambda: read_plan(path), path)
        assert wishes is None or wishes and all(isinstance(w, Wish) and w.subtype in SUBTYPES for w in wishes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.sampled_from(["solid", "LUL", "x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS + ("x",)), inner, max_size=3),
    max_leaves=6,
)
RECORDS = JSON | st.lists(JSON.map(lambda w: {"wish": w}), max_size=3).map(lambda n: {"nodules": n})


@given(content=RECORDS.map(json.dumps).map(str.encode) | st.binary(max_size=60))
@fuzz(80)
@example(b'{"nodules": [{"wish": {"diameter_mm": 0}}]}')
@example(b'{"nodules": [{"wish": ["ab"]}]}')
def test_any_record(content):
    with written(content, "record.json") as path:
        wishes = outcome(lambda: read_plan(path), path)
        assert wishes is None or all(isinstance(w, Wish) and w.subtype in SUBTYPES for w in wishes)


SHARES = st.lists(
    st.sampled_from(["0", "1", "0.5", "1e308", "5e-324", "-1", "nan", "inf", "x"]), min_size=39, max_size=41
)


@given(content=SHARES.map(" ".join).map(str.encode) | st.binary(max_size=80))
@fuzz(100)
@example(b"1 " * 40)
@example(b"1e308 " * 40)
def test_any_histogram(content):
    with written(content, "histogram.txt") as path:
        shares = outcome(lambda: read_histogram(path), path)
        assert shares is None or shares.shape == (40,) and (shares >= 0).all() and abs(shares.sum() - 1) < 1e-9


@pytest.fixture(scope="module")
def nodules(tmp_path_factory) -> Path:
    return tiny.manifest(tmp_path_factory.mktemp("nodules"), {"train": 2, "test": 1}, size=12)


@given(
    row=st.integers(0, 3),
    column=st.integers(0, 7),
    cell=CELLS | st.sampled_from(["n0", "p1", "n1_mask.nii.gz", ".", "..", "val"]),
    bits=st.none() | BITS,
    part=st.none() | PART,
)
@fuzz(100)
@example(1, 5, "x" * 300, None, None)  # a name too long for the file system
def test_any_manifest(nodules, row, column, cell, bits, part):
    with (nodules / "manifest.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    rows[row][column % len(rows[row])] = cell
    content = table(rows)
    content = content if bits is None else flipped(content, bits)
    content = content if part is None else content[: int(part * len(content))]
    path = nodules / "damaged.csv"
    path.write_bytes(content)
    frame = outcome(lambda: load_manifest(path), path)
    if frame is not None:
        assert set(REQUIRED) <= set(frame.columns) and frame["split"].isin(SPLITS).all()
        assert (
            frame["nodule_id"].is_unique and frame["subtype"].isin(SUBTYPES).all() and (frame["diameter_mm"] > 0).all()
        )
        assert len(frame) == len(list(csv.reader(io.StringIO(content.decode(), newline="")))) - 1
        assert all(Path(f).is_file() for f in (*frame["image"], *frame["mask"]))
