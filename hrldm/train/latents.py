"""The latent cache: each training nodule encoded once (posterior mean and standard deviation), memory-mapped from disk.

A turned latent is not the latent of the turned crop, so augmentation happens before encoding: every nodule is stored in
`latent_variants` versions, the first untouched, the others turned, mirrored and shifted. The cache is keyed by the
autoencoder's weights, the crops and the settings; a killed encoding leaves nothing behind that could be taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrldm import paths
from hrldm.config import Profile
from hrldm.data.patches import Patches
from hrldm.data.volumes import cube_symmetry
from hrldm.model.autoencoder import FACTOR, Autoencoder, normalise_hu
from hrldm.model.histogram import hu_histogram
from hrldm.model.window import Window, lesion_window

SHIFT = 4  # mm, largest shift of an augmented variant


@dataclass(frozen=True, eq=False)
class LatentCache:
    """N nodules in V variants.

    mean, std: (N, V, c, d, h, w) float32, memory-mapped; the posterior of the crop
    mask:      (N, V, D, H, W) bool, memory-mapped
    histogram: (N, B) HU histogram of each lesion (c_hist)
    subtype:   (N,) labels
    scale:     1 / std of all latents (mean removed by the autoencoder); z = scale * latent goes to the U-Net
    """

    mean: np.ndarray
    std: np.ndarray
    mask: np.ndarray
    histogram: np.ndarray
    subtype: np.ndarray
    scale: float

    def __len__(self) -> int:
        return len(self.mean)


def windows(cache: LatentCache, profile: Profile) -> dict[tuple[int, int], Window]:
    """The window of every nodule and variant."""
    n, v = cache.mask.shape[:2]
    levels = len(profile.unet_channels)
    return {
        (i, k): lesion_window(np.asarray(cache.mask[i, k]), profile.lesion_context, levels)
        for i in range(n)
        for k in range(v)
    }


def take(cache: LatentCache, index: np.ndarray, places: Mapping[tuple[int, int], Window]) -> dict[str, Tensor]:
    """A batch: latents z0 and std (scaled), voxel masks, conditions of the nodules and variants `index` (B, 2), each cut
    to its window; their windows must be of one side. `start` (B, 3) is where they begin."""
    i, v = index.T
    cuts = [places[int(a), int(b)] for a, b in index]
    mean, std, mask = (np.asarray(getattr(cache, name)[i, v]) for name in ("mean", "std", "mask"))
    return {
        "z0": torch.from_numpy(np.stack([x[w.latent] for x, w in zip(mean, cuts, strict=True)])) * cache.scale,
        "std": torch.from_numpy(np.stack([x[w.latent] for x, w in zip(std, cuts, strict=True)])) * cache.scale,
        "mask": mask_tensor(np.stack([x[w.voxels] for x, w in zip(mask, cuts, strict=True)])),
        "subtype": torch.from_numpy(cache.subtype[i]),
        "histogram": torch.from_numpy(cache.histogram[i]).float(),
        "index": torch.from_numpy(np.array(index)),
        "start": torch.tensor([w.start for w in cuts]),
    }


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
    model: Autoencoder, patches: Patches, size: int, variants: int, bins: int, seed: int, device="cpu"
) -> LatentCache:
    """Encode crops of `size` mm out of larger `patches` (or read the cache that a former call left).

    Raises:
        ValueError: the patches leave no room to shift (they need `size` + 8 mm when there are variants).
    """
    room = patches.hu.shape[1] - size
    if room < (2 * SHIFT if variants > 1 else 0):
        raise ValueError(f"crops of {patches.hu.shape[1]} mm leave no room for shifted {size} mm variants")
    settings = {"size": size, "variants": variants, "seed": seed, "bins": bins, "version": 1}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in (patches.hu, patches.mask):
        key.update(np.ascontiguousarray(array).data)
    folder = paths.cache_dir() / "latents" / f"{weights_digest(model)}-{key.hexdigest()[:16]}"
    if not folder.exists():
        _encode_all(model, patches, size, variants, seed, device, folder)
    arrays = {k: np.load(folder / f"{k}.npy", mmap_mode="r") for k in ("mean", "std", "mask")}
    scale = 1.0 / float(np.sqrt(np.mean(np.asarray(arrays["mean"], np.float64) ** 2)))
    return LatentCache(**arrays, histogram=lesion_histograms(patches, bins), subtype=patches.subtype, scale=scale)


def _encode_all(model, patches, size, variants, seed, device, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    n, d = len(patches), size // FACTOR
    shape = (n, variants, model.latent_channels, d, d, d)
    out = {k: np.lib.format.open_memmap(part / f"{k}.npy", "w+", np.float32, shape) for k in ("mean", "std")}
    masks = np.lib.format.open_memmap(part / "mask.npy", "w+", bool, (n, variants, size, size, size))
    for i in tqdm(range(n), desc="latents", mininterval=10):
        crops = np.empty((variants, size, size, size), np.int16)
        for v in range(variants):
            rng = np.random.default_rng((seed, i, v))
            crops[v], masks[i, v] = _variant(patches.hu[i], patches.mask[i], size, rng if v else None)
        mean, std = encode_patches(model, crops, device)
        out["mean"][i], out["std"][i] = mean.numpy(), std.numpy()
    del out, masks
    try:
        os.replace(part, folder)
    except OSError:  # another process was first; its cache is the same
        shutil.rmtree(part)


def _variant(hu: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator | None):
    """The middle crop, or (with a generator) a shifted, turned and mirrored one that still holds some of the lesion."""
    middle = (hu.shape[0] - size) // 2
    if rng is None:
        cut = (slice(middle, middle + size),) * 3
        return hu[cut], mask[cut]
    cut = tuple(slice(a, a + size) for a in middle + rng.integers(-SHIFT, SHIFT + 1, 3))
    symmetry = int(rng.integers(48))
    return cube_symmetry(hu[cut], symmetry), cube_symmetry(mask[cut], symmetry)


def mask_tensor(mask: np.ndarray) -> Tensor:
    """Boolean masks (N, D, D, D) as (N, 1, D, D, D) float tensors, the form `latent_masks` takes."""
    return torch.from_numpy(np.array(mask)).float()[:, None]
