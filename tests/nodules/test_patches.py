"""Crops at 1 mm: copied exactly where the image is at 1 mm, in the right place and orientation where it is not."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from hrldm.ct.geometry import to_world
from hrldm.nodules import patches as module
from hrldm.nodules.patches import fitting, load_patches, manifest_digest
from tests import tiny

MIDDLE = np.array([3, -4, 5])  # mm, of every nodule


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))


def blob(points: np.ndarray) -> np.ndarray:
    """HU of a smooth nodule at `MIDDLE` with a brighter satellite to its right, on points (..., 3) mm."""
    main, side = (np.linalg.norm(points - MIDDLE - [x, 0, 0], axis=-1) for x in (0, 6))
    return -850 + 800 * np.exp(-((main / 5) ** 2)) + 300 * np.exp(-((side / 2) ** 2))


def save(folder, spacing=(1, 1, 1), start=(-27, -34, -25), flips=(1, 1, 1), size=60, name="n", radius=5.0):
    """A manifest of one nodule in an image of `size` mm that begins at `start` mm, and its mask."""
    affine = np.diag([*np.multiply(spacing, flips), 1.0])
    affine[:3, 3] = np.where(np.array(flips) > 0, start, np.array(start) + size)
    index = np.moveaxis(np.indices([int(size / s) for s in spacing]), 0, -1)
    points = to_world(affine, index)
    mask = np.linalg.norm(points - MIDDLE, axis=-1) <= radius
    row = {"nodule_id": name, "subtype": "part-solid", "diameter_mm": 2 * radius}
    for column, array in (("image", np.rint(blob(points)).astype(np.int16)), ("mask", mask.astype(np.uint8))):
        row[column] = str(folder / f"{name}_{column}.nii.gz")
        nib.save(nib.Nifti1Image(array, affine), row[column])
    return pd.DataFrame([row]), mask


def test_images_at_1_mm_are_copied_exactly(tmp_path):
    frame, mask = save(tmp_path)
    got = load_patches(frame, 24)
    centre = np.rint(np.argwhere(mask).mean(0)).astype(int)
    cut = tuple(slice(c - 12, c + 12) for c in centre)
    np.testing.assert_array_equal(got.hu[0], np.asarray(nib.load(frame.image[0]).dataobj)[cut])
    np.testing.assert_array_equal(got.mask[0], mask[cut])
    assert got.hu.dtype == np.int16 and got.mask.dtype == bool and got.subtype.tolist() == [1]


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.0), (0.6, 0.6, 2.5), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1)], ids=["RAS", "LPS"])
def test_other_grids_are_resampled_into_ras_at_the_right_place(tmp_path, spacing, flips):
    got = load_patches(save(tmp_path, spacing, flips=flips)[0], 24)
    np.testing.assert_allclose(np.argwhere(got.mask[0]).mean(0), 12, atol=0.75 * max(spacing))
    assert got.mask[0].sum() == pytest.approx(4 / 3 * np.pi * 125, rel=0.35)
    # the crop's middle voxel lies on the image voxel nearest to the lesion's middle, within half of one of MIDDLE
    grid = np.moveaxis(np.indices((24, 24, 24)), 0, -1) - 12 + MIDDLE
    for axis in range(3):
        shifts = np.eye(3)[axis] * np.linspace(-1, 1, 9)[:, None] * max(spacing[axis], 1)
        best = np.argmin([np.abs(got.hu[0] - blob(grid + shift)).mean() for shift in shifts])
        assert 0 < best < 8
    right, left = got.hu[0, 18, 12, 12], got.hu[0, 6, 12, 12]
    assert right > left + 100  # the satellite is on the patient's right-to-left axis as index grows


def test_lesion_at_the_edge_repeats_the_border(tmp_path):
    got = load_patches(save(tmp_path, start=(0, -10, 0), size=40)[0], 32)
    assert got.hu.shape == (1, 32, 32, 32)
    np.testing.assert_array_equal(got.hu[0, 0], got.hu[0, 5])  # x < 0 of the image


def test_crops_are_kept_on_disk_until_a_file_or_row_changes(tmp_path, monkeypatch):
    frame, _ = save(tmp_path)
    first, files = load_patches(frame, 16), manifest_digest(frame)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_crop", lambda *_: pytest.fail("cropped again"))
        again = load_patches(frame, 16)
    np.testing.assert_array_equal(first.hu, again.hu)
    np.testing.assert_array_equal(first.mask, again.mask)
    save(tmp_path, radius=4.0)
    assert manifest_digest(frame) != files
    assert load_patches(frame, 16).mask.sum() < first.mask.sum()
    assert manifest_digest(frame.assign(malignancy=3)) != manifest_digest(frame)


def test_data_are_known_by_what_they_hold_and_not_by_where_or_when(tmp_path):
    first, second = (tmp_path / name for name in ("here", "there"))
    first.mkdir()
    frame, _ = save(first)
    frame["background"] = frame["image"]
    columns = ("image", "mask", "background")
    shutil.copytree(first, second, copy_function=shutil.copyfile)  # other dates
    moved = frame.assign(**{c: [str(second / Path(name).name) for name in frame[c]] for c in columns})
    assert manifest_digest(moved, columns) == manifest_digest(frame, columns) != manifest_digest(frame)
    image = Path(moved["image"][0])
    changed = bytearray(image.read_bytes())
    changed[-9] ^= 1  # as large as before
    image.write_bytes(changed)
    assert manifest_digest(moved, columns) != manifest_digest(frame, columns)
    assert manifest_digest(moved, ("mask",)) == manifest_digest(frame, ("mask",))


def test_choosing_rows_and_the_middle():
    made = tiny.patches(5, 24)
    for rows, expected in (([3, 1], [3, 1]), (slice(1, 3), [1, 2]), (made.frame.subtype == "solid", [0, 3])):
        part = made[rows]
        assert part.frame.nodule_id.tolist() == [f"n{i}" for i in expected]
        np.testing.assert_array_equal(part.hu, made.hu[expected])
        assert part.frame.index.tolist() == list(range(len(expected))) and len(part) == len(expected)
    np.testing.assert_array_equal(made.centred(16).hu, made.hu[:, 4:20, 4:20, 4:20])
    np.testing.assert_array_equal(made.centred(24).mask, made.mask)
    with pytest.raises(ValueError, match="crops of 24 mm cannot be cut to 30 mm"):
        made.centred(30)


def test_nodules_wider_than_the_crop_are_left_out_and_named(caplog):
    frame = pd.DataFrame({"nodule_id": ["a", "b", "c"], "diameter_mm": [12.0, 12.5, 8.0]})
    kept = fitting(frame, 12)
    assert kept.nodule_id.tolist() == ["a", "c"] and kept.index.tolist() == [0, 1]
    assert "wider than the crop of 12 mm: b (12.5 mm)" in caplog.text
    assert fitting(frame, 12, (9.0, 30.0)).nodule_id.tolist() == ["a"]
    assert "left out, not of 9 to 30 mm: c (8 mm)" in caplog.text


def test_bad_input_is_named(tmp_path):
    frame, mask = save(tmp_path)
    with pytest.raises(ValueError, match="no rows for this split"):
        load_patches(frame[:0], 16)
    ends = np.zeros(mask.shape, np.uint8)
    ends[10, 10, 10] = ends[50, 50, 50] = 1  # the middle of this mask lies far from all of its voxels
    nib.save(nib.Nifti1Image(ends, nib.load(frame["mask"][0]).affine), frame["mask"][0])
    with pytest.raises(ValueError, match="n_mask.nii.gz: the lesion vanishes"):
        load_patches(frame, 16)
    assert not list((tmp_path / "cache").rglob("*.npz"))
