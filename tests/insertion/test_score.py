"""The score of a detector: known answers, LUNA16's rules by brute force, the formats, and a matched filter on a real CT."""

import json
import logging
import os
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from scipy import ndimage
from scipy.stats import norm

from hrldm.ct.geometry import resample, sample, to_world
from hrldm.ct.volume import read_ct
from hrldm.insertion.batch import insert_folder
from hrldm.insertion.files import insert_file
from hrldm.insertion.wish import Wish
from hrldm.scoring.froc import DRAWS, FACTORS, RATES, Curve, judge, sensitivity
from hrldm.scoring.predictions import read_predictions, read_scans
from hrldm.scoring.score import WRITTEN, score
from tests import tiny
from tests.insertion.chests import places

AFFINE, SHAPE = np.diag([-2.0, 2.0, 2.0, 1.0]), (100, 100, 100)
AFFINE[:3, 3] = 250, 10, -100  # x from 52 to 250, y from 10 to 208, z from -100 to 98: no side is its own mirror image
AT = np.array([[100.0, 60.0, 0.0], [200.0, 60.0, 0.0], [100.0, 160.0, 0.0], [200.0, 160.0, 50.0]])
FAR = [150.0, 110.0, -50.0]  # from every one of them


def nodule(at, subtype="solid", diameter=10.0, lobe="RUL", location="inner", **more) -> dict:
    wish = {"subtype": subtype, "location": location} | more.pop("wish", {})
    return {"wish": wish, "centre_ras_mm": list(at), "diameter_mm": diameter, "lobe": lobe} | more


def record(folder, nodules, source="ct.nii.gz"):
    folder.mkdir(parents=True)
    about = {"name": source, "shape": SHAPE, "affine": AFFINE.tolist()}
    (folder / "record.json").write_text(json.dumps({"source": about, "nodules": nodules}))
    return folder


def csv(path, rows, columns=("scan", "x", "y", "z", "score")):
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


@pytest.fixture
def two(tmp_path):
    """Two scans, a and b, with four nodules each: solid, ground-glass, solid, ground-glass."""
    for name in "ab":
        record(
            tmp_path / "out" / name, [nodule(at, s) for at, s in zip(AT, ("solid", "ground-glass") * 2, strict=True)]
        )
    return tmp_path / "out"


def scored(records, rows, coordinates="ras", **options):
    """Tables by name, and what was said."""
    out = records.parent / "score"
    predictions = rows if isinstance(rows, os.PathLike) else csv(records.parent / "predictions.csv", rows)
    said = score(records, predictions, out, coordinates, overwrite=True, **options)
    assert {f.name for f in out.iterdir()} == WRITTEN and plt.imread(out / "froc.png").std() > 0
    return {name: pd.read_csv(out / f"{name}.csv") for name in ("froc", "sensitivity", "hits")}, said


# -- known answers -----------------------------------------------------------------------------------------------------


def test_a_perfect_detector_finds_all_at_every_rate(two):
    tables, said = scored(two, [(name, *at, 0.9) for name in "ab" for at in AT])
    assert tables["froc"]["rate"].tolist() == ["0.125", "0.25", "0.5", "1", "2", "4", "8", "mean"]
    assert (tables["froc"][["sensitivity", "ci_low", "ci_high"]] == 1).all(axis=None)
    assert tables["hits"]["found"].all() and (tables["hits"]["score"] == 0.9).all()
    assert "CPM 1.000 (1.000 to 1.000)" in said and "8 nodules in 2 scan(s)" in said


def test_a_detector_blind_to_ground_glass(two):
    tables, _ = scored(two, [(name, *at, 0.9) for name in "ab" for at in AT[::2]])
    found = tables["sensitivity"].set_index(FACTORS)
    seen, blind = (found.loc[(subtype, "all", "all", "all")] for subtype in ("solid", "ground-glass"))
    share = norm.ppf(0.975) ** 2 / (4 + norm.ppf(0.975) ** 2)  # Wilson's other limit of 0 or 4 of 4
    np.testing.assert_allclose(seen[["n", "found", "sensitivity", "ci_low", "ci_high"]], [4, 4, 1, 1 - share, 1])
    np.testing.assert_allclose(
        blind[["n", "found", "sensitivity", "ci_low", "ci_high"]], [4, 0, 0, 0, share], atol=1e-15
    )
    assert found.loc[("ground-glass", "10 to 20 mm", "RUL", "none"), "n"] == 4
    assert (tables["froc"]["sensitivity"] == 0.5).all()


def test_further_hits_of_a_nodule_count_neither_way_and_the_edge_is_no_hit(two):
    rows = [("a", *(AT[0] + shift), s) for shift, s in (([0, 0, 0], 0.3), ([4.9, 0, 0], 0.8), ([0, 5.0, 0], 0.7))]
    tables, said = scored(two, rows, threshold=0.75)
    assert tables["hits"]["score"].dropna().tolist() == [0.8] and tables["hits"]["found"].sum() == 1
    assert "3 predictions, 1 of them on no inserted nodule" in said and "0 false positives a scan" in said


def test_equal_scores_are_one_threshold(two):
    rows = [("a", *AT[0], 0.5), ("b", *AT[0], 0.5)] + [
        ("a", *FAR, 0.5)
    ] * 4  # 2 of 8 nodules at 2 false positives a scan
    tables, _ = scored(two, rows)
    wanted = 0.25 * np.minimum(np.array(RATES) / 2, 1)
    np.testing.assert_allclose(tables["froc"]["sensitivity"], [*wanted, wanted.mean()], rtol=1e-12)
    assert not tables["hits"]["found"].any()  # no threshold has one false positive a scan or fewer


def test_no_predictions_find_nothing(two):
    tables, said = scored(two, [])
    assert (tables["froc"][["sensitivity", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert not tables["hits"]["found"].any() and tables["hits"]["score"].isna().all() and "0 predictions" in said


def test_scores_by_chance_find_the_share_of_the_rate():
    rng, n, most = np.random.default_rng(0), 4000, 10
    nodules = pd.DataFrame({"scan": np.arange(n) % 100, "score": rng.random(n)})
    wrong = pd.DataFrame({"scan": np.arange(100 * most) % 100, "score": rng.random(100 * most)})
    table = Curve(nodules, wrong, 100).table()
    wanted = np.array(RATES) / most
    wanted = np.r_[wanted, wanted.mean()]
    assert np.abs(table["sensitivity"] - wanted).max() < 0.03
    assert ((table["ci_low"] < wanted) & (wanted < table["ci_high"])).all()


def test_intervals_come_from_scans_not_from_nodules(two):
    tables, _ = scored(
        two, [("a", *at, 0.9) for at in AT]
    )  # a half of the scans: 0, ½ or 1 in a quarter, half, quarter
    assert tables["froc"][["sensitivity", "ci_low", "ci_high"]].drop_duplicates().to_numpy().tolist() == [[0.5, 0, 1]]
    record(two.parent / "one" / "a", [nodule(AT[0])])
    tables, _ = scored(two.parent / "one", [("a", *AT[0], 0.9)])
    assert (tables["froc"]["sensitivity"] == 1).all() and tables["froc"][["ci_low", "ci_high"]].isna().all(axis=None)
    chance = np.random.default_rng(1).random(30) < 0.5
    nodules = pd.DataFrame({"scan": np.arange(30), "score": np.where(chance, 1.0, -np.inf)})
    low, high = Curve(nodules, nodules[:0], 30).table().loc[0, ["ci_low", "ci_high"]]
    p = chance.mean()  # of a scan each, so close to the normal's
    np.testing.assert_allclose([low, high], p + np.array([-1.96, 1.96]) * np.sqrt(p * (1 - p) / 30), atol=0.04)
    assert DRAWS == 1000


# -- LUNA16's rules, by brute force ------------------------------------------------------------------------------------


def brute_force(nodules, predictions, n_scans):
    """Sensitivity at `RATES`: at every threshold all is counted anew, and straight lines are drawn between."""
    points = [(0.0, 0.0)]
    for threshold in sorted({p[4] for p in predictions}, reverse=True):
        kept = [p for p in predictions if p[4] >= threshold]

        def hits(p, nodule):
            return p[0] == nodule[0] and sum((a - b) ** 2 for a, b in zip(p[1:4], nodule[1:4], strict=True)) < nodule[4] ** 2 / 4  # fmt: skip

        found = sum(any(hits(p, nodule) for p in kept) for nodule in nodules)
        wrong = sum(not any(hits(p, nodule) for nodule in nodules) for p in kept)
        points.append((wrong / n_scans, found / len(nodules)))
    out = []
    for rate in RATES:
        left = max(k for k, (x, _) in enumerate(points) if x <= rate)
        (x0, y0), (x1, y1) = points[left], points[min(left + 1, len(points) - 1)]
        out.append(y0 if left + 1 == len(points) else y0 + (y1 - y0) * (rate - x0) / (x1 - x0))
    return [*out, sum(out) / len(out)]


few = st.integers(0, 3)
place = st.tuples(few, st.integers(0, 6), st.integers(0, 6), st.just(0))  # scan, x, y, z


@given(
    st.lists(st.tuples(place, st.integers(1, 6)), min_size=1, max_size=6),
    st.lists(st.tuples(place, few), max_size=25),
    st.integers(4, 6),
)
@settings(max_examples=150, deadline=None)
def test_the_curve_is_that_of_counting_at_every_threshold(nodules, predictions, n_scans):
    nodules, predictions = ([(*where, size) for where, size in some] for some in (nodules, predictions))
    truth = pd.DataFrame(nodules, columns=["scan", "x", "y", "z", "diameter_mm"])
    said = pd.DataFrame(predictions, columns=["scan", "x", "y", "z", "score"], dtype=float)
    truth["score"], alone = judge(truth, said, truth["diameter_mm"] / 2)
    curve = Curve(truth, said[alone], n_scans)
    table = np.interp(RATES, *curve.points())
    np.testing.assert_allclose([*table, table.mean()], brute_force(nodules, predictions, n_scans), atol=1e-12)
    most = curve.operating_point(1.0)
    assert (said["score"][alone] >= most).sum() <= n_scans
    lower = [s for s in [*truth["score"], *said["score"][alone]] if -np.inf < s < most]
    assert not lower or (said["score"][alone] >= max(lower)).sum() > n_scans


def test_groups_and_their_crossings_add_up():
    rng = np.random.default_rng(0)
    nodules = pd.DataFrame({name: rng.choice(list("pqr"), 200) for name in FACTORS}).assign(found=rng.random(200) < 0.6)
    table = sensitivity(nodules)
    split = (table[FACTORS] != "all").to_numpy()
    for pattern in np.unique(split, axis=0):
        part = table[(split == pattern).all(axis=1)]
        assert part["n"].sum() == 200 and part["found"].sum() == nodules["found"].sum()
    row = table[(table["subtype"] == "p") & (table["lobe"] == "q") & (split.sum(axis=1) == 2)].iloc[0]
    wanted = nodules.query("subtype == 'p' and lobe == 'q'")["found"]
    assert (row["n"], row["found"]) == (len(wanted), wanted.sum())
    assert row["ci_low"] < row["sensitivity"] < row["ci_high"]


# -- scans before insertion, and negatives -----------------------------------------------------------------------------


def test_what_was_there_before_is_left_out_and_counted(two):
    new, own = [60.0, 20.0, 0.0], [FAR[0] + 4.9, *FAR[1:]]
    rows = [("a", *AT[0], 0.5), ("a", *FAR, 0.9), ("a", *new, 0.8), ("b", *FAR, 0.9)]
    before = csv(two.parent / "before.csv", [("a", *own, 0.1), ("a", *AT[1], 0.4)])
    tables, said = scored(two, rows, before=before)
    assert "4 predictions, 3 of them on no inserted nodule" in said and "1 of these were there before insertion" in said
    froc = tables["froc"].set_index(["false_positives", "rate"])["sensitivity"]
    assert froc["all", "1"] == 0 and froc["all", "2"] == froc["new", "1"] == froc["new", "8"] == 1 / 8
    assert froc["new", "0.5"] == 0  # one in two scans are a half, and then comes the hit
    hits = tables["hits"].set_index("scan")
    assert hits["found"].sum() == 0 and hits["score"].max() == 0.5  # at one false positive a scan of all
    assert hits.loc["a", "score_before"].tolist()[1] == 0.4
    assert hits["score_before"].notna().sum() == 1


def test_a_batchs_table_says_the_negatives_and_one_ct_may_be_several_scans(two, tmp_path):
    rows = [("a", "p1", "a/ct.nii.gz", 4), ("b", "p1", "b/ct.nii.gz", 4), ("healthy", "p2", "../p2.nii.gz", 0)]
    csv(two / "scans.csv", rows, ("case", "ct", "image", "nodules"))
    record(two / "left-over", [nodule(AT[0])])
    rows = [("healthy", 0, 0, 0, 0.9)] * 3 + [(name, *at, 0.8) for name in "ab" for at in AT]
    tables, said = scored(two, rows)
    assert "8 nodules in 2 scan(s), 1 negative(s)" in said
    froc = tables["froc"].set_index("rate")["sensitivity"]
    assert froc["1"] == 1 and froc["0.5"] == 0
    before = csv(tmp_path / "before.csv", [("p1", *AT[0], 0.5), ("p2", 0, 0, 0, 0.9)])
    tables, said = scored(two / "scans.csv", rows, before=before)
    assert "3 of these were there before" in said and tables["hits"]["score_before"].dropna().tolist() == [0.5, 0.5]
    manifest = csv(two / "manifest.csv", [("a-1", "a/ct.nii.gz"), ("a-2", "a/ct.nii.gz")], ("nodule_id", "image"))
    assert [scan.names for scan in read_scans(manifest)] == [("a",)]


# -- formats and coordinates -------------------------------------------------------------------------------------------


def test_ras_lps_voxels_and_luna16s_columns_say_the_same(two):
    index = to_world(np.linalg.inv(AFFINE), AT)
    given = {"ras": AT, "lps": AT * [-1, -1, 1], "voxel": index}
    read = [
        read_predictions(
            csv(two.parent / f"{name}.csv", [("b", *p, 0.25) for p in points], columns), name, read_scans(two)
        )
        for name, points in given.items()
        for columns in (("scan", "x", "y", "z", "score"), ("seriesuid", "coordX", "coordY", "coordZ", "probability"))
    ]
    for table in read:
        np.testing.assert_allclose(table[["x", "y", "z"]], AT, atol=1e-9)
        assert (table["scan"] == 1).all() and (table["score"] == 0.25).all()


@pytest.mark.parametrize(("wrong", "right"), [("ras", "lps"), ("lps", "ras")])
def test_the_wrong_side_is_an_error_that_says_which_flag(two, call, wrong, right):
    rows = [("a", *(AT[0] * ([-1, -1, 1] if right == "lps" else 1)), 0.9), ("b", 900, 900, 900, 0.1)]
    given = csv(two.parent / "p.csv", rows)
    status, _, error = call("score", two, given, "--out", two.parent / "s", "--coordinates", wrong)
    assert status == 2 and f"p.csv: --coordinates {wrong} puts every prediction outside" in error
    assert right in error.partition("they may be")[2] and not (two.parent / "s").exists()
    status, out, _ = call("score", two, given, "--out", two.parent / "s", "--coordinates", right)
    assert status == 0 and "CPM 0.1" in out


def test_a_mirrored_prediction_within_the_scan_is_a_warning(tmp_path, caplog):
    middle = np.array(SHAPE) @ AFFINE[:3, :3] / 2 + AFFINE[:3, 3]
    centred = AFFINE.copy()
    centred[:2, 3] -= middle[:2]
    at = [-40.0, 30.0, 0.0]
    about = {"name": "ct", "shape": SHAPE, "affine": centred.tolist()}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text(json.dumps({"source": about, "nodules": [nodule(at)]}))
    caplog.set_level(logging.WARNING)
    scored(tmp_path / "out", [("out", *at, 0.9)])
    assert not caplog.records
    scored(tmp_path / "out", [("out", 40, -30, 0, 0.9)])
    assert "0 nodules are hit, 1 were x and y mirrored" in caplog.text


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIL"])
def test_boxes_of_nndetection_lie_where_simpleitk_has_them(tmp_path, axes):
    """The box of a lesion as nnDetection makes it of the array that SimpleITK reads."""
    image = nib.Nifti1Image((np.linalg.norm(places(AFFINE, SHAPE) - AT[1], axis=-1) < 9).astype(np.uint8), AFFINE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    nib.save(image, tmp_path / "mask.nii.gz")
    inside = np.argwhere(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "mask.nii.gz")))
    low, high = inside.min(0) - 1.0, inside.max(0) + 1.0
    middle = ndimage.center_of_mass(np.asanyarray(image.dataobj))
    about = {"name": "ct", "shape": image.shape, "affine": image.affine.tolist()}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text(json.dumps({"source": about, "nodules": [nodule(AT[1])]}))
    box = [low[0] - 0.3, low[1], high[0] + 0.3, high[1], low[2], high[2]]
    (tmp_path / "out_boxes.json").write_text(json.dumps({"1": {"score": 0.7, "label": 0, "box": box}}))
    found = read_predictions(tmp_path / "out_boxes.json", "voxel", read_scans(tmp_path / "out"))
    np.testing.assert_allclose(found[["x", "y", "z"]], [to_world(image.affine, middle)], atol=1e-9)
    assert np.linalg.norm(found[["x", "y", "z"]].to_numpy() - AT[1]) < 1.8  # half a voxel along each axis


def test_whole_boxes_are_those_that_were_rounded_down(two):
    rng = np.random.default_rng(0)
    middle, half = rng.uniform(30, 60, (500, 3)), rng.uniform(3, 8, (500, 3))
    low, high = np.floor(middle - half)[:, ::-1].astype(int), np.floor(middle + half)[:, ::-1].astype(int)
    boxes = {k: {"score": 0.5, "box": [*a[:2].tolist(), *b[:2].tolist(), int(a[2]), int(b[2])]} for k, (a, b) in enumerate(zip(low, high, strict=True))}  # fmt: skip
    (two.parent / "boxes").mkdir()
    (two.parent / "boxes" / "a_boxes.json").write_text(json.dumps(boxes))
    (two.parent / "boxes" / "b_boxes.json").write_text("{}")
    found = read_predictions(two.parent / "boxes", "voxel", read_scans(two))
    off = to_world(np.linalg.inv(AFFINE), found[["x", "y", "z"]].to_numpy()) - middle
    assert np.abs(off.mean(0)).max() < 0.06 and np.abs(off).max() <= 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan,x,y,z\na,1,2,3\n", "needs the columns seriesuid, coordX, coordY, coordZ, probability or scan, x, y, z, score; it has scan, x, y, z"),
        ("scan,x,y,z,score\na,100,60,0,1\n\na,1,2,three,1\na,1,2,3,inf\na,1,2,3,\n", "3 problem(s)\n  row 4: place and score must be numbers"),
        ("scan,x,y,z,score\nc,100,60,0,1\n", "row 2: no record of a scan 'c', but of 'a' and 1 more; mend the name, or leave it out"),
        ("scan,x,y,z,score\na,100\n", "row 2: 2 fields where the header has 5"),
        ("", "needs the columns"),
        (None, "absent.csv: not a readable CSV"),
    ],
)  # fmt: skip
def test_wrong_predictions_are_named_by_file_and_row(two, text, message):
    given = two.parent / ("absent.csv" if text is None else "given.csv")
    if text is not None:
        given.write_text(text)
    with pytest.raises(ValueError) as error:
        score(two, given, two.parent / "new" / "s", "ras")
    assert message in str(error.value) and given.name in str(error.value)
    assert not (two.parent / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": {"score": 0.5, "box": [1, 2, 3]}}', "a_boxes.json, box 1: not a box of nnDetection (IndexError"),
        ('{"1": {"box": [1, 2, 3, 4, 5, 6]}}', "a_boxes.json, box 1: not a box of nnDetection (KeyError: 'score')"),
        ('{"1": {"score": "high", "box": [1, 2, 3, 4, 5, 6]}}', "a_boxes.json, box 1: place and score must be numbers"),
        ('{"1": {"score": NaN, "box": [1, 2, 3, 4, 5, 6]}}', "a_boxes.json, box 1: place and score must be numbers"),
        ("[1]", "a_boxes.json: not a box of nnDetection (AttributeError"),
        ("{", "a_boxes.json: not a box of nnDetection (JSONDecodeError"),
        (None, "no *_boxes.json in it"),
    ],
)
def test_wrong_boxes_are_named(two, text, message):
    (two.parent / "boxes").mkdir()
    if text is not None:
        (two.parent / "boxes" / "a_boxes.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_predictions(two.parent / "boxes", "voxel", read_scans(two))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="nnDetection's boxes are in voxels; give coordinates=voxel"):
        read_predictions(two.parent / "boxes", "ras", read_scans(two))


def test_wrong_records_are_named(two, tmp_path):
    (two / "b" / "record.json").write_text('{"nodules": [{}]}')
    with pytest.raises(ValueError, match=r"b/record.json is not the record of an insertion \(KeyError: 'source'\)"):
        read_scans(two)
    csv(two / "scans.csv", [("x", "x/ct.nii.gz", 1)], ("case", "image", "nodules"))
    with pytest.raises(ValueError, match=r"scans.csv: 1 problem\(s\)\n  row 2: .*x/record.json is not the record"):
        read_scans(two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: 1 problem.*\n  no inserted nodule"):
        read_scans(tmp_path / "empty")
    with pytest.raises(ValueError, match="absent: not a readable CSV"):
        read_scans(tmp_path / "absent")
    with pytest.raises(ValueError, match="no column image"):
        read_scans(csv(tmp_path / "other.csv", [(1,)], ("a",)))


def test_only_what_score_wrote_is_replaced_and_a_failed_write_leaves_nothing(two, tmp_path, monkeypatch):
    given, out = csv(tmp_path / "p.csv", [("a", *AT[0], 1.0)]), tmp_path / "s"
    score(two, given, out, "ras")
    with pytest.raises(ValueError, match=r"s: exists already; .*\(overwrite=True\)"):
        score(two, given, out, "ras")
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists already"):
        score(two, given, out, "ras", overwrite=True)
    (out / "notes.txt").unlink()
    before = (out / "froc.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hrldm.scoring.score._draw", full)
    with pytest.raises(OSError, match="No space"):
        score(two, given, out, "ras", overwrite=True)
    assert (out / "froc.csv").read_bytes() == before and not [f for f in os.listdir(tmp_path) if f.startswith(".")]


# -- real insertions ---------------------------------------------------------------------------------------------------


def test_what_insert_and_batch_write_is_read(nifti, tmp_path):
    wishes = [Wish("solid", 12, at=(-70, 5, 10)), Wish("ground-glass", 9, location="subpleural", base="broad"), Wish("solid", 22)]  # fmt: skip
    affine, shape = tiny.chest_grid(np.eye(3), (4.0, 4.0, 5.0))
    source = tiny.dicom_series(tmp_path / "p1", tiny.chest(affine, shape), affine)
    insert_file(source, tmp_path / "one", wishes, tiny.PaintingGenerator(), retries=0)
    (one,) = read_scans(tmp_path / "one")
    derived = pydicom.dcmread(next((tmp_path / "one" / "dicom").iterdir())).SeriesInstanceUID
    assert one.names == ("one", derived) and one.cts >= {"one", "p1"} and one.shape == shape
    assert [n["attachment"] for n in one.nodules] == ["not known", "pleura, broad", "none"]
    assert [n["size"] for n in one.nodules] == ["10 to 20 mm", "6 to 10 mm", "20 to 30 mm"]
    mask = np.asarray(nib.load(tmp_path / "one" / "mask.nii.gz").dataobj)
    for k, n in enumerate(one.nodules, start=1):  # the place of the record lies within the lesion of the file
        centre = to_world(one.affine, ndimage.center_of_mass(mask == k))
        assert np.linalg.norm(centre - [n["x"], n["y"], n["z"]]) < n["diameter_mm"] / 4
    (tmp_path / "cts" / "site").mkdir(parents=True)
    shutil.copy(nifti, tmp_path / "cts" / "site" / "p2.nii.gz")
    insert_folder(tmp_path / "cts", tmp_path / "many", [Wish()], tiny.PaintingGenerator(), retries=0)
    assert [scan.names[0] for scan in read_scans(tmp_path / "many")] == ["site/p2"]


def matched_filter(ct, lungs, most=400):
    """Places (n, 3) in RAS mm and scores: the highest maxima of differences of Gaussians inside the lungs, at 2 mm."""
    hu, affine = resample(ct.array, ct.affine, 2.0)
    lungs = sample(lungs, ct.affine, hu.shape, affine, order=0) > 0
    tissue = np.clip(hu, -950, 50)
    best = np.full(hu.shape, -np.inf, np.float32)
    for radius in (4, 6, 9, 12):  # mm; a ball's best match has this width
        sd = radius / np.sqrt(3) / 2
        np.maximum(best, ndimage.gaussian_filter(tissue, sd) - ndimage.gaussian_filter(tissue, 1.6 * sd), out=best)
    peaks = np.argwhere((best == ndimage.maximum_filter(best, 5)) & lungs)
    scores = best[tuple(peaks.T)]
    order = np.argsort(-scores)[:most]
    return to_world(affine, peaks[order]), scores[order]


def test_a_matched_filter_on_a_real_ct(shared_data, tmp_path, monkeypatch):
    """A reference detector: it finds solid nodules well above chance, and the vessels it takes for nodules were there before."""
    monkeypatch.undo()  # the shapes of real nodules, not balls
    file, lungs = (shared_data / "r01-001" / f"{name}.nii.gz" for name in ("ct", "lung"))
    wishes = [Wish(subtype, size, seed=k) for k, (subtype, size) in enumerate((("solid", 12), ("solid", 9), ("part-solid", 14), ("ground-glass", 10)))]  # fmt: skip
    insert_file(file, tmp_path / "out" / "r01", wishes, tiny.PaintingGenerator(), lungs, retries=0, format="nifti")
    labels = np.asarray(nib.load(lungs).dataobj)
    rows = {}
    for name, ct in (("before", file), ("after", tmp_path / "out" / "r01" / "ct.nii.gz")):
        at, scores = matched_filter(read_ct(ct), labels)
        rows[name] = csv(
            tmp_path / f"{name}.csv", [("r01", *(p * [-1, -1, 1]), s) for p, s in zip(at, scores, strict=True)]
        )
    tables, said = scored(tmp_path / "out", rows["after"], "lps", before=rows["before"])
    print(said)
    froc = tables["froc"].set_index(["false_positives", "rate"])["sensitivity"]
    hits = tables["hits"]
    assert hits["score"][hits["subtype"] == "solid"].notna().all()
    assert froc["new", "mean"] > froc["all", "mean"] and froc["new", "8"] >= 0.5
