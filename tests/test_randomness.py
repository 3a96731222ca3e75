import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from glann.errors import GlannError
from glann.randomness import BLOCK, generator, noise, permutation, seeded

WHOLE = noise(3, "sample", 0, 3 * BLOCK + 50, 5)


@given(start=st.integers(0, 3 * BLOCK + 50), length=st.integers(0, 2 * BLOCK))
@settings(deadline=None, max_examples=60)
def test_any_slice_of_noise_agrees_with_the_whole(start, length):
    stop = min(start + length, len(WHOLE))
    assert torch.equal(noise(3, "sample", start, stop, 5), WHOLE[start:stop])


@pytest.mark.parametrize("edge", [BLOCK, 2 * BLOCK])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1), (1, 1), (BLOCK, 0), (BLOCK, BLOCK)])
def test_slices_at_the_edges_of_blocks(edge, before, after):
    start, stop = edge - before, edge + after
    assert torch.equal(noise(3, "sample", start, stop, 5), WHOLE[start:stop])


def test_noise_is_standard_normal_and_no_row_repeats():
    rows = noise(0, "sample", 0, 8 * BLOCK, 4)
    assert rows.dtype == torch.float32
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-4
    correlations = torch.corrcoef(rows.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / len(rows) ** 0.5
    blocks = torch.corrcoef(rows.reshape(8, -1)) - torch.eye(8)
    assert blocks.abs().max() < 5 / (BLOCK * 4) ** 0.5


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (9, 3), (BLOCK, BLOCK)])
def test_noise_of_no_rows(start, stop):
    rows = noise(0, "sample", start, stop, 7)
    assert rows.shape == (0, 7)
    assert rows.dtype == torch.float32


def test_the_meaning_of_a_seed_never_changes():
    # Saved pipelines and published samples depend on these.
    assert generator(3, "sample", 7).initial_seed() == 4507859764424291374
    assert noise(3, "sample", 1024, 1025, 3)[0].tolist() == pytest.approx(
        [-1.0096977949142456, 0.9181352257728577, 1.0748857259750366]
    )
    assert permutation(3, "order", 2, 8).tolist() == [0, 3, 4, 6, 2, 7, 5, 1]


def test_another_seed_purpose_or_index_gives_other_numbers():
    seeds = [0, 1, 11, 2**31, 2**63, 2**64, 2**100]
    purposes = ["", "1", "a", "1/a", "a/1", "/", "order", "sample"]
    triples = list(itertools.product(seeds, purposes, [0, 1, 11, 111]))
    assert len({generator(*triple).initial_seed() for triple in triples}) == len(triples)
    rows = [noise(seed, purpose, 0, 1, 3) for seed, purpose in [(0, "a"), (1, "a"), (0, "b")]]
    assert len(torch.unique(torch.cat(rows), dim=0)) == 3


@pytest.mark.parametrize("seed", [None, 3.0, "3"])
def test_a_seed_is_a_whole_number(seed):
    """3.0 would be another seed than 3."""
    with pytest.raises(GlannError, match="wanted a whole number"):
        generator(seed, "sample")


def test_a_seed_may_be_of_any_kind_of_whole_number():
    wanted = generator(3, "sample").initial_seed()
    assert generator(np.int64(3), "sample").initial_seed() == wanted


def test_negative_seeds_are_refused():
    for draw in (
        lambda: generator(-1, "x"),
        lambda: noise(-1, "x", 0, 1, 1),
        lambda: permutation(-1, "x", 0, 3),
        lambda: seeded(-1, "x").__enter__(),
    ):
        with pytest.raises(GlannError, match="seed = -1 is negative"):
            draw()


@given(seed=st.integers(0, 2**64), index=st.integers(0, 1000), n=st.integers(0, 200))
@settings(deadline=None, max_examples=40)
def test_permutation_holds_every_item_once_and_is_repeatable(seed, index, n):
    order = permutation(seed, "order", index, n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(seed, "order", index, n))


def test_every_epoch_has_its_own_order():
    orders = {tuple(permutation(0, "order", epoch, 50).tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    generator(0, "x")
    noise(0, "x", 0, 10, 2)
    permutation(0, "x", 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_does_not_depend_on_the_global_generator_or_default_type():
    torch.manual_seed(0)
    first = noise(0, "x", 0, 10, 2)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        second, empty = noise(0, "x", 0, 10, 2), noise(0, "x", 0, 0, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert second.dtype == empty.dtype == torch.float32
    assert torch.equal(first, second)


def test_seeded_starts_the_global_generator_and_gives_it_back():
    before = torch.get_rng_state()
    weights = []
    for seed, purpose in [(0, "generator"), (0, "generator"), (1, "generator"), (0, "mapper")]:
        with seeded(seed, purpose):
            weights.append(torch.nn.Linear(4, 4).weight.detach())
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        before = torch.get_rng_state()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_seeded_gives_the_generator_back_after_an_error():
    before = torch.get_rng_state()
    with contextlib.suppress(RuntimeError), seeded(0, "x"):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_take_turns_with_the_global_generator():
    """Networks made in two threads at once would else get some of each other's numbers."""
    inside = threading.Event()

    def draw(seed):
        with seeded(seed, "x"):
            inside.set()
            return torch.rand(3)

    wanted = draw(1)
    inside.clear()
    with ThreadPoolExecutor(1) as pool, seeded(0, "x"):
        other = pool.submit(draw, 1)
        assert not inside.wait(0.1)
    assert torch.equal(other.result(), wanted)


def test_seeded_leaves_the_gpus_generators_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded(0, "x"):
        torch.rand(1)
    assert seeds == []


def test_threads_draw_the_same_noise(monkeypatch):
    alone = noise(0, "sample", 1000, 20_000, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(noise(0, "sample", 1000, 20_000, 64), alone)
