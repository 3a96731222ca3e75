"""The kernel finds what brute force in float64 finds; without a GPU, in Triton's interpreter."""

import os
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glann import nearest as dispatch
from glann.nearest import nearest, nearest_in_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton was imported to compile", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton's own functions are decorated too
module = pytest.importorskip("glann.nearest_triton")
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the GPU is not Hopper", allow_module_level=True)

EPS = 2.0**-24
"""Half a unit in the last place of a float32 near 1."""


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    if DEVICE.type == "cuda":
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        # Triton 3.6 takes int() of an array of one number, which newer NumPy refuses.
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    terms = module._terms
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        # The interpreter multiplies bfloat16 as if they were whole numbers.
        patch.setattr(module, "_terms", lambda x, width: terms(x, width).float())
        yield


def random_points(seed, n, d, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * scale + shift


def search(queries, points, query_counts=None, point_counts=None):
    counts = (query_counts or [len(queries)], point_counts or [len(points)])
    counts = (torch.tensor(each, dtype=torch.int64) for each in counts)
    found = module.search(queries.to(DEVICE), points.to(DEVICE), *counts)
    assert found.shape == (len(queries),)
    assert found.dtype == torch.int64
    assert found.device.type == DEVICE.type
    return found.cpu()


def check(queries, points, query_counts=None, point_counts=None):
    """The search's result, after a look whether each query's is the nearest of its group."""
    found = search(queries, points, query_counts, point_counts)
    query_counts, point_counts = query_counts or [len(queries)], point_counts or [len(points)]
    parts = zip(
        *(queries.split(query_counts), found.split(query_counts), points.split(point_counts)),
        strict=True,
    )
    first = 0
    for own, here, among in parts:
        if len(own):
            here = here - first
            assert here.min() >= 0
            assert here.max() < len(among)
            exact = "donot_use_mm_for_euclid_dist"
            oracle = torch.cdist(own.double(), among.double(), compute_mode=exact).square()
            there = oracle.gather(1, here[:, None])[:, 0]
            middle = among.double().mean(0)
            radius2 = max(float((x - middle).square().sum(1).max()) for x in (own, among))
            assert (there - oracle.amin(1)).max() <= 12 * (own.shape[1] + 4) * EPS * radius2
        first += len(among)
    return found


@pytest.fixture(params=[(2048, 8), (1, 8), (2**20, 1), (2**20, 2)], ids=str)
def _parts(request, monkeypatch):
    """In how many parts the points of a task are searched."""
    for name, value in zip(("_PROGRAMS", "_TILES"), request.param, strict=True):
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("d", [1, 3, 16, 64, 65, 128, 130, 513])
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 300), (200, 1), (31, 17), (64, 64), (65, 63), (129, 333)]
)
def test_found_distance_is_the_true_minimum(n, m, d):
    check(random_points(1, n, d), random_points(2, m, d))


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("d", [2, 64, 100, 200])
def test_groups_around_multiples_of_a_block(d):
    of_queries = [1, 0, 63, 64, 65, 0, 0, 128, 3, 130, 0, 7, 0]
    of_points = [1, 5, 64, 63, 1, 0, 9, 65, 129, 64, 0, 200, 0]
    queries = random_points(3, sum(of_queries), d)
    check(queries, random_points(4, sum(of_points), d), of_queries, of_points)


@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 60, 64, 70, 129]), st.integers(1, 150))
        | st.tuples(st.just(0), st.just(0)),
        min_size=1,
        max_size=8,
    ),
    d=st.integers(1, 140),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    at_once=st.sampled_from([2**11, 2**13, 2**26]),
    programs=st.sampled_from([1, 5, 2048]),
    twice=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_any_groups(seed, counts, d, scale, at_once, programs, twice):
    of_queries, of_points = map(list, zip(*counts, strict=True))
    queries = random_points(seed, sum(of_queries), d, scale)
    points = random_points(seed + 1, sum(of_points), d, scale)
    if twice and len(points):
        points[1::2] = points[:-1:2]
        queries[::3] = points[torch.arange(len(queries))[::3] % len(points)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", at_once)
        patch.setattr(module, "_PROGRAMS", programs)
        patch.setattr(module, "_TILES", 1)
        check(queries, points, of_queries, of_points)


def test_groups_are_moved_each_by_its_own_middle():
    # Far apart, so that from any common origin all digits would cancel.
    shifts = torch.tensor([0.0, 1e6, -3e6]).repeat_interleave(torch.tensor([40, 90, 70]))[:, None]
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(10.0)) + shifts
    assert torch.equal(search(grid, grid, [40, 90, 70], [40, 90, 70]), torch.arange(200))


@pytest.mark.usefixtures("_parts")
def test_exact_ties_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setattr(module, "_middles", lambda points, counts: points[: len(counts)] * 0)
    half = random_points(7, 60, 3, scale=1.5).round()
    points, queries = torch.cat([half, -half, half, -half]), random_points(8, 90, 3, 1.5).round()
    distances = (queries[:, None] - points[None]).square().sum(2)
    assert torch.equal(search(queries, points), distances.argmin(1))
    twice = search(queries.repeat(2, 1), points.repeat(2, 1), [90, 90], [240, 240])
    assert torch.equal(twice, torch.cat([distances.argmin(1), distances.argmin(1) + 240]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", ["queries", "points", "all points"])
def test_what_is_not_finite_gives_some_index_of_the_group(bad, place):
    of_queries, of_points = [70, 70, 3], [53, 90, 1]
    queries, points = random_points(9, 143, 5), random_points(10, 144, 5)
    if place == "queries":
        queries[87, 2] = bad
    elif place == "points":
        points[70, 2] = bad
    else:
        points[53:143, 1] = bad
    found = search(queries, points, of_queries, of_points)
    bounds = torch.tensor([0, 53, 143, 144])
    group = torch.arange(3).repeat_interleave(torch.tensor(of_queries))
    assert (found >= bounds[group]).all()
    assert (found < bounds[group + 1]).all()
    rest = torch.arange(143) != 87 if place == "queries" else group != 1
    apart = torch.cdist(queries, points)
    apart[group[:, None] != torch.arange(3).repeat_interleave(torch.tensor(of_points))] = torch.inf
    assert torch.equal(found[rest], apart.argmin(1)[rest])


def test_no_queries_and_other_layouts():
    points = random_points(11, 40, 6)
    assert search(torch.empty(0, 6), points).shape == (0,)
    assert search(torch.empty(0, 6), points, [0, 0], [40, 0]).shape == (0,)
    assert search(torch.empty(0, 6), torch.empty(0, 6)).shape == (0,)
    queries = random_points(12, 6, 30).T
    assert not queries.is_contiguous()
    check(queries, points.T.contiguous().T)


def test_terms_sum_to_what_was_split():
    x = torch.cat([random_points(13, 50, 7), random_points(14, 50, 7, 1e-3)])
    terms = module._terms(x, 16)
    assert terms.shape == (100, 3, 16)
    assert torch.equal(terms.double().sum(1).float()[:, :7], x)
    assert (terms[:, :, 7:] == 0).all()
    assert torch.equal(terms.bfloat16().float(), terms.float())


def test_nearest_takes_this_search_where_there_is_one(monkeypatch):
    used = []

    def recorded(*args):
        used.append(args)
        return module.search(*args)

    monkeypatch.setattr(dispatch, "search_at_once", lambda device: recorded)
    queries, points = random_points(15, 50, 4), random_points(16, 80, 4)
    found, squared = (x.cpu() for x in nearest(queries.to(DEVICE), points.to(DEVICE)))
    oracle = torch.cdist(queries, points)
    assert torch.equal(found, oracle.argmin(1))
    torch.testing.assert_close(squared, oracle.amin(1).square(), rtol=1e-4, atol=1e-5)
    counts = torch.tensor([20, 0, 30]), torch.tensor([30, 10, 40])
    found, _ = nearest_in_groups(queries.to(DEVICE), points.to(DEVICE), *counts)
    wanted = [oracle[:20, :30].argmin(1), oracle[20:, 40:].argmin(1) + 40]
    assert torch.equal(found.cpu(), torch.cat(wanted))
    assert len(used) == 2


class Hopper:
    type = "cuda"

    def __str__(self):
        return "cuda:0"


def test_available_only_where_it_was_tested(monkeypatch):
    assert not module.available(torch.device("cpu"))
    available = module.available.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not available(Hopper())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.version, "cuda", None)
        assert not available(Hopper())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler.\nMore"), FileNotFoundError(2, "gcc"), OSError()],
)
def test_a_kernel_that_can_not_be_built_is_told_of_in_one_line(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(*shape))
    monkeypatch.setattr(module, "search", fail)
    with pytest.warns(UserWarning, match=f"cuda:0.*slower.*{type(error).__name__}") as told:
        assert not module.available.__wrapped__(Hopper())
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU here")
@pytest.mark.parametrize("d", [16, 64, 100, 128, 512])
def test_many_on_the_gpu(d):
    check(random_points(17, 3000, d), random_points(18, 9000, d))
