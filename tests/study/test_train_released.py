"""The one command that makes the release: all of it, from two manifests and a host to weights that `released` reads."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import pandas as pd
import pytest

from hrldm.atomic import write_text
from hrldm.config import changed
from hrldm.insertion.released import RELEASED_UNET, released
from hrldm.paths import ROOT
from hrldm.train.checkpoint import CheckpointError
from scripts import compare_lambda
from scripts import train_released as script
from study import judging
from study.profiles import PROFILES
from tests import tiny
from tests.nodules.test_transplant import host

SPLITS = {"train": 4, "val": 2, "test": 4}
SETTINGS = script.SETTINGS | {
    "unet__channels": (16, 32), "unet__res_blocks": 1, "unet__norm_groups": 8, "unet__head_channels": 16, "ldm__batch": 2,
    "mixed_precision": "no",
}  # fmt: skip


def judged(study, split, native=None, unet=None) -> dict[str, dict]:
    """In the place of `judging.judge_released`, which has tests of its own: what it was asked to judge."""
    n = len(study.split(split))
    return {"judged": {"dataset": study.dataset, "unet": unet.name, "n": n, "native": len(native or ())}}


def save(tables: dict[str, dict], folder) -> None:
    for name, table in tables.items():
        write_text(folder / f"{name}.json", json.dumps(table))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command at its smallest: DATA_ROOT and FOLDER."""
    root, patch = tmp_path_factory.mktemp("release"), pytest.MonkeyPatch()
    patch.setenv("HRLDM_CACHE", str(root / "cache"))
    data = root / "data"
    for seed, name in enumerate(("a-cubes", "b-boxes")):
        (data / name).mkdir(parents=True)
        tiny.manifest(data / name, SPLITS, size=48, seed=seed)
        frame = pd.read_csv(data / name / "manifest.csv")
        frame["patient_id"] = [f"{name}-{p}" for p in frame.patient_id]
        if name == "a-cubes":
            frame.loc[0, "patient_id"] = "unknown-1"
        frame.drop(columns="background").to_csv(data / name / "manifest.csv", index=False)
    taker = host("H9")
    (data / "host").mkdir()
    for name, array in (("ct", taker.hu), ("lung", taker.lungs)):
        nib.save(nib.Nifti1Image(array, taker.affine), data / "host" / f"{name}.nii.gz")
    patch.setattr(script, "embedded_hosts", lambda: [host("H1", ("train",), 1), host("H2", ("val",), 2)])
    for name, value in {"SETTINGS": SETTINGS, "COPIES": dict.fromkeys(script.COPIES, 2), "NATIVE": 2, "SAVE_EVERY": 2,
                        "TIMED": 1, "STEPS": (1, 2), "LONG": 2}.items():  # fmt: skip
        patch.setattr(script, name, value)
    patch.setattr(judging, "N_BOOT", 50)
    patch.setattr(judging, "judge_released", judged)
    patch.setattr(script, "save_tables", save)
    patch.setitem(PROFILES, "quick", changed(PROFILES["quick"], tables__n_boot=50))
    script.main(data, root / "out", minutes=0.001)
    yield data, root / "out"
    patch.undo()


def test_the_card_counts_what_was_trained_on_and_nobody_of_unknown_identity(run):
    card = json.loads((run[1] / "unet.json").read_text())["training"]
    assert card["nodules_in_place"] == 3 and card["steps"] == 2 and card["lambda_hist"] == 0
    # both manifests have n0 to n9, and every cube that is transplanted stands in its own place too
    assert card["nodules"] == card["nodules_transplanted"] == card["patients"] == 7 and card["transplants"] == 2 * 7


def test_its_weights_are_read_as_the_shipped_ones_and_are_what_was_judged(run):
    made_by = released(unet=run[1] / "unet.safetensors")
    assert made_by.sampling.steps == script.SAMPLING["steps"] and made_by.config.histogram.template
    card = json.loads((run[1] / "unet.json").read_text())
    for folder, native, where in ((run[1], 0, "a-cubes"), (run[1] / "displaced", 4, "b-boxes in host")):
        record = json.loads((folder / "provenance.json").read_text())
        assert record["profile_fields"]["unet"] == card["weights_sha256_16"] and record["dataset"] == where
        of_judge = json.loads((folder / "judged.json").read_text())
        assert of_judge == {"dataset": where, "unet": "unet.safetensors", "n": 4, "native": native}


def test_seen_and_unseen_nodules_and_all_numbers_of_steps_stand_side_by_side(run):
    seen = pd.read_csv(run[1] / "seen.csv").set_index("split")
    assert list(seen.index) == ["train", "test"] and (seen.n <= 4).all() and (seen.n == seen.patients).all()
    assert (seen.ci_low < seen.jsd).all() and (seen.jsd < seen.ci_high).all()
    steps = pd.read_csv(run[1] / "steps.csv")
    assert steps.groupby(["where", "histogram"], sort=False).steps.apply(list).to_dict() == {
        (where, histogram): [1, 2] for where in ("own place", "displaced") for histogram in script.SAMPLERS
    }
    held = steps.set_index(["where", "histogram", "steps"]).jsd
    long = held.xs(2, level="steps")
    of_one = steps[steps.steps == 1].set_index(["where", "histogram"])
    pd.testing.assert_series_equal(
        of_one.jsd_minus_2, of_one.jsd - long, check_names=False, check_index=True, atol=2e-5
    )
    assert (long.xs("imposed", level="histogram") < long.xs("left to itself", level="histogram")).all()


def test_a_finished_run_is_found_and_weights_are_judged_without_training(run, tmp_path, monkeypatch):
    data, out = run
    monkeypatch.setattr(script, "train_ldm", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(
        script, "judge_weights", lambda file, *_: write_text(tmp_path / "judged", file.read_bytes().hex())
    )
    script.main(data, tmp_path / "again", minutes=0.001)
    assert (tmp_path / "judged").read_text() == (out / "unet.safetensors").read_bytes().hex()
    monkeypatch.setattr(script, "release_data", lambda *_: pytest.fail("data made"))
    (tmp_path / "judged").unlink()
    script.main(data, tmp_path / "alone", judge=out / "unet.safetensors")
    assert (tmp_path / "judged").exists()


@pytest.mark.parametrize("missing", ["manifest", "host"])
@pytest.mark.parametrize("judge", [False, True])
def test_a_folder_that_cannot_do_is_refused_before_anything_is_made(tmp_path, monkeypatch, missing, judge):
    for name in ("a", "b")[: 1 if missing == "manifest" else 2]:
        (tmp_path / name).mkdir()
        tiny.manifest(tmp_path / name, {"train": 2, "test": 2})
    monkeypatch.setattr(script, "test_hosts", lambda _: [host("H", ("test",))] if missing == "manifest" else [])
    with pytest.raises(ValueError, match="needs two .*manifest.csv"):
        script.main(tmp_path, tmp_path / "out", judge=RELEASED_UNET if judge else None)
    assert not (tmp_path / "out").exists()


def test_a_patient_who_trains_in_one_manifest_is_not_tested_in_the_other(run, tmp_path):
    for name in ("a-cubes", "b-boxes", "host"):
        shutil.copytree(run[0] / name, tmp_path / name)
    of_cubes, of_boxes = (tmp_path / name / "manifest.csv" for name in ("a-cubes", "b-boxes"))
    cubes, boxes = pd.read_csv(of_cubes), pd.read_csv(of_boxes)
    cubes.loc[cubes.split == "test", "patient_id"] = boxes.patient_id[boxes.split == "train"].to_numpy()
    cubes.to_csv(of_cubes, index=False)
    with pytest.raises(ValueError, match="in one manifest for training and in the other not: b-boxes-p0, b-boxes-p1"):
        script.release_data(*script.inputs(tmp_path))


def test_weights_that_cannot_be_gone_on_from_are_refused_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "release_data", lambda *_: pytest.fail("data made"))
    with pytest.raises(ValueError, match="another size"):
        script.main(run[0], tmp_path / "out", start=RELEASED_UNET)
    (checkpoint,) = (run[0].parent / "cache" / "release-runs").rglob("ldm.safetensors")
    for how in ("start", "judge"):
        with pytest.raises(CheckpointError, match="not a released U-Net"):
            script.main(run[0], tmp_path / "out", **{how: checkpoint})
    with pytest.raises(ValueError, match="leave out --start"):
        script.main(run[0], tmp_path / "out", start=RELEASED_UNET, judge=RELEASED_UNET)


@pytest.mark.parametrize("spacing", [["0.7x0.7x2.5", "0.7x0.7x1.0", "x"], [2.5, 1.0, None]])
def test_only_series_known_to_be_thick_are_left_out(spacing):
    boxes = pd.DataFrame({"series_instance_uid": ["1.2", "1.3", ""], "spacing_mm": spacing})
    cubes = pd.DataFrame({"nodule_id": list("abcd"), "series_instance_uid": ["1.2", "1.3", "", "1.4"]})
    assert script.thin(cubes, [cubes, boxes]).nodule_id.tolist() == ["b", "c", "d"]
    unknown = boxes.assign(series_instance_uid="")
    assert script.thin(cubes, [unknown]).nodule_id.tolist() == list("abcd")
    assert script.thin(cubes.drop(columns="series_instance_uid"), [boxes]).nodule_id.tolist() == list("abcd")


def test_snapshots_are_kept_at_their_share_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAVE_EVERY", 5)
    path = tmp_path / "ldm.safetensors"

    def steps():
        for step in range(1, 26):
            path.write_text(str(step))
            yield SimpleNamespace(step=step)

    assert len(list(script.with_snapshots(steps(), path, 25))) == 25
    kept = {f.stem: f.read_text() for f in tmp_path.glob("[0-9]*.safetensors")}
    assert kept == {"5": "5", "10": "10", "20": "20"}  # a fifth, a half by whole saves, four fifths; not the last


def test_what_l_hist_adds_is_measured_on_the_same_nodules(run, tmp_path, monkeypatch):
    for name, value in {
        "SEEDS": 1,
        "LEARNING_RATE": 0.01,
        "RELEASED_UNET": run[1] / "unet.safetensors",
        "SETTINGS": SETTINGS,
    }.items():
        monkeypatch.setattr(compare_lambda, name, value)
    compare_lambda.main(run[0], tmp_path, steps=2)
    levels = pd.read_csv(tmp_path / "lambda.csv")
    assert len(levels) == 2 * 2 * 2 and (levels.n <= 4).all()
    differences = pd.read_csv(tmp_path / "lambda_differences.csv").set_index(["where", "template", "metric"])
    for keys, row in levels.set_index(["where", "template", "lambda"]).groupby(["where", "template"]):
        level = row.droplevel(["where", "template"])
        for metric in compare_lambda.METRICS:
            found = differences.loc[(*keys, metric), "difference"]
            assert found == pytest.approx(level.loc[10.0, metric] - level.loc[0.0, metric], abs=2e-5)
    assert (levels.groupby(["where", "template"]).jsd.nunique() == 2).all()  # lambda reached the training


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    call = [sys.executable, "-m", "scripts.train_released", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {tmp_path}: needs two")
        and done.stderr.count("\n") == 1
    )
