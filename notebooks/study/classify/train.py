"""Stage of Sections 6.3-6.5: a 3D DenseNet on nodule crops, trained by a generator.

For crops x (B, 1, D, D, D), HU clipped to [-1000, 1000] and scaled to [0, 1] as for the diffusion model (Section 5),
and labels y in {0..K-1} the network minimises the cross-entropy -log softmax(f(x))_y with Adam. Crops are augmented by
the 48 symmetries of the cube (6 axis orders x 8 flips), exact on the voxel grid. The epoch with the lowest loss on the
validation crops is kept; training stops after `patience` epochs without a better one.

Every epoch draws its order and symmetries from (seed, epoch) alone, so a killed and resumed run ends in the same
weights as an uninterrupted one (on one device with one number of threads; cuDNN may choose other kernels).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from monai import transforms
from monai.networks.nets import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm.model.autoencoder import normalise_hu
from hrldm.nodules.augmentation import CUBE_SYMMETRIES, cube_symmetry
from hrldm.train import checkpoint as ckpt
from study.profiles import ClassifierConfig

# init_features, growth_rate, block_config of MONAI's DenseNet
ARCHITECTURES: dict[str, dict] = {
    "densenet121": {"init_features": 64, "growth_rate": 32, "block_config": (6, 12, 24, 16)},  # the paper's, 11.2 M
    "densenet-small": {"init_features": 32, "growth_rate": 16, "block_config": (2, 4, 6, 4)},  # 0.55 M, two cores
    "densenet-tiny": {"init_features": 16, "growth_rate": 8, "block_config": (2, 2, 2, 2)},  # 0.06 M, quick and smoke
}
SMALL_STEM = {"densenet-tiny"}  # a first kernel of 3 voxels, not 7, which took most of its time
VERSION = 2  # raise when the same crops and settings would give another classifier; part of the keys of caches
MIN_SIDE = 29  # five halvings must leave one voxel
HEAD = "class_layers.out."  # MONAI's name of the only layer that knows the number of classes


def strong_augmentation(seed: int) -> transforms.Compose:
    """Stronger than symmetries, on a crop (1, D, D, D) scaled to [0, 1]: turned, resized, blurred, brighter or darker, noisy."""
    chain = [
        transforms.RandAffine(0.5, rotate_range=0.5, scale_range=0.15, translate_range=2, padding_mode="border"),
        transforms.RandGaussianSmooth((0.3, 0.8), (0.3, 0.8), (0.3, 0.8), prob=0.3),
        transforms.RandScaleIntensity(0.1, prob=0.5),
        transforms.RandShiftIntensity(0.025, prob=0.5),  # 50 HU
        transforms.RandGaussianNoise(0.5, std=0.02),
        transforms.EnsureType(track_meta=False),
    ]
    return transforms.Compose(chain).set_random_state(seed)


@dataclass(frozen=True)
class EpochState:
    """What an epoch leaves for its caller."""

    epoch: int  # epochs done, 1-based
    model: nn.Module  # as it is now
    best: dict[str, Tensor]  # weights of the best epoch so far
    history: list[dict[str, float]] = field(repr=False)  # epoch, train_loss, val_loss


def build_classifier(arch: str, n_classes: int, seed: int, init: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A 3D DenseNet (B, 1, D, D, D) -> (B, n_classes) logits, its first weights drawn from `seed`.

    `init`: weights of a classifier of the same architecture; all but the last layer are taken over (Section 6.5).

    Raises:
        ValueError: unknown architecture, or `init` is of another one.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown classifier {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DenseNet(spatial_dims=3, in_channels=1, out_channels=n_classes, **ARCHITECTURES[arch])
        if arch in SMALL_STEM:
            width = ARCHITECTURES[arch]["init_features"]
            model.features.conv0 = nn.Conv3d(1, width, 3, stride=2, padding=1, bias=False)
    if init is not None:
        body = {k: v for k, v in init.items() if not k.startswith(HEAD)}
        own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(HEAD)}
        if {k: v.shape for k, v in body.items()} != own:
            raise ValueError(f"the initial weights are not of a {arch}; use one `classifier.arch` before and after")
        model.load_state_dict(body, strict=False)
    return model


def predict_proba(model: nn.Module, crops: np.ndarray) -> np.ndarray:
    """Class probabilities (N, K) float64 of crops (N, D, D, D) in HU."""
    return _logits(model, crops, 32).double().softmax(dim=1).numpy()


def train_classifier(
    crops: np.ndarray,
    labels: np.ndarray,
    val_crops: np.ndarray,
    val_labels: np.ndarray,
    config: ClassifierConfig,
    *,
    n_classes: int,
    seed: int,
    steps_per_epoch: int | None = None,
    init: Mapping[str, Tensor] | None = None,
    class_weights: bool = False,
    strong: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
) -> Iterator[EpochState]:
    """Train a classifier, yielding after every epoch; the last state's `best` holds the selected weights.

    Args:
        crops, labels:         training crops (N, D, D, D) in HU, integer labels (N,).
        val_crops, val_labels: real crops only (Section 5), for early stopping.
        steps_per_epoch:       updates that make an epoch; None = one pass over the crops, as in the paper.
        init:                  weights of another classifier to start from, see `build_classifier`.
        class_weights:         weigh the loss by the inverse of each class's share of the training labels.
        strong:                add `strong_augmentation` to the symmetries.
        checkpoint:            file to resume from and to save every epoch to; the restored state is yielded first.

    Raises:
        ValueError: fewer than two training crops, no validation crop, labels out of range, unknown architecture.
    """
    _check(crops, labels, n_classes, "training", 2)
    _check(val_crops, val_labels, n_classes, "validation", 1)
    model = build_classifier(config.arch, n_classes, seed, init).to(device, memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    batch = min(config.batch, len(crops))
    steps = steps_per_epoch or max(1, len(crops) // batch)
    target, val_target = (torch.tensor(np.asarray(a, np.int64)) for a in (labels, val_labels))
    counts = torch.bincount(target, minlength=n_classes).clamp(min=1)
    weight = (len(target) / n_classes / counts).float().to(device) if class_weights else None
    history: list[dict[str, float]] = []
    best = _copy(model)
    if checkpoint is not None and checkpoint.exists():
        groups, meta = ckpt.load(checkpoint, device)
        model.load_state_dict(groups["model"])
        ckpt.restore_optimizer(optimizer, groups["optimizer"])
        best, history = {k: v.cpu() for k, v in groups["best"].items()}, meta["history"]
        yield EpochState(len(history), model, best, history)
    while len(history) < config.epochs and not (history and len(history) - best_epoch(history) >= config.patience):
        epoch = len(history)
        state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
        rng = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        passes = [torch.randperm(len(crops), generator=rng) for _ in range(math.ceil(steps * batch / len(crops)))]
        order = torch.cat(passes)[: steps * batch]
        augment = strong_augmentation(int(state % 2**32)) if strong else lambda x: x
        model.train()
        losses = []
        for chosen in order.split(batch):
            x = _prepare(crops, chosen, device)
            symmetries = torch.randint(len(CUBE_SYMMETRIES), (len(chosen),), generator=rng).tolist()
            x = torch.stack([augment(cube_symmetry(sample, s)) for sample, s in zip(x, symmetries, strict=True)])
            loss = F.cross_entropy(model(x), target[chosen].to(device), weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item()
        val_loss = F.cross_entropy(_logits(model, val_crops, 2 * batch), val_target).item()
        if not math.isfinite(train_loss + val_loss):
            said = f"classifier diverged in epoch {epoch + 1} (loss {train_loss})"
            raise ValueError(f"{said}; lower `classifier.lr` ({config.lr})")
        if val_loss < min((h["val_loss"] for h in history), default=math.inf):
            best = _copy(model)
        history = [*history, {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss}]
        if checkpoint is not None:
            groups = {"model": model.state_dict(), "best": best, "optimizer": ckpt.optimizer_tensors(optimizer)}
            ckpt.save(checkpoint, groups, {"history": history})
        yield EpochState(epoch + 1, model, best, history)


def best_epoch(history: list[dict[str, float]]) -> int:
    """The 1-based epoch of the lowest validation loss, the first of equals."""
    return 1 + int(np.argmin([h["val_loss"] for h in history]))


def _check(crops: np.ndarray, labels: np.ndarray, n_classes: int, what: str, least: int) -> None:
    if crops.ndim != 4 or len(set(crops.shape[1:])) != 1:
        raise ValueError(f"{what} crops must be (N, D, D, D), not {crops.shape}")
    if crops.shape[1] < MIN_SIDE:
        raise ValueError(f"{what} crops of {crops.shape[1]} voxels are too small; a DenseNet needs {MIN_SIDE}")
    if len(crops) < least or len(crops) != len(labels):
        raise ValueError(f"{len(crops)} {what} crops with {len(labels)} labels; at least {least} of each are needed")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"{what} labels {sorted(set(labels.tolist()))} do not fit {n_classes} classes")


def _prepare(crops: np.ndarray, chosen: Tensor, device: str | torch.device) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(crops[chosen.numpy()])).to(device)
    return normalise_hu(x.float()).unsqueeze(1)  # (B, 1, D, D, D)


@torch.inference_mode()
def _logits(model: nn.Module, crops: np.ndarray, batch: int) -> Tensor:
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(_prepare(crops, part, device)).cpu() for part in torch.arange(len(crops)).split(batch)])


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
