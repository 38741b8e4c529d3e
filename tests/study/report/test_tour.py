"""The tour's controls say what `insert` is asked for, show what came, and answer a wrong wish by a sentence."""

import dataclasses
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import ndimage

from hrldm.insertion.insert import insert
from hrldm.insertion.wish import Wish
from study.report.tour import Tour, around_lesion, change_reach, viewer_3d
from tests import tiny
from tests.insertion.chests import LIBRARY, scan


@pytest.fixture(autouse=True)
def _small_library(monkeypatch):
    monkeypatch.setattr("hrldm.insertion.insert.load_shapes", lambda: LIBRARY)
    yield
    plt.close("all")


@pytest.fixture
def tour() -> Tour:
    return Tour(*scan(), tiny.PaintingGenerator())


def test_controls_are_the_wish(tour):
    tour.subtype.value, tour.diameter.value, tour.core.value, tour.seed.value = "part-solid", 16.0, 7.0, 3
    tour.at.value = "-70, 5, 10"
    tour.location.value = "subpleural"  # a place that is typed says it all
    assert tour.wish() == Wish("part-solid", 16.0, at=(-70.0, 5.0, 10.0), core_mm=7.0, seed=3)
    tour.location.value = "inner"
    tour.at.value, tour.core.value = "", 0.0
    assert tour.wish() == Wish("part-solid", 16.0, seed=3)
    assert tour.lobe.options == ("any",)  # the labels tell no lobes


def test_the_button_inserts_and_shows(tour):
    tour.diameter.value = 14.0
    tour.button.click()
    assert tour.made.records[0]["diameter_mm"] == pytest.approx(14, abs=0.05)
    changed = int((tour.made.stored != tour.ct.stored).sum())
    assert tour.said.value.startswith(f"{changed} of {tour.ct.stored.size} voxels changed") and not tour.button.disabled


def test_the_reach_of_a_change_is_its_distance_from_the_lesion():
    ct, labels = scan(turn=np.diag([-1.0, -1.0, 1.0]))
    made = insert(ct, [Wish("solid", 14.0, at=(-70.0, 20.0, 10.0))], tiny.PaintingGenerator(), labels)
    away = ndimage.distance_transform_edt(made.mask == 0, ct.spacing)
    changed = made.stored != ct.stored
    assert change_reach(ct, made) == (changed.sum(), pytest.approx(away[changed].max()))
    assert change_reach(ct, dataclasses.replace(made, stored=ct.stored)) == (0, 0.0)


@pytest.mark.parametrize(("change", "said"), [
    ({"at": "0 0 0"}, "would leave the lungs; the nearest place"), ({"at": "here"}, "could not convert"),
    ({"subtype": "solid", "core": 5.0}, "part-solid nodules have one"),
])  # fmt: skip
def test_a_wrong_wish_is_answered_and_no_picture_of_another_is_left(tour, change, said, monkeypatch):
    seen = []
    monkeypatch.setattr("study.report.tour.display", lambda figure: seen.append("picture"))
    tour.button.click()
    for view in (tour.view, tour.axial):
        monkeypatch.setattr(view, "clear_output", lambda **_: seen.append("cleared"))
    assert seen == ["picture", "picture"] and tour.made
    for name, value in change.items():
        getattr(tour, name).value = value
    tour.button.click()
    assert said in tour.said.value and tour.made is None and not tour.button.disabled
    assert set(seen[2:]) == {"cleared"} and tour.scroll.disabled


def test_a_picture_stands_there_before_the_first_press_and_scrolls(tour):
    ct, labels = scan()
    made = insert(ct, [Wish("solid", 14.0, at=(-70.0, 20.0, 10.0))], tiny.PaintingGenerator(), labels)
    tour = Tour(ct, labels, tiny.PaintingGenerator(), made)
    assert "voxels changed" in tour.said.value and not tour.scroll.disabled and tour.made is made
    middle = around_lesion(ct, made)[1]
    far = dataclasses.replace(middle, slices_off=-1000)
    assert middle.page(middle.mask).sum() > far.page(far.mask).sum() == 0 and far.centre[0] == 0
    tour.scroll.value = 3
    tour.made = None
    tour.scroll.value = 4  # nothing to show, nothing fails


def test_what_is_shown_is_the_lesion_in_ras():
    ct, labels = scan(turn=np.diag([-1.0, -1.0, 1.0]))  # LPS, as DICOM has it
    made = insert(ct, [Wish("solid", 14.0, at=(-70.0, 20.0, 10.0))], tiny.PaintingGenerator(), labels)
    before, after = around_lesion(ct, made)
    assert before.mask.sum() == (made.mask == 1).sum()
    assert (after.volume != before.volume)[before.mask].mean() > 0.9
    anterior = around_lesion(ct, made, side_mm=140)[0].volume
    middle = anterior[anterior.shape[0] // 2, :, anterior.shape[2] // 2]
    wall = np.flatnonzero(middle > -200)
    assert wall.max() > len(middle) - 12 and wall.min() > 12  # the lesion lies 20 mm forward: the wall is near in front


def test_the_viewer_is_optional(monkeypatch):
    ct, labels = scan()
    made = insert(ct, [Wish("solid", 14.0)], tiny.PaintingGenerator(), labels)
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(ImportError, match="the 3D viewer is optional; install it"):
        viewer_3d(ct, made)
