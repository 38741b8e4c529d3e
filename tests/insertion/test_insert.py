"""A nodule in a CT: the background keeps its bits, the lesion lies in the lung and is what was asked for."""

import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.geometry import to_world
from hrldm.ct.volume import CT
from hrldm.insertion.finish import Finished, lesion_in
from hrldm.insertion.insert import insert
from hrldm.insertion.place import Nodule
from hrldm.insertion.quality import LIMITS, assess, faults
from hrldm.insertion.wish import Wish
from hrldm.nodules.positions import VESSEL_HU
from tests import tiny
from tests.insertion.chests import During, drawn, places, save, scan

LUNGS = scan()[1]
AT = (-72.3, 6.1, 11.7)  # in the left lung


def put(ct, labels, *wishes, generator=None, **options):
    return insert(ct, list(wishes), generator or tiny.PaintingGenerator(), labels, **options)


def centre_of(ct, lesion):
    return to_world(ct.affine, np.argwhere(lesion).mean(0))


def part(ct, labels, first):
    """The chest from one slice on."""
    affine = ct.affine.copy()
    affine[:3, 3] = to_world(affine, np.array([0, 0, first]))
    return CT(ct.array[:, :, first:].copy(), affine), labels[:, :, first:].copy()


def test_the_lesion_has_the_size_and_intensity_asked_for_and_the_rest_keeps_its_bits(chest):
    ct, labels = chest
    for subtype in ("solid", "part-solid", "ground-glass"):
        out = put(ct, labels, Wish(subtype, 14.0, seed=3))
        lesion, record = out.mask == 1, out.records[0]
        assert out.stored.dtype == ct.stored.dtype and set(np.unique(out.mask)) == {0, 1} and labels[lesion].all()
        far = ndimage.distance_transform_edt(~lesion, ct.spacing) > record["scan"]["reach_mm"] + 0.01
        np.testing.assert_array_equal(out.stored[far], ct.stored[far])
        assert record["volume_mm3"] == round(np.pi / 6 * 14**3)
        assert lesion.sum() * np.prod(ct.spacing) == pytest.approx(record["volume_mm3"], rel=0.2)
        assert np.linalg.norm(centre_of(ct, lesion) - record["centre_ras_mm"]) < 1.5
        found = record["quality"]
        assert out.stored[lesion].mean() == pytest.approx(found["obtained_mean_hu"], abs=0.01)
        assert found["mean_error_hu"] < 3 and found["jsd"] < 0.012


def test_flipping_the_input_flips_the_output(chest):
    ct, labels = chest
    affine = ct.affine @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = to_world(ct.affine, np.array([ct.shape[0] - 1, 0, 0]))
    a = put(ct, labels, Wish("solid", 12.0, seed=3))
    b = put(CT(ct.array[::-1].copy(), affine), labels[::-1].copy(), Wish("solid", 12.0, seed=3))
    assert a.records[0]["centre_ras_mm"] == b.records[0]["centre_ras_mm"]
    np.testing.assert_array_equal(a.mask, b.mask[::-1])
    np.testing.assert_array_equal(a.stored, b.stored[::-1])


def test_same_seed_same_result_other_seed_another_place_and_a_record_makes_its_nodule_again(chest):
    a, b, c = (put(*chest, Wish("part-solid", 12.0, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.stored, b.stored)
    assert a.records == b.records and a.records[0]["centre_ras_mm"] != c.records[0]["centre_ras_mm"]
    again = Wish(**a.records[0]["wish"])
    assert again == Wish("part-solid", 12.0, seed=1) and put(*chest, again).records == a.records


def test_several_nodules_keep_apart_and_off_what_is_to_be_avoided(chest):
    ct, labels = chest
    avoid = np.zeros(ct.shape, bool)
    avoid[: ct.shape[0] // 2] = True  # a whole side
    kinds = [("solid", 14), ("part-solid", 10), ("ground-glass", 20)]
    out = put(ct, labels, *(Wish(kind, size, seed=k) for k, (kind, size) in enumerate(kinds)), avoid=avoid)
    assert set(np.unique(out.mask)) == {0, 1, 2, 3} and not out.mask[avoid].any()
    assert (out.stored[avoid] == ct.stored[avoid]).all()
    for k in (1, 2, 3):
        distance = ndimage.distance_transform_edt(out.mask != k, ct.spacing)
        assert distance[(out.mask > 0) & (out.mask != k)].min() > 2.0
    assert [(r["wish"]["subtype"], r["wish"]["diameter_mm"]) for r in out.records] == kinds


def test_what_is_to_be_avoided_keeps_its_bits_however_near_the_nodule(chest):
    ct, _ = chest
    known = (np.abs(places(ct.affine, ct.shape) - [-70, 0, 0]) < 12).all(-1)
    with pytest.raises(ValueError, match="there is another lesion"):
        put(*chest, Wish("solid", 8.0, at=(-52.0, 0.0, 0.0)), avoid=known)
    out = put(*chest, Wish("solid", 8.0, at=(-48.0, 0.0, 0.0)), avoid=known)
    np.testing.assert_array_equal(out.stored[known], ct.stored[known])


@pytest.mark.parametrize("order", [(-10.0, 12.0), (12.0, -10.0)], ids=["below first", "above first"])
def test_neighbours_in_thick_slices_both_hold_and_their_edges_add_up(order, monkeypatch):
    """10 mm apart, so that in slices of 5 mm, with a wide profile, the edges of both reach the voxels between them."""
    monkeypatch.setattr("hrldm.insertion.finish.psf_mm", lambda *_: np.array([0.7, 0.7, 2.5]))
    ct, labels = scan(spacing=(2.0, 2.0, 5.0))
    wishes = [Wish("solid", 12.0, at=(-72.0, 0.0, z), histogram=tuple(np.eye(40)[29])) for z in order]
    alone, out = [put(ct, labels, wish) for wish in wishes], put(ct, labels, *wishes)
    change = np.stack([one.stored.astype(int) - ct.stored for one in alone])
    lesions = np.stack([one.mask == 1 for one in alone])
    assert not lesions.all(0).any()
    for k, (one, lesion) in enumerate(zip(alone, lesions, strict=True), start=1):
        np.testing.assert_array_equal(out.mask == k, lesion)
        np.testing.assert_array_equal(out.stored[lesion], one.stored[lesion])
        quality = out.records[k - 1]["quality"]
        assert quality["jsd"] < 0.012 and abs(out.stored[lesion].mean() - quality["requested_mean_hu"]) < 3
    between = ~lesions.any(0)
    assert (change != 0)[:, between].all(0).sum() > 5
    np.testing.assert_array_equal((out.stored.astype(int) - ct.stored)[between], change.sum(0)[between])
    with pytest.raises(ValueError, match="there is another lesion"):
        put(ct, labels, *(replace(wish, at=(-72.0, 0.0, z)) for wish, z in zip(wishes, (-10.0, 7.0), strict=True)))


def test_small_lesions_in_one_thick_slice_share_no_voxel():
    """Slices of 25 mm: one over the other they would fill less than half of one voxel each, and both own it."""
    ct, labels = scan(spacing=(2.5, 2.5, 25.0))
    low, high = (Wish("solid", 6.0, at=(-72.0, 0.0, z)) for z in (-8.0, 8.0))
    with pytest.raises(ValueError, match="there is another lesion"):
        put(ct, labels, low, high)
    out = put(ct, labels, low, replace(high, at=(-25.0, 0.0, 0.0)), Wish("solid", 6.0, seed=4))
    assert set(np.unique(out.mask)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("diameter", "thick", "said"), [(6.0, 5.0, True), (10.0, 5.0, False), (10.0, 12.0, True)])
def test_a_nodule_too_small_for_the_slices_is_announced_with_what_will_come(diameter, thick, said, caplog):
    ct, labels = scan(spacing=(2.0, 2.0, thick))
    announced = (
        rf"nodule 1: {diameter:.1f} mm in voxels of up to {thick:.1f} mm mixes .* expect a mean of about (-\d+) HU"
    )
    heard = []
    generator = During(lambda: heard.extend(re.findall(announced, caplog.text)))
    made = put(ct, labels, Wish("solid", diameter, at=AT), generator=generator).records[0]
    quality = made["quality"]
    assert made["scan"]["holds_histogram"] != said and made["times_made"] == 1 and bool(heard) == said
    if said:
        assert f"not {quality['requested_mean_hu']:.0f}; histograms hold from {2 * thick:.0f} mm on" in caplog.text
    expected = float(heard[0]) if said else quality["requested_mean_hu"]
    assert quality["obtained_mean_hu"] == pytest.approx(expected, abs=40 if said else 3)


@pytest.mark.parametrize(
    ("labels", "avoid", "said"),
    [
        (LUNGS.transpose(2, 1, 0)[:-1], None, r"labels have .* voxels and the CT .*SimpleITK's arrays are \(z, y, x\)"),
        (LUNGS, np.zeros((3, 3, 3), bool), "avoid have"),
        (np.zeros_like(LUNGS), None, "hold no lung"),
        (LUNGS * 0.98, None, "labels of 0 to 0.98: give whole numbers 0 to 255"),
        (LUNGS.astype(int) * 256, None, "labels of 0 to 256: give whole numbers 0 to 255"),
        (-LUNGS.astype(int), None, "labels of -1 to 0: give whole numbers 0 to 255"),
    ],
    ids=["another order", "another grid to avoid", "no lung", "fractions", "too large", "negative"],
)
def test_labels_of_another_grid_or_without_lung_are_refused(chest, labels, avoid, said):
    with pytest.raises(ValueError, match=said):
        put(chest[0], labels, Wish(), avoid=avoid)


def test_a_given_place_is_taken_or_refused_with_the_nearest_good_one(chest):
    out = put(*chest, Wish("solid", 12.0, at=AT))
    assert np.abs(np.array(out.records[0]["centre_ras_mm"]) - AT).max() <= 1
    said = r"nodule 1 .*at 0, 0, 0 mm the lesion would leave the lungs; the nearest place"
    with pytest.raises(ValueError, match=said) as error:
        put(*chest, Wish("solid", 12.0, at=(0.0, 0.0, 0.0)))
    put(*chest, Wish("solid", 12.0, at=str(error.value).rsplit("is ", 1)[1]))
    with pytest.raises(ValueError, match="nodule 2 .*another lesion"):
        put(*chest, *[Wish("solid", 12.0, at=AT)] * 2)


def test_lobes_and_locations(chest):
    ct, labels = chest
    lobes = np.where(labels > 0, np.where(places(ct.affine, ct.shape)[..., 0] > 0, 12, 11), 0).astype(np.uint8)
    out = put(ct, lobes, Wish("solid", 10.0, lobe="RUL"), Wish("solid", 10.0, lobe="LLL", location="subpleural"))
    assert [r["lobe"] for r in out.records] == ["RUL", "LLL"]
    assert (lobes[out.mask == 1] == 12).all() and np.isin(lobes[out.mask == 2], (0, 11)).all()
    depth = ndimage.distance_transform_edt(labels, ct.spacing)
    assert depth[out.mask == 1].min() > depth[out.mask == 2].min()
    with pytest.raises(ValueError, match="that place is in LLL, not in RUL"):
        put(ct, lobes, Wish("solid", 8.0, lobe="RUL", at=AT))
    assert put(ct, lobes, Wish("solid", 8.0, lobe="LLL", at=AT)).records[0]["lobe"] == "LLL"
    with pytest.raises(ValueError, match="RML is asked for, but the lung labels have LLL, RUL only"):
        put(ct, lobes, Wish("solid", 10.0, lobe="RML"))
    with pytest.raises(ValueError, match="RML is asked for, but the lung labels do not tell lobes"):
        put(ct, labels, Wish("solid", 10.0, lobe="RML"))


def test_a_nodule_that_finds_no_place_says_why(chest):
    ct, labels = chest
    small = np.zeros_like(labels)
    x, y, z = np.rint(to_world(np.linalg.inv(ct.affine), np.array(AT))).astype(int)
    small[x : x + 4, y : y + 4, z : z + 3] = 1
    with pytest.raises(ValueError, match=r"nodule 1 \(solid, 20 mm\): found 0 of 1 inner places"):
        put(ct, small, Wish("solid", 20.0))


def test_what_misses_its_wish_is_made_again_with_another_noise(chest, monkeypatch):
    found = iter([0.5, 0.3, 0.2, 0.0])  # both miss twice over, then one passes

    def assessed(*arguments):
        return assess(*arguments) | {"jsd": next(found)}

    monkeypatch.setattr("hrldm.insertion.insert.assess", assessed)
    generator, wishes = tiny.PaintingGenerator(), [Wish("solid", 12.0, seed=1), Wish("solid", 10.0, seed=2)]
    out = put(*chest, *wishes, generator=generator, retries=1)
    first, second = (request.seeds for request in generator.asked)
    assert (first != second).all() and [r["times_made"] for r in out.records] == [2, 2]
    assert [r["noise_seed"] for r in out.records] == second.tolist()  # the better ones
    assert "jsd 0.2" in out.records[0]["missed"][0] and not out.records[1]["missed"]
    with pytest.raises(ValueError, match="retries=-1: give 0 to 100"):
        put(*chest, Wish(), retries=-1)


def test_the_histogram_is_imposed_whatever_the_network_makes(chest):
    class Dull(tiny.PaintingGenerator):
        def __call__(self, request, **options):
            return np.where(request.mask, -900, super().__call__(request, **options)).astype(np.float32)

    made = put(*chest, Wish("solid", 12.0, seed=1), generator=Dull()).records[0]
    assert not made["missed"] and made["quality"]["mean_error_hu"] < 3
    unaided = put(*chest, Wish("solid", 12.0, seed=1), generator=Dull(), matching=False, retries=0).records[0]
    assert "jsd" in " ".join(unaided["missed"])


def test_more_nodules_than_a_byte_counts(chest, monkeypatch):
    def placed(space, wish, library, number):
        """A ball at a place of its own; searching, finishing and measuring so many takes minutes."""
        inside = np.array(np.unravel_index(np.flatnonzero(space.labels)[number * 7000], space.labels.shape))
        chosen = {"shape": "", "histogram": ""}
        return Nodule(wish, to_world(space.affine, inside), tiny.ball(7, 2), None, np.eye(40)[25], 1, chosen)

    monkeypatch.setattr("hrldm.insertion.insert.place_nodule", placed)

    def laid(ct, hu, mask, affine, histogram, seed, core, keep, **how):
        box, lesion, _ = lesion_in(ct, mask, affine)
        stored = ct.stored[box].copy()
        stored[lesion] = 0
        none = np.zeros_like(lesion)
        return Finished(box, stored, lesion, none, ct.array[box], stored, True, histogram, np.ones(3), 0.0, 3.0)

    monkeypatch.setattr("hrldm.insertion.insert.finished", laid)
    monkeypatch.setattr("hrldm.insertion.insert.assess", lambda *_: {"jsd": 0, "mean_error_hu": 0, "halo_hu": 0})
    out = put(*chest, *(Wish("solid", 6.0, seed=k) for k in range(257)), retries=0)
    assert out.mask.dtype == np.uint16 and len(out.records) == 257
    assert {1, 255, 256, 257} <= set(np.unique(out.mask).tolist())
    assert put(*chest, Wish("solid", 6.0), retries=0).mask.dtype == np.uint8


def test_quality_by_hand():
    before, mask = np.full((24, 24, 24), -850.0), tiny.ball(24, 5)
    after, histogram = np.where(mask, 32.5, before), np.eye(40)[29]  # 15..50 HU
    spacing = np.array([0.7, 0.7, 1.5])
    found = assess(before, after, mask, spacing, histogram)
    assert found["obtained_mean_hu"] == found["requested_mean_hu"] and found["jsd"] == 0
    assert found["halo_hu"] == 0 and not faults(found) and set(LIMITS) <= set(found)
    half = assess(before, np.where(mask & (np.arange(24) < 12), 32.5, before), mask, spacing, histogram)
    assert {f.split()[0] for f in faults(half)} == {"jsd", "mean_error_hu"}
    haloed = assess(before, after + 100.0 * ~mask, mask, spacing, histogram)
    assert haloed["halo_hu"] == pytest.approx(100) and "halo_hu 100 (at most 80)" in faults(haloed)


def test_a_part_solid_nodule_has_the_core_that_is_asked_for(chest):
    generator = tiny.PaintingGenerator()
    out = put(*chest, Wish("part-solid", 16.0, core_mm=9.0), Wish("solid", 10.0, seed=5), generator=generator)
    request = generator.asked[0]
    core, mask = request.core[0], request.mask[0]
    assert core.sum() == round(np.pi / 6 * 9**3) and not core[~mask].any() and not request.core[1].any()
    bins = np.linspace(-1000, 400, 40, endpoint=False) + 17.5
    assert request.histogram[0][bins > -300].sum() == pytest.approx(core.sum() / mask.sum())
    record = out.records[0]
    assert record["core_mm3"] == core.sum() and record["wish"]["core_mm"] == 9.0 and "core_mm3" not in out.records[1]
    assert {"core_mean_hu", "rim_mean_hu"} <= record["quality"].keys()


@pytest.mark.parametrize(("mean", "sd", "core"), [(-300, None, None), (-450, 250, 8.0)])
def test_the_file_has_the_mean_and_sd_asked_for_and_a_core(chest, mean, sd, core):
    out = put(*chest, Wish("part-solid", 16.0, mean_hu=mean, sd_hu=sd, core_mm=core, at=AT))
    values = out.stored[out.mask == 1].astype(float)
    assert values.mean() == pytest.approx(mean, abs=3) and out.core.any()
    assert sd is None or values.std() == pytest.approx(sd, abs=3)


def test_a_place_in_a_warning_is_plain_numbers(chest, monkeypatch, caplog):
    monkeypatch.setattr("hrldm.insertion.insert.faults", lambda _: ["jsd 1"])
    put(*chest, Wish("solid", 12.0, at=(-72.0, 6.0, 12.0)), retries=0)
    assert "nodule at -72, 6, 12 mm misses its wish: jsd 1" in caplog.text


# -- a lesion drawn by the user ------------------------------------------------------------------------------------------


def test_a_lesion_drawn_by_the_user_is_filled_where_it_is(chest, tmp_path):
    ct, labels = chest
    generator, mask = tiny.PaintingGenerator(), drawn(tmp_path / "own.nii.gz", AT, 9.0, core=5.0)
    out = put(ct, labels, Wish("part-solid", mask=mask), generator=generator)
    request = generator.asked[0]
    assert request.mask[0].sum() == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.05)
    assert request.core[0].sum() == pytest.approx(4 / 3 * np.pi * 5**3, rel=0.1)
    np.testing.assert_allclose(centre_of(ct, out.mask == 1), AT, atol=0.7)
    assert out.records[0]["shape"] == "own mask"
    again = Wish("part-solid", mask=mask)
    with pytest.raises(ValueError, match=r"nodule 2 \(part-solid, mask own.nii.gz\): .*another lesion at this place"):
        put(ct, labels, again, again)


def test_a_mask_that_is_all_core_has_no_rim_and_no_nan(chest, tmp_path, recwarn):
    wish = Wish("part-solid", mask=drawn(tmp_path / "own.nii.gz", AT, 6.0, core=6.0))
    record = put(*chest, wish).records[0]
    assert "core_mean_hu" in record["quality"] and "rim_mean_hu" not in record["quality"]
    json.dumps(record, allow_nan=False)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def one_voxel(mm):
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = (-70.3, 0.3, 0.3)
    return np.pad(np.ones((1, 1, 1), np.uint8), 1), affine


@pytest.mark.parametrize(
    ("values", "affine", "said"),
    [
        (np.zeros((9, 9, 9), np.uint8), np.eye(4), "empty mask; mark the lesion with 1"),
        (np.full((9, 9, 9), 7, np.uint8), np.eye(4), "labels 7 to 7"),
        (np.full((9, 9, 9), 65537, np.int32), np.eye(4), "labels 65537 to 65537"),  # 1 in 16 bits
        (np.full((9, 9, 9), np.nan, np.float32), np.eye(4), "voxels that are NaN"),
        (np.ones((90, 9, 9), np.uint8), np.eye(4), "90 mm long"),
        (*one_voxel(0.4), r"1 voxel\(s\) that are less than 1 mm"),
        (np.ones_like(LUNGS), np.eye(4), "its affine is not that of"),
    ],
    ids=["empty", "label 7", "label of 32 bits", "not a number", "an organ", "too small", "affine lost"],
)  # fmt: skip
def test_a_mask_that_is_no_lesion_is_named(chest, tmp_path, values, affine, said):
    with pytest.raises(ValueError, match=f"own.nii.gz: {said}"):
        put(*chest, Wish(mask=save(tmp_path / "own.nii.gz", values, affine)))


@pytest.mark.parametrize("at", [(0.0, 0.0, 0.0), (900.0, 0.0, 0.0)], ids=["mediastinum", "beyond the CT"])
def test_a_mask_outside_the_lungs_is_refused(chest, tmp_path, at):
    with pytest.raises(ValueError, match=r"own.nii.gz: 0% of the lesion lies in the lungs.*mask of this scan"):
        put(*chest, Wish(mask=drawn(tmp_path / "own.nii.gz", at, 6.0)))


def test_a_mask_in_air_is_refused(chest, tmp_path):
    ct, labels = chest
    windpipe = np.linalg.norm(places(ct.affine, ct.shape) - AT, axis=-1) < 10
    with pytest.raises(ValueError, match=r"own.nii.gz: the lesion lies in air \(mean -1000 HU\)"):
        holed = CT(np.where(windpipe, -1000, ct.array), ct.affine)
        put(holed, labels, Wish(mask=drawn(tmp_path / "own.nii.gz", AT, 6.0)))


@pytest.mark.parametrize(("gap", "length", "refused"), [(1, 1, False), (1, 12, False), (9, 1, True), (12, 3, True)])
def test_a_mask_of_two_lesions_or_with_a_stray_voxel_is_refused(chest, tmp_path, gap, length, refused):
    """A satellite beside the lesion belongs to it, however long it is."""
    image = nib.load(drawn(tmp_path / "ball.nii.gz", AT, 5.0))
    values = np.asarray(image.dataobj).copy()
    start = np.argwhere(values).max(0)[0] + 1 + gap
    values[start : start + length, 20, 15] = 1
    wish = Wish(mask=save(tmp_path / "own.nii.gz", values, image.affine))
    if not refused:
        put(*chest, wish)
        return
    with pytest.raises(
        ValueError, match=r"own.nii.gz: 2 parts, one of them \d+ mm from the largest; give the mask of one"
    ):
        put(*chest, wish)


def test_a_lesion_cut_by_the_first_slice_is_written_to_its_last_voxel(tmp_path):
    """Lungs and lesion reach the face of the CT, as in a scan that was cut there; half a slice of 5 mm lies beyond its middle."""
    ct, labels = scan(spacing=(2.5, 2.5, 5.0))
    ct, labels = part(ct, labels, ct.shape[2] // 2)
    x, y, _ = np.floor(to_world(np.linalg.inv(ct.affine), np.array([-70.0, 0.0, 0.0])))
    at = to_world(ct.affine, np.array([x, y, 0]))
    given = (np.linalg.norm(places(ct.affine, ct.shape) - at, axis=-1) <= 8).astype(np.uint8)
    out = put(ct, labels, Wish(mask=save(tmp_path / "cut.nii.gz", given, ct.affine)))
    np.testing.assert_allclose((out.mask > 0).sum((0, 1)), given.sum((0, 1)), rtol=0.15)
    assert (out.stored != ct.stored)[..., 0].any()


def test_a_lesion_that_reaches_beyond_the_ct_is_told(chest, tmp_path, caplog):
    x, y, z = np.rint(to_world(np.linalg.inv(chest[0].affine), np.array([-70.0, 0.0, 0.0]))).astype(int)
    ct, labels = part(*chest, z)
    at, path = to_world(ct.affine, np.array([x, y, 0])), tmp_path / "own.nii.gz"
    put(ct, labels, Wish(mask=drawn(path, at + [0, 0, 6.5], 8.5)))
    assert "of the lesion is beyond the CT" not in caplog.text
    put(ct, labels, Wish(mask=drawn(path, at + [0, 0, 5.5], 9.0)))
    assert "own.nii.gz: 2% of the lesion is beyond the CT" in caplog.text
    with pytest.raises(ValueError, match=r"own.nii.gz: \d+% of the lesion lies in the lungs.*\d+% is beyond the CT"):
        put(ct, labels, Wish(mask=drawn(path, at, 8.0)))


def test_of_a_mask_that_reaches_into_the_wall_the_wall_stays_and_it_is_said(tmp_path, caplog):
    ct, labels = scan(spacing=(1.0, 1.0, 1.5))
    made = put(ct, labels, Wish("ground-glass", mask=drawn(tmp_path / "own.nii.gz", (-112.0, 0.0, 0.0), 9.0)))
    wall = (labels == 0) & (ct.array > VESSEL_HU)
    given = np.linalg.norm(places(ct.affine, ct.shape) - [-112, 0, 0], axis=-1) <= 9
    assert (given & wall).sum() > 15 and (made.mask > 0).sum() > 0.8 * given.sum()
    assert np.array_equal(made.stored[wall], ct.stored[wall]) and not made.mask[wall].any()
    assert "of the lesion is chest wall or mediastinum, which stays as it is" in caplog.text


def test_a_mask_of_tissue_is_taken_and_said(chest, tmp_path, caplog):
    ct, labels = chest
    mask = drawn(tmp_path / "own.nii.gz", AT, 7.0)
    put(ct, labels, Wish("ground-glass", mask=mask))
    assert "is tissue already" not in caplog.text
    mass = np.linalg.norm(places(ct.affine, ct.shape) - AT, axis=-1) <= 9
    put(CT(np.where(mass, 40, ct.array).astype(np.int16), ct.affine), labels, Wish("ground-glass", mask=mask))
    assert "own.nii.gz: 100% of the lesion is tissue already (mean 33 HU)" in caplog.text
