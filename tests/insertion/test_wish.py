"""Wishes: what may be asked for, from arguments and from a CSV, all wrong rows named at once."""

import dataclasses
import json

import numpy as np
import pytest

from hrldm.insertion.wish import Wish, copies, own_seed, read_histogram, read_plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subtype": "semi-solid"}, "unknown subtype 'semi-solid'; choose one of solid"),
        ({"diameter_mm": 45}, "diameter 45 mm: nodules have 6 to 30 mm"),
        ({"diameter_mm": float("nan")}, "diameter nan"),
        ({"lobe": "lingula"}, "unknown lobe 'lingula'; choose one of LUL"),
        ({"location": "hilar"}, "unknown location 'hilar'"),
        ({"at": (1.0, 2.0)}, "three numbers"),
        ({"at": (1.0, 2.0, 3.0), "location": "subpleural"}, "a place is given; leave out location"),
        ({"spiculation": 9}, "rating 1"),
        ({"histogram": "no/such.txt"}, "no/such.txt: not a histogram"),
    ],
)
def test_wrong_wishes_say_what_may_be_asked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Wish(**wrong)


def test_histogram_files(tmp_path):
    file = tmp_path / "h.txt"
    file.write_text("\n".join(["0"] * 20 + ["2.5"] * 20))
    np.testing.assert_allclose(read_histogram(file), np.repeat([0, 0.05], 20))
    for text, message in (("1 2 3", "3 numbers"), ("-1 " * 40, "not negative"), ("x " * 40, "could not convert"), ("0 " * 40, "40 numbers")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_histogram(file)


def test_plan_rows_become_wishes_and_blanks_are_defaults(tmp_path):
    file = tmp_path / "plan.csv"
    file.write_text("subtype,diameter_mm,lobe,at,seed\npart-solid,12.5,RUL,,3\n,,,-40 10 100,\n")
    assert read_plan(file) == [
        Wish("part-solid", 12.5, "RUL", seed=3),
        Wish(at=(-40.0, 10.0, 100.0), seed=own_seed(0, 1)),
    ]


def test_files_of_a_plan_lie_beside_it_and_rows_that_are_alike_are_told(tmp_path, caplog):
    (tmp_path / "study").mkdir()
    file = tmp_path / "study" / "plan.csv"
    (tmp_path / "study" / "h.txt").write_text("1 " * 40)
    file.write_text("histogram,seed\nh.txt,4\n")
    assert read_plan(file) == [Wish(histogram=str(tmp_path / "study" / "h.txt"), seed=4)]
    assert not caplog.records
    file.write_text("subtype,seed\nsolid,42\nsolid,42\n")
    assert len(read_plan(file)) == 2 and "rows that are alike" in caplog.text


def test_rows_without_a_seed_have_seeds_of_their_own_as_copies_have(tmp_path):
    file = tmp_path / "plan.csv"
    file.write_text("subtype\nsolid\nsolid\nsolid\n")
    assert read_plan(file, 5) == copies(Wish(seed=5), 3) and len({w.seed for w in read_plan(file)}) == 3


def test_all_wrong_rows_are_named_at_once(tmp_path):
    file = tmp_path / "plan.csv"
    file.write_text("subtype,diameter_mm\nsolid,10\nsolid,99\nfluffy,8\nsolid\nsolid,big\n")
    with pytest.raises(ValueError, match=r"4 problem\(s\)") as error:
        read_plan(file)
    text = str(error.value)
    assert (
        "row 3: diameter 99" in text
        and "row 4: unknown subtype" in text
        and "row 5: 1 fields where the header has 2" in text
    )
    assert "row 6: diameter_mm 'big' is not a number" in text
    cases = (
        ("size\n10\n", "unknown column.*size"), ("subtype\n", "no rows"), ("subtype\n\n,,\n", "no rows"),
        ("subtype,seed,seed\nsolid,1,2\n", "'seed' stands 2 times"), ("subtype;seed\nsolid;1\n", "separate columns by commas"),
        ("subtype,seed\n\nsolid,x\n", "row 3: seed 'x' is not a number"),
    )  # fmt: skip
    for content, message in cases:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_plan(file)
    with pytest.raises(ValueError, match="absent.csv: no such file"):
        read_plan(tmp_path / "absent.csv")


def test_what_spreadsheets_and_pandas_leave_in_a_plan_changes_nothing(tmp_path):
    file = tmp_path / "plan.csv"
    file.write_bytes("\ufeffsubtype, diameter_mm ,seed,\r\nsolid,9,3.0,\r\n,,,\r\n\r\nsolid,NaN,,\r\n,,,\r\n".encode())
    assert read_plan(file) == [Wish(diameter_mm=9.0, seed=3), Wish(seed=own_seed(0, 1))]
    (tmp_path / "h.txt").write_text("\ufeff" + "1 " * 40, encoding="utf-8")
    np.testing.assert_allclose(read_histogram(tmp_path / "h.txt"), 1 / 40)


def test_numpy_and_paths_in_a_wish_are_what_a_record_can_hold(tmp_path):
    (tmp_path / "h.txt").write_text("1 " * 40)
    wish = Wish(diameter_mm=np.int64(12), at=np.array([1, 2, 3.5]), histogram=tmp_path / "h.txt", seed=np.int64(4))
    plain = Wish(diameter_mm=12.0, at=(1.0, 2.0, 3.5), histogram=str(tmp_path / "h.txt"), seed=4)
    assert wish == plain and json.loads(json.dumps(wish.given())) == json.loads(json.dumps(plain.given()))
    for wrong, said in (({"seed": 1.5}, "whole number"), ({"diameter_mm": "ten"}, "a number"), ({"at": 3}, "three numbers"), ({"mask": 3}, "path")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Wish(**wrong)


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


def test_a_record_is_a_plan_and_anything_else_is_named(tmp_path):
    wishes = [Wish("part-solid", 14.0, core_mm=6.0, seed=3), Wish("solid", 9.0, at=(1.0, 2.0, 3.5))]
    nodules = [{"wish": {k: v for k, v in dataclasses.asdict(w).items() if v is not None}} for w in wishes]
    (tmp_path / "record.json").write_text(
        json.dumps({"nodules": nodules}), encoding="utf-8-sig"
    )  # as some editors save
    assert read_plan(tmp_path / "record.json") == wishes
    for text in ("{", "[]", '{"nodules": [{"wish": {"size": 3}}]}', '{"nodules": [3]}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong.json: not the record of an insertion"):
            read_plan(tmp_path / "wrong.json")
    (tmp_path / "moved.json").write_text('{"nodules": [{"wish": {}}, {"wish": {"mask": "gone.nii.gz"}}]}')
    with pytest.raises(ValueError, match="moved.json: nodule 2: gone.nii.gz: no such file"):
        read_plan(tmp_path / "moved.json")
    with pytest.raises(ValueError, match="absent.json: not the record"):
        read_plan(tmp_path / "absent.json")
