"""Sharpness and noise of scans whose blur and noise are known."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from hrldm.ct.scanner import USUAL_PSF_MM, noise_of, psf_mm, scan_psf_mm
from hrldm.ct.volume import CT, read_ct
from hrldm.wheels import LIDC_0001_CT, wheel_file
from tests import phantom

# voxels, SDs of the point-spread function, SD of the noise (HU), SDs of the noise's own blur; mm
SCANS = {
    "2.5 mm slices": ((0.7, 0.7, 2.5), (0.6, 0.6, 1.2), 40.0, (0.6, 0.6, 0.0)),
    "1 mm": ((1.0, 1.0, 1.0), (0.8, 0.8, 0.8), 20.0, (0.7, 0.7, 0.7)),
    "3 mm slices": ((0.8, 0.8, 3.0), (0.5, 0.5, 1.5), 60.0, (0.4, 0.4, 0.0)),
    "0.5 mm": ((0.5, 0.5, 0.5), (0.6, 0.6, 0.9), 80.0, (0.3, 0.3, 0.6)),
    "smooth kernel": ((0.9, 0.9, 0.9), (1.0, 1.0, 0.7), 30.0, (0.9, 0.9, 0.5)),
}


@functools.cache
def scanned(name, *bright):
    """The phantom as a file of this scan has it, and its noise."""
    spacing, psf, sd, blur = SCANS[name]
    clean = phantom.scanned(spacing, psf, bright=bright, field_mm=44.0 if name == "0.5 mm" else 56.0)
    noise = phantom.noise(clean.shape, spacing, sd, blur)
    return np.rint(clean + noise).clip(-1024, 3071), noise


def correlations(field):
    """With the next voxel along each axis."""
    return [float(np.mean(field * np.roll(field, 1, axis)) / np.mean(field**2)) for axis in range(3)]


@pytest.mark.parametrize("name", SCANS)
def test_a_known_point_spread_function_is_found_within_a_tenth(name):
    spacing, psf = (np.array(x) for x in SCANS[name][:2])
    np.testing.assert_allclose(psf_mm([scanned(name)[0]], spacing), psf, rtol=0.1)


@pytest.mark.parametrize("name", SCANS)
def test_known_noise_is_found_and_drawn_again(name):
    hu, true = scanned(name)
    noise = noise_of(hu, np.array(SCANS[name][0]))
    assert noise.sd == pytest.approx(SCANS[name][2], rel=0.1)
    found, wanted = noise.autocovariance / noise.sd**2, correlations(true)
    np.testing.assert_allclose([found[1, 0, 0], found[0, 1, 0], found[0, 0, 1]], wanted, atol=0.1)
    shape = (hu.shape[0] + 40, *hu.shape[1:])  # larger than what was measured
    drawn = noise.field(shape, np.random.default_rng(1))
    assert drawn.shape == shape and drawn.std() == pytest.approx(noise.sd, rel=0.05)
    np.testing.assert_allclose(correlations(drawn), wanted, atol=0.1)


@pytest.mark.parametrize("bright", ["bone", "contrast", "metal"])
def test_what_is_bright_beyond_the_pleura_does_not_matter(bright):
    spacing = np.array(SCANS["2.5 mm slices"][0])
    (plain, _), (other, _) = scanned("2.5 mm slices"), scanned("2.5 mm slices", bright)
    assert (other - plain).max() > 90
    np.testing.assert_allclose(psf_mm([other], spacing), psf_mm([plain], spacing), rtol=0.1)
    assert noise_of(other, spacing).sd == pytest.approx(noise_of(plain, spacing).sd, rel=0.05)


def test_air_that_scanners_clip_counts_for_no_noise():
    """A windpipe of clipped noise, and what is beyond the field of view."""
    spacing, hu = np.array(SCANS["2.5 mm slices"][0]), scanned("2.5 mm slices")[0].copy()
    plain = noise_of(hu, spacing)
    hu[:, :22], hu[:, 22:28] = -1024, (hu[:, 22:28] - 140).clip(-1024)
    assert noise_of(hu, spacing).sd == pytest.approx(plain.sd, rel=0.05)


def test_without_edges_or_lung_the_usual_is_assumed_and_no_noise_is_added():
    spacing = np.array([0.7, 0.7, 3.0])
    lung = np.random.default_rng(0).normal(-850, 20, (40, 40, 14))
    for alone in (lung, lung + 900, lung[:, :, :1], lung[:3, :3, :3]):
        np.testing.assert_allclose(psf_mm([alone], spacing), [USUAL_PSF_MM, USUAL_PSF_MM, 3 / 12**0.5])
        np.testing.assert_allclose(psf_mm([alone], spacing, [0.5, 0.5, 1.1]), [0.5, 0.5, 1.1])
    tissue = noise_of(lung + 900, spacing)
    assert tissue.sd == 0 and not tissue.field((30, 5, 5), np.random.default_rng(0)).any()
    assert noise_of(np.full((30, 30, 10), -850.0), spacing).sd < 1e-9


def test_a_real_scan_made_smoother_is_found_smoother_by_as_much():
    """The embedded CT (0.7 x 0.7 x 2.5 mm): variances of blurs add up."""
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    hu, spacing = ct.array[280:420, 240:400, 40:80].astype(np.float32), ct.spacing
    own, noise = psf_mm([hu], spacing), noise_of(hu, spacing)
    assert (own[:2] < 1.0).all() and own[2] > own[:2].max()  # thick slices
    for smoother, axis, variance in (
        (ndimage.gaussian_filter(hu, (0.8 / spacing[0], 0.8 / spacing[1], 0)), [0, 1], 0.8**2),
        ((hu[:, :, 1:] + hu[:, :, :-1]) / 2, 2, (spacing[2] / 2) ** 2),
    ):
        found, wanted = psf_mm([smoother], spacing) ** 2, own**2
        wanted[axis] += variance
        np.testing.assert_allclose(found, wanted, rtol=0.15)
        assert noise_of(smoother, spacing).sd < 0.9 * noise.sd


def test_in_plane_there_is_one_sharpness_unless_the_spacing_differs():
    """The phantom made smoother along x only: its mean variance in the plane, or each axis' own."""
    spacing, psf = (np.array(x) for x in SCANS["1 mm"][:2])
    hu = ndimage.gaussian_filter1d(scanned("1 mm")[0], 0.8, axis=0)
    x, y, z = psf_mm([hu], spacing)
    assert x == y and 0.8 < x < np.hypot(0.8, 0.8) and z == pytest.approx(0.8, rel=0.1)
    x, y, z = psf_mm([hu], spacing * [1, 1.01, 1])
    np.testing.assert_allclose([x, y, z], [np.hypot(0.8, 0.8), 0.8, 0.8], rtol=0.1)


def test_slices_of_a_centimetre_have_the_sd_of_their_width():
    thick = scanned("1 mm")[0][:, :, :48].reshape(56, 56, 4, 12).mean(3)
    many = np.concatenate([thick] * 3, axis=2)
    assert psf_mm([many], [1.0, 1.0, 12.0])[2] == pytest.approx(12 / 12**0.5)


def test_the_whole_scan_counts_as_a_thousand_edges():
    spacing, psf = (np.array(x) for x in SCANS["1 mm"][:2])
    hu = scanned("1 mm")[0]
    alone, other = psf_mm([hu], spacing), np.array([2.0, 2.0, 2.0])
    both = psf_mm([hu], spacing, other)
    share = (other**2 - both**2) / (other**2 - alone**2)
    assert (0.2 < share).all() and (share <= 0.5).all()  # of 250 to 1000 edges


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_whole_scan_is_measured_once_along_r_a_and_s(order):
    """Four phantoms side by side, in two orders of axes; then the CT is known."""
    hu, spacing = np.tile(scanned("smooth kernel")[0], (2, 2, 1)), SCANS["smooth kernel"][0][0]
    turn = np.eye(4)[:, [*order, 3]] * spacing
    ct = CT(hu.transpose(order).astype(np.float32), turn)
    found = scan_psf_mm(ct)
    np.testing.assert_allclose(found, SCANS["smooth kernel"][1], rtol=0.1)
    assert scan_psf_mm(ct) is found


@pytest.mark.slow
def test_at_neighbouring_places_of_a_real_scan_sharpness_is_alike():
    """The embedded CT, parts of 80 mm a few centimetres apart along its lungs."""
    ct = read_ct(wheel_file(*LIDC_0001_CT))
    whole, found = scan_psf_mm(ct), []
    for x in (90, 130, 170, 310, 350):
        part = ct.array[x : x + 114, 200:314, 50:82].astype(np.float32)
        found.append(psf_mm([part], ct.spacing, whole))
    ratio = np.exp(np.abs(np.log(np.divide(found[1:], found[:-1]))))
    assert ratio.max() < 1.25
