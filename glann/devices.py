"""Devices: which there are, in what precision they multiply, and how a GPU is kept busy.

A step of these networks is some hundred kernels of a few microseconds each, and Python takes longer
to launch them than a GPU to compute them.  So a GPU has the data at hand (`Rows`), is given what it
lacks without being waited for (`upload`), and replays steps as a whole (`Replayed`).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from glann import processes
from glann.errors import GlannError

PRECISIONS = ("auto", "float32", "bfloat16")

WARM_UP = 3
"""Steps of a shape that are run before one is recorded: libraries choose and allocate in them."""


def pick_device(name: str) -> torch.device:
    """The device called `name`: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.

    Refused while torch makes tensors of another kind, or elsewhere, than it does by itself.
    """
    dtype, default = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise GlannError(
            f"torch's default dtype is {dtype}; wanted torch.float32, which networks are made in: "
            "call torch.set_default_dtype(torch.float32) before"
        )
    if default.type != "cpu":
        raise GlannError(
            f"torch's default device is {default}; wanted cpu, where random numbers are drawn: "
            "call torch.set_default_device('cpu') before, and to compute there say "
            f"device='{default}'"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            available.append("mps")
        raise GlannError(
            f"device '{name}' is not on this machine; wanted auto or one of {', '.join(available)}"
        ) from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in: for auto, bfloat16 where the device is made for it.

    CPUs are if they have AMX or AVX512-BF16; others take longer over it than over float32.
    """
    if name not in PRECISIONS:
        raise GlannError(f"precision = {name!r} is unknown; wanted one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    made_for_it = False
    if device.type == "cuda":
        made_for_it = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        # torch has no public name for these yet.
        known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        made_for_it = any(getattr(torch.cpu, ask, bool)() for ask in known)
    return torch.bfloat16 if made_for_it else torch.float32


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Within it a network's matrix products are computed in `precision`; weights stay float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextlib.contextmanager
def fast_products(exact: bool = False) -> Iterator[None]:
    """Within it a GPU multiplies float32 by its tensor cores (TF32, 11 bits), unless `exact`.

    torch does so with convolutions anyway.  Of these the fastest way is tried out and taken.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.benchmark = not exact, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.benchmark = before


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a GPU goes on with what it has to do meanwhile."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def at_once(device: torch.device, *works: Callable[[], Any]) -> list[Any]:
    """The results of works that don't need each other's; a GPU does them beside each other."""
    if device.type != "cuda":
        return [work() for work in works]
    current = torch.cuda.current_stream(device)
    first, *others = works
    streams = [torch.cuda.Stream(device) for _ in others]
    results = []
    for stream, work in zip(streams, others, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(work())
    results.insert(0, first())
    for stream in streams:
        current.wait_stream(stream)
    return results


class Rows:
    """A table, `(n, …)`, whose rows are wanted on `device` batch by batch.

    A GPU keeps it all, if it takes no more than half of the memory that is free there.
    """

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        self.device = device
        there = device.type == "cuda" and table.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
        self.table = table.to(device) if there else table

    def sent(self, rows: torch.Tensor) -> torch.Tensor:
        """What a step is to be given for the rows with these numbers, int64 `(k,)` on the CPU."""
        return rows if self.table.is_cuda else self.table[rows]

    def found(self, sent: torch.Tensor) -> torch.Tensor:
        """The rows, `(k, …)` on the device, of what was sent."""
        sent = upload(sent, self.device)
        return self.table[sent] if self.table.is_cuda else sent

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, int64 `(k,)` on the CPU: `(k, …)` on the device."""
        return self.found(self.sent(rows))


class Replayed:
    """A training step, which a GPU replays as a CUDA graph: hundreds of launches become one.

    On other devices, and where several processes exchange gradients, it is called as it is.  On a
    GPU within `fast_products`, unless `exact`.

    The step takes tensors, which are brought to the device from wherever they are, and numbers, and
    gives tensors.  It must do the same with inputs of the same shapes, change in place what it
    leaves behind (weights, tables), and read no number back from the device.  What it gives is
    overwritten by its next call.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device, exact: bool = False) -> None:
        self.step = step
        self.device = device
        self.exact = exact
        self.replays = device.type == "cuda" and processes.count() == 1
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        if self.replays:
            # Recorded and warmed up on a stream of its own, as CUDA graphs want it; steps leave
            # nothing in the graphs' memory that another would miss, so they share it.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: torch.Tensor | float) -> Any:
        """What the step gives for these inputs."""
        if not self.replays:
            brought = [upload(x, self.device) if isinstance(x, torch.Tensor) else x for x in inputs]
            with fast_products(self.exact) if self.device.type == "cuda" else nullcontext():
                return self.step(*brought)
        shapes = tuple(x.shape if isinstance(x, torch.Tensor) else torch.Size() for x in inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = _Recording(inputs, self.device)
        recording = self._recordings[shapes]
        recording.take(inputs)
        if recording.graph is None:
            recording.warmed += 1
            if recording.warmed <= WARM_UP:
                return self._run(recording)
            recording.graph = torch.cuda.CUDAGraph()
            recorded = torch.cuda.graph(recording.graph, pool=self._pool, stream=self._stream)
            with fast_products(self.exact), recorded:
                recording.given = self.step(*recording.inputs)
        recording.graph.replay()
        return recording.given

    def _run(self, recording: "_Recording") -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with fast_products(self.exact), torch.cuda.stream(self._stream):
            given = self.step(*recording.inputs)
        current.wait_stream(self._stream)
        return given


class _Recording:
    """The inputs of one shape, in the places that a graph reads, and the graph once there is one.

    A number is in a tensor too, float32 `()`: a graph would know the first one for ever.  It is
    written when it changes.
    """

    def __init__(self, inputs: tuple[torch.Tensor | float, ...], device: torch.device) -> None:
        self.inputs = [
            torch.empty_like(x, device=device)
            if isinstance(x, torch.Tensor)
            else torch.zeros((), device=device)
            for x in inputs
        ]
        self.numbers: list[float | None] = [None] * len(inputs)
        self.warmed = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Any = None

    def take(self, inputs: tuple[torch.Tensor | float, ...]) -> None:
        """Put new inputs into their places."""
        for i, (place, x) in enumerate(zip(self.inputs, inputs, strict=True)):
            if isinstance(x, torch.Tensor):
                place.copy_(x.pin_memory() if x.device.type == "cpu" else x, non_blocking=True)
            elif x != self.numbers[i]:
                place.fill_(x)
                self.numbers[i] = x
