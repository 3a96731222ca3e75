import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc

from glann.evaluation import manifold as module
from glann.evaluation.manifold import density_coverage, neighbour_radii, precision_recall


def all_scores(real, fake, k):
    return precision_recall(real=real, fake=fake, k=k) + density_coverage(real=real, fake=fake, k=k)


def by_prdc(real, fake, k):
    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(real, fake, k)
    return tuple(float(found[name]) for name in ("precision", "recall", "density", "coverage"))


def by_definition(real, fake, k):
    """Closed balls in whole numbers: nothing is rounded."""
    real, fake = np.asarray(real, dtype=np.int64), np.asarray(fake, dtype=np.int64)

    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(2)

    def radii(a):
        d = squared(a, a)
        return np.array([np.sort(np.delete(d[i], i))[k - 1] for i in range(len(a))])

    d = squared(real, fake)
    in_real, in_fake = d <= radii(real)[:, None], d <= radii(fake)[None]
    return (
        float(in_real.any(0).mean()),
        float(in_fake.any(1).mean()),
        in_real.sum() / (k * len(fake)),
        float(in_real.any(1).mean()),
    )


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "m", "d", "k"), [(300, 200, 2, 1), (400, 500, 16, 3), (7, 9, 3, 5)])
def test_exactly_the_scores_of_prdc(n, m, d, k, kind):
    random = np.random.default_rng(n)
    real, fake = random.normal(size=(n, d)), random.normal(size=(m, d)) * 0.9 + 0.2
    real, fake = real.astype(kind), fake.astype(kind)
    assert all_scores(real, fake, k) == pytest.approx(by_prdc(real, fake, k), rel=1e-14)


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(4, 25),
    m=st.integers(4, 25),
    d=st.integers(1, 4),
    k=st.integers(1, 3),
    spread=st.integers(1, 4),
    shift=st.sampled_from([0, 1000]),
)
@settings(deadline=None, max_examples=100)
def test_ties_and_duplicates_are_decided_exactly(seed, n, m, d, k, spread, shift):
    # Small whole numbers: many equal points, balls of radius 0, and points on edges.
    random = np.random.default_rng(seed)
    real = random.integers(-spread, spread + 1, size=(n, d)) + shift
    fake = random.integers(-spread, spread + 1, size=(m, d)) + shift
    wanted = by_definition(real, fake, k)
    # By a tenth, that no float holds, sums and means are rounded; far off, even the data are.
    for scale in (1.0, 0.1) if shift == 0 else (1.0,):
        found = all_scores(real * scale, fake * scale, k)
        assert found == pytest.approx(wanted, rel=1e-14)


@given(
    seed=st.integers(0, 2**32),
    step=st.integers(1, 900),
    n=st.integers(6, 40),
    m=st.integers(6, 40),
    copies=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_neither_parts_nor_order_matter(seed, step, n, m, copies):
    random = np.random.default_rng(seed)
    real, fake = random.normal(size=(n, 5)), random.normal(size=(m, 5))
    if copies:  # all on edges of balls
        fake = real[random.integers(0, n, size=m)]
    wanted = all_scores(real, fake, 3)
    assert all_scores(random.permutation(real), random.permutation(fake), 3) == wanted
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_DISTANCES", step)
        assert all_scores(real, fake, 3) == wanted


def test_the_matrix_of_all_distances_is_never_held(monkeypatch):
    sizes = []
    product = torch.addmm

    def recording(*args, **kwargs):
        sizes.append(product(*args, **kwargs).numel())
        return product(*args, **kwargs)

    monkeypatch.setattr(module, "_DISTANCES", 1000)
    monkeypatch.setattr(torch, "addmm", recording)
    all_scores(np.random.default_rng(0).normal(size=(90, 3)), np.eye(60, 3), 3)
    assert sizes
    assert max(sizes) <= 1000


def test_known_answers_on_a_line():
    # Balls for k = 1 around 0, 1, 3 reach 1, 1, 2; those around .5, 10 reach 9.5.
    real, fake = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [10.0]])
    assert precision_recall(real=real, fake=fake, k=1) == (1 / 2, 1.0)
    assert density_coverage(real=real, fake=fake, k=1) == (2 / 2, 2 / 3)
    assert neighbour_radii(torch.from_numpy(real), 1).tolist() == [1, 1, 4]
    assert neighbour_radii(torch.from_numpy(real), 2).tolist() == [9, 4, 9]


def test_k_is_3_for_precision_and_5_for_density():
    random = np.random.default_rng(1)
    real, fake = random.normal(size=(2, 100, 6))
    wanted = {k: all_scores(real, fake, k) for k in (3, 5)}
    assert precision_recall(real=real, fake=fake) == wanted[3][:2]
    assert density_coverage(real=real, fake=fake) == wanted[5][2:]


def test_a_collapsed_sampler_is_precise_and_recalls_little():
    random = np.random.default_rng(2)
    centres = np.repeat(np.eye(10) * 20, 30, axis=0)
    real = centres + random.normal(size=(300, 10))
    collapsed = centres[:1] + random.normal(size=(300, 10)) * 0.5
    precision, recall, density, coverage = all_scores(real, collapsed, 5)
    assert precision > 0.95
    assert density > 1
    assert recall < 0.1
    assert coverage < 0.11
    # The other way round: samples of everything, of which the data hold one mode.
    precision, recall, density, coverage = all_scores(collapsed, real, 5)
    assert precision < 0.1
    assert recall > 0.95
    assert density < 0.1


def test_all_samples_equal():
    real = np.random.default_rng(3).normal(size=(200, 4))
    precision, recall, _, coverage = all_scores(real, np.repeat(real[:1], 50, axis=0), 3)
    assert precision == 1
    assert recall == 1 / 200
    assert coverage < 0.1


def test_an_outlier_among_the_real_raises_precision_more_than_density():
    random = np.random.default_rng(4)
    real = random.normal(size=(400, 8))
    fake = random.normal(size=(400, 8)) + 6
    before = all_scores(real, fake, 5)
    real[0] = 9  # beyond the fakes: its ball holds most of them
    after = all_scores(real, fake, 5)
    assert after[0] - before[0] > 0.8
    assert after[2] - before[2] < 0.25
    assert after[3] - before[3] == pytest.approx(1 / 400)


def test_samples_of_the_real_distribution():
    # Coverage is 1 − 2^−k in expectation and density 1, as derived by Naeem et al.
    random = np.random.default_rng(5)
    real, fake = random.normal(size=(2, 3000, 3))
    density, coverage = density_coverage(real=real, fake=fake, k=5)
    assert density == pytest.approx(1, abs=0.03)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.015)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e5])
def test_copies_of_the_real_images_lie_in_all_balls(scale):
    # Each ball holds its centre and the k neighbours, of which one lies on the edge.
    real = np.random.default_rng(6).normal(size=(150, 12)) * scale + 3 * scale
    assert all_scores(real, real[::-1], 3) == (1, 1, 4 / 3, 1)


def test_a_ball_of_radius_0_holds_its_copies():
    real = np.repeat(np.array([[0.1, 0.7], [1.3, 0.3], [2.9, 5.1]]), 6, axis=0)
    assert neighbour_radii(torch.from_numpy(real), 5).tolist() == [0] * 18
    assert all_scores(real, real, 5) == (1, 1, 6 / 5, 1)
    assert all_scores(np.ones((5, 2)), np.ones((6, 2)), 3) == (1, 1, 5 / 3, 1)
    assert all_scores(real, real + 1e-5, 5) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_far_from_the_origin_no_digits_are_lost(kind):
    # On a grid of 1/64 around 2^17 even float32 is exact, but squares of such numbers are not.
    random = np.random.default_rng(7)
    real, fake = random.integers(-200, 200, size=(2, 300, 6))
    wanted = by_definition(real, fake, 3)
    found = all_scores((real / 64 + 2**17).astype(kind), (fake / 64 + 2**17).astype(kind), 3)
    assert found == pytest.approx(wanted, rel=1e-14)


def test_beside_a_far_outlier_the_others_keep_their_digits():
    random = np.random.default_rng(8)
    real, fake = random.normal(size=(2, 200, 4))
    without = all_scores(real, fake, 3)
    # Its ball starts 1e5 away from all others, and holds none: it reaches to its neighbours.
    far = np.concatenate([real, np.full((1, 4), 1e5)])
    inside = np.array(by_prdc(real, fake, 3))
    assert without == pytest.approx(tuple(inside), rel=1e-14)
    precision, recall, density, coverage = all_scores(far, fake, 3)
    assert recall * 201 == pytest.approx(without[1] * 200)
    assert 0 <= coverage * 201 - without[3] * 200 <= 1 + 1e-9
    assert density - without[2] <= 1 / 3 + 1e-9
    assert precision >= without[0]
