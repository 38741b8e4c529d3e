"""Read a NIfTI file's voxels and geometry with nibabel, and check them before use.

A file stores s, which means slope·s + inter (`scaled`, undone by `unscaled`). What nibabel silently repairs or ignores
is refused here: a shape that the voxels do not fill, two affines that disagree, voxel sizes of 0.
"""

import math
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from hrldm.ct.geometry import check_geometry, grid_gap, voxel_size

_UNITS = {1: "meter", 3: "micron"}  # NIfTI's xyzt_units besides 0 (unknown) and 2 (mm)


def open_nifti(path: str | Path) -> nib.Nifti1Pair:
    """Open a NIfTI image: header checked, voxels still on disk.

    Raises:
        ValueError: missing, unreadable or not NIfTI; not 3D (trailing length-1 axes are fine); affine missing, not
            invertible, sheared or of absurd voxel size; or two affines (sform, qform) that disagree.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path}: a folder where one NIfTI file is needed (TotalSegmentator writes one with --ml)")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; check the path (a .nii, a .nii.gz, a DICOM folder or a .zip of one)")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel's readers of other formats may raise anything
        raise ValueError(f"{path}: not a readable image ({error}); give .nii, .nii.gz or a DICOM folder") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError(f"{path}: {type(image).__name__} instead of NIfTI; convert it to .nii.gz")
    shape, header = image.shape, image.header
    if len(shape) < 3 or max(shape[3:], default=1) > 1 or min(shape) < 1:
        raise ValueError(f"{path}: shape {shape} is not one 3D volume; save a single volume of it")
    sform, qform = header["sform_code"] != 0, header["qform_code"] != 0
    if not sform and not qform:
        raise ValueError(
            f"{path}: no affine (sform and qform codes 0), so no left and right; convert from the DICOM again"
        )
    if not sform and not _raw_header(image)["pixdim"][1:4].all():  # nibabel reads 0 as 1 mm
        raise ValueError(f"{path}: voxel size 0 (pixdim), so distances are unknown; convert from the DICOM again")
    unit = int(header["xyzt_units"]) % 8  # the higher bits are the time unit
    if unit not in (0, 2):
        raise ValueError(f"{path}: lengths in {_UNITS.get(unit, f'an unknown unit ({unit})')}; save it in mm")
    check_geometry(image.affine, path)
    if sform and qform:
        try:
            gap = grid_gap(header.get_sform(), header.get_qform(), shape)
        except ValueError as error:
            raise ValueError(
                f"{path}: qform is no rotation ({error}); set its code to 0 if the sform is right"
            ) from error
        if gap > voxel_size(image.affine).min() / 2:
            raise ValueError(
                f"{path}: sform and qform disagree by {gap:.1f} mm; keep the right one, the other's code 0"
            )
    return image


def _raw_header(image: nib.Nifti1Pair) -> nib.Nifti1Header:
    """The header as in the file, before nibabel repairs it."""
    with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
        return type(image.header).from_fileobj(file, check=False)


def read_voxels(image: nib.Nifti1Pair, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored values (X, Y, Z) of an opened image in native byte order, and what they mean (slope·stored + inter).

    The second is the first itself if there is no scaling, else float32.

    Raises:
        ValueError: truncated or corrupt file, more voxels than the header says, colour or complex voxels.
    """
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path}: voxels of type {image.get_data_dtype()} are not a CT; save one real number a voxel")
    dtype, shape = image.get_data_dtype(), image.shape[:3]
    size = math.prod(shape) * dtype.itemsize
    try:
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            file.seek(image.dataobj.offset)
            raw = file.read(size)
            surplus = sum(map(len, iter(lambda: file.read(1 << 20), b"")))  # to the end: gzip's checksum is there
        if len(raw) < size or surplus * max(shape) >= size:  # a surplus of one layer or more: the shape is wrong
            raise ValueError(f"{len(raw) + surplus} bytes of voxels where shape {image.shape} needs {size}")
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy or download it again") from error
    stored = np.frombuffer(raw, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="), order="C")
    return stored, scaled(stored, float(image.dataobj.slope), float(image.dataobj.inter))


def scaled(stored: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """slope·stored + inter: `stored` itself if there is no scaling, else float32."""
    if slope == 1 and inter == 0:
        return stored
    values = np.multiply(stored, slope, dtype=np.float32)
    values += inter
    return values


def unscaled(hu: np.ndarray, dtype: np.dtype, slope: float, inter: float) -> np.ndarray:
    """Inverse of `scaled`: stored values of `hu`, rounded and clipped to the range of an integer `dtype`."""
    values = (hu - inter) / slope
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(dtype)
