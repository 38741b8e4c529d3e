"""A DICOM SEG holds the very mask on the very grid of its series, as highdicom, dcmqi (3D Slicer's reader) and pydicom read it."""

import importlib.util
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from hrldm.ct.dicom_read import read_series
from hrldm.ct.dicom_seg import check_seg, write_seg
from hrldm.ct.image import read_image
from tests import tiny
from tests.ct.test_formats import enhanced, phantom

hd = pytest.importorskip("highdicom")
SPACING = np.array([0.7, 0.8, 2.5])
DCMQI = (sys.executable, "-c", "import dcmqi; dcmqi.segimage2itkimage()")


def masks(shape) -> tuple[np.ndarray, np.ndarray]:
    """Two lesions far from each other, one with a core."""
    lesion, core = np.zeros((2, *shape), bool)
    lesion[2:6, 3:7, 4:8] = lesion[8:10, 1:3, 15] = core[3:5, 4:6, 5:7] = True
    return lesion, core


def places(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World positions (n, 3) of what is marked, each axis sorted."""
    return np.sort(np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3], 0)


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, -20, 35)])
@pytest.mark.parametrize("kind", ["slices", "enhanced"])
@pytest.mark.parametrize("cored", [True, False])
def test_the_segments_are_the_masks_on_the_grid_of_the_series(tmp_path, kind, angles, cored):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * SPACING
    affine[:3, 3] = -50.5, 30.25, 12
    if kind == "enhanced":
        enhanced(tmp_path / "s" / "e.dcm", phantom(), affine)
    else:
        tiny.dicom_series(tmp_path / "s", phantom(), affine)
    check_seg(tmp_path / "s")
    lesion, core = masks(phantom().shape)
    core &= cored
    write_seg(tmp_path / "s", lesion, core, tmp_path / "seg.dcm", "key")
    affine = read_series(tmp_path / "s")[1]
    expected = [lesion, core] if cored else [lesion]

    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert [d.SegmentLabel for d in seg.SegmentSequence] == ["Synthetic nodule", "Solid core"][: len(expected)]
    volume = seg.get_volume(allow_missing_positions=True)
    grid = volume.get_affine("RAS")[:, [2, 1, 0, 3]]  # of (column, row, slice)
    subprocess.run(
        [*DCMQI, "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "-t", "nrrd"], check=True
    )
    for k, mask in enumerate(expected):
        place = places(mask, affine)
        np.testing.assert_allclose(places(volume.array[..., k].transpose(2, 1, 0), grid), place, atol=1e-4)
        by_dcmqi = read_image(tmp_path / f"{k + 1}.nrrd")
        np.testing.assert_allclose(places(by_dcmqi.array, by_dcmqi.affine), place, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), SPACING, atol=1e-6)

    plain = pydicom.dcmread(tmp_path / "seg.dcm")  # frame by frame, at the place that it says
    found, to_index = np.zeros((2, *lesion.shape), bool), np.linalg.inv(affine)
    for frame, groups in zip(plain.pixel_array, plain.PerFrameFunctionalGroupsSequence, strict=True):
        lps = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        at = to_index @ [*(lps * [-1, -1, 1]), 1]
        np.testing.assert_allclose(at[:2], 0, atol=1e-4)
        own = groups if "SegmentIdentificationSequence" in groups else plain.SharedFunctionalGroupsSequence[0]
        segment = own.SegmentIdentificationSequence[0].ReferencedSegmentNumber  # shared where there is one segment
        found[segment - 1][:, :, round(at[2])] = frame.T
    np.testing.assert_array_equal(found, [lesion, core])
    assert plain.FrameOfReferenceUID == "1.5" and plain.Modality == "SEG" and plain.SegmentationType == "BINARY"


def test_what_no_segmentation_can_be_made_of_is_found_before_the_work(tmp_path, monkeypatch):
    folder = tiny.dicom_series(tmp_path / "s", phantom(), np.diag([1.0, 1, 2, 1]))
    for file in folder.iterdir():
        d = pydicom.dcmread(file)
        del d.FrameOfReferenceUID
        d.save_as(file)
    with pytest.raises(ValueError, match=r"s: no DICOM SEG can be made of it \(.*\); leave out seg=True"):
        check_seg(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs highdicom; install it \(pip install 'hrldm\[dicom-seg\]'\)"):
        check_seg(folder)
