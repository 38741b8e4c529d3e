"""Real nodules transplanted into healthy lung of another patient.

They serve as training data with real texture, real partial-volume edges and a background without remnants of a nodule;
as the row `transplant` of Table 1 (a real nodule elsewhere: what a perfect generator would reach, without any
training); and as healthy background for tests on real nodules, whose own surroundings still hold their partial-volume
shell. Beyond the last slice of a box, the fall-off repeats that slice.

    image = background + w (nodule - background),   w = 1 in the mask, falling to 0 over `FALL_OFF_MM` beyond it

A copy can be recast (`recast`): the same texture with the mean and SD of another nodule of its subtype and size, so
that a network must use the requested histogram and cannot recognise the nodule by it.

Donors (`givers`) are rows of a manifest (cubes, or boxes with hardly a margin); hosts are CTs with lung labels
(`Host`). Both patients are recorded; a nodule goes only into hosts that take its split, and a host that takes test nodules
takes no others. Hosts themselves are not split by patient: the embedded CT takes training nodules in its right and
validation nodules in its left lung, and whether other networks have seen a host is for the caller to say.
"""

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm import tqdm

from hrldm.cache import atomic_folder, digest
from hrldm.ct.geometry import resample, sample
from hrldm.ct.label_maps import LEFT, RIGHT
from hrldm.ct.lungs import lung_labels
from hrldm.ct.nifti import open_nifti
from hrldm.ct.volume import read_ct
from hrldm.nodules.augmentation import CUBE_SYMMETRIES, cube_symmetry
from hrldm.nodules.cubes import HIGHEST_HU, LOWEST_HU, cube_about, whole_hu, write_cubes
from hrldm.nodules.histograms import choose_histogram, histogram_moments
from hrldm.nodules.lidc_mini import PATIENT, clean_ct, clear_of_nodule
from hrldm.nodules.manifest import RATINGS, file_name, write_manifest
from hrldm.nodules.masks import offsets
from hrldm.nodules.patches import load_patches
from hrldm.nodules.positions import LungMap
from hrldm.nodules.shapes import load_shapes

# donors
MAX_SLICE_MM = 1.6  # thicker slices show steps along z at 1 mm
MAX_END_AREA = 0.3  # area of the box's first and last slice relative to the largest: above it, the nodule is cut flat
DIAMETER_MM = (5.0, 30.0)  # smaller ones are a few voxels, larger ones do not fit the training crop
# positions
FALL_OFF_MM = 3.0  # the scanner's blur reaches about this far beyond a nodule
MIN_LUNG = 0.97  # of all touched voxels: allows vessels and the gaps they leave in threshold masks, not the pleura
MAX_MEAN_HU = -700.0  # of all touched voxels: aerated lung, without large vessels or disease
TRIES = 4000  # positions tried before a nodule is skipped
SIDE = 64  # side of the written cubes, in voxels of 1 mm: the training crop and room to shift it
LEAST_CONTRAST, MOST_CONTRAST = 50.0, 4.0  # limits of a recast: HU, and factor on the shell's contrast
MOST_SPREAD = 1.25  # limit of a recast: factor on the SD
HOST = "host_patient_id"
KEPT = ("patient_id", "subtype", "diameter_mm", "volume_mm3", "split", *RATINGS)  # of the donor's row
VERSION = 2  # raise when the same nodules and hosts would give other transplants; part of cache keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Host:
    """A CT that receives nodules.

    patient_id: of the host
    splits:     of the donors whose nodules may go into it
    hu:         (x, y, z) int16 at 1 mm, RAS
    affine:     (4, 4), voxel -> RAS mm
    lungs:      (x, y, z) int, 0 outside the lungs
    allowed:    (x, y, z) bool, voxels allowed as a centre; None: all of the lungs
    """

    patient_id: str
    splits: tuple[str, ...]
    hu: np.ndarray
    affine: np.ndarray
    lungs: np.ndarray
    allowed: np.ndarray | None = None

    @functools.cached_property
    def lung_map(self) -> LungMap:
        return LungMap(self.lungs, self.allowed)


def key_of(hosts: Sequence[Host]) -> str:
    """Hash of hosts and of the version of transplanting."""
    return digest(VERSION, *(getattr(host, f.name) for host in hosts for f in fields(Host)))


def read_host(ct: str | Path, lungs: str | Path, patient_id: str, splits: tuple[str, ...]) -> Host:
    """A host from a CT and its lung mask or lobe map, both files in any orientation and spacing.

    Raises:
        ValueError: see `read_ct` and `lung_labels`.
    """
    scan = read_ct(ct)
    labels, _ = lung_labels(scan, lungs)
    turned = nib.as_closest_canonical(nib.Nifti1Image(scan.array, scan.affine))
    hu, affine = resample(np.asarray(turned.dataobj), turned.affine)
    at = sample(labels, scan.affine, hu.shape, affine, order=0, outside=0)
    return Host(patient_id, splits, whole_hu(hu), affine, at.astype(np.uint8))


def embedded_hosts() -> list[Host]:
    """The embedded CT (LIDC-IDRI-0001) away from its own nodule: right lung for training, left lung for validation."""
    hu, affine, lobes = clean_ct()
    allowed = clear_of_nodule(lobes, load_shapes().table, SIDE)
    return [
        Host(PATIENT, (split,), hu, affine, lobes, allowed & np.isin(lobes, side))
        for split, side in (("train", RIGHT), ("val", LEFT))
    ]


def givers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a manifest whose nodules can be transplanted: of `DIAMETER_MM`, in thin slices, and not cut flat by the
    first or last slice of their box."""
    fits = np.array(frame.diameter_mm.between(*DIAMETER_MM))
    for i in np.flatnonzero(fits):
        turned = nib.as_closest_canonical(open_nifti(frame["mask"].iloc[i]))
        areas = (np.asarray(turned.dataobj) > 0).sum((0, 1))
        thin = turned.header.get_zooms()[2] <= MAX_SLICE_MM
        fits[i] = thin and max(areas[0], areas[-1]) <= MAX_END_AREA * areas.max()
    return frame[fits].reset_index(drop=True)


def weight(mask: np.ndarray) -> np.ndarray:
    """w (D, D, D) float32 of the module docstring, for a mask at 1 mm."""
    return np.clip(1 - (ndimage.distance_transform_edt(~mask) - 1) / FALL_OFF_MM, 0, 1).astype(np.float32)


def find_place(host: Host, touched: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Host voxel (3,) for the middle (n // 2) of `touched` (D, D, D) bool; None if `TRIES` positions all fail."""
    voxels = offsets(touched)
    for centre in itertools.islice(host.lung_map.candidates(rng), TRIES):
        at = voxels + centre
        if (at < 0).any() or (at >= host.hu.shape).any():
            continue
        at = tuple(at.T)
        if (host.lungs[at] > 0).mean() >= MIN_LUNG and host.hu[at].mean() < MAX_MEAN_HU:
            return centre
    return None


def paste(background: np.ndarray, nodule: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` of the module docstring; all (D, D, D), HU at 1 mm. Voxels where w = 0 are the background's own."""
    w = weight(mask)
    return np.where(w > 0, background + w * (nodule.astype(np.float32) - background), background)


def recast(nodule: np.ndarray, mask: np.ndarray, mean_hu: float, sd_hu: float, lung_hu: float) -> np.ndarray:
    """A nodule (D, D, D) with the given mean and SD (the SD within a factor of `MOST_SPREAD`, beyond which the noise
    would show); its partial-volume shell keeps its share of the contrast to the lung at `lung_hu`."""
    own = nodule[mask].astype(np.float32)
    spread = np.clip(sd_hu / max(own.std(), 1), 1 / MOST_SPREAD, MOST_SPREAD)
    contrast = np.clip((mean_hu - lung_hu) / max(own.mean() - lung_hu, LEAST_CONTRAST), 0, MOST_CONTRAST)
    out = lung_hu + contrast * (nodule.astype(np.float32) - lung_hu)
    out[mask] = mean_hu + spread * (own - own.mean())
    return out.clip(LOWEST_HU, HIGHEST_HU)


def transplant(
    nodules: pd.DataFrame,
    hosts: Sequence[Host],
    target: Path,
    copies: Mapping[str, int] | None = None,
    seed: int = 0,
    side: int = SIDE,
    library: pd.DataFrame | None = None,
) -> Path:
    """Write a manifest folder of `nodules`, each transplanted into hosts of its split; made once.

    copies:  positions per training nodule, by subtype; other nodules get one, as do all if it is None
    nodules: rows of a loaded manifest, filtered by `givers`
    target:  folder to create; returned unchanged if it exists
    library: rows as in `histogram_library`; every second copy of a training nodule is `recast` to one of them

    The manifest has the nodules' own columns, `background`, `host_patient_id` (`patient_id` is the donor's),
    `source_id`, `symmetry`, `histogram_id` (the source of a recast nodule's mean and SD, else empty) and the centre
    voxel `i, j, k` in the host. Nodules without a position are left out and logged.

    Raises:
        ValueError: no host for a split, a test host's patient also receives nodules of other splits, or no position for
            any nodule.
    """
    if target.exists():
        return target
    _check_hosts(hosts, nodules.split.unique())
    patches = load_patches(nodules, side)
    rows, homeless = [], []
    with atomic_folder(target) as part:
        for i, row in tqdm(list(nodules.iterrows()), desc="transplants", mininterval=10):
            trains, donor = row.split == "train", str(row.patient_id).casefold()
            takers = [h for h in hosts if row.split in h.splits and h.patient_id.casefold() != donor]
            for copy in range((copies or {}).get(row.subtype, 1) if trains else 1):
                rng = np.random.default_rng((seed, i, copy))
                # evaluated nodules keep their orientation: the slices of a rotated one would give it away
                symmetry = int(rng.integers(len(CUBE_SYMMETRIES))) if trains else 0
                hu, mask = (cube_symmetry(a[i], symmetry) for a in (patches.hu, patches.mask))
                host = takers[(i + copy) % len(takers)] if takers else None
                touched = weight(mask) > 0
                centre = None if host is None else find_place(host, touched, rng)
                if centre is None:
                    homeless.append(row.nodule_id)
                    continue
                background, chosen = cube_about(host.hu, centre, side), ""
                if library is not None and copy % 2 and trains:
                    chosen, histogram = choose_histogram(row.subtype, row.diameter_mm, rng, library)
                    hu = recast(hu, mask, *histogram_moments(histogram), float(background[touched].mean()))
                image = np.rint(paste(background, hu, mask)).astype(np.int16)
                name = file_name(f"{row.nodule_id}_at_{host.patient_id}_{copy}")
                own = row[[c for c in KEPT if c in row]].to_dict()
                own |= write_cubes(part, name, host.affine, centre, image=image, background=background, mask=mask)
                own |= {"nodule_id": name, "source_id": row.nodule_id, HOST: host.patient_id}
                own |= dict(zip("ijk", centre.tolist(), strict=True))
                rows.append(own | {"symmetry": symmetry, "histogram_id": chosen})
        if not rows:
            raise ValueError("no nodule found a place in healthy lung; give other host CTs, or check their lung masks")
        write_manifest(pd.DataFrame(rows), part / "manifest.csv")
    if homeless:
        n = len(homeless)
        logger.warning("%d of %d transplants found no place and are left out: %s …", n, n + len(rows), homeless[0])
    return target


def _check_hosts(hosts: Sequence[Host], splits: Sequence[str]) -> None:
    """Raise ValueError if a split has no host, or the patient of a test host also receives nodules of another split."""
    if lonely := [split for split in splits if not any(split in h.splits for h in hosts)]:
        raise ValueError(f"no host CT for the nodules of split(s) {', '.join(lonely)}")
    taken: dict[str, set[str]] = {}
    for host in hosts:
        taken.setdefault(host.patient_id.casefold(), set()).update(host.splits)
    if shared := sorted({h.patient_id for h in hosts if {"test"} < taken[h.patient_id.casefold()]}):
        raise ValueError(
            f"host patient(s) {', '.join(shared)} would take test nodules and others: split hosts by patient"
        )
