"""What the evaluation notebooks share: requests, the synthetic pool, classifier data, calls and sentences."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import pytest

from hrldm.config import SUBTYPES, changed
from hrldm.insertion.generator import Request
from hrldm.nodules.histograms import histogram_moments
from hrldm.nodules.patches import Patches
from hrldm.nodules.positions import MAX_VESSEL, VESSEL_HU
from study import experiments as protocol
from study.classify import jobs
from study.measure.statistics import Estimate
from study.profiles import get_profile
from study.report.published import load_published

SIDE = 36
LEVELS = np.array([50.0, -250.0, -600.0])  # HU of each subtype's histograms


@dataclass
class FakeStudy:
    """Balls in air with the interface of `Study` that the protocol uses."""

    counts: dict = field(default_factory=lambda: {"train": (6, 2, 3), "val": (2, 1, 1), "test": (4, 2, 2)})
    seed: int = 0
    dataset: str = "fake"
    profile: object = field(
        default_factory=lambda: get_profile("smoke", data__patch_mm=SIDE, tables__n_synthetic=5, ablation__n=4)
    )

    @cached_property
    def frame(self) -> pd.DataFrame:
        rows = []
        for split, counts in self.counts.items():
            for k, n in enumerate(counts):
                rows += [(f"{split}{k}{i}", f"{split}-p{len(rows) + i}", split, SUBTYPES[k]) for i in range(n)]
        frame = pd.DataFrame(rows, columns=["nodule_id", "patient_id", "split", "subtype"])
        return frame.assign(diameter_mm=12.0, malignancy=np.resize([1.0, 3.0, 5.0], len(frame)))

    def patches(self, split: str, background: bool = False) -> Patches:
        frame = self.frame[self.frame.split == split].reset_index(drop=True)
        grid = np.stack(np.meshgrid(*[np.arange(SIDE) - SIDE // 2] * 3, indexing="ij"))
        mask = np.repeat((np.linalg.norm(grid, axis=0) <= 6)[None], len(frame), axis=0)
        hu = np.full(mask.shape, -850, np.int16)
        hu += np.arange(len(frame), dtype=np.int16)[:, None, None, None]  # tells the nodules apart
        patches = Patches(hu, mask, frame)
        if not background:
            hu[mask] = 0
        return patches

    def backgrounds(self, split: str) -> Patches:
        return self.patches(split, background=True)

    def places(self, split: str) -> tuple[Patches, Patches]:
        return self.patches(split), self.backgrounds(split)

    def library_histograms(self, places: Patches, seed: int) -> np.ndarray:
        frame = places.frame
        edges = np.linspace(-1000, 400, 41)
        level = frame.subtype.map(dict(zip(SUBTYPES, LEVELS, strict=True))).to_numpy()
        jitter = np.random.default_rng((self.seed, seed)).normal(0, 20, (len(frame), 500))
        return np.stack([np.histogram(v, edges)[0] / 500.0 for v in level[:, None] + jitter])


@pytest.fixture
def study() -> FakeStudy:
    return FakeStudy()


@pytest.fixture
def painted(monkeypatch):
    """A system that paints the requested mean into the mask; what it was asked is kept."""
    asked: list[Request] = []

    def synthesise(study, system, request, truth, edge):
        assert edge  # or a classifier could learn the feather
        asked.append(request)
        out = request.background.copy()
        for crop, mask, histogram in zip(out, request.mask, request.histogram, strict=True):
            crop[mask] = histogram_moments(histogram)[0]
        return out

    monkeypatch.setattr(protocol, "synthesise", synthesise)
    return asked


def test_shape_patients_prefer_the_patient_of_the_shape():
    frame = pd.DataFrame({"patient_id": ["a", "b"], "shape_patient_id": ["x", "y"]})
    assert protocol.shape_patients(frame).tolist() == ["x", "y"]
    assert protocol.shape_patients(frame.assign(shape_patient_id=["x", None])).tolist() == ["x", "b"]
    assert protocol.shape_patients(frame.assign(shape_patient_id=["x", ""])).tolist() == ["x", "b"]


def test_evaluation_nodules_are_the_first_of_the_test_split_with_their_places(study):
    truth, background = protocol.evaluation_nodules(study)
    assert len(truth) == len(background) == study.profile.tables.n_synthetic
    assert truth.frame.nodule_id.tolist() == background.frame.nodule_id.tolist()
    assert (truth.hu[~truth.mask] == background.hu[~truth.mask]).all()
    assert (truth.hu[truth.mask] != background.hu[truth.mask]).all()


def test_crossed_request_keeps_label_and_shape_but_asks_for_another_subtypes_histogram(study):
    truth, background = protocol.evaluation_nodules(study)
    chosen, request, asked = protocol.crossed_request(study, truth, background)
    assert len(chosen) == len(request) == study.profile.ablation.n
    assert (request.subtype == chosen.subtype).all() and (asked != chosen.subtype).all()
    means = np.array([histogram_moments(h)[0] for h in request.histogram])
    assert np.abs(means - LEVELS[asked]).max() < 30
    again = protocol.crossed_request(study, truth, background)[1]
    assert np.array_equal(request.histogram, again.histogram) and np.array_equal(request.seeds, again.seeds)


def test_pool_is_balanced_with_the_donors_shapes_in_places_of_others(study):
    known, behind = protocol.known_nodules(study)
    donors = np.array([0, 7, 9, 10])  # one solid, one part-solid, two ground-glass
    source, request, scans = protocol.pool_request(study, known, behind, donors, 5)
    assert request.subtype.tolist() == [2] * 5 + [1] * 5 + [0] * 5  # the largest last: other systems leave it out
    assert set(source.frame.nodule_id) == set(known.frame.nodule_id[donors])
    assert len(np.unique(request.seeds)) == len(request)
    assert len({h.tobytes() for h in request.histogram[request.subtype == 1]}) == 5
    assert (scans != source.frame.patient_id).all() and set(scans) <= set(known.frame.patient_id)
    levels = request.background[:, 0, 0, 0] + 850  # tell the places apart, split by split
    assert len(set(levels)) > 5 and not (request.background[request.mask] == 0).any()


def test_pool_of_lidc_mini_goes_anywhere_in_the_training_lung(study):
    known, behind = protocol.known_nodules(study)
    known = replace(
        known, frame=known.frame.assign(lobe="RLL", shape_patient_id=known.frame.patient_id, location="inner")
    )
    study.dataset = "lidc-mini"
    source, request, scans = protocol.pool_request(study, known, behind, np.array([0, 7]), 6)
    assert set(scans) == {"LIDC-IDRI-0001 right lung"}
    assert len({crop.tobytes() for crop in request.background}) == len(request) == 12
    inside = request.background[request.mask].reshape(12, -1)
    assert ((inside > VESSEL_HU).mean(1) <= MAX_VESSEL).all() and inside.mean() < -750  # healthy lung
    again = protocol.pool_request(study, known, behind, np.array([0, 7]), 6)[1]
    assert np.array_equal(again.background, request.background) and np.array_equal(again.mask, request.mask)


def test_pool_has_the_subtypes_of_the_donors(study):
    known, behind = protocol.known_nodules(study)
    source, request, _ = protocol.pool_request(study, known, behind, np.array([0, 9]), 3)
    assert np.bincount(request.subtype, minlength=3).tolist() == [3, 0, 3]


def test_without_ratings_nothing_is_learnt_of_malignancy_and_it_is_said(painted):
    study = FakeStudy()
    assert not protocol.downstream_data(study).lacks_malignancy(1)
    del study.frame["malignancy"]
    data = protocol.downstream_data(study)
    assert "0 nodules rated benign" in data.lacks_malignancy(2) and "to train on" in data.lacks_malignancy(2)
    assert protocol.malignancy_runs(study, data) == [] and len(data.rated_test) == 0


def test_test_nodules_of_one_class_are_said(painted):
    study = FakeStudy(counts={"train": (6, 0, 3), "test": (0, 0, 6)})
    study.frame.loc[study.frame.split == "test", "malignancy"] = 5
    data = protocol.downstream_data(study)
    assert "0 nodules rated benign (column `malignancy`, 1 or 2) and 6 rated malignant (4 or 5) to test on" in (
        data.lacks_malignancy(2)
    )
    assert "patients to train on; 9 folds" in replace(data, rated_test=data.rated).lacks_malignancy(9)
    said = data.lacks_subtypes()
    for words in ("No part-solid nodule to train on", "No solid nodule to train", "All test nodules are ground-glass"):
        assert (words in said) is (words != "No solid nodule to train")
    assert not protocol.downstream_data(FakeStudy()).lacks_subtypes()


def test_downstream_data_parts_the_sets_and_cuts_about_the_centre(study, painted):
    data = protocol.downstream_data(study)
    side = study.profile.downstream.crop_mm
    ours, known = data.synthetic["hr-ldm"], study.frame[study.frame.split != "test"]
    n_real = len(data.real)
    assert 0 < n_real < len(known) == 15
    assert data.real.crops.shape == (n_real, side, side, side) and ours.crops.shape[1:] == (side, side, side)
    assert set(data.real.source) == set(data.test.source) == {""} and set(ours.source) == {"hr-ldm"}
    assert set(data.synthetic) == {"hr-ldm", "texture", "transplant", "maisi-ddpm"}
    largest = np.bincount(data.real.labels).argmax()
    for name, made in data.synthetic.items():
        assert not set(made.groups) & set(data.real.groups)  # held-out shapes
        assert not (set(made.groups) | set(made.places)) & (set(data.test.groups) | set(data.test.places))
        assert set(made.places) <= set(known.patient_id) and (made.labels == largest).any() <= (name == "hr-ldm")
    folds = jobs.patient_folds(data.real, study.profile.downstream.folds, study.seed)
    most = max(np.bincount(data.real.labels[train]).max() for train, _ in folds)
    assert set(np.bincount(ours.labels)) <= {0, most}  # no cap but the largest subtype of a fold
    c = side // 2
    assert (data.real.crops[:, c, c, c] == 0).all() and np.allclose(data.real.mean_hu, 0)
    assert np.abs(ours.crops[:, c, c, c] - LEVELS[ours.labels]).max() < 30
    assert not set(data.rated.groups) - set(data.real.groups) and not set(data.rated_test.groups) - set(
        data.test.groups
    )


def test_downstream_data_without_a_validation_split(painted):
    study = FakeStudy(counts={"train": (3, 2, 2), "test": (1, 1, 1)})
    assert 3 < len(protocol.downstream_data(study).real) < 7


def test_classifier_crops_must_fit_the_synthetic_ones(study):
    study.profile = changed(study.profile, downstream__crop_mm=SIDE + 4)
    with pytest.raises(ValueError, match=f"downstream.crop_mm {SIDE + 4} exceeds data.patch_mm {SIDE}"):
        protocol.downstream_data(study)


@pytest.mark.slow
def test_the_three_experiments_share_their_runs(study, painted, monkeypatch, tmp_path):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    study.profile = changed(
        study.profile,
        classifier__arch="densenet-tiny",
        classifier__epochs=1,
        downstream__folds=2,
        downstream__scarcity_folds=1,
        downstream__beside_folds=1,
        downstream__retention=(1.0, 0.0),
    )
    study.counts = {"train": (6, 4, 4), "val": (2, 1, 1), "test": (4, 2, 2)}
    data = protocol.downstream_data(study)
    subtype = protocol.subtype_runs(study, data)
    two = [(r.arm, r.fold) for r in subtype if r.arm in ("Real only", "Real + Synth")]
    assert two == [(a, f) for f in (0, 1) for a in ("Real only", "Real + Synth")]
    scarcity = protocol.scarcity_runs(study, data)
    baseline = next(r for r in scarcity if r.arm == "Clinical (n%)" and r.retention == 1.0)
    assert baseline.weights == subtype[0].weights and baseline.seconds == 0  # Real only of fold 0, not trained again
    malignancy = protocol.malignancy_runs(study, data)
    assert len(malignancy) == 10 and set(data.rated_test.labels) == {0, 1}
    assert all(r.probabilities.shape == (len(data.rated_test), 2) for r in malignancy)
    overview = protocol.run_overview(subtype)
    balanced = overview[overview.arm == "Real + Synth"]
    assert (balanced.n_synthetic > 0).all() and (overview.n_synthetic[overview.arm == "Real only"] == 0).all()
    curves = protocol.run_curves(subtype)
    assert (
        set(curves.arm) == set(overview.arm) - {"Diameter alone", "Mean HU alone"}
        and np.isfinite(curves.val_loss).all()
    )


def test_spectra_of_white_noise_are_flat_and_read_the_largest_lesions():
    rng = np.random.default_rng(0)
    masks = np.zeros((30, 16, 16, 16), bool)
    for i, mask in enumerate(masks):
        mask[: i // 3 + 1] = True
    loud = rng.normal(0, 1, masks.shape)
    loud[20:] *= 10  # the ten largest
    spectra = protocol.centre_spectra({"a": loud, "b": 2 * loud}, masks)
    wide = spectra.pivot(index="cycles_per_mm", columns="system", values="power_hu2")
    assert wide.index[-1] == pytest.approx(0.5)
    assert np.allclose(wide.a[1:], 100, rtol=0.25)
    assert np.allclose(wide.b, 4 * wide.a)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-3.0, -1.0, "hr-ldm is closer"), (1.0, 3.0, "maisi-ddpm is closer"), (-1.0, 1.0, "no difference seen")],
)
def test_sentence_follows_the_interval(low, high, verdict):
    e = Estimate((low + high) / 2, low, high, 40, 0.03)
    said = protocol.difference_sentence("distance", "hr-ldm", "maisi-ddpm", e, "HU")
    assert verdict in said
    assert f"{e.value:+.3g} HU" in said and "n = 40" in said


def test_table1_as_printed_in_the_paper():
    printed = protocol.printed_table1(load_published("table1_fidelity"))
    assert printed.loc["hr-ldm"].round(4).tolist() == [2.8967, 1.0992, 0.6507]
    assert printed.index[0] == "diff-tumor" and printed.index[-1] == "hr-ldm"
