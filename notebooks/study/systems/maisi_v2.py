"""MAISI-v2 proper (Zhao et al., 2026): rectified flow, its labels by a control branch, from its published description.

A U-Net is trained without labels, then frozen; a control branch (Zhang et al., 2023) of the label map is trained beside it.

    tau = t / T,  x_tau = (1 - tau) z0 + tau eps,  target velocity z0 - eps                     both stages
    L = mean |v - target|                                                                       U-Net
    L = mean w |v - target| + 0.01 (max(-|v - v'| inside M, -2) + |v' - target| outside)        control branch

Here w is 100 in M and 1 elsewhere, v' is v of the label map without the lesion, and "outside" is outside M dilated by one
latent voxel: the lesion's label is to matter in the lesion and nowhere else. Labels enter as bit-planes at voxel resolution.

The whole window is made from noise, the background too, and the network never sees the real one: **this row stands apart**.
For Table 1 it is pasted like all: only the lesion, feathered, comes from the window, so its surroundings there and the real
ones may not match at its edge.

Adapted: our autoencoder, crops, windows and widths of the U-Net. One budget of updates: the first half trains the U-Net, the
second the control branch, at the learning rates of one schedule; the U-Net is frozen as it is then, not averaged. On another
dataset than the embedded one both go on from those trained there. Labels are those we have: the lesion by subtype, and
everything else (MAISI: 132 organs, 8 bit-planes). Neither spacing nor modality is given, both are the same everywhere.
Times are whole and uniform, without MAISI's shift by the volume's size, which is meant for latents of 32^3 and more. Euler's
steps sum to 1 (MAISI's rounded times to about 1.009). No classifier-free guidance, as MAISI does for CT. It takes no histogram.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor, nn
from torch.nn import functional as F

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Request
from hrldm.model.diffusion import Schedule, flow_input, inpaint
from hrldm.model.losses import inpainting_loss
from hrldm.train.config import Stage2
from hrldm.train.device import autocast
from study.systems.peer import Peer

STEPS = 30  # of Euler's method; fewer where the profile samples with fewer
LESION_WEIGHT = 100.0
CONTRAST_WEIGHT = 0.01
FLOOR = -2.0  # of the contrast within the lesion, which would otherwise fall for ever
PLANES = len(SUBTYPES).bit_length()  # bits of the largest label


def bit_planes(mask: Float[Tensor, "b 1 d h w"], subtype: Int[Tensor, " b"]) -> Float[Tensor, "b p d h w"]:
    """The bits, lowest first, of the label map: 1 + subtype in the lesion, 0 elsewhere."""
    labels = mask.long() * (1 + subtype).view(-1, 1, 1, 1, 1)
    return (labels >> torch.arange(PLANES, device=mask.device).view(1, -1, 1, 1, 1) & 1).float()


def weighted_l1(v: Tensor, target: Tensor, m: Float[Tensor, "b 1 d h w"]) -> Tensor:
    """Mean |v - target| of the whole window, the lesion's multiplied by its weight. v, target: (B, c, d, h, w)"""
    return ((1 + (LESION_WEIGHT - 1) * m) * (v - target).abs()).mean()


def region_contrast(v: Tensor, v_without: Tensor, target: Tensor, m: Float[Tensor, "b 1 d h w"]) -> Tensor:
    """The contrastive term, not weighted. v, v_without, target: (B, c, d, h, w), v_without of the labels without the lesion."""
    outside = 1 - F.max_pool3d(m, 3, stride=1, padding=1)
    apart = inpainting_loss(v, v_without, m, "voxels_channels")
    return (-apart).clamp_min(FLOOR) + inpainting_loss(target, v_without, outside, "voxels_channels")


class ControlledUNet(nn.Module):
    """Velocity (B, c, d, h, w) by a U-Net, and with labels by its control branch too, which adds nothing at first."""

    def __init__(self, config: Stage2, channels: int) -> None:
        super().__init__()
        shared, width = config.unet.blocks | {"in_channels": channels}, config.unet.channels[0]
        self.unet = DiffusionModelUNetMaisi(out_channels=channels, **shared)
        self.control = ControlNetMaisi(
            conditioning_embedding_in_channels=PLANES,
            conditioning_embedding_num_channels=(width // 4, width // 2, width),  # halved twice, to the latent's grid
            use_checkpointing=False,
            **shared,
        )

    def forward(self, x: Tensor, t: Float[Tensor, " b"], labels: Float[Tensor, "b p 4d 4h 4w"] | None = None) -> Tensor:
        if labels is None:
            return self.unet(x, t)
        down, middle = self.control(x, t, labels)
        return self.unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    def begin_control(self) -> None:
        """Make an untrained branch, which still adds nothing, a copy of the U-Net's encoder."""
        if not any(p.any() for p in self.control.controlnet_mid_block.parameters()):
            self.control.load_state_dict(self.unet.state_dict(), strict=False)


class MaisiV2(Peer):
    """See the module docstring."""

    name = "maisi-v2"
    network = ControlledUNet

    @staticmethod
    def losses(network: ControlledUNet, batch: dict[str, Tensor], config: Stage2) -> dict[str, Tensor]:
        half = config.ldm.steps // 2
        network.unet.requires_grad_(batch["step"] < half)
        if batch["step"] == half:
            network.begin_control()
        t = batch["t"] + 1  # 1..T, as in sampling
        x, target = flow_input(batch["z0"], batch["eps"], t, config.diffusion.timesteps)
        with autocast(config.mixed_precision, x.device.type):
            if batch["step"] < half:
                return {"flow": F.l1_loss(network(x, t).float(), target)}
            labels = bit_planes(batch["mask"], batch["subtype"])
            v, v_without = (network(x, t, shown).float() for shown in (labels, torch.zeros_like(labels)))
        contrast = region_contrast(v, v_without, target, batch["m"])
        return {"flow": weighted_l1(v, target, batch["m"]), "contrast": CONTRAST_WEIGHT * contrast}

    def denoise(
        self, request: Request, z_bg: Tensor, mask: Tensor, lead: Tensor | None = None, picture: Tensor | None = None
    ) -> Iterator[SimpleNamespace]:
        labels = bit_planes(mask.to(z_bg.device), torch.tensor(request.subtype, device=z_bg.device))
        generators = [torch.Generator().manual_seed(int(s)) for s in request.seeds]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with autocast(self.config.mixed_precision, x.device.type):
                return self.unet(x, t, labels).float()

        everywhere = torch.ones_like(z_bg[:, :1])  # as M: nothing of the background is given
        steps = min(STEPS, self.sampling.steps)
        return inpaint(velocity, z_bg, everywhere, Schedule(self.config.diffusion), generators, "rflow", steps)
