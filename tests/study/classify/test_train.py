"""The DenseNet trainer: exact symmetries, determinism, resumption, early stopping on the validation crops."""

from collections import deque

import numpy as np
import pytest
import torch

from hrldm.nodules.augmentation import CUBE_SYMMETRIES, cube_symmetry
from study.classify.train import (
    ARCHITECTURES,
    HEAD,
    best_epoch,
    build_classifier,
    predict_proba,
    train_classifier,
)
from study.profiles import ClassifierConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(n: int, seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Balls in lung of noise 60 HU: solid at +30 HU, part-solid with a small solid core, ground-glass at -550 HU."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(side) - side / 2] * 3, indexing="ij"))
    labels = np.arange(n) % 3
    crops = np.empty((n, side, side, side), np.int16)
    for i, label in enumerate(labels):
        r = np.linalg.norm(grid - rng.uniform(-2, 2, (3, 1, 1, 1)), axis=0)
        radius = rng.uniform(4, 8)
        hu = np.where(r < radius, 30.0 if label == 0 else -550.0, -860.0)
        hu = np.where((label == 1) & (r < 0.5 * radius), 30.0, hu)
        crops[i] = hu + rng.normal(0, 60, hu.shape)
    return crops, labels


def train(crops, labels, val, epochs, *, arch="densenet-tiny", batch=6, patience=100, seed=3, **how):
    config = ClassifierConfig(arch, epochs, batch, 3e-3, patience=patience)
    return train_classifier(crops, labels, *val, config, n_classes=3, seed=seed, **how)


def run(*args, **how):
    return deque(train(*args, **how), maxlen=1)[0]


def test_the_48_symmetries_are_the_group_of_the_cube():
    x = torch.arange(27.0).reshape(1, 3, 3, 3)
    images = [cube_symmetry(x, i) for i in range(len(CUBE_SYMMETRIES))]
    known = {tuple(image.flatten().tolist()) for image in images}
    assert len(known) == 48
    assert torch.equal(images[0], x)
    composed = {tuple(cube_symmetry(a, j).flatten().tolist()) for a in images for j in range(48)}
    assert composed == known
    corner_distance = (torch.cartesian_prod(*[torch.arange(3.0) - 1] * 3) ** 2).sum(1).reshape(3, 3, 3)
    assert all(torch.equal(cube_symmetry(corner_distance, i), corner_distance) for i in range(48))


def test_learns_phantom_subtypes_and_generalises():
    crops, labels = blobs(48, 0)
    test_crops, test_labels = blobs(30, 1)
    state = run(crops, labels, blobs(12, 2), epochs=24)
    model = build_classifier("densenet-tiny", 3, 0)
    model.load_state_dict(state.best)
    probabilities = predict_proba(model, test_crops)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    assert (probabilities.argmax(1) == test_labels).mean() > 0.8


def test_same_seed_same_weights_other_seed_other_weights():
    crops, labels = blobs(12, 0)
    val = blobs(6, 1)
    a, b, c = (run(crops, labels, val, 2, seed=s).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["features.conv0.weight"], c["features.conv0.weight"])


def test_global_random_state_is_left_alone():
    crops, labels = blobs(6, 0)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(crops, labels, blobs(3, 1), 1)
    assert torch.equal(torch.rand(3), expected)


def test_resumed_run_equals_uninterrupted(tmp_path):
    crops, labels = blobs(14, 0)
    val = blobs(6, 1)
    whole = run(crops, labels, val, 4, steps_per_epoch=3)
    file = tmp_path / "half.epoch"
    killed = train(crops, labels, val, 4, steps_per_epoch=3, checkpoint=file)
    next(killed), next(killed)
    killed.close()
    resumed = list(train(crops, labels, val, 4, steps_per_epoch=3, checkpoint=file))
    assert [s.epoch for s in resumed] == [2, 3, 4]
    assert resumed[-1].history == whole.history
    state = whole.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed[-1].model.state_dict().items())
    assert all(torch.equal(v, whole.best[k]) for k, v in resumed[-1].best.items())


def test_patience_stops_and_keeps_the_best_epoch():
    crops, labels = blobs(12, 0)
    val = (blobs(6, 1)[0], (blobs(6, 1)[1] + 1) % 3)  # wrong labels: fitting the training crops makes validation worse
    states = list(train(crops, labels, val, 40, patience=2, batch=12))
    history = states[-1].history
    assert len(states) < 40
    assert len(states) - best_epoch(history) == 2
    kept = next(s for s in states if s.epoch == best_epoch(history)).best
    assert all(torch.equal(v, kept[k]) for k, v in states[-1].best.items())


def test_initial_weights_are_taken_over_except_the_head():
    source = build_classifier("densenet-tiny", 3, 1).state_dict()
    tuned = build_classifier("densenet-tiny", 2, 2, init=source).state_dict()
    assert tuned[HEAD + "weight"].shape[0] == 2
    assert all(torch.equal(tuned[k], source[k]) for k in source if not k.startswith(HEAD))
    with pytest.raises(ValueError, match="densenet-small"):
        build_classifier("densenet-small", 2, 0, init=source)


def test_densenet121_is_the_paper_network():
    from monai.networks.nets import DenseNet121

    ours = {k: v.shape for k, v in build_classifier("densenet121", 3, 0).state_dict().items()}
    theirs = {k: v.shape for k, v in DenseNet121(3, 1, 3).state_dict().items()}
    assert ours == theirs
    sizes = [sum(p.numel() for p in build_classifier(a, 3, 0).parameters()) for a in ARCHITECTURES]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("crops", "labels", "changes", "message"),
    [
        (np.zeros((4, 8, 8, 9)), np.zeros(4, int), {}, "must be"),
        (np.zeros((4, 16, 16, 16)), np.zeros(4, int), {}, "too small"),
        (np.zeros((1, 32, 32, 32)), np.zeros(1, int), {}, "at least 2"),
        (np.zeros((4, 32, 32, 32)), np.array([0, 1, 2, 3]), {}, "do not fit 3 classes"),
        (np.zeros((4, 32, 32, 32)), np.zeros(4, int), {"arch": "densenet"}, "unknown classifier"),
    ],
)
def test_bad_input_is_named(crops, labels, changes, message):
    with pytest.raises(ValueError, match=message):
        run(crops, labels, (np.zeros((2, 32, 32, 32)), np.zeros(2, int)), 1, **changes)
