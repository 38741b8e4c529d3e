"""The preview: slices lie as radiologists see them whatever the scan's voxel order, and all nodules are told of."""

import nibabel as nib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from hrldm.ct.volume import CT
from hrldm.insertion.preview import MOST, _slice, draw_preview

CENTRE = (10.0, -20.0, 30.0)
SIDES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}


def marked(axes: str, towards: np.ndarray) -> CT:
    """A scan stored in the voxel order `axes`, 1 x 1.5 x 2 mm, bright about 15 mm from `CENTRE`."""
    spacing, shape = np.array([1.0, 1.5, 2.0]), np.array([80, 60, 50])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = CENTRE - spacing * shape / 2
    world = np.moveaxis(np.indices(shape), 0, -1) * spacing + affine[:3, 3]
    hu = np.where(np.linalg.norm(world - (CENTRE + 15 * towards), axis=-1) < 5, 100, -1000).astype(np.int16)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = nib.Nifti1Image(hu, affine).as_reoriented(turn)
    return CT(np.ascontiguousarray(turned.dataobj), turned.affine)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIL"])
@pytest.mark.parametrize("plane", SIDES)
def test_right_and_front_are_on_the_left_head_and_front_above(axes, plane):
    across, up = SIDES[plane]
    for axis, row, column in ((across, 0.5, 0.2), (up, 0.2, 0.5)):
        image = _slice(marked(axes, np.eye(3)[axis]), CENTRE, plane)
        middle = np.argwhere(image > -300).mean(0) / image.shape
        np.testing.assert_allclose(middle, [row, column], atol=0.03)


def test_each_nodule_has_a_row_and_those_beyond_the_last_are_told(tmp_path):
    ct = marked("RAS", np.eye(3)[0])
    nodule = {"wish": {"subtype": "solid"}, "diameter_mm": 9.0, "centre_ras_mm": list(CENTRE)}
    heights = []
    for n in (1, 2, MOST, MOST + 3):
        draw_preview(tmp_path / f"{n}.png", ct, ct.stored, [nodule] * n)
        heights.append(plt.imread(tmp_path / f"{n}.png").shape[0])
    assert heights[0] < heights[1] < heights[2] == heights[3]


@pytest.mark.parametrize("hu", [-1350, 150])
def test_the_bar_is_seen_on_air_and_on_bone(tmp_path, hu):
    ct = marked("RAS", np.eye(3)[0])
    ct.stored[:] = ct.array[:] = hu
    nodule = {"wish": {"subtype": "solid"}, "diameter_mm": 9.0, "centre_ras_mm": list(CENTRE)}
    draw_preview(tmp_path / "p.png", ct, ct.stored, [nodule])
    grey = plt.imread(tmp_path / "p.png")[..., 0]
    first = grey[grey.shape[0] // 4 : -grey.shape[0] // 8, grey.shape[1] // 30 : grey.shape[1] // 9]  # axial, before
    rows = np.ptp(first, 1) > 0.5
    assert rows.any() and first[rows].min() < 0.2 and first[rows].max() > 0.8
