"""A nodule in a CT of any geometry: the background keeps its bits, the lesion lies in the lung and is what was asked for."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hrldm.ct.geometry import to_world
from hrldm.ct.volume import CT
from hrldm.insertion.insert import insert
from hrldm.insertion.place import Nodule
from hrldm.insertion.quality import LIMITS, assess, faults
from hrldm.insertion.wish import Wish
from hrldm.nodules.shapes import ShapeLibrary
from tests import tiny

LIBRARY = ShapeLibrary(
    pd.DataFrame(
        {"nodule_id": [f"shape{i}" for i in range(9)], "subtype": np.resize(["solid", "part-solid", "ground-glass"], 9),
         "diameter_mm": np.repeat([8.0, 14.0, 20.0], 3), "spiculation": 2.0}
    ),
    [tiny.ball(25, r) for r in (4, 7, 10) for _ in range(3)],
)  # fmt: skip


def scan(turn=None, spacing=(2.5, 2.5, 3.0), dtype=np.int16, slope=1.0, inter=0.0) -> tuple[CT, np.ndarray]:
    affine, shape = tiny.chest_grid(np.eye(3) if turn is None else turn, spacing)
    hu = tiny.chest(affine, shape)
    x, y, z = to_world(affine, np.indices(shape).reshape(3, -1).T).T
    lungs = sum((((x - s) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1) for s in (-70, 70)).reshape(shape) > 0
    if slope == 1 and inter == 0:
        stored = hu.astype(dtype)
        return CT(stored, affine, stored), lungs.astype(np.uint8)
    stored = np.rint((hu - inter) / slope).astype(dtype)
    return CT((stored * np.float32(slope) + np.float32(inter)), affine, stored, slope, inter), lungs.astype(np.uint8)


def put(ct, labels, *wishes, **options):
    return insert(ct, list(wishes), tiny.PaintingGenerator(), labels, library=LIBRARY, **options)


@st.composite
def scans(draw):
    """Any voxel order, obliquity up to 30 degrees, spacing and way of storing."""
    order, signs = draw(st.permutations(range(3))), draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-30.0, 30.0)] * 3)), degrees=True).as_matrix()
    spacing = draw(st.tuples(*[st.floats(1.8, 4.0)] * 3))
    dtype, slope, inter = draw(st.sampled_from([(np.int16, 1.0, 0.0), (np.uint16, 1.0, -1024.0), (np.float32, 1.0, 0.0), (np.int32, 0.5, 10.0)]))  # fmt: skip
    return scan(turn @ np.eye(3)[:, order] * np.array(signs), spacing, dtype, slope, inter)


@given(case=scans(), subtype=st.sampled_from(["solid", "part-solid", "ground-glass"]), seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_any_geometry_background_bit_identical_lesion_in_the_lung(case, subtype, seed):
    ct, labels = case
    before = ct.stored.copy()
    out = put(ct, labels, Wish(subtype, 14.0, seed=seed))
    np.testing.assert_array_equal(ct.stored, before)  # the input is left alone
    assert out.stored.dtype == before.dtype and out.stored.shape == before.shape
    assert set(np.unique(out.mask)) == {0, 1}
    lesion = out.mask == 1
    assert labels[lesion].mean() > 0.97  # the labels' voxels are up to 4 mm wide
    distance = ndimage.distance_transform_edt(~lesion, ct.spacing)
    far = distance > 3.0 + 2 * ct.spacing.max()  # feather, and half voxels of either grid
    np.testing.assert_array_equal(out.stored[far], before[far])
    record = out.records[0]
    volume = lesion.sum() * np.prod(ct.spacing)
    assert record["volume_mm3"] == round(np.pi / 6 * 14**3) and 0.6 < volume / record["volume_mm3"] < 1.5
    centre = to_world(ct.affine, np.argwhere(lesion).mean(0))
    assert np.linalg.norm(centre - record["centre_ras_mm"]) < 6
    hu = out.stored[lesion] * ct.slope + ct.inter
    assert abs(hu.mean() - record["quality"]["requested_mean_hu"]) < 260  # partial volume of thick voxels at the rim


def test_flipping_the_input_flips_the_output():
    ct, labels = scan()
    flipped_affine = ct.affine @ np.diag([-1.0, 1, 1, 1])
    flipped_affine[:3, 3] = to_world(ct.affine, np.array([ct.shape[0] - 1, 0, 0]))
    flipped = CT(np.ascontiguousarray(ct.array[::-1]), flipped_affine)
    a = put(ct, labels, Wish("solid", 12.0, seed=3))
    b = put(flipped, np.ascontiguousarray(labels[::-1]), Wish("solid", 12.0, seed=3))
    assert a.records[0]["centre_ras_mm"] == b.records[0]["centre_ras_mm"]
    np.testing.assert_array_equal(a.mask, b.mask[::-1])
    assert np.abs(a.stored.astype(int) - b.stored[::-1]).max() <= 1  # rounding of interpolated differences


def test_same_seed_same_result_other_seed_another_place():
    ct, labels = scan()
    a, b, c = (put(ct, labels, Wish("solid", 10.0, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.stored, b.stored)
    assert a.records == b.records and a.records[0]["centre_ras_mm"] != c.records[0]["centre_ras_mm"]


def test_several_nodules_keep_apart_and_off_what_is_to_be_avoided():
    ct, labels = scan()
    avoid = np.zeros(ct.shape, bool)
    avoid[: ct.shape[0] // 2] = True  # a whole side
    wishes = [Wish(s, d, seed=k) for k, (s, d) in enumerate([("solid", 14), ("part-solid", 10), ("ground-glass", 20)])]
    out = put(ct, labels, *wishes, avoid=avoid)
    assert [int((out.mask == k).sum() > 0) for k in (1, 2, 3)] == [1, 1, 1] and not out.mask[avoid].any()
    assert (out.stored[avoid] == ct.stored[avoid]).all()
    for i in (1, 2, 3):
        distance = ndimage.distance_transform_edt(out.mask != i, ct.spacing)
        others = (out.mask > 0) & (out.mask != i)
        assert distance[others].min() > 2.0
    assert len(out.records) == 3 and [r["wish"]["subtype"] for r in out.records] == [
        "solid",
        "part-solid",
        "ground-glass",
    ]


def test_what_is_to_be_avoided_keeps_its_bits_however_near_the_nodule():
    ct, labels = scan()
    x, y, z = (to_world(ct.affine, np.indices(ct.shape).reshape(3, -1).T).T[i].reshape(ct.shape) for i in range(3))
    known = (np.abs(x + 70) < 12) & (np.abs(y) < 12) & (np.abs(z) < 12)
    free = 0
    for gap in (14, 18):
        try:
            out = put(ct, labels, Wish("solid", 8.0, at=(-70.0 + 12 + gap - 8, 0.0, 0.0)), avoid=known)
        except ValueError as error:
            assert "there is another lesion" in str(error)
            continue
        free += 1
        np.testing.assert_array_equal(out.stored[known], ct.stored[known])
    assert free


def test_labels_of_another_grid_or_without_lung_are_refused():
    ct, labels = scan()
    with pytest.raises(ValueError, match=r"labels have .* voxels and the CT .*SimpleITK's arrays are \(z, y, x\)"):
        put(ct, labels.transpose(2, 1, 0)[:-1], Wish())
    with pytest.raises(ValueError, match="avoid have"):
        put(ct, labels, Wish(), avoid=np.zeros((3, 3, 3), bool))
    with pytest.raises(ValueError, match="hold no lung"):
        put(ct, np.zeros_like(labels), Wish())
    for odd in (labels * 0.98, labels.astype(int) * 256, -labels.astype(int)):
        with pytest.raises(ValueError, match=r"labels of -?[\d.]+ to [\d.]+: give whole numbers 0 to 255"):
            put(ct, odd, Wish())


def test_a_given_place_is_taken_or_refused_with_the_nearest_good_one():
    ct, labels = scan()
    out = put(ct, labels, Wish("solid", 12.0, at=(-70.0, 5.0, 10.0)))
    assert np.abs(np.array(out.records[0]["centre_ras_mm"]) - [-70, 5, 10]).max() <= 1
    with pytest.raises(
        ValueError, match=r"nodule 1 .*at 0, 0, 0 mm the lesion would leave the lungs; the nearest place"
    ) as error:
        put(ct, labels, Wish("solid", 12.0, at=(0.0, 0.0, 0.0)))
    nearest = tuple(float(x) for x in str(error.value).rsplit("is ", 1)[1].split(","))
    put(ct, labels, Wish("solid", 12.0, at=nearest))
    with pytest.raises(ValueError, match="nodule 2 .*another lesion"):
        put(ct, labels, *[Wish("solid", 12.0, at=(-70.0, 5.0, 10.0))] * 2)


def test_lobes_and_locations():
    ct, labels = scan()
    lobes = labels.copy()
    right = to_world(ct.affine, np.indices(ct.shape).reshape(3, -1).T)[:, 0].reshape(ct.shape) > 0
    lobes[labels > 0], lobes[(labels > 0) & right] = 11, 12
    out = put(ct, lobes, Wish("solid", 10.0, lobe="RUL"), Wish("solid", 10.0, lobe="LLL", location="subpleural"))
    assert [r["lobe"] for r in out.records] == ["RUL", "LLL"]
    assert (lobes[out.mask == 1] == 12).all() and np.isin(lobes[out.mask == 2], (0, 11)).all()
    depth = ndimage.distance_transform_edt(labels, ct.spacing)
    assert depth[out.mask == 1].min() > depth[out.mask == 2].min()
    with pytest.raises(ValueError, match="that place is in LLL, not in RUL"):
        put(ct, lobes, Wish("solid", 8.0, lobe="RUL", at=(-70.0, 5.0, 10.0)))
    assert put(ct, lobes, Wish("solid", 8.0, lobe="LLL", at=(-70.0, 5.0, 10.0))).records[0]["lobe"] == "LLL"
    with pytest.raises(ValueError, match="RML is asked for, but the lung labels do not tell lobes"):
        put(ct, labels, Wish("solid", 10.0, lobe="RML"))


def test_a_nodule_that_finds_no_place_says_why():
    ct, labels = scan()
    small = np.zeros_like(labels)
    middle = np.argwhere(labels).mean(0).astype(int)
    x = np.argwhere(labels[:, middle[1], middle[2]])[5, 0]
    small[x : x + 4, middle[1] : middle[1] + 4, middle[2] : middle[2] + 3] = 1
    with pytest.raises(ValueError, match=r"nodule 1 \(solid, 20 mm\): found 0 of 1 inner places"):
        put(ct, small, Wish("solid", 20.0))


class Moody(tiny.PaintingGenerator):
    """Misses the wish at first."""

    def __call__(self, request, **options):
        out = super().__call__(request, **options)
        return out if len(self.asked) > 1 else np.where(request.mask, -900, out).astype(np.float32)


def test_what_misses_its_wish_is_made_again_with_another_noise():
    ct, labels = scan()
    moody = Moody()
    wishes = [Wish("solid", 12.0, seed=1), Wish("solid", 10.0, seed=2)]
    out = insert(ct, wishes, moody, labels, library=LIBRARY, retries=2)
    assert len(moody.asked) == 2 and (moody.asked[0].seeds != moody.asked[1].seeds).all()
    assert [r["times_made"] for r in out.records] == [2, 2] and not any(r["missed"] for r in out.records)
    assert [r["noise_seed"] for r in out.records] == moody.asked[1].seeds.tolist()
    none = insert(ct, wishes, Moody(), labels, library=LIBRARY, retries=0)
    assert all("jsd" in " ".join(r["missed"]) for r in none.records)


def test_more_nodules_than_a_byte_counts(monkeypatch):
    inside = []

    def placed(space, wish, number):
        """A ball at a place of its own; searching and measuring so many takes a minute."""
        if not inside:
            inside.extend(np.flatnonzero(space.labels).tolist())
        index = np.array(np.unravel_index(inside[number * 7000], space.labels.shape))
        histogram = np.eye(40)[25]
        return Nodule(
            wish, to_world(space.affine, index), tiny.ball(7, 2), None, histogram, 1, {"shape": "", "histogram": ""}
        )

    good = {"jsd": 0.0, "mean_error_hu": 0.0, "halo_hu": 0.0, "fill": 1.0}
    for name, stand_in in (
        ("place_nodule", lambda space, wish, library, number: placed(space, wish, number)),
        ("feathered", lambda background, decoded, mask: decoded),
        ("assess", lambda *_: dict(good)),
    ):
        monkeypatch.setattr(f"hrldm.insertion.insert.{name}", stand_in)
    ct, labels = scan()
    out = put(ct, labels, *[Wish("solid", 6.0, seed=k) for k in range(257)], retries=0)
    assert out.mask.dtype == np.uint16 and len(out.records) == 257
    assert {1, 255, 256, 257} <= set(np.unique(out.mask).tolist())
    assert put(ct, labels, Wish("solid", 6.0), retries=0).mask.dtype == np.uint8


def test_retries_below_none_are_refused():
    ct, labels = scan()
    with pytest.raises(ValueError, match="retries=-1: give 0 to 100"):
        put(ct, labels, Wish(), retries=-1)


def test_quality_by_hand():
    before = np.full((24, 24, 24), -850.0)
    mask = tiny.ball(24, 5)
    after = np.where(mask, 17.5, before)
    histogram = np.zeros(40)
    histogram[29] = 1.0  # 15..50 HU
    found = assess(before, after, mask, histogram)
    assert found["obtained_mean_hu"] == found["requested_mean_hu"] and found["jsd"] == 0 and found["fill"] == 1
    assert found["halo_hu"] == 0 and not faults(found)
    worse = assess(before, np.where(mask & (np.arange(24) < 12), 17.5, before), mask, histogram)
    assert worse["fill"] < 0.7 and {f.split()[0] for f in faults(worse)} == {"jsd", "mean_error_hu", "fill"}
    assert set(LIMITS) <= set(found)
    haloed = assess(before, after + 100.0 * ~mask, mask, histogram)
    assert haloed["halo_hu"] == pytest.approx(100) and "halo_hu 100 (at most 80)" in faults(haloed)


def test_a_part_solid_nodule_has_the_core_that_is_asked_for():
    ct, labels = scan()
    generator = tiny.PaintingGenerator()
    out = insert(
        ct, [Wish("part-solid", 16.0, core_mm=9.0), Wish("solid", 10.0, seed=5)], generator, labels, library=LIBRARY
    )
    request = generator.asked[0]
    core, mask = request.core[0], request.mask[0]
    assert core.sum() == round(np.pi / 6 * 9**3) and not core[~mask].any() and not request.core[1].any()
    bins = np.linspace(-1000, 400, 40, endpoint=False) + 17.5
    assert request.histogram[0][bins > -300].sum() == pytest.approx(core.sum() / mask.sum())
    record = out.records[0]
    assert record["core_mm3"] == core.sum() and record["wish"]["core_mm"] == 9.0 and "core_mm3" not in out.records[1]
    assert {"core_mean_hu", "rim_mean_hu"} <= record["quality"].keys()
    with pytest.raises(ValueError, match="below the nodule's own diameter"):
        Wish("part-solid", 8.0, core_mm=8.0)
    with pytest.raises(ValueError, match="solid core of 4 mm: part-solid nodules have one"):
        Wish("solid", 10.0, core_mm=4.0)


def own_mask(folder, at, radius, core=0.0, affine=None) -> str:
    """A ball of `radius` mm with its core in a file, on a grid of its own."""
    affine = np.diag([-0.9, 0.9, 1.3, 1.0]) if affine is None else affine
    shape = (40, 40, 30)
    affine[:3, 3] = np.array(at) - affine[:3, :3] @ (np.array(shape) // 2)
    distance = np.linalg.norm(to_world(affine, np.stack(np.indices(shape), -1)) - at, axis=-1)
    values = (distance <= radius).astype(np.uint8) + (distance <= (core or -1.0))
    nib.save(nib.Nifti1Image(values, affine), folder / "own.nii.gz")
    return str(folder / "own.nii.gz")


def test_a_lesion_drawn_by_the_user_is_filled_where_it_is(tmp_path):
    ct, labels = scan()
    at, generator = (-72.3, 6.1, 11.7), tiny.PaintingGenerator()
    wish = Wish("part-solid", mask=own_mask(tmp_path, at, 9.0, core=5.0))
    out = insert(ct, [wish], generator, labels, library=LIBRARY)
    request = generator.asked[0]
    assert request.mask[0].sum() == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.05)
    assert request.core[0].sum() == pytest.approx(4 / 3 * np.pi * 5**3, rel=0.1)
    found = to_world(ct.affine, np.argwhere(out.mask == 1).mean(0))
    np.testing.assert_allclose(found, at, atol=0.7)
    assert out.records[0]["shape"] == "own mask"
    again = Wish("part-solid", mask=own_mask(tmp_path, at, 9.0))
    with pytest.raises(ValueError, match=r"nodule 2 \(part-solid, mask own.nii.gz\): .*another lesion at this place"):
        put(ct, labels, again, again)


def test_a_mask_that_is_all_core_has_no_rim_and_no_nan(tmp_path, recwarn):
    ct, labels = scan()
    record = put(ct, labels, Wish("part-solid", mask=own_mask(tmp_path, (-72.3, 6.1, 11.7), 6.0, core=6.0))).records[0]
    assert "core_mean_hu" in record["quality"] and "rim_mean_hu" not in record["quality"]
    json.dumps(record, allow_nan=False)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_wrong_mask_of_the_user_is_named(tmp_path):
    ct, labels = scan()
    with pytest.raises(ValueError, match=r"own.nii.gz: 0% of the lesion lies in the lungs.*mask of this scan"):
        put(ct, labels, Wish(mask=own_mask(tmp_path, (0.0, 0.0, 0.0), 6.0)))
    with pytest.raises(ValueError, match=r"own.nii.gz: 0% of the lesion"):
        put(ct, labels, Wish(mask=own_mask(tmp_path, (900.0, 0.0, 0.0), 6.0)))
    path = own_mask(tmp_path, (0.0, 0.0, 0.0), 0.0)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"own.nii.gz: empty mask; mark the lesion with 1"):
        put(ct, labels, Wish(mask=path))
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 7, np.uint8), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"own.nii.gz: labels 7 to 7"):
        put(ct, labels, Wish(mask=path))
    nib.save(nib.Nifti1Image(np.ones((90, 9, 9), np.uint8), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"own.nii.gz: 90 mm long"):
        put(ct, labels, Wish(mask=path))
    with pytest.raises(ValueError, match="says its shape and place; leave out at"):
        Wish(mask=path, at=(0.0, 0.0, 0.0))
    for said in ({"diameter_mm": 25.0}, {"location": "subpleural"}):
        with pytest.raises(ValueError, match=f"says its shape and place; leave out {next(iter(said))}"):
            Wish(mask=path, **said)
    with pytest.raises(ValueError, match="no such file"):
        Wish(mask=str(tmp_path / "absent.nii.gz"))
    for subtype in ("solid", "ground-glass"):
        with pytest.raises(ValueError, match=f"marks a solid core .2., which {subtype} nodules have not"):
            Wish(subtype, mask=own_mask(tmp_path, (-72.3, 6.1, 11.7), 9.0, core=5.0))
    assert not Wish("part-solid", mask=own_mask(tmp_path, (-72.3, 6.1, 11.7), 9.0)).cored


@pytest.mark.parametrize(("gap", "length", "refused"), [(1, 1, False), (1, 12, False), (9, 1, True), (12, 3, True)])
def test_a_mask_of_two_lesions_or_with_a_stray_voxel_is_refused(tmp_path, gap, length, refused):
    """A satellite beside the lesion belongs to it, however long it is."""
    ct, labels = scan()
    path = own_mask(tmp_path, (-72.3, 6.1, 11.7), 5.0)
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    last = np.argwhere(values).max(0)[0]
    values[last + 1 + gap : last + 1 + gap + length, 20, 15] = 1
    nib.save(nib.Nifti1Image(values, image.affine), path)
    if refused:
        with pytest.raises(
            ValueError, match=r"own.nii.gz: 2 parts, one of them \d+ mm from the largest; give the mask of one"
        ):
            put(ct, labels, Wish(mask=path))
    else:
        put(ct, labels, Wish(mask=path))


def test_records_hold_what_makes_the_nodule_again():
    ct, labels = scan()
    first = put(ct, labels, Wish("part-solid", 12.0, seed=9)).records[0]
    wish = Wish(**{k: v for k, v in first["wish"].items()})
    assert dataclasses.asdict(wish) == dataclasses.asdict(Wish("part-solid", 12.0, seed=9))
    assert put(ct, labels, wish).records[0] == first


def test_a_lesion_cut_by_the_first_slice_is_written_to_its_last_voxel(tmp_path):
    """Lungs and lesion reach the face of the CT, as in a scan that was cut there; half a slice of 5 mm lies beyond its middle."""
    ct, labels = scan(spacing=(2.5, 2.5, 5.0))
    k = ct.shape[2] // 2
    affine = ct.affine.copy()
    affine[:3, 3] = to_world(ct.affine, np.array([0, 0, k]))
    ct, labels = CT(np.ascontiguousarray(ct.array[:, :, k:]), affine), np.ascontiguousarray(labels[:, :, k:])
    at = to_world(affine, np.array([(-70 - affine[0, 3]) // 2.5, -affine[1, 3] // 2.5, 0]))
    given = (np.linalg.norm(to_world(affine, np.stack(np.indices(ct.shape), -1)) - at, axis=-1) <= 8).astype(np.uint8)
    nib.save(nib.Nifti1Image(given, affine), tmp_path / "cut.nii.gz")
    out = put(ct, labels, Wish(mask=str(tmp_path / "cut.nii.gz")))
    np.testing.assert_allclose((out.mask > 0).sum((0, 1)), given.sum((0, 1)), rtol=0.15)
    assert (out.stored != ct.stored)[..., 0].any()


def test_a_lesion_that_reaches_beyond_the_ct_is_told(tmp_path, caplog):
    ct, labels = scan()
    at = to_world(np.linalg.inv(ct.affine), np.array([-70.0, 0.0, 0.0]))
    low = np.rint(at).astype(int)
    affine = ct.affine.copy()
    affine[:3, 3] = to_world(ct.affine, low * [0, 0, 1])
    ct, labels = (
        CT(np.ascontiguousarray(ct.array[:, :, low[2] :]), affine),
        np.ascontiguousarray(labels[:, :, low[2] :]),
    )
    place = to_world(affine, [low[0], low[1], 0])
    put(ct, labels, Wish(mask=own_mask(tmp_path, place + [0, 0, 6.5], 8.5)))
    assert "of the lesion is beyond the CT" not in caplog.text
    put(ct, labels, Wish(mask=own_mask(tmp_path, place + [0, 0, 5.5], 9.0)))
    assert "own.nii.gz: 2% of the lesion is beyond the CT" in caplog.text
    with pytest.raises(ValueError, match=r"own.nii.gz: \d+% of the lesion lies in the lungs.*\d+% is beyond the CT"):
        put(ct, labels, Wish(mask=own_mask(tmp_path, place, 8.0)))


def test_a_mask_in_air_or_of_no_numbers_is_refused(tmp_path):
    ct, labels = scan()
    path = own_mask(tmp_path, (-70.0, 0.0, 0.0), 6.0)
    windpipe = np.linalg.norm(to_world(ct.affine, np.stack(np.indices(ct.shape), -1)) - [-70, 0, 0], axis=-1) < 10
    with pytest.raises(ValueError, match=r"own.nii.gz: the lesion lies in air \(mean -1000 HU\)"):
        put(CT(np.where(windpipe, -1000, ct.array), ct.affine), labels, Wish(mask=path))
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"own.nii.gz: voxels that are NaN"):
        put(ct, labels, Wish(mask=path))
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 65537, np.int32), np.eye(4)), path)  # 1 in 16 bits
    with pytest.raises(ValueError, match=r"own.nii.gz: labels 65537 to 65537"):
        put(ct, labels, Wish(mask=path))
    affine = np.diag([0.4, 0.4, 0.4, 1.0])
    affine[:3, 3] = (-70.3, 0.3, 0.3)
    nib.save(nib.Nifti1Image(np.pad(np.ones((1, 1, 1), np.uint8), 1), affine), path)
    with pytest.raises(ValueError, match=r"own.nii.gz: 1 voxel\(s\) that are less than 1 mm"):
        put(ct, labels, Wish(mask=path))


def test_a_mask_that_lost_its_affine_is_refused(tmp_path):
    ct, labels = scan()
    nib.save(nib.Nifti1Image(labels * 0 + 1, np.eye(4)), tmp_path / "own.nii.gz")
    with pytest.raises(ValueError, match="own.nii.gz: its affine is not that of"):
        put(ct, labels, Wish(mask=str(tmp_path / "own.nii.gz")))
