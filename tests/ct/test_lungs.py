"""Lungs by threshold, from the user's map and from TotalSegmentator; what is no lung of this CT is refused."""

import itertools
import os
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hrldm.ct import lungs
from hrldm.ct.geometry import shifted, to_world
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.volume import CT, read_ct
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from tests import tiny


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def chest(angles=(0, 0, 0), spacing=(2.5, 2.5, 3.0)) -> tuple[CT, np.ndarray]:
    """A phantom and its true lungs."""
    affine, shape = tiny.chest_grid(Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), spacing)
    x, y, z = to_world(affine, np.indices(shape).reshape(3, -1).T).T
    truth = np.zeros(len(x), bool)
    for side in (-70, 70):
        truth |= ((x - side) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1
    return CT(tiny.chest(affine, shape), affine), truth.reshape(shape)


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, -15, 20), (180, 0, 90)])
def test_threshold_finds_both_lungs_in_any_orientation(angles):
    ct, truth = chest(angles)
    assert dice(lungs.threshold_lungs(ct), truth) > 0.97


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_lungs_cut_at_head_and_foot_are_found_whatever_axis_that_is(order, monkeypatch):
    """All 48 voxel orders: the lungs reach the first and the last slice, where the axes' own ends are not air."""
    monkeypatch.setattr(lungs, "GRID_MM", 4.0)
    turns = [np.eye(3)[:, order] * signs for signs in itertools.product((1.0, -1.0), repeat=3)]
    for turn in turns:
        affine, shape = tiny.chest_grid(turn, (4.0, 4.0, 4.0), (350.0, 250.0, 120.0))
        x, y, z = to_world(affine, np.indices(shape).reshape(3, -1).T).T
        truth = sum(((x - side) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1 for side in (-70, 70)).reshape(shape) > 0
        assert dice(lungs.threshold_lungs(CT(tiny.chest(affine, shape), affine)), truth) > 0.95


def test_a_nodule_at_the_pleura_and_a_vessel_belong_to_the_lung():
    ct, truth = chest()
    inside = np.argwhere(truth)
    lung = inside[to_world(ct.affine, inside)[:, 0] > 0]
    edge = lung[lung[:, 0].argmax()] - np.array([2, 0, 0])
    ball = ((np.indices(ct.shape).T - edge).T ** 2 * ct.spacing[:, None, None, None] ** 2).sum(0) < 6**2
    ct.array[ball] = 30
    found = lungs.threshold_lungs(ct)
    assert found[ball & truth].mean() > 0.8 and dice(found, truth) > 0.97


def test_a_lung_cut_by_the_edge_of_the_image_is_told(caplog):
    ct, truth = chest()
    lungs.threshold_lungs(ct)
    assert not caplog.records
    inside = to_world(ct.affine, np.argwhere(truth))
    keep = int(np.argwhere(truth)[inside[:, 0] < -75][:, 0].max())  # the left lung's outer part is beyond the image
    lower = ct.affine[0, 0] > 0
    cut = slice(keep, None) if lower else slice(None, keep)
    found = lungs.threshold_lungs(
        CT(ct.array[cut], shifted(ct.affine, (keep if lower else 0, 0, 0)), source="a.nii.gz")
    )
    assert (
        dice(
            found,
            truth[cut] & (to_world(ct.affine, np.indices(ct.shape).reshape(3, -1).T)[:, 0].reshape(ct.shape)[cut] > 0),
        )
        > 0.95
    )
    assert "a.nii.gz: " in caplog.text and "cut by the edge of the image" in caplog.text


def test_scans_without_lungs_are_refused():
    ct, _ = chest()
    ct.array[(ct.array > -900) & (ct.array < -800)] = 40
    with pytest.raises(ValueError, match=r"no lungs found \(the largest dark region inside the body has \d+ ml"):
        lungs.threshold_lungs(ct)


def save(path, array, affine):
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), path)
    return path


def test_maps_of_other_grids_are_brought_to_the_cts_and_lobes_kept(tmp_path):
    ct, truth = chest()
    fine, shape = tiny.chest_grid(np.diag([-1.0, 1.0, 1.0]), (2.0, 2.0, 2.0))
    other = CT(tiny.chest(fine, shape), fine)
    labels = lungs.threshold_lungs(other) * np.uint8(11)
    labels[to_world(fine, np.indices(shape).reshape(3, -1).T)[:, 0].reshape(shape) > 0] *= 0
    labels[labels == 0] = 5  # an organ that is no lobe
    got, source = lungs.lung_labels(ct, save(tmp_path / "ts.nii.gz", labels, fine))
    left_half = truth & (to_world(ct.affine, np.indices(ct.shape).reshape(3, -1).T)[:, 0].reshape(ct.shape) < 0)
    assert set(np.unique(got)) == {0, 11} and dice(got == 11, left_half) > 0.95
    assert source == "ts.nii.gz (TotalSegmentator v2 numbers)"
    plain, source = lungs.lung_labels(ct, save(tmp_path / "lung.nii.gz", truth, ct.affine))
    assert set(np.unique(plain)) == {0, 1} and (plain == truth).all() and source == "lung.nii.gz"


def test_the_lungs_of_another_patient_are_refused(tmp_path):
    ct, truth = chest()
    away = ct.affine.copy()
    away[0, 3] += 70
    with pytest.raises(ValueError, match=r"not the lungs of .* mean of -?\d+ HU"):
        lungs.lung_labels(ct, save(tmp_path / "shifted.nii.gz", truth, away))
    away[0, 3] += 2000
    with pytest.raises(ValueError, match="belongs to another scan"):
        lungs.lung_labels(ct, save(tmp_path / "far.nii.gz", truth, away))
    with pytest.raises(ValueError, match="not the lungs of .*0 ml|not the lungs of .*ml"):
        lungs.lung_labels(
            ct,
            save(
                tmp_path / "small.nii.gz",
                np.roll(truth, 1) & (np.arange(truth.shape[0]) < 35)[:, None, None],
                ct.affine,
            ),
        )


PROGRAM = """#!{python}
import sys, nibabel as nib, numpy as np
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(arguments["-i"])
assert "--ml" in sys.argv and "lung_middle_lobe_right" in sys.argv
if {fail}:
    sys.exit("no licence")
labels = (np.abs(image.get_fdata() + 850) < 100).astype(np.uint8) * {number}
nib.save(nib.Nifti1Image(labels, image.affine), arguments["-o"])
"""


@pytest.mark.parametrize(("number", "numbering"), [(13, "v2"), (15, "v1"), (None, None)])
def test_total_segmentator_is_called_where_it_is_installed(tmp_path, monkeypatch, number, numbering):
    fail = number is None
    program = tmp_path / "TotalSegmentator"
    program.write_text(PROGRAM.format(python=sys.executable, fail=fail, number=number))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    ct, _ = chest()
    if fail:
        with pytest.raises(ValueError, match=r"TotalSegmentator failed \(no licence\)"):
            lungs.lung_labels(ct)
    else:
        labels, source = lungs.lung_labels(ct)
        assert source == f"TotalSegmentator (TotalSegmentator {numbering} numbers)"
        assert set(np.unique(labels)) == {0, 13 if numbering == "v2" else 12}


@pytest.mark.slow
def test_threshold_agrees_with_the_lobes_of_lidc_idri_0001():
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    lobes = np.isin(np.asarray(nib.load(wheel_file(*LIDC_0001_LOBES)).dataobj), list(LOBE_NAMES))
    assert dice(lungs.threshold_lungs(ct), lobes) > 0.95


@pytest.mark.slow
def test_threshold_agrees_with_the_lungs_of_r01_001(shared_data):
    ct = read_ct(shared_data / "r01-001" / "ct.nii.gz")
    truth = np.asarray(nib.load(shared_data / "r01-001" / "lung.nii.gz").dataobj) > 0
    assert dice(lungs.threshold_lungs(ct), truth) > 0.95
