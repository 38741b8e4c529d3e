"""The wrapped MAISI VAE: D_trunc and the rest are the decoder, the linear skip is PCA, crops decode as in the whole."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch.distributions import Normal, kl_divergence

from hrldm.config import from_header
from hrldm.model import autoencoder as ae
from study.profiles import get_profile
from tests import tiny


def volumes(seed: int = 0, n: int = 3, size: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(n, 1, 4, 4, 4, generator=g), size=size, mode="trilinear")
    return 0.8 * smooth + 0.2 * torch.rand(n, 1, size, size, size, generator=g)


def blocks(x: torch.Tensor) -> np.ndarray:
    """(B, 1, D, H, W) -> its 4x4x4 blocks, one a row, by hand."""
    b, _, d, h, w = x.shape
    x = x.reshape(b, d // 4, 4, h // 4, 4, w // 4, 4).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, 64).double().numpy()


def test_hu_window():
    hu = np.array([-3000, -1000, 0, 250, 1000, 3000])
    x = ae.normalise_hu(hu)
    np.testing.assert_allclose(x, [0, 0, 0.5, 0.625, 1, 1])
    np.testing.assert_allclose(ae.denormalise_hu(x), [-1000, -1000, 0, 250, 1000, 1000], atol=1e-3)
    torch.testing.assert_close(ae.normalise_hu(torch.from_numpy(hu).float()), torch.from_numpy(x))


@pytest.mark.parametrize(
    "changes",
    [{}, {"autoencoder__linear_skip": False, "autoencoder__norm": True}, {"autoencoder__res_blocks": (1, 2, 1)}],
)
def test_decode_is_the_rest_after_the_truncated_decoder(changes):
    model = tiny.autoencoder(**changes)
    z = torch.randn(2, 4, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    features = model.decode_truncated(z)
    assert features.shape == (2, model.feature_channels, 16, 12, 20)  # full resolution
    assert torch.equal(model.decode_rest(features), model.decode(z))
    assert model.decode(z).std() > 0


@pytest.mark.parametrize("norm", [False, True])
def test_without_linear_skip_decode_is_monais(norm):
    model = tiny.autoencoder(autoencoder__linear_skip=False, autoencoder__norm=norm)
    z = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.decode(z), model.net.decode(z), atol=1e-5, rtol=1e-5)


def test_truncated_decoder_ends_at_the_penultimate_residual_block():
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock

    model = tiny.autoencoder(autoencoder__res_blocks=(2, 1, 1))
    stages = list(model.net.decoder.blocks)
    residual = [i for i, block in enumerate(stages) if isinstance(block, MaisiResBlock)]
    ran = []
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(stages)]
    model.decode_truncated(torch.zeros(1, 4, 2, 2, 2))
    for hook in hooks:
        hook.remove()
    assert ran == list(range(residual[-2] + 1))


def test_linear_code_without_overlap_is_pca():
    x = volumes()
    pca = PCA(4).fit(blocks(x))
    code = ae.LinearCode(4, overlap=False).fit(x)
    # a transposed convolution has one bias: the mean intensity stands for the mean block
    expected = pca.inverse_transform(pca.transform(blocks(x))) - (pca.mean_ - pca.mean_.mean())
    np.testing.assert_allclose(blocks(code.decode(code.analysis(x)).detach()), expected, atol=1e-5)


def test_overlapping_synthesis_is_the_ridge_regression_from_27_blocks():
    x = volumes(n=16)
    code = ae.LinearCode(4).fit(x)
    z = code.analysis(x).detach().numpy()
    rows, targets = [], []
    for b in range(len(x)):
        for i, j, k in np.ndindex(2, 2, 2):  # the blocks that have all 26 neighbours
            rows.append(z[b, :, i : i + 3, j : j + 3, k : k + 3].ravel())
            low = [4 * (n + 1) for n in (i, j, k)]
            targets.append(x[b, 0][tuple(slice(n, n + 4) for n in low)].numpy().ravel())
    bias = code.synthesis.bias.item()
    ridge = Ridge(1e-5 * len(rows), fit_intercept=False).fit(np.array(rows, float), np.array(targets, float) - bias)
    ours = blocks(code.decode(torch.from_numpy(z)).detach()[..., 4:-4, 4:-4, 4:-4])
    np.testing.assert_allclose(ours, ridge.predict(np.array(rows, float)) + bias, atol=2e-3)
    plain = ae.LinearCode(4, overlap=False).fit(x)
    inner = blocks(x[..., 4:-4, 4:-4, 4:-4])
    alone = blocks(plain.decode(plain.analysis(x)).detach()[..., 4:-4, 4:-4, 4:-4])
    assert ((ours - inner) ** 2).mean() < ((alone - inner) ** 2).mean()


def test_untrained_autoencoder_starts_exactly_at_its_linear_code():
    x = volumes()
    torch.manual_seed(0)
    model = ae.Autoencoder(tiny.profile().autoencoder)
    model.linear.fit(x)
    z = model.linear.analysis(x)
    assert torch.equal(model.encode(x)[0], z)
    assert torch.equal(model.decode(z), model.linear.decode(z))
    assert torch.equal(model.decode_truncated(z)[:, -1:], model.linear.decode(z))


def test_whitening_scales_the_components_between_pca_and_unit_variance():
    x = volumes(1)
    values = PCA(4).fit(blocks(x)).explained_variance_
    for whiten in (0.0, 0.5, 1.0):
        code = ae.LinearCode(4).fit(x, whiten)
        std = code.analysis(x).transpose(0, 1).flatten(1).std(1).detach().numpy()
        np.testing.assert_allclose(std, np.sqrt(values) ** (1 - whiten), rtol=0.02)
        assert (code.analysis(x + 0.1) - code.analysis(x))[:, 0].min() > 0  # brighter is larger


def test_crop_decodes_as_in_the_whole_without_group_norm_only():
    z = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    for norm in (False, True):
        model = tiny.autoencoder(autoencoder__norm=norm)
        whole = model.decode_truncated(z)[..., 28:36, 28:36, 28:36]
        crop = model.decode_truncated(z[..., 1:15, 1:15, 1:15])[..., 24:32, 24:32, 24:32]
        difference = (whole - crop).abs().max() / whole.std()
        assert (difference > 1e-3) if norm else (difference < 1e-4)


@pytest.mark.parametrize("shape", [(18, 16, 16), (16, 16, 13), (1, 16, 16)])
def test_sides_that_are_no_multiple_of_4_are_named(shape):
    with pytest.raises(ValueError, match="not a multiple of 4"):
        tiny.autoencoder().encode(torch.zeros(1, 1, *shape))


def test_other_than_three_levels_is_refused():
    with pytest.raises(ValueError, match="three levels"):
        ae.Autoencoder(ae.AutoencoderConfig(channels=(8, 16)))


def test_posterior_sample_follows_mean_and_deviation_and_its_generator():
    model, x = tiny.autoencoder(), volumes(3, 1)
    mu, sigma = model.encode(x)
    recon, mu2, sigma2 = model(x, torch.Generator().manual_seed(4))
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(mu, mu2) and torch.equal(sigma, sigma2) and (sigma > 0).all()
    assert torch.equal(recon, model.decode(mu + sigma * eps))


def test_kl_divergence_is_the_closed_form():
    g = torch.Generator().manual_seed(5)
    mu, sigma = torch.randn(3, 2, 4, 4, 4, generator=g), torch.rand(3, 2, 4, 4, 4, generator=g) + 0.1
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    torch.testing.assert_close(ae.kl_divergence(mu, sigma), expected)


@pytest.mark.parametrize("name", ["smoke", "quick", "gpu"])
def test_profile_rebuilds_from_its_json_architecture(name):
    config = get_profile(name).autoencoder
    again = from_header(ae.AutoencoderConfig, json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    model, again = ae.Autoencoder(config), ae.Autoencoder(again)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
