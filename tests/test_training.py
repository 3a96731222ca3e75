import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glann import storage, training
from glann.devices import pick_device, pick_precision
from glann.errors import GlannError, NotFinite
from glann.images import read_image
from glann.optimisers import (
    adam,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_learning_rate,
)
from glann.training import Batches, Interrupted, Training, read_snapshots

# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("amx", "avx512", "wanted"),
    [(True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_half_precision_only_where_the_processor_is_made_for_it(monkeypatch, amx, avx512, wanted):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) is getattr(torch, wanted)
    assert pick_precision("float32", cpu) is torch.float32
    assert pick_precision("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(GlannError, match="precision = 'half' is unknown"):
        pick_precision("half", cpu)


# ---------------------------------------------------------------------- batches


@given(data=st.data(), n=st.integers(2, 400), seed=st.integers(0, 5), epoch=st.integers(0, 9))
@settings(deadline=None)
def test_an_epoch_has_every_item_once_in_batches_of_nearly_one_size(data, n, seed, epoch):
    batch_size = data.draw(st.integers(3, n) if n > 2 else st.just(2))
    batches = Batches(n, batch_size, epochs=3)
    parts = batches.epoch_of(seed, epoch)
    assert torch.cat(parts).sort().values.tolist() == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2  # of one item BatchNorm makes nothing
    assert len(parts) == batches.per_epoch == math.ceil(n / batch_size)
    assert batches.steps == 3 * batches.per_epoch


def test_the_order_depends_on_seed_and_epoch_alone():
    batches = Batches(100, 32, 5)
    orders = [
        torch.cat(batches.epoch_of(seed, epoch)).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert torch.cat(Batches(100, 100, 2).epoch_of(1, 1)).tolist() == orders[3]


def test_steps_go_through_each_epoch_in_its_own_order():
    batches = Batches(10, 3, 3)
    with Training("toy", batches, None, {}, False) as running:
        steps = [(step, rows.tolist()) for step, rows in running.steps(5)]
    epochs = [batches.epoch_of(5, epoch) for epoch in range(3)]
    assert steps == list(enumerate(rows.tolist() for epoch in epochs for rows in epoch))


def test_fewer_items_than_a_batch_are_one():
    batches = Batches(5, 128, 3)
    assert [part.sort().values.tolist() for part in batches.epoch_of(0, 0)] == [list(range(5))]
    assert (batches.per_epoch, batches.steps, batches.items) == (1, 3, 15)


@pytest.mark.parametrize("n", [0, 1])
def test_one_item_teaches_nothing(n):
    with pytest.raises(GlannError, match=f"items to learn from: {n}; wanted 2 or more"):
        Batches(n, 128, 1)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "gpu", ""):
        with pytest.raises(GlannError, match=f"device '{name}' is not on this machine; .* cpu"):
            pick_device(name)


# ---------------------------------------------------------------------- a method to be trained

N = 10
EPOCHS = 4
STEPS = 16  # batches of 3, 3, 2, 2


def method(
    folder: Path | None,
    at_step: Callable[[int], None] = lambda step: None,
    *,
    identity: dict[str, Any] | None = None,
    seed: int = 0,
    epochs: float = EPOCHS,
    loss_of: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, loss: loss,
    after_step: Callable[[Training], None] = lambda running: None,
    progress: bool = False,
) -> tuple[torch.Tensor, list[float]]:
    """As GLO and IMLE do it: Adam on Σ (w − x_i)²; gives w and the losses of the steps."""
    data = torch.linspace(-1, 2, N)
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(network.weight)
    optimiser = adam(network, 0.1)
    losses = []
    identity = {"settings": {"epochs": epochs}, "seed": seed} if identity is None else identity
    with Training("toy", Batches(N, 3, epochs), folder, identity, progress) as running:
        saved = running.resume()
        if saved:
            network.load_state_dict(saved["network"])
        if not running.done:
            if saved:
                load_optimiser_state(optimiser, saved["optimiser"])
            for step, rows in running.steps(seed):
                lr = learning_rate("cosine", 0.1, step, running.batches.steps)
                set_learning_rate(optimiser, lr)
                at_step(step)
                loss = loss_of(step, (network.weight - data[rows]).square().mean())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                running.record(loss, lr=lr)
                if running.picture_due:
                    running.picture("weight", torch.zeros(1, 8, 8, dtype=torch.uint8))
                if running.checkpoint_due:
                    running.save(
                        {"network": network.state_dict(), "optimiser": optimiser_state(optimiser)}
                    )
                after_step(running)
            running.save({"network": network.state_dict()}, done=True)
    return network.weight.detach(), losses


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is carried out."""


def kill_at(*steps: int) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step in steps:
            raise Killed

    return at_step


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("items_per_second", "seconds", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after, and log, every step."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "LOG_STEPS", 1)


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("log_steps", [1, 100])
@pytest.mark.parametrize("step", [1, 3, 4, 5, 10, 15])
def test_a_killed_training_ends_as_a_straight_one(step, log_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "LOG_STEPS", log_steps)
    wanted, losses = method(tmp_path / "straight")
    with pytest.raises(Killed):
        method(tmp_path / "killed", kill_at(step))
    result, losses_after = method(tmp_path / "killed")
    assert torch.equal(result, wanted)
    assert losses_after == losses[step:]
    logs = [without_times(log_of(tmp_path / name)) for name in ("straight", "killed")]
    assert logs[0] == logs[1]


def test_how_often_it_is_saved_does_not_matter(tmp_path, monkeypatch):
    straight, _ = method(tmp_path / "a")
    nowhere, _ = method(None)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    often, _ = method(tmp_path / "b")
    assert torch.equal(straight, nowhere)
    assert torch.equal(straight, often)


def test_the_last_step_is_logged_wherever_in_an_epoch_it_is(tmp_path):
    method(tmp_path, epochs=1.5)
    assert [line["step"] for line in log_of(tmp_path)] == [4, 6]


def test_lines_of_the_log_without_a_checkpoint_are_trimmed(tmp_path):
    with pytest.raises(Killed):
        method(tmp_path, kill_at(9))
    assert [line["step"] for line in log_of(tmp_path)] == [4, 8]
    method(tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [4, 8, 12, 16]


def test_what_a_lost_training_showed_is_not_taken_for_the_next_ones(tmp_path):
    """Its steps would be points of a curve of scores against time, its last picture the end's."""
    stale = ("snapshots/104.npz", "samples-104.png", "reconstructions-104.png")
    others = ("samples.png", "holiday-104.png")
    for trained in (False, True):
        folder = tmp_path / str(trained)
        (folder / "snapshots").mkdir(parents=True)
        for name in (*stale, *others):
            (folder / name).write_bytes(b"of before")
        if trained:
            (folder / "log.jsonl").write_text('{"step": 104}\n')
        method(folder)
        # Of a folder in which nothing was trained they are somebody's own.
        assert [(folder / name).exists() for name in stale] == 3 * [not trained]
        assert all((folder / name).exists() for name in others)


def test_lines_of_the_log_after_the_checkpoint_are_trimmed(tmp_path, monkeypatch, every_step):
    method(tmp_path / "straight")

    def stop_saving(running: Training) -> None:
        if running.step == 6:
            monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e9)

    with pytest.raises(Killed):
        method(tmp_path / "killed", kill_at(11), after_step=stop_saving)
    assert storage.read_manifest(tmp_path / "killed")["step"] == 6
    assert len(log_of(tmp_path / "killed")) == 11
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the disk was full, say

    method(tmp_path / "killed")
    logs = [without_times(log_of(tmp_path / name)) for name in ("straight", "killed")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1]] == list(range(1, STEPS + 1))


def test_a_finished_training_is_not_trained_again(tmp_path):
    wanted, _ = method(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    seconds = storage.read_manifest(tmp_path)["seconds"]
    with Training("toy", Batches(N, 3, EPOCHS), tmp_path, {}, False) as running:
        parts = running.resume()
        assert running.done
        assert running.elapsed == seconds
    assert torch.equal(parts["network"]["weight"], wanted)
    result, losses = method(tmp_path, kill_at(*range(STEPS)))
    assert losses == []
    assert torch.equal(result, wanted)
    assert torch.equal(storage.load(tmp_path, "toy")[1]["network"]["weight"], wanted)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.keys() == files.keys()


def test_seconds_before_a_resume_count(tmp_path, every_step):
    with pytest.raises(Killed):
        method(tmp_path, kill_at(8))
    manifest = storage.read_manifest(tmp_path)
    manifest |= {"seconds": 1000.0, "cpu_seconds": 500.0}
    storage.write_json(tmp_path / "manifest.json", manifest)
    method(tmp_path)
    manifest = storage.read_manifest(tmp_path)
    assert 1000 <= manifest["seconds"] < 1100
    assert 500 <= manifest["cpu_seconds"] < 600
    assert log_of(tmp_path)[-1]["seconds"] >= 1000


@pytest.mark.parametrize(("takes", "due"), [(0, 60), (6, 60), (30, 300)])
def test_large_checkpoints_are_written_less_often(tmp_path, monkeypatch, takes, due):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])

    def save(*_):
        now[0] += takes

    monkeypatch.setattr(training.storage, "save", save)
    with Training("glo", Batches(20, 5, 10), tmp_path, {}, False) as run:
        run.save({})
        began = now[0]
        now[0] = began + due - 1
        assert not run.checkpoint_due
        now[0] = began + due
        assert run.checkpoint_due


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"settings": {"epochs": 5, "lr": 0.1}, "seed": 0, "data": "a" * 64},
            r"trained with different settings \(epochs: then 4, now 5\); use the same again",
        ),
        (
            {"settings": {"epochs": 5, "lr": 0.2}, "seed": 0, "data": "a" * 64},
            r"\(epochs: then 4, now 5; lr: then 0.1, now 0.2\)",
        ),
        (
            {"settings": {"epochs": 4}, "seed": 0, "data": "a" * 64},
            r"\(lr: then 0.1, now None\)",
        ),
        (
            {"settings": {"epochs": 4, "lr": 0.1}, "seed": 1, "data": "a" * 64},
            r"different seed \(then 0, now 1\)",
        ),
        (
            {"settings": {"epochs": 4, "lr": 0.1}, "seed": 0, "data": "b" * 64},
            r"different data \(then a{16}, now b{16}\)",
        ),
        ({"other": 1}, r"different other \(then None, now 1\)"),
    ],
)
def test_another_identity_is_refused_by_name(done, now, message, tmp_path, every_step):
    then = {"settings": {"epochs": 4, "lr": 0.1}, "seed": 0, "data": "a" * 64}
    if done:
        method(tmp_path, identity=then)
    else:
        with pytest.raises(Killed):
            method(tmp_path, kill_at(6), identity=then)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(GlannError, match=message) as caught:
        method(tmp_path, identity=now)
    assert str(caught.value).startswith(str(tmp_path))
    assert "--restart" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    method(tmp_path, identity=then)  # and the right one goes on


def test_a_folder_of_another_stage_is_refused(tmp_path):
    storage.save(tmp_path, "imle", {}, {})
    with pytest.raises(GlannError, match="holds 'imle'; wanted 'toy'"):
        method(tmp_path)


# ---------------------------------------------------------------------- not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_that_is_not_finite_stops_the_training(bad, folder, tmp_path, every_step):
    path = tmp_path if folder else None
    with pytest.raises(NotFinite, match="the loss of toy is not finite around step 10") as caught:
        method(path, loss_of=lambda step, loss: loss * (bad if step == 9 else 1))
    assert "lower learning rate" in str(caught.value)
    assert (f"{tmp_path} keeps the last checkpoint" in str(caught.value)) == folder
    if folder:
        manifest, parts = storage.load(tmp_path, "toy")
        assert manifest["step"] == 9
        assert all(t.isfinite().all() for part in parts.values() for t in part.values())
        assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path))


def test_no_checkpoint_is_written_between_a_bad_loss_and_the_log(tmp_path, monkeypatch):
    """The loss isn't read at every step; saving reads it."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(NotFinite, match="not finite around step 6"):
        method(tmp_path, loss_of=lambda step, loss: loss * (math.nan if step == 5 else 1))
    assert storage.read_manifest(tmp_path)["step"] == 5


def test_a_bad_loss_before_the_first_checkpoint(tmp_path):
    with pytest.raises(GlannError) as caught:
        method(tmp_path, loss_of=lambda step, loss: loss * math.nan)
    assert "keeps" not in str(caught.value)
    assert not storage.is_saved(tmp_path)


# ---------------------------------------------------------------------- stopped by a signal

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)


def handlers() -> tuple[Any, Any]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def send_at(step: int, number: int) -> Callable[[int], None]:
    def at_step(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return at_step


@SIGNALS
@pytest.mark.parametrize("step", [0, 4, 7, 14])
def test_a_signal_saves_and_stops_and_the_same_call_goes_on(number, step, tmp_path):
    before = handlers()
    wanted, losses = method(None)
    with pytest.raises(Interrupted, match=rf"by {number.name} at step {step + 1} of 16; saved in"):
        method(tmp_path, send_at(step, number))
    assert handlers() == before
    manifest = storage.read_manifest(tmp_path)
    assert (manifest["step"], manifest["steps"], manifest["done"]) == (step + 1, STEPS, False)
    result, losses_after = method(tmp_path)
    assert torch.equal(result, wanted)
    assert losses_after == losses[step + 1 :]


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    before = handlers()
    stages = []

    def twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            stages.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            stages.append("second")

    with pytest.raises(KeyboardInterrupt):
        method(tmp_path, twice)
    assert stages == ["first"]
    assert handlers() == before


def test_without_a_folder_ctrl_c_is_pythons_own():
    with pytest.raises(KeyboardInterrupt):
        method(None, send_at(3, signal.SIGINT))


@pytest.mark.parametrize("end", ["done", "error", "killed"])
def test_handlers_are_given_back(end, tmp_path):
    before = handlers()
    seen = []

    def at_step(step: int) -> None:
        seen.append(handlers() != before)
        if step == 5 and end == "error":
            raise ValueError
        if step == 5 and end == "killed":
            raise Killed

    if end == "done":
        method(tmp_path, at_step)
    else:
        with pytest.raises((ValueError, Killed)):
            method(tmp_path, at_step)
    assert all(seen)
    assert handlers() == before


def test_in_another_thread_there_are_no_handlers(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(method(tmp_path)))
    thread.start()
    thread.join()
    assert torch.equal(result[0][0], method(None)[0])


def test_a_signal_with_progress_is_answered_at_once(tmp_path, capsys):
    with pytest.raises(Interrupted):
        method(tmp_path, send_at(3, signal.SIGINT), progress=True)
    assert "SIGINT: saving after this step" in capsys.readouterr().err


# ---------------------------------------------------------------------- log, progress, pictures


def test_a_line_of_the_log(tmp_path, every_step):
    _, losses = method(tmp_path)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(losses)
    assert lines[0]["lr"] == 0.1
    assert lines[5]["epoch"] == 1.5
    assert lines[3]["items"] == N
    assert lines[-1]["items"] == N * EPOCHS
    assert all(line["peak_memory_bytes"] > 10**7 for line in lines)
    assert all(line["items_per_second"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(("log_steps", "steps"), [(100, [4, 8, 12, 16]), (3, [3, 4, 7, 8, 11])])
def test_the_loss_of_a_line_is_the_mean_over_its_items(log_steps, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_STEPS", log_steps)
    _, losses = method(tmp_path)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines][: len(steps)] == steps
    sizes = [3, 3, 2, 2] * EPOCHS
    first = 0
    for line in lines:
        part = range(first, line["step"])
        wanted = sum(losses[i] * sizes[i] for i in part) / sum(sizes[i] for i in part)
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
        first = line["step"]


def test_more_numbers_can_be_logged(tmp_path):
    with Training("toy", Batches(4, 2, 1), tmp_path, {}, False) as running:
        for _ in running.steps(0):
            running.record(torch.tensor(1.0), lr=0.1, code_lr=0.5)
    assert log_of(tmp_path)[-1]["code_lr"] == 0.5


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(GlannError, match=r"log\.jsonl can't be written: .* same command again"):
        method(tmp_path)


@pytest.mark.parametrize("folder", [True, False])
def test_progress_is_one_aligned_line_where_there_is_no_terminal(folder, tmp_path, capsys):
    method(tmp_path if folder else None, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()  # the last step's: no ten seconds have passed
    assert line.startswith("toy   step      16/16  epoch    4.00/4  loss 0.")


@pytest.mark.parametrize(
    ("threads", "a_second", "progress", "noted"),
    [
        (2, 70, True, True),
        (2, 5, True, False),
        (1, 150, True, False),
        (2, 70, False, False),
        (16, 70, True, False),
    ],
)
def test_busy_cores_are_noted_once(threads, a_second, progress, noted, monkeypatch, capsys):
    """70: what each of two threads had to do beside two other busy processes on two cores."""
    clock = [1000.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    monkeypatch.setattr(training, "cores_left", lambda: int(clock[0] * 2 * a_second))
    monkeypatch.setattr(training.torch, "get_num_threads", lambda: threads)

    def at_step(step: int) -> None:
        clock[0] += 6.0

    method(None, at_step, progress=progress)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(lines) == noted
    if noted:
        assert "each of 2 threads had to leave its core 70 times a second" in lines[0]
        assert "OMP_NUM_THREADS=1" in lines[0]


def test_without_progress_there_is_silence(tmp_path, capsys):
    method(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("epochs", [1, 3, 19, 45])
def test_pictures_are_ten_and_one_is_the_last(epochs, tmp_path):
    method(tmp_path, epochs=epochs)
    steps = Batches(N, 3, epochs).steps
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    drawn = [int(name.removeprefix("weight-").removesuffix(".png")) for name in names]
    assert drawn[-1] == steps
    assert len(drawn) == min(steps, training.PICTURES)
    assert all(abs(b - a - steps / len(drawn)) <= 1 for a, b in itertools.pairwise([0, *drawn]))
    assert len({len(name) for name in names}) == 1  # they sort as they came
    assert read_image(tmp_path / names[0]).shape == (1, 8, 8)


def test_snapshots_are_read_in_order_with_their_times(tmp_path):
    def keep(running: Training) -> None:
        if running.picture_due:
            running.snapshot(torch.full((3, 2), float(running.step)))

    method(tmp_path, after_step=keep)
    shots = read_snapshots(tmp_path)
    assert [shot.step for shot in shots][-1] == STEPS
    assert len(shots) == training.PICTURES
    for before, shot in itertools.pairwise(shots):
        assert before.step < shot.step
        assert before.seconds <= shot.seconds
        assert torch.equal(shot.samples, torch.full((3, 2), float(shot.step)))
    damaged = sorted((tmp_path / "snapshots").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(GlannError, match="can't be read"):
        read_snapshots(tmp_path)


def test_a_folder_without_snapshots_has_none(tmp_path):
    assert read_snapshots(tmp_path) == []


@given(st.integers(2, 60), st.integers(2, 9), st.floats(0.01, 3))
def test_items_are_those_of_the_steps(n, batch_size, epochs):
    assume(n >= batch_size and n // -(-n // batch_size) >= 2)
    batches = Batches(n, batch_size, epochs)
    assert batches.steps == max(1, round(batches.per_epoch * epochs))
    rows = [batch for epoch in range(4) for batch in batches.epoch_of(0, epoch)]
    assert batches.items == sum(len(batch) for batch in rows[: batches.steps])


def test_without_a_folder_nothing_is_due():
    def check(running: Training) -> None:
        assert not running.picture_due
        assert not running.checkpoint_due

    method(None, after_step=check)


def test_a_checkpoint_is_due_by_the_clock(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 60.0)
    saved = []

    def at_step(step: int) -> None:
        clock[0] += 25.0
        if storage.is_saved(tmp_path):
            saved.append(storage.read_manifest(tmp_path)["step"])

    method(tmp_path, at_step)
    assert sorted(set(saved)) == [3, 6, 9, 12, 15]
    assert storage.read_manifest(tmp_path)["seconds"] == 25 * STEPS


@pytest.mark.parametrize("fails", [False, True])
def test_denormals_are_flushed_while_training_and_not_after(fails):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor can't")
    tiny = torch.tensor([1e-38])
    during = []

    def at_step(step: int) -> None:
        during.append(float(tiny / 100))
        if fails:
            raise Killed

    if fails:
        with pytest.raises(Killed):
            method(None, at_step)
    else:
        method(None, at_step)
    assert set(during) == {0.0}
    assert float(tiny / 100) > 0


@SIGNALS
@pytest.mark.parametrize("step", [4, 14])
def test_a_signal_between_the_save_and_the_next_step_loses_nothing(number, step, tmp_path):
    """It comes when `checkpoint_due` has already been asked."""

    def after_step(running: Training) -> None:
        if running.step == step and not storage.is_saved(tmp_path):
            os.kill(os.getpid(), number)

    wanted, losses = method(None)
    with pytest.raises(Interrupted) as caught:
        method(tmp_path, after_step=after_step)
    manifest = storage.read_manifest(tmp_path)
    assert f"at step {manifest['step']} of 16; saved in {tmp_path}" in str(caught.value)
    result, losses_after = method(tmp_path)
    assert torch.equal(result, wanted)
    assert losses_after == losses[manifest["step"] :]


@SIGNALS
def test_a_signal_in_the_last_step_is_not_forgotten(number, tmp_path):
    """Stage two must not begin after a Ctrl-C."""
    with pytest.raises(Interrupted, match="at step 16 of 16; saved in"):
        method(tmp_path, send_at(STEPS - 1, number))
    assert storage.read_manifest(tmp_path)["done"]
    assert torch.equal(method(tmp_path)[0], method(None)[0])


@pytest.mark.parametrize(("n", "batch_size"), [(3, 2), (5, 2), (101, 2)])
def test_a_batch_of_one_item_is_refused(n, batch_size):
    with pytest.raises(GlannError, match="set batch_size to 3 or more"):
        Batches(n, batch_size, 1)
    Batches(n + 1, batch_size, 1)
