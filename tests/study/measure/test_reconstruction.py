"""Reconstruction scores against closed forms, scikit-image and numpy's own principal components."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from skimage.metrics import structural_similarity

from hrldm.nodules.patches import Patches
from study.measure.reconstruction import (
    autoencoder_table,
    linear_code,
    linear_reconstruction,
    nodule_scores,
    regions,
    similarity_map,
)
from study.report.tables import SCHEMAS, check_table

SIDE = 16


@pytest.fixture
def crops():
    """Four lungs of -800 HU with a dense wall and a lesion of -100 HU, a little noise everywhere."""
    rng = np.random.default_rng(0)
    hu = rng.normal(-800, 30, (4, SIDE, SIDE, SIDE))
    hu[:, :3] += 850
    mask = np.zeros(hu.shape, bool)
    mask[:, 7:12, 7:12, 7:12] = True
    hu[mask] += 700
    return Patches(hu, mask, pd.DataFrame({"nodule_id": list("abcd"), "patient_id": list("ppqr")}))


def test_regions_share_the_crop_out(crops):
    found = regions(crops.hu[0], crops.mask[0])
    parts = [found[name].astype(int) for name in ("lung", "vessels and soft tissue", "lesion")]
    assert (sum(parts) == 1).all() and found["crop"].all()
    assert found["vessels and soft tissue"][:3].all() and found["lung"][4:6].all()


def test_an_offset_gives_its_closed_form_in_its_own_region(crops):
    scores = nodule_scores(crops.hu + np.where(crops.mask, 50.0, 0.0), crops).set_index(["region", "metric"]).value
    np.testing.assert_allclose(scores["lesion", "psnr_db"], 20 * np.log10(2000 / 50))
    np.testing.assert_allclose(scores["lesion", "mae_hu"], 50)
    np.testing.assert_allclose(scores["lung", "mae_hu"], 0)
    np.testing.assert_allclose(scores["crop", "mae_hu"], 50 * crops.mask[0].mean())
    assert (scores["lesion", "hist_jsd"] > 0.1).all()  # 50 HU are more than one bin of 35 HU


def test_the_window_clips_both_sides(crops):
    crops.hu[:, 0, 0, 0] = 3000
    scores = nodule_scores(np.clip(crops.hu, -1000, 1000), crops)
    assert scores[scores.metric == "mae_hu"].value.max() == 0


def test_similarity_map_is_scikit_image_s():
    rng = np.random.default_rng(1)
    x = rng.uniform(-1000, 1000, (SIDE, SIDE, SIDE))
    y = np.clip(x + rng.normal(0, 300, x.shape), -1000, 1000)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity((x + 1000) / 2000, (y + 1000) / 2000, full=True, **options)[1]
    inner = (slice(6, -6),) * 3  # away from the two libraries' different edges
    np.testing.assert_allclose(similarity_map(y, x)[inner], expected[inner], atol=1e-4)
    np.testing.assert_allclose(similarity_map(x, x), 1, atol=1e-5)


def test_table_has_the_schema_and_patient_intervals(crops):
    rng = np.random.default_rng(2)
    scores = {
        name: nodule_scores(crops.hu + rng.normal(0, sd, crops.hu.shape), crops)
        for name, sd in (("autoencoder", 20), ("linear code", 60))
    }
    table = autoencoder_table(scores, n_boot=50, seed=0)
    check_table(table, "autoencoder", SCHEMAS["autoencoder"])
    assert (table.n == 4).all() and not table.duplicated(["region", "metric"]).any()
    assert ((table.ci_low <= table.value) & (table.value <= table.ci_high)).all()
    psnr = table[table.metric == "psnr_db"].set_index("region").value
    assert psnr["lesion"] > psnr["lesion (linear code)"] + 5


def test_linear_code_leaves_what_its_components_leave():
    """The mean squared error on the fitted crops is the sum of the eigenvalues that were dropped."""
    rng, channels, q = np.random.default_rng(3), 5, SIDE // 4
    hu = -600 + 900 * ndimage.gaussian_filter(rng.standard_normal((12, SIDE, SIDE, SIDE)), (0, 1, 1, 1), mode="wrap")
    made = linear_reconstruction(linear_code(hu, channels), hu)
    blocks = hu.reshape(-1, q, 4, q, 4, q, 4).transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 64)
    values = np.linalg.eigvalsh(np.cov(blocks.T, bias=True))
    np.testing.assert_allclose(((made - hu) ** 2).mean(), values[:-channels].sum() / 64, rtol=0.03)
    few = ((linear_reconstruction(linear_code(hu, 1), hu) - hu) ** 2).mean()
    assert few > 1.5 * ((made - hu) ** 2).mean()


def test_misfits_are_named(crops):
    with pytest.raises(ValueError, match="do not fit"):
        nodule_scores(crops.hu[:3], crops)
    with pytest.raises(ValueError, match="64 blocks"):
        linear_code(crops.hu[:1, :8, :8, :8], 4)
    crops.mask[2] = False
    with pytest.raises(ValueError, match="nodule c: the mask is empty"):
        nodule_scores(crops.hu, crops)
