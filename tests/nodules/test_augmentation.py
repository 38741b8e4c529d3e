"""Random training patches are true pieces of their volumes, in all 48 orientations, and follow their seed."""

import numpy as np
import pytest

from hrldm.nodules.augmentation import cube_symmetry, sample_patches


def test_the_48_symmetries_are_distinct_and_keep_neighbours():
    x = np.arange(27).reshape(3, 3, 3)
    from_centre = ((np.indices((3, 3, 3)) - 1) ** 2).sum(0)
    images = [cube_symmetry(x, i) for i in range(48)]
    assert len({image.tobytes() for image in images}) == 48
    np.testing.assert_array_equal(images[0], x)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(cube_symmetry(from_centre, i), from_centre)
        np.testing.assert_array_equal(cube_symmetry(np.stack([x, x + 100]), i), [image, image + 100])
    for bad in (-1, 48):
        with pytest.raises(ValueError, match="not in 0..47"):
            cube_symmetry(x, bad)


def test_patches_are_pieces_of_the_volume_in_some_orientation():
    volume = np.random.default_rng(0).permutation(12**3).reshape(12, 12, 12).astype(np.int16)
    seen = set()
    for patch in sample_patches([volume], [1.0], 5, 60, np.random.default_rng(1))[:, 0]:
        fits = []
        for i in range(48):
            turned = cube_symmetry(volume, i)
            at = np.argwhere(turned == patch[0, 0, 0])[0]
            if np.array_equal(turned[tuple(slice(a, a + 5) for a in at)], patch):
                fits.append(i)
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 20


def test_volumes_are_drawn_by_weight():
    volumes = [np.full((6, 6, 6), v, np.int16) for v in (0, 1, 2)]
    values = sample_patches(volumes, [1, 3, 0], 4, 2000, np.random.default_rng(2))[:, 0, 0, 0, 0]
    assert set(values) == {0, 1}
    assert (values == 1).mean() == pytest.approx(0.75, abs=0.04)


def test_small_volumes_are_padded_by_their_edge():
    volume = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    patch = sample_patches([volume], [1], 6, 1, np.random.default_rng(3))[0, 0]
    values, counts = np.unique(patch, return_counts=True)
    assert patch.shape == (6, 6, 6) and set(values) == set(range(8)) and (counts == 27).all()


def test_same_generator_same_patches():
    volume = np.random.default_rng(0).integers(-1000, 400, (20, 20, 20)).astype(np.int16)
    a, b, c = (sample_patches([volume], [1], 8, 3, np.random.default_rng(s)) for s in (4, 4, 5))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c) and a.dtype == np.float32 and a.shape == (3, 1, 8, 8, 8)
