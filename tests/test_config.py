"""Profiles: the paper's numbers verbatim, misspelt names refused, digests that notice every change."""

import dataclasses

import pytest

from hrldm.config import PROFILES, SIZE_BINS_MM, SUBTYPES, get_profile


def test_paper_profile_carries_the_papers_settings():
    p = get_profile("paper")
    assert (p.num_train_timesteps, p.beta_start, p.beta_end) == (1000, 0.0015, 0.0195)
    assert (p.lambda_hist, p.hist_bins, p.hist_t_max, p.hist_tokens) == (10.0, 40, None, 1)
    assert (p.ldm_lr, p.ldm_batch, p.ldm_steps) == (1e-5, 1, 200 * p.n_train)
    assert (p.cls_crop_mm, p.cls_batch, p.cls_lr, p.cls_epochs, p.cls_folds) == (90, 2, 1e-4, 100, 5)
    assert p.cls_arch == "densenet121" and p.sampler == "ddpm" and p.sample_steps == 1000
    assert (p.background, p.objective) == ("paper", "ddpm")
    assert SUBTYPES == ("solid", "part-solid", "ground-glass") and SIZE_BINS_MM[0][0] == 6 and SIZE_BINS_MM[-1][1] == 30


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_consistent(name):
    p = get_profile(name)
    assert p.name == name and list(PROFILES) == ["smoke", "quick", "gpu", "paper"]
    levels = len(p.unet_channels)
    assert len(p.unet_attention) == levels
    assert p.patch_mm % (4 * 2 ** (levels - 1)) == 0  # the latent halves at each level of the U-Net
    assert all(c % p.unet_norm_groups == 0 for c in p.unet_channels)
    attended = [c for c, a in zip(p.unet_channels, p.unet_attention, strict=True) if a]
    assert attended and all(c % p.unet_head_channels == 0 for c in attended)
    assert p.sampler != "ddpm" or p.sample_steps == p.num_train_timesteps
    assert p.ae_patch % 4 == 0 and p.cls_crop_mm <= 2 * p.patch_mm and p.hist_max_voxels % 4 == 0


def test_overrides_change_their_field_only():
    changed = get_profile("quick", lambda_hist=0.0, ldm_steps=7)
    assert (changed.lambda_hist, changed.ldm_steps) == (0.0, 7)
    assert dataclasses.replace(changed, lambda_hist=10.0, ldm_steps=get_profile("quick").ldm_steps) == get_profile(
        "quick"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.lambda_hist = 1.0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown profile 'fast'; choose one of smoke, quick, gpu, paper"):
        get_profile("fast")
    with pytest.raises(ValueError, match=r"unknown profile field\(s\) \['lamda_hist'\]"):
        get_profile("quick", lamda_hist=0.0)


def test_digest_notices_the_named_fields_only():
    a, b = get_profile("quick"), get_profile("quick", lambda_hist=1.0)
    assert a.digest() != b.digest() and a.digest("lambda_hist") != b.digest("lambda_hist")
    assert a.digest("ldm_steps", "ldm_lr") == b.digest("ldm_steps", "ldm_lr")
    assert a.digest() == get_profile("quick").digest()
