"""Sampling on other grids."""

import numpy as np

from hrldm.ct.geometry import sample


def test_a_label_reaches_to_the_edge_of_its_voxel_and_no_further():
    labels = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    affine[:3, 3] = (-30.0, 12.7, -163.3)
    for shift, same in ((1e-6, True), (-1e-6, True), (0.4, True), (-0.4, True), (0.6, False)):
        target = affine.copy()
        target[:3, 3] += shift * np.array([0.7, 0.7, 2.5])
        got = sample(labels, affine, labels.shape, target, order=0, outside=0)
        assert (got == labels).all() == same
    assert got[2].max() == got[:, 2].max() == got[:, :, 2].max() == 0 and (got[:2, :2, :2] == labels[1:, 1:, 1:]).all()
