import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from glann.evaluation import frechet as module
from glann.evaluation.frechet import frechet_distance, kernel_distance


def samples(seed: int, n: int, d: int, rank: int | None = None) -> np.ndarray:
    """Float64 (n, d) around some mean, with a covariance of `rank` that is not diagonal."""
    random = np.random.default_rng(seed)
    rank = d if rank is None else rank
    return random.normal(size=(n, rank)) @ random.normal(size=(rank, d)) + random.normal(size=d)


def whitened(seed: int, n: int, d: int) -> np.ndarray:
    """Float64 (n, d) of exactly mean 0 and covariance 1."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * np.sqrt(n - 1)


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """FID by its formula, with a general matrix square root."""
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 60, 2), (200, 90, 10), (500, 300, 40)])
def test_fid_is_that_of_scipy_and_torchmetrics(n, m, d):
    x, y = samples(1, n, d), samples(2, m, d)
    found = frechet_distance(real=x, fake=y)
    assert found == pytest.approx(by_scipy(x, y), rel=1e-9)
    moments = [torch.from_numpy(z) for s in (x, y) for z in (s.mean(0), np.cov(s.T))]
    assert found == pytest.approx(float(_compute_fid(*moments)), rel=1e-9)


@given(
    seed=st.integers(0, 2**32),
    d=st.integers(1, 12),
    n=st.integers(2, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(deadline=None, max_examples=60)
def test_fid_of_moved_and_magnified_data_in_closed_form(seed, d, n, scale):
    # Also with fewer samples than dimensions, where the covariances are singular.
    x = samples(seed, n, d) * scale
    shift = np.random.default_rng(seed).normal(size=d) * scale
    spread = np.var(x, axis=0, ddof=1).sum()
    size = spread + (x.mean(0) ** 2).sum() + (shift**2).sum()
    assert frechet_distance(real=x, fake=x + shift) == pytest.approx(
        (shift**2).sum(), rel=1e-9, abs=1e-12 * size
    )
    mean_moved = (x.mean(0) ** 2).sum() * 4
    assert frechet_distance(real=x, fake=3 * x) == pytest.approx(
        mean_moved + 4 * spread, rel=1e-9, abs=1e-12 * size
    )


@given(seed=st.integers(0, 2**32), d=st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_fid_of_diagonal_gaussians_in_closed_form(seed, d):
    # ‖μ − ν‖² + Σ (σ − τ)²; samples that have these moments exactly.
    random = np.random.default_rng(seed)
    mu, nu = random.normal(size=(2, d))
    sigma, tau = random.uniform(0, 3, size=(2, d))
    x, y = whitened(seed, 20, d) * sigma + mu, whitened(seed + 1, 30, d) * tau + nu
    wanted = ((mu - nu) ** 2).sum() + ((sigma - tau) ** 2).sum()
    assert frechet_distance(real=x, fake=y) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "d", "rank"), [(2, 1, 1), (10, 50, 50), (300, 60, 5), (300, 60, 0)])
def test_fid_of_equal_sets_is_0_even_where_covariances_are_singular(n, d, rank):
    x = samples(3, n, d, rank)
    found = frechet_distance(real=x, fake=x[::-1])
    assert 0 <= found <= 1e-12 * (1 + (x**2).sum(1).mean())


def test_fid_is_never_below_0():
    found = [frechet_distance(real=x, fake=x) for x in (samples(s, 20, 8) for s in range(40))]
    assert min(found) >= 0


def test_fid_of_singular_covariances_keeps_its_digits():
    # In orthogonal subspaces nothing is shared: the traces add up.
    x, y = np.zeros((2, 100, 40))
    x[:, :20], y[:, 20:] = whitened(4, 100, 20), whitened(5, 100, 20)
    assert frechet_distance(real=x, fake=y) == pytest.approx(40, rel=1e-12)


def test_fid_of_far_data_keeps_its_digits():
    x, y = samples(6, 100, 5), samples(7, 100, 5)
    near = frechet_distance(real=x, fake=y)
    assert frechet_distance(real=x + 1e6, fake=y + 1e6) == pytest.approx(near, rel=1e-6)


def test_fid_is_symmetric_and_does_not_see_the_order():
    x, y = samples(8, 70, 6), samples(9, 50, 6)
    found = frechet_distance(real=x, fake=y)
    assert frechet_distance(real=y, fake=x) == pytest.approx(found, rel=1e-12)
    order = np.random.default_rng(0).permutation(70)
    assert frechet_distance(real=x[order], fake=y[::-1]) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 64, 99])
def test_fid_does_not_depend_on_the_parts(monkeypatch, rows):
    x, y = samples(10, 100, 9), samples(11, 100, 9)
    whole = frechet_distance(real=x, fake=y)
    monkeypatch.setattr(module, "_ROWS", rows)
    assert frechet_distance(real=x, fake=y) == pytest.approx(whole, rel=1e-12)


def test_kid_of_whole_sets_is_that_of_torchmetrics():
    x, y = samples(12, 80, 7), samples(13, 80, 7)
    wanted = float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    mean, deviation = kernel_distance(real=x, fake=y)
    assert mean == pytest.approx(wanted, rel=1e-10)
    assert deviation == 0


def test_kid_by_its_formula():
    x, y = samples(14, 6, 3), samples(15, 6, 3)

    def kernel(a, b):
        return (float(np.dot(a, b)) / 3 + 1) ** 3

    within = sum(
        kernel(z[i], z[j]) for z in (x, y) for i in range(6) for j in range(6) if i != j
    ) / (6 * 5)
    across = sum(kernel(a, b) for a in x for b in y) / 36
    mean, _ = kernel_distance(real=x, fake=y)
    assert mean == pytest.approx(within - 2 * across, rel=1e-10)


def test_kid_over_subsets_is_unbiased():
    # Its expectation over all subsets is the same MMD² over the whole sets, nearly: of whole sets
    # that make a known MMD², those of a shifted Gaussian.
    x, y = samples(16, 400, 5), samples(17, 300, 5)
    whole = 0.0
    xx, yy, xy = ((a @ b.T / 5 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    for k, n in ((xx, 400), (yy, 300)):
        whole += (k.sum() - np.trace(k)) / (n * (n - 1))
    whole -= 2 * xy.mean()
    mean, deviation = kernel_distance(real=x, fake=y, subsets=1500, subset_size=40)
    assert abs(mean - whole) < 4 * deviation / 1500**0.5
    assert deviation > 0


def test_kid_of_one_distribution_is_about_0_and_of_two_is_not():
    random = np.random.default_rng(18)
    x, y = random.normal(size=(2, 600, 8))
    same, deviation = kernel_distance(real=x, fake=y, subset_size=100)
    other, _ = kernel_distance(real=x, fake=y + 1, subset_size=100)
    assert abs(same) < 3 * deviation
    assert other > 10 * deviation


def test_kid_takes_as_many_as_the_smaller_set_has(monkeypatch):
    x, y = samples(19, 30, 4), samples(20, 12, 4)
    sizes = []
    mmd2 = module._mmd2

    def recording(a, b):
        sizes.append((len(a), len(b)))
        assert len(a.unique(dim=0)) == len(a)
        assert len(b.unique(dim=0)) == len(b)
        return mmd2(a, b)

    monkeypatch.setattr(module, "_mmd2", recording)
    kernel_distance(real=x, fake=y, subsets=3)
    kernel_distance(real=y, fake=x, subsets=2)
    kernel_distance(real=x, fake=y, subsets=2, subset_size=10)
    assert sizes == [(12, 12)] * 5 + [(10, 10)] * 2


def test_kid_takes_other_rows_of_either_set(monkeypatch):
    # Or samples made from the real images, row by row, would meet those they were made from.
    x, pairs = samples(25, 40, 2), []
    monkeypatch.setattr(module, "_mmd2", lambda a, b: pairs.append((a, b)) or torch.zeros(()))
    kernel_distance(real=x, fake=x, subsets=3, subset_size=10)
    assert len(pairs) == 3
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])


def test_kid_mean_and_deviation_are_those_of_the_subsets(monkeypatch):
    values = iter([1.0, 2.0, 6.0])
    monkeypatch.setattr(module, "_mmd2", lambda a, b: torch.tensor(next(values)).double())
    found = kernel_distance(real=samples(21, 9, 2), fake=samples(22, 8, 2), subsets=3)
    assert found == pytest.approx((3, np.std([1, 2, 6])))


def test_kid_follows_from_its_seed_alone():
    x, y = samples(23, 60, 4), samples(24, 60, 4)
    options = {"real": x, "fake": y, "subsets": 5, "subset_size": 20}
    before = torch.get_rng_state()
    first = kernel_distance(**options, seed=1)
    torch.manual_seed(5)
    assert kernel_distance(**options, seed=1) == first
    assert kernel_distance(**options, seed=2) != first
    torch.set_rng_state(before)
    kernel_distance(**options)
    assert torch.equal(torch.get_rng_state(), before)
