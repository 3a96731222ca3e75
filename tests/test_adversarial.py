import math

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from glann.baselines.adversarial import LOSSES, PENALTIES

REAL = torch.tensor([[2.0], [-1.0], [0.5]])
FAKE = torch.tensor([[-3.0], [1.5], [0.0]])


def cross_entropy(scores, label):
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, label))


WRITTEN_OUT = {
    "minimax": (
        lambda r, f: cross_entropy(r, 1) + cross_entropy(f, 0),
        lambda r, f: torch.log(1 - torch.sigmoid(f)).mean(),
    ),
    "non-saturating": (
        lambda r, f: cross_entropy(r, 1) + cross_entropy(f, 0),
        lambda r, f: cross_entropy(f, 1),
    ),
    "least-squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda r, f: ((f - 1) ** 2).mean() / 2,
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "hinge": (
        lambda r, f: (
            -torch.minimum(torch.zeros(()), r - 1).mean()
            - torch.minimum(torch.zeros(()), -f - 1).mean()
        ),
        lambda r, f: -f.mean(),
    ),
    "relativistic": (lambda r, f: cross_entropy(r - f, 1), lambda r, f: cross_entropy(f - r, 1)),
    "boundary-equilibrium": (lambda r, f: r.mean() - f.mean(), lambda r, f: f.mean()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_papers(name):
    for mine, theirs in zip(LOSSES[name], WRITTEN_OUT[name], strict=True):
        torch.testing.assert_close(mine(REAL, FAKE), theirs(REAL, FAKE))


@pytest.mark.parametrize("name", LOSSES)
def test_the_players_pull_in_opposite_ways(name):
    sign = -1 if name == "boundary-equilibrium" else 1  # a low error is a high score
    fake = FAKE.clone().requires_grad_()
    (down,) = torch.autograd.grad(LOSSES[name].generator(REAL, fake), fake)
    below = FAKE < 1  # the least squares' target
    assert (sign * down <= 0)[below].all()  # the generator wants higher scores
    if name != "least-squares":  # whose targets some scores have passed
        (up,) = torch.autograd.grad(LOSSES[name].discriminator(REAL, fake), fake)
        assert (sign * up >= 0).all()


def test_the_minimax_gradient_vanishes_and_the_non_saturating_does_not():
    sure = torch.full((4, 1), -30.0, requires_grad=True)
    for name, low, high in (("minimax", 0, 1e-6), ("non-saturating", 0.9, 1.1)):
        (gradient,) = torch.autograd.grad(LOSSES[name].generator(sure, sure), sure)
        assert low <= gradient.abs().sum() <= high


class Linear(nn.Module):
    """D(x) = slope · Σ x, whose gradient has norm slope · √pixels everywhere."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(float(slope)))

    def forward(self, images):
        return self.slope * images.flatten(1).sum(1, keepdim=True)


class Square(nn.Module):
    """D(x) = ‖x‖²/2, whose gradient is x."""

    def forward(self, images):
        return images.flatten(1).square().sum(1, keepdim=True) / 2


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
OTHERS = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def penalty_of(name, discriminator, fake=OTHERS):
    drawn = PENALTIES[name].draw(IMAGES.shape, torch.Generator().manual_seed(3))
    return PENALTIES[name].of(discriminator, IMAGES, fake, drawn)


@pytest.mark.parametrize("penalty", ["interpolated", "around-real"])
@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0])
def test_slopes_are_wanted_to_be_one(penalty, slope):
    found = penalty_of(penalty, Linear(slope))
    assert found.item() == pytest.approx((4 * slope - 1) ** 2, abs=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_can_be_descended(name):
    linear = Linear(0.6)
    penalty = penalty_of(name, linear)
    penalty.backward()
    assert linear.slope.grad > 0
    assert math.isfinite(linear.slope.grad)


def test_a_slope_of_zero_has_a_finite_gradient():
    linear = Linear(0.0)
    penalty_of("interpolated", linear).backward()
    assert math.isfinite(linear.slope.grad)


def test_the_interpolated_penalty_looks_between_real_and_fake():
    points = []

    class Watch(Square):
        def forward(self, images):
            points.append(images.detach())
            return super().forward(images)

    penalty_of("interpolated", Watch())
    share = ((points[0] - IMAGES) / (OTHERS - IMAGES)).flatten(1)
    assert ((share > 0) & (share < 1)).all()
    assert (share.std(1) < 1e-4).all()  # one share an image
    assert share.mean(1).std() > 0.05  # another for each


def test_dragans_looks_near_real_images_only():
    points = []

    class Watch(Square):
        def forward(self, images):
            points.append(images.detach())
            return super().forward(images)

    penalty_of("around-real", Watch(), torch.full_like(OTHERS, 1e6))
    moved = points[0] - IMAGES
    assert 0 < moved.max() <= 0.5 * IMAGES.std()
    assert moved.min() >= 0


def test_the_zero_centred_penalty_is_half_of_both_squared_gradients():
    found = penalty_of("zero-centred", Square())
    wanted = (
        IMAGES.flatten(1).square().sum(1).mean() + OTHERS.flatten(1).square().sum(1).mean()
    ) / 2
    torch.testing.assert_close(found, wanted)
