"""Sharpness and noise of scans whose blur and noise are known."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.scanner import USUAL_PSF_MM, noise_of, psf_mm
from hrldm.ct.volume import read_ct
from hrldm.wheels import LIDC_0001_CT, wheel_file

# voxels, SDs of the point-spread function, SD of the noise (HU), SDs of the noise's own blur; mm
SCANS = {
    "2.5 mm slices": ((0.7, 0.7, 2.5), (0.6, 0.6, 1.2), 40.0, (0.6, 0.6, 0.0)),
    "1 mm": ((1.0, 1.0, 1.0), (0.8, 0.8, 0.8), 20.0, (0.7, 0.7, 0.7)),
    "3 mm slices": ((0.8, 0.8, 3.0), (0.6, 0.6, 1.5), 60.0, (0.8, 0.8, 0.0)),
    "smooth kernel": ((0.9, 0.9, 0.9), (1.0, 1.0, 0.7), 30.0, (0.9, 0.9, 0.5)),
}
FIELD_MM, PARTS = 64.0, 3  # of view; fine voxels along each axis of a voxel


@functools.cache
def scanned(name):
    """A lung with vessels in soft tissue, blurred finely, sampled at the voxels' middles, with noise."""
    spacing, psf, sd, smooth = (np.array(x) if isinstance(x, tuple) else x for x in SCANS[name])
    shape, rng = (FIELD_MM / spacing).astype(int), np.random.default_rng(0)
    at = np.meshgrid(
        *((np.arange(n * PARTS) + 0.5) * s / PARTS for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    middle = shape * spacing / 2
    fine = np.where(sum(((x - c) / r) ** 2 for x, c, r in zip(at, middle, (27, 26, 29), strict=True)) < 1, -860.0, 40.0)
    for _ in range(8):
        start, direction = rng.uniform(15, 50, 3), rng.standard_normal(3)
        gap = [x - s for x, s in zip(at, start, strict=True)]
        along = sum(g * d for g, d in zip(gap, direction / np.linalg.norm(direction), strict=True))
        fine[sum(g**2 for g in gap) - along**2 < rng.uniform(0.7, 3) ** 2] = 40.0
    fine = ndimage.gaussian_filter(fine.astype(np.float32), psf * PARTS / spacing)
    clean = fine[(slice(PARTS // 2, None, PARTS),) * 3]
    noise = ndimage.gaussian_filter(rng.standard_normal(clean.shape), smooth / spacing, mode="wrap")
    return clean + sd * noise / noise.std(), sd * noise / noise.std()


def correlations(field):
    return [float(np.mean(field * np.roll(field, 1, axis)) / np.mean(field**2)) for axis in range(3)]


@pytest.mark.parametrize("name", SCANS)
def test_a_known_point_spread_function_is_found_within_a_tenth(name):
    spacing, psf = (np.array(x) for x in SCANS[name][:2])
    np.testing.assert_allclose(psf_mm(scanned(name)[0], spacing), psf, rtol=0.1)


@pytest.mark.parametrize("name", SCANS)
def test_known_noise_is_found_and_drawn_again(name):
    hu, true = scanned(name)
    noise = noise_of(hu, np.array(SCANS[name][0]))
    assert noise.sd == pytest.approx(SCANS[name][2], rel=0.1)
    found = noise.autocovariance / noise.sd**2
    wanted = correlations(true)
    np.testing.assert_allclose([found[1, 0, 0], found[0, 1, 0], found[0, 0, 1]], wanted, atol=0.1)
    drawn = noise.field(hu.shape, np.random.default_rng(1))
    assert drawn.shape == hu.shape and drawn.std() == pytest.approx(noise.sd, rel=0.1)
    np.testing.assert_allclose(correlations(drawn), wanted, atol=0.12)


def test_bone_and_metal_beyond_the_pleura_do_not_matter():
    hu, spacing = scanned("1 mm")[0].copy(), np.ones(3)
    plain, quiet = psf_mm(hu, spacing), noise_of(hu, spacing)
    tissue = ndimage.binary_erosion(hu > -100, iterations=6)
    hu[tissue & (np.indices(hu.shape).sum(0) % 7 < 3)] = 2500.0
    np.testing.assert_allclose(psf_mm(hu, spacing), plain, rtol=0.05)
    assert noise_of(hu, spacing).sd == pytest.approx(quiet.sd, rel=0.05)


def test_without_edges_or_lung_the_usual_is_assumed_and_no_noise_is_added():
    spacing = np.array([0.7, 0.7, 3.0])
    lung = np.random.default_rng(0).normal(-850, 20, (40, 40, 14))
    np.testing.assert_allclose(psf_mm(lung, spacing), [USUAL_PSF_MM, USUAL_PSF_MM, 1.5])
    tissue = noise_of(np.full((20, 20, 10), 40.0), spacing)
    assert tissue.sd == 0 and not tissue.field((30, 5, 5), np.random.default_rng(0)).any()
    assert noise_of(np.full((30, 30, 10), -850.0), spacing).sd < 1e-9


def test_a_real_scan_made_smoother_is_found_smoother_by_as_much():
    """The embedded CT (0.7 x 0.7 x 2.5 mm): variances of blurs add up."""
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    hu, spacing = ct.array[60:200, 160:320, 50:90].astype(np.float32), ct.spacing
    own = psf_mm(hu, spacing)
    assert (own[:2] < 1.0).all() and own[2] > own[:2].max()  # thick slices
    for added in ((0.8, 0.8, 0.0), (0.0, 0.0, 2.0)):
        found = psf_mm(ndimage.gaussian_filter(hu, np.array(added) / spacing), spacing)
        blurred = np.array(added) > 0
        np.testing.assert_allclose(found[blurred], np.hypot(own, added)[blurred], rtol=0.15)
    smoother = noise_of(ndimage.gaussian_filter(hu, (0, 0, 1)), spacing)
    assert smoother.sd < noise_of(hu, spacing).sd
