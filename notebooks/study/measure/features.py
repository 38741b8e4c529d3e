"""Deep features of nodule crops, slice by slice in three planes (Section 6.1): the input of FID, KID and MMD.

Two extractors; the name is part of every table made with them, because distances in two feature spaces are not comparable:

- ``efficientnet-lite0``: ImageNet-trained, 1280-d. Not the paper's: never comparable with its Table 1.
- ``radimagenet-resnet50``: the paper's, 2048-d, from the user's own file where ``HRLDM_RADIMAGENET`` names one. Two
  trainings circulate; the keys tell them apart (:func:`radimagenet_resnet50`).

There is no random-weight fallback. Every crop passes one fixed window, -1000..400 HU to 0..1: min-max scaling per crop
would erase the HU offsets under test. Notation: N crops, D side of a crop, S slices per plane, F feature dimension.
"""

import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import resnet50
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm import paths
from hrldm.config import HIST_HU_MAX, HIST_HU_MIN
from hrldm.model.perceptual import EfficientNetLite0
from hrldm.wheels import LITE0, wheel_file

PLANES = {"axial": 2, "sagittal": 0, "coronal": 1}  # array axis a plane is cut across, arrays (x, y, z) RAS
BATCH = 16  # images per forward pass
# positions of conv1, bn1 and layer1..4 in the Sequential of the PyTorch release
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Extractor:
    """A frozen network (B, 1, H, W) in [0, 1] -> (B, F).

    Attributes:
        name: column `extractor` of the tables.
        size: side, in pixels, to which slices are enlarged.
        net: the network, its own input normalisation included.
    """

    name: str
    size: int
    net: nn.Module


class _RadImageNet(nn.Module):
    """ResNet-50 of either training behind its own input normalisation."""

    def __init__(self, trunk: nn.Module, keras: bool):
        super().__init__()
        self.trunk, self.keras = trunk, keras

    def forward(self, images: Tensor) -> Tensor:
        if not self.keras:
            return self.trunk((images * 2.0 - 1.0).expand(-1, 3, -1, -1))  # (8 bit - 127.5) / 127.5
        mean = images.new_tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)  # channels in BGR order
        return self.trunk(images - mean)


def radimagenet_resnet50(file: str | Path) -> nn.Module:
    """RadImageNet ResNet-50 (B, 1, H, W) in [0, 1] -> (B, 2048), from either file in circulation, loaded strictly.

    The release `ResNet50.pt` has keys ``backbone.0..7`` (torchvision v1.5 layout, no convolution bias), the conversion
    from Keras `RadImageNet-ResNet50_notop.pth` has convolution biases and its stride on the first 1x1.

    Raises:
        ValueError: missing file, unreadable file, unknown layout, or weights that do not fit exactly.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {paths.RADIMAGENET} must name a RadImageNet ResNet-50 weight file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: not a file of plain tensors ({str(error)[:150]})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dictionary of tensors")
    # without these two flags MONAI silently builds another network
    trunk = resnet50(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False)
    keras = {"conv1.bias", "layer1.0.conv1.bias"} <= set(state)
    if keras:
        _to_keras_layout(trunk)
    elif any(k.startswith("backbone.0.") for k in state):
        # a position that is not in the table stays, and strict loading names it
        state = {
            re.sub(r"^backbone\.(\d+)", lambda found: _SEQUENTIAL.get(found[1], found[0]), k): v
            for k, v in state.items()
        }
    else:
        raise ValueError(
            f"{path}: keys of neither RadImageNet ResNet-50 file: expected backbone.0… (ResNet50.pt) or conv1.bias and "
            f"layer1.0.conv1.bias (RadImageNet-ResNet50_notop.pth); found {', '.join(list(state)[:3])}…"
        )
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {str(error)[:400]}") from error
    return _RadImageNet(trunk, keras).requires_grad_(False).eval()


def _to_keras_layout(trunk: nn.Module) -> None:
    """Turn MONAI's v1.5 ResNet into Keras' v1: biases everywhere, stride on the first 1x1, BN eps 1.001e-5."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    for stage in (trunk.layer2, trunk.layer3, trunk.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


def default_extractor() -> Extractor:
    """RadImageNet ResNet-50 where ``HRLDM_RADIMAGENET`` names the user's file, else EfficientNet-Lite0.

    Raises:
        ValueError: weights that do not fit.
    """
    if file := os.environ.get(paths.RADIMAGENET):
        return Extractor("radimagenet-resnet50", 224, radimagenet_resnet50(file))
    return lite0()


def lite0() -> Extractor:
    """EfficientNet-Lite0, which everybody has: the second opinion where the default is another."""
    return Extractor("efficientnet-lite0", 128, EfficientNetLite0(wheel_file(*LITE0)))


def extractors() -> list[Extractor]:
    """Every extractor there is here, the default first."""
    first = default_extractor()
    return [first] if first.name == "efficientnet-lite0" else [first, lite0()]


def plane_images(crops_hu: np.ndarray, plane: str, n_slices: int) -> np.ndarray:
    """The `n_slices` slices of one plane about the centre of each crop, as a radiologist sees them.

    Args:
        crops_hu: (N, D, D, D), axes (x, y, z) RAS.
        plane: axial, sagittal or coronal.
        n_slices: S; the middle one passes through voxel D // 2.

    Returns:
        (N, S, D, D) float32 in [0, 1]; rows run front to back (axial) or top to bottom, columns from the patient's
        right to left or front to back.

    Raises:
        ValueError: wrong shape, non-finite HU, or slices outside the crop.
    """
    crops = np.asarray(crops_hu)
    if crops.ndim != 4 or len(set(crops.shape[1:])) != 1:
        raise ValueError(f"crops must be (N, D, D, D), got {crops.shape}")
    if not np.isfinite(crops).all():
        raise ValueError("crops hold values that are not finite HU")
    side, axis = crops.shape[1], PLANES[plane] + 1
    index = side // 2 + np.arange(n_slices) - n_slices // 2
    if n_slices < 1 or index[0] < 0 or index[-1] >= side:
        raise ValueError(f"{n_slices} slices do not fit a crop of side {side}")
    images = np.moveaxis(np.take(crops, index, axis), axis, 1)[:, :, ::-1, ::-1].swapaxes(2, 3)
    windowed = (images.astype(np.float32) - HIST_HU_MIN) / (HIST_HU_MAX - HIST_HU_MIN)
    return np.ascontiguousarray(np.clip(windowed, 0.0, 1.0))


def three_plane_features(
    crops_hu: np.ndarray, extractor: Extractor, n_slices: int = 5, device: str | torch.device = "cpu"
) -> dict[str, np.ndarray]:
    """Features of the central slices of every crop: {plane: (N, S, F) float32}.

    Args:
        crops_hu: (N, D, D, D) HU at 1 mm about the lesion centres, axes (x, y, z) RAS.
        extractor: what reads each slice, enlarged to its `size` (bilinear).
        n_slices: S, see :func:`plane_images`.
        device: where the network runs.
    """
    net = extractor.net.to(device=device, memory_format=torch.channels_last)  # 2.5 times faster on a CPU
    features = {}
    for plane in PLANES:
        images = torch.from_numpy(plane_images(crops_hu, plane, n_slices)).flatten(0, 1).unsqueeze(1)  # (N*S, 1, D, D)
        parts = []
        with torch.inference_mode():
            for chunk in images.split(BATCH):
                chunk = F.interpolate(chunk.to(device), size=extractor.size, mode="bilinear", align_corners=False)
                parts.append(net(chunk.contiguous(memory_format=torch.channels_last)).float().cpu())
        features[plane] = torch.cat(parts).reshape(len(crops_hu), n_slices, -1).numpy()
    return features
