"""Wishes: what may be asked for, from arguments and from a CSV, all wrong rows named at once."""

import json
from typing import get_args

import numpy as np
import pytest

from hrldm.command_line import as_options
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.insertion.plans import read_plan
from hrldm.insertion.wish import LIMITS, Base, Lobe, Location, Wish, copies, own_seed, read_histogram
from hrldm.nodules.pleura import BASES
from hrldm.nodules.positions import LOCATIONS
from tests.insertion.chests import drawn

FLAT = "1 " * 40  # a histogram


@pytest.fixture
def plan(tmp_path):
    """A function that reads the text of a CSV as a plan."""

    def _plan(text, seed=0):
        (tmp_path / "plan.csv").write_text(text)
        return read_plan(tmp_path / "plan.csv", seed)

    return _plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subtype": "semi-solid"}, "unknown subtype 'semi-solid'; choose one of solid"),
        ({"subtype": None}, "unknown subtype None"),
        ({"diameter_mm": 45}, "diameter 45 mm: nodules have 3 to 30 mm"),
        ({"diameter_mm": float("nan")}, "diameter nan"),
        ({"diameter_mm": "ten"}, "diameter_mm 'ten': give a number"),
        ({"lobe": "lingula"}, "unknown lobe 'lingula'; choose one of LUL"),
        ({"location": "hilar"}, "unknown location 'hilar'"),
        ({"at": (1.0, 2.0)}, "three numbers"),
        ({"at": "here"}, "at 'here': give three numbers x,y,z in RAS mm"),
        ({"at": 3}, "three numbers"),
        ({"at": (1.0, 2.0, 3.0), "location": "subpleural"}, "a place is given; leave out location"),
        ({"spiculation": 9}, "rating 1"),
        ({"histogram": "no/such.txt"}, "no/such.txt: not a histogram"),
        ({"seed": -1}, "seed -1: give a whole number, 0 or more"),
        ({"seed": 1.5}, "whole number"),
        ({"subtype": "part-solid", "diameter_mm": 8.0, "core_mm": 8.0}, "below the nodule's own diameter"),
        ({"core_mm": 4.0}, "solid core of 4 mm: part-solid nodules have one"),
        ({"subtype": "part-solid", "core_mm": 1.0}, "at least 2 mm .or 0, for none"),
        ({"base": "stalk"}, "unknown base 'stalk'; choose one of narrow, broad"),
        ({"base": "broad"}, "a broad base: nodules at the pleura have one; give location=subpleural"),
        ({"base": "narrow", "at": (0, 0, 0)}, "a place is given; leave out base$"),
        ({"base": "broad", "location": "subpleural", "at": (0, 0, 0)}, "a place is given; leave out location, base$"),
        ({"mask": "own.nii.gz", "base": "broad"}, "says its shape and place; leave out base$"),
        ({"mean_hu": -1001}, "mean_hu -1001: give -965 to 365"),
        ({"mean_hu": 390}, "mean_hu 390: give -965 to 365"),
        ({"mean_hu": "dark"}, "mean_hu 'dark': give a number"),
        ({"sd_hu": 9.0}, "sd_hu 9: give 35 to 400"),
        ({"mean_hu": -950, "sd_hu": 400}, "SD 400 HU at mean -950 HU: it can be 35 to 207 HU there"),
        ({"histogram": np.eye(40)[1], "sd_hu": 390}, "SD 390 HU at mean -947.5 HU: it can be 35 to"),
        ({"subtype": "part-solid", "mean_hu": -700, "core_mm": 8}, "a core of 8 mm in a nodule of 10 mm: .* mean -700 HU with 51% of it above -300 HU: it can be -607 to 23"),
        ({"subtype": "part-solid", "mean_hu": -400, "sd_hu": 60, "core_mm": 6}, "a core of 6 mm .* SD 60 HU at mean -400 HU .* it can be"),
        ({"subtype": "part-solid", "histogram": np.eye(40)[3], "core_mm": 6}, "a core of 6 mm .*the histogram has nothing above -300 HU"),
        ({"sd_hu": float("nan")}, "sd_hu nan: give 35 to 400"),
        ({"histogram": 3}, "histogram 3: give a file's path, or numbers"),
        ({"histogram": [1, 2, 3]}, "histogram: 3 numbers; a histogram has 40"),
        ({"histogram": [-1.0] * 40}, "histogram: negative or not finite: number 1, 2, 3, 4, 5 and 35 more; a histogram has 40"),
        ({"histogram": [1.0] * 38 + [-1.0, float("nan")]}, "histogram: negative or not finite: number 39, 40; a histogram"),
        ({"mask": 3}, "a file's path"),
        ({"mask": "absent.nii.gz"}, "no such file"),
        ({"mask": "own.nii.gz", "at": (0, 0, 0)}, "says its shape and place; leave out at$"),
        ({"mask": "own.nii.gz", "diameter_mm": 25, "lobe": "RUL"}, "says its shape and place; leave out diameter, lobe$"),
        ({"mask": "own.nii.gz", "location": "subpleural"}, "says its shape and place; leave out location$"),
        ({"mask": "own.nii.gz", "subtype": "part-solid", "core_mm": 3}, "says its shape and place; leave out core$"),
        ({"mask": "own.nii.gz"}, "marks a solid core .2.; ask for part-solid, not solid"),
        ({"mask": "own.nii.gz", "subtype": "ground-glass"}, "marks a solid core .2.; ask for part-solid, not ground-glass"),
    ],
)  # fmt: skip
def test_wrong_wishes_say_what_may_be_asked(tmp_path, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    drawn("own.nii.gz", (0, 0, 0), 9.0, core=5.0)
    with pytest.raises(ValueError, match=message):
        Wish(**wrong)


def test_moments_at_the_limits_can_be_had():
    for mean in LIMITS["mean_hu"]:
        assert Wish(mean_hu=mean) and Wish("part-solid", mean_hu=mean, sd_hu=60)
    assert Wish(mean_hu=-300, sd_hu=LIMITS["sd_hu"][0]) and Wish(mean_hu=-300, sd_hu=LIMITS["sd_hu"][1])


def test_the_command_line_names_the_option_that_a_base_needs():
    with pytest.raises(ValueError, match="location=subpleural") as error:
        Wish(base="broad")
    assert "give --location subpleural, too" in as_options(str(error.value))


def test_a_core_is_asked_for_by_its_size_or_drawn(tmp_path):
    with_core = drawn(tmp_path / "cored.nii.gz", (0, 0, 0), 9.0, core=5.0)
    assert Wish("part-solid", core_mm=5).cored and Wish("part-solid", mask=with_core).cored
    assert not Wish("part-solid").cored and not Wish("part-solid", core_mm=0).cored
    plain = drawn(tmp_path / "plain.nii.gz", (0, 0, 0), 9.0)
    assert not Wish("part-solid", mask=plain).cored and Wish("part-solid", mask=plain, core_mm=0).core_mm == 0


def test_the_names_on_the_command_line_are_the_librarys():
    assert get_args(Lobe) == tuple(LOBE_NAMES.values()) and get_args(Location) == LOCATIONS
    assert get_args(Base) == tuple(BASES)


def test_histogram_files(tmp_path):
    file = tmp_path / "h.txt"
    file.write_text("\ufeff" + "\n".join(["0"] * 20 + ["2.5"] * 20), encoding="utf-8")  # as some editors save
    np.testing.assert_allclose(read_histogram(file), np.repeat([0, 0.05], 20))
    for text, message in (("1 2 3", "3 numbers"), ("-1 " * 40, "not negative"), ("x " * 40, "could not convert"), ("0 " * 40, "the numbers sum to 0; a")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_histogram(file)


def test_a_histogram_may_be_numbers_and_a_wish_holds_them():
    shares = np.arange(40.0)
    wish = Wish(histogram=shares)
    assert wish == Wish(histogram=list(range(40))) and wish.histogram == tuple(shares)
    np.testing.assert_allclose(read_histogram(wish.histogram), shares / shares.sum())


def test_plan_rows_become_wishes_and_blanks_are_defaults(plan):
    assert plan("subtype,diameter_mm,lobe,at,seed\npart-solid,12.5,RUL,,3\n,,,-40 10 100,\n") == [
        Wish("part-solid", 12.5, "RUL", seed=3),
        Wish(at=(-40.0, 10.0, 100.0), seed=own_seed(0, 1)),
    ]


def test_files_of_a_plan_lie_beside_it(plan, tmp_path):
    (tmp_path / "h.txt").write_text(FLAT)
    assert plan("histogram,seed\nh.txt,4\n") == [Wish(histogram=str(tmp_path / "h.txt"), seed=4)]


def test_rows_that_are_alike_are_told(plan, caplog):
    assert len(plan("subtype,seed\nsolid,41\nsolid,42\n")) == 2 and not caplog.records
    assert len(plan("subtype,seed\nsolid,42\nsolid,42\n")) == 2 and "rows that are alike" in caplog.text


def test_rows_without_a_seed_have_seeds_of_their_own_as_copies_have(plan):
    three = "subtype\nsolid\nsolid\nsolid\n"
    assert plan(three, 5) == copies(Wish(seed=5), 3) and len({w.seed for w in plan(three)}) == 3


def test_all_wrong_rows_are_named_at_once(plan):
    with pytest.raises(ValueError, match=r"4 problem\(s\)") as error:
        plan("subtype,diameter_mm\nsolid,10\nsolid,99\nfluffy,8\nsolid\nsolid,big\n")
    for said in ("row 3: diameter 99", "row 4: unknown subtype", "row 5: 1 fields where the header has 2", "row 6: diameter_mm 'big': give a number"):  # fmt: skip
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size\n10\n", r"unknown column\(s\) size; known are subtype, diameter_mm"),
        ("subtype\n", "no rows"),
        ("subtype\n\n,,\n", "no rows"),
        ("subtype,seed,seed\nsolid,1,2\n", "'seed' stands 2 times"),
        ("subtype;seed\nsolid;1\n", "separate columns by commas"),
        ("subtype,seed\n\nsolid,x\n", "row 3: seed 'x': give a whole number"),
    ],
)
def test_wrong_plans_are_named(plan, text, message):
    with pytest.raises(ValueError, match=message):
        plan(text)


def test_what_spreadsheets_and_pandas_leave_in_a_plan_changes_nothing(tmp_path):
    file = tmp_path / "plan.csv"
    file.write_bytes("\ufeffsubtype, diameter_mm ,seed,\r\nsolid,9,3.0,\r\n,,,\r\n\r\nsolid,NaN,,\r\n,,,\r\n".encode())
    assert read_plan(file) == [Wish(diameter_mm=9.0, seed=3), Wish(seed=own_seed(0, 1))]


def test_numpy_and_paths_in_a_wish_are_what_a_record_can_hold(tmp_path):
    (tmp_path / "h.txt").write_text(FLAT)
    wish = Wish(diameter_mm=np.int64(12), at=np.array([1, 2, 3.5]), histogram=tmp_path / "h.txt", seed=np.int64(4))
    plain = Wish(diameter_mm=12.0, at=(1.0, 2.0, 3.5), histogram=str(tmp_path / "h.txt"), seed=4)
    assert wish == plain and json.loads(json.dumps(wish.given())) == json.loads(json.dumps(plain.given()))


def test_copies_have_seeds_of_their_own_and_two_seeds_share_none():
    seeds = [[w.seed for w in copies(Wish(seed=s), 300)] for s in (5, 6)]
    assert [run[0] for run in seeds] == [5, 6] and len({*seeds[0], *seeds[1]}) == 600
    assert seeds[0][:3] == [w.seed for w in copies(Wish(seed=5), 3)]  # more of them leave the first as they are
    assert max(seeds[0]) < 2**53  # whole numbers in every reader of JSON
    with pytest.raises(ValueError, match="one place"):
        copies(Wish(at=(0, 0, 0)), 2)
    for count in (0, 10**9):
        with pytest.raises(ValueError, match="at least 1 and at most 10000"):
            copies(Wish(), count)


def test_a_record_is_a_plan(tmp_path):
    wishes = [
        Wish("part-solid", 14.0, core_mm=6.0, seed=3),
        Wish("solid", 9.0, at=(1.0, 2.0, 3.5)),
        Wish("part-solid", 9.0, location="subpleural", base="broad", core_mm=0, histogram=np.arange(40)),
        Wish("ground-glass", mean_hu=-600, sd_hu=np.float32(90)),
    ]
    text = json.dumps({"nodules": [{"wish": w.given()} for w in wishes]})
    (tmp_path / "record.json").write_text(text, encoding="utf-8-sig")  # as some editors save
    assert read_plan(tmp_path / "record.json") == wishes


def test_what_earlier_versions_recorded_but_ignored_is_ignored(tmp_path):
    mask = str(drawn(tmp_path / "own.nii.gz", (0, 0, 0), 9.0))
    old = [{"mask": mask, "diameter_mm": 12.0, "location": "subpleural"}, {"at": [1, 2, 3], "location": "subpleural"}]
    (tmp_path / "record.json").write_text(json.dumps({"nodules": [{"wish": wish} for wish in old]}))
    assert read_plan(tmp_path / "record.json") == [Wish(mask=mask), Wish(at=(1, 2, 3))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the record of an insertion"),
        ("[]", "not the record of an insertion"),
        ('{"nodules": [{"wish": {"size": 3}}]}', "not the record of an insertion .*no wish has size"),
        ('{"nodules": [3]}', "not the record of an insertion"),
        ('{"nodules": [{"wish": {}}, {"wish": {"mask": "gone.nii.gz"}}]}', "nodule 2: gone.nii.gz: no such file"),
    ],
)
def test_a_json_that_is_no_record_is_named(tmp_path, text, message):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=f"wrong.json: {message}"):
        read_plan(tmp_path / "wrong.json")


@pytest.mark.parametrize(("name", "said"), [("absent.csv", "no such file"), ("absent.json", "not the record")])
def test_a_plan_that_is_not_there_is_named(tmp_path, name, said):
    with pytest.raises(ValueError, match=f"{name}: {said}"):
        read_plan(tmp_path / name)
