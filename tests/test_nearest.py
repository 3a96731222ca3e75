import functools
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from glann import nearest as module
from glann.errors import GlannError
from glann.nearest import EXACT, SEARCHES, nearest, nearest_in_groups, recall

EPS = 2.0**-24
"""Half a unit in the last place of a float32 near 1."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Products of tiny tiles take a microsecond; waiting for a second thread takes milliseconds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_points(seed: int, n: int, d: int, scale: float = 1.0, shift: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * scale + shift


def all_squared_distances(queries, points):
    """Float64 (n, m), each summed from differences: nothing cancels."""
    queries, points = queries.double().numpy(), points.double().numpy()
    return ((queries[:, None, :] - points[None, :, :]) ** 2).sum(2)


def rounding(queries, points):
    """By how much a squared distance from float32 products may be off: c · d · ε · R²."""
    middle = points.double().mean(0)
    radius2 = max(float((x.double() - middle).square().sum(1).max()) for x in (queries, points))
    return 8 * (queries.shape[1] + 4) * EPS * radius2


def use_tile(monkeypatch, rows: int, columns: int, precision: torch.dtype | None = None):
    monkeypatch.setattr(module, "_TILE", {"cpu": (rows, columns)})
    if precision:  # as on a CPU that is made for it, or one that isn't
        monkeypatch.setattr(module, "pick_precision", lambda name, device: precision)


PRECISIONS = torch.float32, torch.bfloat16


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 40),
    m=st.integers(1, 60),
    d=st.integers(1, 24),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    search=st.sampled_from(EXACT),
    precision=st.sampled_from(PRECISIONS),
    twice=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_found_distance_is_the_true_minimum(
    seed, n, m, d, scale, shift, tile, search, precision, twice
):
    queries = random_points(seed, n, d, scale, shift)
    points = random_points(seed + 1, m, d, scale, shift)
    if twice:
        points = torch.cat([points, points])
        queries[: n // 2] = points[: n // 2].repeat(n, 1)[: n // 2]
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tile(monkeypatch, *tile, precision)
        indices, distances = nearest(queries, points, search)
    assert indices.shape == distances.shape == (n,)
    assert indices.dtype == torch.int64
    assert distances.dtype == torch.float32
    oracle = all_squared_distances(queries, points)
    found = oracle[np.arange(n), indices.numpy()]
    assert np.all(found - oracle.min(1) <= rounding(queries, points))
    np.testing.assert_allclose(distances.numpy(), found, rtol=(d + 4) * 2 * EPS, atol=1e-37)


@functools.cache
def neighbours_by_scikit_learn(d):
    queries, points = random_points(1, 90, d), random_points(2, 150, d)
    oracle = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(points.double().numpy())
    return queries, points, *oracle.kneighbors(queries.double().numpy())


@pytest.mark.parametrize(
    ("search", "precision"), [("torch", p) for p in PRECISIONS] + [("faiss", None)]
)
@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (64, 50), (1024, 1024)])
@pytest.mark.parametrize("d", [1, 2, 3, 64])
def test_same_neighbours_as_scikit_learn(monkeypatch, d, tile, search, precision):
    queries, points, distances, neighbours = neighbours_by_scikit_learn(d)
    use_tile(monkeypatch, *tile, precision)
    clear = distances[:, 1] ** 2 - distances[:, 0] ** 2 > rounding(queries, points)
    assert clear.mean() > 0.8
    indices, squared = nearest(queries, points, search)
    assert np.array_equal(indices.numpy()[clear], neighbours[clear, 0])
    np.testing.assert_allclose(squared.sqrt().numpy()[clear], distances[clear, 0], rtol=1e-5)


def test_same_neighbours_as_faiss_used_directly():
    queries, points = random_points(3, 500, 32), random_points(4, 2500, 32)
    index = faiss.IndexFlatL2(32)
    index.add(points.numpy())
    distances, neighbours = index.search(queries.numpy(), 2)
    clear = distances[:, 1] - distances[:, 0] > rounding(queries, points)
    assert clear.mean() > 0.9
    for search in EXACT:
        indices, squared = nearest(queries, points, search)
        assert np.array_equal(indices.numpy()[clear], neighbours[clear, 0])
        np.testing.assert_allclose(squared.numpy(), distances[:, 0], rtol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (5, 4), (100, 7), (100, 100)])
def test_exact_ties_go_to_the_lowest_index_at_any_tile_size(monkeypatch, tile, precision):
    # Small whole numbers around 0: every product and sum is exact, so ties are ties.
    half = random_points(5, 12, 3, scale=1.5).round()
    points = torch.cat([half, -half, half, -half])
    queries = random_points(6, 40, 3, scale=1.5).round()
    use_tile(monkeypatch, *tile, precision)
    indices, _ = nearest(queries, points)
    assert np.array_equal(indices.numpy(), all_squared_distances(queries, points).argmin(1))


@pytest.mark.parametrize("search", EXACT)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6])
def test_every_point_is_its_own_nearest_at_distance_zero(monkeypatch, search, shift):
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(9.0)) + shift
    use_tile(monkeypatch, 10, 10)
    indices, distances = nearest(grid, grid, search)
    assert torch.equal(indices, torch.arange(len(grid)))
    assert torch.equal(distances, torch.zeros(len(grid)))


@pytest.mark.parametrize("search", EXACT)
def test_distances_keep_their_digits_beside_a_far_outlier(search):
    points = torch.tensor([[1e-3], [2e8]])
    _, distances = nearest(torch.tensor([[3e-3]]), points, search)
    assert distances.item() == pytest.approx(4e-6, rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_matrix_of_all_distances_is_never_held(monkeypatch, precision):
    product = torch.mm
    sizes = []

    def recording(*args, **kwargs):
        result = product(*args, **kwargs)
        sizes.append(result.nbytes)
        return result

    use_tile(monkeypatch, 16, 32, precision)
    monkeypatch.setattr(torch, "mm", recording)
    # All queries are nearest to one tile's points: those don't make a larger one either.
    nearest(torch.zeros(200, 4) + 1e-3, torch.cat([torch.zeros(1, 4), torch.ones(299, 4)]))
    assert sizes
    assert max(sizes) <= 4 * 16 * 32


@given(
    seed=st.integers(0, 2**32),
    d=st.sampled_from([1, 2, 5, 40]),
    tile=st.integers(1, 40),
    near=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    far=st.sampled_from([1e-3, 1.0, 30.0]),
    precision=st.sampled_from(PRECISIONS),
)
@settings(deadline=None, max_examples=100)
def test_coarse_distances_are_off_by_no_more_than_is_said(seed, d, tile, near, far, precision):
    queries, points = random_points(seed, 30, d, near), random_points(seed + 1, 40, d, far)
    tiles = points.split(tile)
    least, error = module._least(queries, tiles, precision, 8)
    halves = torch.from_numpy(all_squared_distances(queries, points)) / 2
    wanted = torch.stack([part.amin(1) for part in halves.split(tile, 1)])
    assert ((least - wanted).abs() <= error)[least >= 0].all()
    assert (wanted <= error)[least < 0].all()


def test_a_tile_is_in_question_where_it_may_hold_a_nearer_point_than_any_other(monkeypatch):
    """From 9 to 11, from 10.3 to 10.7, and from 10.8 on: the third is farther than the second."""
    bounds = torch.tensor([[10.0], [10.5], [11.8]]), torch.tensor([[1.0], [0.2], [1.0]])
    monkeypatch.setattr(module, "_least", lambda *_: bounds)
    found = module._in_question(torch.zeros(1, 2), [torch.zeros(1, 2)] * 3, torch.float32, 1)
    assert found[:, 0].tolist() == [True, True, False]


def test_coarse_distances_leave_few_tiles_in_question():
    queries, points = random_points(1, 300, 48), random_points(2, 4000, 48)
    for precision, most in zip(PRECISIONS, (1.1, 4.0), strict=True):
        assert module._in_question(queries, points.split(100), precision, 64).sum() <= 300 * most


@pytest.mark.parametrize(("apart", "wanted"), [(1e3, torch.float32), (0.0, torch.bfloat16)])
def test_what_coarse_numbers_take_for_the_same_is_looked_for_without_them(
    monkeypatch, apart, wanted
):
    # Clusters far apart, each in all tiles: from the second queries on float32 is used at once.
    centres = random_points(1, 5, 16, scale=apart)
    points = centres.repeat(80, 1) + random_points(2, 400, 16)
    queries = centres.repeat(40, 1) + random_points(3, 200, 16)
    coarse = []
    look = module._in_question
    monkeypatch.setattr(
        module, "_in_question", lambda *given: (coarse.append(given[2]), look(*given))[1]
    )
    use_tile(monkeypatch, 4, 10, torch.bfloat16)
    indices, _ = nearest(queries, points)
    oracle = all_squared_distances(queries, points)
    found = oracle[np.arange(200), indices.numpy()]
    assert np.all(found - oracle.min(1) <= rounding(queries, points))
    assert coarse[0] == torch.bfloat16
    assert coarse[-1] == wanted


@pytest.mark.parametrize("search", EXACT)
def test_half_precision_around_it_changes_nothing(search):
    queries, points = random_points(7, 100, 16), random_points(8, 400, 16)
    wanted = nearest(queries, points, search)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(queries, points, search)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("search", EXACT)
def test_any_float_type_layout_and_gradient(search):
    queries, points = random_points(9, 20, 6).half(), random_points(10, 30, 6).half()
    wanted = nearest(queries.float(), points.float(), search)
    for given_queries, given_points in [
        (queries, points),
        (queries.double(), points.double()),
        (queries.float().T.contiguous().T, points.float().T.contiguous().T),
        (queries.float().requires_grad_(), points.float().requires_grad_()),
    ]:
        before = given_points.detach().clone()
        indices, distances = nearest(given_queries, given_points, search)
        assert torch.equal(indices, wanted[0])
        assert torch.equal(distances, wanted[1])
        assert not distances.requires_grad
        assert torch.equal(given_points.detach(), before)


@pytest.mark.parametrize("search", EXACT)
def test_no_queries_give_no_neighbours(search):
    indices, distances = nearest(torch.empty(0, 3), torch.randn(4, 3), search)
    assert indices.shape == distances.shape == (0,)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("search", EXACT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["queries", "points"])
def test_numbers_that_are_not_finite_are_refused(search, bad, place):
    arrays = {"queries": random_points(11, 30, 4), "points": random_points(12, 30, 4)}
    arrays[place][17, 2] = bad
    with pytest.raises(GlannError, match="NaN"):
        nearest(arrays["queries"], arrays["points"], search)


@pytest.mark.parametrize(
    ("queries", "points", "search", "message"),
    [
        ((3, 4), (5, 3), "torch", r"\(3, 4\) and points \(5, 3\) don't fit"),
        ((4,), (5, 4), "torch", "don't fit"),
        ((3, 4), (5, 4, 1), "faiss", "don't fit"),
        ((3, 4), (0, 4), "torch", "no points"),
        ((3, 4), (5, 4), "kd-tree", "'kd-tree' is unknown; wanted one of torch, faiss, ivf"),
    ],
)
def test_what_does_not_fit_is_refused(queries, points, search, message):
    with pytest.raises(GlannError, match=message):
        nearest(torch.zeros(queries), torch.zeros(points), search)


@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 30)) | st.tuples(st.just(0), st.just(0)),
        max_size=8,
    ),
    d=st.integers(1, 12),
    shift=st.sampled_from([0.0, -1e3, 1e6]),
    search=st.sampled_from(SEARCHES),
)
@settings(deadline=None, max_examples=100)
def test_each_group_is_searched_by_itself(seed, counts, d, shift, search):
    of_queries, of_points = (torch.tensor([pair[i] for pair in counts]).long() for i in (0, 1))
    far = torch.arange(len(counts))[:, None] * shift
    queries = random_points(seed, int(of_queries.sum()), d) + far.repeat_interleave(of_queries, 0)
    points = random_points(seed + 1, int(of_points.sum()), d) + far.repeat_interleave(of_points, 0)
    indices, squared = nearest_in_groups(queries, points, of_queries, of_points, search)
    assert indices.shape == squared.shape == (len(queries),)
    assert indices.dtype == torch.int64
    assert squared.dtype == torch.float32
    parts = zip(
        *(x.split(of_queries.tolist()) for x in (queries, indices, squared)),
        *(x.split(of_points.tolist()) for x in (points, torch.arange(len(points)))),
        strict=True,
    )
    for own, found, distances, among, rows in parts:
        if len(own):
            wanted = nearest(own, among, search)
            assert torch.equal(found, rows[wanted[0]])
            assert torch.equal(distances, wanted[1])
            oracle = all_squared_distances(own, among)
            there = oracle[np.arange(len(own)), (found - rows[0]).numpy()]
            assert np.all(there - oracle.min(1) <= rounding(own, among))


@pytest.mark.parametrize(
    ("of_queries", "of_points", "message"),
    [
        ([1, 2], [3, 2], r"query_counts sum to 3 .* wanted those of 4 rows"),
        ([1, 3], [3, 3], r"point_counts sum to 6 .* wanted those of 5 rows"),
        ([5, -1], [3, 2], "query_counts sum to 4 or some are negative"),
        ([4], [3, 2], "1 query_counts and 2 point_counts"),
        ([2, 0, 2], [3, 2, 0], "no points to search for the queries of group 2"),
        ([1.0, 3.0], [3, 2], r"query_counts are torch.float32, \(2,\), on cpu; wanted int64"),
        ([[1, 3]], [3, 2], r"query_counts are torch.int64, \(1, 2\)"),
    ],
)
def test_counts_that_do_not_fit_are_refused(of_queries, of_points, message):
    with pytest.raises(GlannError, match=message):
        nearest_in_groups(
            torch.zeros(4, 2), torch.zeros(5, 2), torch.tensor(of_queries), torch.tensor(of_points)
        )


@pytest.mark.parametrize("search", EXACT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["queries", "points"])
def test_numbers_that_are_not_finite_are_refused_in_any_group(search, bad, place):
    arrays = {"queries": random_points(11, 30, 4), "points": random_points(12, 30, 4)}
    arrays[place][17, 2] = bad
    tens = torch.tensor([10, 10, 10])
    with pytest.raises(GlannError, match="NaN"):
        nearest_in_groups(arrays["queries"], arrays["points"], tens, tens, search)


def test_importing_does_not_import_triton():
    code = "import sys, glann.nearest; assert 'triton' not in sys.modules, 'triton'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inverted_lists_find_nearly_all_where_points_are_in_clusters():
    centres = random_points(0, 100, 16, scale=5)
    points = centres.repeat(60, 1) + random_points(1, 6000, 16)
    queries = centres.repeat(5, 1) + random_points(2, 500, 16)
    found, distances = nearest(queries, points, "ivf")
    _, exact = nearest(queries, points)
    share = float((distances <= exact * (1 + 1e-5)).float().mean())
    assert (distances >= exact * (1 - 1e-5)).all()
    assert 0.9 < share <= 1
    assert recall(queries, points, found) == pytest.approx(share)


def test_inverted_lists_miss_much_where_points_are_not():
    points, queries = random_points(0, 8000, 48), random_points(1, 400, 48)
    found, _ = nearest(queries, points, "ivf")
    assert recall(queries, points, found) < 0.9  # there is something to measure
    exact, _ = nearest(queries, points)
    assert recall(queries, points, exact) == 1
    half = torch.where(torch.arange(400) < 200, exact, (exact + 1) % 8000)
    assert recall(queries, points, half) == pytest.approx(0.5, abs=0.01)
    assert recall(queries, points, half, sample=100) == pytest.approx(0.5, abs=0.02)


def test_few_points_are_searched_exactly_even_with_lists():
    points, queries = random_points(0, 500, 8), random_points(1, 50, 8)
    assert torch.equal(nearest(queries, points, "ivf")[0], nearest(queries, points)[0])


def test_without_faiss_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(GlannError, match=r"glann\[faiss\].*search = 'torch'"):
        nearest(torch.zeros(1, 2), torch.zeros(1, 2), "faiss")
