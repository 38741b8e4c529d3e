"""Stage II training: exact resumption, lambda = 0 is MAISI-DDPM bit for bit, and what L_hist reads."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrldm.model.diffusion import Schedule
from hrldm.model.unet import ConditionalUNet
from hrldm.model.window import lesion_window
from hrldm.nodules.histograms import hu_histogram
from hrldm.nodules.masks import solid_part
from hrldm.nodules.patches import Patches
from hrldm.train import checkpoint as ckpt
from hrldm.train import ldm, loop
from hrldm.train.device import device
from hrldm.train.histogram_term import HistogramTerm, lesion_cubes
from hrldm.train.latents import LatentCache, build_latents, encode_patches, mask_tensor, windowed
from hrldm.train.loop import DivergedError
from study.profiles import get_profile
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device(device())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> LatentCache:
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    return build_latents(tiny.autoencoder(), tiny.patches(6), 16, 2, 40, 0)


def train(cache, path, seed=0, save_every=2, initial=None, **changes):
    return ldm.train_ldm(
        cache, tiny.profile(**changes), seed, path, tiny.autoencoder(), save_every=save_every, initial=initial
    )


def finish(steps):
    return deque(steps, maxlen=1)[0]


def weights(path, group="model"):
    return ckpt.load(path)[0][group]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v.cpu(), b[k].cpu()) for k, v in a.items())


def test_divergence_is_named_and_keeps_the_checkpoint(cache, tmp_path):
    steps = train(cache, tmp_path / "a", save_every=1, ldm__lr=1e36)
    with pytest.raises(
        DivergedError, match=rf"diverged at step \d: inpaint .*{tmp_path / 'a'}, is kept.* mixed_precision"
    ):
        while True:
            next(steps)
            kept = (tmp_path / "a").read_bytes()
    assert (tmp_path / "a").read_bytes() == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes", [{}, {"mixed_precision": "bf16"}, {"diffusion__objective": "rflow", "histogram__weight": 0.0}]
)
def test_cuda_graphs_compute_what_single_launches_compute(cache, tmp_path, monkeypatch, changes):
    runs = {}
    for name, least in (("launches", 10**9), ("graphs", 1)):
        monkeypatch.setattr(ldm, "GRAPHED_FROM", least)
        runs[name] = [float(s.metrics["inpaint"]) for s in train(cache, tmp_path / name, **changes)]
    assert np.allclose(runs["graphs"], runs["launches"], rtol=1e-2 if changes.get("mixed_precision") else 1e-3)
    for key, value in weights(tmp_path / "graphs").items():
        assert torch.allclose(value.float(), weights(tmp_path / "launches")[key].float(), atol=1e-2), key


@pytest.mark.parametrize(
    ("kind", "processes", "total", "step", "captured"),
    [
        pytest.param("cpu", 1, 1000, 0, False, id="a CPU has none"),
        pytest.param("cuda", 2, 1000, 0, False, id="several processes"),
        pytest.param("cuda", 1, 199, 0, False, id="a short run"),
        pytest.param("cuda", 1, 200, 0, True, id="a long run"),
        pytest.param("cuda", 1, 200, 199, True, id="its last step, resumed"),
    ],
)
def test_a_run_is_captured_if_it_is_long_enough_as_a_whole(cache, monkeypatch, kind, processes, total, step, captured):
    asked = []
    monkeypatch.setattr(ldm, "graphed", lambda *given: asked.append(given) or "graphs")
    accelerator = SimpleNamespace(device=torch.device(kind), num_processes=processes)
    run = SimpleNamespace(accelerator=accelerator, total=total, meta={"step": step}, modules={"model": "net"})
    batches = ldm.Batches(cache, tiny.profile())
    assert ldm._graphs(run, batches, Schedule()) == ("graphs" if captured else None)
    if captured:
        [(net, examples, precision)] = asked
        assert (net, precision) == ("net", "no") and len(examples) == len(batches.groups)


# -- gradient scaling ------------------------------------------------------------------------------------------------------


def scaled(monkeypatch, init: float) -> None:
    """Losses scaled on a CPU, as `grad_scaler` does in fp16 on a GPU; the scale doubles every second step."""
    made = functools.partial(torch.amp.GradScaler, "cpu", init_scale=init, growth_interval=2)
    monkeypatch.setattr(loop, "grad_scaler", lambda precision, kind: made())


@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaling_a_loss_by_powers_of_two_changes_no_update_and_its_state_is_resumed(cache, tmp_path, monkeypatch, clip):
    finish(train(cache, tmp_path / "plain", ldm__clip=clip))
    scaled(monkeypatch, 256.0)
    finish(train(cache, tmp_path / "scaled", ldm__clip=clip))
    for key, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "scaled")[key], value, rtol=1e-5, atol=1e-7)
    killed = train(cache, tmp_path / "killed", ldm__clip=clip)
    for _ in range(3):
        next(killed)
    killed.close()
    finish(train(cache, tmp_path / "killed", ldm__clip=clip))
    assert same(weights(tmp_path / "scaled"), weights(tmp_path / "killed"))
    states = [ckpt.load_meta(tmp_path / name)["scaler"] for name in ("scaled", "killed")]
    assert states[0] == states[1] and states[0]["scale"] == 256 * 2**3


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(cache, tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0**127)
    start = ldm.built(tiny.profile(), 4).state_dict()
    finish(train(cache, tmp_path / "a", ldm__steps=1, initial=start))
    trained = weights(tmp_path / "a")
    assert all(torch.equal(trained[k], v) for k, v in start.items() if not k.startswith("linear."))
    assert ckpt.load_meta(tmp_path / "a")["scaler"]["scale"] == 2.0**126


def test_without_a_clip_and_a_warm_up_the_first_step_is_adams_own(cache, tmp_path):
    """Adam's first step is lr in every weight that has a gradient, whatever that gradient's size."""
    start = ldm.built(tiny.profile(), 4).state_dict()
    plain = {"ldm__steps": 1, "ldm__clip": None, "ldm__warm_up": 0, "ldm__lr": 1e-3}
    finish(train(cache, tmp_path / "a", initial=start, **plain))
    moved = (weights(tmp_path / "a")["net.out.2.conv.weight"] - start["net.out.2.conv.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)


# -- resumption ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"diffusion__objective": "rflow", "histogram__weight": 0.0}, {"latents__sample": True}]
)
def test_resumed_run_equals_uninterrupted(cache, tmp_path, changes):
    whole = [s.metrics for s in train(cache, tmp_path / "a", **changes)]
    killed = train(cache, tmp_path / "b", **changes)
    for _ in range(3):
        next(killed)
    killed.close()
    resumed = list(train(cache, tmp_path / "b", **changes))
    assert [s.step for s in resumed] == [3, 4, 5, 6]
    assert [s.metrics for s in resumed] == whole[2:]
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a", "ema"), weights(tmp_path / "b", "ema"))
    assert list(train(cache, tmp_path / "b", **changes)) == []


CHILD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from hrldm.train import ldm
from hrldm.train.device import device
from hrldm.train.latents import build_latents
from tests import tiny
model = tiny.autoencoder()
cache = build_latents(model, tiny.patches(6), 16, 2, 40, 0)
for state in ldm.train_ldm(cache, tiny.profile(ldm__steps=12), 0, Path(sys.argv[1]), model, save_every=1):
    print(state.step, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
def test_run_killed_by_sigkill_ends_in_the_same_weights(tmp_path):
    environment = os.environ | {"HRLDM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])  # conftest.py: notebooks

    def start(path, pause):
        command = [sys.executable, "-c", CHILD, str(path), str(pause)]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "a.safetensors", 0)
    assert len(whole.communicate()[0].split()) == 12
    killed = start(tmp_path / "b.safetensors", 0.05)
    while killed.stdout.readline().strip() != "4":
        assert killed.poll() is None
    time.sleep(0.08)  # somewhere within a later step
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    reached = ckpt.load_meta(tmp_path / "b.safetensors")["step"]
    assert 4 <= reached < 12
    resumed = start(tmp_path / "b.safetensors", 0)
    assert resumed.communicate()[0].split() == [str(s) for s in range(reached + 1, 13)]
    assert same(weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors"))
    assert same(weights(tmp_path / "a.safetensors", "ema"), weights(tmp_path / "b.safetensors", "ema"))


def test_checkpoint_of_other_settings_seed_or_latents_is_refused(cache, tmp_path):
    finish(train(cache, tmp_path / "a"))
    for changes, word in (({"ldm__lr": 1.0}, "digest"), ({"seed": 9}, "seed")):
        with pytest.raises(ckpt.CheckpointError, match=f"another run .*{word}"):
            next(train(cache, tmp_path / "a", **changes))
    fewer = build_latents(tiny.autoencoder(), tiny.patches(5), 16, 2, 40, 0)
    with pytest.raises(ckpt.CheckpointError, match="another run .*n is 6, not 5"):
        next(train(fewer, tmp_path / "a"))


def test_checkpoint_of_another_decoder_is_refused_where_l_hist_reads_it(cache, tmp_path):
    other = tiny.autoencoder()
    with torch.no_grad():
        for weight in other.net.decoder.parameters():
            weight.mul_(1.5)
    for name, value in (("a", 10.0), ("b", 0.0)):
        steps = train(cache, tmp_path / name, save_every=1, histogram__weight=value)
        next(steps)
        steps.close()
    with pytest.raises(ckpt.CheckpointError, match="a: L_hist read another decoder"):
        next(ldm.train_ldm(cache, tiny.profile(histogram__weight=10.0), 0, tmp_path / "a", other))
    assert next(ldm.train_ldm(cache, tiny.profile(histogram__weight=0.0), 0, tmp_path / "b", other)).step == 2


def test_same_seed_same_weights_other_seed_other_weights(cache, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finish(train(cache, tmp_path / name, seed, ldm__steps=2))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


# -- lambda = 0 ------------------------------------------------------------------------------------------------------------


def reference_ddpm(cache, profile, seed, steps) -> dict:
    """MAISI-DDPM written out: noise, Eq. 4, U-Net, masked L1 (Eq. 5), Adam. No histogram anywhere."""
    torch.manual_seed(seed)
    model = ldm.built(profile, cache.mean.shape[2]).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), profile.ldm.lr, fused=True)
    root = torch.linspace(profile.diffusion.beta_start**0.5, profile.diffusion.beta_end**0.5, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - root**2, 0).to(DEVICE)
    for step in range(steps):
        rng = np.random.default_rng((seed, step, 0))
        batch = ldm.Batches(cache, profile, DEVICE).draw(rng)
        z0, eps, t = batch["z0"], batch["eps"], batch["t"]
        a = abar[t].float().view(-1, 1, 1, 1, 1)
        m = torch.nn.functional.max_pool3d(batch["mask"], 4)
        z_in = m * (a.sqrt() * z0 + (1 - a).sqrt() * eps) + (1 - m) * z0
        condition = torch.cat([torch.nn.functional.avg_pool3d(batch["mask"], 4), m], 1)
        out = model(z_in, t, condition, batch["subtype"], batch["histogram"])
        target = eps if profile.diffusion.prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0
        error = (m * (target - out)).abs().flatten(1).sum(1) / (m.flatten(1).sum(1) + 1e-6)
        optimizer.param_groups[0]["lr"] = profile.ldm.lr * (1 - step / profile.ldm.steps) * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_lambda_0_is_the_maisi_ddpm_update_bit_for_bit(cache, tmp_path, prediction):
    plain = {
        "histogram__weight": 0.0,
        "diffusion__prediction": prediction,
        "unet__mask_detail": 1,
        "unet__linear_skip": False,
    }
    steps = train(cache, tmp_path / "a", save_every=3, **plain)
    states = [next(steps) for _ in range(3)]
    steps.close()
    assert all(set(s.metrics) == {"inpaint"} for s in states)
    profile = tiny.profile(**plain)
    expected = reference_ddpm(cache, profile, 0, 3)
    assert same(weights(tmp_path / "a"), expected)
    without = ldm.train_ldm(cache, profile, 0, tmp_path / "b", None, save_every=3)
    for _ in range(3):
        next(without)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_lambda_changes_neither_nodules_nor_times_nor_noise(cache, tmp_path, monkeypatch):
    seen = []
    original = ConditionalUNet.forward

    def spy(self, z_t, t, masks, subtype, histogram):
        seen[-1].append([x.clone() for x in (z_t, t, masks, subtype, histogram)])
        return original(self, z_t, t, masks, subtype, histogram)

    monkeypatch.setattr(ConditionalUNet, "forward", spy)
    for name, value in (("a", 0.0), ("b", 10.0)):
        seen.append([])
        state = finish(train(cache, tmp_path / name, histogram__weight=value, ldm__steps=3))
    assert state.metrics["hist"] > 0
    assert all(torch.equal(x, y) for a, b in zip(*seen, strict=True) for x, y in zip(a, b, strict=True))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_no_nodule_below_hist_t_max_leaves_the_ddpm_update(cache, tmp_path):
    finish(train(cache, tmp_path / "a", histogram__weight=10.0, histogram__t_max=-1, ldm__steps=3))
    finish(train(cache, tmp_path / "b", histogram__weight=0.0, ldm__steps=3))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_training_lowers_the_noise_error(cache, tmp_path):
    steps = train(
        cache, tmp_path / "a", save_every=10**6, ldm__steps=120, ldm__lr=4e-3, histogram__weight=0.0, ldm__batch=4
    )
    errors = [float(s.metrics["inpaint"]) for s in steps]
    assert np.mean(errors[-20:]) < 0.9 * np.mean(errors[:20])


# -- the histogram term ----------------------------------------------------------------------------------------------------


def term_and_batch(cache, rows=(0, 3), **changes):
    """L_hist and a batch as `Batches.draw` makes it, of two nodules at t = 0."""
    profile = tiny.profile(**changes)
    groups = list(windowed(cache, profile.unet, profile.histogram.template))
    term, group = HistogramTerm(tiny.autoencoder(), groups, cache.scale, profile), groups[-1]
    rows = torch.tensor(rows)
    batch = group.take(rows, profile.unet.mask_detail) | {"group": group, "rows": rows}
    return term, batch | {"t": torch.zeros(len(rows), dtype=torch.long)}


@pytest.mark.parametrize("space", ["feature", "hu"])
def test_true_latent_has_no_histogram_loss_and_another_one_has(cache, space):
    term, batch = term_and_batch(cache, histogram__space=space)
    assert term(batch["z0"], batch).item() == pytest.approx(0, abs=1e-6)
    assert term(batch["z0"].flip(0) + 1, batch) > 0.01


def test_loss_is_the_mean_over_nodules_decoded_one_by_one(cache):
    term, batch = term_and_batch(cache, rows=(0, 3, 5, 8))
    moved = batch["z0"] + 0.5
    alone = [term(moved[[i]], {k: v if k == "group" else v[[i]] for k, v in batch.items()}) for i in range(4)]
    assert term(moved, batch).item() == pytest.approx(float(sum(alone)) / 4, rel=1e-4)


def test_loss_reads_the_lesion_only_and_its_gradient_stays_inside(cache):
    term, batch = term_and_batch(cache)
    z0, m = batch["z0"], batch["m"]
    assert term((z0 + 5 * (1 - m)).requires_grad_(), batch).item() == pytest.approx(0, abs=1e-6)
    inside = (z0 + 0.3 * m).requires_grad_()
    term(inside, batch).backward()
    assert inside.grad.isfinite().all() and inside.grad.any()
    assert inside.grad[m.expand_as(z0) == 0].eq(0).all()


@pytest.mark.parametrize("t", [0, 300, 999])
def test_gradient_through_the_frozen_decoder_is_finite_at_every_t(cache, t):
    term, batch = term_and_batch(cache)
    times, schedule, z0 = torch.full((2,), t), Schedule(), batch["z0"]
    g = torch.Generator().manual_seed(t)
    z_t = schedule.add_noise(z0, torch.randn(z0.shape, generator=g), times)
    eps_hat = torch.randn(z0.shape, generator=g).requires_grad_()
    term(schedule.predict_z0(z_t, eps_hat, times), batch | {"t": times}).backward()
    assert eps_hat.grad.isfinite().all()


def test_nodules_beyond_hist_t_max_count_zero(cache):
    term, batch = term_and_batch(cache, rows=(0, 3, 4, 5), histogram__t_max=400)
    z0_hat = batch["z0"] + batch["m"]

    def loss(*t: int) -> torch.Tensor:
        return term(z0_hat, batch | {"t": torch.tensor(t)})

    both, first, second = loss(0, 400, 501, 999), loss(0, 401, 501, 999), loss(401, 400, 501, 999)
    assert first > 0 and second > 0
    assert both.item() == pytest.approx((first + second).item(), rel=1e-5)
    assert loss(401, 402, 501, 999) == 0


def test_what_is_decoded_holds_every_nodule_that_counts(cache):
    """The times of a batch ascend by strata, so the first share of it is all that can lie below `hist_t_max`."""
    for t_max in (0, 124, 125, 400, 874, 999):
        profile = tiny.profile(ldm__batch=8, histogram__t_max=t_max)
        batches = ldm.Batches(cache, profile)
        for seed in range(20):
            t = batches.draw(np.random.default_rng(seed))["t"]
            assert ((t >= 0) & (t < 1000)).all() and (t // 125 == torch.arange(8)).all()
            assert (t[-(-8 * (t_max + 1) // 1000) :] > t_max).all()


def test_times_are_uniform_in_each_batch_size(cache):
    batches = ldm.Batches(cache, tiny.profile(ldm__batch=3))
    t = torch.cat([batches.draw(np.random.default_rng(seed))["t"] for seed in range(1500)]).double()
    assert t.mean() == pytest.approx(499.5, abs=10) and t.std() == pytest.approx(1000 / 12**0.5, abs=8)
    assert t.min() < 5 and t.max() > 994


def test_ranges_hold_the_training_features_of_each_channel(cache):
    term, batch = term_and_batch(cache)
    assert term.lo.shape == term.hi.shape == (tiny.autoencoder().feature_channels,)
    assert (term.hi > term.lo).all()
    cube = term.cubes[id(batch["group"])][batch["rows"]]
    inside = term.features(cube.of(batch["z0"])).movedim(1, 0)[:, cube.of(batch["mask"], 4)[:, 0] > 0]
    within = (inside >= term.lo[:, None]) & (inside <= term.hi[:, None])
    assert within.float().mean() > 0.98


def test_histogram_in_hu_space_is_the_reconstructed_lesions(cache):
    term, batch = term_and_batch(cache, histogram__space="hu", histogram__bins=10)
    cube = term.cubes[id(batch["group"])][batch["rows"]]
    z, mask = cube.of(batch["z0"])[:1], cube.of(batch["mask"], 4)[:1]
    hu = term.features(z)[0, 0][mask[0, 0] > 0].numpy()
    soft = term.histogram(z, mask)[0, 0].numpy()
    lo, hi = term.lo.item(), term.hi.item()
    half = (hi - lo) / 9 / 2  # hard bins around the soft ones' centres
    hard = np.histogram(hu.clip(lo, hi), 10, (lo - half, hi + half))[0] / len(hu)
    assert np.abs(np.cumsum(soft) - np.cumsum(hard)).max() < 0.12
    assert (soft * np.linspace(lo, hi, 10)).sum() == pytest.approx(hu.clip(lo, hi).mean(), abs=0.5)


@pytest.mark.parametrize(
    ("size", "radius", "widest"), [(32, 3, 24), (40, 15, 24), (40, 15, 8), (24, 11, 64), (16, 0, 4)]
)
def test_lesion_cubes_cut_the_grid_about_the_lesion_and_are_never_empty(size, radius, widest):
    rng = np.random.default_rng(size + radius)
    limit = (size // 2 - radius - 1) // 2
    masks = np.stack(
        [np.roll(tiny.ball(size, radius), rng.integers(-limit, limit + 1, 3), (0, 1, 2)) for _ in range(5)]
    )
    voxels, z = mask_tensor(masks), torch.randn(5, 3, *[size // 4] * 3)
    cubes = lesion_cubes(voxels, widest)
    side = min(max(widest // 4, 1), size // 4)
    assert cubes.side == side
    for i, start in enumerate(cubes.start.tolist()):
        box = tuple(slice(a, a + side) for a in start)
        assert all(0 <= b.start and b.stop <= size // 4 for b in box)
        assert torch.equal(cubes.of(z)[i], z[(i, slice(None), *box)])
        cut = masks[i][tuple(slice(4 * b.start, 4 * b.stop) for b in box)]
        np.testing.assert_array_equal(cubes.of(voxels, 4)[i, 0].numpy(), cut)
        assert cut.any()
        if 2 * radius + 1 + 8 <= widest:
            assert cut.sum() == masks[i].sum()


def test_cube_of_a_hollow_lesion_still_holds_lesion():
    shell = mask_tensor((tiny.ball(40, 16) & ~tiny.ball(40, 14))[None])
    assert lesion_cubes(shell, 8).of(shell, 4).any()


def test_bad_histogram_settings_are_named_before_training(cache, tmp_path):
    with pytest.raises(ValueError, match="unknown histogram.space 'pixel'"):
        next(train(cache, tmp_path / "a", histogram__space="pixel"))
    with pytest.raises(ValueError, match="needs the autoencoder"):
        next(ldm.train_ldm(cache, tiny.profile(), 0, tmp_path / "a", None))
    with pytest.raises(ValueError, match="unknown background rule"):
        next(train(cache, tmp_path / "a", diffusion__background="dirty"))
    assert not (tmp_path / "a").exists()


# -- batches, weights, profiles --------------------------------------------------------------------------------------------


def test_batches_are_scaled_latents_with_their_conditions(cache):
    batch = ldm.Batches(cache, tiny.profile(ldm__batch=5)).draw(np.random.default_rng(0))
    for b, (i, v) in enumerate(batch["group"].index[batch["rows"]].tolist()):
        np.testing.assert_allclose(batch["z0"][b], cache.mean[i, v] * cache.scale, rtol=1e-6)
        np.testing.assert_array_equal(batch["mask"][b, 0], cache.mask[i, v])
        np.testing.assert_allclose(batch["histogram"][b], cache.histogram[i], rtol=1e-6)
        assert batch["subtype"][b] == cache.subtype[i]
    sampled = ldm.Batches(cache, tiny.profile(ldm__batch=5, latents__sample=True)).draw(np.random.default_rng(0))
    assert all(torch.equal(sampled[k], batch[k]) for k in ("rows", "t", "eps"))
    assert not torch.equal(sampled["z0"], batch["z0"])


@pytest.fixture
def wide(tmp_path, monkeypatch) -> LatentCache:
    """Crops of 40 mm with small and large lesions: windows of two sides."""
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    made = tiny.patches(6, 48)
    mask = np.stack([np.roll(tiny.ball(48, r), 3, 1) for r in (4, 5, 5, 13, 14, 4)])
    return build_latents(tiny.autoencoder(), Patches(made.hu, mask, made.frame), 40, 2, 40, 0)


def test_batches_hold_windows_of_one_side_and_every_nodule_equally_often(wide):
    batches = ldm.Batches(wide, tiny.profile(ldm__batch=4))
    rng, seen = np.random.default_rng(0), np.zeros(wide.mask.shape[:2])
    for _ in range(600):
        batch = batches.draw(rng)
        np.add.at(seen, tuple(batch["group"].index[batch["rows"]].numpy().T), 1)
    assert seen.std() / seen.mean() < 0.12 and seen.sum() == 2400
    assert [g.z0.shape[-1] for g in batches.groups] == [6, 10]
    group, rows = batch["group"], batch["rows"]
    p = tiny.profile()
    for (i, v), z0, mask in zip(group.index[rows].tolist(), batch["z0"], batch["mask"], strict=True):
        cut = lesion_window(wide.mask[i, v], p.unet.context, len(p.unet.channels)).latent
        np.testing.assert_allclose(z0, wide.mean[i, v][cut] * wide.scale, rtol=1e-6)
        assert mask.sum() == wide.mask[i, v].sum()  # the whole lesion lies inside


def test_histogram_term_reads_the_same_through_a_window_as_in_the_whole_grid(wide):
    windowed_term, batch = term_and_batch(wide, rows=(0, 1))
    whole_term, whole = term_and_batch(wide, rows=(0, 1), unet__context=None)
    index = batch["group"].index[batch["rows"]]
    whole["rows"] = torch.stack([(whole["group"].index == i).all(1).nonzero()[0, 0] for i in index])
    whole |= whole["group"].take(whole["rows"], 4)
    inside = windowed_term(batch["z0"] + 0.3, batch)
    assert inside.item() == pytest.approx(whole_term(whole["z0"] + 0.3, whole).item(), rel=1e-4)
    assert inside > 0.001


def test_loaded_network_has_ema_weights_and_the_scale_of_its_training(cache, tmp_path):
    finish(train(cache, tmp_path / "a", ldm__steps=3))
    model, scale, config = ldm.load_unet(tmp_path / "a")
    assert scale == cache.scale and not model.training and config == tiny.profile(ldm__steps=3).stage2()
    assert same(model.state_dict(), weights(tmp_path / "a", "ema"))
    assert not same(model.state_dict(), weights(tmp_path / "a"))
    groups, meta = ckpt.load(tmp_path / "a")
    for spoilt in ({"unet": {"channels": [32, 32]}}, {"unet": 3}, None):
        ckpt.save(tmp_path / "spoilt", groups, meta | {"config": spoilt})
        with pytest.raises(ckpt.CheckpointError, match="another architecture"):
            ldm.load_unet(tmp_path / "spoilt")
    finish(train(cache, tmp_path / "b", initial=dict(model.state_dict()), ldm__steps=1, ldm__lr=0.0))
    assert same(weights(tmp_path / "b"), model.state_dict())


def test_new_inputs_start_at_zero_and_the_network_as_it_was():
    old, new = tiny.unet(), tiny.unet(seed=1, histogram__template=True)
    new.load_state_dict(ldm.started(new.state_dict(), old.state_dict()))
    g = torch.Generator().manual_seed(0)
    z, masks, picture = (torch.randn(2, c, 4, 4, 4, generator=g) for c in (4, 65, 4))
    rest = (torch.tensor([0, 1]), torch.rand(2, 40, generator=g))
    t = torch.tensor([5, 700])
    torch.testing.assert_close(new(z, t, torch.cat([masks, picture], 1), *rest), old(z, t, masks, *rest))
    other = tiny.unet(histogram__tokens=40).state_dict()
    kept = ldm.started(other, old.state_dict())
    assert kept["c_hist.mlp.0.weight"] is other["c_hist.mlp.0.weight"]
    back = tiny.unet(seed=2)  # and inputs that are gone are cut off
    back.load_state_dict(ldm.started(back.state_dict(), new.state_dict()))
    torch.testing.assert_close(back(z, t, masks, *rest), old(z, t, masks, *rest))


def test_the_linear_part_is_fitted_again_when_it_loses_an_input(cache, tmp_path):
    old = tiny.unet(histogram__template=True)
    finish(train(cache, tmp_path / "cut", initial=dict(old.state_dict()), ldm__steps=1, ldm__lr=0.0))
    finish(train(cache, tmp_path / "fresh", ldm__steps=1, ldm__lr=0.0))
    cut, fresh = weights(tmp_path / "cut"), weights(tmp_path / "fresh")
    linear = [k for k in fresh if k.startswith("linear.")]
    assert linear and all(torch.equal(cut[k], fresh[k]) for k in linear) and not same(cut, fresh)


@pytest.mark.slow
def test_paper_unet_makes_one_step_with_histogram_loss(tmp_path):
    """The paper's U-Net on its 32^3 latents and L_hist through the paper's decoder, for a nodule of 12 mm."""
    profile = get_profile("paper").for_nodules(2950)
    torch.manual_seed(0)
    from hrldm.model.autoencoder import Autoencoder

    model = Autoencoder(profile.autoencoder).eval().requires_grad_(False)
    mask = tiny.ball(profile.data.patch_mm, 6)
    hu = np.where(mask, -30, -850).astype(np.int16) + np.random.default_rng(0).integers(-50, 50, mask.shape, np.int16)
    mean = 0.1 * np.random.default_rng(1).standard_normal((1, 1, 4, 32, 32, 32)).astype(np.float32)
    near = encode_patches(model, hu[None, 44:84, 44:84, 44:84])[0].numpy()
    mean[0, 0, :, 11:21, 11:21, 11:21] = near[0]
    parts = {"mask": mask[None, None], "solid": solid_part(hu, mask)[None, None]}
    cache = LatentCache(
        mean, np.zeros_like(mean), **parts, histogram=hu_histogram(hu[mask])[None], subtype=np.array([0]), scale=1.0
    )
    steps = ldm.train_ldm(cache, profile, 0, tmp_path / "a", model, save_every=10**9)
    state = next(steps)
    steps.close()
    assert profile.ldm.steps == 200 * 2950
    assert set(state.metrics) == {"inpaint", "hist"} and all(v.isfinite() for v in state.metrics.values())
    assert 0 < state.metrics["hist"] <= np.log(2)


# -- components of the mask ------------------------------------------------------------------------------------------------


def test_three_mask_channels_train_and_resume_and_see_what_one_sees_in_parts(cache, tmp_path):
    three = {"unet__mask_channels": 3}
    finish(train(cache, tmp_path / "a", **three))
    killed = train(cache, tmp_path / "b", **three)
    for _ in range(3):
        next(killed)
    killed.close()
    finish(train(cache, tmp_path / "b", **three))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    batches = [ldm.Batches(cache, tiny.profile(**c)).draw(np.random.default_rng(0)) for c in ({}, three)]
    one, parts = (b["condition"][:, :-1] for b in batches)
    torch.testing.assert_close(parts.unflatten(1, (3, -1)).sum(1), one)  # a partition of the same lesions
    assert torch.equal(batches[0]["m"], batches[1]["m"]) and torch.equal(batches[0]["mask"], batches[1]["mask"])
    share = parts.unflatten(1, (3, -1)).sum((2, 3, 4, 5))[:, 0] / one.sum((1, 2, 3, 4))
    assert (share[batches[1]["subtype"] == 0] > 0.9).all() and (share[batches[1]["subtype"] == 2] == 0).all()


def test_two_mask_channels_are_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="unet.mask_channels=2: give 1 .* or 3"):
        next(train(cache, tmp_path / "a", unet__mask_channels=2))
