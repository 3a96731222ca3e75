"""Running moments, and the map that gives them others'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glann.evaluation.frechet import frechet_distance
from glann.moments import NEAR, STRETCH, Moments


def points(seed, n, d):
    """Of a normal distribution with a mean and a covariance of its own, float32 `(n, d)`."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=random))[0]
    spreads, mean = 0.5 + torch.rand(d, generator=random), torch.randn(d, generator=random)
    return torch.randn(n, d, generator=random) * spreads @ turn + mean


def after(moments, rows):
    """Where the map takes rows."""
    return moments.wanted_mean + (rows - moments.at) @ moments.turn


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_what_was_seen_is_moved_to_the_wanted_moments_by_the_shortest_way(seed, d):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glann.moments.STRETCH", 1e9)
        patch.setattr("glann.moments.FLATTEST", 1e-12)
        _moved_by_the_shortest_way(seed, d)


def _moved_by_the_shortest_way(seed, d):
    seen, wanted = points(seed, 500, d), points(seed + 1, 400, d)
    moments = Moments(wanted)
    assert float(moments.distance(seen, 1.0)) == 0  # no map yet
    apart = moments.renew()
    moved = after(moments, seen)
    scale = float(wanted.T.cov().abs().max())
    torch.testing.assert_close(moved.mean(0), wanted.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        moved.T.cov(correction=0), wanted.T.cov(), atol=0.01 * scale, rtol=0.01
    )
    # Its mean square is the Fréchet distance, which that of no other such map is below.
    exact = seen.mean(0) + (seen - seen.mean(0)) * (499 / 500) ** 0.5
    known = frechet_distance(real=wanted, fake=exact)
    assert apart == pytest.approx(known, rel=0.01, abs=0.01)
    weight = min(1, NEAR / known**0.5)
    assert float(moments.distance(seen, 0.01)) == pytest.approx(weight * known, rel=0.02, abs=0.01)


def test_the_gradient_is_that_of_the_frechet_distance(monkeypatch):
    monkeypatch.setattr("glann.moments.STRETCH", 1e9)
    seen, wanted = points(0, 60, 3).requires_grad_(), points(1, 50, 3)
    moments = Moments(wanted)
    moments.distance(seen, 1.0)
    moments.renew()
    assert 0 < float(moments.weight) < 1
    (found,) = torch.autograd.grad(moments.distance(seen, 0.0) / moments.weight, seen)

    mean, covariance = seen.double().mean(0), seen.double().T.cov(correction=0)
    product = torch.linalg.eigvals(covariance @ wanted.double().T.cov()).real
    exact = (mean - wanted.double().mean(0)).square().sum() + covariance.trace()
    (known,) = torch.autograd.grad(exact - 2 * product.sqrt().sum(), seen)
    torch.testing.assert_close(found, known, atol=1e-4, rtol=1e-3)


def test_moments_follow_what_is_seen_and_forget_what_was():
    wanted, before, now = points(0, 500, 3), points(1, 500, 3), points(2, 500, 3)
    moments = Moments(wanted)
    for rows in (before, *[now] * 60):
        moments.distance(rows, 0.1 if rows is now else 1.0)
    torch.testing.assert_close(moments.mean, now.mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(moments.square, now.T @ now / 500, atol=0.05, rtol=0.02)


def test_small_steps_of_few_samples_bring_a_distribution_to_the_wanted_one():
    directions = torch.linalg.qr(points(0, 20, 20))[0]
    wanted = torch.randn(5000, 20, generator=torch.Generator().manual_seed(1))
    wanted = wanted * torch.linspace(0.04, 0.4, 20) @ directions
    turn = torch.eye(20).mul(0.2).requires_grad_()
    moments, sgd = Moments(wanted), torch.optim.SGD([turn], 0.1)
    for step in range(1500):
        rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(step + 9)) @ turn
        sgd.param_groups[0]["lr"] = 0.1 * (1 - step / 1500)
        sgd.zero_grad()
        moments.distance(rows, max(0.02, 1 / (step + 1))).backward()
        sgd.step()
        if step % 4 == 0 and step > 40:
            moments.renew()
    found = torch.linalg.eigvalsh((turn.T @ turn).detach())
    torch.testing.assert_close(found, torch.linalg.eigvalsh(wanted.T.cov()), rtol=0.2, atol=0.005)


def test_nothing_is_stretched_too_far_at_once():
    seen = points(0, 300, 4)
    moments = Moments(torch.cat([100 * seen[:, :2], 0.1 * seen[:, 2:]], 1))
    moments.distance(seen, 1.0)
    moments.renew()
    stretches = torch.linalg.eigvalsh(moments.turn)
    assert float(stretches.max()) == pytest.approx(STRETCH)
    assert float(stretches.min()) < 0.2


@pytest.mark.parametrize("seen", [torch.zeros(9, 4), torch.ones(9, 4), points(0, 2, 4)])
@pytest.mark.parametrize("wanted", [torch.ones(7, 4), points(1, 2, 4), points(2, 50, 4)])
def test_few_rows_and_such_as_are_all_alike_have_a_map_too(seen, wanted):
    moments = Moments(wanted)
    moments.distance(seen, 1.0)
    moments.renew()
    assert after(moments, seen).isfinite().all()


def test_a_state_that_was_kept_goes_on():
    wanted, seen = points(0, 50, 3), points(1, 40, 3)
    moments, again = Moments(wanted), Moments(wanted)
    moments.distance(seen, 1.0)
    moments.renew()
    again.load_state({name: table.clone() for name, table in moments.state().items()})
    assert torch.equal(moments.distance(seen, 0.5), again.distance(seen, 0.5))
    assert moments.renew() == again.renew()
