"""Lungs by threshold, from the user's map and from TotalSegmentator; what is no lung of this CT is refused."""

import itertools
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct import lungs
from hrldm.ct.geometry import shifted, to_world
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.volume import CT, read_ct
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from tests import tiny

STRAIGHT = np.eye(3)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def world(affine: np.ndarray, shape: tuple) -> np.ndarray:
    """RAS mm (3, X, Y, Z) of all voxels of a grid."""
    return np.moveaxis(to_world(affine, np.stack(np.indices(shape), -1)), -1, 0)


def chest(turn=STRAIGHT, spacing=(2.5, 2.5, 3.0), extent=(350.0, 250.0, 210.0)) -> tuple[CT, np.ndarray]:
    """A phantom and its true lungs."""
    affine, shape = tiny.chest_grid(turn, spacing, extent)
    x, y, z = world(affine, shape)
    truth = ((abs(x) - 70) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1
    return CT(tiny.chest(affine, shape), affine, source="scan.nii.gz"), truth


def saved(folder: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), folder / "map.nii.gz")
    return folder / "map.nii.gz"


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, -15, 20), (180, 0, 90)])
def test_threshold_finds_both_lungs_in_any_orientation(angles):
    ct, truth = chest(Rotation.from_euler("xyz", angles, degrees=True).as_matrix())
    assert dice(lungs.threshold_lungs(ct), truth) > 0.97


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_lungs_cut_at_head_and_foot_are_found_whatever_axis_that_is(order, monkeypatch):
    """All 48 voxel orders: the lungs reach the first and the last slice, where the axes' own ends are not air."""
    monkeypatch.setattr(lungs, "GRID_MM", 4.0)
    for signs in itertools.product((1.0, -1.0), repeat=3):
        ct, truth = chest(np.eye(3)[:, order] * signs, (4.0, 4.0, 4.0), (350.0, 250.0, 120.0))
        assert dice(lungs.threshold_lungs(ct), truth) > 0.95


def test_a_nodule_at_the_pleura_and_a_vessel_belong_to_the_lung():
    ct, truth = chest()
    x, y, z = world(ct.affine, ct.shape)
    at = np.unravel_index(np.where(truth, x, 0).argmax(), ct.shape)  # the right lung's outermost voxel
    ball = (x - x[at] + 5) ** 2 + (y - y[at]) ** 2 + (z - z[at]) ** 2 < 6**2
    ct.array[ball] = 30
    found = lungs.threshold_lungs(ct)
    assert found[ball & truth].mean() > 0.8 and dice(found, truth) > 0.97


def test_a_lung_cut_by_the_edge_of_the_image_is_told(caplog):
    ct, truth = chest()
    lungs.threshold_lungs(ct)
    assert not caplog.records
    right = truth & (world(ct.affine, ct.shape)[0] > 0)
    cut = int(np.ceil(to_world(np.linalg.inv(ct.affine), [-75, 0, 0])[0]))  # beyond it is the left lung's outer part
    found = lungs.threshold_lungs(CT(ct.array[cut:], shifted(ct.affine, (cut, 0, 0)), source="a.nii.gz"))
    assert dice(found, right[cut:]) > 0.95
    assert "a.nii.gz: " in caplog.text and "cut by the edge of the image" in caplog.text


def test_lungs_that_a_scan_cuts_or_that_are_small_are_warned_about(tmp_path, caplog):
    ct, truth = chest()
    lungs.lung_labels(ct)
    assert not caplog.records
    for part, words in (
        (slice(20, None), ("cuts the lungs (foot)",)),
        (slice(0, 40), ("cuts the lungs (head)",)),
        (slice(30, 36), ("cuts the lungs (foot, head)", "ml of lung, a whole lung has 400 or more")),
    ):
        caplog.clear()
        slab = CT(ct.array[:, :, part], shifted(ct.affine, (0, 0, part.start)), source="a.nii.gz")
        for path in (None, saved(tmp_path, truth[:, :, part], slab.affine)):
            labels, _ = lungs.lung_labels(slab, path)
            assert dice(labels > 0, truth[:, :, part]) > 0.95
            for said in words:
                assert "a.nii.gz: " in caplog.text and said in caplog.text


def test_lungs_cut_by_every_side_of_a_small_field_of_view_are_found(caplog):
    ct, truth = chest(extent=(150.0, 70.0, 90.0))
    assert dice(lungs.lung_labels(ct)[0] > 0, truth) > 0.9
    assert "cuts the lungs (left, right, back, front, foot, head)" in caplog.text


def test_gas_of_the_bowel_is_no_small_lung():
    ct, truth = chest()
    x, y, z = world(ct.affine, ct.shape)
    ct.array[truth] = 40
    ct.array[x**2 + y**2 + z**2 < 35**2] = -1000
    with pytest.raises(ValueError, match="no lungs found"):
        lungs.lung_labels(ct)


def test_scans_without_lungs_are_refused():
    ct, truth = chest()
    ct.array[truth] = 40
    with pytest.raises(ValueError, match=r"no lungs found \(the largest dark region inside the body has \d+ ml"):
        lungs.threshold_lungs(ct)


def test_maps_of_other_grids_are_brought_to_the_cts_and_lobes_kept(tmp_path):
    ct, truth = chest()
    other, lung = chest(np.diag([-1.0, 1.0, 1.0]), (2.0, 2.0, 2.0))
    left = world(other.affine, other.shape)[0] < 0
    labels = np.where(lung & left, 11, 5)  # 5: an organ that is no lobe
    got, source = lungs.lung_labels(ct, saved(tmp_path, labels, other.affine))
    assert set(np.unique(got)) == {0, 11} and dice(got == 11, truth & (world(ct.affine, ct.shape)[0] < 0)) > 0.95
    assert source == "map.nii.gz (TotalSegmentator v2 numbers)"
    plain, source = lungs.lung_labels(ct, saved(tmp_path, truth, ct.affine))
    np.testing.assert_array_equal(plain, truth)
    assert source == "map.nii.gz"


def test_depth_is_the_euclidean_distance():
    inside = np.pad(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 26, 31)), 2) > -0.05, 1)
    np.testing.assert_allclose(lungs.depth_mm(inside), ndimage.distance_transform_edt(inside), atol=1e-5)


@pytest.mark.parametrize(
    ("moved_mm", "axis_0", "words"),
    [
        (70, slice(None), r"not the lungs of .* mean of -?\d+ HU"),
        (2070, slice(None), "belongs to another scan"),
        (0, slice(0, 24), "not the lungs of .*ml"),
    ],
    ids=["of another patient", "far away", "too small"],
)
def test_a_map_of_something_else_is_refused(tmp_path, moved_mm, axis_0, words):
    ct, truth = chest()
    part = np.zeros_like(truth)
    part[axis_0] = truth[axis_0]
    with pytest.raises(ValueError, match=words):
        lungs.lung_labels(ct, saved(tmp_path, part, shifted(ct.affine, (moved_mm / ct.spacing[0], 0, 0))))


PROGRAM = """#!{python}
import sys, nibabel as nib, numpy as np
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(arguments["-i"])
assert "--ml" in sys.argv and "lung_middle_lobe_right" in sys.argv
if {number} is None:
    sys.exit("no licence")
labels = (np.abs(image.get_fdata() + 850) < 100).astype(np.uint8) * {number}
nib.save(nib.Nifti1Image(labels, image.affine), arguments["-o"])
"""


@pytest.mark.parametrize(("number", "numbering", "label"), [(13, "v2", 13), (15, "v1", 12), (None, None, None)])
def test_total_segmentator_is_called_where_it_is_installed(tmp_path, monkeypatch, caplog, number, numbering, label):
    program = tmp_path / "TotalSegmentator"
    program.write_text(PROGRAM.format(python=sys.executable, number=number))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    ct, truth = chest()
    if number is None:  # only lobes need it
        labels, source = lungs.lung_labels(ct)
        assert source == "threshold" and dice(labels > 0, truth) > 0.97
        assert "lungs by threshold, which tells no lobes, for TotalSegmentator failed (no licence)" in caplog.text
    else:
        labels, source = lungs.lung_labels(ct)
        assert source == f"TotalSegmentator (TotalSegmentator {numbering} numbers)"
        assert set(np.unique(labels)) == {0, label}


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["LIDC-IDRI-0001", "R01-001"])
def test_threshold_agrees_with_the_lungs_of_real_scans(request, scan):
    if scan == "R01-001":
        folder = request.getfixturevalue("shared_data") / "r01-001"
        ct, truth = read_ct(folder / "ct.nii.gz"), np.asarray(nib.load(folder / "lung.nii.gz").dataobj) > 0
    else:
        ct = read_ct(wheel_file(*LIDC_0001_CT))
        truth = np.isin(np.asarray(nib.load(wheel_file(*LIDC_0001_LOBES)).dataobj), list(LOBE_NAMES))
    assert dice(lungs.threshold_lungs(ct), truth) > 0.95
