"""A CT with its geometry: NIfTI, MetaImage, NRRD or a DICOM series in, the same or NIfTI out, without loss.

Notation: voxel index i = (x, y, z), affine A (4, 4), world w = A·(i, 1) in RAS mm. A file stores s, with
HU = slope·s + inter; `CT` keeps s as read, so an untouched voxel is written back bit for bit. Changing the voxel
order (`to_ras`, `from_ras`) only permutes and flips axes; every other change of grid is a single `sample` through
A_source⁻¹·A_target, so oblique scans need no special case. `image` and `dicom_read` read the files.
"""

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from hrldm.atomic import atomic
from hrldm.ct.dicom_headers import holds_slice
from hrldm.ct.dicom_read import Levels, read_series
from hrldm.ct.geometry import check_geometry, grid_gap, head_foot, voxel_size
from hrldm.ct.image import ITK, NIFTI, holds_image, read_image, write_itk
from hrldm.ct.nifti import unscaled
from hrldm.ct.zipped import is_zip

logger = logging.getLogger(__name__)
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
THICK_MM = 5.0  # from this slice thickness on, a warning is logged
HU_LIMITS = (-10240, 32767)  # extended CT scale with its padding value; values beyond are not HU
PADDING_HU = -32768  # and below: outside the field of view, where scanners and converters write the least value
PADDED_HU = -1024  # what padding is taken for: air
AIR_HU = -300  # every chest CT, and every crop around a lung nodule, has voxels below this


@dataclass(frozen=True, eq=False)
class CT:
    """A CT volume. `array` (X, Y, Z) is in HU: the stored values themselves if they already are HU, else float32.

    Attributes:
        array:      (X, Y, Z) HU in the voxel order of the source
        affine:     (4, 4) voxel index to RAS mm
        stored:     (X, Y, Z) values as in the file, native byte order
        slope, inter: HU = slope·stored + inter
        header:     NIfTI header of the source, None for other formats
        source:     path it was read from
        provenance: free text by key (series UID, kernel, …; no patient data)
        levels:     the HU that a DICOM source can store, None for other formats
    """

    array: np.ndarray = field(repr=False)
    affine: np.ndarray = field(repr=False)
    stored: np.ndarray = field(default=None, repr=False)
    slope: float = 1.0
    inter: float = 0.0
    header: nib.Nifti1Header | None = field(default=None, repr=False)
    source: str = ""
    provenance: dict[str, str] = field(default_factory=dict)
    levels: Levels | None = None

    def __post_init__(self):
        if self.stored is None:
            object.__setattr__(self, "stored", self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def spacing(self) -> np.ndarray:
        """(3,) voxel size in mm along the array's own axes."""
        return voxel_size(self.affine)

    def to_stored(self, hu: np.ndarray) -> np.ndarray:
        """`hu` (any shape) as stored values in the dtype of `stored`, rounded and clipped to the source's format."""
        hu = hu if self.levels is None else self.levels.nearest(hu)
        return unscaled(hu, self.stored.dtype, self.slope, self.inter)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_ct(path: str | Path, min_slices: int = 20, series_uid: str | None = None) -> CT:
    """Read the CT in an image file, a DICOM folder, one of its files, or a zip of any, and check its HU and geometry.

    Args:
        path:        .nii, .nii.gz, .mha, .mhd, .nrrd, DICOM folder or file, or .zip
        min_slices:  fewest slices (voxels along the axis nearest to head-foot); 1 for crops around a nodule
        series_uid:  which series of a DICOM folder with several, see `dicom_headers.one_series`

    Raises:
        ValueError: the message names the file, the fault and the remedy. Slices of 5 mm or more, padding and copies of
            slices only give a warning.
    """
    path = Path(path)
    # os.path: Path's own methods raise on an overlong name
    if os.path.isdir(path) or os.path.isfile(path) and not holds_image(path) and (is_zip(path) or holds_slice(path)):
        array, affine, provenance, levels = read_series(path, series_uid)
        check_geometry(affine, path)
        ct = CT(_unpadded(array, path), affine, array, source=str(path), provenance=provenance, levels=levels)
    else:
        stored, array, affine, slope, inter, header = read_image(path)
        ct = CT(_unpadded(array, path), affine, stored, slope, inter, header, str(path), {"format": "image"})
    n_slices = ct.shape[head_foot(ct.affine)]
    if n_slices < min_slices:
        raise ValueError(f"{path}: {n_slices} slices, a whole chest CT has at least {min_slices}; give the full series")
    check_hu(ct.array, path)
    if (thick := ct.spacing.max()) >= THICK_MM:
        logger.warning(
            "%s: slices of %.1f mm: nodules smaller than two slices are blurred into the lung; prefer slices of 2.5 mm or less",
            path, thick,
        )  # fmt: skip
    return ct


def _unpadded(array: np.ndarray, name: Path) -> np.ndarray:
    """HU (X, Y, Z) with air where the file is padded with one value of `PADDING_HU` or less; the array itself if nowhere."""
    if not -np.inf < (low := array.min()) <= PADDING_HU:
        return array
    padded = array == low
    if (array[~padded] < HU_LIMITS[0]).any():
        return array
    logger.warning(
        "%s: %.1f%% of its voxels are padding (%g), taken for air (%d HU) and left as they are in the file",
        name, 100 * padded.mean(), low, PADDED_HU,
    )  # fmt: skip
    return np.where(padded, array.dtype.type(PADDED_HU), array)


def check_hu(array: np.ndarray, name: str | Path) -> None:
    """Raise ValueError when (X, Y, Z) values cannot be a chest CT (or a crop of lung) in HU."""
    if bad := np.count_nonzero(~np.isfinite(array)):
        raise ValueError(f"{name}: {bad} voxels are NaN or infinite; replace them by -1024 HU (air)")
    lo, hi = float(array.min()), float(array.max())
    if lo == hi:
        raise ValueError(f"{name}: every voxel is {lo:g}, an empty image; convert it again")
    if lo < HU_LIMITS[0] or hi > HU_LIMITS[1]:
        raise ValueError(
            f"{name}: values {lo:g}..{hi:g} are beyond HU; apply the rescale slope and intercept, pad with -1024"
        )
    step = max(1, round((array.size / 1e6) ** (1 / 3)))  # about a million voxels are enough
    if np.mean(array[::step, ::step, ::step] < AIR_HU) < 1e-3:
        raise ValueError(
            f"{name}: not a chest CT in HU (values {lo:g}..{hi:g}, no air below {AIR_HU}): "
            "another modality, a mask, or values normalised or without their intercept; give the CT in HU"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def write_ct(path: str | Path, stored: np.ndarray, like: CT) -> Path:
    """Write stored values as `write_nifti` does, or to .mha or .nrrd if `like` was read from such a file."""
    path = Path(path)
    return write_itk(path, stored, like.source) if path.suffix in ITK.values() else write_nifti(path, stored, like)


def same_suffix(path: str | Path, nifti: bool = False) -> str:
    """How the file ends that takes a CT read from `path`: as it if that is an image file, else .nii.gz; nifti: .nii* only."""
    path = Path(path)
    itk = {} if nifti or path.is_dir() else ITK
    return ".nii" if path.name.endswith(".nii") else itk.get(path.suffix.lower(), ".nii.gz")


def write_nifti(path: str | Path, stored: np.ndarray, like: CT, overwrite: bool = False) -> Path:
    """Write stored values (X, Y, Z) on the grid of `like`, with its affine, header and scaling, and `stored`'s dtype.

    For other data (a mask, HU of a crop) give `like=CT(values, affine)`: a plain header, no scaling.

    Raises:
        ValueError: not .nii or .nii.gz, shape differs from `like`, or the file exists and `overwrite` is False.
        OSError: could not be written; nothing is left behind.
    """
    path = Path(path)
    if not path.name.lower().endswith(NIFTI):
        raise ValueError(f"{path}: output must end in .nii or .nii.gz")
    if stored.shape != like.shape:
        grid = f"{like.source or 'a CT'} {like.shape}"
        raise ValueError(f"{path}: array of shape {stored.shape} on the grid of {grid}; give an array of that shape")
    stored = stored.astype(np.uint8) if stored.dtype == bool else stored
    kind = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    shape = like.header.get_data_shape() if like.header is not None else stored.shape
    behind = shape[3:] if shape[:3] == stored.shape else ()  # trailing length-1 axes of the source
    image = kind(stored.reshape(stored.shape + behind), like.affine, like.header, dtype=stored.dtype)
    if like.header is None:
        image.header.set_xyzt_units("mm")
        image.set_sform(like.affine, code=1)
        image.set_qform(like.affine, code=1)
        if grid_gap(image.header.get_qform(), like.affine, stored.shape) > like.spacing.min() / 4:
            image.set_qform(None, code=0)  # a quaternion cannot hold a slight shear; then sform only
    image.header.set_slope_inter(like.slope, like.inter)  # a fixed slope makes nibabel write `stored` as it is
    with atomic(path, overwrite) as part:
        nib.save(image, part)
    return path


# -- geometry ----------------------------------------------------------------------------------------------------------


def to_ras(ct: CT) -> CT:
    """The same voxels with axes ordered right, anterior, superior (oblique: nearest). Exact; undone by `from_ras`."""
    turn = nib.io_orientation(ct.affine)
    affine = ct.affine @ nib.orientations.inv_ornt_aff(turn, ct.shape)
    array = np.ascontiguousarray(nib.apply_orientation(ct.array, turn))
    stored = array if ct.stored is ct.array else np.ascontiguousarray(nib.apply_orientation(ct.stored, turn))
    return dataclasses.replace(ct, array=array, stored=stored, affine=affine)


def from_ras(array: np.ndarray, like: CT) -> np.ndarray:
    """(X, Y, Z) in the voxel order of `like` from an array in the voxel order of `to_ras(like)`. Exact."""
    back = nib.orientations.ornt_transform(_RAS, nib.io_orientation(like.affine))
    return np.ascontiguousarray(nib.apply_orientation(array, back))
