"""How far samples are from images: the energy distance of points, and what is seen of images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import energy_distance as of_scipy

from glann import distance as module
from glann.contrastive import learn_features
from glann.distance import Distance, energy_distance, half_whitening
from glann.errors import GlannError
from glann.images import to_float
from glann.moments import NEAR

CPU = torch.device("cpu")


def points(seed, n, d, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(2, 30))
def test_in_one_dimension_it_is_that_of_scipy(seed, n, m):
    x, y = points(seed, n, 1), points(seed + 1, m, 1, 0.3)
    # scipy's is a root, and counts each number's distance from itself.
    within = [torch.cdist(z, z).mean() / (len(z) - 1) for z in (x, y)]
    wanted = of_scipy(x[:, 0].numpy(), y[:, 0].numpy()) ** 2 - float(sum(within))
    assert float(energy_distance(x, y)) == pytest.approx(wanted, abs=1e-5)


def test_it_is_without_bias_where_few_points_are_compared():
    found = [float(energy_distance(points(s, 4, 5), points(s + 5000, 6, 5))) for s in range(2000)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 2000**0.5
    assert np.std(found) > 0.05  # a biased estimate would be seen


def test_known_distances_need_not_be_found_again():
    x, y = points(0, 50, 3), points(1, 60, 3, 1.0)
    within = float(torch.cdist(y, y).sum() / (60 * 59))
    torch.testing.assert_close(energy_distance(x, y, within), energy_distance(x, y))


def test_its_gradient_moves_a_distribution_to_where_another_is_and_spreads_it_alike():
    wanted = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.2])
    mean, scale = torch.zeros(2, requires_grad=True), torch.full((2,), 0.5, requires_grad=True)
    adam = torch.optim.Adam([mean, scale], 0.1)
    for step in range(400):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        adam.zero_grad()
        x = mean + scale * points(2 * step, 100, 2)
        energy_distance(x, wanted[0] + wanted[1] * points(2 * step + 1, 100, 2)).backward()
        adam.step()
    torch.testing.assert_close(mean.detach(), wanted[0], atol=0.1, rtol=0)
    torch.testing.assert_close(scale.detach().abs(), wanted[1], atol=0.1, rtol=0)


def test_half_whitened_rows_vary_by_the_roots_of_what_they_varied_by_before():
    directions = torch.linalg.qr(points(0, 5, 5))[0]
    rows = points(1, 20_000, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25]) @ directions
    rows /= rows.std(0)  # its numbers have one spread already
    turned = rows @ half_whitening(rows)
    variances = torch.linalg.eigvalsh(rows.T.cov())
    wanted = variances.sqrt() / variances.sqrt().sum()
    torch.testing.assert_close(torch.linalg.eigvalsh(turned.T.cov()), wanted)


@given(st.integers(0, 1000))
def test_units_of_numbers_do_not_count(seed):
    rows = points(seed, 60, 4) @ points(seed + 1, 4, 4)
    units = 10 * torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = rows @ half_whitening(rows)
    torch.testing.assert_close(
        rows * units @ half_whitening(rows * units), found, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rows", [torch.ones(7, 3), points(0, 3, 9), points(0, 2, 5)])
def test_few_rows_or_such_as_are_all_the_same_are_turned_too(rows):
    assert half_whitening(rows).isfinite().all()


@pytest.fixture(scope="module")
def features(digits):
    return learn_features(digits, epochs=2, seed=0, device=CPU)[0]


def test_images_are_at_no_distance_from_themselves_and_others_are_far(digits, features):
    distance = Distance(features, digits, CPU, torch.float32)
    rows, ways = torch.arange(len(digits)), torch.full((len(digits), 2), 0.5)
    images = to_float(digits)

    def of(made):
        return float(distance(made, ways, rows, 1.0))

    own = of(images)  # each is its own reference, once
    dark, one = (of(made) for made in (0.8 * images, images[:1].expand_as(images)))
    blurred = of(F.avg_pool2d(images, 3, 1, 1))
    assert abs(own) < 0.1 < min(dark, blurred, one)


def test_references_are_moved_as_samples_are(digits):
    images = F.interpolate(digits, 27)
    features = learn_features(images, epochs=2, seed=0, device=CPU)[0]
    distance, rows = Distance(features, images, CPU, torch.float32), torch.arange(len(images))
    random = torch.Generator().manual_seed(0)
    still, ways = torch.full((len(images), 2), 0.5), torch.rand(len(images), 2, generator=random)
    as_they, not_at_all = (distance(to_float(images), each, rows, 1.0) for each in (ways, still))
    assert abs(float(as_they)) < 0.1 < float(not_at_all)


def test_all_of_many_references_are_drawn(digits, features):
    distance = Distance(features, digits, CPU, torch.float32)
    drawn = torch.cat([distance.rows(0, step) for step in range(5)])
    assert len(drawn.unique()) == len(digits)
    assert not torch.equal(distance.rows(0, 0), distance.rows(0, 1))
    assert torch.equal(distance.rows(0, 1), distance.rows(0, 1))
    assert not torch.equal(distance.rows(1, 1), distance.rows(0, 1))


def test_images_looked_at_in_parts_give_the_same(digits, features, monkeypatch):
    whole = Distance(features, digits, CPU, torch.float32)
    monkeypatch.setattr("glann.distance.images_at_once", lambda *_: 7)
    parts = Distance(features, digits, CPU, torch.float32)
    for table, other in zip(whole.tables, parts.tables, strict=True):
        torch.testing.assert_close(table, other, atol=2e-3, rtol=0)


def test_more_images_than_references(digits, features, monkeypatch):
    monkeypatch.setattr("glann.distance.REFERENCES", 40)
    distance = Distance(features, digits, CPU, torch.float32)
    assert {len(table) for table in distance.tables} == {40}
    assert int(distance.rows(0, 0).max()) < 40


def test_what_moments_say_is_added_once_they_are_known(digits, features, monkeypatch):
    """Samples whose features vary less than images': by moments it is seen, a few at a time."""
    monkeypatch.setattr(module, "KNOWN", 0.5)
    distance = Distance(features, digits, CPU, torch.float32)
    rows, still = torch.arange(len(digits)), torch.full((50, 2), 0.5)
    images = to_float(digits)
    alike = 0.6 * images + 0.4 * images.mean(0)
    before = float(distance(alike[:50], still, rows, 1.0))
    for step in range(30):
        part = alike.roll(-step * 50, 0)[:50]
        distance(part, still, rows, distance.share(step, 50))
        distance.renew(step, 2)
    assert float(distance(alike[:50], still, rows, 0.0)) == pytest.approx(before)  # too few yet
    distance.renew(8 * module.RENEWED, 10_000)
    apart = float(distance(alike[:50], still, rows, 0.0)) - before
    known = [moments.renew() for moments in distance.moments]
    assert apart == pytest.approx(sum(min(1, NEAR / each**0.5) * each for each in known), rel=0.3)
    assert apart > 0.02


@pytest.mark.parametrize(
    ("step", "samples", "share"), [(0, 192, 1), (9, 192, 0.1), (999, 192, 192 / 8192), (5, 9999, 1)]
)
def test_each_step_counts_alike_until_older_ones_leave_the_window(step, samples, share):
    assert Distance.share(None, step, samples) == pytest.approx(share)


@pytest.mark.parametrize(("known", "wanted"), [(0.5, [192, 192, 256, 256]), (1, [])])
def test_moments_of_few_samples_and_of_few_images_are_not_looked_at(
    digits, features, monkeypatch, known, wanted
):
    monkeypatch.setattr(module, "KNOWN", known)
    distance = Distance(features, digits, CPU, torch.float32)
    renewed = []
    monkeypatch.setattr(module.Moments, "renew", lambda self: renewed.append(len(self.mean)))
    for step in range(17):  # every eighth: after 11, 99 and 187 samples, beside 150 images
        distance.renew(step, 11)
    assert renewed == wanted


def test_what_is_where_counts(digits):
    class Blind(torch.nn.Module):  # to all but the pixels of the last map
        def maps(self, images):
            return [images, torch.zeros(len(images), 4)]

    distance = Distance(Blind(), digits, CPU, torch.float32)
    rows, ways = torch.arange(len(digits)), torch.full((len(digits), 2), 0.5)
    as_they, turned = (
        float(distance(to_float(made), ways, rows, 1.0)) for made in (digits, digits.mT)
    )
    assert abs(as_they) < 0.05 < turned


def test_how_much_channels_vary_counts_where_their_means_are_alike(digits):
    class Blind(torch.nn.Module):  # to all but what is around the mean
        def maps(self, images):
            around = images - images.mean((2, 3), keepdim=True)
            return [around, torch.zeros(len(images), 1, 2, 2), torch.zeros(len(images), 4)]

    distance = Distance(Blind(), digits, CPU, torch.float32)
    rows, ways = torch.arange(len(digits)), torch.full((len(digits), 2), 0.5)
    images = to_float(digits)
    as_they, duller = (float(distance(made, ways, rows, 1.0)) for made in (images, 0.6 * images))
    assert abs(as_they) < 0.05 < 0.2 < duller


def test_moments_of_other_summaries_are_not_gone_on_with(digits, features):
    distance = Distance(features, digits, CPU, torch.float32)
    state = distance.state()
    distance.load_state(state)
    fewer = {key: table for key, table in state.items() if not key.startswith("2.")}
    with pytest.raises(GlannError, match="--restart"):
        distance.load_state(fewer)
