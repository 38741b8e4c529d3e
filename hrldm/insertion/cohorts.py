"""A cohort in one line: which CT gets which nodules, and the plan (CSV) that says so.

    size-curve         diameters spread equally over a range
    lobe-equalised     as many nodules in each lobe
    subtype-balanced   as many of each subtype
    counterfactual     one place, shape and seed as three subtypes
    twins              one place, shape, seed and histogram, and one of size, subtype, place and histogram changed
    growth             one nodule whose volume doubles every so many days

In the first three, diameters are spread alike in every lobe and subtype, and a CT gets all its nodules together. The others
make pairs: a CT gets one nodule at a time, so it has several results, named CT-NUMBER-WHAT (`planning.pairs`).

The command line is made from `Cohort`, so this module imports nothing that is slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hrldm.config import SUBTYPES
from hrldm.insertion.wish import LARGEST_MM, SMALLEST_MM, Lobe, Subtype, Wish, own_seed

Preset = Literal["size-curve", "lobe-equalised", "subtype-balanced", "counterfactual", "twins", "growth"]
PAIRS = ("counterfactual", "twins", "growth")
TWIN_SIZE = 1.5  # of the base's diameter


@dataclass(frozen=True)
class Cohort:
    """What a cohort is made of. The fields are the options of the command line, too.

    Attributes:
        preset:        what differs between its nodules
        number:        nodules, or pairs, in each CT that gets any
        prevalence:    share of the CTs that get any, drawn at random; the others are listed as negatives and left as they are
        subtype:       of the nodules, or of the first of a pair; default: solid
        diameters:     least and greatest diameter in mm, of a pair's first nodule; from one to the other in equal steps
        days:          for growth: when the nodule is seen; it has its first size on day 0
        doubling_days: for growth: volume doubling time
        seed:          of all that is drawn

    Raises:
        ValueError: the message says which field is wrong, and what it may be.
    """

    preset: Preset
    number: int = 1
    prevalence: float = 1.0
    subtype: Subtype | None = None
    diameters: tuple[float, float] = (6.0, 20.0)
    days: tuple[float, ...] = (0.0, 90.0, 180.0)
    doubling_days: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ValueError(f"unknown preset {self.preset!r}; choose one of {', '.join(get_args(Preset))}")
        if self.number < 1 or not 0 < self.prevalence <= 1 or self.seed < 0:
            raise ValueError("give a number of at least 1, a prevalence above 0 and up to 1, and a seed of at least 0")
        if self.subtype is not None and self.preset in ("subtype-balanced", "counterfactual"):
            raise ValueError(f"{self.preset} has all subtypes; leave out subtype")
        if self.subtype == "part-solid" and self.preset in ("twins", "growth"):
            raise ValueError(f"{self.preset}: a core would lie elsewhere at another size; choose solid or ground-glass")
        if self.doubling_days <= 0 or len(set(self.days)) < 2 or min(self.days) < 0:
            raise ValueError("growth: give a doubling time above 0, and two days or more, from 0 on")
        low, high = self.diameters
        largest = high * {"twins": TWIN_SIZE, "growth": self.grown(max(self.days))}.get(self.preset, 1.0)
        if not SMALLEST_MM <= low <= high or largest > LARGEST_MM:
            raise ValueError(
                f"diameters {low:g} to {high:g} mm, which {self.preset} makes {low:g} to {largest:.3g}: choose the less first, "
                f"and so that all have {SMALLEST_MM:g} to {LARGEST_MM:g}"
            )

    def grown(self, days: float) -> float:
        """How many times the diameter of day 0 it is then."""
        return 2 ** (days / (3 * self.doubling_days))

    def wishes(self, names: Sequence[str]) -> dict[str, list[Wish]]:
        """What each CT gets, by name, or what its pairs start from; nothing: a negative.

        Raises:
            ValueError: lobes or subtypes cannot have equal numbers.
        """
        rng = np.random.default_rng(self.seed)
        positive = rng.permutation(names)[: max(1, round(self.prevalence * len(names)))]
        strata = [{"subtype": self.subtype or SUBTYPES[0]}]
        if self.preset == "lobe-equalised":
            strata = [strata[0] | {"lobe": lobe} for lobe in get_args(Lobe)]
        elif self.preset == "subtype-balanced":
            strata = [{"subtype": subtype} for subtype in SUBTYPES]
        each, rest = divmod(self.number * len(positive), len(strata))
        if rest:
            raise ValueError(
                f"{self.preset}: {self.number} nodule(s) in each of {len(positive)} CT(s) cannot be shared equally by "
                f"{len(strata)}; choose another number, such as {len(strata)}"
            )
        steps = np.linspace(*self.diameters, each) if each > 1 else [np.mean(self.diameters)]
        sizes = [rng.permutation(steps) for _ in strata]
        given: dict[str, list[Wish]] = {name: [] for name in names}
        for k in range(each * len(strata)):
            round_, of = divmod(k, len(strata))
            wish = Wish(**strata[of], diameter_mm=round(float(sizes[of][round_]), 2), seed=own_seed(self.seed, k))
            given[str(positive[k // self.number])].append(wish)
        return given
