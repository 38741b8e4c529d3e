"""A CT with its geometry: NIfTI or a DICOM series in, NIfTI out, nothing lost between.

Notation: index i = (x, y, z) of a voxel, A (4, 4) its affine, world w = A·(i, 1) in RAS mm. A file stores s and means
HU = slope·s + inter; `CT` keeps s as read, so a voxel nobody touched is written back bit for bit. Changing the voxel
order (`to_ras`, `from_ras`) only permutes and flips; every other change of grid is a single `sample` through
A_source⁻¹·A_target, so obliquity needs no special case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from hrldm.data.dicom import read_series
from hrldm.data.geometry import grid_gap, voxel_size

logger = logging.getLogger(__name__)
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
_UNITS = {1: "meter", 3: "micron"}  # of NIfTI's xyzt_units, besides 0 unknown and 2 mm
THICK_MM = 5.0  # slices from here on are warned about
HU_LIMITS = (-10240, 32767)  # extended CT scale with its padding value; beyond it is no HU
AIR_HU = -300  # every chest CT, and every crop around a lung nodule, has voxels below


@dataclass(frozen=True, eq=False)
class CT:
    """A CT volume. `array` (X, Y, Z) is in HU: the stored values themselves where they are HU already, else float32.

    Attributes:
        array:      (X, Y, Z) HU in the voxel order of the source
        affine:     (4, 4) voxel index to RAS mm
        stored:     (X, Y, Z) values as in the file, native byte order
        slope, inter: HU = slope·stored + inter
        header:     NIfTI header of the source, None for DICOM
        source:     path it was read from
        provenance: free text by key (series UID, kernel, …; no patient data)
    """

    array: np.ndarray = field(repr=False)
    affine: np.ndarray = field(repr=False)
    stored: np.ndarray = field(default=None, repr=False)
    slope: float = 1.0
    inter: float = 0.0
    header: nib.Nifti1Header | None = field(default=None, repr=False)
    source: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

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


# -- reading -----------------------------------------------------------------------------------------------------------


def read_ct(path: str | Path, min_slices: int = 20, series_uid: str | None = None) -> CT:
    """The CT in a NIfTI file, a DICOM folder or a zip of one, checked to be a CT in HU with a usable geometry.

    Args:
        path:        .nii, .nii.gz, folder or .zip
        min_slices:  fewest slices (voxels along the axis nearest to head-foot); 1 for crops around a nodule
        series_uid:  which series of a DICOM folder with several

    Raises:
        ValueError: names the file, what is wrong with it and what to do. Slices of 5 mm or more are only warned about.
    """
    path = Path(path)
    if (
        os.path.isdir(path) or path.suffix.lower() == ".zip" and os.path.isfile(path)
    ):  # Path's raise on an overlong name
        array, affine, provenance = read_series(path, series_uid)
        check_geometry(affine, array.shape, path)
        ct = CT(array, affine, source=str(path), provenance=provenance)
    else:
        image = open_nifti(path)
        stored, array = read_voxels(image, path)
        slope, inter = float(image.dataobj.slope), float(image.dataobj.inter)
        ct = CT(array, image.affine, stored, slope, inter, image.header, str(path), {"format": "nifti"})
    axis = int(np.flatnonzero(nib.io_orientation(ct.affine)[:, 0] == 2)[0])
    if ct.shape[axis] < min_slices:
        raise ValueError(
            f"{path}: {ct.shape[axis]} slices, a whole chest CT has at least {min_slices}; give the full series"
        )
    check_hu(ct.array, path)
    if ct.spacing.max() >= THICK_MM:
        logger.warning(
            "%s: %.1f mm slices; nodules below twice that are badly resolved, prefer ≤ 2.5 mm", path, ct.spacing.max()
        )
    return ct


def open_nifti(path: str | Path) -> nib.Nifti1Pair:
    """A NIfTI image with its header checked and its voxels still on disk.

    Raises:
        ValueError: missing, unreadable or no NIfTI; not 3D (length-1 axes behind are fine); affine missing, not
            invertible, sheared, of absurd voxel size or two affines (sform, qform) that disagree.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path}: a folder where a NIfTI file is needed; convert it (read_ct, then write_nifti)")
    if not os.path.isfile(path):
        raise ValueError(
            f"{path}: no such file; check the path (a .nii or .nii.gz file, a DICOM folder or a .zip of one)"
        )
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel's readers of other formats raise whatever comes
        raise ValueError(f"{path}: not a readable image ({error}); give .nii, .nii.gz or a DICOM folder") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError(f"{path}: {type(image).__name__} instead of NIfTI; convert it to .nii.gz")
    shape, header = image.shape, image.header
    if len(shape) < 3 or max(shape[3:], default=1) > 1 or min(shape) < 1:
        raise ValueError(f"{path}: shape {shape} is not one 3D volume; save a single volume of it")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise ValueError(
            f"{path}: no affine (sform and qform codes are 0), so left and right are unknown; convert from the DICOM again"
        )
    if header["sform_code"] == 0 and not _raw_header(image)["pixdim"][1:4].all():  # nibabel reads 0 as 1 mm
        raise ValueError(f"{path}: voxel size 0 (pixdim), so distances are unknown; convert from the DICOM again")
    unit = int(header["xyzt_units"]) % 8  # the bits above are of time
    if unit not in (0, 2):
        raise ValueError(f"{path}: lengths in {_UNITS.get(unit, f'an unknown unit ({unit})')}; save it in mm")
    check_geometry(image.affine, shape, path)
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        try:
            gap = grid_gap(header.get_sform(), header.get_qform(), shape)
        except ValueError as error:
            raise ValueError(
                f"{path}: qform is no rotation ({error}); set its code to 0 if the sform is right"
            ) from error
        if gap > voxel_size(image.affine).min() / 2:
            raise ValueError(
                f"{path}: sform and qform disagree by {gap:.1f} mm; keep the right one and set the code of the other to 0"
            )
    return image


def _raw_header(image: nib.Nifti1Pair) -> nib.Nifti1Header:
    """The header as the file has it, before nibabel mends it."""
    with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
        return type(image.header).from_fileobj(file, check=False)


def read_voxels(image: nib.Nifti1Pair, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored values (X, Y, Z) of an opened image in native byte order, and what they mean (slope·stored + inter).

    The second is the first itself where nothing is to be scaled, else float32.

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
            surplus = sum(map(len, iter(lambda: file.read(1 << 20), b"")))  # to the end, where gzip has its checksum
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy or download it again") from error
    if len(raw) < size or surplus * max(shape) >= size:  # a layer of voxels or more too many: the shape is wrong
        raise ValueError(
            f"{path}: damaged or cut short ({len(raw) + surplus} bytes of voxels where shape {image.shape} needs {size}); "
            "copy or download it again"
        )
    stored = np.frombuffer(raw, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="), order="C")
    return stored, scaled(stored, float(image.dataobj.slope), float(image.dataobj.inter))


def scaled(stored: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """slope·stored + inter: the values themselves where nothing is to be scaled, else float32."""
    if slope == 1 and inter == 0:
        return stored
    values = np.multiply(stored, slope, dtype=np.float32)
    values += inter
    return values


def unscaled(hu: np.ndarray, dtype: np.dtype, slope: float, inter: float) -> np.ndarray:
    """The stored values that mean `hu`, rounded and clipped to what an integer `dtype` holds: `scaled` undone."""
    values = (hu - inter) / slope
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(dtype)


def check_geometry(affine: np.ndarray, shape: tuple[int, ...], name: str | Path) -> None:
    """Raise ValueError for an affine that is not finite, not invertible, sheared or of absurd voxel size."""
    columns = np.asarray(affine, float)[:3, :3]
    size = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or size.min() == 0 or abs(np.linalg.det(columns / size)) < 1e-3:
        raise ValueError(
            f"{name}: affine is not invertible, the place of a voxel is unknown; convert from the DICOM again"
        )
    if size.min() < 0.05 or size.max() > 20:
        raise ValueError(
            f"{name}: voxels of {' × '.join(f'{s:.4g}' for s in size)} mm are no CT's; is the affine in mm?"
        )
    cosines = (columns / size).T @ (columns / size) - np.eye(3)
    if np.abs(cosines).max() > 0.02:
        raise ValueError(
            f"{name}: sheared affine (gantry tilt?), axes are not at right angles; resample to a straight grid"
        )


def check_hu(array: np.ndarray, name: str | Path) -> None:
    """Raise ValueError when (X, Y, Z) values cannot be a chest CT (or a crop of lung) in HU."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
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


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary neighbour to write to, moved onto `path` only when the block ends well.

    Raises:
        ValueError: `path` exists and `overwrite` is False.
        OSError: the write failed (disk full, …); nothing of it is left and an older file stays as it was.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it (overwrite=True)")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")  # keeps the suffix, which decides the format
    try:
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: could not be written ({error.strerror or error}); free space or choose another folder",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_nifti(path: str | Path, stored: np.ndarray, like: CT, overwrite: bool = False) -> Path:
    """Write stored values (X, Y, Z) on the grid of `like`, with its affine, header and scaling; the dtype is `stored`'s.

    For values of another meaning (a mask, HU of a crop) give `like=CT(values, affine)`: a plain header, no scaling.

    Raises:
        ValueError: not .nii or .nii.gz, shape differs from `like`, or the file exists and `overwrite` is False.
        OSError: could not be written; nothing is left behind.
    """
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: output must end in .nii or .nii.gz")
    if stored.shape != like.shape:
        raise ValueError(
            f"{path}: array of shape {stored.shape} on the grid of {like.source or 'a CT'} {like.shape}; give an array of that shape"
        )
    stored = stored.astype(np.uint8) if stored.dtype == bool else stored
    kind = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    shape = like.header.get_data_shape() if like.header is not None else stored.shape
    behind = shape[3:] if shape[:3] == stored.shape else ()  # length-1 axes of the source
    image = kind(stored.reshape(stored.shape + behind), like.affine, like.header, dtype=stored.dtype)
    if like.header is None:
        image.header.set_xyzt_units("mm")
        image.set_sform(like.affine, code=1)
        image.set_qform(like.affine, code=1)
        if grid_gap(image.header.get_qform(), like.affine, stored.shape) > like.spacing.min() / 4:
            image.set_qform(None, code=0)  # a quaternion cannot hold a slight shear; sform alone then
    image.header.set_slope_inter(like.slope, like.inter)  # a fixed slope makes nibabel write `stored` as it is
    with atomic_path(path, overwrite) as part:
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
