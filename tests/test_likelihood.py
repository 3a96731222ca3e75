"""Parzen windows against scikit-learn and SciPy, and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import gaussian_kde, kendalltau, multivariate_normal
from sklearn.neighbors import KernelDensity

from glann.errors import GlannError
from glann.evaluation import likelihood
from glann.evaluation.likelihood import choose_sigma, mean_and_error, parzen_log_likelihood
from glann.randomness import noise
from glann.studies.likelihood import STUDY, LikelihoodSettings, concordance, density_row
from glann.studies.study import Place


@pytest.mark.parametrize("sigma", [0.05, 0.2, 1.0, 7.0])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_it_is_the_formula_by_scipy(dim, sigma):
    real, fake = noise(0, "real", 0, 40, dim).double(), noise(0, "fake", 0, 90, dim).double()
    exponents = -cdist(real, fake, "sqeuclidean") / (2 * sigma**2)
    wanted = logsumexp(exponents, axis=1) - math.log(90)
    wanted -= dim * math.log(sigma * math.sqrt(2 * math.pi))
    found = parzen_log_likelihood(real=real, fake=fake, sigma=sigma)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


# Not in many dimensions: where all kernels are nearly 0, scikit-learn loses their logarithms.
@pytest.mark.parametrize("sigma", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_it_is_scikit_learns(dim, sigma):
    real, fake = noise(0, "real", 0, 40, dim), noise(0, "fake", 0, 90, dim)
    wanted = KernelDensity(bandwidth=sigma).fit(fake.numpy()).score_samples(real.numpy())
    found = parzen_log_likelihood(real=real, fake=fake, sigma=sigma)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_it_is_scipys():
    real, fake = noise(0, "real", 0, 40, 1).double(), noise(0, "fake", 0, 90, 1).double()
    kernel = gaussian_kde(fake.numpy().T, bw_method=0.3)
    sigma = float(np.sqrt(kernel.covariance.item()))
    found = parzen_log_likelihood(real=real, fake=fake, sigma=sigma)
    np.testing.assert_allclose(found, kernel.logpdf(real.numpy().T), rtol=1e-9)


def test_one_sample_is_a_gaussian():
    real, fake = noise(0, "real", 0, 20, 3), noise(0, "fake", 0, 1, 3)
    wanted = multivariate_normal(fake[0].numpy(), 0.25).logpdf(real.numpy())
    found = parzen_log_likelihood(real=real, fake=fake, sigma=0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_tiles_change_nothing(monkeypatch):
    real, fake = noise(0, "real", 0, 50, 5), noise(0, "fake", 0, 70, 5)
    whole = parzen_log_likelihood(real=real, fake=fake, sigma=0.5)
    monkeypatch.setattr(likelihood, "_TILE", 100)
    assert parzen_log_likelihood(real=real, fake=fake, sigma=0.5).allclose(whole, rtol=1e-12)


def test_far_from_the_origin_nothing_cancels():
    real, fake = noise(0, "real", 0, 20, 4).double(), noise(0, "fake", 0, 30, 4).double()
    near = parzen_log_likelihood(real=real, fake=fake, sigma=0.1)
    far = parzen_log_likelihood(real=real + 1e4, fake=fake + 1e4, sigma=0.1)
    assert far.allclose(near, rtol=1e-6)


def test_many_samples_of_a_gaussian_have_the_density_of_a_wider_one():
    real, fake = noise(0, "real", 0, 500, 2), noise(0, "fake", 0, 20_000, 2)
    found = parzen_log_likelihood(real=real, fake=fake, sigma=0.3)
    wanted = multivariate_normal(np.zeros(2), 1 + 0.3**2).logpdf(real.numpy())
    assert float(found.mean()) == pytest.approx(wanted.mean(), abs=0.01)


def test_the_best_width_is_chosen():
    real, fake = noise(0, "real", 0, 300, 2), noise(0, "fake", 0, 3000, 2)
    assert choose_sigma(real=real, fake=fake, sigmas=[0.001, 0.2, 5.0]) == 0.2
    with pytest.raises(GlannError, match="no width"):
        choose_sigma(real=real, fake=fake, sigmas=[])


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf])
def test_a_width_out_of_range_is_named(sigma):
    with pytest.raises(GlannError, match="sigma"):
        parzen_log_likelihood(real=torch.zeros(2, 2), fake=torch.zeros(2, 2), sigma=sigma)


# --- the study ----------------------------------------------------------------------------------


def test_the_objective_falls_and_the_likelihood_rises(tmp_path):
    place = Place(tmp_path, tmp_path.parent, key="gaussian-2-0")
    row = density_row(place, density="ring", seed=0, steps=128, held_out=50)
    first, last = row["curve"][0], row["curve"][-1]
    assert [point["step"] for point in row["curve"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert last["objective"] < first["objective"]
    assert last["likelihood"] > first["likelihood"]
    # No model explains fresh data better than their own density, but for chance.
    assert last["likelihood"] < row["truth"] + 0.1


def test_concordance_is_kendalls():
    found = zip([4.0, 3.0, 2.5, 1.0, 0.5], [-9.0, -7.0, -8.0, -2.0, -3.0], strict=True)
    curve = [{"objective": objective, "likelihood": likelihood} for objective, likelihood in found]
    tau = kendalltau([-p["objective"] for p in curve], [p["likelihood"] for p in curve]).statistic
    assert concordance(curve) == pytest.approx((tau + 1) / 2) == 0.8
    assert concordance([{**p, "likelihood": p["objective"]} for p in curve]) == 0


def test_a_section_holds_curves_models_and_published_figures(tmp_path):
    curve = [
        {"step": 1, "objective": 2.0, "likelihood": -5.0, "sigma": 1.0},
        {"step": 9, "objective": 0.5, "likelihood": -3.0, "sigma": 0.1},
    ]
    rows = [
        {"density": "ring", "seed": seed, "curve": curve, "truth": -2.5} for seed in range(2)
    ] + [{"model": "vae", "seed": 0, "likelihood": 210.4, "error": 1.6, "sigma": 0.2}]
    settings = LikelihoodSettings(densities=["ring"], models=["glann", "vae"])
    section = STUDY.section(settings, rows, tmp_path)
    assert "rose in 2 of 2 runs" in section.finding
    known, images = section.tables
    assert known.rows == [["ring", "-3.00 ± 0.00", "-2.50 ± 0.00", "0.50000 ± 0.00000", "100 ± 0%"]]
    assert "higher likelihood in 100%" in section.finding
    assert ["VAE", "210 ± 2", "210", "0.2"] in images.rows
    assert any("published" in row[0] and "257" in row[1] for row in images.rows)
    assert any("Theis" in text for text in section.paragraphs)
    svg = section.charts[0].svg
    assert "$" not in svg  # TeX, which the page can't set
    assert ">1</text>" in svg  # a tick of the objective, between 0.5 and 2


def test_trainings_that_failed_are_counted_even_where_all_did(tmp_path):
    failed = {"failed": "the loss is not finite"}
    rows = [
        {"density": "ring", "seed": 0, **failed},
        {"recipe": "digits", "seed": 0, **failed},  # of the mixture and GLANN, in one run
        {"recipe": "digits", "model": "vae", "seed": 0, **failed},
        {"model": "vae", "seed": 1, "likelihood": 210.4, "error": 1.6, "sigma": 0.2},
    ]
    settings = LikelihoodSettings(densities=["ring"], models=["glann", "vae"], recipe="digits")
    known, images = STUDY.section(settings, rows, tmp_path).tables
    assert (known.rows, known.note.endswith("left out: ring 1 of 1.")) == ([], True)
    assert images.note.endswith("left out: GLANN 1 of 1, VAE 1 of 2.")


def test_without_images_there_are_only_densities():
    settings = LikelihoodSettings(densities=["ring", "grid"], recipe="none", seeds=2)
    assert [run.key for run in STUDY.runs(settings)] == ["ring-0", "ring-1", "grid-0", "grid-1"]
