"""Optimisers against torch's own, and schedules."""

import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE, TINY_TUNING
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glann import GLO, IMLE, FineTuning, storage
from glann.baselines import make_baseline
from glann.contrastive import learn_features
from glann.errors import GlannError
from glann.networks import BLOCKS, Generator
from glann.optimisers import (
    OPTIMISERS,
    SCHEDULES,
    Muon,
    adam,
    learning_rate,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    orthogonal,
    set_learning_rate,
)


def test_one_cycle_is_torchs():
    steps, base = 200, 0.02
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=base, total_steps=steps, cycle_momentum=False
    )
    # torch's phases end at its steps 59 and 199, ours at 30 % and at the end: a million steps of
    # ours are fine enough to look at the same place.
    fine = 1_000_000
    for step in range(steps):
        place = 0.3 * step / 59 if step <= 59 else 0.3 + 0.7 * (step - 59) / 140
        ours = learning_rate("one-cycle", base, round(place * fine), fine)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-3, abs=1e-9)
        optimiser.step()
        if step < steps - 1:
            scheduler.step()
    assert learning_rate("one-cycle", base, 0, fine) == pytest.approx(base / 25)
    assert learning_rate("one-cycle", base, 300_000, fine) == base


def learn_all(name, digits, trained):
    """A training of 20 steps, whose rate is .02 at the highest, by module and schedule."""
    if name == "glo":
        GLO(**TINY_GLO, schedule="cosine", generator_lr=0.02).fit(digits)
    elif name == "imle":
        IMLE(**TINY_IMLE, schedule="one-cycle", lr=0.02).fit(trained.codes)
    elif name == "finetuning":
        tuning = FineTuning(**{**TINY_TUNING, "lr": 0.02}, schedule="halving")
        tuning.fit(digits, trained.codes, trained.generator, like=GLO(**TINY_GLO))
    elif name == "contrastive":
        learn_features(digits[:40], epochs=20, device=torch.device("cpu"))
    else:
        small = {"images_seen": 600, "batch_size": 32, "noise_dim": 6, "width": 8, "hidden": 32}
        make_baseline("pixel-imle", **small, lr=0.02).fit(digits)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("glo", "cosine"),
        ("imle", "one-cycle"),
        ("finetuning", "halving"),
        ("contrastive", "one-cycle"),
        ("baselines.pixel_imle", "cosine"),
    ],
)
def test_trainings_follow_their_schedule_from_the_first_step_to_the_last(
    name, schedule, digits, trained, monkeypatch
):
    rates = []

    def watched(optimiser, lr):
        rates.append(lr)
        set_learning_rate(optimiser, lr)

    monkeypatch.setattr(f"glann.{name}.set_learning_rate", watched)
    monkeypatch.setattr("glann.contrastive.LR", 0.02)
    learn_all(name, digits, trained)
    assert rates == [learning_rate(schedule, 0.02, step, 20) for step in range(20)]


def test_cosine_is_torchs():
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=50)
    for step in range(51):
        assert learning_rate("cosine", 0.3, step, 50) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-12
        )
        optimiser.step()
        scheduler.step()
    assert learning_rate("cosine", 0.3, 0, 50) == 0.3
    assert learning_rate("cosine", 0.3, 50, 50) == 0


@pytest.mark.parametrize("steps", [10, 200, 93_800])
def test_halving_is_after_every_tenth(steps):
    tenth = steps // 10
    for part in range(10):
        for step in (part * tenth, (part + 1) * tenth - 1):
            assert learning_rate("halving", 0.4, step, steps) == 0.4 / 2**part


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(steps=st.integers(1, 10_000), data=st.data())
@settings(deadline=None, max_examples=50)
def test_rates_are_above_0_and_at_most_the_base(schedule, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(schedule, 0.01, step, steps)
    assert 0 < rate <= 0.01
    assert isinstance(rate, float)
    assert learning_rate(schedule, 0.02, step, steps) == pytest.approx(2 * rate)


def test_other_schedules():
    assert [learning_rate("constant", 0.1, step, 3) for step in range(3)] == [0.1] * 3
    with pytest.raises(GlannError, match="'linear' is unknown; wanted one of one-cycle, cosine"):
        learning_rate("linear", 0.1, 0, 3)


# ---------------------------------------------------------------------- optimisers


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 3, 2), nn.ConvTranspose2d(3, 2, 2)
    return nn.Sequential(nn.Linear(3, 9), nn.Unflatten(1, (1, 3, 3)), *convolutions)


def take_steps(network: torch.nn.Module, optimiser: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        optimiser.zero_grad()
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        network(inputs).square().sum().backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        # Two moments and a count for each of three weights and three biases.
        (lambda network: adam(network, 0.1, weight_decay=0.01), 3 * 6),
        # Of a convolution's weights one.
        (lambda network: Muon(network, 0.1), 2 + 3 * 4),
    ],
    ids=OPTIMISERS,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_optimiser_goes_on_from_its_saved_state(tmp_path, make, numbers, layout):
    network = three_layers().to(memory_format=layout)
    optimiser = make(network)
    take_steps(network, optimiser, 3)
    parts = {"network": network.state_dict(), "optimiser": optimiser_state(optimiser)}
    storage.save(tmp_path, "x", {}, parts)
    take_steps(network, optimiser, 2)

    _, parts = storage.load(tmp_path, "x")
    again = three_layers().to(memory_format=layout)
    again.load_state_dict(parts["network"])
    fresh = make(again)
    load_optimiser_state(fresh, parts["optimiser"])
    take_steps(again, fresh, 2)
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    state, state_again = optimiser_state(optimiser), optimiser_state(fresh)
    assert state.keys() == state_again.keys()
    assert len(state) == numbers
    assert all(torch.equal(state[name], state_again[name]) for name in state)


def test_adam_is_that_of_the_authors():
    """A step from a rest, by hand: β = (.5, .999), ε = 1e-8, decay added to the gradient."""
    network = two_layers()
    before = [p.detach().clone() for p in network.parameters()]
    optimiser = adam(network, 0.1, weight_decay=0.01)
    gradients = []
    for _ in range(2):
        optimiser.zero_grad()
        network(torch.ones(1, 3)).square().sum().backward()
        gradients.append([p.grad + 0.01 * p.detach() for p in network.parameters()])
        set_learning_rate(optimiser, 0.05)
        optimiser.step()
    for i, parameter in enumerate(network.parameters()):
        wanted, mean, square = before[i], 0.0, 0.0
        for t, gradient in enumerate((gradients[0][i], gradients[1][i]), start=1):
            mean = 0.5 * mean + 0.5 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            step = (mean / (1 - 0.5**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            wanted = wanted - 0.05 * step
        torch.testing.assert_close(parameter.detach(), wanted)


def test_unknown_optimisers_are_refused():
    with pytest.raises(GlannError, match="'sgd' is unknown; wanted one of adam, muon"):
        make_optimiser("sgd", two_layers(), 0.1)


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_orthogonal_keeps_directions_and_evens_out_lengths(rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=random)
    made = orthogonal([matrix])[0]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # In the matrix's own directions nothing but their lengths has changed, ...
    along = u.T @ made @ vh.T
    torch.testing.assert_close(along, along.diagonal().diag(), atol=2e-3, rtol=0)
    torch.testing.assert_close(u @ along @ vh, made, atol=2e-3, rtol=0)
    # ... and those that were not next to nothing are about 1.
    lengths = along.diagonal()[s > 0.02 * s.norm()]
    assert (lengths > 0.6).all()
    assert (lengths < 1.3).all()


@pytest.mark.parametrize("shape", [(4, 100), (100, 4), (30, 30)])
def test_orthogonal_is_newton_schulz_as_published(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    torch.testing.assert_close(orthogonal([matrix])[0], x)
    torch.testing.assert_close(orthogonal([1000 * matrix])[0], x)
    assert torch.equal(orthogonal([torch.zeros(shape)])[0], torch.zeros(shape))


def test_muon_is_torchs_on_convolutions_and_adam_on_the_rest():
    network, theirs = three_layers(), three_layers()
    # torch's own knows matrices alone.
    matrices = [nn.Parameter(theirs[i].weight.detach().flatten(1)) for i in (2, 3)]
    muon = torch.optim.Muon(matrices, lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    rest = [*theirs[0].parameters(), theirs[2].bias, theirs[3].bias]
    others = torch.optim.Adam(rest, lr=0.1, betas=(0.5, 0.999))
    mine = Muon(network, 0.1)
    for step in range(4):
        mine.zero_grad()
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        network(inputs).square().sum().backward()
        # The same gradients for both, so that torch's bfloat16 doesn't lead them apart.
        for p, q in zip(network.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        for matrix, i in zip(matrices, (2, 3), strict=True):
            matrix.grad = theirs[i].weight.grad.flatten(1)
        for optimiser in (mine, muon, others):
            set_learning_rate(optimiser, 0.1 / (1 + step))
            optimiser.step()
    for i, matrix in zip((2, 3), matrices, strict=True):
        torch.testing.assert_close(network[i].weight.flatten(1), matrix, atol=5e-3, rtol=0)
    for i in (0, 2, 3):
        torch.testing.assert_close(network[i].bias, theirs[i].bias)
    torch.testing.assert_close(network[0].weight, theirs[0].weight)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_muon_turns_convolutions_but_of_one_channel(blocks):
    generator = Generator(code_dim=8, image_shape=(1, 28, 28), width=8, hidden=32, blocks=blocks)
    named = {id(p): name for name, p in generator.named_parameters()}
    turned, others = (
        [named[id(p)] for p in group["params"]] for group in Muon(generator, 0.1).param_groups
    )
    assert sorted(turned + others) == sorted(named.values())
    convolutions = {
        f"{name}.weight"
        for name, layer in generator.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    }
    # A transposed convolution's rows are what goes in, so that its last one has many, too.
    assert convolutions - set(turned) == ({"layers.6.weight"} if blocks == "residual" else set())
    assert set(turned) <= convolutions


def test_muon_leaves_the_layer_that_reads_the_input_to_adam():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 5, 3), nn.Linear(2, 2))
    turned, others = Muon(network, 0.1).param_groups
    assert [id(p) for p in turned["params"]] == [id(network[2].weight)]
    assert id(network[0].weight) in map(id, others["params"])


def test_muon_of_a_network_without_matrices_is_adam():
    norms = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    optimisers = [Muon(norms[0], 0.1), adam(norms[1], 0.1)]
    for _ in range(3):
        for norm, optimiser in zip(norms, optimisers, strict=True):
            optimiser.zero_grad()
            norm(torch.arange(12.0).view(4, 3)).pow(3).sum().backward()
            optimiser.step()
    assert torch.equal(norms[0].weight, norms[1].weight)
    assert torch.equal(norms[0].bias, norms[1].bias)


def test_muon_takes_its_rate_from_a_tensor():
    networks = three_layers(), three_layers()
    for network, lr in zip(networks, (0.05, torch.tensor(0.05)), strict=True):
        optimiser = Muon(network, 0.1)
        set_learning_rate(optimiser, lr)
        take_steps(network, optimiser, 2)
    for p, q in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(p, q)
