"""Told from real by hand-made features: known tells are found by the set of features that holds them, and by no other."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from study.measure import realism
from tests import tiny

SIDE, N = 24, 24


def lesions(seed: int, blur=(0.8, 0.8, 0.8), n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Balls of Gaussian texture of one mean and SD in noisy lung."""
    rng = np.random.default_rng(seed)
    masks = np.stack([tiny.ball(SIDE, r) for r in rng.uniform(5, 8, n)])
    hu = rng.normal(-850, 30, masks.shape)
    for i, mask in enumerate(masks):
        texture = ndimage.gaussian_filter(rng.standard_normal(mask.shape), blur)
        hu[i][mask] = -50 + 60 * (texture / texture[mask].std())[mask]
    return hu, masks


def judged(systems: dict) -> pd.DataFrame:
    groups = np.repeat(np.arange(N // 2), 2)
    tables = {name: realism.feature_table(*crops) for name, crops in systems.items()}
    found = realism.realism(tables.pop("real"), tables, groups, groups, "displaced", 100, 0)
    return found.set_index(["system", "features", "model"])


@pytest.fixture(scope="module")
def table():
    patch = pytest.MonkeyPatch()
    patch.setattr(realism, "REPEATS", 1)
    made = judged(
        {
            "real": lesions(0),
            "texture": lesions(1),  # the same law
            "smooth": lesions(2, (2.0, 2.0, 2.0)),
            "thick": lesions(3, (0.5, 0.5, 1.9)),  # smoother along z alone
        }
    )
    patch.undo()
    return made


@pytest.mark.parametrize("model", list(realism.MODELS))
def test_what_follows_the_same_law_is_not_told_and_what_is_smoother_is(table, model):
    for features in ("inside", "inside_isotropic"):
        same, smooth = table.loc[("texture", features, model)], table.loc[("smooth", features, model)]
        assert 0.25 < same.auroc < 0.75
        assert smooth.auroc > 0.95 and smooth.minus_low > 0.1
        assert smooth.minus_texture == pytest.approx(smooth.auroc - same.auroc)
        assert smooth.ci_low <= smooth.auroc <= smooth.ci_high
    assert same.minus_texture == same.minus_low == same.minus_high == 0
    assert table.loc[("thick", "inside", model)].auroc > 0.95
    assert set(table.n_nodules) == {N} and set(table.n_patients) == {N // 2}


def test_features_know_smoothness_anisotropy_noise_and_edge():
    hu, masks = lesions(4, n=6)
    plain = realism.feature_table(hu, masks).mean()
    smooth = realism.feature_table(*lesions(4, (2.0,) * 3, 6)).mean()
    thick = realism.feature_table(*lesions(4, (0.5, 0.5, 1.9), 6)).mean()
    assert smooth.inside_correlation_2 > plain.inside_correlation_2 + 0.2
    assert smooth.inside_grain_1_share < plain.inside_grain_1_share
    assert abs(plain.anisotropy_difference_1) < 0.2 and thick.anisotropy_difference_1 < -0.7
    assert thick.anisotropy_correlation_1 > 0.3
    quiet = np.where(masks, hu, -850 + (hu + 850) / 5)
    assert realism.feature_table(quiet, masks).mean().edge_noise_over_surroundings > (
        plain.edge_noise_over_surroundings + 1
    )
    soft = np.stack([ndimage.gaussian_filter(h, 1.0) for h in hu])
    assert realism.feature_table(soft, masks).mean().edge_gradient < plain.edge_gradient - 50


def test_nothing_inside_reads_beyond_the_mask_but_the_noise_of_the_surroundings():
    hu, masks = lesions(5, n=3)
    other = np.where(masks, hu, 300.0)
    a, b = realism.feature_table(hu, masks), realism.feature_table(other, masks)
    own = [c for c in a if not c.startswith("edge_")]
    pd.testing.assert_frame_equal(a[own], b[own])
    assert set(realism.feature_sets(a.columns)) == {"inside", "inside_isotropic", "edge"}
    assert not [c for c in realism.feature_sets(a.columns)["inside_isotropic"] if "anisotropy" in c]


def test_a_lesion_of_a_few_voxels_has_features_few_patients_no_interval_and_one_is_refused(monkeypatch):
    mask = np.zeros((SIDE,) * 3, bool)
    mask[12, 12, 12] = mask[12, 12, 13] = True
    for hu in (np.random.default_rng(0).normal(-800, 20, mask.shape), np.full(mask.shape, -400.0)):
        assert np.isfinite(list(realism.lesion_features(hu, mask).values())).all()
        assert np.isfinite(list(realism.lesion_features(hu, tiny.ball(SIDE, 6)).values())).all()
    table = realism.feature_table(*lesions(6, n=4))
    monkeypatch.setattr(realism, "REPEATS", 1)
    few = realism.realism(table, {"a": table}, np.arange(4), np.arange(4), "displaced", 10, 0)
    assert few.auroc.notna().all() and few[["ci_low", "ci_high"]].isna().all(axis=None) and (few.n_patients == 4).all()
    with pytest.raises(ValueError, match="at least two"):
        realism.realism(table, {"a": table}, np.zeros(4), np.zeros(4), "displaced", 10, 0)
