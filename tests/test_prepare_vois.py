"""Padding a nodule's box moves no voxel and adds nothing but air."""

import sys

import nibabel as nib
import numpy as np

from hrldm.ct.geometry import to_world
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.patches import load_patches
from scripts import prepare_vois
from tests import tiny


def test_every_voxel_keeps_its_place_and_the_rest_is_fill():
    rng = np.random.default_rng(0)
    array, affine = rng.integers(-900, 100, (44, 200, 6)).astype(np.int16), np.diag([-0.7, 0.7, 2.5, 1.0])
    affine[:3, 3] = 10, -20, 30
    wide = prepare_vois.padded(array, affine, -1000)
    assert wide.shape == (103, 200, 29) and wide.array.dtype == np.int16
    moved = np.linalg.inv(wide.affine) @ affine
    start = np.rint(to_world(moved, np.zeros(3))).astype(int)
    inner = tuple(slice(a, a + n) for a, n in zip(start, array.shape, strict=True))
    assert np.array_equal(wide.array[inner], array) and np.allclose(moved[:3, :3], np.eye(3))
    rest = np.ones(wide.shape, bool)
    rest[inner] = False
    assert (wide.array[rest] == -1000).all()


def test_a_folder_of_boxes_becomes_a_manifest_of_wide_images(tmp_path, monkeypatch, capsys):
    root = tiny.manifest(tmp_path, {"train": 4, "test": 2}, size=20)
    frame = load_manifest(root)
    monkeypatch.setattr(sys, "argv", ["prepare_vois", str(root), str(tmp_path / "wide")])
    assert prepare_vois.main() == 0
    before = (tmp_path / "wide" / "manifest.csv").read_bytes()
    assert prepare_vois.main() == 2 and "wide: exists already" in capsys.readouterr().err  # nothing is overwritten
    assert (tmp_path / "wide" / "manifest.csv").read_bytes() == before
    wide = load_manifest(tmp_path / "wide")
    assert len(wide) == (frame.diameter_mm >= 6).sum() and set(wide.split) == {"train", "test"}
    crops = load_patches(wide, 40)
    kept = frame.nodule_id.isin(wide.nodule_id)
    for row, hu, mask in zip(frame[kept].itertuples(), crops.hu, crops.mask, strict=True):
        truth, lesion = (np.asanyarray(nib.load(f).dataobj) for f in (row.image, row.mask))
        assert mask.sum() == lesion.sum() and (hu[mask] == truth[lesion > 0]).all()
        assert (hu[:, :, 0] == -1000).all() and (hu[0] == -1000).all()
