"""The latent systems of Table 1: HR-LDM, MAISI-DDPM and MAISI's rectified flow, one network each, all else equal.

Same autoencoder, U-Net, conditions, nodules, noise and number of steps; only the training objective differs.
"""

from hrldm.insertion.generator import Generator
from study.study import Study

CHANGES: dict[str, dict] = {  # in the order of the tables
    "maisi-rflow": {"histogram__weight": 0.0, "diffusion__objective": "rflow"},  # Zhao et al., 2026
    "maisi-ddpm": {"histogram__weight": 0.0},  # Table 1: "MAISI-DDPM (no L_hist)"
    "hr-ldm": {},
    "hr-ldm-template": {"histogram__template": True},  # the histogram as a picture too (ours)
    # the same network; the histogram is imposed while sampling (ours)
    "hr-ldm-matched": {"sampling__match_t_max": 300},
}


def trained(study: Study, system: str) -> Generator:
    """The trained generator of a system (trained now when it is not on disk yet)."""
    return study.generator(**CHANGES[system])
