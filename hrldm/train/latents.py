"""The latent cache: each training nodule encoded once (posterior mean and standard deviation), memory-mapped from disk.

A rotated latent is not the latent of the rotated crop, so augmentation happens before encoding: every nodule is stored
in several variants, the first untouched, the others rotated, mirrored and shifted. If the background without
the nodule is given, latents outside M come from it, as in sampling, so they give no hint of the lesion. The cache is
keyed by the autoencoder's weights, the crops and the settings; a killed encoding leaves nothing that could be taken for
complete.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrldm.cache import atomic_folder, keyed
from hrldm.model.autoencoder import FACTOR, Autoencoder, normalise_hu
from hrldm.model.diffusion import blend
from hrldm.model.unet import UnetConfig, latent_masks
from hrldm.model.window import by_side, lesion_window
from hrldm.nodules.augmentation import cube_symmetry
from hrldm.nodules.histograms import hu_histogram
from hrldm.nodules.masks import components, solid_part
from hrldm.nodules.patches import Patches

# (background (D, D, D) HU, mask, histogram, rng) -> HU: an image of what is known before the lesion is made, e.g. the template
Picture = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
VERSION = 5  # raise when the same crops and settings would give other latents; part of cache keys
SHIFT = 4  # mm, largest shift of an augmented variant
PICTURE_SEED = 11  # keeps the pictures' random fields independent of the variants' augmentation


@dataclass(frozen=True)
class LatentsConfig:
    """How training nodules are encoded."""

    variants: int = 4  # encodings per nodule: itself, and rotated, mirrored and shifted copies
    least: int = 1000  # a small training set gets up to 48 variants to reach this number
    sample: bool = False  # draw latents from the posterior at each step instead of using its mean


@dataclass(frozen=True, eq=False)
class LatentCache:
    """N nodules in V variants.

    mean, std: (N, V, c, d, h, w) float32, memory-mapped; the posterior of the crop
    mask:      (N, V, D, H, W) bool, memory-mapped
    histogram: (N, B) HU histogram of each lesion (c_hist)
    subtype:   (N,) labels
    scale:     1 / std of all latents (mean removed by the autoencoder); z = scale * latent goes to the U-Net
    picture:   (N, V, c, d, h, w) float32, memory-mapped; latents of what a network is shown besides, or None
    solid:     as mask, the solid parts (`solid_part`); None if no network is shown components
    """

    mean: np.ndarray
    std: np.ndarray
    mask: np.ndarray
    histogram: np.ndarray
    subtype: np.ndarray
    scale: float
    picture: np.ndarray | None = None
    solid: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class Windowed:
    """All nodules and variants with windows of one side, cropped to them, on one device.

    index: (n, 2) nodule and variant
    z0, std, picture: (n, c, s, s, s) scaled latents, picture may be None
    mask:  (n, 1, 4s, 4s, 4s) bool; parts: (n, C, 4s, 4s, 4s) bool, its components; subtype: (n,); histogram: (n, B)
    """

    index: Tensor
    z0: Tensor
    std: Tensor
    picture: Tensor | None
    mask: Tensor
    parts: Tensor
    subtype: Tensor
    histogram: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: Tensor, detail: int) -> dict[str, Tensor]:
        """The rows as a batch: z0, std, float mask, m and condition (`latent_masks`, picture), subtype, histogram."""
        batch = {name: getattr(self, name)[rows] for name in ("z0", "std", "subtype", "histogram")}
        batch["mask"] = self.mask[rows].float()
        batch["m"], batch["condition"] = latent_masks(self.parts[rows], detail)
        if self.picture is not None:
            batch["picture"] = self.picture[rows]
            batch["condition"] = torch.cat([batch["condition"], batch["picture"]], 1)
        return batch


def windowed(
    cache: LatentCache,
    unet: UnetConfig,
    pictures: bool,
    device: torch.device | str = "cpu",
    keys: np.ndarray | None = None,
) -> Iterator[Windowed]:
    """The nodules and variants of a cache, grouped by window side, smallest first.

    pictures:  take the pictures' latents too
    keys:      (n, 2) nodules and variants to take; None for all

    Raises:
        ValueError: an empty mask, or the cache has no pictures.
    """
    if pictures and cache.picture is None:
        raise ValueError("these latents have no pictures (histogram.template needs some); give build_latents a picture")
    keys = np.argwhere(np.ones(cache.mask.shape[:2], bool)) if keys is None else keys
    levels = len(unet.channels)
    cuts = [lesion_window(np.asarray(cache.mask[i, v]), unet.context, levels) for i, v in keys]
    for rows in by_side(cuts):
        own = [(*keys[r], cuts[r]) for r in rows]

        def cut(array: np.ndarray, own=own) -> Tensor:
            return torch.from_numpy(np.stack([array[i, v][w.latent] for i, v, w in own])).mul_(cache.scale).to(device)

        mask = parts = torch.from_numpy(np.stack([cache.mask[i, v][w.voxels] for i, v, w in own]))[:, None].to(device)
        if unet.mask_channels > 1:
            made = [components(cache.mask[i, v][w.voxels], cache.solid[i, v][w.voxels]) for i, v, w in own]
            parts = torch.from_numpy(np.stack(made)).to(device)
        i = torch.from_numpy(keys[rows, 0])
        yield Windowed(
            index=torch.from_numpy(keys[rows]).to(device),
            z0=cut(cache.mean),
            std=cut(cache.std),
            picture=cut(cache.picture) if pictures else None,
            mask=mask,
            parts=parts,
            subtype=torch.tensor(cache.subtype)[i].to(device),
            histogram=torch.from_numpy(cache.histogram)[i].float().to(device),
        )


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of a module's weights."""
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        h.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def lesion_histograms(patches: Patches, bins: int) -> np.ndarray:
    """HU histogram (N, bins) inside each nodule's mask."""
    return np.stack([hu_histogram(h[m], bins) for h, m in zip(patches.hu, patches.mask, strict=True)])


@torch.no_grad()
def encode_patches(model: Autoencoder, hu: np.ndarray, device: torch.device | str = "cpu", batch: int = 4):
    """HU crops (N, D, D, D) -> posterior mean and std (N, c, d, d, d), as CPU tensors."""
    model = model.to(device).eval()
    parts = [
        model.encode(normalise_hu(torch.from_numpy(hu[i : i + batch].astype(np.float32)))[:, None].to(device))
        for i in range(0, len(hu), batch)
    ]
    return tuple(torch.cat([p[k].cpu().float() for p in parts]) for k in range(2))


def build_latents(
    model: Autoencoder,
    patches: Patches,
    size: int,
    variants: int,
    bins: int,
    seed: int,
    device="cpu",
    background: np.ndarray | None = None,
    picture: Picture | None = None,
) -> LatentCache:
    """Encode crops of `size` mm from larger `patches` (or read the cache of an earlier call).

    background: (N, D, D, D) HU, the patches without their nodules; None if unknown
    picture:    what a network is shown besides, also encoded

    Raises:
        ValueError: the patches leave no room to shift (they need `size` + 8 mm when there are variants).
    """
    room = patches.hu.shape[1] - size
    if room < (2 * SHIFT if variants > 1 else 0):
        raise ValueError(f"crops of {patches.hu.shape[1]} mm leave no room for shifted {size} mm variants")
    background = patches.hu if background is None else background
    settings = (size, variants, seed, bins, picture and picture.__name__)
    folder = keyed("latents", VERSION, weights_digest(model), *settings, patches.hu, patches.mask, background)
    histograms = lesion_histograms(patches, bins)
    if not folder.exists():
        with atomic_folder(folder) as part:
            _encode_all(part, model, patches, background, histograms, picture, size, variants, seed, device)
    arrays = {f.stem: np.load(f, mmap_mode="r") for f in folder.glob("*.npy")}
    scale = 1.0 / float(np.sqrt(np.mean(np.asarray(arrays["mean"], np.float64) ** 2)))
    return LatentCache(**arrays, histogram=histograms, subtype=patches.subtype, scale=scale)


def _encode_all(
    part: Path,
    model: Autoencoder,
    patches: Patches,
    background: np.ndarray,
    histograms: np.ndarray,
    picture: Picture | None,
    size: int,
    variants: int,
    seed: int,
    device: torch.device | str,
) -> None:
    """Fill the folder `part` with the arrays of a `LatentCache`."""
    n, d = len(patches), size // FACTOR
    shape = (n, variants, model.latent_channels, d, d, d)
    names = ["mean", "std"] + ([] if picture is None else ["picture"])
    out = {k: np.lib.format.open_memmap(part / f"{k}.npy", "w+", np.float32, shape) for k in names}
    masks, solid = (
        np.lib.format.open_memmap(part / f"{k}.npy", "w+", bool, (n, variants, *(size,) * 3)) for k in ("mask", "solid")
    )
    for i in tqdm(range(n), desc="latents", mininterval=10):
        voxels = np.stack([patches.hu[i], background[i], patches.mask[i]]).astype(np.int16)
        rngs = [np.random.default_rng((seed, i, v)) if v else None for v in range(variants)]
        hu, clean, masks[i] = np.stack([_variant(voxels, size, rng) for rng in rngs], axis=1)
        solid[i] = [solid_part(h, m) if m.any() else m for h, m in zip(hu, masks[i], strict=True)]
        mean, std = encode_patches(model, hu, device)
        if not np.array_equal(hu, clean):
            behind, m = encode_patches(model, clean, device)[0], latent_masks(mask_tensor(masks[i]))[0]
            mean = blend(m, mean, behind)
        out["mean"][i], out["std"][i] = mean.numpy(), std.numpy()
        if picture is not None:
            rngs = [np.random.default_rng((seed, PICTURE_SEED, i, v)) for v in range(variants)]
            filled = [picture(b, m, histograms[i], rng) for b, m, rng in zip(clean, masks[i], rngs, strict=True)]
            out["picture"][i] = encode_patches(model, np.stack(filled), device)[0].numpy()


def _variant(voxels: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """The middle of (k, D, D, D) crops; with `rng`, a shifted, rotated and mirrored part with some of the lesion."""
    middle = (voxels.shape[1] - size) // 2
    shift = 0 if rng is None else rng.integers(-SHIFT, SHIFT + 1, 3)
    start = np.broadcast_to(middle + shift, 3)
    cut = voxels[(slice(None), *(slice(a, a + size) for a in start))]
    return cut if rng is None else cube_symmetry(cut, int(rng.integers(48)))


def mask_tensor(mask: np.ndarray) -> Tensor:
    """Boolean masks (N, D, D, D) as (N, 1, D, D, D) float tensors, the form `latent_masks` takes."""
    return torch.from_numpy(np.array(mask)).float()[:, None]
