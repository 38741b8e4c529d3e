"""Shape library: what LIDC holds, and the independent masks of the shared real data."""

import numpy as np
import pandas as pd
import pytest

from hrldm.nodules import shapes


@pytest.fixture(scope="module")
def library() -> shapes.ShapeLibrary:
    return shapes.load_shapes()


def test_library_is_what_lidc_holds(library):
    table = library.table
    assert 1000 < len(library) < 1300
    assert table.readers.between(3, 4).all()
    assert table.nodule_id.is_unique
    assert table.diameter_mm.between(5.9, 30.1).all()
    assert table.subtype.value_counts().idxmax() == "solid"
    np.testing.assert_array_equal([m.sum() for m in library.masks], table.volume_mm3)


def test_library_agrees_with_the_shared_masks(library, shared_data):
    """Same scan, the only nodule of both tables: another group's masks of the same readers."""
    theirs, ours = pd.read_csv(shared_data / "lidc-vois" / "manifest.csv"), library.table
    theirs = theirs[theirs.diameter_mm.between(6, 30)]
    one = [t[t.groupby("series_instance_uid").series_instance_uid.transform("size") == 1] for t in (ours, theirs)]
    both = one[0].merge(one[1], on="series_instance_uid", suffixes=("", "_theirs"))
    ratio = both.diameter_mm / both.diameter_mm_theirs
    assert len(both) > 200
    assert 0.97 < ratio.median() < 1.06
    assert (ratio.between(0.85, 1.18)).mean() > 0.9
    assert (both.subtype == both.subtype_theirs).mean() > 0.9


def test_a_library_is_read_as_it_was_written(library, tmp_path):
    few = shapes.ShapeLibrary(library.table[:3], library.masks[:3])
    few.save(tmp_path / "few.npz")
    again = shapes.load_shapes(tmp_path / "few.npz")
    pd.testing.assert_frame_equal(again.table, few.table)
    for a, b in zip(again.masks, few.masks, strict=True):
        np.testing.assert_array_equal(a, b)
