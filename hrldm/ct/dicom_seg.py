"""The mask of an insertion as DICOM SEG (PS3.3 A.51) on the slices of a series, by highdicom: the extra `dicom-seg`.

Two binary segments: the lesions, and their solid cores if there are any. The frames take place and orientation from the
slices that they refer to, and slices without a lesion have none.
"""

import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from hrldm import __version__
from hrldm.ct.dicom_headers import Slice, load
from hrldm.ct.dicom_read import opened

SEGMENTS = {"Synthetic nodule": (230, 159, 0), "Solid core": (0, 114, 178)}  # and their RGB (Okabe and Ito)
_PROGRAM = "HR-LDM companion"
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip


def check_seg(source: str | Path, series_uid: str | None = None) -> None:
    """Raise ValueError if `write_seg` would refuse the series, or highdicom is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise ValueError(
            "DICOM SEG needs highdicom; install it (pip install 'hrldm[dicom-seg]'), or leave out seg=True"
        )
    with opened(Path(source), series_uid) as slices:
        header = slices[0][1]
        one = np.zeros((header.Columns, header.Rows, len(slices)), bool)
        one[0, 0, 0] = True
        _write(slices, one, one, io.BytesIO(), "")


def _complete(data: pydicom.Dataset) -> pydicom.Dataset:
    """With the elements that every image must have, and may have empty (PS3.3 C.7.1.1 and C.7.2.1), which highdicom copies."""
    for name in _MAY_BE_EMPTY:
        if name not in data:
            setattr(data, name, None)
    return data


def write_seg(series: str | Path, lesion: np.ndarray, core: np.ndarray, out: Path, key: str) -> None:
    """Write masks (X, Y, Z) bool, in the voxel order of `read_series`, as segments on the slices of `series`.

    key: what the UIDs depend on besides the series'

    Raises:
        ValueError: the series lacks what a segmentation takes from it, or its frames lie in several files.
        OSError: `out` cannot be written.
    """
    with opened(Path(series)) as slices:
        _write(slices, lesion, core, out, key)


def _write(slices: list[Slice], lesion: np.ndarray, core: np.ndarray, out: Path | io.BytesIO, key: str) -> None:
    import highdicom as hd

    parts = [lesion, core] if core.any() else [lesion]
    if hasattr(slices[0][1], "frame"):
        files = sorted({file for file, _ in slices})
        order = np.argsort([header.frame for _, header in slices])  # one multi-frame image is taken whole
    else:
        order = np.flatnonzero(lesion.any((0, 1)))
        files = [slices[k][0] for k in order]
    program = hd.AlgorithmIdentificationSequence(_PROGRAM, codes.DCM.ArtificialIntelligence, __version__)
    uids = [generate_uid(entropy_srcs=[str(slices[0][1].SeriesInstanceUID), key, what]) for what in ("series", "seg")]
    try:
        with warnings.catch_warnings():
            # names in the source
            warnings.filterwarnings("ignore", "The string .* is unlikely to represent", UserWarning)
            segmentation = hd.seg.Segmentation(
                [_complete(load(file, stop_before_pixels=True)) for file in files],
                np.stack([part[:, :, order].transpose(2, 1, 0) for part in parts], -1).astype(np.uint8),
                hd.seg.SegmentationTypeValues.BINARY,
                [
                    hd.seg.SegmentDescription(
                        k, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Nodule,
                        hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, program, display_color=hd.color.CIELabColor.from_rgb(*rgb),
                    )
                    for k, ((label, rgb), _) in enumerate(zip(SEGMENTS.items(), parts, strict=False), start=1)
                ],
                series_instance_uid=uids[0], series_number=1, sop_instance_uid=uids[1], instance_number=1,
                manufacturer=_PROGRAM, manufacturer_model_name="hrldm", software_versions=__version__,
                device_serial_number="0", content_label="NODULE", series_description="Synthetic nodule: mask",
            )  # fmt: skip
            segmentation.ContentCreatorName = ""  # of type 2: must be there, may be empty
            segmentation.save_as(out)
    except OSError:
        raise
    except Exception as error:  # highdicom and pydicom raise many kinds
        raise ValueError(f"no DICOM SEG can be made of it ({error}); leave out seg=True") from error
