"""Extractors load exactly what they say, see slices as a radiologist does, and never forget HU offsets."""

import dataclasses

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet50
from torch import nn
from torch.nn import functional as F

from hrldm import paths
from hrldm.model.perceptual import EfficientNetLite0, PerceptualLoss
from hrldm.wheels import FetchError, wheel_file
from study.measure import features as ft

# from the reference implementation, efficientnet_lite_pytorch 0.1.0 with the same weights, on `waves()`
REFERENCE = {100: 0.189065, 900: 3.913571}
REFERENCE_NORM, REFERENCE_SUM = 51.539165, 738.504578
# norm, channel 100 and sum of `reference_resnet50` with `seeded_state`, on `waves()`
RECORDED = {False: (7949.527, 350.769, 274036.844), True: (4022.41, 7.8, 137870.469)}


@pytest.fixture(scope="module")
def weights():
    try:
        return wheel_file(*ft.LITE0)
    except FetchError as error:
        pytest.skip(f"EfficientNet-Lite0 weights cannot be fetched here: {error}")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def waves() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return ((torch.sin(x / 5) + torch.cos(y / 7)) / 4 + 0.5)[None, None]


def test_lite0_equals_the_reference_implementation(weights):
    net = EfficientNetLite0(weights)
    with torch.no_grad():
        out = net(waves())[0]
    assert out.shape == (1280,)
    assert out.norm().item() == pytest.approx(REFERENCE_NORM, rel=1e-4)
    assert out.sum().item() == pytest.approx(REFERENCE_SUM, rel=1e-4)
    for channel, value in REFERENCE.items():
        assert out[channel].item() == pytest.approx(value, abs=1e-3)


def test_lite0_stays_frozen_whatever_its_owner_does(weights):
    owner = nn.Sequential(EfficientNetLite0(weights)).train()
    before = {k: v.clone() for k, v in owner.state_dict().items()}
    owner(torch.rand(4, 1, 32, 32))
    assert not any(p.requires_grad for p in owner.parameters())
    assert all(torch.equal(v, before[k]) for k, v in owner.state_dict().items())


def test_there_are_no_random_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        EfficientNetLite0(tmp_path / "absent.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the EfficientNet-Lite0 weights"):
        EfficientNetLite0(tmp_path / "other.pth")
    monkeypatch.setenv(paths.RADIMAGENET, str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=f"no such file; {paths.RADIMAGENET} must name"):
        ft.default_extractor()


def test_perceptual_loss_grows_with_damage_and_has_a_gradient(weights):
    loss = PerceptualLoss(weights, n_slices=2)
    generator = torch.Generator().manual_seed(0)
    y = F.avg_pool3d(torch.rand(1, 1, 28, 28, 28, generator=generator), 5, 1)
    noise = torch.randn(y.shape, generator=generator)
    assert loss(y, y).item() == 0
    mild, strong = (loss((y + s * noise).clamp(0, 1), y).item() for s in (0.02, 0.1))
    assert 0 < mild < strong
    x = (y + 0.05 * noise).requires_grad_()
    value = loss(x, y)
    value.backward()
    with torch.no_grad():
        stepped = loss(x - 0.5 * x.grad / x.grad.norm(), y)
    assert x.grad.isfinite().all() and stepped < value.detach()


def test_perceptual_loss_draws_slices_by_its_generator(weights):
    loss = PerceptualLoss(weights, n_slices=1, scale=1)
    x, y = torch.rand(2, 1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    one, same, other = (loss(x, y, torch.Generator().manual_seed(s)).item() for s in (3, 3, 4))
    assert one == same != other
    with pytest.raises(ValueError, match="one shape"):
        loss(x, y[..., :8])


def test_window_is_fixed_and_keeps_an_offset():
    for hu, seen in ((-3000, 0), (-1000, 0), (-300, 0.5), (400, 1), (2000, 1)):
        assert (ft.plane_images(np.full((1, 8, 8, 8), hu), "axial", 1) == seen).all()
    crop = np.random.default_rng(0).uniform(-800, 0, (1, 8, 8, 8))
    shift = ft.plane_images(crop + 50, "axial", 3) - ft.plane_images(crop, "axial", 3)
    np.testing.assert_allclose(shift, 50 / 1400, atol=1e-6)


@pytest.mark.parametrize(
    "plane, corners",  # voxel x y z of the upper left, upper right and lower right pixel of the middle slice, side 8
    [("axial", (774, 74, 4)), ("sagittal", (477, 407, 400)), ("coronal", (747, 47, 40))],
)
def test_planes_are_shown_as_a_radiologist_sees_them(plane, corners):
    x, y, z = np.indices((8, 8, 8))
    image = ft.plane_images((100 * x + 10 * y + z - 1000)[None], plane, 3)[0, 1] * 1400
    assert tuple(image[[0, 0, -1], [0, -1, -1]].round()) == corners


@pytest.mark.parametrize(
    "crops, n_slices, said",
    [
        (np.zeros((1, 8, 8, 4)), 1, r"\(N, D, D, D\)"),
        (np.zeros((1, 8, 8, 8)), 9, "9 slices do not fit"),
        (np.zeros((1, 8, 8, 8)), 0, "0 slices do not fit"),
        (np.full((1, 8, 8, 8), np.nan), 1, "finite"),
    ],
    ids=["no cube", "too many slices", "no slice", "NaN"],
)
def test_bad_crops_are_named(crops, n_slices, said):
    with pytest.raises(ValueError, match=said):
        ft.plane_images(crops, "axial", n_slices)


def test_lite0_is_the_second_opinion_where_the_user_has_radimagenet(weights, trunk, tmp_path, monkeypatch):
    monkeypatch.delenv(paths.RADIMAGENET, raising=False)
    assert [e.name for e in ft.extractors()] == ["efficientnet-lite0"]
    torch.save(seeded_state(trunk, biases=True), tmp_path / "notop.pth")
    monkeypatch.setenv(paths.RADIMAGENET, str(tmp_path / "notop.pth"))
    assert [e.name for e in ft.extractors()] == ["radimagenet-resnet50", "efficientnet-lite0"]


def test_features_do_not_depend_on_the_batch(weights, monkeypatch):
    monkeypatch.delenv(paths.RADIMAGENET, raising=False)
    extractor = dataclasses.replace(ft.default_extractor(), size=32)
    assert extractor.name == "efficientnet-lite0"
    crops = np.random.default_rng(2).uniform(-1000, 300, (3, 16, 16, 16))
    monkeypatch.setattr(ft, "BATCH", 4)
    a = ft.three_plane_features(crops, extractor, n_slices=2)
    assert set(a) == set(ft.PLANES) and a["axial"].shape == (3, 2, 1280) and a["axial"].dtype == np.float32
    alone = ft.three_plane_features(crops[1:2], extractor, n_slices=2)
    for plane in ft.PLANES:
        np.testing.assert_allclose(a[plane][1], alone[plane][0], atol=1e-4)


def reference_resnet50(state: dict, x: torch.Tensor, keras: bool) -> torch.Tensor:
    """ResNet-50 written out from its definition: Keras' (v1, biases) or torchvision's (v1.5)."""

    def conv_bn(x, conv, bn, stride=1, padding=0):
        x = F.conv2d(x, state[f"{conv}.weight"], state.get(f"{conv}.bias"), stride, padding)
        mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{bn}.weight"], state[f"{bn}.bias"], eps=1.001e-5 if keras else 1e-5)

    x = F.max_pool2d(conv_bn(x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for i in range(blocks):
            at, stride = f"layer{layer}.{i}", 2 if i == 0 and layer > 1 else 1
            first, second = (stride, 1) if keras else (1, stride)
            h = conv_bn(x, f"{at}.conv1", f"{at}.bn1", first).relu()
            h = conv_bn(conv_bn(h, f"{at}.conv2", f"{at}.bn2", second, 1).relu(), f"{at}.conv3", f"{at}.bn3")
            x = conv_bn(x, f"{at}.downsample.0", f"{at}.downsample.1", stride) if i == 0 else x
            x = (x + h).relu()
    return x.mean((-2, -1))


def seeded_state(trunk: nn.Module, biases: bool) -> dict[str, torch.Tensor]:
    """Weights by NumPy's generator, key by key in alphabetical order, on the scale of a trained network."""
    shapes = {k: v.shape for k, v in trunk.state_dict().items() if "num_batches" not in k}
    if biases:
        shapes |= {f"{k}.bias": m.weight.shape[:1] for k, m in trunk.named_modules() if isinstance(m, nn.Conv2d)}
    rng, state = np.random.default_rng(0), {}
    for key in sorted(shapes):
        x = rng.normal(size=shapes[key])
        if len(shapes[key]) == 4:
            x = x * np.sqrt(2 / np.prod(shapes[key][1:]))
        elif key.endswith(("running_var", "weight")):
            x = 1 + 0.2 * np.tanh(x)
        else:
            x = 0.1 * x
        state[key] = torch.from_numpy(x).float()
    return state


@pytest.fixture(scope="module")
def trunk():
    """A MONAI ResNet-50 in torchvision's layout with random weights: stands in for the files nobody may ship."""
    torch.manual_seed(0)
    net = resnet50(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False)
    return net.eval()


def test_radimagenet_pytorch_release_is_recognised_and_normalised(trunk, tmp_path):
    names = {v: k for k, v in ft._SEQUENTIAL.items()}
    state = {}
    for key, value in trunk.state_dict().items():
        head, rest = key.split(".", 1)
        state[f"backbone.{names[head]}.{rest}"] = value
    assert len(state) == 318
    torch.save(state, tmp_path / "ResNet50.pt")
    net = ft.radimagenet_resnet50(tmp_path / "ResNet50.pt")
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = trunk((images.mul(255).sub(127.5).div(127.5)).repeat(1, 3, 1, 1))
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    del state["backbone.7.2.bn3.weight"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"(?s)broken\.pt.*layer4\.2\.bn3\.weight"):
        ft.radimagenet_resnet50(tmp_path / "broken.pt")


def test_radimagenet_keras_conversion_keeps_its_biases_and_strides(trunk, tmp_path):
    generator = torch.Generator().manual_seed(1)
    state = dict(trunk.state_dict())
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            state[f"{name}.bias"] = torch.randn(module.out_channels, generator=generator) * 0.3
    torch.save(state, tmp_path / "RadImageNet-ResNet50_notop.pth")
    net = ft.radimagenet_resnet50(tmp_path / "RadImageNet-ResNet50_notop.pth")
    images = torch.rand(2, 1, 64, 64, generator=generator)
    bgr = images - torch.tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(net(images), reference_resnet50(state, bgr, keras=True), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keras", [False, True], ids=["PyTorch release", "Keras conversion"])
def test_radimagenet_gives_the_recorded_features_of_seeded_weights(trunk, tmp_path, keras):
    state = seeded_state(trunk, biases=keras)
    names = {v: k for k, v in ft._SEQUENTIAL.items()}
    stored = (
        state if keras else {f"backbone.{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in state.items()}
    )
    torch.save(stored, tmp_path / "file.pth")
    with torch.no_grad():
        out = ft.radimagenet_resnet50(tmp_path / "file.pth")(waves())[0]
        images = (
            waves() - torch.tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)
            if keras
            else (2 * waves() - 1).repeat(1, 3, 1, 1)
        )
        torch.testing.assert_close(out, reference_resnet50(state, images, keras)[0], rtol=1e-3, atol=1e-3)
    assert (out.norm().item(), out[100].item(), out.sum().item()) == pytest.approx(RECORDED[keras], rel=1e-3)


def test_a_file_of_neither_layout_is_refused(trunk, tmp_path, monkeypatch):
    torch.save(trunk.state_dict(), tmp_path / "imagenet.pth")  # torchvision's own keys: not RadImageNet
    monkeypatch.setenv(paths.RADIMAGENET, str(tmp_path / "imagenet.pth"))
    with pytest.raises(ValueError, match="neither RadImageNet"):
        ft.default_extractor()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth"):
        ft.radimagenet_resnet50(tmp_path / "text.pth")
