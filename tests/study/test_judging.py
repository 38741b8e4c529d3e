"""A system that obeys is told from one that is deaf to what is asked, in every line of a judgement."""

import json
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from torch import nn

from hrldm.config import SUBTYPES
from hrldm.train.latents import lesion_histograms
from study import __main__ as cli
from study import judging
from study.measure.features import Extractor
from study.report.provenance import write_provenance
from tests import tiny

EXTRACTOR = Extractor("coarse", 16, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()))


STUDY = SimpleNamespace(seed=3, profile=tiny.profile(), autoencoder=tiny.autoencoder())


def deaf(order, _) -> np.ndarray:
    """-400 HU whatever is asked."""
    return np.where(order.mask, -400.0, order.background)


@pytest.fixture(scope="module")
def tables():
    truth = tiny.patches(18, size=40)
    clean = judging.Patches(np.where(truth.mask, -850, truth.hu).astype(np.int16), truth.mask, truth.frame)
    paint = tiny.PaintingGenerator()
    systems = {"paint": lambda order, _: paint(order), "deaf": deaf}
    return judging.judge(STUDY, truth, clean, systems, EXTRACTOR)


def test_orders_are_of_real_histograms_of_the_subtype():
    truth = tiny.patches(6, size=40)
    own, other, thrice, triplets = judging.orders_from_library(STUDY, truth, truth)
    np.testing.assert_allclose(own.histogram, lesion_histograms(truth, 40))
    library = judging.histogram_library()
    bins = library.filter(regex=r"^b\d\d$").to_numpy(float)
    for subtype, wanted in zip(truth.subtype, other.histogram, strict=True):
        assert (np.abs(bins[library.subtype == SUBTYPES[subtype]] - wanted).max(1) < 1e-12).any()
    assert len(triplets) == len(thrice) == 18
    assert (other.seeds == own.seeds).all() and len(set(own.seeds)) == 6


def test_who_obeys_and_who_does_not(tables):
    jsd = tables["lesion_histograms"].query("metric == 'jsd' and subtype == 'all'").set_index("system").value
    assert jsd["paint"] < 0.01 < 0.3 < jsd["deaf"] and jsd["paint"] < jsd["autoencoder"]
    fit = tables["control_summary"].query("quantity == 'mean_hu'").set_index(["system", "subtype"])
    assert fit.r2["paint", "all"] > 0.999 and fit.slope["paint", "all"] == pytest.approx(1, abs=0.02)
    assert fit.slope["deaf", "all"] == pytest.approx(0, abs=0.02) and fit.n["deaf", "all"] == 36
    order = tables["triplets_summary"].query("side == 'obtained'").set_index("system").value
    assert order["paint"] == 1 and order["deaf"] == 0
    apart = tables["separability"].set_index("system").auroc
    assert apart["deaf"] > apart["paint"] and set(apart.index) == {"autoencoder", "paint", "deaf"}


def test_the_rows_of_single_nodules_give_the_tables(tables):
    lesions, means = tables["lesions"], tables["lesion_histograms"].set_index(["system", "subtype", "metric"])
    assert lesions.groupby("system").nodule_id.nunique().to_dict() == dict.fromkeys(
        ["real", "autoencoder", "paint", "deaf"], 18
    )
    for (system, subtype), part in lesions.groupby(["system", "subtype"]):
        row = means.loc[system, subtype, "jsd"]
        assert row.value == pytest.approx(part.jsd.mean())
        assert np.isnan(row.ci_low) == (part.patient_id.nunique() < judging.LEAST_PATIENTS)
    assert tables["control"].groupby("system").size().to_dict() == {"paint": 36, "deaf": 36}
    median = tables["median_jsd"].set_index(["system", "subtype"])
    assert median.n_nodules["deaf", "all"] == 18 and median.n_patients["deaf", "all"] == lesions.patient_id.nunique()


def test_intervals_of_few_patients_are_left_out(tables):
    few = tables["lesions"].query("patient_id in @patients", local_dict={"patients": ["p0", "p1", "p2"]})
    table = judging._histograms(few, 50)
    assert table.value.notna().all() and table[["ci_low", "ci_high"]].isna().all(axis=None)
    many = judging._histograms(tables["lesions"], 50).query("subtype == 'all'")
    assert many[["ci_low", "ci_high"]].notna().all(axis=None)


def test_the_record_names_the_networks_and_how_each_system_samples(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "released", tiny.painting)
    made = judging.networks(STUDY, judging.generators())
    one = tiny.painting()
    assert made.config == one.config and made.judged_by == STUDY.profile and made.unet != ""
    assert made.sampling["hr-ldm"] == one.sampling
    assert made.sampling["hr-ldm-matched"].match_t_max == judging.IMPOSED_T_MAX
    file = write_provenance(tmp_path, made, "mine", 0)
    said = json.loads(file.read_text(encoding="utf-8"))
    assert said["profile"] == "released" and said["profile_fields"]["unet"] == made.unet
    assert said["profile_fields"]["sampling"]["hr-ldm-matched"]["match_t_max"] == judging.IMPOSED_T_MAX


def test_the_summary_is_what_the_tables_say(tables):
    table = judging.summary(tables).set_index("system")
    assert list(table.index) == ["real", "autoencoder", "paint", "deaf"]
    assert table.columns[0] == "JSD, n = 18" and table.columns[2] == "solid: slope, R², n = 12"
    assert table.loc["paint", "three subtypes in order"] == "100% of 18"
    assert table.loc["autoencoder", "solid: slope, R², n = 12"] == ""
    median = tables["median_jsd"].query("system == 'deaf' and subtype == 'all'").jsd.iloc[0]
    assert table.loc["deaf", "median"] == f"{median:.3f}"


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setattr(judging, "released", tiny.painting)
    monkeypatch.setattr(judging, "default_extractor", lambda: EXTRACTOR)

    def _call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hrldm", "judge", *map(str, arguments)])
        return cli.main(), *capsys.readouterr()

    return _call


def test_command_line_judges_a_manifest(call, tmp_path):
    root = tiny.manifest(tmp_path, {"train": 3, "test": 9})
    status, said, error = call(root, "--out", tmp_path / "judged")
    assert (status, error) == (0, "") and "JSD, n = 9" in said and "| released" in said
    table = pd.read_csv(tmp_path / "judged" / "tables" / "lesion_histograms.csv")
    assert table.query("metric == 'jsd' and subtype == 'all'").set_index("system").value["hr-ldm"] < 0.02
    assert (tmp_path / "judged" / "provenance.json").exists()
    status, said, error = call(tmp_path / "absent", "--out", tmp_path / "judged")
    assert status == 2 and "judged: exists already" in error and "(--overwrite)" in error
    (tmp_path / "file").touch()
    assert "cannot be written" in call(tmp_path / "absent", "--out", tmp_path / "file" / "x")[2]
    own = tmp_path / "judged" / "tables" / "mine.csv"
    own.write_text("a,b")
    former = tmp_path / "judged" / "tables" / "realism.csv"
    former.write_text("of another run")
    assert "JSD, n = 12" in call(root, "--split", "all", "--out", tmp_path / "judged", "--overwrite")[1]
    assert own.read_text() == "a,b" and "another run" not in (former.read_text() if former.exists() else "")
    status, said, error = call(root, "--split", "val")
    assert status == 2 and error == f"error: {root}: no nodule of split 'val' in its manifest; choose another, or all\n"


def single(root, patients, **columns):
    """A manifest of one nodule for each name."""
    tiny.manifest(root, {"test": len(patients)}, size=44)
    frame = pd.read_csv(root / "manifest.csv").assign(patient_id=patients, **columns)
    frame.to_csv(root / "manifest.csv", index=False)
    return root


@pytest.mark.parametrize("patients", [["p"], ["p"] * 3])
def test_one_patient_gives_a_table_without_what_cannot_be_had(call, tmp_path, caplog, patients):
    status, said, error = call(single(tmp_path, patients), "--out", tmp_path / "judged")
    assert (status, error) == (0, "") and f"JSD, n = {len(patients)}" in said and "nan" not in said
    assert "nodules of one patient only: whether features tell" in caplog.text
    jsd = pd.read_csv(tmp_path / "judged" / "tables" / "lesion_histograms.csv")
    assert jsd.value.notna().all() and jsd[["ci_low", "ci_high"]].isna().all(axis=None)
    assert pd.read_csv(tmp_path / "judged" / "tables" / "separability.csv").auroc.isna().all()


def test_a_lesion_wider_than_its_crop_is_left_out_and_named(call, tmp_path, caplog):
    root = single(tmp_path, ["p", "q", "r"], diameter_mm=[12, 46, 12])
    nib.save(nib.Nifti1Image(tiny.ball(44, 21).astype(np.uint8), np.eye(4)), root / "n1_mask.nii.gz")
    status, said, _ = call(root)
    assert status == 0 and "JSD, n = 2" in said and "left out, wider than the crop of 40 mm: n1 (46 mm)" in caplog.text
    frame = pd.read_csv(root / "manifest.csv")
    frame[frame.nodule_id == "n1"].to_csv(root / "manifest.csv", index=False)
    status, said, error = call(root)
    assert (status, said) == (2, "") and "every nodule of split 'test' is wider than the crop of 40 mm" in error
    assert "the first, n1, has 46 mm" in error


def test_a_lesion_that_leaves_nothing_of_the_lung_to_see_is_judged(call, tmp_path):
    root = single(tmp_path, ["p", "q"], diameter_mm=[39, 39])
    for name in ("n0", "n1"):
        nib.save(nib.Nifti1Image(tiny.ball(60, 26).astype(np.uint8), np.eye(4)), root / f"{name}_mask.nii.gz")
        hu = np.where(tiny.ball(60, 26), 20, -850) + np.random.default_rng(len(name)).integers(-50, 50, (60,) * 3)
        for kind in ("image", "background"):
            nib.save(nib.Nifti1Image(hu.astype(np.int16), np.eye(4)), root / f"{name}_{kind}.nii.gz")
    assert call(root)[0] == 0
