"""The paper's way, for comparison: Algorithm 2 over the latent of the whole scan, and the whole scan decoded.

Every voxel of the body then carries the autoencoder's error, and time and memory grow with the scan instead of the lesion.
`insert` does the same for the lesion's own crop and keeps the rest. Sampler, steps and background rule are the generator's.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import reach, resample, sample, shifted, to_world
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT
from hrldm.insertion.finish import lesion_in
from hrldm.insertion.generator import Generator, Request
from hrldm.insertion.insert import Inserted, nodule_record
from hrldm.insertion.place import LungSpace, Nodule, place_nodule
from hrldm.insertion.quality import assess
from hrldm.insertion.wish import Wish
from hrldm.model.autoencoder import FACTOR, denormalise_hu, normalise_hu
from hrldm.nodules.masks import box_of, offsets
from hrldm.nodules.shapes import ShapeLibrary, load_shapes
from hrldm.train.device import free_memory_mb
from hrldm.train.latents import mask_tensor

BYTES_A_VOXEL = 450  # of decoding at once with the shipped autoencoder, measured: 15.2 GB for 36 million voxels
TILE = 48  # voxels, about the crops that the autoencoder was trained on
BODY_HU, BODY_GRID_MM = -500.0, 4.0


def insert_whole(
    ct: CT,
    wishes: Sequence[Wish],
    generator: Generator,
    labels: np.ndarray,
    avoid: np.ndarray | None = None,
    retries: int = 0,
    library: ShapeLibrary | None = None,
    **_,
) -> Inserted:
    """As `insert`, by Algorithm 2 over the whole body at 1 mm; arguments and result as there, but nothing is tried again or
    brought to the scan's sharpness, noise and histogram.

    Raises:
        ValueError: more than one wish (Algorithm 2 has one mask and one condition), or too little memory, with how much.
    """
    if len(wishes) != 1:
        raise ValueError(f"Algorithm 2 makes one nodule at a time, {len(wishes)} are asked for")
    nodule = place_nodule(LungSpace.of(ct, labels, avoid), wishes[0], library or load_shapes(), 1)
    hu, grid, mask = algorithm2(ct, nodule, generator)
    box, affine = _reached(grid, hu.shape, ct)
    stored = ct.stored.copy(order="K")
    stored[box] = ct.to_stored(sample(hu, grid, stored[box].shape, affine))
    place, lesion, _ = lesion_in(ct, mask, grid)
    before, after = (scaled(x[place], ct.slope, ct.inter) for x in (ct.stored, stored))
    quality = assess(before, after, lesion, ct.spacing, nodule.histogram)
    found = np.zeros(ct.shape, np.uint8)
    found[place][lesion] = 1
    core = np.zeros(ct.shape, bool)
    return Inserted(stored, found, core, [nodule_record(nodule, nodule.histogram, quality, nodule.noise_seed, 1)])


def algorithm2(ct: CT, nodule: Nodule, generator: Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU of the decoded body (X, Y, Z) float32, its affine (1 mm, RAS), and the lesion's mask on that grid.

    Raises:
        ValueError: less memory is free than decoding at once takes.
    """
    plain = dataclasses.replace(generator.sampling, match_t_max=None)  # matching is ours, and decodes at every step
    generator = dataclasses.replace(generator, sampling=plain)
    grid, shape = body_grid(ct, FACTOR * 2 ** (len(generator.config.unet.channels) - 1))
    _check_memory(shape)
    mask = np.zeros(shape, bool)
    voxels = to_world(np.linalg.inv(grid), nodule.centre_mm) + offsets(nodule.mask)
    mask[tuple(np.rint(voxels).astype(int).T)] = True
    background = sample(ct.array, ct.affine, shape, grid)
    request = Request(
        background[None], mask[None], np.array([SUBTYPES.index(nodule.wish.subtype)]), nodule.histogram[None],
        np.array([nodule.noise_seed]),
    )  # fmt: skip
    with torch.no_grad(), _lean_attention(generator.unet):
        z_bg = _encoded(generator, background) * generator.scale  # Algorithm 2, line 1
        if (picture := generator.pictures(request)) is not None:
            picture = _encoded(generator, picture[0]) * generator.scale
        for state in generator.denoise(request, z_bg, mask_tensor(mask[None]), picture=picture):
            z = state.z
        hu = denormalise_hu(generator.autoencoder.decode(z / generator.scale).clamp(0, 1))
    return hu[0, 0].cpu().numpy(), grid, mask


def _encoded(generator: Generator, hu: np.ndarray) -> torch.Tensor:
    """Latents (1, c, d, h, w) of a volume in cubes of `TILE` voxels, as MAISI encodes whole scans too: the encoder's attention
    over all latent voxels at once would take a terabyte."""
    x = normalise_hu(torch.from_numpy(hu))[None, None]
    z = torch.empty(1, generator.autoencoder.latent_channels, *(n // FACTOR for n in hu.shape), device=generator.device)
    for corner in np.ndindex(*(-(-n // TILE) for n in hu.shape)):
        voxels = tuple(slice(TILE * i, min(TILE * (i + 1), n)) for i, n in zip(corner, hu.shape, strict=True))
        latent = tuple(slice(s.start // FACTOR, s.stop // FACTOR) for s in voxels)
        z[(..., *latent)] = generator.autoencoder.encode(x[(..., *voxels)].to(generator.device))[0]
    return z


def body_grid(ct: CT, multiple: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine and shape of a 1 mm RAS grid over the patient (the air around is left out), each side a `multiple`."""
    hu, affine = resample(ct.array, ct.affine, BODY_GRID_MM)
    labels, n = ndimage.label(hu > BODY_HU)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:])) if n else 0
    box = box_of(labels == largest)
    first, last = reach(affine, [s.start - 1 for s in box], [s.stop for s in box])
    low, high = np.floor(first), np.ceil(last)
    shape = tuple(int(-(-n // multiple) * multiple) for n in high - low + 1)
    grid = np.eye(4)
    grid[:3, 3] = low
    return grid, shape


def _check_memory(shape: tuple[int, ...]) -> None:
    need, free = int(np.prod(shape)) * BYTES_A_VOXEL / 2**30, free_memory_mb() / 2**10
    if need > free:
        raise ValueError(
            f"decoding {' x '.join(map(str, shape))} voxels at once takes about {need:.0f} GB of memory, {free:.0f} are free"
        )


@contextlib.contextmanager
def _lean_attention(unet: nn.Module) -> Iterator[None]:
    """Attention without its N x N matrix, which a whole scan's latent has no memory for; the result is the same."""
    blocks = [m for m in unet.modules() if hasattr(m, "use_flash_attention")]
    before = [m.use_flash_attention for m in blocks]
    try:
        for m in blocks:
            m.use_flash_attention = True
        yield
    finally:
        for m, value in zip(blocks, before, strict=True):
            m.use_flash_attention = value


def _reached(grid: np.ndarray, shape: tuple[int, ...], ct: CT) -> tuple[tuple[slice, ...], np.ndarray]:
    """Slices of the CT's grid whose voxels lie within the 1 mm grid, and their affine."""
    first, last = reach(np.linalg.inv(ct.affine) @ grid, [0, 0, 0], [n - 1 for n in shape])
    low = np.maximum(np.ceil(first), 0).astype(int)
    high = np.minimum(np.floor(last).astype(int) + 1, ct.shape)
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)), shifted(ct.affine, low)
