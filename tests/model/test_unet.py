"""Conditions reach the noise predictor; no nodule loses its last latent voxel."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hrldm.model.histogram import HistogramConfig
from hrldm.model.unet import HistogramEmbedding, latent_masks
from hrldm.nodules.shapes import load_shapes
from hrldm.wheels import FetchError
from tests import tiny

SPACINGS = (0.5, 0.7, 1.25, 2.0, 2.5)


def inputs(n: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    h = torch.rand(n, 40, generator=g)
    return {
        "z_t": torch.randn(n, 4, 4, 4, 4, generator=g),
        "t": torch.full((n,), 500),
        "masks": torch.rand(n, 65, 4, 4, 4, generator=g),
        "subtype": torch.zeros(n, dtype=torch.long),
        "histogram": h / h.sum(1, keepdim=True),
    }


def test_every_condition_changes_the_predicted_noise():
    model, base = tiny.unet(), inputs()
    out = model(**base)
    assert out.shape == base["z_t"].shape
    changed = {
        "z_t": base["z_t"] + 1,
        "t": base["t"] + 100,
        "masks": 1 - base["masks"],
        "subtype": base["subtype"] + 1,
        "histogram": base["histogram"].flip(1),
    }
    for name, value in changed.items():
        assert (model(**(base | {name: value})) - out).abs().max() > 1e-5, name


def test_histogram_is_ignored_when_c_hist_is_off():
    model, base = tiny.unet(histogram__vector=False), inputs()
    assert torch.equal(model(**base), model(**(base | {"histogram": base["histogram"].flip(1)})))


def test_sample_does_not_depend_on_its_batch():
    model, both = tiny.unet(), inputs(2)
    alone = model(**{k: v[1:] for k, v in both.items()})
    torch.testing.assert_close(model(**both)[1:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("times_bins", [True, False])
def test_one_token_is_equation_3_and_attention_over_it_is_constant(times_bins):
    torch.manual_seed(0)
    embedding = HistogramEmbedding(HistogramConfig(times_bins=times_bins), 8)
    h = torch.rand(3, 40)
    w1, w2 = embedding.mlp[0], embedding.mlp[2]
    expected = F.linear(F.silu(F.linear(40 * h if times_bins else h, w1.weight, w1.bias)), w2.weight, w2.bias)
    torch.testing.assert_close(embedding(h), expected[:, None])
    query, value = torch.randn(3, 5, 8), embedding(h)
    attended = F.scaled_dot_product_attention(query, value, value)
    torch.testing.assert_close(attended, value.expand(-1, 5, -1))


def test_one_token_a_bin_and_other_counts_refused():
    tokens = HistogramEmbedding(HistogramConfig(tokens=40), 8)(torch.rand(2, 40))
    assert tokens.shape == (2, 40, 8)
    assert tiny.unet(histogram__tokens=40)(**inputs()).isfinite().all()
    with pytest.raises(ValueError, match="histogram.tokens must be 1"):
        HistogramEmbedding(HistogramConfig(tokens=7), 8)


def test_latent_masks_are_max_and_average_pool():
    mask = torch.zeros(1, 2, 8, 8, 8)
    mask[0, 0, 5, 2, 7] = 1
    mask[0, 1, :4, :4, :4] = 1
    m, condition = latent_masks(mask)
    assert m.shape == (1, 1, 2, 2, 2) and condition.shape == (1, 3, 2, 2, 2)
    assert m.nonzero()[:, 2:].tolist() == [[0, 0, 0], [1, 0, 1]]
    assert condition[0, 0, 1, 0, 1].item() == pytest.approx(1 / 64) and condition[0, 1, 0, 0, 0] == 1
    assert torch.equal(condition[:, 2:], m)


def test_detailed_mask_keeps_the_shape_within_a_latent_voxel():
    mask = (torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    coarse, fine, finest = (latent_masks(mask, detail)[1] for detail in (1, 2, 4))
    assert fine.shape == (2, 9, 2, 2, 2) and finest.shape == (2, 65, 2, 2, 2)
    torch.testing.assert_close(fine[:, :8].mean(1, keepdim=True), coarse[:, :1])
    assert torch.equal(finest[:, 64:], coarse[:, 1:])
    assert torch.equal(finest[0, :64, 1, 0, 1].reshape(4, 4, 4), mask[0, 0, 4:, :4, 4:])
    with pytest.raises(ValueError, match="mask_detail must divide 4"):
        latent_masks(mask, 3)


def test_template_is_an_input_of_its_own_in_the_network_and_in_its_linear_part():
    model, base = tiny.unet(histogram__template=True), inputs()
    picture = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    asked = base | {"masks": torch.cat([base["masks"], picture], 1)}
    other = base | {"masks": torch.cat([base["masks"], picture + 1], 1)}
    assert model(**asked).shape == base["z_t"].shape
    assert (model(**asked) - model(**other)).abs().max() > 1e-5
    model.linear.around.weight.normal_()
    assert (model.linear(**asked) - model.linear(**other)).abs().max() > 1e-3
    with pytest.raises(RuntimeError):
        model(**base)


def as_latent(mask: np.ndarray) -> torch.Tensor:
    """M of a mask of any shape, padded to a multiple of 4."""
    padded = np.pad(mask, [(0, -n % 4) for n in mask.shape])
    return latent_masks(torch.from_numpy(padded).float()[None, None])[0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_no_sphere_of_4_to_30_mm_loses_its_latent_mask(spacing):
    rng = np.random.default_rng(0)
    for diameter in (4, 4.5, 5, 6, 8, 10, 15, 20, 30):
        for centre in rng.uniform(-0.5, 0.5, (8, 3)):  # anywhere between the voxels
            half = int(diameter / spacing / 2) + 2
            grid = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 3, indexing="ij"), -1) - centre
            mask = np.linalg.norm(grid * spacing, axis=-1) <= diameter / 2
            m = as_latent(mask)
            assert m.sum() >= mask.sum() / 64  # every lesion voxel lies under a latent one
            assert m.any()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_no_library_shape_loses_its_latent_mask(spacing):
    try:
        library = load_shapes()
    except FetchError as error:
        pytest.skip(str(error))
    lost_by_average = 0
    for mask, diameter in zip(library.masks, library.table.diameter_mm, strict=True):
        assert 5.9 <= diameter <= 30.1
        scales = [1 / spacing] + ([4 / diameter / spacing] if diameter < 7 else [])  # the smallest also at 4 mm
        for scale in scales:
            axes = [np.rint(np.arange(0, n - 1 + 1e-9, 1 / scale)).astype(int) for n in mask.shape]
            coarse = mask[np.ix_(*axes)]
            if not coarse.any():  # thinner than a voxel: the voxel that holds most of it stands for it
                at = np.rint(np.argwhere(mask).mean(0) * scale).astype(int)
                coarse[tuple(at.clip(0, np.array(coarse.shape) - 1))] = True
            m = as_latent(coarse)
            assert m.any()
            padded = np.pad(coarse, [(0, -n % 4) for n in coarse.shape])
            average = F.avg_pool3d(torch.from_numpy(padded).float()[None, None], 4)
            assert torch.equal(average > 0, m > 0)
            lost_by_average += not bool((average > 0.5).any())
    if spacing == 2.5:
        assert lost_by_average > 50  # why M is no thresholded average
