"""Carries out a study: its runs in parallel processes, each row kept as it comes.

runs/study-NAME/
recipe.toml  environment.json               what ran, on what
rows/KEY.json                               the done mark of a run, and what it gave
results.json  pictures/  section.html  report.html
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from glann import storage
from glann.devices import pick_device
from glann.errors import GlannError, NotFinite
from glann.report.studies import write_section
from glann.runner import environment
from glann.settings import as_dict
from glann.studies.study import Place, Row, Run, Study, to_toml
from glann.training import Interrupted

Say = Callable[[str], object]


def carry_out(
    study: Study,
    settings: Any,
    folder: Path,
    *,
    command: str = "",
    jobs: int | None = None,
    data: str | None = None,
    device: str = "auto",
    restart: bool = False,
    say: Say = lambda text: None,
) -> Path:
    """Make the rows that are missing, then write results.json and the report.

    Args:
        study: which one.
        settings: of its class, see `load_settings`.
        folder: the study's run folder.
        command: what the user typed, for the report.
        jobs: runs at a time, each in its process; None: as many as the machine has cores.
        data: where images are, if not where recipes or the defaults say.
        device: "auto", "cpu", "cuda", …
        restart: delete all rows and trainings of this folder first.
        say: called with a line of news for the user.

    Returns:
        The path of the page with the sections of all studies.

    Raises:
        GlannError: something that a run was given can't be used; Interrupted after Ctrl-C.
    """
    runs = study.runs(settings)
    if len({run.key for run in runs}) < len(runs):
        raise ValueError(f"the study {study.name} has two runs of one key")
    if restart:
        for part in ("rows", "pictures", "training"):
            shutil.rmtree(folder / part, ignore_errors=True)
    place = Place(folder, folder.parent, data, str(pick_device(device)))
    # Once, before any run: what a recipe says when they end may be no longer what they read.
    digests = {run.key: run.digest(study, data) for run in runs}
    missing = [run for run in runs if _kept(run, digests[run.key], folder) is None]
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(missing)))
    about = {
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {**environment(place.device), "jobs": jobs},
    }
    storage.write_text(folder / "recipe.toml", to_toml(settings))
    storage.write_json(folder / "environment.json", about)
    say(f"study     {study.name}: {study.claim}")
    done = len(runs) - len(missing)
    say(f"run       {folder}: {len(runs)} runs, {done} done, {jobs} at a time on {place.device}")
    began = time.monotonic()
    try:
        with contextlib.closing(_rows(missing, place, jobs)) as finished:
            for number, (run, rows, seconds) in enumerate(finished, start=1):
                content = {"digest": digests[run.key], "seconds": seconds, "rows": rows}
                storage.write_json(_file(run, folder), content)
                left = (time.monotonic() - began) / number * (len(missing) - number)
                failed = "".join(f", failed: {row['failed']}" for row in rows if "failed" in row)
                say(
                    f"{done + number:4} of {len(runs)}  {run.key:30} {seconds:6.0f} s, "
                    f"about {left / 60:.0f} min left{failed}"
                )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the runs that are done are kept in {folder / 'rows'}. The same command goes "
            "on from there"
        ) from None
    rows = [
        {"key": run.key, **run.arguments, **row}
        for run in runs
        for row in _kept(run, digests[run.key], folder) or []
    ]
    results = {"study": study.name, "claim": study.claim, **about, "settings": as_dict(settings)}
    storage.write_json(folder / "results.json", {**results, "rows": rows})
    return write_section(study.section(settings, rows, folder), results, folder)


def _file(run: Run, folder: Path) -> Path:
    return folder / "rows" / f"{run.key}.json"


def _kept(run: Run, digest: str, folder: Path) -> list[Row] | None:
    """The rows of a run that is done; None if it isn't, or was done with something else."""
    path = _file(run, folder)
    if not path.is_file():
        return None
    content = storage.read_json(path)
    if not isinstance(content, dict) or content.get("digest") != digest:
        return None
    rows: list[Row] = content["rows"]
    return rows


def _rows(
    runs: Sequence[Run], place: Place, jobs: int
) -> Generator[tuple[Run, list[Row], float], None, None]:
    """Carry out runs, `jobs` at a time; each with its rows and seconds, as they are done."""
    if jobs == 1:
        for run in runs:
            yield run, *_carry_out(run, place)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Not forked: a copy of torch's threads that are at work would hang.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, context, _start, (threads,))
    before = signal.signal(signal.SIGTERM, _stop) if _in_main_thread() else None
    try:
        waiting = {executor.submit(_carry_out, run, place): run for run in runs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), *future.result()
        executor.shutdown()  # they end by themselves, and leave nothing behind
    except BrokenProcessPool as error:
        raise GlannError(
            f"a process of the study ended by itself, perhaps for want of memory; what is done is "
            f"kept in {place.folder}. Try fewer at a time: --jobs {max(1, jobs // 2)}"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _carry_out(run: Run, place: Place) -> tuple[list[Row], float]:
    began = time.monotonic()
    try:
        made = run.function(dataclasses.replace(place, key=run.key), **run.arguments)
    except NotFinite as error:
        made = {"failed": str(error)}
    seconds = round(time.monotonic() - began, 3)
    return made if isinstance(made, list) else [made], seconds


def _start(threads: int) -> None:
    """Begin a process that carries out runs: it ends with the study, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the study stops this one
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
