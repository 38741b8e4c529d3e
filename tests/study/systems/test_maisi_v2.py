"""MAISI-v2: labels by a control branch beside a frozen U-Net, the lesion's weight, the contrastive term, a window from noise."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from hrldm.insertion.generator import Request
from hrldm.model.diffusion import randn_like
from hrldm.model.unet import latent_masks
from hrldm.model.window import lesion_window
from hrldm.train.latents import mask_tensor
from hrldm.train.ldm import Batches
from study import study as runs
from study.systems import peer
from study.systems.maisi_v2 import ControlledUNet, MaisiV2, bit_planes, region_contrast, weighted_l1
from tests import tiny

CHANNELS = 4
STEPS = 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(awake: bool = False) -> ControlledUNet:
    torch.manual_seed(0)
    net = ControlledUNet(tiny.profile(), CHANNELS)
    return (tiny.wake(net) if awake else net).eval()


def inputs(side: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and the labels of two balls."""
    mask = mask_tensor(np.stack([tiny.ball(4 * side, 4)] * 2))
    return noise(2, CHANNELS, side, side, side), torch.tensor([10.0, 900.0]), bit_planes(mask, torch.tensor([0, 2]))


def ball_request(n: int = 2, size: int = 24) -> Request:
    made = tiny.patches(n, size)
    background = np.random.default_rng(1).normal(-850, 60, made.hu.shape).astype(np.int16)
    return Request(background, made.mask, made.subtype, np.full((n, 40), 1 / 40), np.arange(n))


def system(net: nn.Module, steps: int = 3) -> MaisiV2:
    p = tiny.profile(sampling__steps=steps)
    return MaisiV2(tiny.autoencoder(), net, 0.8, p, p.sampling)


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subtype", "bits"), [(0, (1, 0)), (1, (0, 1)), (2, (1, 1))])
def test_a_lesion_is_the_binary_number_of_its_subtype_and_all_else_zero(subtype, bits):
    mask = mask_tensor(tiny.ball(8, 2)[None])
    planes = bit_planes(mask, torch.tensor([subtype]))
    assert planes.shape == (1, 2, 8, 8, 8)
    for plane, bit in zip(planes[0], bits, strict=True):
        torch.testing.assert_close(plane, bit * mask[0, 0])


def test_labels_are_seen_at_the_resolution_of_voxels():
    net, (x, t, labels) = network(awake=True), inputs()
    cut = labels.clone()
    cut[:, :, 8, 8, 12] = 0  # one voxel at the ball's edge
    with torch.no_grad():
        assert (net(x, t, labels) - net(x, t, cut)).abs().max() > 1e-6


# -- losses by hand ----------------------------------------------------------------------------------------------------


def test_a_lesion_voxel_weighs_a_hundred_others_in_the_mean_of_the_whole_window():
    m = torch.zeros(1, 1, 2, 2, 2)
    m[..., 0, 0, 0] = 1
    target = noise(1, CHANNELS, 2, 2, 2)
    assert weighted_l1(target + 1, target, m).item() == pytest.approx((100 + 7) / 8)
    assert weighted_l1(target - 0.5 * (1 - m), target, m).item() == pytest.approx(0.5 * 7 / 8)
    assert weighted_l1(target + 0.5 * m, target, m).item() == pytest.approx(0.5 * 100 / 8)


@pytest.mark.parametrize(
    ("where", "error", "expected"),
    [
        ("lesion", 0.5, -0.5),  # the label matters in the lesion
        ("lesion", -1.5, -1.5),
        ("lesion", 7.0, -2.0),  # enough
        ("rim", 7.0, 0.0),
        ("outside", 0.5, 0.5),  # without the label, what is far from the lesion is still predicted
        ("outside", 7.0, 7.0),
    ],
)
def test_contrast_falls_within_the_lesion_to_its_floor_and_rises_outside_the_dilated_lesion(where, error, expected):
    m, near = torch.zeros(2, 1, 1, 5, 5, 5)
    m[..., 2, 2, 2] = 1
    near[..., 1:4, 1:4, 1:4] = 1
    place = {"lesion": m, "rim": near - m, "outside": 1 - near}[where]
    target = noise(1, CHANNELS, 5, 5, 5)
    got = region_contrast(target, target + error * place, target, m).item()
    assert got == pytest.approx(expected, abs=1e-4)


def test_contrast_without_anything_outside_is_finite_and_stops_pulling_at_the_floor():
    m = torch.ones(1, 1, 2, 2, 2)
    for size, pulls in ((1.0, True), (3.0, False)):
        v = torch.full((1, CHANNELS, 2, 2, 2), size, requires_grad=True)
        region_contrast(v, torch.zeros_like(v), noise(1, CHANNELS, 2, 2, 2), m).backward()
        assert bool((v.grad < 0).all()) == pulls and bool(v.grad.any()) == pulls


# -- the control branch ------------------------------------------------------------------------------------------------


def test_control_branch_begins_as_a_copy_of_the_encoder_that_adds_nothing():
    net, (x, t, labels) = network(), inputs()
    tiny.wake(net.unet)
    net.begin_control()
    own, control = net.unet.state_dict(), net.control.state_dict()
    shared = own.keys() & control.keys()
    assert {name.split(".")[0] for name in shared} == {"conv_in", "time_embed", "down_blocks", "middle_block"}
    assert all(torch.equal(own[name], control[name]) for name in shared)
    with torch.no_grad():
        assert net(x, t).any() and torch.equal(net(x, t, labels), net(x, t))


def test_a_control_branch_that_was_trained_before_is_kept():
    net = network(awake=True)
    before = {k: v.clone() for k, v in net.control.state_dict().items()}
    net.begin_control()
    assert all(torch.equal(v, before[k]) for k, v in net.control.state_dict().items())


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRLDM_CACHE", str(folder / "cache"))
        (folder / "data").mkdir()
        root = tiny.manifest(folder / "data", {"train": 6, "test": 3})
        study = runs.open_study(tiny.profile(data__patch_mm=24, ldm__steps=STEPS), "mine", str(root))
        study.__dict__["autoencoder"] = tiny.autoencoder()
        yield study


def parts(net: ControlledUNet) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights of the U-Net, and of the control branch."""
    return tuple(nn.utils.parameters_to_vector(p.parameters()).detach().cpu().clone() for p in (net.unet, net.control))


def test_first_half_trains_the_unet_alone_and_second_half_the_control_branch_alone(study, tmp_path):
    net, config = network(), study.profile
    steps = peer._train(MaisiV2, net, study.latents("train"), config, 0, tmp_path / "peer.safetensors")
    states = [(parts(net), {})]
    for state in steps:
        states.append((parts(net), state.metrics))
        if state.step == STEPS // 2 + 1:  # one update from the copy
            start, lr = net.unet.conv_in.conv.weight, config.ldm.lr
            torch.testing.assert_close(net.control.conv_in.conv.weight, start, atol=lr, rtol=0)
    assert len(states) == STEPS + 1
    for step in range(STEPS):
        ((unet, control), _), ((unet_after, control_after), losses) = states[step : step + 2]
        first = step < STEPS // 2
        assert torch.equal(unet, unet_after) != first
        assert torch.equal(control, control_after) == first
        assert losses.keys() == ({"flow"} if first else {"flow", "contrast"})
    (x, t, labels), net = inputs(), net.cpu()
    with torch.no_grad():
        assert (net(x, t, labels) - net(x, t)).abs().max() > 0  # and so it answers to labels


def test_losses_are_of_the_flow_between_latents_and_noise(study):
    """A network that answers with x alone, so that the loss is known."""

    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.times = nn.Identity(), None

        def begin_control(self) -> None:
            pass

        def forward(self, x, t, labels=None):
            self.times = t
            return x if labels is None else x + labels.mean((1, 2, 3, 4)).view(-1, 1, 1, 1, 1)

    batches = Batches(study.latents("train"), study.profile)
    batch, echo = batches.draw(np.random.default_rng(0)), Echo()
    tau = ((batch["t"] + 1) / 1000).view(-1, 1, 1, 1, 1)
    x = (1 - tau) * batch["z0"] + tau * batch["eps"]
    target = batch["z0"] - batch["eps"]
    first = MaisiV2.losses(echo, batch | {"step": 0}, study.profile)
    assert first["flow"].item() == pytest.approx((x - target).abs().mean().item(), rel=1e-5)
    assert torch.equal(echo.times, batch["t"] + 1)
    second = MaisiV2.losses(echo, batch | {"step": STEPS // 2}, study.profile)
    push = bit_planes(batch["mask"], batch["subtype"]).mean((1, 2, 3, 4))
    v = x + push.view(-1, 1, 1, 1, 1)
    assert second["flow"].item() == pytest.approx(weighted_l1(v, target, batch["m"]).item(), rel=1e-5)
    expected = 0.01 * region_contrast(v, x, target, batch["m"])  # without labels, x again
    assert second["contrast"].item() == pytest.approx(expected.item(), rel=1e-5)


# -- sampling ----------------------------------------------------------------------------------------------------------


class Towards(nn.Module):
    """The exact velocity of a flow that ends at one value: (z0 - x) / tau."""

    def __init__(self, z0: float) -> None:
        super().__init__()
        self.z0, self.times = z0, []

    def forward(self, x, t, labels):
        self.times.append(float(t[0]))
        return (self.z0 - x) / (t / 1000).view(-1, 1, 1, 1, 1)


class Constant(nn.Module):
    def forward(self, x, t, labels):
        return torch.ones_like(x)


def denoised(made: MaisiV2, request: Request, z_bg: torch.Tensor) -> list:
    return list(made.denoise(request, z_bg, mask_tensor(request.mask)))


@pytest.mark.parametrize(("asked", "taken"), [(4, 4), (25, 25), (30, 30), (1000, 30)])
def test_euler_takes_at_most_thirty_steps_that_sum_to_one(asked, taken):
    request, z_bg = ball_request(), torch.zeros(2, CHANNELS, 6, 6, 6)
    exact = Towards(0.7)
    last = denoised(system(exact, asked), request, z_bg)[-1]
    torch.testing.assert_close(last.z, torch.full_like(z_bg, 0.7))
    np.testing.assert_allclose(exact.times, 1000 * np.linspace(1, 0, taken, endpoint=False))
    states = denoised(system(Constant(), asked), request, z_bg)
    begun = randn_like(z_bg, [torch.Generator().manual_seed(int(s)) for s in request.seeds])
    torch.testing.assert_close(states[-1].z, begun + 1)  # of steps that sum to one, from noise everywhere
    assert len(states) == states[-1].total == taken


def test_background_is_made_anew_whatever_it_was():
    request, made = ball_request(), system(network(awake=True))
    z_bg = noise(2, CHANNELS, 6, 6, 6, seed=5)
    z = denoised(made, request, z_bg)[-1].z
    assert torch.equal(z, denoised(made, request, z_bg + 3)[-1].z)
    outside = latent_masks(mask_tensor(request.mask))[0].expand_as(z) == 0
    assert outside.any() and (z != z_bg)[outside].all()
    alone = denoised(made, request[1:], z_bg[1:])[-1].z
    torch.testing.assert_close(alone, z[1:], atol=1e-5, rtol=1e-4)  # the same nodule in any batch


def test_subtype_is_what_the_network_is_told():
    request, made = ball_request(), system(network(awake=True))
    z_bg = torch.zeros(2, CHANNELS, 6, 6, 6)
    other = dataclasses.replace(request, subtype=(request.subtype + 1) % 3, histogram=request.histogram[:, ::-1])
    same = dataclasses.replace(request, histogram=request.histogram[:, ::-1])
    z = denoised(made, request, z_bg)[-1].z
    assert torch.equal(denoised(made, same, z_bg)[-1].z, z)
    assert not torch.equal(denoised(made, other, z_bg)[-1].z, z)


def test_study_makes_whole_windows_and_pastes_lesions_alone(study):
    patches, background = study.patches("test"), study.backgrounds("test").hu
    histogram = study.library_histograms(patches, 0)
    request = Request(background, patches.mask, patches.subtype, histogram, np.arange(3))
    made = peer.trained(study, MaisiV2)
    pasted, whole = made(request), made(request, paste=False)
    np.testing.assert_array_equal(peer.trained(study, MaisiV2)(request), pasted)
    for before, after, window, mask in zip(background, pasted, whole, patches.mask, strict=True):
        changed = after != before
        assert (changed & mask).sum() > 0.8 * mask.sum()
        assert not changed[ndimage.distance_transform_edt(~mask) > 5].any()
        place = lesion_window(mask, made.config.unet.context, 2).voxels
        shell = ~changed[place]
        assert shell.any() and (window[place] != before[place])[shell].mean() > 0.9
    z, z_bg = made.latents(request), made._encoded(background)
    inside = [lesion_window(mask, made.config.unet.context, 2).latent for mask in patches.mask]
    for i, cut in enumerate(inside):
        assert (z[i][cut] != z_bg[i][cut]).all()
        assert (z[i] != z_bg[i]).sum() == z_bg[i][cut].numel()
