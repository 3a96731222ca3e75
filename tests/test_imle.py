import json

import pytest
import torch
from conftest import TINY_IMLE, Killed

from glann import IMLE, GlannError, imle
from glann.nearest import nearest


@pytest.fixture(scope="module")
def codes():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(150, 6, generator=generator), dim=1)


def ring(n=400, modes=8):
    """Points around `modes` places of a circle: (points, centres)."""
    angles = torch.arange(modes) * (2 * torch.pi / modes)
    centres = torch.stack([angles.cos(), angles.sin()], 1)
    generator = torch.Generator().manual_seed(0)
    points = centres.repeat(n // modes, 1) + 0.01 * torch.randn(n, 2, generator=generator)
    return points, centres


def test_drops_no_mode():
    points, centres = ring()
    model = IMLE(noise_dim=4, width=64, depth=2, epochs=300, batch_size=100, pool=5).fit(points)
    samples = model.sample(1000, seed=1)
    near, _ = nearest(samples, centres)
    shares = near.bincount(minlength=8) / 1000
    assert shares.min() > 0.04  # of .125
    # and every datum has a sample close by: what IMLE minimises
    _, distances = nearest(points, samples)
    assert distances.sqrt().max() < 0.2


def test_more_training_brings_samples_nearer():
    points, _ = ring()
    errors = []
    for epochs in (2, 60):
        model = IMLE(noise_dim=4, width=64, depth=2, epochs=epochs, batch_size=100).fit(points)
        errors.append(float(nearest(points, model.sample(800))[1].mean()))
    assert errors[1] < errors[0] / 4


def test_half_precision_learns_as_well():
    points, _ = ring()
    errors = []
    for precision in ("float32", "bfloat16"):
        model = IMLE(
            noise_dim=4, width=64, depth=2, epochs=60, batch_size=100, precision=precision
        ).fit(points)
        errors.append(float(nearest(points, model.sample(800))[1].mean()))
    assert errors[1] < 2 * errors[0] + 1e-3
    assert errors[1] != errors[0]


def test_lists_log_how_often_the_nearest_was_found(codes, tmp_path):
    IMLE(**TINY_IMLE, search="ivf").fit(codes, folder=tmp_path / "ivf")
    IMLE(**TINY_IMLE).fit(codes, folder=tmp_path / "torch")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("ivf", "torch")
    ]
    assert [line["recall"] for line in logs[0]] == [1.0] * 4  # so few are searched exactly
    assert not any("recall" in line for line in logs[1])


@pytest.mark.parametrize("step", [1, 5, 6, 12, 15, 20])
@pytest.mark.parametrize("more", [{}, {"keep": 3, "perturbation": 0.1}])
def test_killed_and_resumed_equals_straight_bit_for_bit(codes, tmp_path, kill_at, step, more):
    straight = IMLE(**TINY_IMLE, **more).fit(codes, seed=2)  # 5 steps an epoch, 20 in all
    kill_at(step)
    with pytest.raises(Killed):
        IMLE(**TINY_IMLE, **more).fit(codes, seed=2, folder=tmp_path)
    kill_at(-1)
    resumed = IMLE(**TINY_IMLE, **more).fit(codes, seed=2, folder=tmp_path)
    for name, value in straight.mapper_.state_dict().items():
        assert torch.equal(value, resumed.mapper_.state_dict()[name]), name


def test_resume_refuses_other_codes(codes, tmp_path):
    IMLE(**TINY_IMLE).fit(codes, folder=tmp_path)
    with pytest.raises(GlannError, match="another data"):
        IMLE(**TINY_IMLE).fit(codes.flip(0), folder=tmp_path)


def test_both_searches_learn_the_same(codes):
    pytest.importorskip("faiss")
    a = IMLE(**TINY_IMLE, search="torch").fit(codes)
    b = IMLE(**TINY_IMLE, search="faiss").fit(codes)
    assert torch.equal(a.sample(10), b.sample(10))


def test_each_code_is_matched_to_its_nearest_candidate(codes, monkeypatch):
    """The noise that a step learns from is the one whose candidate was nearest to its code."""
    seen = {}
    search = imle.nearest

    def spy(queries, candidates, how):
        seen["matching"] = search(queries, candidates, how)
        seen["candidates"] = candidates
        return seen["matching"]

    monkeypatch.setattr(imle, "nearest", spy)
    IMLE(**{**TINY_IMLE, "epochs": 1}, pool=3.0).fit(codes)
    assert len(seen["candidates"]) == 450
    _, distances = seen["matching"]
    oracle = torch.cdist(codes, seen["candidates"]).square()
    torch.testing.assert_close(oracle.min(1).values, distances, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("keep", "matchings"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_a_matching_is_kept_for_as_long_as_said(codes, monkeypatch, keep, matchings):
    calls = []
    search = imle.nearest
    monkeypatch.setattr(imle, "nearest", lambda *a: calls.append(1) or search(*a))
    IMLE(**TINY_IMLE, keep=keep).fit(codes)
    assert len(calls) == matchings


def test_candidates_are_drawn_anew_for_each_matching(codes):
    model = IMLE(**TINY_IMLE)
    cpu = torch.device("cpu")
    first, second = model._draw(0, 0, 150, cpu), model._draw(0, 1, 150, cpu)
    assert first.shape == (300, 8)
    assert not torch.isin(first, second).any()


def test_units_of_the_codes_do_not_matter(codes):
    free = codes * torch.linspace(0.5, 1, 150)[:, None]  # off the sphere
    a = IMLE(**TINY_IMLE).fit(free).sample(50)
    b = IMLE(**TINY_IMLE).fit(free * 64 + 256).sample(50)
    torch.testing.assert_close(a * 64 + 256, b, rtol=0, atol=0.1)


def test_samples_are_on_the_sphere_when_codes_are(codes):
    model = IMLE(**TINY_IMLE).fit(codes)
    torch.testing.assert_close(model.sample(20).norm(dim=1), torch.ones(20))


def test_mapper_is_in_evaluation_mode(codes):
    model = IMLE(**TINY_IMLE).fit(codes)
    assert not any(module.training for module in model.mapper_.modules())
