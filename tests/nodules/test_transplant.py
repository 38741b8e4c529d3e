"""Real nodules in healthy lung: what is touched and what is not, whose nodule goes where, and what is no giver."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from hrldm.nodules import transplant as tp
from hrldm.nodules.augmentation import cube_symmetry
from hrldm.nodules.histograms import bins_of, histogram_moments
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.patches import load_patches
from study.study import library_of
from tests import tiny

SIDE = 40


def host(patient="H1", splits=("train", "val"), seed=0, lung=-850.0) -> tp.Host:
    """A wall about one lung of 60 x 60 x 60 mm with a vessel through its middle."""
    rng = np.random.default_rng(seed)
    hu, lungs = np.full((70, 70, 70), 40.0), np.zeros((70, 70, 70), np.uint8)
    lungs[5:65, 5:65, 5:65] = 1
    hu[lungs > 0] = lung
    hu[33:37, 33:37] = 60
    lungs[33:37, 33:37] = 0  # a threshold mask leaves vessels out
    affine = np.eye(4)
    affine[:3, 3] = (-100, 20, 7)
    return tp.Host(patient, splits, (hu + rng.normal(0, 10, hu.shape)).round().astype(np.int16), affine, lungs)


@pytest.fixture
def nodules(tmp_path, monkeypatch) -> pd.DataFrame:
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "given").mkdir()
    return load_manifest(tiny.manifest(tmp_path / "given", {"train": 3, "val": 1, "test": 2}, size=SIDE))


def voxels(path: str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_image_is_the_nodule_inside_the_background_far_away_and_between_them_in_between():
    rng = np.random.default_rng(0)
    mask = tiny.ball(SIDE, 6)
    background, nodule = (rng.integers(lo, lo + 50, mask.shape).astype(np.int16) for lo in (-900, 0))
    out, distance = tp.paste(background, nodule, mask), ndimage.distance_transform_edt(~mask)
    far = distance >= tp.FALL_OFF_MM + 1
    np.testing.assert_array_equal(out[mask], nodule[mask])
    np.testing.assert_array_equal(out[far], background[far])
    shells = [out[(distance > d) & (distance <= d + 1)].mean() for d in range(5)]
    assert all(a > b for a, b in zip(shells[:3], shells[1:4], strict=True))


def test_places_are_lung_and_never_the_wall():
    taker, touched = host(), tp.weight(tiny.ball(SIDE, 5)) > 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        centre = tp.find_place(taker, touched, rng)
        at = tuple((np.argwhere(touched) - SIDE // 2 + centre).T)
        assert (taker.lungs[at] > 0).mean() >= tp.MIN_LUNG and taker.hu[at].mean() < tp.MAX_MEAN_HU
        assert ((centre >= 9) & (centre < 61)).all()


@pytest.mark.parametrize(
    ("lung", "mask"),
    [pytest.param(-600, tiny.ball(SIDE, 5), id="diseased lung"), pytest.param(-850, tiny.ball(64, 29), id="too large")],
)
def test_no_place_is_none(lung, mask):
    assert tp.find_place(host(lung=lung), tp.weight(mask) > 0, np.random.default_rng(0)) is None


def test_manifest_has_both_patients_and_the_voxels_of_both(nodules, tmp_path):
    hosts = [host(), host("H2", ("test",), seed=1)]
    wish = {"copies": {"solid": 2, "ground-glass": 3}, "seed": 5, "side": SIDE}
    target = tp.transplant(nodules, hosts, tmp_path / "out", **wish)
    made = load_manifest(target)
    # train: n0 solid twice, n1 part-solid once, n2 ground-glass three times; n3 val, n4 and n5 test once
    assert made.source_id.value_counts().to_dict() == {"n0": 2, "n1": 1, "n2": 3, "n3": 1, "n4": 1, "n5": 1}
    assert (made[tp.HOST] == np.where(made.split == "test", "H2", "H1")).all()
    own = nodules.set_index("nodule_id")
    for row in made.itertuples():
        source, taker = own.loc[row.source_id], hosts[row.host_patient_id == "H2"]
        assert (row.patient_id, row.subtype, row.split) == (source.patient_id, source.subtype, source.split)
        centre, inside = np.array([row.i, row.j, row.k], int), voxels(row.mask) > 0
        affine = nib.load(row.image).affine
        np.testing.assert_allclose(affine[:3, 3], taker.affine[:3, 3] + centre - SIDE // 2)
        turned = cube_symmetry(voxels(source["image"]), int(row.symmetry))
        np.testing.assert_array_equal(voxels(row.image)[inside], turned[inside])
        assert row.split == "train" or row.symmetry == 0
        at = np.argwhere(inside) - SIDE // 2 + centre
        np.testing.assert_array_equal(voxels(row.background)[inside], taker.hu[tuple(at.T)])
    again = tp.transplant(nodules, hosts, tmp_path / "again", **wish)
    assert (again / "manifest.csv").read_bytes() == (target / "manifest.csv").read_bytes()
    assert tp.transplant(nodules, [], target) == target  # made once


def test_recast_has_the_mean_and_spread_asked_for_and_the_shell_keeps_its_share_of_the_contrast():
    rng = np.random.default_rng(0)
    mask, lung = tiny.ball(SIDE, 6), -850.0
    share = np.clip(1 - (ndimage.distance_transform_edt(~mask) - 0.5) / 3, 0, 1)  # 1 inside, partial volume about it
    nodule = lung + share * (900 + rng.normal(0, 40, mask.shape))
    own = nodule[mask]
    out = tp.recast(nodule, mask, -400.0, 1.1 * own.std(), lung)
    assert out[mask].mean() == pytest.approx(-400, abs=0.01)
    assert out[mask].std() == pytest.approx(1.1 * own.std(), rel=1e-4)
    np.testing.assert_array_equal(*(np.argsort(x, kind="stable") for x in (out[mask], own.astype(np.float32))))
    shell = (share > 0.2) & ~mask
    np.testing.assert_allclose((out - lung)[shell] / (nodule - lung)[shell], 450 / (own.mean() - lung), rtol=1e-4)
    np.testing.assert_allclose(out[share == 0], lung, atol=0.01)
    np.testing.assert_allclose(tp.recast(nodule, mask, own.mean(), own.std(), lung), nodule, atol=0.01)
    for asked, had in ((5.0, 1 / tp.MOST_SPREAD), (500.0, tp.MOST_SPREAD)):  # no smoother, no noisier than that
        assert tp.recast(nodule, mask, 0.0, asked, lung)[mask].std() == pytest.approx(had * own.std(), rel=1e-3)
    assert tp.recast(np.full_like(nodule, lung), mask, 0.0, 30.0, lung)[mask].mean() == pytest.approx(0)  # no contrast


def test_every_second_training_copy_is_recast_and_nothing_that_is_judged(nodules, tmp_path):
    hosts, library = [host(), host("H2", ("test",), seed=1)], library_of(load_patches(nodules, SIDE), 40)
    copies = {"solid": 2, "part-solid": 2, "ground-glass": 3}
    made = load_manifest(tp.transplant(nodules, hosts, tmp_path / "out", copies, side=SIDE, library=library))
    own, of = nodules.set_index("nodule_id"), library.set_index("nodule_id")
    recasts = made.nodule_id.str.endswith("_1") & (made.split == "train")
    assert recasts.sum() == 3
    for row in made[~recasts].itertuples():
        assert not row.histogram_id
        inside, source = voxels(row.mask) > 0, cube_symmetry(voxels(own.image[row.source_id]), int(row.symmetry))
        np.testing.assert_array_equal(voxels(row.image)[inside], source[inside])
    for row in made[recasts].itertuples():
        assert of.subtype[row.histogram_id] == row.subtype
        mean, _ = histogram_moments(bins_of(of.loc[row.histogram_id]).to_numpy(float))
        assert voxels(row.image)[voxels(row.mask) > 0].mean() == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        pytest.param([{"splits": ("train", "val", "test")}], "H1 would take test nodules and others", id="one for all"),
        pytest.param(
            [{}, {"splits": ("test",)}], "H1 would take test nodules and others", id="two parts of one patient"
        ),
        pytest.param(
            [{}, {"patient": "h1", "splits": ("test",)}], "H1, h1 would take", id="one patient written in two ways"
        ),
        pytest.param([{}], "no host CT .* test", id="no host for a split"),
        pytest.param(
            [{"lung": -500}, {"patient": "H2", "splits": ("test",), "lung": -500}],
            "no nodule found a place",
            id="no healthy lung",
        ),
    ],
)
def test_a_test_host_takes_test_nodules_only_and_every_split_needs_a_host(nodules, tmp_path, hosts, message):
    with pytest.raises(ValueError, match=message):
        tp.transplant(nodules, [host(**h) for h in hosts], tmp_path / "out", side=SIDE)
    assert not (tmp_path / "out").exists()


def test_no_one_receives_a_nodule_of_their_own(nodules, tmp_path, caplog):
    hosts = [host("P0"), host("H2", ("test",))]  # n0 is of p0
    made = load_manifest(tp.transplant(nodules, hosts, tmp_path / "out", side=SIDE))
    assert made.source_id.tolist() == ["n1", "n2", "n3", "n4", "n5"]
    assert "1 of 6 transplants found no place and are left out: n0" in caplog.text


@pytest.mark.parametrize(
    ("cut", "slice_mm", "diameter", "given"),
    [
        pytest.param(0, 1.0, 12.0, True, id="whole"),
        pytest.param(0, 2.0, 12.0, False, id="thick slices"),
        pytest.param(6, 1.0, 12.0, False, id="cut flat"),
        pytest.param(0, 1.0, 3.0, False, id="too small"),
        pytest.param(0, 1.0, 45.0, False, id="too large"),
    ],
)
def test_givers_are_thin_whole_and_of_a_size_that_fits(tmp_path, cut, slice_mm, diameter, given):
    mask = tiny.ball(20, 6)[:, :, cut + 4 :]  # the ball's lowest slice is the fifth
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.diag([1, 1, slice_mm, 1])), tmp_path / "m.nii.gz")
    frame = pd.DataFrame({"mask": [str(tmp_path / "m.nii.gz")], "diameter_mm": [diameter]})
    assert len(tp.givers(frame)) == given


def test_host_is_read_at_1_mm_and_upright_with_its_labels_in_place(tmp_path):
    affine, shape = tiny.chest_grid(np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]]), (2.0, 2.0, 2.5))
    hu = tiny.chest(affine, shape)
    lungs = ((hu < -700) & (hu > -950)).astype(np.uint8)
    for name, array in (("ct", hu), ("lung", lungs), ("moved", np.roll(lungs, 40, 1))):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    read = tp.read_host(tmp_path / "ct.nii.gz", tmp_path / "lung.nii.gz", "H", ("test",))
    np.testing.assert_allclose(np.abs(read.affine[:3, :3]), np.eye(3), atol=1e-6)
    assert nib.aff2axcodes(read.affine) == ("R", "A", "S") and read.hu.shape == read.lungs.shape
    assert (read.lungs > 0).sum() == pytest.approx(10 * lungs.sum(), rel=0.02)
    inner = ndimage.binary_erosion(read.lungs > 0, iterations=2)
    assert read.hu[inner].mean() == pytest.approx(hu[lungs > 0].mean(), abs=5)
    with pytest.raises(ValueError, match="moved"):  # a map that is not of this CT
        tp.read_host(tmp_path / "ct.nii.gz", tmp_path / "moved.nii.gz", "H", ("test",))
