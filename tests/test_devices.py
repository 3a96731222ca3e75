import contextlib
from functools import partial

import pytest
import torch

from glann import GLANN, GLO, IMLE, GlannError
from glann.devices import Replayed, Rows, at_once, fast_products, upload

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "back", "message"),
    [
        (
            partial(torch.set_default_dtype, torch.float64),
            partial(torch.set_default_dtype, torch.float32),
            "default dtype is torch.float64; wanted torch.float32",
        ),
        (
            partial(torch.set_default_device, "meta"),
            partial(torch.set_default_device, None),
            "default device is meta; wanted cpu",
        ),
    ],
)
def test_other_defaults_of_torch_are_refused(change, back, message, digits, trained, tmp_path):
    trained.save(tmp_path)
    change()
    try:
        for call in (
            lambda: GLO().fit(digits),
            lambda: IMLE().fit(trained.codes),
            lambda: GLANN.load(tmp_path),
        ):
            with pytest.raises(GlannError, match=message):
                call()
    finally:
        back()


def test_a_step_is_called_as_it_is_on_a_cpu():
    calls = []
    step = Replayed(lambda *given: calls.append(given) or len(calls), CPU)
    rows = torch.arange(3)
    assert [step(rows, 0.5), step(rows, 2)] == [1, 2]
    assert calls[0][0] is rows
    assert [numbers for _, numbers in calls] == [0.5, 2]


@pytest.mark.parametrize("table", [torch.arange(12).view(4, 3), torch.rand(8, 2, 2)[::2]])
def test_rows_are_the_tables(table):
    rows = torch.tensor([3, 0, 3])
    of_table = Rows(table, CPU)
    assert torch.equal(of_table[rows], table[rows])
    assert torch.equal(of_table.found(of_table.sent(rows)), table[rows])


def test_nothing_is_copied_to_where_it_is():
    tensor = torch.rand(3)
    assert upload(tensor, CPU) is tensor


def test_works_give_their_results_in_order():
    done = []

    def work(number):
        done.append(number)
        return 10 * number

    works = (partial(work, number) for number in (1, 2, 3))
    assert at_once(CPU, *works) == [10, 20, 30]
    assert sorted(done) == [1, 2, 3]


@pytest.mark.parametrize("exact", [False, True])
def test_fast_products_are_over_afterwards(exact):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark

    before = flags()
    with contextlib.suppress(KeyError), fast_products(exact):
        assert flags() == (not exact, True)
        raise KeyError
    assert flags() == before
