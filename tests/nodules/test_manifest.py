"""The manifest is checked as a whole: every problem with its row and file in one message, clean ones load."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from hrldm.nodules.manifest import load_manifest, write_manifest
from hrldm.nodules.split import patient_split

GOOD = {
    "nodule_id": "", "patient_id": "p1", "image": "i.nii.gz", "mask": "m.nii.gz", "subtype": "solid", "diameter_mm": 8,
}  # fmt: skip
HEADER = ",".join(GOOD)
IMAGE = np.random.default_rng(0).integers(-1000, 300, (9, 8, 7)).astype(np.int16)
BALL = np.zeros(IMAGE.shape, np.uint8)
BALL[3:6, 3:6, 3:6] = 1
RAMP = np.arange(IMAGE.size).reshape(IMAGE.shape)
MOVED = np.diag([1, 1, 2, 1])
FILES = {  # name -> voxels and affine
    "i": (IMAGE, np.eye(4)),
    "i2": (np.full(IMAGE.shape, -850, np.int16) + BALL, np.eye(4)),
    "copy": (IMAGE.astype(np.float32), np.eye(4)),
    "flipped": (np.flip(IMAGE, 0).copy(), np.eye(4)),
    "wide": (IMAGE, np.diag([1, 2, 1, 1])),
    "mri": (RAMP.astype(np.int16), np.eye(4)),
    "m": (BALL, np.eye(4)),
    "empty": (0 * BALL, np.eye(4)),
    "labels": (3 * BALL, np.eye(4)),
    "full": (np.ones_like(BALL), np.eye(4)),
    "shape": (BALL[:, :, :6], np.eye(4)),
    "moved": (BALL, MOVED),
}


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with `FILES`, an image that is cut short, and one of stored values that its intercept makes HU."""
    for name, (array, affine) in FILES.items():
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "i.nii.gz").read_bytes()[:700])
    scaled = nib.Nifti1Image(RAMP.astype(np.uint16) * 2, np.eye(4))
    scaled.header.set_slope_inter(1, -1024)
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    return tmp_path


def write(root: Path, *rows: dict | str) -> Path:
    """A manifest of good rows with some cells changed; text is written as it is."""
    good = [GOOD | {"nodule_id": f"n{i}"} | r for i, r in enumerate(rows) if isinstance(r, dict)]
    columns = list(dict.fromkeys(c for r in good for c in r))
    cells = iter(",".join(str(r.get(c, "")) for c in columns) for r in good)
    lines = [next(cells) if isinstance(r, dict) else r for r in rows]
    (root / "manifest.csv").write_text("\n".join([",".join(columns), *lines]) + "\n", encoding="utf-8")
    return root


def refused(root: Path, **options) -> list[str]:
    """The problems of the manifest, one a line."""
    with pytest.raises(ValueError) as caught:
        load_manifest(root, **options)
    first, *problems = str(caught.value).splitlines()
    assert first.startswith(f"{root / 'manifest.csv'}: {len(problems)} problem(s)") and "mend the rows" in first
    return [p.strip() for p in problems]


def test_good_rows_load_with_absolute_paths_numbers_and_split(root):
    numbers = {"diameter_mm": 8.5, "malignancy": 4, "lobulation": "", "center_x_mm": 0.5, "series_id": 12.5}
    write(
        root,
        {"nodule_id": "007", "patient_id": "LIDC-IDRI-0001", **numbers},
        {"nodule_id": "008", "patient_id": "LIDC-IDRI-0002", **numbers, "image": "i2.nii.gz", "center_x_mm": -3},
    )
    frame = load_manifest(root)
    assert frame.image.tolist() == [str(root / "i.nii.gz"), str(root / "i2.nii.gz")]
    assert frame.nodule_id.tolist() == ["007", "008"] and frame.series_id.tolist() == ["12.5", "12.5"]
    assert frame.split.tolist() == [patient_split("LIDC-IDRI-0001"), patient_split("LIDC-IDRI-0002")]
    assert frame.diameter_mm.tolist() == [8.5, 8.5] and frame.center_x_mm.tolist() == [0.5, -3.0]
    assert frame.lobulation.isna().all()
    pd.testing.assert_frame_equal(load_manifest(root / "manifest.csv"), frame)


def test_every_problem_is_reported_at_once_with_its_row(root):
    wrong = [  # what is changed, words of its message
        ({}, ""),
        ({"subtype": "nodular"}, "unknown subtype 'nodular'; one of solid, part-solid, ground-glass"),
        ({"nodule_id": "n0"}, ""),
        ({"image": "gone.nii.gz"}, "gone.nii.gz: no such file"),
        ({"diameter_mm": "wide"}, "diameter_mm 'wide' is not a positive number"),
        ({"diameter_mm": -8}, "diameter_mm '-8' is not a positive number"),
        ("g,p7,i.nii.gz,m.nii.gz,solid", "5 fields where the header has 6"),
        ({"mask": "shape.nii.gz"}, "mask shape.nii.gz has shape (9, 8, 6), image i.nii.gz (9, 8, 7); resample it"),
        ({"mask": "moved.nii.gz"}, "mask moved.nii.gz is 6.00 mm off image i.nii.gz (affines differ)"),
        ({"mask": "empty.nii.gz"}, "empty.nii.gz: empty mask"),
        ({"mask": "labels.nii.gz"}, "labels.nii.gz: not binary, holds 3"),
        ({"image": "mri.nii.gz"}, "mri.nii.gz: not a chest CT in HU"),
        ({"patient_id": ""}, "patient_id is empty"),
        ({"image": "cut.nii.gz"}, "cut.nii.gz: damaged or cut short"),
        ({"diameter_mm": "inf"}, "diameter_mm 'inf' is not a positive number"),
        ({"nodule_id": '"p"', "mask": ""}, "mask is empty"),
    ]
    rows = [r if isinstance(r, str) else {"patient_id": f"p{i}"} | r for i, (r, _) in enumerate(wrong)]
    before = sorted(write(root, *rows).iterdir())
    problems = refused(root)
    for number, (_, words) in enumerate(wrong, start=2):
        mine = [p for p in problems if p.startswith(f"row {number}:")]
        assert len(mine) == bool(words) and all(words in p for p in mine), (number, mine)
    others = [p for p in problems if not p.startswith("row ")]
    assert others[0].startswith("rows 2, 4: nodule_id 'n0' stands 2 times") and len(others) == 2
    assert others[1].startswith("image i.nii.gz: one CT under 12 patients in different splits ('p0' in row 2")
    assert sorted(root.iterdir()) == before


IN = [{"split": split} for split in ("train", "test", "dev")]


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        pytest.param(
            [{"malignancy": 6}, {"malignancy": "high"}],
            [f"row {n}: malignancy '{x}' is not a number from 1 to 5, or blank" for n, x in ((2, 6), (3, "high"))],
            id="ratings outside their scale",
        ),
        pytest.param(
            [{"background": f} for f in ("wide.nii.gz", "no.nii.gz", "", "i2.nii.gz")],
            ["row 2: background wide.nii.gz is 7.00 mm off image i.nii.gz", "row 3: background {root}/no.nii.gz: no such"],
            id="backgrounds that are gone or on another grid",
        ),
        pytest.param(
            [{"mask": "full.nii.gz", "diameter_mm": 2}, {"diameter_mm": 30}, {}],
            ["row 2: mask {root}/full.nii.gz: holds a lesion of 9.87 mm where diameter_mm says 2; is it", "row 3: mask "],
            id="masks of another size than the nodule",
        ),
        pytest.param(
            [IN[0], IN[1], IN[2] | {"patient_id": "p2"}],
            [
                "row 4: split 'dev' is not one of train, val, test",
                "patient 'p1' stands in two splits: train in row 2, test in row 3; split by patient",
                "image i.nii.gz: one CT under 2 patients in different splits",
            ],
            id="a patient in two splits",
        ),
        pytest.param(
            [IN[0] | {"shape_patient_id": "s1"}, IN[1] | {"shape_patient_id": "s2"}, IN[1] | {"shape_patient_id": "s1"}],
            ["patient 's1' stands in two splits"],
            id="a shape's patient in two splits",
        ),
        pytest.param(
            [IN[0], IN[1] | {"patient_id": "p2", "image": "flipped.nii.gz"}]
            + [IN[1] | {"patient_id": "p3", "image": "copy.nii.gz"}, IN[0]],
            ["image i.nii.gz: one CT under 2 patients in different splits ('p1' in rows 2, 5, 'p3' in row 4); give them one"],
            id="one CT of two patients in two splits, under another name and in another dtype",
        ),
        pytest.param(
            [{"center_x_mm": 1}, {"patient_id": "nan", "diameter_mm": "NaN", "center_x_mm": "-inf"}],
            ["row 3: patient_id is empty", "row 3: diameter_mm is empty", "row 3: center_x_mm '-inf' is not finite"],
            id="blanks as other programs write them, and infinity",
        ),
    ],
)  # fmt: skip
def test_problems(root, rows, problems):
    found = refused(write(root, *rows))
    assert len(found) == len(problems)
    for said, expected in zip(found, problems, strict=True):
        assert said.startswith(expected.format(root=root))


def test_voxel_faults_are_left_alone_without_check_images_headers_are_not(root):
    (problem,) = refused(write(root, {"mask": "empty.nii.gz"}, {"mask": "moved.nii.gz"}), check_images=False)
    assert "moved.nii.gz" in problem


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"image": "scaled.nii.gz"}], id="stored values that are HU by their intercept"),
        pytest.param(
            [{"split": s, "patient_id": "host", "shape_patient_id": s} for s in ("train", "test")],
            id="shapes of two patients in one background",
        ),
        pytest.param([IN[0], IN[0] | {"patient_id": "p3", "image": "copy.nii.gz"}], id="one CT of two patients in one split"),
        pytest.param([IN[0], IN[1] | {"patient_id": "p3", "image": "flipped.nii.gz"}], id="two CTs of the same values"),
    ],
)  # fmt: skip
def test_no_problem(root, rows):
    assert len(load_manifest(write(root, *rows))) == len(rows)


def test_unknown_patients_are_split_by_hash_whoever_else_is_there(root, caplog):
    rows = [{"nodule_id": f"n{i}", "patient_id": f"stranger-{i // 2}"} for i in range(600)]
    with caplog.at_level(logging.WARNING):
        frame = load_manifest(write(root, *rows), check_images=False)
    assert "300 patient(s) unknown" in caplog.text and "70/10/20" in caplog.text
    assert (frame.groupby("patient_id").split.nunique() == 1).all()
    shares = frame.split.value_counts(normalize=True)
    np.testing.assert_allclose(shares[["train", "val", "test"]], [0.7, 0.1, 0.2], atol=0.07)
    fewer = load_manifest(write(root, *rows[::-7]), check_images=False).set_index("nodule_id").split
    assert fewer.equals(frame.set_index("nodule_id").split[fewer.index])


# -- writing and real data -----------------------------------------------------------------------------------------------


def test_written_manifest_loads_the_same_from_elsewhere(root):
    frame = load_manifest(write(root, {"diameter_mm": 8.25}, {"subtype": "ground-glass"}))
    elsewhere = write_manifest(frame, root / "deeper" / "manifest.csv")
    text = elsewhere.read_text(encoding="utf-8")
    assert "../i.nii.gz" in text and str(root) not in text
    relative = write_manifest(frame.assign(image="i.nii.gz", mask="m.nii.gz"), root / "r.csv")  # taken as they are
    for written in (elsewhere, relative):
        pd.testing.assert_frame_equal(load_manifest(written), frame, check_dtype=False)


REAL = [("lidc-cubes", 100), ("lidc-vois", 941)]


@pytest.mark.parametrize(("name", "rows"), REAL)
def test_real_manifests_load_cleanly_from_their_headers(shared_data, name, rows, caplog):
    frame = load_manifest(shared_data / name, check_images=False)
    assert len(frame) == rows and not caplog.records
    assert frame.groupby("patient_id").split.nunique().max() == 1


@pytest.mark.parametrize(("name", "rows"), [REAL[0], pytest.param(*REAL[1], marks=pytest.mark.slow)])
def test_real_voxels_pass_every_check(shared_data, name, rows):
    assert len(load_manifest(shared_data / name)) == rows


# -- what spreadsheets and people leave ----------------------------------------------------------------------------------


def test_rows_and_columns_of_commas_are_no_nodules_and_rows_count_as_in_a_spreadsheet(root):
    file, header = root / "manifest.csv", "\ufeff" + HEADER + ",,"
    rows = [
        '"a\nof two lines",p1,i.nii.gz,m.nii.gz,solid,8,,',  # one row
        ",,,,,,,",
        "",
        "b,p1,i.nii.gz,m.nii.gz,solid,-1,,",  # row 5
        "# a remark",  # row 6
        "c,p1,i.nii.gz,m.nii.gz,solid,8,,left",  # row 7
        " , ,,,,,,",
    ]
    file.write_text("\n".join([header, *rows]), encoding="utf-8")
    assert [p.split(" is")[0] for p in sorted(refused(root))] == [
        "row 5: diameter_mm '-1'",
        "row 6: 1 fields where the header has 6",
        "row 7: 8 fields where the header has 6",
    ]
    file.write_text("\n".join([header, *rows[:3], rows[-1]]), encoding="utf-8")
    frame = load_manifest(root)
    assert frame.nodule_id.tolist() == ["a\nof two lines"] and list(frame.columns) == [*GOOD, "split"]


def test_a_missing_and_a_doubled_column_hide_no_other_problem(root):
    header = "nodule_id,patient_id,image,mask,diameter_mm,image"
    rows = ["a,p1,gone.nii.gz,m.nii.gz,0,x", "a,p1,i.nii.gz,m.nii.gz,8,x"]
    (root / "manifest.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    assert [p.split(":")[0] for p in refused(root)] == [
        "column 'image' stands 2 times",
        "missing column(s) subtype",
        "rows 2, 3",
        "row 2",
        "row 2",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(HEADER.encode() + b'\na,"p1,i,m,solid,8\n', "line 2: unexpected end of data", id="open quote"),
        pytest.param(
            HEADER.encode() + b"\na,p1,i,m,solid,8\nb,Mu\xfcller,i,m,solid,8\n",
            "line 3: 'utf-8' codec can't decode",
            id="latin-1",
        ),
        pytest.param(HEADER.encode("utf-16"), "line 1: .* save it as comma-separated UTF-8", id="utf-16"),
        pytest.param(
            HEADER.replace(",", ";").encode() + b"\n1;2;3;4;5;6\n", "separate columns by commas", id="semicolons"
        ),
    ],
)
def test_a_file_that_is_no_csv_is_refused_with_its_line(root, content, message):
    (root / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_manifest(root)


def test_nan_in_a_cell_is_blank(root):
    blank = {"malignancy": "NaN", "center_x_mm": "nan", "shape_patient_id": "N/A"}
    frame = load_manifest(write(root, blank, {"malignancy": 3, "center_x_mm": 1.5}))
    np.testing.assert_array_equal(frame[["malignancy", "center_x_mm"]], [[np.nan, np.nan], [3, 1.5]])
    assert frame.shape_patient_id.tolist() == ["", ""]
