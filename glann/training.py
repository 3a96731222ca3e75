"""What every training loop shares: batches, schedule, progress, log, checkpoint, resume.

A method owns its loop and its step; this module counts, logs and saves:

    with Training("glo", batches, folder, identity, progress) as training:
        saved = training.resume()             # None at the start
        for step, rows in training.steps(seed):
            ...                               # the method's own step
            training.record(loss, lr=lr)
            if training.checkpoint_due:
                training.save({"generator": generator.state_dict(), ...})
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from glann import processes, storage
from glann.errors import GlannError, NotFinite
from glann.images import write_png
from glann.randomness import permutation

CHECKPOINT_SECONDS = 60.0
"""Time between checkpoints.  What a run ends with doesn't depend on when they are written."""

LOG_STEPS = 100
"""Steps between two lines of the log, at the most."""

ASK_STEPS = 10
"""Steps after which several processes ask each other whether one wants to save or to stop."""

PICTURES = 10
"""Moments of a run, evenly spread, at which progress is shown; the last is its end."""

CROWDED = 20.0
"""Times a second that a thread has to leave its core to other work, from which it is said so."""

SHOWN = ("reconstructions", "samples")
"""What these pictures are of."""

SNAPSHOT = 1000
"""Samples kept of such a moment, from which scores against time are computed afterwards."""

Parts = dict[str, dict[str, torch.Tensor]]

learning = torch.inference_mode(False)
"""Decorates what learns: it has gradients, even if it is called within torch.no_grad()."""


class Interrupted(GlannError):
    """Training was stopped by Ctrl-C or a signal, after saving."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """How `epochs` passes over n items are cut into steps.

    Batches are as equal as can be and at most `batch_size`: every item counts in every epoch, and
    no runt of a last batch disturbs BatchNorm.
    """

    n: int
    batch_size: int
    epochs: float

    def __post_init__(self) -> None:
        if self.n < 2:
            raise GlannError(f"items to learn from: {self.n}; wanted 2 or more")
        if self.n // self.per_epoch < 2:
            raise GlannError(
                f"{self.n} items in batches of at most {self.batch_size} leave one of a single "
                "item, which BatchNorm can't normalise; set batch_size to 3 or more"
            )

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.n / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, round(self.per_epoch * self.epochs))

    @property
    def items(self) -> int:
        """Items seen in all, each as often as it is."""
        whole, rest = divmod(self.steps, self.per_epoch)
        smaller, larger = divmod(self.n, self.per_epoch)  # tensor_split's larger batches go first
        return whole * self.n + rest * smaller + min(rest, larger)

    def epoch_of(self, seed: int, epoch: int) -> list[torch.Tensor]:
        """The rows of each batch of an epoch, int64, in an order that depends on (seed, epoch)."""
        order = permutation(seed, "order", epoch, self.n)
        return list(order.tensor_split(self.per_epoch))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes: the GPU's where one is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def cores_left() -> int:
    """Times that this process's threads had to leave a core to others so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Training:
    """Counts, logs and saves one training; a context manager around a method's loop.

    Args:
        name: the stage, for people: "glo".
        batches: how the steps are cut.
        folder: where log, pictures and checkpoint go; None keeps nothing.
        identity: what must be the same for a checkpoint to be resumed: settings, seed, data.
        progress: show a bar (on a terminal) or lines (elsewhere) on standard error.
    """

    def __init__(
        self,
        name: str,
        batches: Batches,
        folder: str | Path | None,
        identity: dict[str, Any],
        progress: bool,
    ) -> None:
        self.name = name
        self.batches = batches
        self.folder = None if folder is None else Path(folder)
        self.identity = identity
        self.progress = progress and processes.is_first()
        self.step = 0
        self._saved_step = 0  # nothing is lost of what is not begun
        self._every = 1 if processes.count() == 1 else ASK_STEPS
        self._save_seconds = 0.0
        self.done = False
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._loss_sum: torch.Tensor | float = 0.0
        self._loss_count = 0
        self._lr = 0.0
        self._steps_began, self._left_before = 0.0, 0
        self._looked_round = False
        self._asked: str | None = None  # to stop, by this signal
        self._stop: str | None = None  # what all processes agreed on
        self._bar: tqdm | None = None

    def __enter__(self) -> "Training":
        self._began = self._saved_at = self._logged_at = self._printed_at = time.monotonic()
        self._cpu_began = time.process_time()
        torch.set_flush_denormal(True)  # Adam's small moments are denormals, which CPUs crawl on
        self._handlers = {}
        if self.folder and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        torch.set_flush_denormal(False)
        if self._bar is not None:
            self._bar.close()
        if kind is None and self._asked:  # in the last step: what comes next is not begun
            self._stop = self._asked
            raise self._interrupted()

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        # The step under way is finished first: half a step can't be resumed bit for bit.
        self._asked = signal.Signals(number).name
        signal.signal(number, self._handlers[signal.Signals(number)])  # a second one doesn't wait
        if self.progress:
            tqdm.write(f"{self._asked}: saving after this step …", file=sys.stderr)

    # ------------------------------------------------------------------ resume and save

    def refuse_another(self) -> None:
        """GlannError if the folder's checkpoint is of other settings, another seed or other data.

        `resume` asks for it; to be called before that where there is other work to do first.
        """
        if self.folder is None or not storage.is_saved(self.folder):
            return
        manifest = storage.read_manifest(self.folder, self.name)
        for what, wanted in self.identity.items():
            found = manifest["identity"].get(what)
            if found != wanted:
                raise GlannError(
                    f"{self.folder} was trained with different {what} "
                    f"({_difference(found, wanted)}); use the same again or another folder, or "
                    "begin anew: delete this one, on the command line by --restart"
                )

    def resume(self) -> Parts | None:
        """The parts of the last checkpoint, or None if there is none; see `refuse_another`."""
        if self.folder is None:
            return None
        if not storage.is_saved(self.folder):
            self._trim()
            return None
        self.refuse_another()
        manifest, parts = storage.load(self.folder, self.name)
        self.step, self.done = manifest["step"], manifest["done"]
        self._saved_step = self.step
        self.seconds, self.cpu_seconds = manifest["seconds"], manifest.get("cpu_seconds", 0.0)
        self._loss_sum = manifest["loss_sum"] if processes.is_first() else 0.0
        self._loss_count = manifest["loss_count"]
        if not self.done:
            self._trim()
        return parts

    @property
    def checkpoint_due(self) -> bool:
        """Whether the loop is to save now: it is time, or it was asked to stop."""
        if self.folder is None or self.step == self.batches.steps or self.step % self._every:
            return False
        # A tenth of the time goes into checkpoints at the most, however large they are.
        wait = CHECKPOINT_SECONDS * max(1.0, 10 * self._save_seconds / 60)
        late = time.monotonic() - self._saved_at >= wait
        due, asked = processes.any_of([late, self._asked is not None])
        if asked:
            self._stop = self._asked or "another process"
        return due or asked

    def save(self, parts: Parts, done: bool = False, **more: Any) -> None:
        """Write a checkpoint; with `done`, what the stage ends with. `more` goes into its manifest.

        Refused while the loss is not finite, so that the last good checkpoint stays.
        """
        loss_sum = self._finite_loss_sum()
        self.seconds, self._began = self.elapsed, time.monotonic()
        now = time.process_time()  # of all threads: other work on the machine doesn't add to it
        self.cpu_seconds, self._cpu_began = self.cpu_seconds + now - self._cpu_began, now
        self.done = done
        if self.folder is not None:
            content = {
                "identity": self.identity,
                "step": self.step,
                "steps": self.batches.steps,
                "items": self.batches.items,
                "done": done,
                "seconds": round(self.seconds, 3),
                "cpu_seconds": round(self.cpu_seconds, 3),
                "loss_sum": loss_sum,
                "loss_count": self._loss_count,
                **more,
            }
            storage.save(self.folder, self.name, content, parts)
        processes.wait()  # what is read next, by any of them, is there
        self._save_seconds = time.monotonic() - self._began
        self._saved_at, self._saved_step = time.monotonic(), self.step

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds + (0 if self.done else time.monotonic() - self._began)

    # ------------------------------------------------------------------ steps

    def steps(self, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The steps that are left, each with the rows of its batch (int64, on the CPU)."""
        batches = self.batches
        self._bar = tqdm(
            total=batches.items,
            initial=self.step * batches.n // batches.per_epoch,
            desc=self.name,
            unit="code" if self.name == "imle" else "img",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not self.progress or not sys.stderr.isatty(),
        )
        self._steps_began, self._left_before = time.monotonic(), cores_left()
        epoch_rows: list[torch.Tensor] = []
        while self.step < batches.steps:
            # A signal that came after `checkpoint_due` was asked waits for one more step.
            if self._stop and self._saved_step == self.step:
                raise self._interrupted()
            epoch, position = divmod(self.step, batches.per_epoch)
            if not epoch_rows or position == 0:
                epoch_rows = batches.epoch_of(seed, epoch)
            self._rows = len(epoch_rows[position])
            self.step += 1
            yield self.step - 1, epoch_rows[position]

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped by {self._stop} at step {self.step} of {self.batches.steps}; saved in "
            f"{self.folder}. The same command goes on from there"
        )

    def record(self, loss: torch.Tensor, lr: float, **more: torch.Tensor | float) -> None:
        """Count a step with its batch's mean loss (a scalar that is not read yet).

        With several processes each gives its part of the mean: they add up.
        """
        self._loss_sum = self._loss_sum + loss.detach() * self._rows
        self._loss_count += self._rows
        if self._bar is not None:
            self._bar.update(self._rows)
        at_interval = self.step % self.batches.per_epoch % LOG_STEPS == 0
        if at_interval or self.step == self.batches.steps:
            self._log(lr, more)

    def _finite_loss_sum(self) -> float:
        mine = torch.tensor(float(self._loss_sum), dtype=torch.float64)
        loss_sum = float(processes.total(mine))
        if not math.isfinite(loss_sum):
            kept = ""
            if self.folder is not None and storage.is_saved(self.folder):
                kept = f" {self.folder} keeps the last checkpoint before it."
            raise NotFinite(
                f"the loss of {self.name} is not finite around step {self.step}.{kept} Try a "
                "lower learning rate, a larger batch_size, or look for broken data"
            )
        return loss_sum

    def _log(self, lr: float, more: dict[str, torch.Tensor | float]) -> None:
        loss_sum = self._finite_loss_sum()
        now = time.monotonic()
        rate = self._loss_count / max(1e-9, now - self._logged_at)
        line = {
            "step": self.step,
            "epoch": round(self.step / self.batches.per_epoch, 3),
            "items": self.step * self.batches.n // self.batches.per_epoch,
            "loss": loss_sum / self._loss_count,
            "lr": lr,
            "items_per_second": round(rate, 1),
            "seconds": round(self.elapsed, 2),
            "peak_memory_bytes": peak_memory(),
            **{name: float(value) for name, value in more.items()},
        }
        self._loss_sum, self._loss_count, self._logged_at = 0.0, 0, now
        if self.folder is not None and processes.is_first():
            self._append_log(line)
        shown = {name: f"{line[name]:.4f}" for name in ("loss", *more)}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        is_last = self.step == self.batches.steps
        if self.progress and not sys.stderr.isatty() and (is_last or now - self._printed_at > 10):
            self._printed_at = now
            tqdm.write(
                f"{self.name:4}  step {self.step:>7}/{self.batches.steps}"
                f"  epoch {line['epoch']:>7.2f}/{self.batches.epochs:.4g}  "
                + "".join(f"{name.replace('_', ' ')} {value}  " for name, value in shown.items())
                + f"lr {lr:.1e}  {rate:>8,.0f}/s  {line['seconds']:>6.0f} s"
                f"  {line['peak_memory_bytes'] / 2**20:>6,.0f} MB",
                file=sys.stderr,
            )
        if self.progress and not self._looked_round and now - self._steps_began > 10:
            self._look_round(now - self._steps_began)

    def _look_round(self, seconds: float) -> None:
        """Say so, once, if other work keeps the cores busy.

        Threads wait for each other many times a step.  Where one has to wait for a core, all do,
        and steps of small networks take ten times as long as by a single thread.
        """
        self._looked_round = True
        threads = torch.get_num_threads()
        left = (cores_left() - self._left_before) / seconds / threads
        if threads > 1 and left > CROWDED:
            tqdm.write(
                f"note  other work keeps the cores busy: each of {threads} threads had to leave "
                f"its core {left:.0f} times a second. With OMP_NUM_THREADS=1 in the environment it "
                "may be much faster: stop with Ctrl-C, and the same command goes on",
                file=sys.stderr,
            )

    # ------------------------------------------------------------------ log and pictures

    def _append_log(self, line: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise GlannError(
                f"{path} can't be written: {error.strerror or error}. Free some space, then run "
                "the same command again: it goes on from the last checkpoint"
            ) from error

    def _trim(self) -> None:
        """Drop what was logged and shown after the checkpoint: those steps are done again."""
        assert self.folder is not None
        path = self.folder / "log.jsonl"
        if not path.is_file():
            return
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a half-written line
                if json.loads(text)["step"] <= self.step:
                    kept.append(text)
        storage.write_text(path, "".join(text + "\n" for text in kept))
        shown = (self.folder.glob(f"{name}-*.png") for name in SHOWN)
        later = itertools.chain(*shown, (self.folder / "snapshots").glob("*.npz"))
        for path in later if processes.is_first() else ():
            step = path.stem.rpartition("-")[2]
            if step.isdecimal() and int(step) > self.step:
                path.unlink(missing_ok=True)

    @property
    def picture_due(self) -> bool:
        """Whether the loop is to show its progress now: PICTURES times, the last at the end."""
        now, before = (PICTURES * step // self.batches.steps for step in (self.step, self.step - 1))
        return self.folder is not None and now > before

    def picture(self, name: str, image: torch.Tensor) -> None:
        """Write a uint8 image `(c, h, w)` as `NAME-STEP.png` into the folder."""
        assert self.folder is not None
        write_png(image, self.folder / f"{name}-{self._step_name()}.png")

    def snapshot(self, samples: torch.Tensor) -> None:
        """Keep samples of this moment, SNAPSHOT images (uint8) or codes, with step and seconds."""
        assert self.folder is not None
        path = self.folder / "snapshots" / f"{self._step_name()}.npz"
        seconds = self.elapsed

        def write(file: IO[bytes]) -> None:
            np.savez_compressed(file, samples=samples.numpy(), step=self.step, seconds=seconds)

        storage.write_atomically(path, write)

    def _step_name(self) -> str:
        return f"{self.step:0{len(str(self.batches.steps))}d}"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a sampler gave at a moment of its training: uint8 images or float codes."""

    samples: torch.Tensor
    step: int
    seconds: float


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots that a training left in its folder, in order."""
    found = []
    for path in sorted((folder / "snapshots").glob("*.npz")):
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
                samples = torch.from_numpy(content["samples"])
                found.append(Snapshot(samples, int(content["step"]), float(content["seconds"])))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GlannError(f"{path} can't be read: {error}; delete it to go on") from error
    return found


def _difference(found: Any, wanted: Any) -> str:
    """What differs between two identities, in a few words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        return "; ".join(f"{key}: then {found.get(key)!r}, now {wanted.get(key)!r}" for key in keys)
    pairs = zip(str(found).split(), str(wanted).split(), strict=False)  # of one or several data
    then, now = next((pair for pair in pairs if pair[0] != pair[1]), (str(found), str(wanted)))
    return f"then {then[:16]}, now {now[:16]}"
