"""What a system costs: calls and parameters counted, training as logged."""

import pytest

from study import study as runs
from study.measure.cost import costs
from study.systems.lesion_diffusion import LesionDiffusion
from study.systems.registry import request_for
from tests import tiny


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    root = tiny.manifest(tmp_path / "data", {"train": 6, "test": 2})
    study = runs.open_study(tiny.profile(data__patch_mm=24, ldm__steps=2, sampling__steps=3), "mine", str(root))
    vars(study)["autoencoder"] = tiny.autoencoder()
    return study


def test_calls_are_those_of_one_nodule_and_training_is_as_logged(study):
    request = request_for(study, study.patches("test"), study.backgrounds("test"))
    table = costs(study, request, ["diff-tumor", "lesion-diffusion", "hr-ldm", "energy"]).set_index("system")
    assert table.network_calls.to_dict() == {"diff-tumor": 4, "lesion-diffusion": 200, "hr-ldm": 3, "energy": 3}
    assert (table.updates == 2).all() and (table.training_min > 0).all() and (table.time_s > 0).all()
    network = LesionDiffusion.network(study.profile, study.autoencoder.latent_channels)
    assert table.parameters["lesion-diffusion"] == sum(p.numel() for p in network.parameters())
    assert table.parameters["energy"] == table.parameters["hr-ldm"]
