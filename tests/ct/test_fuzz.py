"""Whatever happens to an input file, the readers give what is truly in it or refuse it by a sentence that names it.

`outcome` is the contract. What is accepted is compared with another reading of the same damaged file (nibabel, pydicom), or
with the undamaged one where damage must not pass. `HRLDM_FUZZ=10000 pytest tests/ct/test_fuzz.py` draws as many examples.
"""

import csv
import functools
import gzip
import io
import json
import os
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
from hrldm.ct.label_maps import read_map
from hrldm.ct.lungs import lung_labels
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion.plans import read_plan
from hrldm.insertion.wish import Wish, read_histogram
from tests.ct.test_bad_input import series

pytestmark = pytest.mark.filterwarnings("ignore")  # nibabel, pydicom and numpy warn of what is then refused
BITS = st.lists(st.integers(0, 2**24), min_size=1, max_size=3)
PART = st.floats(0, 1, exclude_max=True)  # where to cut, of the length


def fuzz(examples: int, *bugs: tuple, **drawn):
    """Run a test on that many examples of what is `drawn`, and on the former `bugs`."""

    def decorate(test):
        for bug in bugs:
            test = example(*bug)(test)
        return settings(
            max_examples=int(os.environ.get("HRLDM_FUZZ", examples)), deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**drawn)(test))  # fmt: skip

    return decorate


def outcome(read, path: Path, *more):
    """What `read(path, *more)` returns; None where it refuses, with the path and a reason in its words."""
    try:
        return read(path, *more)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and str(path) in message, repr(error)
        assert len(message.replace(str(path), "").split()) >= 3, message
        return None


@contextmanager
def folder_of(files: dict[str, bytes]):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        yield Path(folder)


def tried(read, content: bytes, name: str):
    """`outcome` for a file of that content and name."""
    with folder_of({name: content}) as folder:
        return outcome(read, folder / name)


def flipped(content: bytes, bits: list[int], start: int = 0, stop: int | None = None) -> bytes:
    """`content` with these bits of `content[start:stop]` turned over, counted around its length."""
    out = bytearray(content)
    for bit in bits:
        byte = range(len(content))[start:stop][bit // 8 % len(content[start:stop])]
        out[byte] ^= 1 << bit % 8
    return bytes(out)


# -- NIfTI -------------------------------------------------------------------------------------------------------------

HU = np.random.default_rng(0).integers(-1000, 300, (6, 7, 8)).astype(np.int16)
AFFINE = np.array([[-0.7, 0, 0, 40], [0, 0.7, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1.0]])


def nifti(kind, sform: int, qform: int, order: str) -> tuple[bytes, np.dtype]:
    """A file's bytes and its header's dtype."""
    image = kind(HU, AFFINE, kind.header_class(endianness=order), dtype=np.int16)
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE, qform)
    image.header.set_xyzt_units("mm")
    return image.to_bytes(), image.header.structarr.dtype


FILES = {
    "both": nifti(nib.Nifti1Image, 1, 1, "<"), "qform": nifti(nib.Nifti1Image, 0, 1, ">"),
    "sform": nifti(nib.Nifti1Image, 2, 0, "<"), "nifti2": nifti(nib.Nifti2Image, 1, 1, "<"),
}  # fmt: skip
FIELDS = ("dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "xyzt_units", "qform_code", "sform_code",
          "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "sizeof_hdr", "magic")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 4, 7, 16, 64, 352, 512, 2**15 - 1, 2**31, 0.5, 1e9, 1e38, 1e-45, np.nan, np.inf, -np.inf)
NAMES = ("x.nii", "x.nii.gz", "x.zip", "x", "x.img", "x.hdr", "x.mgh", "x.mgz", "x.gii", "x.mnc", "x.par", "x.dcm", "x.BRIK",
         "x.nii.bz2", "x.nii.zst")  # fmt: skip
ANY_FILE = st.sampled_from(sorted(FILES))


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


def read_one(path: Path) -> CT:
    return read_ct(path, min_slices=1)


def read_stored(path: Path) -> np.ndarray:
    return read_voxels(open_nifti(path), path)[0]


def read_lungs(path: Path, affine: np.ndarray = AFFINE) -> np.ndarray:
    return read_map(path, CT(HU, affine), np.zeros(HU.shape, bool), affine)[0]


def check_nifti(content: bytes, compressed: bool = False) -> CT | None:
    """All readers keep the contract, and what they accept is what nibabel finds there."""
    name = f"x.nii{'.gz' * compressed}"
    with folder_of({name: gzip.compress(content, 1) if compressed else content}) as folder:
        path = folder / name
        outcome(read_stored, path)
        outcome(lambda file: lung_labels(CT(HU, AFFINE), file), path)
        labels = outcome(read_lungs, path)
        assert labels is None or labels.shape == HU.shape and labels.dtype == np.uint8 and labels.any()
        if (ct := outcome(read_one, path)) is not None:
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


@fuzz(120, file=ANY_FILE, bits=BITS, compressed=st.booleans(), voxels=st.integers(0, 5).map(lambda k: k == 0))
def test_nifti_with_flipped_bits(file, bits, compressed, voxels):
    content, head = FILES[file][0], len(FILES[file][0]) - HU.nbytes
    ct = check_nifti(flipped(content, bits, head) if voxels else flipped(content, bits, 0, head), compressed)
    assert not voxels or ct is None or ct.shape == HU.shape and np.allclose(ct.affine, AFFINE, atol=1e-6)


@fuzz(
    200,
    ("qform", "quatern_b", 0, 1, False),  # a quaternion longer than 1: no file named
    ("both", "quatern_b", 0, np.inf, False),
    ("both", "xyzt_units", 0, 4, False),  # an unknown unit: KeyError
    ("both", "vox_offset", 0, np.inf, False),  # OverflowError
    ("both", "vox_offset", 0, 1e38, False),
    ("both", "vox_offset", 0, np.nan, True),
    ("both", "dim", 3, 4, False),  # half of the slices: accepted
    ("both", "dim", 3, 2**15 - 1, True),
    file=ANY_FILE, field=st.sampled_from(FIELDS), k=st.integers(0, 7), value=st.sampled_from(NUMBERS), compressed=st.booleans(),
)  # fmt: skip
def test_nifti_header_with_other_numbers(file, field, k, value, compressed):
    check_nifti(with_field(file, field, k, value), compressed)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_nifti_header_that_says_less_than_the_file(axis):
    assert check_nifti(with_field("qform", "pixdim", axis, 0)) is None  # voxel size 0 is not 1 mm
    assert check_nifti(with_field("sform", "pixdim", axis, 0)) is not None  # the sform says it all
    assert check_nifti(with_field("both", "dim", axis, HU.shape[axis - 1] - 1)) is None
    np.testing.assert_array_equal(check_nifti(FILES["both"][0] + b"\0" * 16).array, HU)  # a padded end is no harm


@fuzz(60, file=ANY_FILE, part=PART, compressed=st.booleans())
def test_nifti_cut_anywhere_is_refused(file, part, compressed):
    content = FILES[file][0]
    content = gzip.compress(content, 1) if compressed else content
    for read in (read_one, read_lungs):
        assert tried(read, content[: int(part * len(content))], f"x.nii{'.gz' * compressed}") is None


@fuzz(120, ([8 * 600],), bits=BITS)  # in the voxels: was read without the checksum
def test_gzip_with_flipped_bits_never_gives_other_voxels(bits):
    content = flipped(gzip.compress(FILES["both"][0], 1, mtime=0), bits)
    for array in (
        tried(lambda path: read_one(path).array, content, "x.nii.gz"),
        tried(read_stored, content, "x.nii.gz"),
    ):
        assert array is None or np.array_equal(array, HU)


@fuzz(80, content=st.binary(max_size=700) | st.just(FILES["both"][0]), name=st.sampled_from(NAMES))
def test_any_bytes_by_any_name(content, name):
    ct = tried(read_one, content, name)
    assert ct is None or np.array_equal(ct.array, HU)


def test_overlong_name(tmp_path):
    for read in (read_ct, open_nifti):
        assert outcome(read, tmp_path / f"{'x' * 300}.nii") is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**40])
def test_label_maps_must_be_finite_and_large_labels_are_no_lobes_but_lung(value):
    labels = np.zeros(HU.shape)
    labels[2:4], labels[4:] = value, -3
    got = tried(read_lungs, nib.Nifti1Image(labels, AFFINE).to_bytes(), "lungs.nii")
    assert got is None if not np.isfinite(value) else np.array_equal(got, labels > 0)


# -- DICOM -------------------------------------------------------------------------------------------------------------


@functools.cache
def stack(n: int = 6) -> list[bytes]:
    """The slices of a series."""
    with tempfile.TemporaryDirectory() as folder:
        return [file.read_bytes() for file in series(Path(folder) / "s", n)]


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


def check_dicom(slices: list[bytes] | dict[str, bytes]) -> CT | None:
    """The contract, and what is accepted holds all slices (*.dcm), each with pydicom's HU at its own position."""
    with folder_of(slices if isinstance(slices, dict) else named(slices)) as folder:
        if (ct := outcome(read_one, folder)) is None:
            return None
        slices = [pydicom.dcmread(f) for f in folder.glob("[!.]*.dcm")]
    assert len(slices) == ct.shape[2]
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
    return ct


SHORTS = (0, 1, 2, 3, 8, 11, 12, 15, 16, 17, 18, 32, 64, 65535)
TEXTS = ("0", "1", "-1", "2", "0.5", "1e30", "NaN", "inf", "-1024", "", "abc", "16", "1e-9", "3.5")
TAGS = {  # tag: how many values, from which
    "PixelSpacing": (2, TEXTS), "ImageOrientationPatient": (6, TEXTS), "ImagePositionPatient": (3, TEXTS),
    "RescaleSlope": (1, TEXTS), "RescaleIntercept": (1, TEXTS), "NumberOfFrames": (1, TEXTS), "SliceThickness": (1, TEXTS),
    "SpacingBetweenSlices": (1, TEXTS), "GantryDetectorTilt": (1, TEXTS), "Rows": (1, SHORTS), "Columns": (1, SHORTS),
    "BitsAllocated": (1, SHORTS), "BitsStored": (1, SHORTS), "HighBit": (1, SHORTS), "PixelRepresentation": (1, SHORTS),
    "SamplesPerPixel": (1, SHORTS), "Modality": (1, ("MR", "ct", "")), "SeriesInstanceUID": (1, ("1.2.9", "", "x")),
    "PhotometricInterpretation": (1, ("RGB", "MONOCHROME1", "PALETTE COLOR", "x")),
    "ImageType": (1, ("ORIGINAL", "", "A\\B\\AXIAL")),
}  # fmt: skip


@st.composite
def edits(draw) -> tuple[str, object]:
    """A tag and what to set it to."""
    tag = draw(st.sampled_from(sorted(TAGS)))
    n, values = TAGS[tag]
    if draw(st.integers(0, 7)) == 0:
        return tag, None
    if values is SHORTS:
        return tag, draw(st.sampled_from(SHORTS))
    n += draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
    return tag, "\\".join(draw(st.sampled_from(values)) for _ in range(n))


@fuzz(
    150,
    *((("PixelSpacing", value), None) for value in ("0.7\\-0.7", "0.7\\0.9")),  # mirrored; of two sizes
    (("Rows", 8), None),  # half of each slice
    (("Rows", 17), None),  # a row of nothing
    *((edit, None) for edit in (("Columns", 9), ("BitsAllocated", 8), ("BitsStored", 15), ("HighBit", 15))),
    *((("RescaleIntercept", value), 5) for value in ("NaN", "abc")),
    *((("RescaleSlope", value), 5) for value in ("inf", "0", "-1", "2")),
    *((("NumberOfFrames", value), None) for value in ("abc", "inf")),
    *((("GantryDetectorTilt", value), None) for value in ("abc", "1\\2")),
    (("PhotometricInterpretation", "MONOCHROME1"), 5),  # the decoder inverts it
    (("PhotometricInterpretation", "RGB"), None),
    (("Modality", None), 5),  # the last slice was left out
    (("Modality", "OT"), 0),
    (("SeriesInstanceUID", None), None),
    edit=edits(),
    where=st.none() | st.integers(0, 5),
)
def test_dicom_tags_of_one_slice_or_of_all(edit, where):
    ct = check_dicom([edited(s, *edit) if where in (None, k) else s for k, s in enumerate(stack())])
    assert ct is not None or edit != ("RescaleSlope", "2")


@fuzz(20, ({11},), gone=st.sets(st.integers(0, 23), min_size=1, max_size=4))
def test_missing_slices_within_the_stack_are_noticed(gone):
    left = sorted(set(range(24)) - gone)
    ct = check_dicom({f"{k:03d}.dcm": stack(24)[k] for k in left})
    assert (ct is not None) is (left[-1] - left[0] == len(left) - 1)  # fewer at an end is a shorter scan
    assert ct is None or ct.affine[2, 3] == 2 * left[0]


@fuzz(10, k=st.integers(0, 5), name=st.sampled_from(["a.dcm", "z.dcm", "sub.dcm", "copy"]))
def test_a_slice_twice_counts_once_and_two_slices_at_one_place_are_refused(k, name):
    files = named(stack()) | {name: stack()[k]}
    with folder_of(files) as folder:
        np.testing.assert_array_equal(read_one(folder).array, check_dicom(stack()).array)
    assert check_dicom(files | {name: edited(stack()[k - 1], "ImagePositionPatient", f"0\\0\\{2 * k}")}) is None


@fuzz(15, order=st.permutations(range(6)))
def test_the_position_and_not_the_file_decides_where_a_slice_lies(order):
    places = [f"0\\0\\{2 * k}" for k in order]
    assert check_dicom([edited(s, "ImagePositionPatient", p) for s, p in zip(stack(), places, strict=True)]) is not None


@pytest.mark.parametrize("late", [0.1, 0.0])
def test_small_uneven_steps_must_not_add_up(late):
    z = np.cumsum([0.0] + [1.0] * 11 + [1 + late] * 12)
    slices = [edited(s, "ImagePositionPatient", f"0\\0\\{z[k]:.3f}") for k, s in enumerate(stack(24))]
    assert (check_dicom(slices) is None) is (late > 0)


@fuzz(60, (5, 0.0), (5, 0.2), (5, 0.99), k=st.integers(0, 5), part=PART)  # (5, 0.0): the scan became shorter
def test_a_slice_cut_anywhere_is_refused(k, part):
    assert check_dicom([s[: int(part * len(s))] if j == k else s for j, s in enumerate(stack())]) is None


@fuzz(120, where=st.none() | st.integers(0, 5), bits=BITS)
def test_dicom_header_with_flipped_bits(where, bits):
    pixels = 2 * 16 * 18
    check_dicom([flipped(s, bits, 128, -pixels) if where in (None, k) else s for k, s in enumerate(stack())])


@fuzz(
    50, (b"\0\5\x16\7", False, "._000.dcm"),
    content=st.binary(max_size=300), dicom=st.booleans(), name=st.sampled_from(["x", "x.dcm", "._x.dcm", "x.txt"]),
)  # fmt: skip
def test_strangers_in_the_folder_change_nothing(content, dicom, name):
    ct = check_dicom(named(stack()) | {name: b"\0" * 128 + b"DICM" + content if dicom else content})
    assert ct is not None or dicom or name == "x.dcm"
    assert ct is None or ct.shape == (18, 16, 6) and ct.affine[2, 3] == 0


@fuzz(
    40, (5, b"", "IM{:04d}"), (0, b"", "IM{:04d}"),  # 5: the scan became shorter
    k=st.integers(0, 5), content=st.sampled_from([b"", b"\0" * 200, b"no DICOM", b"\0" * 128 + b"DICX" + b"\0" * 500]),
    name=st.sampled_from(["IM{:04d}", "{:d}", "1.2.840.{:d}", "I.{:03d}.ima", "CT_{:d}.img", "1f3a{:08x}", "a-{:d}/slice"]),
)  # fmt: skip
def test_a_slice_that_is_no_dicom_is_missed_whatever_the_names(k, content, name):
    strangers = dict.fromkeys(("README", "DICOMDIR", "notes.txt", "._IM0001", "VERSION"), b"hello")
    with folder_of({name.format(j): s for j, s in enumerate(stack())} | strangers) as folder:
        assert holds_dicom(folder) and read_one(folder).shape == (18, 16, 6)
        (folder / name.format(k)).write_bytes(content)
        assert "/" in name or outcome(read_one, folder) is None  # with "/", each slice is alone in its folder


def test_a_folder_holds_dicom_by_its_files_and_not_by_their_names():
    files = {"a.dcm": b"text", "._b": b"\0" * 128 + b"DICM", "DICOMDIR": b"\0" * 128 + b"DICM"}
    for more, holds in (({}, False), ({"deep/0001": stack()[0]}, True)):
        with folder_of(files | more) as folder:
            assert holds_dicom(folder) is holds


@fuzz(5, k=st.integers(1, 5))
def test_two_series_are_never_mixed(k):
    slices = [edited(s, "SeriesInstanceUID", "1.2.9") if j >= k else s for j, s in enumerate(stack())]
    with folder_of(named(slices)) as folder:
        assert outcome(read_one, folder) is None
        assert read_series(folder, "1.2.9")[0].shape[2] == 6 - k


@functools.cache
def zipped() -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in named(stack()).items():
            archive.writestr(name, content)
    return out.getvalue()


@fuzz(100, ([17 * 8 + 1], True, 0.5), bits=BITS, from_end=st.booleans(), part=st.none() | PART)
def test_a_damaged_zip_gives_the_series_or_nothing(bits, from_end, part):
    content = flipped(zipped(), bits, -400 if from_end else 0)  # at the end is the list of files
    ct = tried(read_one, content if part is None else content[: int(part * len(content))], "s.zip")
    assert ct is None or ct.shape == (18, 16, 6) and ct.affine[2, 3] == 0


@pytest.mark.parametrize("kept", ["002 twice, 000 never", "000 alone"])
def test_a_zip_whose_list_of_files_is_wrong(kept):
    content = bytearray(zipped())
    start = content.index(b"PK\1\2")  # its first entry
    if kept == "000 alone":
        content[start + 32 : start + 34] = (5 * (46 + 7)).to_bytes(2, "little")  # the others as a comment
    else:
        third = content.index(b"002.dcm", start) - 46
        content[start : start + 53] = content[third : third + 53]
    assert tried(read_one, bytes(content), "s.zip") is None


# -- plans, records and histograms -------------------------------------------------------------------------------------

CELLS = st.sampled_from(["", "solid", "part-solid", "10", "6", "30.5", "nan", "inf", "-1", "1e400", "9" * 30, "LUL", "inner",
                         "1 2 3", "1,2", "x.nii", "\0", "x" * 300, '"', "é", "0x10", "1_0"])  # fmt: skip
COLUMNS = ("subtype", "diameter_mm", "lobe", "location", "at", "histogram", "spiculation", "core_mm", "mask", "seed")


def table(rows: list[list[str]]) -> bytes:
    csv.writer(out := io.StringIO()).writerows(rows)
    return out.getvalue().encode()


PLANS = st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True).flatmap(
    lambda head: st.lists(st.lists(CELLS, min_size=len(head), max_size=len(head)), max_size=3).map(lambda b: table([head, *b]))
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.sampled_from(["solid", "LUL", "x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS + ("x",)), inner, max_size=3),
    max_leaves=6,
)
RECORDS = JSON | st.lists(JSON.map(lambda w: {"wish": w}), max_size=3).map(lambda n: {"nodules": n})
SHARES = st.lists(
    st.sampled_from(["0", "1", "0.5", "1e308", "5e-324", "-1", "nan", "inf", "x"]), min_size=39, max_size=41
)


@fuzz(
    200,
    (table([["mask"], ["x" * 300]]),),
    content=PLANS | st.binary(max_size=80) | st.text(max_size=80).map(str.encode),
)
def test_any_plan(content):
    wishes = tried(read_plan, content, "plan.csv")
    assert wishes is None or wishes and all(isinstance(w, Wish) and w.subtype in SUBTYPES for w in wishes)


@fuzz(
    80, (b'{"nodules": [{"wish": {"diameter_mm": 0}}]}',), (b'{"nodules": [{"wish": ["ab"]}]}',),
    content=RECORDS.map(json.dumps).map(str.encode) | st.binary(max_size=60),
)  # fmt: skip
def test_any_record(content):
    wishes = tried(read_plan, content, "record.json")
    assert wishes is None or all(isinstance(w, Wish) and w.subtype in SUBTYPES for w in wishes)


@fuzz(100, (b"1 " * 40,), (b"1e308 " * 40,), content=SHARES.map(" ".join).map(str.encode) | st.binary(max_size=80))
def test_any_histogram(content):
    shares = tried(read_histogram, content, "histogram.txt")
    assert shares is None or shares.shape == (40,) and (shares >= 0).all() and abs(shares.sum() - 1) < 1e-9
