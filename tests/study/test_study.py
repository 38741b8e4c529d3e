"""A study finds what it trained before, and every wrong input is named before long work."""

import dataclasses
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from hrldm import paths
from hrldm.model.autoencoder import MAISI, Autoencoder
from hrldm.nodules.patches import Patches
from hrldm.train import autoencoders
from hrldm.train import checkpoint as ckpt
from hrldm.train.loop import read_history
from study import notebook
from study import study as runs
from study.profiles import get_profile
from study.report.provenance import read_provenance
from tests import tiny


@pytest.fixture
def study(tmp_path, monkeypatch) -> runs.Study:
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    study = runs.open_study(tiny.profile(), "mine", str(tiny.manifest(root, {"train": 6, "test": 3})), seed=0)
    study.__dict__["autoencoder"] = tiny.autoencoder()
    return study


def test_study_splits_patches_and_backgrounds(study):
    assert len(study.split("train")) == 6 and len(study.split("test")) == 3 and not len(study.split("val"))
    train, clean = study.patches("train"), study.backgrounds("train")
    assert train.hu.shape == (6, 16, 16, 16)
    np.testing.assert_array_equal(train.hu[~train.mask], clean.hu[~train.mask])
    assert clean.hu[train.mask].mean() < -800 < train.hu[train.mask].mean()
    assert study.patches("test", 24).hu.shape == (3, 24, 24, 24)
    assert study.results.parts[-2:] == ("mine", "smoke")


def test_a_place_that_cannot_be_had_is_the_image_and_its_nodule_left_out_and_counted(study, caplog, monkeypatch):
    monkeypatch.setattr(runs, "healthy_images", lambda frame: frame.background)
    frame = study.frame.assign(background=study.frame.background.where(study.frame.nodule_id != "n1", ""))
    mine = runs.Study(study.profile, "mine", study.root, 0, frame)
    places = mine.backgrounds("train")
    truth, healthy = mine.places("train")
    assert truth.frame.nodule_id.tolist() == healthy.frame.nodule_id.tolist() == ["n0", "n2", "n3", "n4", "n5"]
    assert "train: healthy places for 5 of 6 nodules" in caplog.text
    whole, clean = study.patches("train").hu, study.backgrounds("train").hu
    np.testing.assert_array_equal(places.hu[1], whole[1])
    np.testing.assert_array_equal(np.delete(places.hu, 1, 0), np.delete(clean, 1, 0))


def test_a_nodule_wider_than_the_crop_is_left_out_and_named(study, caplog):
    table = (study.root / "manifest.csv").read_text(encoding="utf-8")
    wide = study.frame.diameter_mm[2]
    (study.root / "manifest.csv").write_text(table.replace(str(wide), "17"), encoding="utf-8")
    again = runs.open_study(study.profile, "mine", str(study.root))
    assert again.frame.nodule_id.tolist() == [f"n{i}" for i in range(9) if i != 2]
    assert "left out, wider than the crop of 16 mm: n2 (17 mm)" in caplog.text


def test_images_are_read_once_and_again_when_one_changes(study, monkeypatch):
    asked = []
    real = runs.load_manifest

    def spy(root, check_images=True):
        asked.append(check_images)
        return real(root, check_images)

    monkeypatch.setattr(runs, "load_manifest", spy)
    again = runs.open_study(study.profile, "mine", str(study.root))
    assert asked == [False] and again.frame.equals(study.frame)
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 32), np.int16), np.eye(4)), study.root / "n4_image.nii.gz")
    for _ in range(2):  # a manifest that failed does not count as checked
        with pytest.raises(ValueError, match=r"n4_image\.nii\.gz"):
            runs.open_study(study.profile, "mine", str(study.root))
    assert asked == [False, False, True, False, True]


def test_latents_are_read_once_a_study(study):
    assert study.latents("train") is study.latents("train") and len(study.latents("train")) == 6
    assert study.latents("test") is not study.latents("train")


def test_a_small_training_set_gets_more_variants(study):
    more = dataclasses.replace(study, profile=tiny.profile(latents__least=20))
    vars(more)["autoencoder"] = study.autoencoder
    assert more.latents("train").mean.shape[:2] == (6, 4) and more.latents("test").mean.shape[:2] == (3, 1)
    assert study.latents("train").mean.shape[:2] == (6, 2)


def test_another_dataset_begins_with_a_network_trained_on_lidc_mini(study, monkeypatch, tmp_path):
    root = tmp_path / "embedded"
    root.mkdir()
    tiny.manifest(root, {"train": 4, "test": 2}, seed=5)
    real, asked = runs.open_study, []

    def embedded(settings, seed):
        asked.append((settings.ldm.steps, settings.histogram.weight, seed))
        made = real(settings, "mine", str(root), seed)
        return dataclasses.replace(made, dataset="lidc-mini")

    monkeypatch.setattr(runs, "open_study", embedded)
    monkeypatch.setattr(runs.lidc_mini, "data_hash", lambda root: "mini")
    first = study.unet(ldm__pretrain_steps=2, ldm__steps=1, ldm__lr=0.0)[0]
    assert asked == [(2, 0.0, 0)]
    learned = embedded(tiny.profile(ldm__pretrain_steps=2, histogram__weight=0.0, ldm__steps=2, ldm__lr=0.0), 0)
    vars(learned)["autoencoder"] = study.autoencoder
    expected = learned.unet()[0].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in first.state_dict().items())
    fresh = study.unet(ldm__steps=1, ldm__lr=0.0)[0].state_dict()
    assert not all(torch.equal(v, expected[k]) for k, v in fresh.items())


def test_unet_is_trained_once_and_found_again(study, monkeypatch):
    unet, scale, profile, history = study.unet(ldm__steps=3)
    assert profile.ldm.steps == 3 and history.step.tolist() == [1, 2, 3]
    assert {"inpaint", "hist", "seconds"} <= set(history.columns)
    monkeypatch.setattr(runs, "train_ldm", lambda *a, **k: pytest.fail("trained again"))
    again, scale2, _, history2 = study.unet(ldm__steps=3)
    assert scale == scale2 and history2.equals(history)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in unet.state_dict().items())
    paths = {study.run_path(tiny.profile(**c)) for c in ({}, {"histogram__weight": 0.0}, {"histogram__vector": False})}
    assert len(paths) == 3
    assert study.run_path(tiny.profile(tables__n_boot=7)) == study.run_path(tiny.profile())  # concerns no training


def test_half_a_run_is_finished_with_one_history(study, monkeypatch):
    path = study.run_path(tiny.profile())
    real = runs.train_ldm

    def interrupted(*args, **kwargs):
        for state in real(*args, **kwargs, save_every=2):
            yield state
            if state.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_ldm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.unet()
    assert ckpt.load_meta(path)["step"] == 2
    monkeypatch.setattr(runs, "train_ldm", real)
    history = study.unet()[3]
    assert history.step.is_unique and history.step.iloc[-1] == 6
    assert ckpt.load_meta(path)["step"] == 6


def test_library_histograms_come_from_training_nodules_of_the_subtype(study):
    test = study.patches("test")
    rows = study.library_histograms(test, seed=1)
    train = study.patches("train")
    own = runs.lesion_histograms(train, 40)
    for row, subtype in zip(rows, test.frame.subtype, strict=True):
        source = np.flatnonzero((own == row).all(1))
        assert len(source) == 1 and train.frame.subtype[source[0]] == subtype
    np.testing.assert_array_equal(rows, study.library_histograms(test, seed=1))


def test_no_training_nodule_is_asked_for_its_own_histogram(study):
    train = study.patches("train")
    assert train.frame.subtype.value_counts().min() > 1
    own = runs.lesion_histograms(train, 40)
    for seed in range(5):
        assert not (study.library_histograms(train, seed) == own).all(1).any()


def test_library_histograms_are_not_darker_than_the_lung_they_go_into(study):
    dark, bright = np.eye(40)[6], np.eye(40)[14]  # -790 HU and -510 HU
    bins = pd.DataFrame(np.repeat([dark, bright], 10, axis=0), columns=[f"b{i:02d}" for i in range(40)])
    other = dataclasses.replace(study)
    vars(other)["_library"] = bins.assign(nodule_id="n", subtype="ground-glass", diameter_mm=8.0, size_bin=0)
    frame = pd.DataFrame({"subtype": ["ground-glass"] * 20, "diameter_mm": 8.0})
    places = Patches(np.full((20, 24, 24, 24), -650, np.int16), np.zeros((20, 24, 24, 24), bool), frame)
    assert (other.library_histograms(places, seed=1) == bright).all()
    deep = dataclasses.replace(places, hu=np.full_like(places.hu, -900))
    assert 0 < (other.library_histograms(deep, seed=1) == dark).all(1).sum() < 20


# -- weights -----------------------------------------------------------------------------------------------------------------


def maisi_state(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    model = Autoencoder(MAISI)
    return model.net.state_dict()


@pytest.mark.parametrize("layout", ["present", "older", "wrapped"])
def test_maisi_file_loads_in_every_layout(tmp_path, layout):
    """84 MB in float32, as the published autoencoder_v1.pt; older files name a convolution once less."""
    state = maisi_state()
    assert sum(v.numel() for v in state.values()) * 4 == pytest.approx(83.8e6, rel=1e-3)
    if layout == "older":
        stored = {
            k if k.startswith(("quant", "post_quant")) else k.replace("conv.conv.", "conv.", 1): v
            for k, v in state.items()
        }
        assert stored.keys() != state.keys() and len(stored) == len(state)
    else:
        stored = state if layout == "present" else {"unet_state_dict": state}
    torch.save(stored, tmp_path / "autoencoder_v1.pt")
    model = autoencoders.load_maisi(tmp_path / "autoencoder_v1.pt")
    assert all(torch.equal(v, state[k]) for k, v in model.net.state_dict().items())
    assert model.linear is None and model.latent_channels == 4


@pytest.mark.parametrize("content", ["absent", b"", b"not a torch file", {"encoder.weight": torch.zeros(1)}])
def test_other_files_are_not_taken_for_maisis(tmp_path, content):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "absent":
        torch.save(content, path)
    with pytest.raises(ckpt.CheckpointError, match=r"weights\.pt: not MAISI's autoencoder"):
        autoencoders.load_maisi(path)


def test_autoencoder_round_trip_and_strangers(tmp_path):
    model = tiny.autoencoder()
    meta = {"architecture": dataclasses.asdict(model.config)}
    ckpt.save(tmp_path / "a", {"ema": model.state_dict()}, meta)
    loaded = autoencoders.load_autoencoder(tmp_path / "a")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    ckpt.save(tmp_path / "b", {"ema": model.state_dict()}, {"stage": "ldm"})
    with pytest.raises(ckpt.CheckpointError, match="not an autoencoder checkpoint"):
        autoencoders.load_autoencoder(tmp_path / "b")
    ckpt.save(tmp_path / "c", {"ema": {"x": torch.zeros(1)}}, meta)
    with pytest.raises(ckpt.CheckpointError, match="another architecture"):
        autoencoders.load_autoencoder(tmp_path / "c")
    with pytest.raises(ckpt.CheckpointError, match="no such checkpoint"):
        autoencoders.load_autoencoder(tmp_path / "d")


def test_shipped_autoencoder_is_that_of_the_quick_profile_and_reconstructs():
    from hrldm.model.autoencoder import normalise_hu

    model = autoencoders.load_autoencoder(autoencoders.SHIPPED_AUTOENCODER)
    ours = Autoencoder(get_profile("quick").autoencoder).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.items()}
    assert autoencoders.SHIPPED_AUTOENCODER.stat().st_size <= 20e6
    x = normalise_hu(torch.from_numpy(tiny.patches(2, 32).hu[:, None].astype(np.float32)))
    with torch.no_grad():
        error = (model.decode(model.encode(x)[0]) - x)[..., 4:-4, 4:-4, 4:-4].abs().mean()
    assert error < 0.03  # 60 HU, on lesions with white noise of 60 HU that no code of this size can keep


def test_study_takes_the_users_maisi_file_or_names_what_is_wrong(study, tmp_path):
    asked = dataclasses.replace(study, profile=tiny.profile(autoencoder__source=str(tmp_path / "mine.pt")))
    with pytest.raises(ckpt.CheckpointError, match="mine.pt: not MAISI's autoencoder"):
        _ = asked.autoencoder
    torch.save(maisi_state(), tmp_path / "mine.pt")
    model = asked.autoencoder
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_maisis_file_is_taken_where_there_is_one_and_else_the_cost_of_training_is_said_first(
    study, tmp_path, monkeypatch, caplog
):
    asked = dataclasses.replace(study, profile=tiny.profile(autoencoder__source="maisi", vae__steps=1, vae__batch=1))
    monkeypatch.delenv(paths.MAISI, raising=False)
    monkeypatch.setattr(runs, "PerceptualLoss", lambda _: None)
    monkeypatch.setattr(runs, "wheel_file", lambda *_: None)
    assert asked.autoencoder.config.channels == (8, 8, 8)
    said = re.search(
        r"no MAISI weights \(HRLDM_MAISI\): trained here; I: autoencoder: 1 steps, about .* days and .* GB on c",
        caplog.text,
    )
    assert said, caplog.text
    torch.save(maisi_state(), tmp_path / "mine.pt")
    monkeypatch.setenv(paths.MAISI, str(tmp_path / "mine.pt"))
    again = dataclasses.replace(study, profile=asked.profile)
    assert again.autoencoder.config.channels == (64, 128, 256)


def test_epochs_are_steps_over_the_nodules_to_train_on(study):
    again = runs.open_study(tiny.profile(ldm__steps=0, ldm__epochs=4), "mine", str(study.root))
    assert (again.profile.ldm.steps, again.profile.ldm.epochs) == (12, 0)  # 6 nodules in batches of 2


def test_the_papers_profile_refuses_cubes_in_place_of_cts(study):
    with pytest.raises(
        ValueError, match="paper takes 128 mm of each CT, and lidc-mini has cubes of 64 mm: give your own CTs"
    ):
        runs.open_study("paper")
    with pytest.raises(ValueError, match="9 of 9 images are narrower than the 128 mm of each CT"):
        runs.open_study("paper", "mine", str(study.root), data__diameters_mm=(0.0, 99.0))


# -- bad input before long work ------------------------------------------------------------------------------------------------


def test_wrong_studies_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="unknown profile 'tiny'"):
        runs.open_study("tiny")
    with pytest.raises(ValueError, match="unknown setting 'lamda_hist'"):
        runs.open_study("smoke", lamda_hist=0.0)
    with pytest.raises(ValueError, match=r"'mine' is not embedded: give DATA_ROOT \(data_root\)"):
        runs.open_study("smoke", "mine")
    with pytest.raises(ValueError, match="manifest.csv"):
        runs.open_study("smoke", "mine", str(tmp_path / "nowhere"))
    root = tmp_path / "data"
    root.mkdir()
    tiny.manifest(root, {"train": 2, "val": 1})
    with pytest.raises(ValueError, match=r"no nodule in split\(s\) \['test'\]"):
        runs.open_study("smoke", "mine", str(root))
    text = tiny.manifest(root, {"train": 2, "test": 1})
    (text / "manifest.csv").write_text((text / "manifest.csv").read_text(encoding="utf-8").replace("p2", "p0"))
    with pytest.raises(ValueError, match="two splits"):
        runs.open_study("smoke", "mine", str(root))


def test_history_counts_repeated_steps_once(tmp_path):
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 9.0}', '{"step": 2, "loss": 2.0}']
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    history = read_history(tmp_path)
    assert history.step.tolist() == [1, 2] and history.loss.tolist() == [1.0, 2.0]
    assert read_history(tmp_path / "none").empty


@pytest.mark.parametrize(("split", "said"), [("train", "to train on"), ("test", "to test on")])
def test_a_dataset_of_one_patient_is_refused_before_any_work(tmp_path, monkeypatch, split, said):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    root = tiny.manifest(tmp_path, {"train": 3, "test": 3})
    frame = pd.read_csv(root / "manifest.csv")
    frame.loc[frame.split == split, "patient_id"] = "only"
    frame.to_csv(root / "manifest.csv", index=False)
    with pytest.raises(ValueError, match=f"nodules of one patient {said}"):
        runs.open_study("smoke", "mine", str(root))


def test_a_blank_shape_patient_is_no_other_patient(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    root = tiny.manifest(tmp_path, {"train": 3, "test": 3})
    frame = pd.read_csv(root / "manifest.csv")
    train = frame.split == "train"
    frame.loc[train, "patient_id"] = "only"
    frame["shape_patient_id"] = np.where(train.cumsum() == 1, frame.patient_id, "")
    frame.to_csv(root / "manifest.csv", index=False)
    with pytest.raises(ValueError, match="nodules of one patient to train on"):
        runs.open_study("smoke", "mine", str(root))


def test_a_seed_that_no_library_takes_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    root = tiny.manifest(tmp_path, {"train": 3, "test": 3})
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="give a whole number from 0"):
            runs.open_study("smoke", "mine", str(root), seed)


def test_a_notebooks_study_says_what_it_is_saves_and_records(study, tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_RESULTS", str(tmp_path / "results"))
    opened = notebook.open_study(study.profile, "mine", str(study.root), settings="")
    said = opened._repr_markdown_()
    assert repr(opened) == said.replace("*", "") and str(opened.frame["image"].iloc[0]) not in repr(opened)
    assert opened.label == "mine" and "Real nodules" in said and "6 train, 3 test" in said and "torch" in said
    table = pd.DataFrame({"split": ["train"], "n": [6]})
    assert opened.save(table, "counts") is table and (opened.results / "tables" / "counts.csv").exists()
    opened.drop("counts")
    assert not (opened.results / "tables" / "counts.csv").exists()
    fig = opened.show(plt.figure(), "empty")
    assert isinstance(fig, plt.Figure) and (opened.results / "figures" / "empty.png").exists()
    assert opened.finish() == "recorded in provenance.json" and read_provenance(opened.results)["dataset"] == "mine"
    assert type(opened.with_seed(1)) is type(opened)
