"""Can a lesion be told from a real one in the file that `insert` writes, whatever the scan's voxels? (`realism.csv`)

Real nodules of a manifest are set against synthetic ones of the same shapes in healthy lung of one CT (`displaced`).
Everything is seen through one voxel grid: the host CT is brought to it before anything is inserted, and so are the real
nodules. Each place asks for a histogram as `insert` draws it where none is given: from the shipped library of training
nodules, measured at 1 mm; in thicker slices the lesion gets what they show of it.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from hrldm.ct.geometry import crop_affine, equivalent_diameter, sample, to_world
from hrldm.ct.volume import CT
from hrldm.insertion.finish import projected
from hrldm.insertion.generator import Request
from hrldm.insertion.intensity import fitted
from hrldm.nodules.histograms import FLOOR_REACH, draw_histogram, lung_floor
from hrldm.nodules.patches import Patches
from hrldm.nodules.transplant import Host
from study.experiments import shape_patients
from study.measure.realism import feature_table, realism
from study.study import Study
from study.systems import texture
from study.systems.inserted import in_scans

Generate = Callable[[Request], np.ndarray]  # an order -> HU crops (N, D, D, D) at 1 mm


def on_grid(hu: np.ndarray, affine: np.ndarray, spacing: np.ndarray) -> CT:
    """A volume (x, y, z) at 1 mm as a scan with other voxels shows it: integers, averaged over a coarser voxel."""
    grid = np.diag([*spacing, 1.0])
    grid[:3, 3] = (spacing - 1) / 2  # both begin at the same face
    shape = tuple(int(n) for n in np.maximum(1, np.array(hu.shape) // spacing))
    seen = projected(hu.astype(np.float32), affine, shape, affine @ grid, outside=None)
    return CT(np.rint(seen).astype(np.int16), affine @ grid)


def seen(crops: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Crops (N, D, D, D) at 1 mm as a scan with other voxels shows them, back at 1 mm."""
    scans = (on_grid(hu, np.eye(4), spacing) for hu in crops)
    return np.stack([sample(s.array, s.affine, crops[0].shape, np.eye(4)) for s in scans])


def drawn_histograms(places: Patches, seed: int) -> np.ndarray:
    """(N, bins): a histogram for each place as `insert` draws it for one nodule, no darker than the lung there; vessels
    are not looked for.

    places: backgrounds (N, D, D, D) HU and the lesions' masks about their middle
    """
    middle = places.hu.shape[1] // 2
    near = (slice(None), *[slice(max(0, middle - FLOOR_REACH), middle + FLOOR_REACH + 1)] * 3)
    found = []
    for i, (around, mask, row) in enumerate(zip(places.hu[near], places.mask, places.frame.itertuples(), strict=True)):
        rng, size = np.random.default_rng((seed, i)), equivalent_diameter(mask.sum())
        found.append(fitted(draw_histogram(row.subtype, size, rng, lung_floor(around))[1], row.subtype, mask))
    return np.stack(found)


def realism_in_file(
    study: Study, split: str, native: Patches, host: Host, generate: Generate, spacing: np.ndarray
) -> pd.DataFrame:
    """`realism.csv` of the lesions in the file (`inserted`), beside a texture without training: pasted at 1 mm and then seen
    through the grid (`texture`), or in the file in the network's place (`texture-inserted`); `transplant` is the floor.

    study, native: of `displaced`
    spacing:       (3,) mm, of the grid
    """
    truth, background = study.patches(split), study.backgrounds(split)
    seeds = np.random.SeedSequence((study.seed, 0)).generate_state(len(truth))
    asked = Request(background.hu, truth.mask, truth.subtype, drawn_histograms(background, study.seed), seeds)
    scan = on_grid(host.hu, host.affine, spacing)
    centres = truth.frame[["i", "j", "k"]].to_numpy()
    crops = [crop_affine(to_world(host.affine, c), truth.hu.shape[1:]) for c in centres]
    painted = texture.generate(study, asked, truth.hu)
    systems = {
        "transplant": seen(truth.hu, spacing),
        "texture": seen(painted, spacing),
        "texture-inserted": in_scans(asked, painted, [scan] * len(truth), crops, drawn=True),
        "inserted": in_scans(asked, generate(asked), [scan] * len(truth), crops, drawn=True),
    }
    tables = {name: feature_table(hu, truth.mask) for name, hu in systems.items()}
    real, patients = feature_table(seen(native.hu, spacing), native.mask), shape_patients(truth.frame)
    return realism(real, tables, patients, patients, "displaced", study.profile.tables.n_boot, study.seed)
