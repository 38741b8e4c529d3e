"""Presets: every one consistent; that of the paper is compared with its sentences in `report/test_settings.py`."""

import dataclasses

import pytest

from hrldm.config import changed
from hrldm.train.config import Stage2
from study.profiles import PROFILES, get_profile


def test_epochs_become_steps_over_the_nodules_there_are():
    paper = get_profile("paper")
    assert paper.for_nodules(2950).ldm.steps == 590_000 and paper.for_nodules(100).ldm.steps == 20_000
    assert changed(paper, ldm__batch=3).for_nodules(100).ldm.steps == 6667
    assert get_profile("quick").for_nodules(7) == get_profile("quick")
    for steps, epochs in ((0, 0), (5, 5)):
        with pytest.raises(ValueError, match=f"ldm.steps={steps} and ldm.epochs={epochs}: give one"):
            changed(paper, ldm__steps=steps, ldm__epochs=epochs).for_nodules(7)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_consistent(name):
    p = get_profile(name)
    assert p.name == name and list(PROFILES) == ["smoke", "quick", "gpu", "paper"]
    levels = len(p.unet.channels)
    assert len(p.unet.attention) == levels
    assert p.data.patch_mm % (4 * 2 ** (levels - 1)) == 0  # the latent halves at each level of the U-Net
    assert all(c % p.unet.norm_groups == 0 for c in p.unet.channels)
    attended = [c for c, a in zip(p.unet.channels, p.unet.attention, strict=True) if a]
    assert attended and all(c % p.unet.head_channels == 0 for c in attended)
    assert p.sampling.sampler != "ddpm" or p.sampling.steps == p.diffusion.timesteps
    assert p.vae.patch % 4 == 0 and p.downstream.crop_mm <= 2 * p.data.patch_mm and p.histogram.max_voxels % 4 == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown profile 'fast'; choose one of smoke, quick, gpu, paper"):
        get_profile("fast")
    with pytest.raises(ValueError, match="unknown setting 'lamda_hist'"):
        get_profile("quick", lamda_hist=0.0)


def test_l_hist_is_not_silently_left_out_of_a_rectified_flow():
    with pytest.raises(ValueError, match=r"L_hist is defined by Eq\. 6.*histogram\.weight=0"):
        get_profile("quick", "diffusion.objective=rflow")
    flow = get_profile("quick", "diffusion.objective=rflow histogram.weight=0")
    assert flow.diffusion.objective == "rflow" and flow.histogram.weight == 0


def test_changed_settings_have_a_name_and_a_folder_of_their_own():
    plain, one = get_profile("quick", "  "), get_profile("quick", "histogram.weight=0 ldm.steps=7")
    same, other = get_profile("quick", "ldm.steps=7  histogram.weight=0"), get_profile("quick", "ldm.steps=7")
    assert plain == PROFILES["quick"] and one.name == same.name and len({plain.name, one.name, other.name}) == 3
    assert one.name.startswith("quick-") and (one.histogram.weight, one.ldm.steps) == (0.0, 7)


def test_what_a_network_is_trained_by_is_in_its_key_and_nothing_else():
    """No list of names is kept by hand, so a new field cannot be forgotten."""
    p = get_profile("quick")
    for part in (f.name for f in dataclasses.fields(p) if dataclasses.is_dataclass(getattr(p, f.name))):
        for field in dataclasses.fields(getattr(p, part)):
            other = dataclasses.replace(p, **{part: dataclasses.replace(getattr(p, part), **{field.name: "other"})})
            counts = part in {f.name for f in dataclasses.fields(Stage2)}
            assert (other.stage2() != p.stage2()) == counts, (part, field.name)
