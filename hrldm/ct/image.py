"""One image file as voxels with their affine: NIfTI by nibabel (`nifti`), MetaImage and NRRD by SimpleITK, or a zip of one.

ITK's world is LPS mm and its arrays are (z, y, x); here all is RAS mm and (x, y, z).
"""

import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from hrldm.atomic import atomic
from hrldm.ct.geometry import LPS_TO_RAS, check_geometry
from hrldm.ct.nifti import open_nifti, read_voxels
from hrldm.ct.zipped import image_within, is_zip, unpacked

NIFTI = (".nii.gz", ".nii")
ITK = {".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}  # and what is written for each, in one file
IMAGES = (*NIFTI, *ITK)
WRITTEN = (*NIFTI, *dict.fromkeys(ITK.values()))


class Image(NamedTuple):
    """stored (X, Y, Z) as in the file, array (X, Y, Z) = slope·stored + inter, affine (4, 4) to RAS mm; header: NIfTI's."""

    stored: np.ndarray
    array: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    inter: float = 0.0
    header: nib.Nifti1Header | None = None


def holds_image(path: Path) -> bool:
    """Whether `read_image` is for this path: by its name, of a zip by the names in it."""
    return path.name.lower().endswith(IMAGES) or is_zip(path) and image_within(path, IMAGES)


def read_image(path: str | Path) -> Image:
    """Read a .nii, .nii.gz, .mha, .mhd, .nrrd or .nhdr file, or the one such file in a zip.

    Raises:
        ValueError: missing, unreadable, not one 3D volume of real numbers, or its geometry missing or impossible (see
            `nifti.open_nifti`); a zip of several.
    """
    path = Path(path)
    if path.suffix.lower() in ITK:
        return _read_itk(path)
    if is_zip(path) and os.path.isfile(path):
        try:
            with unpacked(path) as folder:
                found = [f for f in sorted(folder.rglob("*")) if f.name.lower().endswith(IMAGES) and f.name[0] != "."]
                if len(found) != 1:
                    names = ", ".join(f.name for f in found) or "no image"
                    raise ValueError(f"{len(found)} images in it ({names}); give a zip of one")
                return read_image(found[0])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    image = open_nifti(path)
    stored, array = read_voxels(image, path)
    return Image(stored, array, image.affine, float(image.dataobj.slope), float(image.dataobj.inter), image.header)


def _read_itk(path: Path) -> Image:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; check the path")
    try:
        reader = _information(path)
        shape, kind = reader.GetSize(), sitk.GetPixelIDValueAsString(reader.GetPixelID())
        if len(shape) != 3 or reader.GetNumberOfComponents() != 1 or "complex" in kind:
            raise ValueError(f"{path}: {kind} of shape {shape} is not one 3D volume of real numbers; save one of it")
        if path.suffix.lower() in (".nrrd", ".nhdr") and "NRRD_space" not in reader.GetMetaDataKeys():
            raise ValueError(f"{path}: no space in its header, so no left and right; convert from the DICOM again")
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
        affine = LPS_TO_RAS @ affine
        check_geometry(affine, path)
        voxels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:  # all that SimpleITK raises
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path}: not readable as an image ({reason}); copy it or convert it again") from error
    stored = np.ascontiguousarray(voxels.transpose(2, 1, 0))
    return Image(stored, stored, affine)


def _information(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def write_itk(path: Path, stored: np.ndarray, source: str | Path) -> Path:
    """Write values (X, Y, Z) to a .mha or .nrrd file, compressed, with the very geometry of the file `source`."""
    image, reader = sitk.GetImageFromArray(stored.transpose(2, 1, 0)), _information(Path(source))
    image.SetOrigin(reader.GetOrigin())
    image.SetSpacing(reader.GetSpacing())
    image.SetDirection(reader.GetDirection())
    with atomic(path, overwrite=False) as part:
        try:
            sitk.WriteImage(image, str(part), useCompression=True)
        except RuntimeError as error:
            raise OSError(str(error).strip().splitlines()[-1]) from error
    return path
