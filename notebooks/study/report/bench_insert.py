"""What inserting costs, on LIDC-IDRI-0001 (512 x 512 x 133) with the released weights; called by `bench`.

    algorithm_2    one lesion, from its placed mask to the CT's voxels, at equal steps: on its own crop against Algorithm 2
                   over the whole body (encode, denoise and decode everything; histogram not imposed and no grain in either)
    insert_file    `python -m hrldm insert` as a user calls it with the default sampler: the whole process, from the start of
                   Python to the written files, lobes from a map; `peak_mb` is all of its memory
    volume         one nodule into the CT with every second row and column, as it is, and with slices doubled
    count          1, 4 and 16 nodules in one call

`volume` and `count` leave reading and writing out; reading, placing and writing grow with the scan by nature, the network's
share does not.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import CT, read_ct
from hrldm.insertion.finish import finished
from hrldm.insertion.insert import insert, requested
from hrldm.insertion.place import LungSpace, place_nodule
from hrldm.insertion.released import released
from hrldm.insertion.wish import Wish, copies
from hrldm.nodules.shapes import load_shapes
from hrldm.train.device import device
from hrldm.wheels import LIDC_0001_CT, LIDC_0001_LOBES, wheel_file
from study.measure.timing import measure
from study.systems.algorithm2 import algorithm2

WHOLE_BODY_MB = 16 * 1024  # what the whole body of this CT takes, measured
STEPS = 2  # of both ways in `algorithm_2`: Algorithm 2 takes minutes even so
WISH = Wish("solid", 12.0, seed=0)


@functools.cache
def _embedded() -> tuple[CT, np.ndarray]:
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    return ct, lung_labels(ct, wheel_file(*LIDC_0001_LOBES))[0]


def algorithm_2(variant: str, repeats: int) -> dict:
    ct, labels = _embedded()
    generator = released(steps=STEPS)
    nodule = place_nodule(LungSpace.of(ct, labels), WISH, load_shapes(), 1)

    def own_crop() -> None:
        request, crops = requested(ct, [nodule])
        finished(ct, generator(request, paste=False)[0], request.mask[0], crops[0], request.histogram[0], 0)

    if variant.startswith("whole_body"):
        return measure(lambda: algorithm2(ct, nodule, generator), 0, warm_up=1)
    return measure(own_crop, repeats)


def end_to_end(variant: str, repeats: int) -> dict:
    ct, lobes = wheel_file(*LIDC_0001_CT), wheel_file(*LIDC_0001_LOBES)
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "hrldm", "insert", str(ct), f"{folder}/out", "--lungs", str(lobes)]
        call += ["--subtype", WISH.subtype, "--diameter", str(WISH.diameter_mm), "--seed", str(WISH.seed)]
        started = time.perf_counter()
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(call)} failed")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, kB elsewhere
    return {"time_s": seconds, "peak_mb": used.ru_maxrss / unit, "device": device()}


def volume(variant: str, repeats: int) -> dict:
    ct, labels = _embedded()
    generator = released()
    step = {"256x256x133": (2, 1), "512x512x133": (1, 1), "512x512x266": (1, 2)}[variant]
    affine = ct.affine @ np.diag([step[0], step[0], 1 / step[1], 1.0])
    array, of = (np.repeat(a[:: step[0], :: step[0]], step[1], axis=2) for a in (ct.array, labels))
    scan = dataclasses.replace(ct, array=array, stored=array, affine=affine, slope=1.0, inter=0.0, header=None)
    return measure(lambda: insert(scan, [WISH], generator, of), max(repeats // 2, 1), warm_up=1)


def count(variant: str, repeats: int) -> dict:
    ct, labels = _embedded()
    generator, wishes = released(), copies(WISH, int(variant))
    return measure(lambda: insert(ct, wishes, generator, labels), max(repeats // 2, 1), warm_up=1)


CASES = {"algorithm_2": algorithm_2, "insert_file": end_to_end, "volume": volume, "count": count}
VARIANTS = (
    ("algorithm_2", f"own_crop_{STEPS}_steps"), ("algorithm_2", f"whole_body_{STEPS}_steps"), ("insert_file", "512x512x133"),
    ("volume", "256x256x133"), ("volume", "512x512x133"), ("volume", "512x512x266"),
    ("count", "1"), ("count", "4"), ("count", "16"),
)  # fmt: skip


def affordable(free_mb: float) -> list[tuple[str, str]]:
    """The variants that fit into the free memory: without the whole body where there is too little, which is said."""
    if free_mb >= WHOLE_BODY_MB:
        return list(VARIANTS)
    takes = f"it takes {WHOLE_BODY_MB / 1024:.0f} GB, {free_mb / 1024:.0f} are free"
    print(f"  algorithm_2 over the whole body left out: {takes}")
    return [(case, variant) for case, variant in VARIANTS if not variant.startswith("whole_body")]
