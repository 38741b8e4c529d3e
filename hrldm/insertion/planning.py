"""A cohort becomes a plan: every nodule is tried in its CT by the code that `insert` places it with, before any network runs."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from hrldm.atomic import atomic
from hrldm.config import SUBTYPES
from hrldm.ct.dicom_headers import LARGEST
from hrldm.ct.lungs import lung_labels
from hrldm.ct.volume import read_ct
from hrldm.insertion.batch import NO_CT, find_cts, label_map
from hrldm.insertion.cohorts import PAIRS, TWIN_SIZE, Cohort
from hrldm.insertion.files import check_lobes
from hrldm.insertion.lung_space import LungSpace
from hrldm.insertion.place import SHAPES_TRIED, place_nodule
from hrldm.insertion.plans import NEGATIVE, Case
from hrldm.insertion.wish import Wish
from hrldm.nodules.shape_fitting import choose_shape
from hrldm.nodules.shapes import ShapeLibrary, load_shapes


def plan_cohort(
    folder: str | Path, path: str | Path, cohort: Cohort, lungs: str | Path | None = None, overwrite: bool = False
) -> dict[str, Case]:
    """Write the plan of a cohort in the CTs of a folder, which `read_cases` reads and `insert_folder` takes.

    Args:
        lungs: folder with a label map per CT, as for `insert_folder`

    Returns:
        The results by name.

    Raises:
        ValueError: nodules that cannot be placed, all listed, or any other wrong input; then nothing is written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it (overwrite=True)")
    found, _ = find_cts(folder, lungs=lungs)
    if not found:
        raise ValueError(NO_CT.format(folder))
    wishes, library = cohort.wishes(sorted(found)), load_shapes()
    check_lobes([wish for some in wishes.values() for wish in some], lungs)
    cases = {name: Case(name) for name, some in wishes.items() if not some}
    problems = []
    for name in tqdm(sorted(found.keys() - cases.keys()), desc="CTs", mininterval=5):
        try:
            space = _space(found[name], name, lungs)
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
            continue
        made, wrong = _tried(cohort, space, name, wishes[name], library)
        cases |= made
        problems += wrong
    if problems:
        raise ValueError(
            f"{path}: not written, {len(problems)} of what was planned cannot be placed; choose other diameters, another "
            "number or seed, or leave those CTs out\n  " + "\n  ".join(problems)
        )
    _write(path, cases, overwrite)
    return cases


def pairs(cohort: Cohort, space: LungSpace, base: Wish, library: ShapeLibrary) -> dict[str, Wish]:
    """What is made of `base`, which gets a shape and a position, by what it is. `space` stays as it is.

    Of a pair with one subtype and one diameter all voxels of the lesion agree; with one subtype, the sampler's noise, too.

    Raises:
        ValueError: no position.
    """
    if cohort.preset == "counterfactual":
        base = _fixed(space, base, 1.0, library)
        return {subtype: replace(base, subtype=subtype) for subtype in SUBTYPES}
    growth = {f"day-{day:g}": cohort.grown(day) for day in cohort.days}
    sizes = growth if cohort.preset == "growth" else {"base": 1.0, "size": TWIN_SIZE}
    base = _fixed(space, base, max(sizes.values()), library)
    first = space.untouched()
    placed = place_nodule(first, base, library, 1)
    one = replace(base, histogram=_numbers(placed.histogram))
    made = {what: replace(one, diameter_mm=round(times * base.diameter_mm, 2)) for what, times in sizes.items()}
    if cohort.preset == "twins":
        other = SUBTYPES[2] if base.subtype == SUBTYPES[0] else SUBTYPES[0]
        elsewhere = place_nodule(first, replace(one, at=None), library, 1)
        redrawn = place_nodule(replace(space.untouched(), sources=first.sources), base, library, 1)
        made["subtype"] = replace(base, subtype=other)  # a subtype is told by its HU, so it has a histogram of its own
        made["place"] = replace(one, at=elsewhere.centre_mm)
        made["histogram"] = replace(one, histogram=_numbers(redrawn.histogram))
    return made


# -- the parts ---------------------------------------------------------------------------------------------------------


def _space(ct: Path, name: str, lungs: str | Path | None) -> LungSpace:
    map_ = None if lungs is None else label_map(lungs, name)
    if lungs is not None and map_ is None:
        raise ValueError(f"{lungs}: no label map named {name}.nii.gz")
    scan = read_ct(ct, series_uid=LARGEST)  # as a batch takes it
    return LungSpace.of(scan, lung_labels(scan, map_)[0])


def _tried(
    cohort: Cohort, space: LungSpace, name: str, wishes: Sequence[Wish], library: ShapeLibrary
) -> tuple[dict[str, Case], list[str]]:
    """The results of one CT, and what of them cannot be placed."""
    cases, problems = {}, []
    if cohort.preset not in PAIRS:
        cases[name] = Case(name, tuple(wishes))
    for k, base in enumerate(() if cases else wishes, start=1):
        try:
            made = pairs(cohort, space, base, library)
            cases |= {f"{name}-{k}-{what}": Case(name, (wish,)) for what, wish in made.items()}
        except ValueError as error:
            problems.append(f"{name}-{k}: {error}")
    for case, what in cases.items():
        own = space.untouched()
        for k, wish in enumerate(what.wishes, start=1):
            try:
                place_nodule(own, wish, library, k)
            except ValueError as error:
                problems.append(f"{case}: {error}")
    return cases, problems


def _fixed(space: LungSpace, wish: Wish, times: float, library: ShapeLibrary) -> Wish:
    """The wish with a shape, and a position that has room for it at so many times its size."""
    rng = np.random.default_rng(wish.seed)
    for _ in range(SHAPES_TRIED):
        row = choose_shape(library, wish.subtype, wish.diameter_mm, rng)
        wish = replace(wish, shape=str(library.table.nodule_id[row]))
        try:
            largest = place_nodule(space.untouched(), replace(wish, diameter_mm=times * wish.diameter_mm), library, 1)
            return replace(wish, at=largest.centre_mm)
        except ValueError as error:
            no_place = error
    raise no_place


def _numbers(histogram: Iterable[float]) -> tuple[float, ...]:
    """As a plan holds them."""
    return tuple(round(float(x), 6) for x in histogram)


def _write(path: Path, cases: dict[str, Case], overwrite: bool) -> None:
    """The plan, with the columns that are used; atomic."""
    rows = []
    for name, case in sorted(cases.items(), key=lambda item: item[1].ct):
        rows += [{"case": name, "ct": case.ct} | _cells(wish) for wish in case.wishes]
        if not case.wishes:
            rows.append({"case": name, "ct": case.ct, "subtype": NEGATIVE})
    with atomic(path, overwrite) as part:
        pd.DataFrame(rows).to_csv(part, index=False, lineterminator="\n")


def _cells(wish: Wish) -> dict[str, str]:
    given = {"subtype": wish.subtype, "diameter_mm": wish.diameter_mm} | {n: getattr(wish, n) for n in wish.said()}
    return {n: " ".join(f"{x:.10g}" for x in v) if isinstance(v, tuple) else str(v) for n, v in given.items()}
