"""What lies beside a scan is refused by what it shows: of other numbers, mirrored, turned, moved, without its affine."""

import numpy as np
import pytest
import SimpleITK as sitk

from hrldm.ct import lungs
from hrldm.ct.label_maps import read_avoided
from hrldm.ct.volume import CT
from tests.ct.test_lungs import STRAIGHT, saved, world
from tests.ct.test_lungs import chest as phantom

SPACING = (4.0, 4.0, 5.0)
NUMBERS = {  # of the lobes LUL, LLL, RUL, RML, RLL, as their authors list them
    "TotalSegmentator v2": (10, 11, 12, 13, 14),
    "TotalSegmentator v1": (13, 14, 15, 16, 17),
    "MAISI and VISTA3D": (28, 29, 30, 31, 32),
}
OTHERS = {  # organs with the numbers of other numberings' lobes
    "TotalSegmentator v2": (15, 16, 17, 28, 29, 30, 32),  # oesophagus, trachea, thyroid, vertebrae
    "TotalSegmentator v1": (10, 11, 12, 28, 29, 30),  # pancreas, adrenals, vertebrae
    "MAISI and VISTA3D": (10, 11, 12, 13, 14, 15),  # gallbladder, oesophagus, stomach, duodenum, kidney, bladder
}


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(lungs, "GRID_MM", 4.0)


@pytest.fixture(scope="module")
def chest() -> tuple[CT, np.ndarray]:
    """A chest with a heart on the left and a liver below the right lung, and its five lobes in our numbers."""
    ct, lung = phantom(STRAIGHT, SPACING)
    x, y, z = world(ct.affine, ct.shape)
    solid = (((x + 30) / 45) ** 2 + ((y - 25) / 40) ** 2 + ((z + 25) / 50) ** 2 < 1) | ((x > 0) & (z < -45))
    ct.array[lung & solid] = 40
    lobes = np.where(x < 0, np.where(z > y, 10, 11), np.where(z < -10, 14, np.where(z > 20, 12, 13)))
    return ct, np.where(lung & (ct.array < -700) & ~solid, lobes, 0).astype(np.uint8)


def numbered(lobes, numbering):
    return np.select([lobes == k for k in range(10, 15)], NUMBERS[numbering], 0)


@pytest.mark.parametrize("kept", [(10, 11, 12, 13, 14), (10, 11), (12, 13, 14), (13, 14), (10,)])
@pytest.mark.parametrize("numbering", NUMBERS)
def test_lobes_are_read_in_either_numbering_whole_or_in_part(tmp_path, chest, kept, numbering):
    ct, lobes = chest
    lobes = np.where(np.isin(lobes, kept), lobes, 0)
    labels, source = lungs.lung_labels(ct, saved(tmp_path, numbered(lobes, numbering), ct.affine))
    np.testing.assert_array_equal(labels, lobes)
    assert source == f"map.nii.gz ({numbering} numbers)"


@pytest.mark.parametrize("numbering", NUMBERS)
def test_a_map_of_all_organs_is_told_by_its_lungs(tmp_path, chest, numbering):
    ct, lobes = chest
    given = numbered(lobes, numbering)
    free = np.argwhere(ct.array > 0)
    for k, organ in enumerate(OTHERS[numbering]):
        given[tuple(free[k * 400 : (k + 1) * 400].T)] = organ
    given[0, 0, 0], given[tuple(free[-1])] = 1, 5
    labels, source = lungs.lung_labels(ct, saved(tmp_path, given, ct.affine))
    assert numbering in source
    np.testing.assert_array_equal(labels[lobes > 0], lobes[lobes > 0])


def test_a_map_of_luna16_is_read_without_its_windpipe(tmp_path, chest):
    ct, lobes = chest
    values = np.select([np.isin(lobes, (10, 11)), lobes > 11], (3, 4), 0)
    values[tuple(np.argwhere(ct.array > 0)[:300].T)] = 5
    labels, source = lungs.lung_labels(ct, saved(tmp_path, values, ct.affine))
    np.testing.assert_array_equal(labels, lobes > 0)
    assert source == "map.nii.gz"


def test_maps_may_be_metaimages_as_those_of_luna16(tmp_path, chest):
    ct, lobes = chest
    image = sitk.GetImageFromArray(lobes.transpose(2, 1, 0))
    lps = np.diag([-1.0, -1, 1, 1]) @ ct.affine
    image.SetSpacing(SPACING)
    image.SetDirection((lps[:3, :3] / SPACING).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(tmp_path / "map.mhd"))
    labels, source = lungs.lung_labels(ct, tmp_path / "map.mhd")
    np.testing.assert_array_equal(labels, lobes)
    assert source == "map.mhd (TotalSegmentator v2 numbers)"


def test_diseased_lungs_that_a_threshold_misses_belong_to_their_map(tmp_path, chest):
    ct, lobes = chest
    sick = CT(np.where(lobes == 14, 20, ct.array).astype(np.int16), ct.affine, source="scan.nii.gz")
    labels, _ = lungs.lung_labels(sick, saved(tmp_path, lobes, ct.affine))
    np.testing.assert_array_equal(labels, lobes)


WRONG = {
    "both sides on one": (lambda a: np.array([*range(10), 0, 0, 10, 11, 14], np.uint8)[a], "patient's right"),
    "left and right": (lambda a: a[::-1], "left lobes lie on the patient's right"),
    "upside down": (lambda a: a[:, :, ::-1], "its LUL lies below its LLL|not the lungs"),
    "numbers of another program": (lambda a: np.select([a == k for k in (12, 13, 14, 10, 11)], range(10, 15), 0), "patient's right"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("numbering", NUMBERS)
def test_lobes_on_the_wrong_side_or_in_the_wrong_order_are_refused(tmp_path, chest, case, numbering):
    (ct, lobes), (change, words) = chest, WRONG[case]
    with pytest.raises(ValueError, match=f"map.nii.gz: .*({words})"):
        lungs.lung_labels(ct, saved(tmp_path, numbered(change(lobes), numbering), ct.affine))


@pytest.mark.parametrize(
    ("flipped", "moved", "words"),
    [
        (0, (0, 0, 0), "mirrored along axis 0"),
        (1, (0, 0, 0), "mirrored along axis 1"),
        ((), (16, 0, 0), "moved by -1[26], 0, 0 mm"),
        ((), (0, 0, 30), "moved by 0, 0, -(24|30) mm"),
    ],
)
def test_a_plain_mask_that_fits_better_otherwise_is_refused_and_how_is_said(tmp_path, chest, flipped, moved, words):
    ct, lobes = chest
    affine = ct.affine.copy()
    affine[:3, 3] += moved
    said = rf"map.nii.gz: \d+% of it lies in the lungs of scan.nii.gz, and \d+% would if it were {words}"
    with pytest.raises(ValueError, match=said):
        lungs.lung_labels(ct, saved(tmp_path, np.flip(lobes, flipped) > 0, affine))


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0]), np.diag([*SPACING, 1.0])])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_file_whose_affine_was_lost_is_refused_whatever_it_is(tmp_path, chest, affine, order):
    ct, lobes = chest
    path = saved(tmp_path, (lobes > 0).transpose(order), affine)
    for read in (lambda: lungs.lung_labels(ct, path), lambda: read_avoided(path, ct, lobes)):
        with pytest.raises(ValueError, match="map.nii.gz: its affine is not that of scan.nii.gz .*save it again with the affine"):  # fmt: skip
            read()


def ball(ct, at, radius=9):
    return ((world(ct.affine, ct.shape) - np.reshape(at, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2


@pytest.mark.parametrize("at", [(-70, -20, 30), (70, 58, 40)], ids=["within", "at the pleura"])
def test_known_lesions_lie_in_or_at_the_lungs(tmp_path, chest, at):
    ct, lobes = chest
    mask = ball(ct, at)
    np.testing.assert_array_equal(read_avoided(saved(tmp_path, mask, ct.affine), ct, lobes), mask)


ASIDE = "map.nii.gz: .*{}.*is it the mask of this scan"


@pytest.mark.parametrize(
    ("at", "moved_mm", "words"),
    [
        ((0, -90, 0), 0, ASIDE.format("beside the lungs")),
        ((0, -118, 0), 0, ASIDE.format("air or bone")),
        ((0, 70, 20), 0, ASIDE.format("beside the lungs")),
        ((124, 0, 0), 0, r"mean of \d+ HU \(air or bone"),
        ((0, 0, 0), 900, "map.nii.gz: no voxel of it lies within"),
        ((999, 0, 0), 0, "map.nii.gz: empty mask"),
    ],
)
def test_a_mask_that_marks_no_lesion_is_refused(tmp_path, chest, at, moved_mm, words):
    ct, lobes = chest
    bone = ball(ct, (124, 0, 0))
    ct = CT(np.where(bone, 900, ct.array), ct.affine)
    path = saved(tmp_path, ball(ct, at, 6 if at[0] == 124 else 9), ct.affine + np.eye(4, k=3) * moved_mm)
    with pytest.raises(ValueError, match=words):
        read_avoided(path, ct, np.where(bone, 0, lobes))
