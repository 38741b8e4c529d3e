"""A generated lesion becomes voxels of its CT: the scan's own sharpness and noise, and the requested histogram, last.

The network works at 1 mm and knows nothing of the CT's slices, kernel and noise. On the CT's own grid, let x be the
original HU, M the lesion's mask, R the projection from the crop's grid (linear; the mean over a coarser voxel), N the
voxels that are at least half lesion, L the lung's level there, g the generated HU, n noise with the scan's
autocovariance, G a blur by the scanner's point-spread function, G' the rest of that blur once R and the crop's own blur are
taken off (`ct/scanner.py`). A lesion fills the air that is left beside the tissue there already, b = (x - L) / -L; beside it are air,
e = G((1 - R(M)) (1 - b)) without tissue (x > `VESSEL_HU`), and the rest w = 1 - G R(M) - e, wall:

    s   = y + (1 - b(y)) d + sqrt(1 - (1 - a)²) n,  d = G'R(M (g - L)) / G'R(M),   a = d / -L,   y = x - w (h - L) >= L
    out = the requested histogram's quantiles, in the rank order of s                      in N
    out = x + (1 - b) o c,   o = G R(M) / (G R(M) + e),   c = G(1_N (out - x)) / G(1_N (1 - b) o)   about it

So a ground-glass lesion is a veil: vessels stay its brightest parts and airways its darkest, and y lacks what its voxels have
of a wall of h HU beside it. Its edge is as sharp as the scan's other edges, but there is none towards a wall: the lesion fills
the voxels between (and d is raised where a generated lesion falls off there). What is written has the requested histogram.
Vessels and chest wall beside the lesion (b = 1) stay as they are, and a voxel that o does not reach keeps its stored value
bit for bit.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from hrldm.ct.geometry import equivalent_diameter, reach, sample, shifted, voxel_size
from hrldm.ct.nifti import scaled
from hrldm.ct.scanner import noise_of, psf_mm, scan_psf_mm
from hrldm.ct.volume import CT, from_ras, to_ras
from hrldm.insertion.matching import core_lead
from hrldm.nodules.histograms import hu_histogram, quantiles
from hrldm.nodules.positions import VESSEL_HU
from hrldm.nodules.texture import ranked

OWN_BLUR_MM = 0.6  # SD of the blur generated lesions have already: about 0.56 from the scans learned from, 0.2 from the autoencoder
OWN_NOISE = 0.8  # share of the scan's noise that is added: a generated lesion has some of its own
REACH_SDS = 3.0  # the edge ends this many SDs of the point-spread function outside the lesion
LEAST_SDS = 0.7  # voxels: the edge takes after lesion voxels at least this near
LEAST_HU = 0.5  # smaller changes are none: integers could not hold them
TISSUE = (-0.2, 1.0)  # limits of b: airways are darker than the lung's level, bone is no more than full
WALL_FALL = 0.75  # of its fall towards the lung, what a generated lesion has towards a wall (0.1 to 0.8 were seen)
LEAST_FILLED = 0.25  # with less lesion in it, a voxel lies within the wall, the fat of which is no air to fill
LUNG_QUANTILE = 40  # of the original HU in the lesion, %: the lung between its vessels
SHARPNESS_MM, NOISE_MM = 35.0, 20.0  # beyond the lesion, where the scan's sharpness and noise are measured
FINE_MM = 1.5  # voxels up to this size show what the library's scans show
# subtypes whose drawn histograms thicker voxels average: ground-glass's brightest are its place's vessels, as bright in any slice
AVERAGED = ("solid", "part-solid")
LEAST_VOXELS = 2.0  # across its diameter; with fewer, most of a lesion's voxels are mixtures with the lung
NOISE_SEED = 23  # keeps the noise's randomness apart from the sampler's


@dataclass(frozen=True, eq=False)
class Finished:
    """One lesion on its CT's grid.

    box:       slices of the CT's array
    stored:    (x, y, z) the box's new values, in the dtype of `CT.stored`
    lesion:    (x, y, z) bool, its voxels
    core:      (x, y, z) bool, those of its solid core
    before, after: (x, y, z) HU, as stored
    held:      whether this grid can hold a histogram for a lesion of this size (`holds`)
    histogram: (B,) the one that was imposed: of a `drawn` one, what this grid shows of it
    psf_mm:    (3,) SD of the scan's point-spread function about the lesion along R, A and S
    noise_hu:  SD of the scan's noise there
    reach_mm:  from the lesion's voxels to the farthest one that changes
    """

    box: tuple[slice, ...]
    stored: np.ndarray
    lesion: np.ndarray
    core: np.ndarray
    before: np.ndarray
    after: np.ndarray
    held: bool
    histogram: np.ndarray
    psf_mm: np.ndarray
    noise_hu: float
    reach_mm: float


def holds(diameter_mm: float, spacing: np.ndarray) -> bool:
    """Whether a grid of this spacing (3,) can hold the histogram of a lesion: `LEAST_VOXELS` across."""
    return diameter_mm >= LEAST_VOXELS * float(np.max(spacing))


def finished(
    ct: CT,
    generated_hu: np.ndarray,
    mask: np.ndarray,
    affine: np.ndarray,
    histogram: np.ndarray,
    seed: int,
    core: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    matching: bool = True,
    grain: bool = True,
    drawn: bool = False,
) -> Finished:
    """A generated lesion on the grid of `ct`.

    Args:
        ct:           the original, any orientation, spacing and obliquity
        generated_hu: (D, D, D) HU at 1 mm; what is outside the mask does not count
        mask:         (D, D, D) bool, the lesion
        affine:       (4, 4) of that crop
        histogram:    (B,) requested
        seed:         of the noise
        core:         (D, D, D) bool, a solid core, whose voxels rank highest
        keep:         (X, Y, Z) bool on the CT's grid, voxels about the lesion that must not change; None: none
        matching:     impose the histogram; without, the values are s
        grain:        add the scan's noise
        drawn:        the histogram is one of the library, measured at 1 mm, and nobody's wish: voxels thicker than
                      `FINE_MM` get what they average of such a lesion

    Raises:
        ValueError: shapes differ, generated values not finite, empty mask, or a lesion outside the CT.
    """
    name = ct.source or "CT"
    if mask.shape != generated_hu.shape or mask.ndim != 3:
        raise ValueError(f"{name}: mask {mask.shape} and generated crop {generated_hu.shape} must be one 3D grid")
    if not mask.any():
        raise ValueError("empty mask, there is nothing to paste; give the nodule's mask")
    if not np.isfinite(generated_hu[mask]).all():
        raise ValueError(f"{name}: NaN or infinite values in the generated crop; try another seed or checkpoint")
    corners = _corners(mask, affine)
    around = to_ras(_part(ct, corners, SHARPNESS_MM)[0])
    psf = psf_mm([around.array], around.spacing, scan_psf_mm(ct))
    box_ct, box = _part(ct, corners, REACH_SDS * max(psf.max(), 1.0) + 1.0)
    here = to_ras(box_ct)  # one order of voxels, so that a flipped CT gets the same noise
    x, spacing = here.array.astype(np.float64), here.spacing

    def seen(values: np.ndarray) -> np.ndarray:
        return projected(values.astype(np.float32), affine, x.shape, here.affine)

    share = seen(mask)
    inside = lesion_voxels(share, name)
    level = float(np.percentile(x[inside], LUNG_QUANTILE))
    air = max(-level, 100.0)

    def free(hu: np.ndarray) -> np.ndarray:
        """1 - b."""
        return 1 - np.clip((hu - level) / air, *TISSUE)

    averaged = np.where(spacing > voxel_size(affine), spacing**2 / 12, 0.0)  # variance of R's mean over a voxel
    rest = np.sqrt(np.maximum(psf**2 - OWN_BLUR_MM**2 - averaged, 0)) / spacing
    d = ndimage.gaussian_filter(seen(np.where(mask, generated_hu - level, 0.0)), rest)
    d /= np.maximum(ndimage.gaussian_filter(share, rest), 1e-3)
    blur = np.sqrt(np.maximum(psf**2 - averaged, 0)) / spacing
    filled = ndimage.gaussian_filter(share, blur, truncate=REACH_SDS)
    aerated = np.where(x > VESSEL_HU, 0.0, (1 - share) * free(x))
    aerated = ndimage.gaussian_filter(aerated, blur, truncate=REACH_SDS).clip(0, 1 - filled)
    wall = 1 - filled - aerated
    occupied = filled / np.maximum(filled + aerated, LEAST_FILLED)
    d *= 1 + WALL_FALL * (occupied - filled)
    # the wall's own HU
    behind = ndimage.maximum_filter(x, tuple(2 * np.ceil(REACH_SDS * psf / spacing).astype(int) + 1))
    own = np.maximum(x - wall * (behind - level), np.minimum(x, level))
    score = own + free(own) * d
    near = to_ras(_part(ct, corners, NOISE_MM)[0])
    noise = noise_of(near.array, near.spacing)
    if grain:
        rng = np.random.default_rng((NOISE_SEED, seed))
        score += OWN_NOISE * np.sqrt(1 - (1 - np.clip(d / air, 0, 1)) ** 2) * noise.field(x.shape, rng)
    solid, lead = np.zeros_like(inside), 0.0 if core is None else core_lead(core)
    held = holds(equivalent_diameter(mask.sum()), spacing)
    if drawn and held and (spacing > FINE_MM).any():
        fine = np.zeros(mask.shape, np.float32)
        fine[mask] = ranked(generated_hu + lead, mask, quantiles(histogram, int(mask.sum())))
        histogram = hu_histogram((seen(fine) / np.maximum(share, 1e-3))[inside], len(histogram))
    if core is not None:
        lead = seen(lead)
        solid = inside & (seen(core) >= 0.5 * share)
    values = ranked(score + lead, inside, quantiles(histogram, int(inside.sum()))) if matching else score[inside]
    change = np.zeros_like(x)
    # where the grid is too coarse, a voxel is a mixture of lesion and lung
    change[inside] = (values - x[inside]) * (1.0 if held else share[inside])
    beside = np.maximum(psf / spacing, LEAST_SDS)
    weight = free(x) * occupied
    edge = weight * ndimage.gaussian_filter(change, beside)
    edge /= np.maximum(ndimage.gaussian_filter(np.where(inside, weight, 0.0), beside), 1e-3)
    fixed = np.abs(edge) < LEAST_HU
    if keep is not None:
        fixed |= to_ras(CT(keep[box], box_ct.affine)).array
    change = np.where(inside, change, np.where(fixed, 0.0, edge))
    stored, changed = here.stored.copy(), change != 0
    stored[changed] = ct.to_stored((x + change)[changed])
    farthest = ndimage.distance_transform_edt(~inside, spacing)[stored != here.stored].max(initial=0.0)
    turned = (from_ras(a, box_ct) for a in (stored, inside, solid, x, scaled(stored, ct.slope, ct.inter)))
    return Finished(box, *turned, held, histogram, psf, noise.sd, float(farthest))


def lesion_in(ct: CT, mask: np.ndarray, affine: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """A lesion mask (x, y, z) on the grid of `ct`: slices of the CT's array; there, the lesion's voxels and each one's share."""
    part, box = _part(ct, _corners(mask, affine), 1.0)
    share = projected(mask.astype(np.float32), affine, part.shape, part.affine)
    return box, lesion_voxels(share, ct.source or "CT"), share


def lesion_voxels(share: np.ndarray, name: str) -> np.ndarray:
    """Voxels (x, y, z) that are at least half lesion; of a lesion too small for that, the one that holds most of it.

    Raises:
        ValueError: no voxel of this CT (named) holds any of it.
    """
    if not share.any():
        raise ValueError(f"{name}: the lesion lies outside the CT; place it inside")
    return share >= min(0.5, share.max())


def _corners(mask: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RAS mm of the box around a mask."""
    voxels = np.argwhere(mask)
    return reach(affine, voxels.min(0) - 0.5, voxels.max(0) + 0.5)


def _part(ct: CT, corners: tuple[np.ndarray, np.ndarray], margin_mm: float) -> tuple[CT, tuple[slice, ...]]:
    """The part of the CT between two corners (RAS mm) and `margin_mm` about it, and its slices.

    Raises:
        ValueError: it lies outside the CT.
    """
    low, high = reach(np.linalg.inv(ct.affine), corners[0] - margin_mm, corners[1] + margin_mm)
    low = np.maximum(np.ceil(low - 0.5 - 1e-6).astype(int), 0)  # voxel i covers i ± 1/2; ties go out on both sides
    high = np.minimum(np.floor(high + 0.5 + 1e-6).astype(int) + 1, ct.shape)
    if (low >= high).any():
        raise ValueError(f"{ct.source or 'CT'}: the lesion lies outside the CT; place it inside")
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    array = ct.array[box]
    stored = array if ct.stored is ct.array else ct.stored[box]
    return replace(ct, array=array, stored=stored, affine=shifted(ct.affine, low)), box


def projected(
    values: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    target_affine: np.ndarray,
    outside: float | None = 0.0,
) -> np.ndarray:
    """R: `values` (x, y, z) on a grid of `shape`, averaged over the voxels of a coarser one; float32.

    outside: value beyond `values`; None repeats their edge
    """
    parts = np.maximum(1, np.ceil(voxel_size(target_affine) / voxel_size(affine) - 1e-3)).astype(int)
    finer = np.diag([*(1 / parts), 1.0])
    finer[:3, 3] = (1 / parts - 1) / 2  # sub-voxel j of n lies at (j + 1/2)/n − 1/2
    fine = sample(values, affine, tuple(int(n) for n in shape * parts), target_affine @ finer, outside=outside)
    blocks = [size for pair in zip(shape, parts, strict=True) for size in pair]
    return fine.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float64).astype(np.float32)
