"""What to put into a CT: one wish per nodule, checked before any long computation.

The command line is made from `Wish`, so this module imports nothing that is slow.
"""

import operator
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import tyro

from hrldm.config import HIST_HU_MAX, HIST_HU_MIN, SIZE_BINS_MM, SUBTYPES

SEED_RULE = (
    "each nodule's own; of copies the first has the one given, the k-th and a batch's draw theirs by SeedSequence"
)
MOST = 10_000  # nodules in one CT; lungs hold fewer
SMALLEST_MM, LARGEST_MM = 3.0, SIZE_BINS_MM[-1][1]  # below 3 mm the Fleischner Society speaks of micronodules
Subtype = Literal[*SUBTYPES]
Lobe = Literal["LUL", "LLL", "RUL", "RML", "RLL"]  # as in `hrldm.ct.label_maps`
Location = Literal["inner", "subpleural"]  # as in `hrldm.nodules.positions`
Base = Literal["narrow", "broad"]  # as in `hrldm.nodules.pleura`
BINS = 40  # of a requested histogram
BIN_HU = (HIST_HU_MAX - HIST_HU_MIN) / BINS
LIMITS = {"mean_hu": (HIST_HU_MIN + BIN_HU, HIST_HU_MAX - BIN_HU), "sd_hu": (BIN_HU, 400.0)}


def _read_as(kind) -> object:
    """The type that the command line reads for a field; `Wish` converts it."""
    return tyro.conf.arg(constructor=kind | None, help_behavior_hint="(default: None)")


@dataclass(frozen=True)
class Wish:
    """One nodule. The fields are the options of the command line, too (`diameter_mm` is ``--diameter``).

    Attributes:
        subtype:     of the nodule
        diameter_mm: in mm, of the sphere of equal volume; 3 to 30
        lobe:        target lobe; needs a lobe map (--lungs with a TotalSegmentator map, or TotalSegmentator installed)
        location:    inner, or at the pleura; not together with `at`
        at:          centre "x,y,z" in RAS mm instead of a random position
        base:        how a subpleural nodule touches the pleura: narrow, a small contact; broad, cut by it, the contact's
            diameter at least 0.6 of the nodule's; default: drawn
        histogram:   text file with 40 numbers (in Python: the numbers), the requested HU histogram over -1000..400;
            default: one like a real one of that subtype and size
        mean_hu:     mean of the histogram, which is moved there; a part-solid nodule's core follows it
        sd_hu:       standard deviation of the histogram, which is stretched to it
        spiculation: 1 (none) to 5 (marked)
        core_mm:     diameter in mm (sphere of equal volume) of a part-solid nodule's solid core, 0 for none; default: what
            the histogram has of solid tissue, at most 0.67 of the diameter where neither histogram nor moments are given
        shape:       id of a real nodule whose shape it gets, as a record names it; one seed turns and bends it alike at every
            size and for every subtype
        mask:        NIfTI mask of the lesion on this CT (1 lesion, 2 solid core) instead of shape, size and position
        seed:        random seed of shape, position, histogram and noise

    Raises:
        ValueError: the message says which field is wrong, and what it may be.
    """

    subtype: Subtype = "solid"
    diameter_mm: Annotated[float, tyro.conf.arg(name="diameter")] = 10.0
    lobe: Lobe | None = None
    location: Location = "inner"
    at: Annotated[tuple[float, float, float] | None, _read_as(str)] = None
    base: Base | None = None
    histogram: Annotated[str | tuple[float, ...] | None, _read_as(Path)] = None
    mean_hu: float | None = None
    sd_hu: float | None = None
    spiculation: float | None = None
    core_mm: Annotated[float | None, tyro.conf.arg(name="core")] = None
    shape: str | None = None
    mask: Annotated[str | None, _read_as(Path)] = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._plain()
        for name, kind in (("subtype", Subtype), ("lobe", Lobe), ("location", Location), ("base", Base)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known and (name not in ("lobe", "base") or value is not None):
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if not SMALLEST_MM <= self.diameter_mm <= LARGEST_MM:
            raise ValueError(
                f"diameter {self.diameter_mm:g} mm: nodules have {SMALLEST_MM:g} to {LARGEST_MM:g} mm (larger ones are masses)"
            )
        if self.at is not None and not (len(self.at) == 3 and np.isfinite(self.at).all()):
            raise ValueError(f"at = {self.at}: give three numbers x,y,z in RAS mm")
        if self.spiculation is not None and not 1 <= self.spiculation <= 5:
            raise ValueError(f"spiculation is a rating 1 (none) to 5 (marked), not {self.spiculation:g}")
        for name, (low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ValueError(f"{name} {value:g}: give {low:g} to {high:g}")
        if self.core_mm and (self.subtype != "part-solid" or not 2 <= self.core_mm < self.diameter_mm):
            raise ValueError(
                f"a solid core of {self.core_mm:g} mm: part-solid nodules have one, of at least 2 mm (or 0, for none) and "
                f"below the nodule's own diameter (here {self.subtype}, {self.diameter_mm:g} mm)"
            )
        if self.mask is not None:
            beside = {"mask", "subtype", "histogram", "mean_hu", "sd_hu", "seed"}
            beside |= {"core_mm"} if self.core_mm == 0 else set()
            if taken := [name.removesuffix("_mm") for name in self.said() if name not in beside]:
                raise ValueError(f"a mask of the lesion says its shape and place; leave out {', '.join(taken)}")
            if self.cored and self.subtype != "part-solid":
                raise ValueError(f"{self.mask} marks a solid core (2); ask for part-solid, not {self.subtype}")
        if self.at is not None and (taken := [name for name in ("location", "base") if name in self.said()]):
            raise ValueError(f"a place is given; leave out {', '.join(taken)}")
        if self.base is not None and self.location != "subpleural":
            raise ValueError(f"a {self.base} base: nodules at the pleura have one; give location=subpleural, too")
        if self.shape is not None and self.spiculation is not None:
            raise ValueError("a shape is given; leave out spiculation")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed!r}: give a whole number, 0 or more")
        self._check_intensity()

    @property
    def drawn(self) -> bool:
        """Whether the histogram is drawn: nothing is said of the HU."""
        return self.histogram is None and self.mean_hu is None and self.sd_hu is None

    def _check_intensity(self) -> None:
        """Raise ValueError for a histogram, mean, SD and core size that cannot be had together."""
        given = None if self.histogram is None else read_histogram(self.histogram)
        if self.mean_hu is None and (given is None or not (self.sd_hu or self.core_mm)):
            return
        from hrldm.nodules.histograms import with_moments, with_solid_share  # slow

        histogram = np.full(BINS, 1 / BINS) if given is None else given  # what can be had does not depend on its form
        core = ""
        try:
            if self.core_mm:
                core = f"a core of {self.core_mm:g} mm in a nodule of {self.diameter_mm:g} mm: "
                histogram = with_solid_share(histogram, (self.core_mm / self.diameter_mm) ** 3)
            with_moments(histogram, self.mean_hu, self.sd_hu, keep_solid=bool(core))
        except ValueError as error:
            raise ValueError(f"{core}{error}") from error

    def _plain(self) -> None:
        """Convert text, NumPy numbers, arrays and paths to plain numbers, tuples and text, which a record can hold."""
        number = (float, "a number")
        kinds = {
            "diameter_mm": number, "spiculation": number, "core_mm": number, "mean_hu": number, "sd_hu": number,
            "histogram": (_file_or_numbers, "a file's path, or numbers"), "mask": (os.fspath, "a file's path"),
            "seed": (_whole, "a whole number"), "at": (point, "three numbers x,y,z in RAS mm"),
        }  # fmt: skip
        for name, (kind, wanted) in kinds.items():
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, kind(value))
                except (TypeError, ValueError, OverflowError):
                    raise ValueError(f"{name} {value!r}: give {wanted}") from None

    @property
    def cored(self) -> bool:
        """Whether a solid core of its own size or shape is requested."""
        if self.mask is None:
            return bool(self.core_mm)
        from hrldm.ct.image import read_image  # slow

        return bool(read_image(self.mask).array.max().round() == 2)

    def said(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def given(self) -> dict:
        """The fields that are set, as a record stores them."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def described(self) -> str:
        """A few words for the log."""
        size = f"mask {Path(self.mask).name}" if self.mask is not None else f"{self.diameter_mm:g} mm"
        return f"{self.subtype}, {size}"


def _whole(value: object) -> int:
    """A whole number; 3 from "3", and from the "3.0" that numbers become in a column with blanks."""
    return int(value.removesuffix(".0")) if isinstance(value, str) else operator.index(value)


def _file_or_numbers(histogram: object) -> str | tuple[float, ...]:
    if isinstance(histogram, str) and re.fullmatch(r"\s*[\d.eE+-]+(\s+[\d.eE+-]+)+\s*", histogram):
        histogram = histogram.split()  # a plan's cell
    return os.fspath(histogram) if isinstance(histogram, str | os.PathLike) else tuple(float(x) for x in histogram)


def point(at: str | Sequence[float]) -> tuple[float, ...]:
    """Numbers from "x,y,z" or "x y z", or from numbers."""
    return tuple(float(x) for x in (at.replace(",", " ").split() if isinstance(at, str) else at))


def read_histogram(given: str | Path | Sequence[float]) -> np.ndarray:
    """HU histogram (BINS,) of sum 1 from `BINS` numbers or a text file of them, the shares of equal bins over -1000..400 HU.

    Raises:
        ValueError: unreadable, wrong count, negative, not finite or empty.
    """
    in_file = isinstance(given, str | os.PathLike)
    name = given if in_file else "histogram"
    try:
        numbers = Path(given).read_text(encoding="utf-8-sig").replace(",", " ").split() if in_file else given
        values = np.array([float(x) for x in numbers])
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: not a histogram ({error}); give a text file of {BINS} numbers") from error
    unfit = np.flatnonzero(~np.isfinite(values) | (values < 0)) + 1
    if values.shape != (BINS,) or len(unfit) or not 0 < values.sum() < np.inf:
        wrong = f"{values.size} numbers"
        if values.shape == (BINS,):
            places = ", ".join(map(str, unfit[:5])) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else "")
            wrong = f"negative or not finite: number {places}" if len(unfit) else f"the numbers sum to {values.sum():g}"
        raise ValueError(
            f"{name}: {wrong}; a histogram has {BINS} that are not negative, the shares of equal bins over "
            f"{HIST_HU_MIN:g}..{HIST_HU_MAX:g} HU"
        )
    return values / values.sum()


def own_seed(seed: int, *key: int) -> int:
    """The seed of one of many (the k-th copy, a CT of a batch), below 2^53 so that every JSON reader keeps it exactly.

    Seeds derived from two different seeds coincide with a probability of 1e-16 per pair.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 11)


def copies(wish: Wish, count: int) -> list[Wish]:
    """`count` copies of one wish, the first with its seed, the others with their own (`own_seed`).

    Raises:
        ValueError: count below 1 or above `MOST`, or several nodules at one position.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count must be at least 1 and at most {MOST}, got {count}")
    if count > 1 and (wish.at is not None or wish.mask is not None):
        raise ValueError("several nodules cannot have one place; leave it out, or give a plan with a place each")
    return [wish, *(replace(wish, seed=own_seed(wish.seed, k)) for k in range(1, count))]
