"""Real against synthetic by what lies outside the mask."""

import numpy as np

from study.measure.border import border_features, border_table

SIDE = 20


def nodules(n: int, seed: int, halo: float = 0.0, inside: float = 0.0) -> tuple[np.ndarray, ...]:
    """Balls in noise; `halo` HU are added within 2 mm of the mask, `inside` in it."""
    rng = np.random.default_rng(seed)
    grid = np.indices((SIDE,) * 3) - SIDE // 2
    r = np.sqrt((grid**2).sum(0))
    mask = r <= 5
    hu = rng.normal(-850, 40, (n, *mask.shape))
    hu[:, mask] = inside
    hu[:, (r > 5) & (r <= 7)] += halo
    return hu, np.repeat(mask[None], n, 0), np.arange(n) % 3, np.array([f"{seed}-{i // 2}" for i in range(n)])


def test_a_halo_is_told_and_what_is_in_the_mask_is_not():
    real = nodules(36, 0)
    table = border_table(real, {"same": nodules(36, 1, inside=-600.0), "halo": nodules(36, 2, halo=60.0)}, 50, 0)
    at = table.set_index(["system", "part"])
    assert at.auroc["halo", "border"] > 0.95
    near = at.loc[[("same", "border"), ("same", "beyond 4 mm"), ("halo", "beyond 4 mm")]]
    assert ((near.ci_low < 0.5) & (near.ci_high > 0.5)).all()
    assert (table.n_real == table.n_synthetic).all()


def test_no_feature_reads_a_voxel_of_the_mask():
    (hu, *_), (mask, *_) = nodules(1, 0)[:2]
    other = hu.copy()
    other[mask] = 3000.0
    assert border_features(hu, mask) == border_features(other, mask)
