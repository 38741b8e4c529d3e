"""Where a real lesion can be set: not where a nodule still is, even one so faint that its place looks healthy."""

import numpy as np
import pytest

from hrldm.insertion.generator import Request
from study.systems.transplant import has_places
from tests import tiny


@pytest.mark.parametrize(
    ("nodule_hu", "emptied", "expected"),
    [
        pytest.param(0, 4, True, id="places without their nodules"),
        pytest.param(0, 0, False, id="solid nodules still there"),
        pytest.param(-800, 0, False, id="faint nodules still there"),
        pytest.param(-800, 1, True, id="one empty place serves all others"),
    ],
)
def test_places_are_those_without_their_nodules(nodule_hu, emptied, expected):
    mask = np.stack([tiny.ball(24, 4)] * 4)
    lung = np.random.default_rng(0).normal(-880, 20, mask.shape).round().astype(np.int16)
    truth = np.where(mask, np.int16(nodule_hu), lung)
    background = np.concatenate([lung[:emptied], truth[emptied:]])
    request = Request(background, mask, np.zeros(4, int), np.full((4, 40), 1 / 40), np.arange(4))
    assert has_places(request, truth) == expected
