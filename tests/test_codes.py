import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glann.codes import as_codes, on_sphere
from glann.errors import GlannError

NUMBERS = [[0, 1, 2], [3, 4, 5]]


def read_only() -> np.ndarray:
    array = np.array(NUMBERS, dtype=np.float32)
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "array",
    [
        np.array(NUMBERS, dtype=np.float32),
        np.array(NUMBERS, dtype=np.float64),
        np.array(NUMBERS, dtype=np.float16),
        np.array(NUMBERS, dtype=np.longdouble),
        np.array(NUMBERS, dtype=">f4"),
        np.array(NUMBERS, dtype=">i8"),
        np.array(NUMBERS, dtype=np.uint64),
        np.asfortranarray(np.array(NUMBERS, dtype=np.float64)),
        np.array(NUMBERS, dtype=np.float32)[::-1][::-1],
        np.array([row[::-1] for row in NUMBERS], dtype=np.float32)[:, ::-1],
        read_only(),
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        torch.tensor(NUMBERS, dtype=torch.float64).requires_grad_(),
        torch.tensor(NUMBERS).T.contiguous().T,
    ],
    ids=lambda array: f"{type(array).__name__} {array.dtype}",
)
def test_every_table_of_real_numbers_is_taken(array):
    codes = as_codes(array)
    assert codes.dtype == torch.float32
    assert codes.tolist() == NUMBERS
    assert codes.is_contiguous()
    assert not codes.requires_grad
    assert codes.device.type == "cpu"


def test_a_read_only_array_is_not_written_through():
    array = read_only()
    as_codes(array).zero_()
    assert array.tolist() == NUMBERS


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (NUMBERS, "codes are a list; wanted a NumPy array or a tensor"),
        (None, "codes are a NoneType"),
        (np.array(NUMBERS, dtype=bool), "codes have dtype bool; wanted numbers"),
        (np.array(NUMBERS, dtype=complex), "codes have dtype complex128"),
        (np.array([["a", "b"]]), "codes have dtype <U1"),
        (np.array([[None, 1]]), "codes have dtype object"),
        (torch.tensor(NUMBERS, dtype=torch.complex64), "codes have dtype torch.complex64"),
        (torch.tensor(NUMBERS, dtype=torch.bool), "codes have dtype torch.bool"),
        (np.zeros(3), r"codes have shape \(3,\); wanted \(n, code_dim\), not empty"),
        (np.zeros((2, 3, 1)), r"codes have shape \(2, 3, 1\)"),
        (np.zeros((0, 3)), r"codes have shape \(0, 3\)"),
        (torch.zeros(3, 0), r"codes have shape \(3, 0\)"),
        (np.float32(3), "codes are a float32"),
    ],
)
def test_anything_else_is_refused(array, message):
    with pytest.raises(GlannError, match=message):
        as_codes(array)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_the_first_row_that_is_not_finite_is_named(bad, row, make):
    rows = [[0.0, 1.0] for _ in range(6)]
    rows[row][1] = rows[5][0] = bad
    array = make(rows, dtype=np.float64 if make is np.array else torch.float64)
    with pytest.raises(GlannError, match=f"not finite, first in row {row}$"):
        as_codes(array)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_codes_are_looked_through_a_part_at_a_time(rows, monkeypatch):
    monkeypatch.setattr("glann.codes.CHUNK", rows * 4 * 2)
    good = torch.arange(12.0).reshape(6, 2)
    assert as_codes(good) is not None
    for bad in range(6):
        codes = good.clone()
        codes[bad:, bad % 2] = float("nan")
        with pytest.raises(GlannError, match=f"not finite, first in row {bad}$"):
            as_codes(codes)


@given(st.lists(st.floats(2**-10, 1000, width=32), min_size=2, max_size=6), st.integers(1, 5))
def test_on_sphere_sees_norms_of_1(numbers, others):
    code = torch.tensor([numbers])
    code = code / code.norm()
    codes = code.expand(others, -1).clone()
    assert on_sphere(codes)
    assert on_sphere(codes.half())  # as a pipeline saved with --half has them
    codes[-1] *= 1.01
    assert not on_sphere(codes)
    assert not on_sphere(torch.zeros(others, 2))
