"""Networks, nodules and profiles small enough for seconds, shared by the tests of the core."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from torch import nn

from hrldm.config import SUBTYPES
from hrldm.insertion.generator import Generator
from hrldm.insertion.released import sampled
from hrldm.model.autoencoder import Autoencoder
from hrldm.model.unet import ConditionalUNet
from hrldm.nodules.histograms import quantiles
from hrldm.nodules.patches import Patches
from hrldm.train.ldm import built
from study.profiles import Profile, get_profile

SETTINGS = {
    "data__patch_mm": 16, "autoencoder__channels": (8, 8, 8), "autoencoder__norm_groups": 4, "autoencoder__latent_channels": 4, "vae__patch": 16,
    "unet__channels": (16, 32), "unet__norm_groups": 8, "unet__head_channels": 16, "unet__ctx_dim": 8, "latents__variants": 2,
    "ldm__pretrain_steps": 0, "ldm__steps": 6, "ldm__batch": 2, "ldm__ema": 0.9, "histogram__t_max": None, "sampling__steps": 3,
}  # fmt: skip


def profile(**changes) -> Profile:
    return get_profile("smoke", **(SETTINGS | changes))


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give parameters that start at zero random values, so that everything upstream matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return model


def autoencoder(seed: int = 0, **changes) -> Autoencoder:
    """Frozen; random, so its pictures mean nothing, but its linear code does and keeps intensity."""
    torch.manual_seed(seed)
    model = wake(Autoencoder(profile(**changes).autoencoder), seed)
    if model.linear is not None:
        smooth = nn.functional.interpolate(torch.rand(4, 1, 8, 8, 8), scale_factor=4, mode="trilinear")
        model.linear.fit(smooth + 0.05 * torch.rand(smooth.shape))
    return model.eval().requires_grad_(False)


def unet(seed: int = 0, **changes) -> ConditionalUNet:
    torch.manual_seed(seed)
    p = profile(**changes)
    return wake(built(p, p.autoencoder.latent_channels), seed).eval().requires_grad_(False)


def generator(model: Autoencoder, network: ConditionalUNet, scale: float, **changes) -> Generator:
    p = profile(**changes)
    return Generator(model, network, scale, p, p.sampling)


def ball(size: int, radius: float) -> np.ndarray:
    """Mask (size, size, size) of a ball around the middle voxel."""
    grid = np.indices((size,) * 3) - size // 2
    return (grid**2).sum(0) <= radius**2


def patches(n: int, size: int = 24, seed: int = 0) -> Patches:
    """Balls of 3-7 mm radius at subtype-like HU in noisy lung."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    radius = rng.uniform(3, min(7, size / 2 - 2), n)
    mask = np.stack([ball(size, r) for r in radius])
    hu = rng.normal(-850, 60, mask.shape)
    level = np.array([20.0, -250.0, -600.0])[label]
    hu[mask] = np.repeat(level, mask.sum((1, 2, 3))) + rng.normal(0, 60, mask.sum())
    frame = pd.DataFrame(
        {
            "nodule_id": [f"n{i}" for i in range(n)],
            "patient_id": [f"p{i}" for i in range(n)],
            "subtype": [SUBTYPES[i] for i in label],
            "diameter_mm": 2 * radius,
        }
    )
    return Patches(hu.round().astype(np.int16), mask, frame)


def manifest(root: Path, splits: dict[str, int], size: int = 32, seed: int = 0) -> Path:
    """A folder of 1 mm NIfTI nodules with its manifest.csv and clean backgrounds."""
    made = patches(sum(splits.values()), size, seed)
    frame = made.frame.assign(split=np.repeat(list(splits), list(splits.values())))
    rng = np.random.default_rng((seed, 1))
    for i, row in frame.iterrows():
        clean = np.where(made.mask[i], rng.normal(-850, 60, made.mask[i].shape), made.hu[i]).astype(np.int16)
        for column, array in (("image", made.hu[i]), ("mask", made.mask[i].astype(np.uint8)), ("background", clean)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"{row.nodule_id}_{column}.nii.gz")
            frame.loc[i, column] = f"{row.nodule_id}_{column}.nii.gz"
    frame.to_csv(root / "manifest.csv", index=False)
    return root


def chest(affine: np.ndarray, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A chest of ellipsoids on any grid, HU int16: two lungs (-850, 1.1 l each) in a body (40) in air; RAS mm, lungs at x = +-70."""
    index = np.indices(shape).reshape(3, -1).T
    x, y, z = (index @ affine[:3, :3].T + affine[:3, 3]).T
    hu = np.where((x / 160) ** 2 + (y / 110) ** 2 < 1, 40.0, -1000.0)
    for side in (-70, 70):
        hu[((x - side) / 50) ** 2 + (y / 60) ** 2 + (z / 90) ** 2 < 1] = -850.0
    hu += np.random.default_rng(seed).normal(0, 15, hu.shape)
    return np.rint(hu).clip(-1024, 3071).astype(np.int16).reshape(shape)


def chest_grid(turn: np.ndarray, spacing: tuple[float, ...], extent=(350.0, 250.0, 210.0)) -> tuple[np.ndarray, tuple]:
    """Affine and shape of a grid with axes `turn` (3, 3) that holds the chest's middle `extent` mm."""
    need = np.abs(turn.T) @ np.array(extent)  # along each axis of the grid
    shape = tuple(int(np.ceil(n / s)) for n, s in zip(need, spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine, shape


def dicom_series(
    folder: Path, hu: np.ndarray, affine: np.ndarray, signed=False, bits=12, allocated=16, slope=1.0, inter=-1024.0,
    syntax=ExplicitVRLittleEndian, name="{:04d}.dcm",
) -> Path:  # fmt: skip
    """A CT series of HU (X, Y, Z) with a RAS affine, one file a slice along the last axis; HU that its bits cannot hold are
    clipped, as scanners do."""
    folder.mkdir(parents=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = (lps[:3, :2] / spacing[:2]).T.ravel()
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.rint((hu.astype(float) - inter) / slope).clip(*limits)
    stored = stored.astype(f"{'<' if syntax.is_little_endian else '>'}{'i' if signed else 'u'}{allocated // 8}")
    for k in range(hu.shape[2]):
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = syntax
        d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = CTImageStorage
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["tiny", str(k)])
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = "1.2.3", "1.2", "1.5"
        d.Modality, d.ImageType, d.PatientName, d.PatientID, d.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "T", "T", k + 1  # fmt: skip
        d.ImagePositionPatient = [f"{x:.8f}"[:16] for x in (lps @ [0, 0, k, 1])[:3]]
        d.ImageOrientationPatient = [f"{x:.10f}"[:16] for x in cosines]
        d.PixelSpacing, d.SliceThickness = [f"{spacing[1]:.10f}", f"{spacing[0]:.10f}"], f"{spacing[2]:.10f}"
        d.Rows, d.Columns = hu.shape[1], hu.shape[0]
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", int(signed)
        d.BitsAllocated, d.BitsStored, d.HighBit, d.RescaleSlope, d.RescaleIntercept = (
            allocated,
            bits,
            bits - 1,
            slope,
            inter,
        )
        d.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        d.PixelData += b"\0" * (len(d.PixelData) % 2)
        d["PixelData"].VR = "OW"
        pydicom.dcmwrite(
            folder / name.format(k), d, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian,
            enforce_file_format=True,
        )  # fmt: skip
    return folder


class PaintingGenerator:
    """Stands for a trained generator: paints the requested histogram's quantiles into the mask, by chance."""

    device = "cpu"

    def __init__(self) -> None:
        self.config = profile(sampling__match_t_max=300)
        self.sampling, self.unet, self.autoencoder = self.config.sampling, nn.Linear(1, 1), nn.Linear(1, 1)
        self.asked: list = []

    def __call__(self, request, batch: int = 8, paste: bool = True, progress: str = "") -> np.ndarray:
        self.asked.append(request)
        out = request.background.astype(np.float32)
        for k, seed in enumerate(request.seeds):
            n = int(request.mask[k].sum())
            out[k][request.mask[k]] = np.random.default_rng(int(seed)).permutation(quantiles(request.histogram[k], n))
        return out


def painting(on: str | None = None, **sampling) -> PaintingGenerator:
    """Stands for `released`: a generator that paints; a misspelt field of the sampling is its ValueError."""
    generator = PaintingGenerator()
    generator.sampling = sampled(generator.sampling, **sampling)
    return generator
