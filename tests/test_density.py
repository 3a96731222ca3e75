import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from glann.density import Gaussian, Mixture
from glann.errors import GlannError
from glann.randomness import BLOCK


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(n: int = 400, dim: int = 5) -> torch.Tensor:
    """Codes of some mean and covariance."""
    return drawn(n, dim) @ drawn(dim, dim, seed=1) + torch.arange(dim)


WEIGHTS = np.array([0.2, 0.3, 0.5])
MEANS = np.array([[-6.0, 0.0], [6.0, 1.0], [0.0, 8.0]])
FACTORS = np.array([[[1.0, 0.0], [0.5, 0.3]], [[0.5, 0.0], [0.0, 0.5]], [[0.2, 0.0], [-0.7, 1.0]]])
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1)


def three_clouds(n: int = 3000) -> np.ndarray:
    """From a mixture whose components don't overlap; exactly the shares of WEIGHTS."""
    random = np.random.default_rng(0)
    parts = [
        mean + random.standard_normal((round(weight * n), 2)) @ factor.T
        for weight, mean, factor in zip(WEIGHTS, MEANS, FACTORS, strict=True)
    ]
    return random.permutation(np.concatenate(parts))


def assert_mean_and_covariance(samples: np.ndarray, mean: np.ndarray, covariance: np.ndarray):
    """To five standard errors of a Gaussian's sample mean and covariance."""
    n = len(samples)
    variances = covariance.diagonal()
    assert (np.abs(samples.mean(0) - mean) <= 5 * np.sqrt(variances / n) + 1e-6).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(np.cov(samples, rowvar=False) - covariance) <= 5 * error + 1e-6).all()


FITTED = {
    "gaussian": Gaussian().fit(skewed()),
    "gaussian on the sphere": Gaussian().fit(torch.nn.functional.normalize(drawn(60, 4))),
    "mixture": Mixture(components=3).fit(three_clouds(600)),
    "mixture on the sphere": Mixture(components=2).fit(
        torch.nn.functional.normalize(drawn(60, 4) + 1)
    ),
}

each = pytest.mark.parametrize("sampler", FITTED.values(), ids=FITTED.keys())


# ---------------------------------------------------------------------- one Gaussian


def test_a_gaussian_has_the_codes_mean_and_covariance():
    codes = skewed()
    gaussian = Gaussian().fit(codes)
    mean = codes.double().numpy().mean(0)
    covariance = np.cov(codes.double().numpy(), rowvar=False)
    np.testing.assert_allclose(gaussian.means_.numpy(), mean[None], rtol=1e-10)
    (factor,) = gaussian.factors_.numpy()
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-10)
    assert_mean_and_covariance(gaussian.sample(20_000).numpy(), mean, covariance)


def test_a_gaussians_samples_are_gaussian():
    """The fourth moment along any direction, and the share within one standard deviation."""
    gaussian = Gaussian().fit(skewed())
    factor = gaussian.factors_[0]
    whitened = torch.linalg.solve(factor, (gaussian.sample(20_000) - gaussian.means_).double().T)
    assert whitened.pow(4).mean(1).numpy() == pytest.approx(3, abs=5 * math.sqrt(96 / 20_000))
    within = (whitened.abs() < 1).double().mean(1)
    assert within.numpy() == pytest.approx(0.6827, abs=5 * math.sqrt(0.25 / 20_000))


@pytest.mark.parametrize("n", [2, 3, 50])
def test_codes_in_a_subspace_give_samples_in_it(n):
    basis = torch.linalg.qr(drawn(6, 2, seed=3)).Q
    codes = 10 * drawn(n, 2) @ basis.T + 1
    samples = Gaussian().fit(codes).sample(500)
    assert samples.isfinite().all()
    moved = samples - codes.mean(0)
    across = moved - moved @ basis @ basis.T
    assert across.norm(dim=1).max() < 1e-4
    assert moved.norm(dim=1).median() > 1


def test_codes_of_one_number():
    samples = Gaussian().fit(np.array([[1.0], [3.0]])).sample(20_000)
    assert_mean_and_covariance(samples.numpy(), np.array([2.0]), np.array([[2.0]]))


@pytest.mark.parametrize("sampler", [Gaussian(), Mixture(components=3)])
def test_equal_codes_give_that_code(sampler):
    codes = torch.full((20, 3), 2.5)
    torch.testing.assert_close(sampler.fit(codes).sample(10), codes[:10])


@pytest.mark.parametrize("rows", [1, 3, 399, 400])
def test_a_gaussian_of_codes_taken_a_part_at_a_time_is_the_same(rows, monkeypatch):
    whole = Gaussian().fit(skewed())
    monkeypatch.setattr("glann.codes.CHUNK", rows * 4 * 5)
    parts = Gaussian().fit(skewed())
    torch.testing.assert_close(parts.means_, whole.means_)
    covariances = [fitted.factors_[0] @ fitted.factors_[0].T for fitted in (parts, whole)]
    torch.testing.assert_close(*covariances)


def test_only_codes_on_the_sphere_give_samples_on_it():
    codes = torch.nn.functional.normalize(drawn(60, 4))
    for sampler in (Gaussian(), Mixture(components=2)):
        samples = sampler.fit(codes).sample(100)
        torch.testing.assert_close(samples.norm(dim=1), torch.ones(100))
        norms = sampler.fit(codes * 1.01).sample(100).norm(dim=1)
        assert norms.std() > 0.1


# ---------------------------------------------------------------------- the mixture


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(components=3, regularisation=1e-6).fit(three_clouds())


def curved(n: int, seed: int = 0) -> torch.Tensor:
    """Codes around a closed curve in 4 dimensions."""
    angle = 2 * torch.pi * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    curve = torch.cat([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], 1)
    return curve + 0.1 * drawn(n, 4, seed=seed + 10)


def likelihood(mixture: Mixture, codes: torch.Tensor) -> float:
    """The mean log-likelihood of codes, float64."""
    components = torch.distributions.MultivariateNormal(
        mixture.means_, scale_tril=mixture.factors_, validate_args=False
    )
    each = components.log_prob(codes.double()[:, None]) + mixture.weights_.log()
    return float(each.logsumexp(1).mean())


def order_of(mixture: Mixture) -> list[int]:
    """The place of each of MEANS among the mixture's components."""
    distances = np.linalg.norm(MEANS[:, None] - mixture.means_.numpy()[None], axis=2)
    order = distances.argmin(1).tolist()
    assert sorted(order) == [0, 1, 2]
    return order


def test_components_are_found_again(mixture):
    order = order_of(mixture)
    np.testing.assert_allclose(mixture.weights_.numpy()[order], WEIGHTS, atol=1e-6)
    np.testing.assert_allclose(mixture.means_.numpy()[order], MEANS, atol=0.15)
    factors = mixture.factors_.numpy()[order]
    np.testing.assert_allclose(factors @ factors.transpose(0, 2, 1), COVARIANCES, atol=0.15)


def test_samples_come_from_the_components_in_their_shares(mixture):
    n = 20_000
    samples = mixture.sample(n, seed=5).numpy()
    nearest = np.linalg.norm(samples[:, None] - MEANS[None], axis=2).argmin(1)
    shares = np.bincount(nearest, minlength=3) / n
    assert (np.abs(shares - WEIGHTS) < 5 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / n)).all()
    for k, place in enumerate(order_of(mixture)):
        factor = mixture.factors_[place].numpy()
        mean = mixture.means_[place].numpy()
        assert_mean_and_covariance(samples[nearest == k], mean, factor @ factor.T)


def test_the_unit_of_the_codes_does_not_matter():
    codes = three_clouds(600)
    for scale in (2.0**-30, 2.0**30):
        for kind in (Gaussian, lambda: Mixture(components=3)):
            plain, scaled = kind().fit(codes), kind().fit(codes * scale)
            np.testing.assert_allclose(scaled.sample(200) / scale, plain.sample(200), rtol=1e-3)


def test_regularisation_widens_by_a_share_of_the_variance():
    codes = drawn(500, 3) * 100
    plain, wide = (
        Mixture(components=1, regularisation=r).fit(codes).factors_[0] for r in (0.0, 0.5)
    )
    added = wide @ wide.T - plain @ plain.T
    torch.testing.assert_close(
        added, 0.5 * codes.double().var(0, unbiased=False).mean() * torch.eye(3).double()
    )


def test_at_most_so_many_codes_are_used():
    codes = three_clouds(600)
    few = Mixture(components=1, codes=50).fit(codes, seed=4)
    everything = Mixture(components=1).fit(codes, seed=4)
    np.testing.assert_allclose(everything.means_[0].numpy(), codes.mean(0), rtol=1e-5)
    distances = np.abs(few.means_[0].numpy() - codes.mean(0))
    assert 1e-3 < distances.max() < 4
    assert not torch.equal(few.means_, Mixture(components=1, codes=50).fit(codes, seed=5).means_)


@pytest.mark.parametrize(
    ("n", "dim", "wanted"), [(2, 6, 1), (47, 6, 1), (48, 6, 2), (100, 6, 4), (500, 1, 100)]
)
def test_a_few_codes_get_as_many_components_as_they_allow(n, dim, wanted):
    mixture = Mixture(iterations=2).fit(drawn(n, dim))
    assert len(mixture.weights_) == wanted
    assert len(Mixture(iterations=2, codes=48).fit(drawn(100, 6)).weights_) == 2


def test_fewer_components_than_by_default_fit_worse_and_more_overfit():
    """Held-out likelihood."""
    codes = curved(500)
    held_out = curved(500, seed=1)
    default, fewer, more = (
        likelihood(Mixture(components=k).fit(codes), held_out) for k in (None, 1, 125)
    )
    assert default > max(fewer, more)


def test_equal_seeds_give_equal_mixtures():
    codes = drawn(200, 3)
    a, b, other = (Mixture(components=8, iterations=2).fit(codes, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.sample(20), b.sample(20))
    assert not torch.equal(a.sample(20), other.sample(20))
    Mixture(components=2).fit(codes, seed=2**63 - 1)  # the highest that there is


# ---------------------------------------------------------------------- every sampler


@each
@given(start=st.integers(0, 3 * BLOCK), n=st.integers(0, 40), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_a_slice_of_the_samples_is_the_same_alone(sampler, start, n, seed):
    whole = sampler.sample(40 + n, seed, max(0, start - 20))
    part = sampler.sample(n, seed, start)
    assert part.shape == (n, sampler.means_.shape[1])
    assert part.dtype == torch.float32
    offset = min(20, start)
    assert torch.equal(part, whole[offset : offset + n])


def test_many_samples_at_once_are_the_same():
    gaussian = Gaussian().fit(drawn(300, 128))
    whole = gaussian.sample(3 * 256 + 1)
    for start in (0, 255, 256, 700, 768):
        assert torch.equal(gaussian.sample(1, start=start), whole[start : start + 1])


@each
def test_seeds_differ(sampler):
    a, b = sampler.sample(50, seed=1), sampler.sample(50, seed=2)
    assert not (a == b).any()
    assert torch.equal(a, sampler.sample(50, seed=1))
    assert len(a.unique(dim=0)) == 50


@each
def test_a_saved_sampler_samples_the_same(sampler):
    content, tensors = sampler.state()
    content, tensors = json.loads(json.dumps(content)), load(save(tensors))
    again = type(sampler).from_state(content, tensors)
    assert again == sampler  # the settings
    assert torch.equal(again.sample(500, seed=3), sampler.sample(500, seed=3))
    content_again, tensors_again = again.state()
    assert content_again == content
    assert all(torch.equal(tensors_again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("sampler", [Gaussian(), Mixture(components=2)])
def test_the_contract_of_fit(sampler, tmp_path, capsys):
    codes = drawn(30, 3)
    before = codes.clone()
    fitted = sampler.fit(codes, seed=1, device="cpu", folder=tmp_path / "none", progress=True)
    assert fitted is sampler
    assert torch.equal(codes, before)
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sampler", "codes", "message"),
    [
        (Gaussian(), torch.ones(1, 3), "a covariance needs at least 2 codes; 1 was given"),
        (Gaussian(), torch.ones(3), r"codes have shape \(3,\)"),
        (Gaussian(), torch.full((3, 2), math.nan), "not finite, first in row 0"),
        (Mixture(components=9), torch.ones(8, 3), "imle.components = 9 needs at least as many"),
        (Mixture(components=0), torch.ones(9, 3), "imle.components = 0 is out of range"),
        (Mixture(components=2.0), torch.ones(9, 3), "imle.components = 2.0 is of type float"),
        (Mixture(components=1), torch.ones(1, 3), "try fewer imle.components"),
        (Mixture(components=5, codes=4), drawn(9, 3), "imle.components = 5, and imle.codes = 4"),
        (Mixture(components=2), [[1.0, 2.0]], "codes are a list"),
        (
            Mixture(components=3, regularisation=0),
            drawn(20, 2) @ torch.ones(2, 3),
            "try fewer imle.components or more imle.regularisation",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(sampler, codes, message):
    with pytest.raises(GlannError, match=message):
        sampler.fit(codes)
