"""Every system of Table 1 answers the same request, keeps the background, and is asked for by name."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from hrldm import paths
from hrldm.insertion.generator import reconstruct
from hrldm.nodules.histograms import choose_histogram, histogram_library
from hrldm.train.device import device
from hrldm.train.latents import lesion_histograms
from study import study as runs
from study.systems import latent
from study.systems import registry as systems
from tests import tiny


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRLDM_CACHE", str(folder / "cache"))
        (folder / "data").mkdir()
        root = tiny.manifest(folder / "data", {"train": 6, "test": 3})
        study = runs.open_study(tiny.profile(data__patch_mm=24, ldm__steps=2), "mine", str(root))
        study.__dict__["autoencoder"] = tiny.autoencoder()
        yield study


@pytest.fixture
def asked(study):
    patches, background = study.patches("test"), study.backgrounds("test")
    return systems.request_for(study, patches, background), patches


@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_system_fills_the_lesion_and_leaves_the_rest(study, asked, system):
    request, patches = asked
    made = systems.synthesise(study, system, request, patches)
    assert made.dtype == np.int16 and made.shape == request.background.shape
    for i in range(len(request)):
        far = ndimage.distance_transform_edt(~request.mask[i]) > 5
        places = request.background if system == "transplant" else request.background[[i]]
        assert any(np.array_equal(made[i][far], place[far]) for place in places)
        assert (made[i][request.mask[i]] != request.background[i][request.mask[i]]).mean() > 0.8


def test_results_are_kept_by_request_and_system(study, asked, monkeypatch):
    request, patches = asked
    first = systems.synthesise(study, "texture", request, patches)
    monkeypatch.setitem(systems.SYSTEMS, "texture", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(systems.synthesise(study, "texture", request, patches), first)
    other = systems.request_for(study, patches, study.backgrounds("test"), seed=5)
    with pytest.raises(pytest.fail.Exception):
        systems.synthesise(study, "texture", other, patches)
    assert not list((paths.cache_dir() / "synthetic").glob(".*"))


def test_autoencoder_row_is_the_truth_reconstructed(study, asked):
    request, patches = asked
    made = systems.synthesise(study, "autoencoder", request, patches)
    expected = reconstruct(study.autoencoder, patches.hu, device=device())
    np.testing.assert_allclose(made[request.mask], expected[request.mask], atol=0.51)


def test_transplant_row_is_the_true_lesion_in_the_healthy_place_of_another(study, asked):
    request, patches = asked
    made = systems.synthesise(study, "transplant", request, patches)
    np.testing.assert_array_equal(made[request.mask], patches.hu[request.mask])
    corners = [m[0, 0, 0] for m in made]
    assert all(c != place[0, 0, 0] for c, place in zip(corners, request.background, strict=True))
    filled = dataclasses.replace(request, background=np.full_like(request.background, 40))
    own = systems.SYSTEMS["transplant"](study, filled, patches.hu)  # no healthy place: its own
    assert all(m[0, 0, 0] == 40 for m in own)


@pytest.mark.parametrize("system", ["hr-ldm", "texture", "transplant"])
def test_with_the_edge_of_insert_systems_differ_by_their_lesions_alone(study, asked, system):
    request, patches = asked
    own, made = (systems.synthesise(study, system, request, patches, edge=edge) for edge in (False, True))
    np.testing.assert_array_equal(made[request.mask], own[request.mask])
    for i in range(len(request)):  # in the requested place; transplant's own is another
        distance = ndimage.distance_transform_edt(~request.mask[i])
        np.testing.assert_array_equal(made[i][distance > 5], request.background[i][distance > 5])
        rise = (made[i] - request.background[i].astype(float))[(distance > 0) & (distance <= 1)].mean()
        contrast = (own[i] - request.background[i].astype(float))[request.mask[i]].mean()
        assert 0.1 < rise / contrast < 0.55


def test_texture_row_has_the_requested_histogram(study, asked):
    request, patches = asked
    made = systems.synthesise(study, "texture", request, patches)
    centres = np.linspace(-1000, 400, 41)[:-1] + 17.5
    for i in range(len(request)):
        wanted = (request.histogram[i] * centres).sum()
        assert made[i][request.mask[i]].mean() == pytest.approx(wanted, abs=120)


def test_latent_systems_differ_in_their_objective_alone(study):
    assert latent.CHANGES == {
        "hr-ldm": {},
        "hr-ldm-template": {"histogram__template": True},
        "hr-ldm-matched": {"sampling__match_t_max": 300},
        "maisi-ddpm": {"histogram__weight": 0.0},
        "maisi-rflow": {"histogram__weight": 0.0, "diffusion__objective": "rflow"},
    }
    flow = latent.trained(study, "maisi-rflow")
    assert flow.config.diffusion.objective == "rflow" and flow.autoencoder is study.autoencoder


def test_requests_by_library_and_by_target(study):
    patches, background = study.patches("test"), study.backgrounds("test")
    target = systems.request_for(study, patches, background, "target", seed=3)
    np.testing.assert_array_equal(target.histogram, lesion_histograms(patches, 40))
    library = systems.request_for(study, patches, background, "library", seed=3)
    assert not (library.histogram == target.histogram).all(1).any()  # never a test nodule's own
    np.testing.assert_array_equal(library.seeds, target.seeds)
    assert len(set(library.seeds.tolist())) == 3
    assert not np.array_equal(library.seeds, systems.request_for(study, patches, background, seed=4).seeds)
    np.testing.assert_array_equal(library.background, background.hu)


def test_histograms_of_the_embedded_library_are_of_the_subtype():
    sources = [choose_histogram("solid", 8.0, np.random.default_rng(i))[0] for i in range(10)]
    subtype = histogram_library().set_index("nodule_id").subtype
    assert set(subtype[sources]) == {"solid"} and len(set(sources)) > 1


def test_unknown_names_are_refused(study, asked):
    with pytest.raises(ValueError, match="unknown system 'gan'; choose one of autoencoder"):
        systems.synthesise(study, "gan", *asked)
    with pytest.raises(ValueError, match="unknown condition 'mine'"):
        systems.request_for(study, asked[1], study.backgrounds("test"), "mine")
