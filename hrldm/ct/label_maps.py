"""Check that a lung map or mask given with a scan belongs to it: it must lie in the scan's lungs.

M = voxels of the map, O = the scan's own lungs (by threshold), both on O's coarse grid. The measure is the share
|M ∩ O| / min(|M|, |O|): near 1 also for a map of one lobe, and for one with diseased parts that a threshold misses.
A map that covers much of the lungs is also tried mirrored, rotated and shifted; if that fits clearly better, the map is
refused.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import fft, ndimage

from hrldm.ct.geometry import grid_gap, reach, sample, to_world, voxel_size
from hrldm.ct.image import read_image
from hrldm.ct.volume import CT

LOBE_NAMES = {10: "LUL", 11: "LLL", 12: "RUL", 13: "RML", 14: "RLL"}  # TotalSegmentator labels
LEFT, RIGHT = (10, 11), (12, 13, 14)
# offset of their lobe numbers from ours
NUMBERINGS = {"TotalSegmentator v2": 0, "TotalSegmentator v1": 3, "MAISI and VISTA3D": 18}
LEAST_SHARE = 0.7  # of the map in the scan's lungs
BETTER_BY = 0.05  # least gain in share for a map to count as mirrored or rotated
MOVED_BY, MOVED_MM = 0.1, 10.0  # least gain in share, and distance, for a map to count as shifted
WRONG_SIDE_MM = 20.0
NEAR_LUNG_MM = 20.0
LESION_HU = (-700.0, 250.0)  # plausible mean of a known lesion outside the lung labels
COARSE_MM = 8.0


def read_beside(path: str | Path, ct: CT) -> tuple[np.ndarray, np.ndarray]:
    """Whole-number labels (x, y, z) of an image file in the world space of `ct`, and its affine.

    Raises:
        ValueError: unreadable or not finite; or it has the CT's shape but a made-up affine (origin 0).
    """
    image = read_image(path)
    affine, shape, values = image.affine, image.array.shape, image.array
    lost = sorted(shape) == sorted(ct.shape) and np.abs(affine[:3, 3]).max() < 1e-3
    places = [reach(a, [-0.5] * 3, np.array(n) - 0.5) for a, n in ((affine, shape), (ct.affine, ct.shape))]
    if lost and np.abs(np.subtract(*places)).max() > voxel_size(ct.affine).max():
        size = " × ".join(f"{s:.3g}" for s in voxel_size(affine))
        raise ValueError(
            f"{path}: its affine is not that of {ct.source or 'the CT'} but one without a place (origin 0, voxels of {size} "
            "mm), so where it lies is lost; save it again with the affine of the CT"
        )
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: voxels that are NaN or infinite; save whole numbers, 0 where nothing is marked")
        values = np.rint(values)
    return values, affine


def read_map(path: str | Path, ct: CT, own: np.ndarray, own_affine: np.ndarray) -> tuple[np.ndarray, str | None]:
    """A lung mask or lobe map on the CT's grid.

    Args:
        path: image file in the CT's world space, any grid
        own:  (x, y, z) bool, the lungs as seen on the CT itself, on their own grid with `own_affine`

    Returns:
        labels (X, Y, Z) uint8: our lobe numbers if the map has lobes, else 1; and the numbering found (`NUMBERINGS`),
        None for a plain mask.

    Raises:
        ValueError: unreadable, not finite, without a voxel inside the CT.
    """
    values, affine = read_beside(path, ct)
    if values.max() == 5 and not np.isin(values, (1, 2)).any() and np.isin(values, (3, 4)).any():
        values = np.isin(values, (3, 4))  # LUNA16: 3 and 4 are the lungs, 5 the trachea
    known = [label + offset for label in LOBE_NAMES for offset in NUMBERINGS.values()]
    numbered, numbering = np.isin(values, known), None
    if numbered.any():
        values = (values * numbered).astype(np.uint8)
        numbering = _numbering(sample(values, affine, own.shape, own_affine, order=0, outside=0), own, own_affine)
        values = _lobes(values, numbering)
    else:
        values = (values > 0).view(np.uint8)
    same = values.shape == ct.shape and grid_gap(affine, ct.affine, ct.shape) < ct.spacing.min() / 2
    labels = values if same else sample(values, affine, ct.shape, ct.affine, order=0, outside=0)
    if not labels.any():
        raise ValueError(f"{path}: no lung voxel within {ct.source or 'the CT'}; it belongs to another scan")
    return labels, numbering


def _lobes(values: np.ndarray, numbering: str) -> np.ndarray:
    """Our lobe numbers where `values` are the lobes of this numbering, else 0."""
    ours = values - np.uint8(NUMBERINGS[numbering])  # below the offset: 238 or more, no lobe either
    return ours * ((ours >= min(LOBE_NAMES)) & (ours <= max(LOBE_NAMES)))


def _numbering(values: np.ndarray, own: np.ndarray, affine: np.ndarray) -> str:
    """The numbering that puts more of the map in the lungs; if similar, the one with the lobes in the right places."""
    lobes = {name: _lobes(values, name) for name in NUMBERINGS}
    lung = {name: int(own[lobes[name] > 0].sum()) for name in NUMBERINGS}
    likely = [name for name in NUMBERINGS if lung[name] >= 0.95 * max(lung.values())]
    return next((name for name in likely if not _wrong_sides(lobes[name], own, affine)), likely[0])


def check_map(path: str | Path, ct: CT, labels: np.ndarray, own: np.ndarray, affine: np.ndarray) -> None:
    """Raise ValueError for labels (X, Y, Z) on the CT's grid that do not fit its lungs; arguments as for `read_map`."""
    name = ct.source or "the CT"
    on_own = sample(labels, ct.affine, own.shape, affine, order=0, outside=0)
    if wrong := _wrong_sides(on_own, own, affine):
        raise ValueError(f"{path}: {wrong}, so it is mirrored, turned or of other numbers; give the map of {name}")
    step = max(1, round(COARSE_MM / voxel_size(affine).min()))
    own, affine = own[::step, ::step, ::step], affine @ np.diag([step, step, step, 1.0])

    def fitting(mask: np.ndarray) -> np.ndarray:
        return sample(mask, ct.affine, own.shape, affine, order=0, outside=0)

    mask = labels > 0
    given = fitting(mask)
    share, belongs = _share(given, own), "give the map of this scan, with its affine"
    if given.sum() >= own.sum() / 2:
        turned = max((_share(fitting(other), own), how) for other, how in _turned(mask))
        moved = _moved(given, own, affine)
        _, (other, how) = better = max((turned[0] - BETTER_BY, turned), (moved[0] - MOVED_BY, moved))
        if better[0] > share:
            said = f"{share:.0%} of it lies in the lungs of {name}, and {other:.0%} would if it were {how}"
            raise ValueError(f"{path}: {said}; {belongs}")
    if share < LEAST_SHARE:
        said = f"{share:.0%} of it lies in the lungs of {name}, at least {LEAST_SHARE:.0%} must"
        raise ValueError(f"{path}: {said}; {belongs}")


def _share(map_: np.ndarray, own: np.ndarray) -> float:
    return float((map_ & own).sum()) / max(1, min(map_.sum(), own.sum()))


def _turned(mask: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """The mask with its axes flipped and permuted, if it keeps its shape, and a description of each."""
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)):
        there, along = mask.transpose(axes), np.flatnonzero(flips)
        words = [f"with its axes in the order {axes}"] if axes != (0, 1, 2) else []
        words += [f"mirrored along axis {' and '.join(map(str, along))}"] if any(flips) else []
        if words and there.shape == mask.shape:
            yield np.flip(there, tuple(along)), " and ".join(words)


def _moved(map_: np.ndarray, own: np.ndarray, affine: np.ndarray) -> tuple[float, str]:
    """Share after the best-fitting shift of at least `MOVED_MM`, and its description."""
    # the correlation, as scipy.signal's, which takes a second to import
    shape = [n + m - 1 for n, m in zip(own.shape, map_.shape, strict=True)]
    size = [fft.next_fast_len(n, real=True) for n in shape]
    product = fft.rfftn(own.astype(np.float32), size) * fft.rfftn(map_[::-1, ::-1, ::-1].astype(np.float32), size)
    fit = fft.irfftn(product, size)[tuple(slice(n) for n in shape)]
    shift = (np.indices(fit.shape).reshape(3, -1).T - np.array(map_.shape) + 1) @ affine[:3, :3].T
    fit = np.where(np.linalg.norm(shift, axis=1) >= MOVED_MM, fit.ravel(), 0)
    k = int(fit.argmax())
    return float(fit[k]) / max(1, min(map_.sum(), own.sum())), f"moved by {', '.join(f'{x:.0f}' for x in shift[k])} mm"


def _wrong_sides(lobes: np.ndarray, own: np.ndarray, affine: np.ndarray) -> str:
    """What is wrong with the lobes' positions (x, y, z) relative to each other and to the lungs; empty if nothing."""

    def middle(*numbers: int) -> np.ndarray:  # of lobes that are not there: NaN, which no comparison holds for
        found = np.argwhere(np.isin(lobes, numbers))
        return to_world(affine, found.mean(0)) if len(found) else np.full(3, np.nan)

    left, right = middle(*LEFT)[0], middle(*RIGHT)[0]
    lungs = to_world(affine, np.argwhere(own if own.any() else ~own))[:, 0]
    centre = (lungs.min() + lungs.max()) / 2
    if left > right or left > centre + WRONG_SIDE_MM:
        return "its left lobes lie on the patient's right"
    if right < centre - WRONG_SIDE_MM:
        return "its right lobes lie on the patient's left"
    for upper, lower in ((10, 11), (12, 14)):
        if middle(upper)[2] < middle(lower)[2]:
            return f"its {LOBE_NAMES[upper]} lies below its {LOBE_NAMES[lower]}"
    return ""


def read_avoided(path: str | Path, ct: CT, labels: np.ndarray) -> np.ndarray:
    """Voxels (X, Y, Z) bool on the CT's grid that a mask marks, for example known lesions.

    labels: (X, Y, Z) of `lungs.lung_labels`

    Raises:
        ValueError: unreadable, empty, outside the CT, or away from the lungs (in air, bone or another organ), where it
            would protect nothing.
    """
    values, affine = read_beside(path, ct)
    if not (values > 0).any():
        raise ValueError(f"{path}: empty mask; mark the lesion or lesions")
    mask = sample(values > 0, affine, ct.shape, ct.affine, order=0, outside=0)
    if not mask.any():
        raise ValueError(f"{path}: no voxel of it lies within {ct.source or 'the CT'}; is it the mask of this scan?")
    if not (mask & (labels > 0)).any():
        step = np.maximum(1, np.rint(4 / ct.spacing)).astype(int)
        lung = labels[:: step[0], :: step[1], :: step[2]] > 0
        away = ndimage.distance_transform_edt(~lung, ct.spacing * step)[tuple((np.argwhere(mask) // step).T)].min()
        mean = float(ct.array[mask].mean())
        if away > NEAR_LUNG_MM or not LESION_HU[0] <= mean <= LESION_HU[1]:
            raise ValueError(
                f"{path}: it lies {away:.0f} mm beside the lungs at a mean of {mean:.0f} HU (air or bone?), so it keeps "
                "nothing free there; is it the mask of this scan?"
            )
    return mask
