"""Modes found, high quality, reverse KL and birthdays against closed forms."""

import math

import pytest
import torch

from glann.errors import GlannError
from glann.evaluation.modes import birthday, closest_pairs, count_modes, reverse_kl
from glann.randomness import noise
from glann.studies.mixtures import MIXTURES, GaussianMixture, grid, ring

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])


def test_a_mode_is_found_by_one_sample_within_three_sigma():
    fake = torch.tensor([[0.0, 2.99], [10.0, 3.01], [0.5, 9.0], [0.0, 10.0]])
    found = count_modes(fake=fake, centres=CENTRES, sigma=1.0)
    assert (found.found, found.high_quality) == (2, 0.75)
    assert found.counts == [1, 1, 2, 0]


def test_reverse_kl_is_its_closed_form():
    assert reverse_kl(torch.tensor([5, 5, 5, 5])) == pytest.approx(0)
    assert reverse_kl(torch.tensor([7, 0, 0, 0])) == pytest.approx(math.log(4))
    wanted = 0.5 * math.log(2) + 0.25 * math.log(1) * 2
    assert reverse_kl(torch.tensor([2, 1, 1, 0])) == pytest.approx(wanted)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_data_itself_has_all_modes_and_the_share_of_a_gaussian(name):
    data = MIXTURES[name]
    found = count_modes(fake=data.sample(20_000, 3), centres=data.centres, sigma=data.sigma)
    assert found.found == len(data.centres)
    # In the plane a Gaussian has 1 − exp(−9/2) within three standard deviations.
    assert found.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert found.kl < 0.002


def test_a_collapsed_sampler_has_one_mode_of_high_quality():
    data = ring()
    found = count_modes(fake=data.centres[:1].repeat(50, 1), centres=data.centres, sigma=0.01)
    assert (found.found, found.high_quality) == (1, 1)
    assert found.kl == pytest.approx(math.log(8))


def test_the_published_places():
    assert ring().centres.norm(dim=1).allclose(torch.ones(8))
    assert sorted(set(grid().centres.flatten().tolist())) == [-4, -2, 0, 2, 4]
    assert (len(grid().centres), ring().sigma, grid().sigma) == (25, 0.01, 0.05)


def test_log_density_integrates_to_one():
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3)
    axis = torch.linspace(-4, 4, 201)
    points = torch.cartesian_prod(axis, axis)
    assert float(data.log_density(points).exp().sum() * 0.04**2) == pytest.approx(1, abs=1e-4)


def test_points_of_a_seed_repeat():
    assert ring().sample(50, 3).equal(ring().sample(50, 3))
    assert not ring().sample(50, 3).equal(ring().sample(50, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0}, "sigma"),
        ({"fake": torch.zeros(0, 2)}, "fake"),
        ({"fake": torch.zeros(3, 3)}, r"wanted \(n, 2\)"),
        ({"fake": torch.full((3, 2), math.nan)}, "NaN"),
    ],
)
def test_unfit_arguments_are_named(change, message):
    arguments = {"fake": torch.zeros(3, 2), "centres": CENTRES, "sigma": 1.0}
    with pytest.raises(GlannError, match=message):
        count_modes(**(arguments | change))
    with pytest.raises(GlannError, match="no sample"):
        reverse_kl(torch.zeros(4, dtype=torch.int64))


# --- birthdays ----------------------------------------------------------------------------------


def test_a_support_of_n_points_has_a_duplicate_among_its_root():
    support = noise(0, "support", 0, 400, 16)
    which = torch.randint(400, (20_000,), generator=torch.Generator().manual_seed(0))
    size = birthday(fake=support[which], threshold=1e-3)
    # P(no two of s alike) = 1/2 at s ≈ 1.18 √400 ≈ 24.
    assert 16 <= size <= 34


def test_without_duplicates_there_is_no_size():
    assert birthday(fake=noise(0, "all different", 0, 500, 16), threshold=1e-3) is None


@pytest.mark.parametrize(("threshold", "size"), [(0.4, None), (0.5, 2)])
def test_duplicates_are_as_near_as_the_threshold(threshold, size):
    fake = torch.tensor([[10.0 * (i // 2) + 0.5 * (i % 2)] for i in range(40)])
    assert birthday(fake=fake, threshold=threshold) == size


def test_closest_pairs_are_those_of_all_distances():
    fake = noise(0, "pairs", 0, 60, 3)
    distances = torch.cdist(fake, fake) + torch.eye(60) * 99
    pairs, found = closest_pairs(fake=fake, shown=1)
    assert found[0] == pytest.approx(float(distances.min()), rel=1e-4)
    assert float(distances[pairs[0, 0], pairs[0, 1]]) == pytest.approx(float(found[0]), rel=1e-4)
    pairs, found = closest_pairs(fake=fake, shown=8)
    assert len({frozenset(pair) for pair in pairs.tolist()}) == 8
    assert found.tolist() == sorted(found.tolist())


def test_closest_pairs_of_many_samples_are_found_wherever_they_are():
    """Distances are found for 512 samples at a time."""
    fake = noise(0, "many", 0, 1300, 16)
    planted = [[3, 1100], [600, 601], [20, 700], [1030, 1299]]
    for distance, (one, other) in zip((0.1, 0.2, 0.3, 0.4), planted, strict=True):
        fake[other] = fake[one]
        fake[other, 0] += distance
    pairs, found = closest_pairs(fake=fake, shown=4)
    assert pairs.tolist() == planted
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
