"""Crops at 1 mm: copied exactly where the image is at 1 mm, in the right place and orientation where it is not."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from hrldm.nodules import patches as module
from hrldm.nodules.patches import load_patches, manifest_digest
from tests import tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))


def blob(points: np.ndarray) -> np.ndarray:
    """HU of a smooth nodule at world (3, -4, 5) mm with a brighter satellite to its right, on points (..., 3) mm."""
    main = np.linalg.norm(points - [3, -4, 5], axis=-1)
    side = np.linalg.norm(points - [9, -4, 5], axis=-1)
    return -850 + 800 * np.exp(-((main / 5) ** 2)) + 300 * np.exp(-((side / 2) ** 2))


def save(folder, affine, shape, name="n", radius=5.0):
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    mask = np.linalg.norm(points - [3, -4, 5], axis=-1) <= radius
    files = {}
    for column, array in (("image", np.rint(blob(points)).astype(np.int16)), ("mask", mask.astype(np.uint8))):
        files[column] = str(folder / f"{name}_{column}.nii.gz")
        nib.save(nib.Nifti1Image(array, affine), files[column])
    row = {"nodule_id": name, "subtype": "part-solid", "diameter_mm": 2 * radius}
    return pd.DataFrame([row | files]), index, mask


def scaled(spacing, start=(-27, -34, -25), flips=(1, 1, 1)):
    affine = np.diag([*np.multiply(spacing, flips), 1.0])
    affine[:3, 3] = start
    return affine


def test_images_at_1_mm_are_copied_exactly(tmp_path):
    frame, _, mask = save(tmp_path, scaled((1, 1, 1)), (60, 60, 60))
    got = load_patches(frame, 24)
    stored = np.asarray(nib.load(frame.image[0]).dataobj)
    centre = np.rint(np.argwhere(mask).mean(0)).astype(int)
    cut = tuple(slice(c - 12, c + 12) for c in centre)
    np.testing.assert_array_equal(got.hu[0], stored[cut])
    np.testing.assert_array_equal(got.mask[0], mask[cut])
    assert got.hu.dtype == np.int16 and got.mask.dtype == bool and got.subtype.tolist() == [1]


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.0), (0.6, 0.6, 2.5), (2, 2, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1)])
def test_other_grids_are_resampled_into_ras_at_the_right_place(tmp_path, spacing, flips):
    shape = tuple(int(60 / s) for s in spacing)
    start = [a if f > 0 else a + 60 for a, f in zip((-27, -34, -25), flips, strict=True)]
    frame, _, _ = save(tmp_path, scaled(spacing, start, flips), shape)
    got = load_patches(frame, 24)
    centre = np.argwhere(got.mask[0]).mean(0)
    np.testing.assert_allclose(centre, 12, atol=0.75 * max(spacing))
    assert got.mask[0].sum() == pytest.approx(4 / 3 * np.pi * 125, rel=0.35)
    # the crop's middle voxel lies on the image voxel nearest to the lesion's middle, within half of one of (3, -4, 5)
    offset = [
        np.argmin([np.abs(got.hu[0] - blob(world(d))).mean() for d in shifts(axis, spacing)]) for axis in range(3)
    ]
    assert all(0 < o < 8 for o in offset)
    right, left = got.hu[0, 18, 12, 12], got.hu[0, 6, 12, 12]
    assert right > left + 100  # the satellite is on the patient's right-to-left axis as index grows


def shifts(axis, spacing):
    return [np.eye(3)[axis] * d for d in np.linspace(-1, 1, 9) * max(spacing[axis], 1)]


def world(delta):
    grid = np.stack(np.meshgrid(*[np.arange(24) - 12.0] * 3, indexing="ij"), -1)
    return grid + [3, -4, 5] + delta


def test_lesion_at_the_edge_repeats_the_border(tmp_path):
    frame, _, _ = save(tmp_path, scaled((1, 1, 1), (0, -10, 0)), (40, 40, 40))
    got = load_patches(frame, 32)
    assert got.hu.shape == (1, 32, 32, 32)
    np.testing.assert_array_equal(got.hu[0, 0], got.hu[0, 5])  # x < 0 of the image


def test_crops_are_kept_on_disk_until_a_file_or_row_changes(tmp_path, monkeypatch):
    frame, _, _ = save(tmp_path, scaled((1, 1, 1)), (60, 60, 60))
    first = load_patches(frame, 16)
    real = module._crop
    monkeypatch.setattr(module, "_crop", lambda *_: pytest.fail("cropped again"))
    again = load_patches(frame, 16)
    np.testing.assert_array_equal(first.hu, again.hu)
    np.testing.assert_array_equal(first.mask, again.mask)
    monkeypatch.setattr(module, "_crop", real)
    digest = manifest_digest(frame)
    save(tmp_path, scaled((1, 1, 1)), (60, 60, 60), radius=4.0)
    assert manifest_digest(frame) != digest
    assert load_patches(frame, 16).mask.sum() < first.mask.sum()
    assert manifest_digest(frame.assign(malignancy=3)) != manifest_digest(frame)


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


def test_bad_input_is_named(tmp_path):
    frame, _, _ = save(tmp_path, scaled((1, 1, 1)), (60, 60, 60))
    with pytest.raises(ValueError, match="no rows for this split"):
        load_patches(frame[:0], 16)
    with pytest.raises(ValueError, match="no complete column 'background'"):
        load_patches(frame, 16, "background")
    thin = np.zeros((60, 60, 60), np.uint8)
    thin[10, 10, 10] = thin[50, 50, 50] = 1  # a mask whose middle lies far from every lesion voxel
    nib.save(nib.Nifti1Image(thin, scaled((1, 1, 1))), frame["mask"][0])
    with pytest.raises(ValueError, match="n_mask.nii.gz: the lesion vanishes"):
        load_patches(frame, 16)
    assert not list((tmp_path / "cache" / "patches").glob("*.npz"))
