"""Healthy places: a nodule without a background is erased from its image, once, or said to be refused."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from hrldm.ct.volume import read_ct
from study import places
from tests.tiny import ball

SIDE = 56


@pytest.fixture
def frame(tmp_path, monkeypatch):
    """A nodule in lung, one at the border of tissue, and one whose background is given."""
    monkeypatch.setenv("HRLDM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = []
    for name in ("inner", "wall", "given"):
        mask = ball(SIDE, 5)
        hu = rng.normal(-850, 25, mask.shape)
        hu[mask] = 0
        if name == "wall":
            hu[: SIDE // 2 + 3] = 40
        for kind, values in (("image", hu.round().astype(np.int16)), ("mask", mask.astype(np.uint8))):
            nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.0, 1.0])), tmp_path / f"{name}_{kind}.nii.gz")
        rows.append({kind: str(tmp_path / f"{name}_{kind}.nii.gz") for kind in ("image", "mask")})
    return pd.DataFrame(rows).assign(background=["", "", "somewhere.nii.gz"])


def test_a_nodule_is_erased_where_it_can_be_and_given_places_are_kept(frame, monkeypatch):
    monkeypatch.setattr(places.os, "cpu_count", lambda: 1)
    inner, wall, given = places.healthy_images(frame)
    assert wall == "" and given == "somewhere.nii.gz"
    before, after = read_ct(frame.image[0]).array, read_ct(inner).array
    mask = ball(SIDE, 5)
    assert before[mask].mean() > -10 and after[mask].mean() == pytest.approx(-850, abs=15)
    far = ~ball(SIDE, 10)
    np.testing.assert_array_equal(before[far], after[far])
    monkeypatch.setattr(places, "erased", lambda *_: pytest.fail("made again"))
    assert places.healthy_images(frame).tolist() == [inner, wall, given]
    assert "lung" in next(places.keyed("erased", 0).parent.glob("*.txt")).read_text()
