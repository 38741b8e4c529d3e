"""Whole insertions from disk to disk over voxel orders, obliquities, spacings, dtypes and formats: background and geometry
exact, the lesion where the record says, and no error.

A sample runs with the tests. `HRLDM_FUZZ=10000 pytest tests/insertion/test_any_scan.py` runs as many, each a case of its own
seed; `HRLDM_FUZZ_FROM` sets the first.
"""

import itertools
import os
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct import lungs
from hrldm.ct.geometry import to_world
from hrldm.ct.volume import read_ct
from hrldm.insertion import files
from hrldm.insertion.wish import Wish
from tests import tiny
from tests.insertion.chests import places, save

FIRST, COUNT = int(os.environ.get("HRLDM_FUZZ_FROM", 0)), int(os.environ.get("HRLDM_FUZZ", 40))
FLIPS = list(itertools.product((1.0, -1.0), repeat=3))
ORDERS = [np.eye(3)[:, axes] * signs for axes in itertools.permutations(range(3)) for signs in FLIPS]
AT, RADII, BODY = np.array([36.0, 0.0, 0.0]), np.array([24.0, 26.0, 34.0]), np.array([75.0, 45.0])


def small_chest(affine, shape, rng):
    """HU (X, Y, Z) of a small chest, sharp noise in it, and its lungs: 1 left, 2 right."""
    world = places(affine, shape)
    side = [(((world - s * AT) / RADII) ** 2).sum(-1) < 1 for s in (-1, 1)]
    hu = np.where(((world[..., :2] / BODY) ** 2).sum(-1) < 1, 40.0, -1000.0)
    hu[side[0] | side[1]] = -860.0
    return hu + rng.normal(0, rng.choice([10, 60, 110]), shape), side[0] + 2 * side[1].astype(np.uint8)


NIFTI = [
    ("<i2", 1, 0), (">i2", 1, 0), ("<i4", 1, 0), ("<i4", 0.5, 10), ("<u2", 1, -1024), ("<f4", 1, 0), (">f8", 1, 0), ("<i2", 0.1, -5),
    ("<i1", 12, 400), ("<u1", 12, -1024),
]  # fmt: skip
DICOM = [
    {"signed": False, "bits": 12}, {"signed": False, "bits": 16}, {"signed": True, "bits": 16, "inter": 0.0},
    {"signed": True, "bits": 13, "inter": -24.0}, {"signed": False, "bits": 12, "slope": 2.0, "inter": -1000.0},
    {"signed": True, "bits": 32, "allocated": 32, "inter": 0.0}, {"signed": False, "bits": 8, "allocated": 8, "slope": 8.0},
    {"signed": False, "bits": 12, "slope": 0.7, "inter": -1023.5},
]  # fmt: skip


def write_scan(folder, hu, affine, rng):
    """The scan in one of many formats; its path and a few words for it."""
    if rng.random() < 0.35:  # of more than a hundred files each
        kind = DICOM[rng.integers(len(DICOM))]
        syntax = (pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian)[rng.integers(2)]
        name = ("{:04d}.dcm", "IM{:04d}", "1.2.3.{:d}")[rng.integers(3)]
        path = tiny.dicom_series(folder / "in" / "series", hu, affine, syntax=syntax, name=name, **kind)
        if rng.random() < 0.3:
            path = shutil.make_archive(str(folder / "scan"), "zip", path)
        return path, f"{kind} {syntax.name} {name}"
    dtype, slope, inter = NIFTI[rng.integers(len(NIFTI))]
    dtype = np.dtype(dtype)
    stored = (hu - inter) / slope
    if dtype.kind in "iu":
        stored = np.rint(stored).clip(max(np.iinfo(dtype).min, -32768), min(np.iinfo(dtype).max, 65535))
    kind = (nib.Nifti1Image, nib.Nifti2Image)[rng.integers(2)]
    header = kind.header_class(endianness="<>"[dtype.byteorder == ">"])
    header.set_data_dtype(dtype)
    image = kind(stored.astype(dtype), affine, header)
    image.header.set_slope_inter(slope, inter)
    codes = ((1, 0), (0, 1), (1, 1), (2, 4))[rng.integers(4)]
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    path = folder / f"scan.nii{'.gz' * int(rng.integers(2))}"
    nib.save(image, path)
    return path, f"{dtype.str} {slope} {inter} {kind.__name__} {codes}"


def write_map(folder, sides, affine, rng):
    """A lung mask or a lobe map of the scan in either numbering, perhaps flipped with its affine; or none."""
    choice = rng.integers(4)
    if choice == 0:
        return None
    upper = places(affine, sides.shape)[..., 2] > 0
    values = sides > 0
    if choice > 1:  # version 2's lobe numbers, or version 1's
        lobes = np.where(sides == 1, np.where(upper, 10, 11), np.where(upper, 12, 14)) + (3 if choice == 3 else 0)
        values = lobes * values
    if rng.random() < 0.5:
        affine = affine @ nib.orientations.inv_ornt_aff([[0, 1], [1, -1], [2, 1]], sides.shape)
        values = values[:, ::-1]
    return save(folder / "map.nii.gz", values.astype(np.uint8), affine)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_any_scan(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(lungs, "LEAST_ML", 50.0)
    rng = np.random.default_rng(seed)
    turn = Rotation.from_euler("xyz", rng.uniform(-25, 25, 3) * (rng.random() < 0.6), degrees=True).as_matrix()
    turn = turn @ ORDERS[seed % 48]
    extent = np.array([165.0, 105.0, rng.choice([50.0, 84.0])])  # the lungs are 68 mm high
    spacing = rng.uniform(1.6, 3.9, 3) if extent[2] > 60 else rng.uniform(1.4, 2.2, 3)
    affine, shape = tiny.chest_grid(turn, tuple(spacing), tuple(extent))
    affine[:3, 3] += (shift := rng.uniform(-200, 200, 3) * (rng.random() < 0.5))
    hu, sides = small_chest(affine - np.pad(shift[:, None], ((0, 1), (3, 0))), shape, rng)
    path, words = write_scan(tmp_path, hu, affine, rng)
    map_ = write_map(tmp_path, sides, affine, rng)
    kinds = rng.permutation(["solid", "part-solid", "ground-glass"])[: rng.integers(1, 3)]
    wishes = []
    for k, kind in enumerate(kinds):
        size, location = float(rng.uniform(6, 9)), str(rng.choice(["inner", "subpleural"]))
        wishes.append(Wish(str(kind), size, location=location, seed=seed + k))
    print(seed, shape, affine.round(3).tolist(), words, map_, wishes)

    record = files.insert_file(path, tmp_path / "out", wishes, tiny.PaintingGenerator(), map_)

    before = read_ct(path)
    if before.affine[:3, 2] @ affine[:3, 2] < 0:  # slices of DICOM are sorted along their normal
        sides = sides[:, :, ::-1]
    written = next((tmp_path / "out").glob("ct.nii*"))
    image, mask = nib.load(written), nib.load(tmp_path / "out" / "mask.nii.gz")
    lesions = np.asarray(mask.dataobj)
    assert set(np.unique(lesions)) == set(range(len(wishes) + 1))
    np.testing.assert_allclose(mask.affine, before.affine, atol=1e-4)
    after = [np.asanyarray(image.dataobj.get_unscaled())]
    if before.header is not None:  # all of the header is as it was
        source = nib.load(path)
        assert image.header.binaryblock == source.header.binaryblock and type(image) is type(source)
        np.testing.assert_array_equal(image.affine, source.affine)
        old = np.asanyarray(source.dataobj.get_unscaled())
    else:
        derived = read_ct(tmp_path / "out" / "dicom")
        np.testing.assert_array_equal(derived.affine, before.affine)
        np.testing.assert_allclose(image.affine, before.affine, atol=1e-4)
        after.append(derived.array)
        old = before.array
        np.testing.assert_array_equal(after[0], after[1])
    distance = ndimage.distance_transform_edt(lesions == 0, before.spacing)
    far = distance > max(nodule["scan"]["reach_mm"] for nodule in record["nodules"]) + 0.01
    for new in after:
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new[far], old[far])
        assert (new != old).sum() == record["voxels_changed"] > 0
    for k, nodule in enumerate(record["nodules"], start=1):
        at = np.argwhere(lesions == k)
        assert np.linalg.norm(to_world(before.affine, at.mean(0)) - nodule["centre_ras_mm"]) < 3 + before.spacing.max()
        assert (sides[tuple(at.T)] > 0).mean() > 0.85
        if map_ is not None and nodule["lobe"] != "lung":
            side = {1: "L", 2: "R"}[int(np.bincount(sides[tuple(at.T)], minlength=3)[1:].argmax()) + 1]
            assert nodule["lobe"].startswith(side)
        lung = before.array[tuple(at.T)].astype(float).mean()
        lesion = after[0][tuple(at.T)].astype(float).mean() * before.slope + before.inter
        assert lesion > lung - 15 or nodule["wish"]["subtype"] == "ground-glass"
    shutil.rmtree(tmp_path)  # of ten thousand cases those stay that failed
