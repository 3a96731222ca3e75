"""Many processes, one training: which one this is, what is its share, what they tell each other.

    torchrun --nproc-per-node 2 -m glann train-glo mnist

A code belongs to one image, so codes and their optimiser's state are dealt out to the processes
with their images; of the networks every process has a copy, kept alike by DistributedDataParallel
(Li et al., arXiv 2006.15704).  Without torchrun there is one process, and nothing here has a cost.
"""

import gc
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from glann import storage


def start() -> None:
    """Meet the processes that torchrun started beside this one; nothing if it started none.

    Tensors on a CPU travel by gloo and those on GPUs by NCCL; each process takes one GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # DistributedDataParallel imports this module, whose functions keep the group of the moment as
    # a default: after `init_process_group` that would be ours, and `stop` could not end it.
    importlib.import_module("torch.distributed.nn.functional")
    # Long enough for the first to decode a large folder while the others wait.
    patience = timedelta(days=1)
    met = dist.rendezvous("env://", timeout=patience)  # type: ignore[attr-defined]
    store, its_rank, its_count = next(met)
    # torchrun keeps the store when it starts all processes again (--max-restarts): what those
    # before left there, their addresses, is not for these.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    store.set_timeout(patience)
    dist.init_process_group(
        backend, store=store, rank=its_rank, world_size=its_count, timeout=patience
    )
    if not is_first():
        storage.write_nothing()


def stop() -> None:
    """Take leave of the other processes, and end the threads that spoke to them.

    A thread that lives on until the interpreter ends may then drop a tensor, for which it is too
    late: the process aborts, its work done.
    """
    if dist.is_initialized():
        gc.collect()  # wrapped networks, which hold the group
        dist.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.barrier()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in each; in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(network: nn.Module) -> None:
    """Give all processes the first's weights and statistics, in place."""
    if count() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def is_first_to_say(text: str) -> bool:
    """Whether no other process has said this: what all of them find is to be read once."""
    if not dist.is_initialized():  # until they meet, all find the same
        return os.environ.get("RANK", "0") == "0"
    try:
        # torch has no public name for the store that they met at.
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add(ascii(text), 1) == 1)
    except RuntimeError:  # it has gone with its process
        return True


def tells_of_an_end(error: RuntimeError) -> bool:
    """Whether this is how gloo, or NCCL, takes it that another process is there no more."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return count() > 1 and any(each in str(error) for each in words)


def any_of(flags: list[bool]) -> list[bool]:
    """For each flag, whether any process raised it."""
    if count() == 1:
        return flags
    return [bool(votes) for votes in total(torch.tensor(flags, dtype=torch.int64)).tolist()]


class Share:
    """The items, of n, that belong to this process: rank, rank + count, rank + 2·count and so on.

    A table of them is `(len(share), …)`, and row k is item rank + count·k.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.items = slice(rank(), None, count())

    def __len__(self) -> int:
        return len(range(self.n)[self.items])

    def among(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of `rows`, int64 item numbers, belong to this process: bool."""
        return rows % count() == rank()

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of `rows`, int64 item numbers, that belong to this process."""
        return rows if count() == 1 else rows[self.among(rows)]

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of this process's tables that hold its items `rows`."""
        return rows if count() == 1 else rows // count()

    def first(self, table: torch.Tensor, n: int) -> torch.Tensor:
        """The rows of items 0 to n, put together from all processes' tables, in each of them."""
        n = min(n, self.n)
        if count() == 1:
            return table[:n]
        # Each fills in its rows and all are added up: adding zeros is exact.
        whole = table.new_zeros(n, *table.shape[1:])
        whole[self.items] = table[: len(whole[self.items])]
        return total(whole)

    def whole(self, table: torch.Tensor) -> torch.Tensor:
        """The rows of all items, in each process; on the CPU if there are several."""
        return table if count() == 1 else self.first(table.cpu(), self.n)


def by_parts(
    parts: Sequence[torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`make` of each part, one after the other, with the parts dealt out to the processes.

    All processes call it alike, and each gets all rows.  `make` gives one row for each row of a
    part, on the part's device.
    """
    share = Share(len(parts))
    made = [make(part) for part in parts[share.items]]
    if count() == 1:
        return torch.cat(made)
    lengths = [len(part) for part in parts]
    like = _shape_of_a_row(made)
    whole = torch.zeros(sum(lengths), *like[0], dtype=like[1], device=parts[0].device)
    for place, rows in zip(whole.split(lengths)[share.items], made, strict=True):
        place.copy_(rows)
    return total(whole)


def together(rows: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """All processes' rows, `(n, …)`, in each of them; gradients go back to whose row it is.

    Args:
        rows: this one's, `(k, …)`.
        own: which of all these are, bool `(n,)` with k of them; None: all.
    """
    if own is None or count() == 1:
        return rows
    whole = rows.new_zeros(len(own), *rows.shape[1:])
    found: torch.Tensor = _Total.apply(whole.masked_scatter(own[:, None], rows))
    return found


def _shape_of_a_row(made: list[torch.Tensor]) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype, which a process without a part learns from the first."""
    told = [(made[0].shape[1:], made[0].dtype) if made else None]
    dist.broadcast_object_list(told, 0)
    assert told[0] is not None
    return told[0]


def parallel(network: nn.Module) -> nn.Module:
    """The network as a training's step calls it: gradients become the sum of all processes'.

    Each process's loss is its part of the batch's mean; the parts, and so the gradients, add up.
    BatchNorm takes its statistics over the batches of all processes.  With one process it is the
    network itself.
    """
    if count() == 1:
        return network
    _synchronise(network)
    # BatchNorm's statistics are alike already: nothing to send.  torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    # Of a weight for one channel strides are not unique: its gradient is copied, which is little.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    wrapped = DistributedDataParallel(network, **options)
    wrapped.register_comm_hook(None, _add_up)
    return wrapped


def _add_up(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    sent: torch.futures.Future[Any] = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sent.then(lambda future: future.value()[0])


def _synchronise(network: nn.Module) -> None:
    for name, module in network.named_children():
        if isinstance(module, _BatchNorm) and not isinstance(module, SharedBatchNorm):
            setattr(network, name, SharedBatchNorm.of(module))
        else:
            _synchronise(module)


class SharedBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes together.

    Ioffe & Szegedy, arXiv 1502.03167, algorithm 1.  torch's own SyncBatchNorm knows GPUs only, and
    no process without an item in the batch.
    """

    @classmethod
    def of(cls, module: _BatchNorm) -> "SharedBatchNorm":
        """With the weights and statistics, the tensors themselves, of `module`."""
        shared = cls(module.num_features, module.eps, module.momentum)
        shared._parameters, shared._buffers = module._parameters, module._buffers
        return shared.train(module.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float `(n, features, …)`, n ≥ 0 → the same shape, normalised."""
        if not self.training:
            return super().forward(input)
        input = input.float()  # of bfloat16 no sums are taken
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        n = total(torch.tensor(float(input.numel() // input.shape[1]), device=input.device))
        mean = _Total.apply(input.sum(dims)) / n
        centred = input - mean.view(shape)
        variance = _Total.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised: torch.Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return normalised


class _Total(torch.autograd.Function):
    """The sum over processes; backwards, each gets the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return total(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient.clone())
