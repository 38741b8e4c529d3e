"""A checkpoint is whole or absent, says what is wrong with it, and brings back the exact state."""

import errno

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hrldm import atomic
from hrldm.train import checkpoint as ckpt

GROUPS = {"model": {"a.b": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}, "ema": {"a.b": torch.zeros(2, 3)}}
META = {"stage": "ldm", "step": 4, "scale": 1.25, "architecture": {"channels": [1, 2]}}


def test_round_trip_is_exact(tmp_path):
    ckpt.save(tmp_path / "runs" / "c.safetensors", GROUPS, META)
    groups, meta = ckpt.load(tmp_path / "runs" / "c.safetensors")
    assert meta == META == ckpt.load_meta(tmp_path / "runs" / "c.safetensors")
    assert {g: set(s) for g, s in groups.items()} == {g: set(s) for g, s in GROUPS.items()}
    assert all(
        torch.equal(groups[g][k], v) and groups[g][k].dtype == v.dtype for g in GROUPS for k, v in GROUPS[g].items()
    )


@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, when):
    path = tmp_path / "c.safetensors"
    ckpt.save(path, GROUPS, META)
    before = path.read_bytes()

    def full(*args, **kwargs):
        if when == "writing":
            args[1].write_bytes(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((ckpt, "save_file") if when == "writing" else (atomic.os, "fsync")), full)
    with pytest.raises(ckpt.CheckpointError, match=r"c\.safetensors: cannot be written .*free "):
        ckpt.save(path, GROUPS, META | {"step": 5})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_missing_checkpoint_is_named(tmp_path):
    for read in (ckpt.load, ckpt.load_meta):
        with pytest.raises(ckpt.CheckpointError, match="none.safetensors"):
            read(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "header", "metadata"])
def test_corrupt_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    ckpt.save(path, GROUPS, META)
    whole = path.read_bytes()
    broken = {"empty": b"", "cut": whole[:-10], "garbage": b"PK" * 400, "header": whole[:8] + b"\xff" * 40 + whole[48:]}
    if damage == "metadata":
        save_file({"model/a": torch.zeros(1)}, path, metadata={"meta": "{no json"})
    else:
        path.write_bytes(broken[damage])
    with pytest.raises(ckpt.CheckpointError, match=r"c\.safetensors: corrupt checkpoint"):
        ckpt.load(path)
    with pytest.raises(ckpt.CheckpointError, match=r"c\.safetensors: missing or corrupt"):
        ckpt.load_meta(path)


def test_checkpoint_of_another_run_is_named(tmp_path):
    ckpt.require(META, tmp_path / "c", stage="ldm", step=4)
    with pytest.raises(ckpt.CheckpointError, match="made for another run .*stage is 'ldm', not 'autoencoder'"):
        ckpt.require(META, tmp_path / "c", stage="autoencoder", step=4)


def test_adam_goes_on_exactly_after_a_round_trip(tmp_path):
    torch.manual_seed(0)
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.Adam(n.parameters(), 0.1) for n in nets]

    def step(i: int, k: int) -> None:
        optimizers[i].zero_grad()
        nets[i](torch.full((2, 4), float(k))).square().sum().backward()
        optimizers[i].step()

    for k in range(3):
        step(0, k), step(1, k)
    ckpt.save(tmp_path / "o", {"o": ckpt.optimizer_tensors(optimizers[1])}, {})
    optimizers[1] = torch.optim.Adam(nets[1].parameters(), 0.1)
    ckpt.restore_optimizer(optimizers[1], ckpt.load(tmp_path / "o")[0]["o"])
    for k in range(3, 6):
        step(0, k), step(1, k)
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_ema_is_the_recursion_with_warm_up():
    net = nn.BatchNorm1d(2)
    ema = ckpt.Ema(net, 0.9)
    expected = torch.ones(2)
    for step in range(200):
        with torch.no_grad():
            net.weight.fill_(float(step % 7))
            net.num_batches_tracked += 1
        ema.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step % 7)
    torch.testing.assert_close(ema.shadow["weight"], expected)
    assert ema.shadow["num_batches_tracked"] == 200
    follow = ckpt.Ema(net, 0.0)
    follow.update(nn.BatchNorm1d(2), 5)
    assert follow.shadow["weight"].eq(1).all()


def test_learning_rate_rises_then_falls_by_its_polynomial():
    assert [ckpt.learning_rate(2.0, s, 4, 1.0, 1) for s in (0, 1, 4, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert ckpt.learning_rate(1.0, 1, 2, 2.0, 1) == 0.25
    assert [ckpt.learning_rate(1.0, s, 100, 0.0, 4) for s in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
