"""Stage I training: it learns, and a resumed run ends in the bits of an uninterrupted one."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from hrldm.train import checkpoint as ckpt
from hrldm.train.loop import DivergedError
from hrldm.train.vae import train_autoencoder
from study.profiles import get_profile
from tests import tiny

SIZES = {"vae__steps": 5, "vae__adversarial_start": 2, "vae__batch": 2}


def volumes(n: int = 3) -> list[np.ndarray]:
    return list(tiny.patches(n, 36).hu)


class Difference(nn.Module):
    """Stands for the perceptual network: its slices are drawn from the generator it is given."""

    def forward(self, x, y, generator):
        index = torch.randperm(x.shape[2], generator=generator)[:2]
        return (x[:, :, index] - y[:, :, index]).square().mean()


def train(path, seed=0, save_every=2, perceptual=None, start=None, **changes):
    profile = tiny.profile(**(SIZES | changes))
    return train_autoencoder(
        volumes(),
        np.ones(3),
        profile.autoencoder,
        profile.vae,
        seed,
        path,
        perceptual,
        save_every=save_every,
        start=start,
    )


def finish(steps):
    return deque(steps, maxlen=1)[0]


def assert_same(a, b):
    (left, meta_a), (right, meta_b) = ckpt.load(a), ckpt.load(b)
    assert meta_a == meta_b
    for group in left:
        assert left[group].keys() == right[group].keys()
        assert all(torch.equal(v, right[group][k]) for k, v in left[group].items()), group


@pytest.mark.parametrize("killed_after", [1, 3, 4])  # before any checkpoint; past one; right after the second
def test_resumed_run_equals_uninterrupted(tmp_path, killed_after):
    whole = [s.metrics for s in train(tmp_path / "a", perceptual=Difference())]
    killed = train(tmp_path / "b", perceptual=Difference())
    for _ in range(killed_after):
        next(killed)
    killed.close()
    resumed = list(train(tmp_path / "b", perceptual=Difference()))
    assert resumed[0].step == killed_after // 2 * 2 + 1 and resumed[-1].step == 5
    assert [s.metrics for s in resumed] == whole[resumed[0].step - 1 :]
    assert_same(tmp_path / "a", tmp_path / "b")
    assert list(train(tmp_path / "b", perceptual=Difference())) == []  # finished: nothing left to do


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finish(train(tmp_path / name, seed))
    assert_same(tmp_path / "a", tmp_path / "b")
    a, c = (ckpt.load(tmp_path / n)[0]["model"] for n in "ac")
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_terms_enter_at_their_time_and_weight(tmp_path):
    steps = list(train(tmp_path / "a", perceptual=Difference()))
    late = {"perceptual", "adversarial", "discriminator"}
    assert all(set(s.metrics) == {"l1", "kl"} | (late if s.step > 2 else set()) for s in steps)
    assert all(np.isfinite([float(v) for v in s.metrics.values()]).all() for s in steps)
    plain = finish(train(tmp_path / "b", perceptual=Difference(), vae__perceptual=0.0, vae__adversarial=0.0))
    assert set(plain.metrics) == {"l1", "kl"}
    assert "perceptual" not in finish(train(tmp_path / "c")).metrics  # no network given


def test_training_without_the_linear_code_learns_the_intensities(tmp_path):
    changes = {
        "vae__steps": 25,
        "vae__adversarial": 0.0,
        "autoencoder__linear_skip": False,
        "autoencoder__norm": True,
        "vae__lr": 0.02,
    }
    errors = [float(s.metrics["l1"]) for s in train(tmp_path / "a", save_every=100, **changes)]
    assert np.mean(errors[-3:]) < 0.5 * np.mean(errors[:3])


def test_going_on_trains_the_decoder_and_leaves_the_latents(tmp_path):
    finish(train(tmp_path / "a"))
    start = ckpt.load(tmp_path / "a")[0]["ema"]
    finish(train(tmp_path / "b", start=start, vae__lr=1e-4))
    before, after = tiny.autoencoder(), tiny.autoencoder()
    before.load_state_dict(start), after.load_state_dict(ckpt.load(tmp_path / "b")[0]["ema"])
    x = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (z, sd), (z2, sd2) = before.encode(x), after.encode(x)
        assert torch.equal(z, z2) and torch.equal(sd, sd2) and not torch.equal(before.decode(z), after.decode(z))
    resumed = train(tmp_path / "c", start=start, vae__lr=1e-4)
    next(resumed), next(resumed), next(resumed), resumed.close()
    finish(train(tmp_path / "c", start=start, vae__lr=1e-4))
    assert_same(tmp_path / "b", tmp_path / "c")
    with pytest.raises(ckpt.CheckpointError, match="start"):
        next(train(tmp_path / "c", start={k: v + 1 for k, v in start.items()}, vae__lr=1e-4, vae__steps=9))


def test_divergence_is_named(tmp_path):
    with pytest.raises(DivergedError, match="diverged at step .*l1.* no checkpoint was written yet"):
        finish(train(tmp_path / "a", save_every=100, vae__lr=1e36, vae__adversarial=0.0))
    assert not (tmp_path / "a").exists()


def test_perceptual_gradient_reaches_the_weights(tmp_path):
    for name, weight in (("a", 0.0), ("b", 1.0)):
        finish(train(tmp_path / name, perceptual=Difference(), vae__perceptual=weight, vae__adversarial=0.0))
    a, b = (ckpt.load(tmp_path / n)[0]["model"] for n in "ab")
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_checkpoint_of_other_settings_or_seed_is_refused_before_any_step(tmp_path):
    finish(train(tmp_path / "a"))
    for changes, word in (({"vae__lr": 1.0}, "digest"), ({"seed": 9}, "seed")):
        with pytest.raises(ckpt.CheckpointError, match=f"another run .*{word}"):
            next(train(tmp_path / "a", **changes))
    assert list(train(tmp_path / "a", data__n_train=7)) == []  # what does not concern Stage I may differ


@pytest.mark.slow
def test_paper_autoencoder_makes_one_step(tmp_path):
    """The paper's network and losses; only the patch is smaller, for a CPU."""
    p = get_profile("paper", vae__patch=16)
    steps = train_autoencoder(
        volumes(1), [1.0], p.autoencoder, p.vae, 0, tmp_path / "a", Difference(), save_every=10**9
    )
    state = next(steps)
    steps.close()
    assert set(state.metrics) == {"l1", "kl", "perceptual", "adversarial", "discriminator"}
    assert np.isfinite([float(v) for v in state.metrics.values()]).all()
    assert p.vae.steps == 280 * 58000
    assert p.autoencoder.channels == (64, 128, 256) and p.autoencoder.latent_channels == 4
