"""Each nodule encoded once: what the cache holds, what it is keyed by, and that it is whole or absent."""

import numpy as np
import pytest
import torch

from hrldm import paths
from hrldm.nodules.histograms import hu_histogram
from hrldm.train import latents
from tests import tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))


def build(model=None, patches=None, size=16, variants=3, seed=0):
    return latents.build_latents(model or tiny.autoencoder(), patches or tiny.patches(4), size, variants, 40, seed)


def folders():
    return sorted((paths.cache_dir() / "latents").iterdir())


def test_first_variant_is_the_posterior_of_the_middle_crop():
    model, patches = tiny.autoencoder(), tiny.patches(4)
    cache = build(model, patches)
    middle = patches.centred(16)
    mean, std = latents.encode_patches(model, middle.hu)
    torch.testing.assert_close(torch.from_numpy(cache.mean[:, 0].copy()), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(cache.std[:, 0].copy()), std, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(cache.mask[:, 0], middle.mask)
    assert cache.mean.shape == (4, 3, 4, 4, 4, 4) and cache.mask.shape == (4, 3, 16, 16, 16)
    np.testing.assert_array_equal(cache.histogram[1], hu_histogram(patches.hu[1][patches.mask[1]]))
    assert cache.subtype.tolist() == [0, 1, 2, 0]
    assert (cache.scale * np.asarray(cache.mean, np.float64)).std() == pytest.approx(1, abs=0.3)
    assert cache.scale**-2 == pytest.approx(np.mean(np.asarray(cache.mean, np.float64) ** 2))


def test_variants_are_turned_or_shifted_copies_of_the_same_lesion():
    patches = tiny.patches(6)
    cache = build(patches=patches)
    for i in range(6):
        volume = cache.mask[i].sum((1, 2, 3))
        assert volume[0] == patches.mask[i][4:20, 4:20, 4:20].sum()
        assert (volume[1:] > 0).all() and (volume[1:] <= patches.mask[i].sum()).all()
        assert not np.array_equal(cache.mean[i, 0], cache.mean[i, 1])


def test_arrays_are_memory_mapped_and_read_only():
    cache = build()
    for array in (cache.mean, cache.std, cache.mask):
        assert isinstance(array, np.memmap) and not array.flags.writeable


def test_found_again_by_weights_voxels_and_settings_alone(monkeypatch):
    first = build()
    monkeypatch.setattr(latents, "_encode_all", lambda *_: pytest.fail("encoded again"))
    again = build()
    np.testing.assert_array_equal(first.mean, again.mean)
    monkeypatch.undo()


@pytest.mark.parametrize("change", ["weights", "voxel", "mask", "seed", "variants", "size"])
def test_any_change_makes_a_cache_of_its_own(tmp_path, monkeypatch, change):
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path))
    build()
    patches = tiny.patches(4)
    if change == "voxel":
        patches.hu[2, 3, 3, 3] += 1
    if change == "mask":
        patches.mask[2, 12, 12, 12] ^= True
    model = tiny.autoencoder()
    if change == "weights":
        with torch.no_grad():
            model.net.post_quant_conv.conv.weight[0, 0] += 1e-6
    build(model, patches, **{"seed": {"seed": 1}, "variants": {"variants": 2}, "size": {"size": 12}}.get(change, {}))
    assert len(folders()) == 2


def test_killed_encoding_leaves_nothing_that_passes_for_whole(monkeypatch):
    real, calls = latents.encode_patches, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(latents, "encode_patches", dies)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert not folders()
    monkeypatch.setattr(latents, "encode_patches", real)
    cache = build()
    assert np.abs(cache.mean).reshape(4, -1).max(1).all()


def test_too_small_crops_are_named():
    with pytest.raises(ValueError, match="crops of 24 mm leave no room for shifted 20 mm"):
        build(size=20)
    assert build(size=20, variants=1).mean.shape[1] == 1


def test_encoding_does_not_depend_on_the_batch():
    model, hu = tiny.autoencoder(), tiny.patches(3, 16).hu
    whole, one = latents.encode_patches(model, hu, batch=3)[0], latents.encode_patches(model, hu, batch=1)[0]
    torch.testing.assert_close(whole, one, atol=1e-6, rtol=1e-5)
