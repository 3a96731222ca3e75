import copy

import pytest
import torch

from glann import IMLE, GlannError
from glann.losses import Scattering
from glann.metric import FLATTEST, Metric, image_metric
from glann.networks import Generator, evaluation_mode
from glann.randomness import generator as random_generator


def codes_of(n, dim, purpose="codes"):
    return torch.randn(n, dim, generator=random_generator(0, purpose))


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    made = Generator(4, (1, 16, 12), width=4, hidden=16, on_sphere=False)
    made(codes_of(64, 4))  # BatchNorm has seen something
    return made.eval()


def test_distances_between_coordinates_are_those_of_the_matrix():
    half = codes_of(5, 5)
    matrix = half @ half.T + 0.1 * torch.eye(5)
    metric = Metric.of(matrix, on_sphere=False)
    a, b = codes_of(20, 5, "a"), codes_of(20, 5, "b")
    apart = a - b
    wanted = (apart @ matrix * apart).sum(1)
    found = (metric.coordinates(a) - metric.coordinates(b)).square().sum(1)
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metric.codes(metric.coordinates(a)), a, rtol=0, atol=1e-4)


def test_a_scale_does_not_count():
    half = codes_of(5, 5)
    one, other = (Metric.of(c * half @ half.T, on_sphere=False).stretch for c in (1, 1e6))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 3), *(torch.diag(torch.tensor([c, 0, 0])) for c in (1.0, 1e6))]
)
def test_directions_that_make_no_difference_come_back(matrix):
    metric = Metric.of(matrix, on_sphere=False)
    codes = codes_of(10, 3)
    torch.testing.assert_close(metric.codes(metric.coordinates(codes)), codes, rtol=0, atol=1e-4)
    values = torch.linalg.eigvalsh(metric.stretch)
    assert (values[-1] / values[0]) ** 2 <= 1 / FLATTEST * 1.01


def test_codes_of_the_sphere_come_back_to_it():
    metric = Metric.of(torch.diag(torch.tensor([9.0, 1, 1])), on_sphere=True)
    torch.testing.assert_close(metric.codes(codes_of(8, 3)).norm(dim=1), torch.ones(8))


def test_the_metric_is_what_images_differ_by(generator):
    """The oracle: how far images really move, for small steps in any direction."""
    codes = codes_of(300, 4)
    matrix = image_metric(generator, codes)
    features = Scattering((16, 12)).features
    small = 1e-2 * codes_of(300, 4, "steps")
    with evaluation_mode(generator):
        moved = features(generator(codes + small)) - features(generator(codes - small))
    wanted = moved.square().sum(1).mean() / 4
    found = (small @ matrix * small).sum(1).mean()
    assert float(found / wanted) == pytest.approx(1, abs=0.1)
    assert torch.linalg.eigvalsh(matrix)[0] >= 0


def test_steps_are_as_long_as_codes_are_spread(generator):
    """The same images, of codes that came in another unit."""
    finer = copy.deepcopy(generator)
    with torch.no_grad():
        finer.layers[0].weight *= 100
    codes = codes_of(30, 4)
    torch.testing.assert_close(
        image_metric(finer, codes / 100) / 100**2, image_metric(generator, codes), rtol=1e-3, atol=0
    )


def test_images_made_in_parts_give_the_same(generator, monkeypatch):
    codes = codes_of(30, 4)
    whole = image_metric(generator, codes)
    monkeypatch.setattr("glann.metric.PIXELS_AT_ONCE", 3 * 16 * 12)  # three of eight at a time
    torch.testing.assert_close(image_metric(generator, codes), whole)


def test_a_direction_without_effect_has_no_weight(generator):
    torch.manual_seed(0)
    blind = Generator(4, (1, 16, 12), width=4, hidden=16, on_sphere=False)
    blind(codes_of(64, 4))
    with torch.no_grad():
        blind.layers[0].weight[:, 2] = 0
    matrix = image_metric(blind, codes_of(50, 4))
    assert torch.equal(matrix[2], torch.zeros(4))
    assert (matrix.diagonal()[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_the_generator_comes_back_as_it_was(generator, training):
    wanted = image_metric(generator, codes_of(20, 4))
    generator = copy.deepcopy(generator).train(training)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    assert torch.equal(image_metric(generator, codes_of(20, 4)), wanted)
    assert generator.training == training
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_codes_of_another_generator_are_refused(generator):
    with pytest.raises(GlannError, match="codes have 5 numbers; the generator's have 4"):
        IMLE(epochs=1, batch_size=10).fit(codes_of(20, 5), generator=generator)
