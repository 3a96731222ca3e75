"""Each way of doing a piece of work in a process of its own, which waits for its turn.

So the peak memory is that way's own, one's state doesn't disturb another, and rounds of several
ways alternate: what else the machine does meets all of them alike.
"""

import multiprocessing
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from threadpoolctl import threadpool_limits

from glann.bench.rows import MACHINE, rows
from glann.bench.timing import Round
from glann.bench.ways import Way, sizes
from glann.errors import GlannError
from glann.training import peak_memory


@dataclass(frozen=True)
class Task:
    """A way, by what can be sent to another process.

    Attributes:
        row: number of the row; None: `way` is one of the machine's limits.
        way: its name.
        device, threads, quick: how it is done.
    """

    row: int | None
    way: str
    device: str
    threads: int
    quick: bool

    def find(self) -> Way:
        """The way itself."""
        if self.row is None:
            return MACHINE[self.way][1]
        return rows(sizes(torch.device(self.device), self.quick))[self.row].ways[self.way]


class Worker:
    """A process that has prepared a task; a context manager that ends it."""

    def __init__(self, task: Task) -> None:
        # Forked from a process that has only imported: it starts at once, holds nothing
        # but the libraries, and no thread or GPU is shared.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None
        context = multiprocessing.get_context(method or "spawn")
        if method:
            # torch imports its second half only when the first optimiser is made.
            context.set_forkserver_preload([__name__, "torch._dynamo"])
        self.task = task
        self._pipe, theirs = context.Pipe()
        # BaseContext knows no Process, though each of its kinds does.
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, task), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        self._answer()
        return self

    def round(self) -> Round:
        """One round of the work."""
        self._pipe.send(True)
        found = self._answer()
        assert isinstance(found, Round)
        return found

    def memory(self) -> int:
        """The most memory that it held, libraries included, in bytes; ends its work."""
        self._pipe.send(False)
        found = self._answer()
        assert isinstance(found, int)
        return found

    def _answer(self) -> object:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            found = f"its process ended with code {code}"
            if code == -9:  # SIGKILL
                found += ", killed, as it is when memory runs out"
        if isinstance(found, str):
            raise GlannError(f"'{self.task.way}' could not be measured: {found}")
        return found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, task: Task) -> None:
    """What the process does: prepare, then a round for each True."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which ends this
    torch.set_num_threads(task.threads)
    threadpool_limits(task.threads)  # of faiss and of the BLAS that scikit-learn uses
    try:
        measure = task.find()(sizes(torch.device(task.device), task.quick))
        pipe.send(None)
        while pipe.recv():
            pipe.send(measure())
        pipe.send(peak_memory())
    except (EOFError, BrokenPipeError):
        pass  # the benchmark was ended
    except (GlannError, MemoryError, RuntimeError) as error:
        pipe.send(str(error) or "out of memory")
