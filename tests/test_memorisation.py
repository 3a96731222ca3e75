import dataclasses

import numpy as np
import pytest
import torch

from glann.errors import GlannError
from glann.evaluation.memorisation import memorisation


def gaussian(seed: int, n: int, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


TRAIN, TEST, FRESH = gaussian(1, 4000), gaussian(2, 500), gaussian(3, 500)
"""Eight times as many training as test images: a subset would hold few of the rows copied."""


def by_definition(fake, train, test):
    """Ratio, share and baseline from all distances, of differences in float64."""
    fake, train, test = (x.double().numpy() for x in (fake, train, test))

    def nearest(a, b, itself=False):
        d = np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))
        if itself:
            np.fill_diagonal(d, np.inf)
        return d.min(1)

    leaning = nearest(fake, train) / nearest(fake, test)
    baseline = np.median(nearest(test, train) / nearest(test, test, itself=True))
    return np.median(leaning) / baseline, (leaning < baseline).mean(), baseline


@pytest.mark.parametrize(("n", "m", "l"), [(9, 30, 12), (40, 20, 31), (8, 1, 2)])
def test_ratio_and_share_by_definition(n, m, l):  # noqa: E741
    fake, train, test = gaussian(n, n) * 0.8, gaussian(m, m), gaussian(l, l)
    found = memorisation(fake=fake, train=train, test=test)
    wanted = by_definition(fake, train, test)
    assert (found.ratio, found.share_closer_to_train, found.baseline) == pytest.approx(
        wanted, rel=1e-5
    )
    assert {type(x) for x in (found.ratio, found.share_closer_to_train, found.baseline)} == {float}


def test_fresh_images_of_the_same_kind_are_not_taken_for_copies():
    found = memorisation(fake=FRESH, train=TRAIN, test=TEST)
    assert found.ratio == pytest.approx(1, abs=0.05)
    assert found.share_closer_to_train == pytest.approx(0.5, abs=0.06)
    assert found.baseline < 0.85  # there are more training images, so they are nearer


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_copies_of_training_images_are_seen_however_many_there_are(noise):
    rows = torch.randperm(4000, generator=torch.Generator().manual_seed(4))[:500]
    copies = TRAIN[rows] + noise * gaussian(5, 500)
    found = memorisation(fake=copies, train=TRAIN, test=TEST)
    assert found.ratio < 0.01
    assert found.share_closer_to_train == 1
    assert found.closest.shape == (8, 2)
    assert torch.equal(rows[found.closest[:, 0]], found.closest[:, 1])


def test_copies_of_test_images_are_the_reverse():
    found = memorisation(fake=TEST + 1e-3, train=TRAIN, test=TEST)
    assert found.ratio > 10
    assert found.share_closer_to_train == 0
    assert memorisation(fake=TEST, train=TRAIN, test=TEST).ratio == np.inf


def test_a_few_copies_move_the_share_not_the_median():
    mixed = torch.cat([FRESH[:350], TRAIN[:150]])
    found = memorisation(fake=mixed, train=TRAIN, test=TEST)
    assert found.share_closer_to_train == pytest.approx(0.65, abs=0.05)
    assert 0.7 < found.ratio < 1
    assert found.distances.max() == 0


def test_blurred_samples_are_not_taken_for_copies():
    # Near the middle all images are near, training and test ones alike.
    found = memorisation(fake=FRESH * 0.3, train=TRAIN, test=TEST)
    assert 0.9 < found.ratio < 1.2


def test_closest_pairs_of_the_whole_training_set_in_order():
    fake = gaussian(6, 30)
    fake[11], fake[4], fake[20] = TRAIN[3999] + 2e-3, TRAIN[17] + 1e-3, TRAIN[17] + 3e-3
    found = memorisation(fake=fake, train=TRAIN, test=TEST, shown=5)
    assert found.closest[:3].tolist() == [[4, 17], [11, 3999], [20, 17]]
    assert found.closest.dtype == torch.int64
    assert found.distances.dtype == torch.float32
    assert (found.distances.diff() >= 0).all()
    distances = (fake[found.closest[:, 0]] - TRAIN[found.closest[:, 1]]).norm(dim=1)
    torch.testing.assert_close(found.distances, distances)
    everything = memorisation(fake=fake, train=TRAIN, test=TEST, shown=30)
    assert sorted(everything.closest[:, 0].tolist()) == list(range(30))
    assert memorisation(fake=fake, train=TRAIN, test=TEST, shown=0).closest.shape == (0, 2)


def test_equally_near_samples_come_in_their_order():
    found = memorisation(fake=TRAIN[:40], train=TRAIN, test=TEST, shown=40)
    assert found.closest[:, 0].tolist() == list(range(40))


def test_samples_that_are_in_both_sets_lean_to_neither():
    train, test = gaussian(7, 50), gaussian(8, 50)
    both = gaussian(9, 20)
    found = memorisation(fake=both, train=torch.cat([train, both]), test=torch.cat([test, both]))
    assert found.ratio == pytest.approx(1 / found.baseline)


def test_ties_with_the_median_test_image_count_half():
    # On a line, where all can be worked out by hand.
    train, test = np.array([[0.0], [8.0]]), np.array([[1.0], [2.0], [7.0]])
    real = [1 / 1, 2 / 1, 1 / 5]
    fake = np.array([[1.5], [7.5], [5.0]])
    leaning = [1.5 / 0.5, 1.0, 3 / 2]
    assert np.median(real) == 1
    found = memorisation(fake=fake, train=train, test=test, shown=1)
    assert found.baseline == 1
    assert found.ratio == np.median(leaning)
    assert found.share_closer_to_train == pytest.approx(1 / 6)


def test_any_float_type_and_place_gives_the_same():
    arrays = {"fake": FRESH[:60], "train": TRAIN[:300], "test": TEST[:80]}
    wanted = dataclasses.astuple(memorisation(**arrays))
    for change in (torch.Tensor.double, torch.Tensor.numpy, lambda x: x.double().numpy()):
        found = memorisation(**{name: change(x) for name, x in arrays.items()})
        for one, other in zip(dataclasses.astuple(found), wanted, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("leak", ["train", "test"])
def test_test_images_that_tell_nothing_are_refused(leak):
    train, test = gaussian(10, 30), gaussian(11, 20)
    if leak == "train":
        test[:11] = train[:11]
    else:
        test[10:] = test[:10]
        test[0] = test[1]
    with pytest.raises(GlannError, match="half of the test rows or more are equal to"):
        memorisation(fake=gaussian(12, 10), train=train, test=test)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fake", gaussian(0, 7), "fake has 7 rows; wanted at least 8, as many as are shown"),
        ("train", gaussian(0, 0), "train has 0 rows; wanted at least 1"),
        ("test", gaussian(0, 1), "test has 1 rows; wanted at least 2"),
        ("train", gaussian(0, 9, 5), r"train has shape \(9, 5\); wanted \(n, 6\)"),
        ("test", gaussian(0, 9, 5), r"test has shape \(9, 5\)"),
        ("train", gaussian(0, 9).fill_(torch.nan), "train holds NaN"),
        ("test", gaussian(0, 9).fill_(torch.inf), "test holds NaN"),
        ("fake", gaussian(0, 9)[0], "fake has shape"),
    ],
)
def test_what_does_not_fit_is_refused(name, array, message):
    arrays = {"fake": gaussian(1, 9), "train": gaussian(2, 9), "test": gaussian(3, 9)}
    memorisation(**arrays)
    with pytest.raises(GlannError, match=message):
        memorisation(**{**arrays, name: array})


def test_what_was_found_is_fixed():
    found = memorisation(fake=FRESH[:9], train=TRAIN[:50], test=TEST[:50])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ratio = 1.0
