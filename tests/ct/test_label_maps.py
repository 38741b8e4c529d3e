"""What lies beside a scan is refused by what it shows: of other numbers, mirrored, turned, moved, without its affine."""

import nibabel as nib
import numpy as np
import pytest

from hrldm.ct import lungs
from hrldm.ct.geometry import to_world
from hrldm.ct.label_maps import read_avoided
from hrldm.ct.volume import CT
from tests import tiny

SPACING = (4.0, 4.0, 5.0)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(lungs, "GRID_MM", 4.0)


@pytest.fixture(scope="module")
def chest() -> tuple[CT, np.ndarray]:
    """A chest with a heart on the left and a liver below the right lung, and its five lobes in our numbers."""
    affine, shape = tiny.chest_grid(np.eye(3), SPACING)
    hu = tiny.chest(affine, shape)
    x, y, z = to_world(affine, np.indices(shape).reshape(3, -1).T).T.reshape(3, *shape)
    lung = (hu < -700) & (((abs(x) - 70) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1)
    solid = (((x + 30) / 45) ** 2 + ((y - 25) / 40) ** 2 + ((z + 25) / 50) ** 2 < 1) | ((x > 0) & (z < -45))
    hu[lung & solid] = 40
    lobes = np.where(x < 0, np.where(z > y, 10, 11), np.where(z < -10, 14, np.where(z > 20, 12, 13)))
    return CT(hu, affine, source="scan.nii.gz"), np.where(lung & ~solid, lobes, 0).astype(np.uint8)


def saved(folder, array, affine):
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), folder / "map.nii.gz")
    return folder / "map.nii.gz"


V1 = {10: 13, 11: 14, 12: 15, 13: 16, 14: 17}


def in_v1(lobes):
    return np.select([lobes == k for k in V1], list(V1.values()), 0)


@pytest.mark.parametrize("kept", [(10, 11, 12, 13, 14), (10, 11), (12, 13, 14), (13, 14), (10,), (14,)])
@pytest.mark.parametrize("numbering", ["v1", "v2"])
def test_lobes_are_read_in_either_numbering_whole_or_in_part(tmp_path, chest, kept, numbering):
    ct, lobes = chest
    lobes = np.where(np.isin(lobes, kept), lobes, 0)
    if (lobes > 0).sum() * np.prod(SPACING) < 400e3:
        pytest.skip("fewer than 400 ml are no map of lungs")
    given = in_v1(lobes) if numbering == "v1" else lobes
    labels, source = lungs.lung_labels(ct, saved(tmp_path, given, ct.affine))
    np.testing.assert_array_equal(labels, lobes)
    assert source == f"map.nii.gz (TotalSegmentator {numbering} numbers)"


@pytest.mark.parametrize("numbering", ["v1", "v2"])
def test_a_map_of_all_organs_is_told_by_its_lungs(tmp_path, chest, numbering):
    """v1 has the pancreas and the adrenals where v2 has lobes; v2 oesophagus, trachea and thyroid where v1 has lobes."""
    ct, lobes = chest
    given = in_v1(lobes) if numbering == "v1" else lobes.copy()
    free = np.argwhere(ct.array > 0)
    for k, organ in enumerate((10, 11, 12) if numbering == "v1" else (15, 16, 17)):
        given[tuple(free[k * 400 : (k + 1) * 400].T)] = organ
    given[0, 0, 0], given[tuple(free[-1])] = 1, 5
    labels, source = lungs.lung_labels(ct, saved(tmp_path, given, ct.affine))
    assert numbering in source
    inside = lobes > 0
    np.testing.assert_array_equal(labels[inside], lobes[inside])


def test_a_map_of_luna16_is_read_without_its_windpipe(tmp_path, chest):
    ct, lobes = chest
    values = np.select([np.isin(lobes, (10, 11)), lobes > 11], (3, 4), 0)
    values[tuple(np.argwhere(ct.array > 0)[:300].T)] = 5
    labels, source = lungs.lung_labels(ct, saved(tmp_path, values, ct.affine))
    np.testing.assert_array_equal(labels, lobes > 0)
    assert source == "map.nii.gz"


WRONG = {
    "both sides on one": (lambda a: np.array([*range(10), 0, 0, 10, 11, 14], np.uint8)[a], "patient's right"),
    "left and right": (lambda a: a[::-1], "left lobes lie on the patient's right"),
    "upside down": (lambda a: a[:, :, ::-1], "its LUL lies below its LLL|not the lungs"),
    "numbers of another program": (lambda a: np.select([a == k for k in (12, 13, 14, 10, 11)], range(10, 15), 0), "patient's right"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("numbering", ["v1", "v2"])
def test_lobes_on_the_wrong_side_or_in_the_wrong_order_are_refused(tmp_path, chest, case, numbering):
    (ct, lobes), (change, words) = chest, WRONG[case]
    wrong = change(lobes)
    with pytest.raises(ValueError, match=f"map.nii.gz: .*({words})"):
        lungs.lung_labels(ct, saved(tmp_path, in_v1(wrong) if numbering == "v1" else wrong, ct.affine))


@pytest.mark.parametrize(
    ("change", "move", "words"),
    [
        (lambda a: a[::-1], (0, 0, 0), "would if it were mirrored along axis 0"),
        (lambda a: a[:, ::-1], (0, 0, 0), "would if it were mirrored along axis 1"),
        (lambda a: a, (16, 0, 0), "would if it were moved by -1[26], 0, 0 mm"),
        (lambda a: a, (0, 0, 30), "would if it were moved by 0, 0, -(24|30) mm"),
    ],
)
def test_a_plain_mask_that_fits_better_otherwise_is_refused_and_how_is_said(tmp_path, chest, change, move, words):
    ct, lobes = chest
    affine = ct.affine.copy()
    affine[:3, 3] += move
    with pytest.raises(ValueError, match=rf"map.nii.gz: \d+% of it lies in the lungs of scan.nii.gz, and \d+% {words}"):
        lungs.lung_labels(ct, saved(tmp_path, change(lobes) > 0, affine))


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0]), np.diag([*SPACING, 1.0])])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_file_whose_affine_was_lost_is_refused_whatever_it_is(tmp_path, chest, affine, order):
    ct, lobes = chest
    path = saved(tmp_path, (lobes > 0).transpose(order), affine)
    for read in (lambda: lungs.lung_labels(ct, path), lambda: read_avoided(path, ct, lobes)):
        with pytest.raises(ValueError, match="map.nii.gz: its affine is not that of scan.nii.gz .*save it again with the affine"):  # fmt: skip
            read()


def test_diseased_lungs_that_a_threshold_misses_belong_to_their_map(tmp_path, chest):
    ct, lobes = chest
    sick = CT(np.where(lobes == 14, 20, ct.array).astype(np.int16), ct.affine, source="scan.nii.gz")
    labels, _ = lungs.lung_labels(sick, saved(tmp_path, lobes, ct.affine))
    np.testing.assert_array_equal(labels, lobes)


def ball(ct, at, radius):
    return ((to_world(ct.affine, np.stack(np.indices(ct.shape), -1)) - at) ** 2).sum(-1) <= radius**2


def test_known_lesions_lie_in_or_at_the_lungs_and_anything_else_is_refused(tmp_path, chest):
    ct, lobes = chest
    for at in ((-70, -20, 30), (70, 58, 40)):  # within, and at the pleura
        mask = ball(ct, at, 9)
        np.testing.assert_array_equal(read_avoided(saved(tmp_path, mask, ct.affine), ct, lobes), mask)
    for at, words in (
        ((0, -90, 0), "beside the lungs"),
        ((0, -118, 0), "air or bone"),
        ((0, 70, 20), "beside the lungs"),
    ):
        with pytest.raises(ValueError, match=f"map.nii.gz: .*{words}.*is it the mask of this scan"):
            read_avoided(saved(tmp_path, ball(ct, at, 9), ct.affine), ct, lobes)
    bone = CT(np.where(ball(ct, (124, 0, 0), 9), 900, ct.array), ct.affine)
    with pytest.raises(ValueError, match=r"mean of \d+ HU \(air or bone"):
        read_avoided(saved(tmp_path, ball(ct, (124, 0, 0), 6), ct.affine), bone, np.where(bone.array > 500, 0, lobes))
    with pytest.raises(ValueError, match="map.nii.gz: no voxel of it lies within"):
        read_avoided(saved(tmp_path, ball(ct, (0, 0, 0), 9), ct.affine + np.eye(4, k=3) * 900), ct, lobes)
    with pytest.raises(ValueError, match="map.nii.gz: empty mask"):
        read_avoided(saved(tmp_path, lobes * 0, ct.affine), ct, lobes)
