"""The latent systems of Table 1: HR-LDM, MAISI-DDPM and MAISI's rectified flow, one network each, all else equal.

Same autoencoder, U-Net, conditions, nodules, noise and number of steps; only the training objective differs.
"""

from __future__ import annotations

import functools

import numpy as np

from hrldm.insertion.generator import Generator, Request
from study.study import Study

CHANGES: dict[str, dict] = {
    "hr-ldm": {},
    "hr-ldm-template": {"histogram__template": True},  # the histogram as a picture too (ours)
    "hr-ldm-matched": {
        "sampling__match_t_max": 300
    },  # the same network; the histogram is imposed while sampling (ours)
    "maisi-ddpm": {"histogram__weight": 0.0},  # Table 1: "MAISI-DDPM (no L_hist)"
    "maisi-rflow": {"histogram__weight": 0.0, "diffusion__objective": "rflow"},  # Zhao et al., 2026
}


def trained(study: Study, system: str, **changes) -> Generator:
    """The trained generator of a system (trained now when it is not on disk yet)."""
    return study.generator(**(CHANGES[system] | changes))


def generate(study: Study, request: Request, truth: np.ndarray, system: str) -> np.ndarray:
    """HU crops (N, D, D, D); `truth` is not looked at."""
    return trained(study, system)(request, progress=system)


hr_ldm = functools.partial(generate, system="hr-ldm")
hr_ldm_template = functools.partial(generate, system="hr-ldm-template")
hr_ldm_matched = functools.partial(generate, system="hr-ldm-matched")
maisi_ddpm = functools.partial(generate, system="maisi-ddpm")
maisi_rflow = functools.partial(generate, system="maisi-rflow")
