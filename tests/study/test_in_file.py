"""Lesions in the file: a grid shows what a scanner with such voxels would, and everything is asked for and seen through it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from hrldm.ct.geometry import to_world
from hrldm.insertion.generator import Request
from hrldm.nodules.histograms import FLOOR_REACH, hu_histogram
from hrldm.nodules.transplant import Host
from study import in_file
from study.in_file import drawn_histograms, on_grid, realism_in_file, seen
from study.systems.inserted import in_crops
from tests import tiny

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (0.5, 0.5, 0.5), (2.0, 2.0, 5.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_begins_at_the_same_face_and_averages_over_a_coarser_voxel(spacing):
    ramp = np.indices((40, 40, 40)).sum(0) * 10.0  # the mean over a voxel is the value at its middle
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = -30, 5, 70
    scan = on_grid(ramp, affine, np.array(spacing))
    assert scan.array.dtype == np.int16 and np.allclose(scan.spacing, spacing)
    faces = [to_world(scan.affine, np.full(3, -0.5)), to_world(affine, np.full(3, -0.5))]
    np.testing.assert_allclose(*faces, atol=1e-9)
    middle = tuple(n // 2 for n in scan.shape)
    index = to_world(np.linalg.inv(affine), to_world(scan.affine, np.array(middle)))
    assert scan.array[middle] == pytest.approx(10 * index.sum(), abs=1)


def test_noise_seen_through_thick_slices_loses_the_variance_of_a_mean_and_a_fine_grid_keeps_the_values():
    crops = np.random.default_rng(0).normal(-850, 100, (2, 40, 40, 40)).round().astype(np.int16)
    np.testing.assert_array_equal(seen(crops, np.ones(3)), crops)
    thick = on_grid(crops[0], np.eye(4), np.array([1.0, 1.0, 4.0]))
    assert thick.array.std() == pytest.approx(50, rel=0.05)


def test_each_asks_for_what_insert_would_draw_there(monkeypatch):
    size = 2 * FLOOR_REACH + 17
    nodules, lung = tiny.patches(6, size=size), np.linspace(-900, -650, 6)
    hu = np.full(nodules.hu.shape, 300, np.int16)
    near = slice(size // 2 - FLOOR_REACH, size // 2 + FLOOR_REACH + 1)
    hu[:, near, near, near] = lung[:, None, None, None]
    places, asked, draw = dataclasses.replace(nodules, hu=hu), [], in_file.draw_histogram
    monkeypatch.setattr(in_file, "draw_histogram", lambda *given: asked.append(given) or draw(*given))
    made = drawn_histograms(places, seed=1)
    for (subtype, diameter, _, floor), row, mask, hu_there in zip(
        asked, places.frame.itertuples(), places.mask, lung.astype(np.int16), strict=True
    ):
        assert subtype == row.subtype and floor == hu_there - 30
        assert np.pi / 6 * diameter**3 == pytest.approx(mask.sum())
    np.testing.assert_allclose(made.sum(1), 1)
    np.testing.assert_array_equal(drawn_histograms(places, seed=1), made)
    assert (drawn_histograms(places, seed=2) != made).any(1).all()
    np.testing.assert_array_equal(drawn_histograms(places[[0, 1, 2]], seed=1), made[:3])


def request(nodules, histogram):
    background = np.where(nodules.mask, -850, nodules.hu).astype(np.int16)
    return Request(background, nodules.mask, nodules.subtype, histogram, np.arange(len(nodules)))


def test_in_a_crop_of_its_own_the_lesion_has_the_histogram_and_the_rest_its_values():
    nodules = tiny.patches(3, size=40)
    asked = request(nodules, drawn_histograms(nodules, seed=0))
    made = in_crops(asked, tiny.PaintingGenerator()(asked))
    for hu, mask, wanted, before in zip(made, asked.mask, asked.histogram, asked.background, strict=True):
        assert np.abs(hu_histogram(hu[mask]) - wanted).max() < 0.02
        np.testing.assert_array_equal(hu[:6], before[:6])


def test_every_system_is_judged_through_the_grid():
    nodules = tiny.patches(12, size=40)
    background = np.random.default_rng(5).normal(-850, 60, nodules.hu.shape).round().astype(np.int16)
    row, step = np.arange(len(nodules)), 40
    host = Host("host", ("test",), np.concatenate(background), np.eye(4), np.ones((step * len(nodules), 40, 40), int))
    frame = nodules.frame.assign(i=row * step + step // 2, j=20, k=20)
    truth = dataclasses.replace(nodules, frame=frame)
    study = SimpleNamespace(
        seed=0, profile=tiny.profile(), patches=lambda _: truth, backgrounds=lambda _: dataclasses.replace(truth, hu=background)
    )  # fmt: skip
    table = realism_in_file(study, "test", truth, host, tiny.PaintingGenerator(), np.array([0.8, 0.8, 2.5]))
    told = table.query("features == 'inside' and model == 'logistic'").set_index("system").auroc
    assert list(told.index) == ["transplant", "texture", "texture-inserted", "inserted"]
    assert told["transplant"] == pytest.approx(0.5, abs=0.05) and told.between(0, 1).all()
    assert (table.place == "displaced").all() and (table.n_nodules == 12).all()
