"""A lesion belongs to its scan: in the file it has the requested histogram, the scan's edges and noise, and nothing else changes."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import crop_affine, sample, to_world
from hrldm.ct.volume import CT
from hrldm.insertion.finish import OWN_BLUR_MM, finished, holds, lesion_in
from hrldm.insertion.quality import assess
from hrldm.nodules.histograms import histogram_moments, hu_histogram
from hrldm.nodules.positions import VESSEL_HU
from tests import phantom, tiny

SIDE, CENTRE = 40, np.array([3.3, -4.1, 7.7])
GRIDS = [(1.0, 1.0, 1.0), (0.7, 0.7, 2.5), (0.8, 0.8, 3.0), (0.5, 0.5, 0.5), (0.75, 0.75, 5.0)]
FORMATS = {"int16": (np.int16, 1.0, 0.0), "uint16": (np.uint16, 1.0, -1024.0), "float32": (np.float32, 1.0, 0.0)}
STRAIGHT, OBLIQUE = np.eye(3), Rotation.from_euler("xyz", (8, -12, 20), degrees=True).as_matrix()
WISH = np.exp(-((np.arange(40) - 24) ** 2) / 40.0)  # about -140 HU, SD 150


def lung(spacing=(1.0, 1.0, 1.0), turn=STRAIGHT, extent=60.0, sd=30.0, blur=(0.0, 0.0, 0.0), seed=0, kind="int16"):
    """Aerated lung with noise, its middle at `CENTRE`."""
    spacing = np.array(spacing)
    shape = tuple(int(n) for n in np.ceil(extent / spacing))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), np.array(blur) / spacing)
    dtype, slope, inter = FORMATS[kind]
    hu = np.rint(-850 + sd * noise / noise.std()) if sd else np.full(shape, -850.0)
    stored = ((hu - inter) / slope).astype(dtype)
    return CT(hu.astype(np.float32), affine, stored, slope, inter)


def crop(radius, value=-100.0, texture=80.0, seed=3):
    """A ball's generated HU, its mask, and the affine of their crop."""
    rough = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE,) * 3), 1.0)
    return value + texture * rough / rough.std(), tiny.ball(SIDE, radius), crop_affine(CENTRE, (SIDE,) * 3)


def written(ct, lesion):
    out = ct.stored.copy()
    out[lesion.box] = lesion.stored
    return out * ct.slope + ct.inter


def placed(ct, lesion):
    """The lesion's voxels in the whole CT."""
    whole = np.zeros(ct.shape, bool)
    whole[lesion.box] = lesion.lesion
    return whole


def quality(ct, lesion):
    return assess(lesion.before, lesion.after, lesion.lesion, ct.spacing, WISH)


@pytest.mark.parametrize("turn", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    ("spacing", "kind"), [*((grid, "int16") for grid in GRIDS), (GRIDS[1], "uint16"), (GRIDS[1], "float32")]
)
def test_the_file_holds_the_histogram_and_only_the_reach_changes(spacing, turn, kind):
    ct = lung(spacing, turn, kind=kind)
    lesion = finished(ct, *crop(7.0), WISH, seed=1)
    assert lesion.held and holds(14.0, ct.spacing) and lesion.stored.dtype == ct.stored.dtype
    hu, whole = written(ct, lesion), placed(ct, lesion)
    np.testing.assert_array_equal(hu[lesion.box], lesion.after)
    found = quality(ct, lesion)
    assert hu[whole].mean() == pytest.approx(found["requested_mean_hu"], abs=3) and found["jsd"] <= 0.012
    distance = ndimage.distance_transform_edt(~whole, ct.spacing)
    assert distance[hu != ct.array].max() == pytest.approx(lesion.reach_mm)
    assert lesion.reach_mm <= np.linalg.norm(3 * lesion.psf_mm + np.maximum(ct.spacing, 1))
    assert whole.sum() * np.prod(ct.spacing) == pytest.approx(crop(7.0)[1].sum(), rel=0.05 * max(2, spacing[2]))
    assert np.linalg.norm(to_world(ct.affine, np.argwhere(whole).mean(0)) - CENTRE) < 0.5


@pytest.mark.parametrize("spacing", GRIDS, ids=str)
def test_of_a_drawn_histogram_thick_slices_get_what_they_show(spacing):
    """Of the lesion alone: its mean stays, and its spread shrinks by what a slice averages."""
    ct, (hu, mask, affine) = lung(spacing, sd=0.0), crop(11)
    lesion = finished(ct, hu, mask, affine, WISH / WISH.sum(), 0, drawn=True)
    found = assess(lesion.before, lesion.after, lesion.lesion, ct.spacing, lesion.histogram)
    assert found["jsd"] < 0.012 and found["mean_error_hu"] < 3
    mean, sd = histogram_moments(WISH / WISH.sum())
    assert found["requested_mean_hu"] == pytest.approx(mean, abs=12)
    if max(spacing) <= 1.5:
        np.testing.assert_array_equal(lesion.histogram, WISH / WISH.sum())
    else:  # of independent voxels of 1 mm, sd / sqrt(slice); neighbours of this texture are alike
        assert sd / np.sqrt(max(spacing)) < found["requested_sd_hu"] < 0.95 * sd


@pytest.mark.parametrize(("radius", "spacing"), [(3.0, (0.7, 0.7, 5.0)), (5.0, (0.7, 0.7, 12.0))])
def test_a_lesion_too_small_for_the_slices_becomes_a_mixture_with_the_lung(radius, spacing):
    ct = lung(spacing, extent=90.0)
    lesion = finished(ct, *crop(radius), WISH, seed=1)
    mean = lesion.after[lesion.lesion].mean()
    assert not lesion.held and -850 < mean < quality(ct, lesion)["requested_mean_hu"]


@pytest.mark.parametrize("turn", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("spacing", GRIDS, ids=str)
def test_what_is_kept_keeps_its_bits(spacing, turn):
    ct = lung(spacing, turn)
    free = finished(ct, *crop(7.0), WISH, seed=1)
    keep = ~placed(ct, free)
    keep[: ct.shape[0] // 2] = False
    made, kept = finished(ct, *crop(7.0), WISH, seed=1, keep=keep), keep[free.box]
    np.testing.assert_array_equal(made.stored, np.where(kept, ct.stored[free.box], free.stored))
    assert (made.stored != free.stored).any()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("signs", [(-1, 1, 1), (-1, -1, -1), (1, 1, 1)])
@pytest.mark.parametrize("spacing", [(0.7, 0.8, 2.0), (1.0, 1.0, 1.0)], ids=str)
def test_another_voxel_order_gives_the_same_voxels(order, signs, spacing):
    ct = lung(spacing, extent=61.0, blur=(0.5, 0.5, 0.5))  # an odd number of voxels: parts of it end at their middles
    flips = tuple(slice(None, None, s) for s in signs)
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3)[:, order] @ np.diag(signs)
    turn[:3, 3] = [(n - 1) * (signs[order.index(a)] < 0) for a, n in enumerate(ct.shape)]
    array = ct.array.astype(np.int16)
    other = CT(np.ascontiguousarray(array.transpose(order)[flips]), ct.affine @ turn)
    a, b = (finished(c, *crop(7.0), WISH, seed=1) for c in (CT(array, ct.affine), other))
    np.testing.assert_array_equal(a.stored.transpose(order)[flips], b.stored)
    np.testing.assert_array_equal(a.lesion.transpose(order)[flips], b.lesion)
    np.testing.assert_allclose(a.psf_mm, b.psf_mm)


def test_ground_glass_is_a_veil():
    """A vessel in it ranks brightest, an airway darkest, and both go on as they were outside."""
    ct = lung(sd=20.0)
    middle = np.array(ct.shape) // 2
    ct.array[middle[0] - 1 : middle[0] + 1, :, middle[2]] = 0.0
    ct.array[middle[0] + 4, :, middle[2]] = -1000.0
    ct = CT(ct.array, ct.affine)
    glass = np.exp(-((np.arange(40) - 10) ** 2) / 12.0)
    lesion = finished(ct, *crop(8.0, value=-620.0, texture=40.0), glass, seed=1)
    hu, inside = written(ct, lesion), placed(ct, lesion)
    vessel, airway = inside & (ct.array > -100), inside & (ct.array == -1000)
    rest = inside & ~vessel & ~airway
    assert hu[vessel].min() > np.percentile(hu[rest], 90) and hu[airway].mean() < np.percentile(hu[rest], 10)
    outside = ~inside & (ct.array == 0)
    assert np.abs(hu - ct.array)[outside].max() <= 1


@pytest.mark.parametrize(
    ("spacing", "psf"),
    [((0.7, 0.7, 2.5), (0.6, 0.6, 1.2)), ((1.0, 1.0, 1.0), (0.8, 0.8, 0.8)), ((0.9, 0.9, 0.9), (1.0, 1.0, 0.7))],
    ids=["2.5 mm slices", "1 mm", "smooth kernel"],
)
def test_the_edge_is_what_a_scanner_would_have_made_of_the_lesion(spacing, psf):
    """Against physics: a phantom scanned with the lesion, and scanned without it and the lesion put in."""
    without, true = (phantom.scanned(spacing, psf, lesion_mm=mm) for mm in (0.0, 8.0))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = CENTRE - np.array(spacing) * (np.array(without.shape) - 1) / 2
    ct, (_, mask, grid) = CT(np.rint(without).astype(np.int16), affine), crop(8.0)
    box, lesion, _ = lesion_in(ct, mask, grid)
    generated = ndimage.gaussian_filter(np.where(mask, 0.0, -860.0), OWN_BLUR_MM)
    made = finished(ct, generated, mask, grid, hu_histogram(true[box][lesion]), seed=1, grain=False)
    hu, inside = written(ct, made), placed(ct, made)
    np.testing.assert_allclose(made.psf_mm, psf, rtol=0.1)
    contrast, lung_there = 860.0, ~inside & (without < -700)
    near = lung_there & (ndimage.distance_transform_edt(~inside, spacing) <= 1.5 * max(spacing))
    gap = hu[near] - true[near]
    assert abs(gap.mean()) < 0.03 * contrast and np.sqrt((gap**2).mean()) < 0.05 * contrast
    at = np.abs(to_world(affine, np.stack(np.indices(ct.shape), -1)) - CENTRE)
    for axis in range(3):  # profiles through the middle
        beam = lung_there & (np.delete(at, axis, axis=-1) <= 2.0).all(-1) & (at[..., axis] < 14)
        steps = [np.bincount(np.nonzero(beam)[axis], (x - without)[beam]) for x in (hu, true)]
        n = np.bincount(np.nonzero(beam)[axis])
        seen, wanted = (x[n > 0] / n[n > 0] for x in steps)
        assert wanted.max() > 0.05 * contrast and np.abs(seen - wanted).max() < 0.15 * contrast


NORMAL, WALL_MM = np.array([0.8, 0.36, 0.48]), 4.0  # of a chest wall, and the distance of its surface from `CENTRE`
SCANS = pytest.mark.parametrize(
    ("spacing", "psf"), [((1.0,) * 3, (0.8,) * 3), ((0.7, 0.7, 2.5), (0.6, 0.6, 1.2))], ids=["1 mm", "2.5 mm slices"]
)


def at_wall(spacing, psf, lesion_hu):
    """A scan of lung at a wall of muscle, or of fat from 2 mm on; the same with a ball that the wall cuts; mm (x, y, z) from
    the wall's surface and from the middle beam; and the ball as generated: its HU fall towards the wall half as much as to lung."""
    spacing = np.array(spacing)
    parts = np.where(spacing > 1, 5, 3)
    fine, shape = spacing / parts, (44 / spacing).astype(int)
    affine, grid = np.diag([*spacing, 1.0]), crop_affine(CENTRE, (SIDE,) * 3)
    affine[:3, 3] = CENTRE - spacing * (shape - 1) / 2

    def along(affine, shape):
        return (to_world(affine, np.stack(np.indices(shape), -1)) - CENTRE) @ NORMAL - WALL_MM

    finer = affine @ np.diag([*(1 / parts), 1.0])
    finer[:3, 3] -= (spacing - fine) / 2
    deep = along(finer, shape * parts)
    ball = np.linalg.norm(to_world(finer, np.stack(np.indices(deep.shape), -1)) - CENTRE, axis=-1) <= 8
    blur = np.sqrt(np.square(psf) - fine**2 / 12) / fine
    noise = np.random.default_rng(0).normal(scale=10.0, size=shape)
    seen = [
        noise + ndimage.gaussian_filter(hu, blur)[tuple(slice(n // 2, None, n) for n in parts)]
        for hu in (
            np.select([deep > 2, deep > 0, ball], [-100.0, 40.0, value], -850.0) for value in (-850.0, lesion_hu)
        )
    ]
    ct = CT(np.rint(seen[0]).astype(np.int16), affine)
    off = np.linalg.norm(np.cross(to_world(affine, np.stack(np.indices(ct.shape), -1)) - CENTRE, NORMAL), axis=-1)
    mask = tiny.ball(SIDE, 8.0) & (sample(ct.array, affine, (SIDE,) * 3, grid) <= VESSEL_HU)
    filled = [
        ndimage.gaussian_filter(x.astype(float), OWN_BLUR_MM) for x in (mask, mask | (along(grid, mask.shape) > 0))
    ]
    return ct, seen[1], along(affine, ct.shape), off, (-850 + np.mean(filled, 0) * (lesion_hu + 850), mask, grid)


@SCANS
def test_a_broad_solid_lesion_passes_into_the_wall_without_a_seam(spacing, psf):
    """Against physics, as above: the profile across the wall, and all about the lesion there."""
    ct, true, deep, off, crop = at_wall(spacing, psf, 0.0)
    box, lesion, _ = lesion_in(ct, *crop[1:])
    made = finished(ct, *crop, hu_histogram(true[box][lesion]), seed=1, grain=False)
    hu, inside = written(ct, made), placed(ct, made)
    depths, beam = np.round(deep), off < 4
    profile, wanted = (np.array([np.median(x[beam & (depths == k)]) for k in range(-5, 6)]) for x in (hu, true))
    near = ~inside & (deep > -1) & (ndimage.distance_transform_edt(~inside, spacing) <= 1.5 * max(spacing))
    gap = hu[near] - true[near]
    assert profile[:6].min() > -40 and np.abs(profile - wanted)[:6].max() < 0.06 * 850
    assert abs(gap.mean()) < 0.04 * 850 and np.sqrt((gap**2).mean()) < 0.06 * 850
    np.testing.assert_array_equal(hu[deep > 2.5], ct.array[deep > 2.5])


@SCANS
def test_the_wall_beside_it_does_not_make_ground_glass_bright(spacing, psf):
    """Voxels that are part wall do not take the brightest values."""
    ct, _, deep, _, (hu, mask, grid) = at_wall(spacing, psf, -600.0)
    glass = np.exp(-((np.arange(40) - 10) ** 2) / 12.0)
    rough = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=hu.shape), 1.0)
    made = finished(ct, hu + 60 * rough / rough.std(), mask, grid, glass, seed=1)
    values, inside = written(ct, made), placed(ct, made)
    brightest, beside = inside & (values >= np.percentile(values[inside], 95)), inside & (deep > -1.5)
    assert beside[brightest].mean() < 1.5 * beside[inside].mean()


def lag(hu, inside, axis):
    """Correlation with the next voxel along an axis."""
    first, second = (np.take(hu, range(k, hu.shape[axis] - 1 + k), axis) for k in (0, 1))
    both = np.take(inside, range(hu.shape[axis] - 1), axis) & np.take(inside, range(1, hu.shape[axis]), axis)
    return np.corrcoef(first[both], second[both])[0, 1]


def test_the_noise_is_the_scans_along_each_axis_and_without_grain_there_is_none():
    ct = lung(sd=60.0, blur=(1.2, 1.2, 0.0))
    narrow = np.exp(-((np.arange(40) - 29) ** 2) / 4.0)
    waves = 20 + 20 * ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((SIDE,) * 3), 3.0) / 0.03
    deep = {}
    for grain in (True, False):
        lesion = finished(ct, waves, *crop(10.0)[1:], narrow, seed=1, grain=grain)
        middle = ndimage.binary_erosion(lesion.lesion, iterations=3)
        deep[grain] = [lag(lesion.after, middle, axis) for axis in range(3)]
    scan = [lag(ct.array, np.ones(ct.shape, bool), axis) for axis in range(3)]
    assert min(deep[True][:2]) > 0.6 > 0.4 > deep[True][2] and min(scan[:2]) > 0.6 > 0.1 > abs(scan[2])
    assert min(deep[False]) > 0.8


def test_without_matching_the_values_are_not_ranked():
    ct = lung(sd=0.0)
    hu, mask, affine = crop(8.0, value=30.0, texture=0.001)
    for core in (None, tiny.ball(SIDE, 4.0)):
        plain = finished(ct, hu, mask, affine, WISH, seed=1, core=core, matching=False, grain=False)
        deep = ndimage.binary_erosion(plain.lesion, iterations=2)
        assert plain.after[deep] == pytest.approx(30.0, abs=2)


def test_a_core_ranks_above_its_rim():
    hu, mask, affine = crop(9.0)
    core = tiny.ball(SIDE, 4.0)
    lesion = finished(lung((0.7, 0.7, 1.5)), hu, mask, affine, WISH, seed=1, core=core)
    assert lesion.core.sum() * 0.7 * 0.7 * 1.5 == pytest.approx(core.sum(), rel=0.15)
    assert lesion.after[lesion.core].mean() > lesion.after[lesion.lesion & ~lesion.core].mean() + 150


SMALL = (16, 16, 16)


@pytest.mark.parametrize(
    ("generated", "mask", "at", "message"),
    [
        (np.full(SMALL, np.nan), tiny.ball(16, 3), CENTRE, "scan.nii.gz.*NaN or infinite values.*another seed"),
        (
            np.zeros((16, 16, 15)),
            tiny.ball(16, 3),
            CENTRE,
            r"scan.nii.gz: mask \(16, 16, 16\).*\(16, 16, 15\).*one 3D grid",
        ),
        (np.zeros(SMALL), np.zeros(SMALL, bool), CENTRE, "empty mask.*give the nodule's mask"),
        (np.zeros(SMALL), tiny.ball(16, 3), (500.0, 0.0, 0.0), "scan.nii.gz.*outside the CT.*place it inside"),
        (np.zeros(SMALL), tiny.ball(16, 3), CENTRE + (33.6, 0, 0), "scan.nii.gz.*outside the CT.*place it inside"),
    ],
    ids=["NaN", "two grids", "empty", "far outside", "outside by less than a voxel"],
)
def test_bad_input_is_named_with_file_fault_and_remedy(generated, mask, at, message):
    ct = CT(lung().array, lung().affine, source="scan.nii.gz")
    before = ct.stored.copy()
    with pytest.raises(ValueError, match=message):
        finished(ct, generated, mask, crop_affine(np.array(at), SMALL), WISH, seed=1)
    np.testing.assert_array_equal(ct.stored, before)


def test_a_lesion_at_the_ct_border_may_be_cut_by_it_and_integers_are_clipped():
    ct, mask = lung(extent=40.0, kind="uint16"), tiny.ball(SIDE, 5.0)
    at = crop_affine(ct.affine[:3, 3] + (1.0, 20.0, 20.0), mask.shape)
    before = ct.stored.copy()
    lesion = finished(ct, np.full(mask.shape, -5000.0), mask, at, WISH, seed=1, matching=False)
    assert 0.3 * mask.sum() < lesion.lesion.sum() < 0.8 * mask.sum()
    assert (lesion.stored[lesion.lesion] == 0).mean() > 0.9 and lesion.after.min() == -1024
    np.testing.assert_array_equal(ct.stored, before)
