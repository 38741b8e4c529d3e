"""Cohorts: what each preset's nodules share and differ in, that a plan can be made, and that what it made can be trained on."""

import csv
import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from hrldm.config import SUBTYPES
from hrldm.insertion import planning
from hrldm.insertion.cohorts import Cohort
from hrldm.insertion.lung_space import LungSpace
from hrldm.insertion.place import place_nodule
from hrldm.insertion.plans import SCANS, Case, read_cases, read_plan
from hrldm.insertion.summary import MANIFEST
from hrldm.insertion.wish import Wish
from hrldm.nodules.histograms import histogram_moments
from hrldm.nodules.manifest import load_manifest
from hrldm.nodules.masks import signed_distance
from hrldm.nodules.shape_fitting import posed_distance
from hrldm.nodules.shapes import ShapeLibrary, load_shapes
from tests.insertion.chests import LIBRARY, places, save

ROD = np.zeros((31, 11, 11), bool)
ROD[3:28, 3:8, 4:6] = ROD[20:28, 3:8, 3:9] = True  # no pose of it looks like another
RODS = ShapeLibrary(LIBRARY.table, [ROD] * len(LIBRARY))


@pytest.fixture(autouse=True)
def _rods(monkeypatch):
    monkeypatch.setattr(planning, "load_shapes", lambda: RODS)
    monkeypatch.setattr("hrldm.insertion.insert.load_shapes", lambda: RODS)


@pytest.fixture
def cts(nifti, tmp_path):
    """A folder with the chest as a.nii.gz and b.nii.gz."""
    (tmp_path / "cts").mkdir()
    for name in "ab":
        shutil.copy(nifti, tmp_path / "cts" / f"{name}.nii.gz")
    return tmp_path / "cts"


@pytest.fixture(scope="session")
def labels(chest):
    """The phantom's lungs cut into lobes by planes."""
    ct, lungs = chest
    x, _, z = np.moveaxis(places(ct.affine, ct.shape), -1, 0)
    left, right = np.where(z > 0, 10, 11), np.select([z > 25, z > -25], [12, 13], 14)
    return (lungs * np.where(x < 0, left, right)).astype(np.uint8)


@pytest.fixture
def lobes(tmp_path, chest, labels):
    """A folder with a lobe map for a and b."""
    (tmp_path / "maps").mkdir()
    for name in "ab":
        save(tmp_path / "maps" / f"{name}.nii.gz", labels, chest[0].affine)
    return tmp_path / "maps"


@pytest.fixture
def space(chest, labels, monkeypatch):
    """The phantom's lungs, which need not be read again."""
    space = LungSpace.of(chest[0], labels)
    monkeypatch.setattr(planning, "_space", lambda *_: space)
    return space


def planned(cts, cohort, lungs=None, name="plan.csv"):
    """The cases of a plan as they are read again, and its text."""
    path = cts.parent / name
    made = planning.plan_cohort(cts, path, cohort, lungs)
    read = read_cases(path)
    assert read == {case: made[case] for case in sorted(made)}
    return read, path.read_bytes()


def lesions(space, cases):
    """Each nodule of the cases, placed alone."""
    return {name: place_nodule(space.untouched(), *case.wishes, RODS, 1) for name, case in cases.items()}


# -- what is spread ----------------------------------------------------------------------------------------------------


def test_diameters_lobes_and_subtypes_have_equal_numbers_and_their_diameters_are_alike(cts, lobes, space):
    cases, first = planned(cts, Cohort("size-curve", number=3, diameters=(6, 16), seed=1))
    assert sorted(w.diameter_mm for case in cases.values() for w in case.wishes) == [6, 8, 10, 12, 14, 16]
    assert {name: len(case.wishes) for name, case in cases.items()} == {"a": 3, "b": 3}
    assert planned(cts, Cohort("size-curve", number=3, diameters=(6, 16), seed=1), name="again.csv")[1] == first
    assert planned(cts, Cohort("size-curve", number=3, diameters=(6, 16), seed=2), name="other.csv")[1] != first
    for preset, what, number, levels in (
        ("lobe-equalised", "lobe", 5, ("LLL", "LUL", "RLL", "RML", "RUL")),
        ("subtype-balanced", "subtype", 3, sorted(SUBTYPES)),
    ):
        cases, _ = planned(cts, Cohort(preset, number=number, diameters=(6, 8)), lobes, name=f"{preset}.csv")
        found = sorted((getattr(w, what), w.diameter_mm) for case in cases.values() for w in case.wishes)
        assert found == [(level, mm) for level in levels for mm in (6, 8)]
        assert [sorted(getattr(w, what) for w in cases[ct].wishes) for ct in "ab"] == [list(levels)] * 2
    seeds = [w.seed for case in cases.values() for w in case.wishes]
    assert len(set(seeds)) == len(seeds)


def test_prevalence_is_the_share_of_scans_with_a_nodule_and_the_rest_are_negatives():
    names = [f"ct{k:03}" for k in range(100)]
    given = Cohort("size-curve", prevalence=0.3, number=2, seed=3).wishes(names)
    counts = [len(wishes) for wishes in given.values()]
    assert list(given) == names and sorted(counts) == [0] * 70 + [2] * 30 and counts != sorted(counts)
    assert sum(map(len, Cohort("size-curve", prevalence=0.001).wishes(names).values())) == 1


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_counterfactuals_differ_in_their_subtype_alone(cts, space):
    cases, _ = planned(cts, Cohort("counterfactual", number=2, diameters=(9, 14)))
    assert sorted(cases) == sorted(f"{ct}-{k}-{subtype}" for ct in "ab" for k in (1, 2) for subtype in SUBTYPES)
    made = lesions(space, cases)
    for pair in ("a-1", "a-2", "b-1", "b-2"):
        three = [made[f"{pair}-{subtype}"] for subtype in SUBTYPES]
        assert len({dataclasses.replace(n.wish, subtype="solid") for n in three}) == 1
        for other in three[1:]:
            np.testing.assert_array_equal(other.mask, three[0].mask)
            np.testing.assert_array_equal(other.centre_mm, three[0].centre_mm)
        solid, *others = (histogram_moments(n.histogram)[0] for n in three)
        assert solid > max(others) and [n.core is None for n in three] == [True, False, True]
    assert made["a-1-solid"].wish != made["a-2-solid"].wish


def test_each_twin_differs_in_one_thing(cts, space):
    cases, _ = planned(cts, Cohort("twins", diameters=(10, 10)))
    made = {name.removeprefix("a-1-"): n for name, n in lesions(space, cases).items() if name.startswith("a-1-")}
    base = made.pop("base")
    differing = {
        "size": {"diameter_mm"},
        "subtype": {"subtype", "histogram"},
        "place": {"at"},
        "histogram": {"histogram"},
    }
    assert made.keys() == differing.keys()
    for what, nodule in made.items():
        pairs = zip(dataclasses.asdict(base.wish).items(), dataclasses.asdict(nodule.wish).values(), strict=True)
        assert {name for (name, one), other in pairs if one != other} == differing[what]
        assert np.array_equal(nodule.mask, base.mask) == (what != "size")
        assert np.array_equal(nodule.centre_mm, base.centre_mm) == (what != "place")
        assert np.array_equal(nodule.histogram, base.histogram) == (what in ("size", "place"))
        assert (nodule.noise_seed == base.noise_seed) == (what != "subtype")
    assert made["size"].wish.diameter_mm == 15


def test_growth_doubles_the_volume_in_the_doubling_time_and_keeps_the_rest(cts, space):
    cohort = Cohort("growth", diameters=(8, 8), days=(0, 100, 200), doubling_days=100)
    made = lesions(space, planned(cts, cohort)[0])
    times = [made[f"b-1-day-{day}"] for day in (0, 100, 200)]
    volumes = [n.mask.sum() for n in times]
    np.testing.assert_allclose(np.array(volumes) / volumes[0], [1, 2, 4], rtol=0.005)
    alike = {dataclasses.replace(n.wish, diameter_mm=8.0) for n in times}
    assert len(alike) == 1 and all(np.array_equal(n.histogram, times[0].histogram) for n in times)


@pytest.mark.parametrize("row", range(0, 1200, 300))
def test_a_posed_shape_is_one_shape_at_every_size(row):
    library = load_shapes()
    draws, shapes = [], []
    for diameter in (8.0, 16.0):
        rng = np.random.default_rng(4)
        distance, n = posed_distance(library.masks[row], diameter, rng)
        mask = distance >= np.sort(distance.ravel())[-n]
        assert mask.sum() == n == round(np.pi / 6 * diameter**3)
        draws.append(rng.integers(2**40))
        shapes.append(mask)
    assert draws[0] == draws[1]
    small, large = (np.argwhere(mask) - np.array(mask.shape) // 2 for mask in shapes)
    surface = signed_distance(np.pad(shapes[1], 4))
    # voxels of the small one, at twice the distance from the middle, lie in the large one or within its rounding
    outside = -surface[tuple((2 * small + np.array(surface.shape) // 2).T)]
    assert outside.max() < 2 and (outside > 0).mean() < 0.12
    np.testing.assert_allclose(large.mean(0), 2 * small.mean(0), atol=0.5)


def test_a_shape_is_taken_by_its_id(space):
    made = [place_nodule(space.untouched(), Wish(s, shape="shape4", seed=2), RODS, 1) for s in SUBTYPES]
    assert {n.chosen["shape"] for n in made} == {"shape4"} and all(np.array_equal(n.mask, made[0].mask) for n in made)
    with pytest.raises(ValueError, match="no shape 'shape9' among the 9, which have names like shape0"):
        place_nodule(space.untouched(), Wish(shape="shape9"), RODS, 1)
    with pytest.raises(ValueError, match="a shape is given; leave out spiculation"):
        Wish(shape="shape4", spiculation=3)


# -- what cannot be planned --------------------------------------------------------------------------------------------


def test_nodules_that_cannot_be_placed_are_all_named_and_no_plan_is_written(cts, lobes):
    (cts / "broken.nii.gz").write_bytes(b"no image")
    whole = nib.load(lobes / "a.nii.gz")
    values = np.asarray(whole.dataobj)
    save(lobes / "a.nii.gz", np.where(values == 13, 14, values).astype(np.uint8), whole.affine)
    shutil.copy(lobes / "b.nii.gz", lobes / "broken.nii.gz")
    (lobes / "b.nii.gz").unlink()
    with pytest.raises(ValueError) as error:
        planned(cts, Cohort("lobe-equalised", number=5, diameters=(8, 9)), lobes)
    said, *problems = str(error.value).split("\n  ")
    assert "plan.csv: not written, 3 of what was planned cannot be placed" in said
    assert (
        problems[0].startswith("a: nodule")
        and "lobe RML is asked for, but the lung labels have LUL, LLL" in problems[0]
    )
    assert problems[1].endswith("no label map named b.nii.gz") and "broken.nii.gz: not a readable image" in problems[2]
    assert not list(cts.parent.glob("*plan.csv*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "size"}, "unknown preset 'size'; choose one of size-curve"),
        ({"number": 0}, "a number of at least 1"),
        ({"prevalence": 0.0}, "a prevalence above 0"),
        ({"preset": "counterfactual", "subtype": "solid"}, "counterfactual has all subtypes; leave out subtype"),
        ({"preset": "growth", "subtype": "part-solid"}, "a core would lie elsewhere"),
        ({"preset": "growth", "days": (0, 0)}, "two days or more"),
        ({"preset": "growth", "doubling_days": 0}, "a doubling time above 0"),
        ({"preset": "growth", "days": (0, 700)}, "which growth makes 6 to 49"),
        ({"preset": "twins", "diameters": (6, 21)}, "which twins makes 6 to 31.5"),
        ({"diameters": (9, 8)}, "choose the less first"),
    ],
)
def test_a_wrong_cohort_says_what_it_may_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Cohort(**({"preset": "size-curve"} | fields))


def test_unequal_numbers_and_lobes_that_nothing_tells_are_refused_before_a_ct_is_read(cts, lobes, monkeypatch):
    monkeypatch.setattr(planning, "read_ct", None)
    with pytest.raises(ValueError, match=r"2 nodule\(s\) in each of 2 CT\(s\) cannot be shared equally by 5"):
        planned(cts, Cohort("lobe-equalised", number=2), lobes)
    with pytest.raises(ValueError, match="a lobe is asked for, and nothing here tells lobes"):
        planned(cts, Cohort("lobe-equalised", number=5))
    (cts.parent / "plan.csv").touch()
    with pytest.raises(ValueError, match=r"plan\.csv: exists already"):
        planned(cts, Cohort("size-curve"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ct,subtype\n,solid\n", "give each row a CT's name"),
        ("ct,case\na,../b\n", "a case that is a folder's"),
        ("ct,case\na,x\nb,x\n", "case 'x' is of two CTs"),
        ("ct,subtype\na,solid\na,negative\n", "or negative and not"),
        ("ct,case\na,x\na,x/y\n", "within another's result"),
        ("ct,subtype\na,fluffy\n", "row 2: unknown subtype 'fluffy'"),
        ("ct,colour\na,red\n", "unknown column"),
    ],
)
def test_a_plan_for_cases_that_is_wrong_says_so(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / "p.csv")


def test_a_plan_without_a_ct_is_for_every_ct_and_one_with_it_for_a_batch_only(tmp_path):
    (tmp_path / "p.csv").write_text("subtype,diameter_mm\nsolid,9\n")
    assert read_cases(tmp_path / "p.csv", 3) == [Wish("solid", 9.0, seed=3)]
    (tmp_path / "p.csv").write_text("ct,subtype,seed\na,solid,4\na,ground-glass,5\nb,negative,\n")
    assert read_cases(tmp_path / "p.csv") == {
        "a": Case("a", (Wish("solid", seed=4), Wish("ground-glass", seed=5))),
        "b": Case("b"),
    }
    with pytest.raises(ValueError, match="unknown column"):
        read_plan(tmp_path / "p.csv")


# -- what a batch makes of it ------------------------------------------------------------------------------------------


def test_a_batch_makes_a_plan_and_its_summary_can_be_trained_on(call, cts, tmp_path):
    of = ("--preset", "size-curve", "--number", 2, "--prevalence", 0.5, "--diameters", 8, 14)
    made = ("plan", cts, tmp_path / "plan.csv", *of)
    status, out, _ = call(*made)
    assert status == 0 and out.strip().endswith("2 nodule(s) in 1 result(s), 1 negative CT(s)")
    assert call(*made)[0] == 2  # there already
    batch = ("batch", cts, tmp_path / "out", "--plan", tmp_path / "plan.csv", "--retries", 0)
    status, out, _ = call(*batch)
    cases = read_cases(tmp_path / "plan.csv")
    negative = next(name for name, case in cases.items() if not case.wishes)
    assert status == 0 and sorted(out.split()) == sorted(["a:", "b:", "done", "negative"])
    frame = load_manifest(tmp_path / "out" / MANIFEST)
    wishes = [(f"{name}-{k}", w) for name, case in cases.items() for k, w in enumerate(case.wishes, start=1)]
    assert list(frame.nodule_id) == [name for name, _ in wishes] and list(frame.seed) == [w.seed for _, w in wishes]
    for row, (_, wish) in zip(frame.itertuples(), wishes, strict=True):
        image, before, mask = (np.asarray(nib.load(f).dataobj) for f in (row.image, row.background, row.mask))
        assert (image != before)[mask > 0].mean() > 0.95 and row.diameter_mm == pytest.approx(wish.diameter_mm, abs=0.1)
        affine = nib.load(row.mask).affine
        middle = affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]
        assert np.linalg.norm(middle - [row.x_mm, row.y_mm, row.z_mm]) < wish.diameter_mm
    with (tmp_path / "out" / SCANS).open() as file:
        scans = {row["case"]: row for row in csv.DictReader(file)}
    assert {n: int(row["nodules"]) for n, row in scans.items()} == {n: 0 if n == negative else 2 for n in "ab"}
    assert (tmp_path / "out" / scans[negative]["image"]).resolve() == cts / f"{negative}.nii.gz"
    assert not (tmp_path / "out" / negative).exists()
    said = json.loads(call(*batch, "--json")[1])
    assert said["results"] == {n: "negative" if n == negative else "there already" for n in "ab"}
    (cts / f"{negative}.nii.gz").unlink()
    status, _, error = call(*batch)
    assert status == 2 and f"no CT named {negative} there, which the plan has" in error
