import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glann.errors import GlannError
from glann.evaluation import prd as module
from glann.evaluation.prd import f_scores, prd_curve


def clusters_at(*counts: int) -> np.ndarray:
    """So many equal points in each of some far places: k-means can find nothing else."""
    places = [np.full((count, 2), 100.0 * place) for place, count in enumerate(counts)]
    return np.concatenate(places)


def by_definition(p, q, angles):
    """Each point of the curve by its formula, in plain Python."""
    curve = []
    for i in range(angles):
        angle = min(max(i / (angles - 1) * math.pi / 2, 1e-10), math.pi / 2 - 1e-10)
        slope = math.tan(angle)
        curve.append(
            (
                sum(min(slope * a, b) for a, b in zip(p, q, strict=True)),
                sum(min(a, b / slope) for a, b in zip(p, q, strict=True)),
            )
        )
    return curve


@given(
    labels=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=30),
    angles=st.integers(3, 40),
)
@settings(deadline=None, max_examples=60)
def test_the_curve_of_known_clusters_by_definition(labels, angles):
    real, fake = zip(*labels, strict=True)
    n = len(labels)
    x = np.zeros((n, 1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_cluster", lambda *_: np.array([*real, *fake]))
        precision, recall = prd_curve(real=x, fake=x, clusters=4, angles=angles, runs=2)
    assert precision.dtype == recall.dtype == torch.float64
    p, q = ([labels.count(c) / n for c in range(4)] for labels in (real, fake))
    wanted = by_definition(p, q, angles)
    assert precision.tolist() == pytest.approx([a for a, _ in wanted], rel=1e-6, abs=1e-9)
    assert recall.tolist() == pytest.approx([b for _, b in wanted], rel=1e-6, abs=1e-9)


def test_ends_of_the_curve_are_the_overlaps():
    # Of the fakes 3/4 lie where real ones are; of the real ones 1/4 lie where fakes are.
    real, fake = clusters_at(10, 30, 0), clusters_at(30, 0, 10)
    precision, recall = prd_curve(real=real, fake=fake, clusters=3, runs=1)
    assert precision.shape == recall.shape == (1001,)
    assert (precision[0].item(), recall[0].item()) == pytest.approx((0, 1 / 4), abs=1e-9)
    assert (precision[-1].item(), recall[-1].item()) == pytest.approx((3 / 4, 0), abs=1e-9)
    assert (precision.diff() >= 0).all()
    assert (recall.diff() <= 0).all()


def test_swapping_real_and_fake_swaps_precision_and_recall():
    real, fake = clusters_at(10, 25, 5), clusters_at(30, 0, 10)
    precision, recall = prd_curve(real=real, fake=fake, clusters=3, runs=1)
    swapped = prd_curve(real=fake, fake=real, clusters=3, runs=1)
    torch.testing.assert_close(swapped[0], recall.flip(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(swapped[1], precision.flip(0), rtol=1e-9, atol=1e-9)
    for one, other in zip(f_scores(precision, recall), f_scores(*swapped)[::-1], strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_equal_sets_have_all_of_both():
    x = np.random.default_rng(0).normal(size=(200, 3))
    precision, recall = prd_curve(real=x, fake=x[::-1], runs=2)
    assert precision[500].item() == pytest.approx(1)
    assert recall[500].item() == pytest.approx(1)
    assert max(precision.max(), recall.max()) <= 1
    assert f_scores(precision, recall) == pytest.approx((1, 1))


def test_disjoint_sets_have_none():
    precision, recall = prd_curve(real=clusters_at(30, 0), fake=clusters_at(0, 30), clusters=2)
    assert precision.max() == recall.max() == 0
    assert f_scores(precision, recall) == (0, 0)


def test_f8_falls_with_missing_modes_and_f_one_eighth_with_wrong_samples():
    centres = np.repeat(np.eye(10) * 50, 30, axis=0)
    random = np.random.default_rng(1)
    everything = centres + random.normal(size=(300, 10))
    few = centres[np.arange(300) % 60] + random.normal(size=(300, 10))
    f8, f8_inverse = f_scores(*prd_curve(real=everything, fake=few, clusters=10, runs=3))
    assert f8 < 0.3 < 0.8 < f8_inverse
    f8, f8_inverse = f_scores(*prd_curve(real=few, fake=everything, clusters=10, runs=3))
    assert f8_inverse < 0.3 < 0.8 < f8


@given(
    curve=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9),
    beta=st.floats(1.5, 20),
)
def test_f_scores_by_definition(curve, beta):
    def f(b, p, r):
        return (1 + b**2) * p * r / (b**2 * p + r) if p and r else 0.0

    found = f_scores(*torch.tensor(curve, dtype=torch.float64).T, beta=beta)
    wanted = [max(f(b, p, r) for p, r in curve) for b in (beta, 1 / beta)]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    assert {type(x) for x in found} == {float}


def test_beta_is_8():
    curve = torch.tensor([0.3, 0.9]), torch.tensor([0.8, 0.1])
    assert f_scores(*curve) == f_scores(*curve, beta=8) != f_scores(*curve, beta=7)


def test_runs_are_averaged(monkeypatch):
    labels = iter([[0, 0, 1, 1], [0, 1, 0, 1]])
    monkeypatch.setattr(module, "_cluster", lambda *_: np.array(next(labels)))
    x = np.zeros((2, 1))
    precision, _ = prd_curve(real=x, fake=x, clusters=2, angles=3, runs=2)
    # Disjoint in the first clustering, equal in the second.
    assert precision.tolist() == pytest.approx([0, 1 / 2, 1 / 2], abs=1e-9)


def test_rounding_takes_no_curve_above_1(monkeypatch):
    # Thirteenths of these counts add up to more than 1.
    labels = np.array([1, 1, 0, 1, 4, 2, 3, 0, 2, 4, 3, 2, 3])
    monkeypatch.setattr(module, "_cluster", lambda *_: np.concatenate([labels, labels]))
    x = np.zeros((13, 1))
    precision, recall = prd_curve(real=x, fake=x, clusters=5, runs=1)
    assert precision.max() == recall.max() == 1


def test_the_authors_protocol(monkeypatch):
    seen = []

    class Recording(module.MiniBatchKMeans):
        def __init__(self, **options):
            super().__init__(**options)
            seen.append(options)

    monkeypatch.setattr(module, "MiniBatchKMeans", Recording)
    x = np.random.default_rng(2).normal(size=(60, 2))
    precision, _ = prd_curve(real=x, fake=x)
    assert len(seen) == 10
    assert {(options["n_clusters"], options["n_init"]) for options in seen} == {(20, 10)}
    assert len({options["random_state"] for options in seen}) == 10
    assert len(precision) == 1001


def test_the_curve_follows_from_its_seed_alone():
    real, fake = np.random.default_rng(3).normal(size=(2, 100, 4))
    options = {"real": real, "fake": fake, "angles": 11, "runs": 1}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = prd_curve(**options, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert all(map(torch.equal, prd_curve(**options, seed=1), first))
    assert not torch.equal(prd_curve(**options, seed=2)[0], first[0])


def test_fewer_different_points_than_clusters_warn_nobody():
    x = np.repeat(np.eye(3), 20, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision, recall = prd_curve(real=x, fake=x, runs=1)
    assert f_scores(precision, recall) == pytest.approx((1, 1))


def test_sets_of_different_sizes_are_refused():
    x = np.random.default_rng(4).normal(size=(40, 2))
    with pytest.raises(GlannError, match="real has 40 rows and fake 39; wanted as many of both"):
        prd_curve(real=x, fake=x[:39])


@pytest.mark.parametrize(
    ("precision", "recall", "beta", "message"),
    [
        ([0.5], [0.5], 1, "beta = 1 is out of range"),
        ([0.5], [0.5], math.inf, "beta = inf"),
        ([0.5], [0.5], math.nan, "beta = nan"),
        ([0.5, 0.4], [0.5], 8, r"precision \(2,\) and recall \(1,\) don't fit"),
        ([], [], 8, "don't fit"),
        ([[0.5]], [[0.5]], 8, "don't fit"),
        ([1.1], [0.5], 8, r"not in \[0, 1\]"),
        ([0.5], [-0.1], 8, r"not in \[0, 1\]"),
        ([0.5], [math.nan], 8, r"not in \[0, 1\]"),
    ],
)
def test_what_is_no_curve_is_refused(precision, recall, beta, message):
    with pytest.raises(GlannError, match=message):
        f_scores(torch.tensor(precision), torch.tensor(recall), beta)
