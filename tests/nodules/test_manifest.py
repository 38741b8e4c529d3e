"""The manifest is checked as a whole: every problem with its row and file in one message, clean ones load."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from hrldm.nodules.manifest import load_manifest, write_manifest
from hrldm.nodules.split import patient_split

HEADER = "nodule_id,patient_id,image,mask,subtype,diameter_mm"


def image(path: Path, array=None, affine=None) -> str:
    array = np.random.default_rng(0).integers(-1000, 300, (9, 8, 7)).astype(np.int16) if array is None else array
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path.name


def ball(value=1) -> np.ndarray:
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[3:6, 3:6, 3:6] = value
    return mask


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with one good image and one good mask."""
    image(tmp_path / "i.nii.gz"), image(tmp_path / "m.nii.gz", ball())
    return tmp_path


def write(root: Path, *rows: str, header: str = HEADER) -> Path:
    (root / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def test_good_rows_load_with_absolute_paths_numbers_and_split(root):
    image(root / "i2.nii.gz", np.full((9, 8, 7), -850, np.int16) + ball())
    write(
        root,
        "007,LIDC-IDRI-0001,i.nii.gz,m.nii.gz,solid,8.5,4,,0.5,12.5",
        "008,LIDC-IDRI-0002,i2.nii.gz,m.nii.gz,part-solid,9,3,2,-3,7",
        header=HEADER + ",malignancy,lobulation,center_x_mm,series_id",
    )
    frame = load_manifest(root)
    assert frame["image"].tolist() == [str(root / "i.nii.gz"), str(root / "i2.nii.gz")] and frame[
        "nodule_id"
    ].tolist() == ["007", "008"]
    assert frame["split"].tolist() == [patient_split("LIDC-IDRI-0001"), patient_split("LIDC-IDRI-0002")]
    assert frame["diameter_mm"].tolist() == [8.5, 9.0] and frame["center_x_mm"].tolist() == [0.5, -3.0]
    assert np.isnan(frame["lobulation"][0]) and frame["series_id"].tolist() == ["12.5", "7"]
    pd.testing.assert_frame_equal(load_manifest(root / "manifest.csv"), frame)


def test_every_problem_is_reported_at_once_with_its_row(root):
    image(root / "shape.nii.gz", ball()[:, :, :6]), image(root / "moved.nii.gz", ball(), np.diag([1, 1, 2, 1]))
    image(root / "empty.nii.gz", ball(0)), image(root / "labels.nii.gz", ball(3))
    image(root / "mri.nii.gz", np.arange(504, dtype=np.int16).reshape(9, 8, 7))
    (root / "cut.nii.gz").write_bytes((root / "i.nii.gz").read_bytes()[:700])
    rows = [  # (row, words of its message)
        ("a,p1,i.nii.gz,m.nii.gz,solid,8", ()),
        ("b,p2,i.nii.gz,m.nii.gz,nodular,8", ("unknown subtype 'nodular'", "ground-glass")),
        ("a,p3,i.nii.gz,m.nii.gz,solid,8", ()),
        ("d,p4,gone.nii.gz,m.nii.gz,solid,8", ("gone.nii.gz: no such file",)),
        ("e,p5,i.nii.gz,m.nii.gz,solid,wide", ("diameter_mm 'wide' is not a positive number",)),
        ("f,p6,i.nii.gz,m.nii.gz,solid,-8", ("diameter_mm '-8' is not a positive number",)),
        ("g,p7,i.nii.gz,m.nii.gz,solid", ("5 fields where the header has 6",)),
        ("h,p8,i.nii.gz,shape.nii.gz,solid,8", ("mask shape.nii.gz has shape (9, 8, 6)", "resample it")),
        ("i,p9,i.nii.gz,moved.nii.gz,solid,8", ("mask moved.nii.gz is 6.00 mm off", "affines differ")),
        ("j,p10,i.nii.gz,empty.nii.gz,solid,8", ("empty.nii.gz: empty mask",)),
        ("k,p11,i.nii.gz,labels.nii.gz,solid,8", ("labels.nii.gz: not binary, holds 3",)),
        ("l,p12,mri.nii.gz,m.nii.gz,solid,8", ("mri.nii.gz: not a chest CT in HU",)),
        ("m,,i.nii.gz,m.nii.gz,solid,8", ("patient_id is empty",)),
        ("n,p14,cut.nii.gz,m.nii.gz,solid,8", ("cut.nii.gz: damaged or cut short",)),
        ("o,p15,i.nii.gz,m.nii.gz,solid,inf", ("diameter_mm 'inf'",)),
        ('"p",p16,i.nii.gz,,solid,8', ("mask is empty",)),
    ]
    write(root, *[line for line, _ in rows])
    before = sorted(root.iterdir())
    with pytest.raises(ValueError) as caught:
        load_manifest(root)
    lines = str(caught.value).splitlines()
    assert str(root / "manifest.csv") in lines[0] and "mend the rows" in lines[0]
    for number, (_, words) in enumerate(rows, start=2):
        mine = [line for line in lines if line.strip().startswith(f"row {number}:")]
        assert len(mine) == bool(words), (number, mine)
        assert all(word in mine[0] for word in words), mine
    assert any("rows 2, 4: nodule_id 'a' stands 2 times" in line for line in lines)
    assert any("image i.nii.gz: one CT under 12 patients in different splits ('p1' in row 2" in line for line in lines)
    assert f"{len(lines) - 1} problem(s)" in lines[0] and len(lines) - 1 == sum(bool(w) for _, w in rows) + 2
    assert sorted(root.iterdir()) == before


def test_voxel_faults_are_left_alone_without_check_images_headers_are_not(root):
    image(root / "empty.nii.gz", ball(0)), image(root / "moved.nii.gz", ball(), np.diag([1, 1, 2, 1]))
    write(root, "a,p1,i.nii.gz,empty.nii.gz,solid,8", "b,p2,i.nii.gz,moved.nii.gz,solid,8")
    with pytest.raises(ValueError, match="1 problem") as caught:
        load_manifest(root, check_images=False)
    assert "moved.nii.gz" in str(caught.value)


def test_ratings_outside_their_scale(root):
    write(
        root, "a,p1,i.nii.gz,m.nii.gz,solid,8,6", "b,p2,i.nii.gz,m.nii.gz,solid,8,high", header=HEADER + ",malignancy"
    )
    with pytest.raises(
        ValueError, match=r"row 2: malignancy '6' is not a number from 1 to 5(.|\n)*row 3: malignancy 'high'"
    ):
        load_manifest(root)


def test_scaled_values_are_judged_by_what_they_mean(root):
    """uint16 with intercept −1024 is HU; the stored values alone would not be."""
    scaled = nib.Nifti1Image(np.arange(504, dtype=np.uint16).reshape(9, 8, 7) * 2, np.eye(4))
    scaled.header.set_slope_inter(1, -1024)
    nib.save(scaled, root / "i.nii.gz")
    assert len(load_manifest(write(root, "a,p1,i.nii.gz,m.nii.gz,solid,8"))) == 1


def test_background_must_exist_and_share_the_grid(root):
    image(root / "b.nii.gz", None, np.diag([1, 2, 1, 1]))
    write(
        root,
        "a,p1,i.nii.gz,m.nii.gz,solid,8,b.nii.gz",
        "b,p1,i.nii.gz,m.nii.gz,solid,8,no.nii.gz",
        "c,p1,i.nii.gz,m.nii.gz,solid,8,",
        header=HEADER + ",background",
    )
    with pytest.raises(
        ValueError,
        match=r"2 problem(.|\n)*row 2: background b\.nii\.gz is 7\.00 mm off(.|\n)*row 3: background .*no\.nii",
    ):
        load_manifest(root)


# -- split -------------------------------------------------------------------------------------------------------------


def test_patient_in_two_splits(root):
    rows = [
        "a,p1,i.nii.gz,m.nii.gz,solid,8,train",
        "b,p1,i.nii.gz,m.nii.gz,solid,8,test",
        "c,p2,i.nii.gz,m.nii.gz,solid,8,dev",
    ]
    with pytest.raises(ValueError) as caught:
        load_manifest(write(root, *rows, header=HEADER + ",split"))
    assert "patient 'p1' stands in two splits: train in row 2, test in row 3; split by patient" in str(caught.value)
    assert "row 4: split 'dev' is not one of train, val, test" in str(caught.value)


def test_semi_synthetic_rows_are_split_by_the_shapes_patient(root):
    header = HEADER + ",shape_patient_id,split"
    good = ["a,host,i.nii.gz,m.nii.gz,solid,8,s1,train", "b,host,i.nii.gz,m.nii.gz,solid,8,s2,test"]
    assert len(load_manifest(write(root, *good, header=header))) == 2
    with pytest.raises(ValueError, match="patient 's1' stands in two splits"):
        load_manifest(write(root, *good, "c,host,i.nii.gz,m.nii.gz,solid,8,s1,test", header=header))


def test_unknown_patients_are_split_by_hash_whoever_else_is_there(root, caplog):
    rows = [f"n{i},stranger-{i // 2},i.nii.gz,m.nii.gz,solid,8" for i in range(600)]
    with caplog.at_level(logging.WARNING):
        frame = load_manifest(write(root, *rows), check_images=False)
    assert "300 patient(s) unknown" in caplog.text and "70/10/20" in caplog.text
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()
    shares = frame["split"].value_counts(normalize=True)
    np.testing.assert_allclose(shares[["train", "val", "test"]], [0.7, 0.1, 0.2], atol=0.07)
    fewer = load_manifest(write(root, *rows[::-7]), check_images=False).set_index("nodule_id")["split"]
    assert fewer.equals(frame.set_index("nodule_id")["split"][fewer.index])


# -- writing and real data -----------------------------------------------------------------------------------------------


def test_written_manifest_loads_the_same_from_elsewhere(root):
    frame = load_manifest(write(root, "a,p1,i.nii.gz,m.nii.gz,solid,8.25", "b,p1,i.nii.gz,m.nii.gz,ground-glass,9"))
    elsewhere = write_manifest(frame, root / "deeper" / "manifest.csv")
    assert "../i.nii.gz" in elsewhere.read_text(encoding="utf-8") and str(root) not in elsewhere.read_text(
        encoding="utf-8"
    )
    pd.testing.assert_frame_equal(load_manifest(elsewhere), frame, check_dtype=False)
    relative = frame.assign(image="i.nii.gz", mask="m.nii.gz")  # relative ones are taken as they are
    pd.testing.assert_frame_equal(load_manifest(write_manifest(relative, root / "r.csv")), frame, check_dtype=False)


REAL = [("lidc-cubes", 100), ("lidc-vois", 941)]


@pytest.mark.parametrize(("name", "rows"), REAL)
def test_real_manifests_load_cleanly_from_their_headers(shared_data, name, rows, caplog):
    frame = load_manifest(shared_data / name, check_images=False)
    assert len(frame) == rows and not caplog.records
    assert frame.groupby("patient_id")["split"].nunique().max() == 1


@pytest.mark.parametrize(("name", "rows"), [REAL[0], pytest.param(*REAL[1], marks=pytest.mark.slow)])
def test_real_voxels_pass_every_check(shared_data, name, rows):
    assert len(load_manifest(shared_data / name, check_images=True)) == rows


# -- what spreadsheets and people leave ----------------------------------------------------------------------------------


def test_rows_and_columns_of_commas_are_no_nodules_and_rows_count_as_in_a_spreadsheet(root):
    rows = [
        '"a\nof two lines",p1,i.nii.gz,m.nii.gz,solid,8,,',  # one row
        ",,,,,,,",
        "",
        "b,p1,i.nii.gz,m.nii.gz,solid,-1,,",  # row 5
        "# a remark",  # row 6
        "c,p1,i.nii.gz,m.nii.gz,solid,8,,left",  # row 7
        " , ,,,,,,",
    ]
    with pytest.raises(ValueError, match="3 problem") as caught:
        load_manifest(write(root, *rows, header="\ufeff" + HEADER + ",,"))
    said = str(caught.value)
    assert "row 5: diameter_mm '-1'" in said and "row 6: 1 fields" in said
    assert "row 7: 8 fields where the header has 6" in said
    frame = load_manifest(write(root, rows[0], *rows[1:3], rows[-1], header="\ufeff" + HEADER + ",,"))
    assert frame["nodule_id"].tolist() == ["a\nof two lines"] and list(frame.columns) == [*HEADER.split(","), "split"]


def test_a_missing_and_a_doubled_column_hide_no_other_problem(root):
    header = "nodule_id,patient_id,image,mask,diameter_mm,image"
    with pytest.raises(ValueError) as caught:
        load_manifest(write(root, "a,p1,gone.nii.gz,m.nii.gz,0,x", "a,p1,i.nii.gz,m.nii.gz,8,x", header=header))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "column 'image' stands 2 times",
        "missing column(s) subtype",
        "rows 2, 3",
        "row 2",
        "row 2",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.encode() + b'\na,"p1,i,m,solid,8\n', "line 2: unexpected end of data"),
        (HEADER.encode() + b"\na,p1,i,m,solid,8\nb,Mu\xfcller,i,m,solid,8\n", "line 3: 'utf-8' codec can't decode"),
        (HEADER.encode("utf-16"), "line 1: .* save it as comma-separated UTF-8"),
        (HEADER.replace(",", ";").encode() + b"\n1;2;3;4;5;6\n", "separate columns by commas"),
    ],
)
def test_a_file_that_is_no_csv_is_refused_with_its_line(root, content, message):
    (root / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_manifest(root)


def test_nan_in_a_cell_is_blank_and_infinity_an_error(root):
    header = HEADER + ",malignancy,center_x_mm,shape_patient_id,split"
    good = "a,p1,i.nii.gz,m.nii.gz,solid,8,NaN,nan,N/A,train"
    frame = load_manifest(write(root, good, "b,p1,i.nii.gz,m.nii.gz,solid,8,3,1.5,,train", header=header))
    np.testing.assert_array_equal(frame[["malignancy", "center_x_mm"]], [[np.nan, np.nan], [3, 1.5]])
    assert frame["shape_patient_id"].tolist() == ["", ""]
    with pytest.raises(ValueError) as caught:
        load_manifest(write(root, good, "b,nan,i.nii.gz,m.nii.gz,solid,NaN,3,-inf,,train", header=header))
    for words in (
        "row 3: patient_id is empty",
        "row 3: diameter_mm is empty",
        "row 3: center_x_mm '-inf' is not finite",
    ):
        assert words in str(caught.value)


# -- what is of another patient, or of another nodule -----------------------------------------------------------------------


def test_one_ct_under_two_patients_in_two_splits_is_leakage(root):
    """Under another file name and in another dtype too; within one split, or of one patient, it is none."""
    hu = np.asarray(nib.load(root / "i.nii.gz").dataobj)
    image(root / "copy.nii.gz", hu.astype(np.float32)), image(root / "other.nii.gz", np.flip(hu, 0).copy())
    header = HEADER + ",split"
    rows = [
        "a,p1,i.nii.gz,m.nii.gz,solid,8,train",
        "b,p2,other.nii.gz,m.nii.gz,solid,8,test",
        "c,p3,copy.nii.gz,m.nii.gz,solid,8,train",
        "d,p1,i.nii.gz,m.nii.gz,solid,8,train",
    ]
    assert len(load_manifest(write(root, *rows, header=header))) == 4
    rows[2] = rows[2].replace("train", "test")
    with pytest.raises(
        ValueError,
        match=r"1 problem(.|\n)*image i\.nii\.gz: one CT under 2 patients in different splits "
        r"\('p1' in rows 2, 5, 'p3' in row 4\); give them one patient_id",
    ):
        load_manifest(write(root, *rows, header=header))


def test_a_mask_of_another_size_than_the_nodule_is_refused(root):
    lung = np.ones((9, 8, 7), np.uint8)
    image(root / "lung.nii.gz", lung)
    write(
        root, "a,p1,i.nii.gz,lung.nii.gz,solid,2", "b,p1,i.nii.gz,m.nii.gz,solid,30", "c,p1,i.nii.gz,m.nii.gz,solid,8"
    )
    with pytest.raises(
        ValueError,
        match=r"2 problem(.|\n)*row 2: mask .*lesion of 9.87 mm where diameter_mm says 2; (.|\n)*row 3: mask",
    ):
        load_manifest(root)
