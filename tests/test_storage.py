import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes

from glann import storage
from glann.errors import GlannError

OLD = {"weights": {"w": torch.arange(6.0).reshape(2, 3)}, "codes": {"z": torch.ones(4, 2)}}
NEW = {"weights": {"w": torch.arange(6.0).reshape(2, 3) + 1}, "codes": {"z": torch.zeros(5, 2)}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is carried out."""


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[part].keys() == wanted[part].keys()
        and all(
            found[part][key].dtype == tensor.dtype and torch.equal(found[part][key], tensor)
            for key, tensor in wanted[part].items()
        )
        for part in wanted
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def failing_at(number: int, error: BaseException):
    """The disk fails in the middle of the `number`th file that is written."""
    written = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal written
        written += 1
        if written == number:
            os.ftruncate(handle, 3)
            raise error
        real(handle)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", fsync)
        if isinstance(error, Killed):
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        yield
    assert written >= number


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    storage.save(tmp_path / "run", "checkpoint", {"step": 1}, OLD)
    return tmp_path / "run"


# ---------------------------------------------------------------------- whole round


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor(True),
        torch.empty(0, 5),
        torch.randn(3, 4),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3).bfloat16(),
        torch.randn(3).half(),
        torch.randint(0, 255, (2, 3), dtype=torch.uint8),
        torch.randn(3, 4).T,
        torch.randn(6)[::2],
        torch.randn(4, requires_grad=True),
        torch.tensor([float("nan"), float("inf"), -0.0]).nan_to_num(nan=1.0),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, tensor):
    storage.save(tmp_path, "checkpoint", {"step": 3, "name": "é"}, {"part": {"a.b": tensor}})
    manifest, parts = storage.load(tmp_path, "checkpoint")
    assert manifest["step"] == 3
    assert manifest["name"] == "é"
    assert same(parts, {"part": {"a.b": tensor.detach()}})
    parts["part"]["a.b"].zero_()  # loaded tensors can be written to


def test_two_parts_of_one_tensor_are_kept_apart(tmp_path):
    whole = torch.arange(10.0)
    parts = {"part": {"a": whole[:4], "b": whole[4:]}}
    storage.save(tmp_path, "k", {}, parts)
    assert same(storage.load(tmp_path, "k")[1], parts)


def test_saving_over_leaves_only_the_new(saved):
    assert storage.is_saved(saved)
    storage.save(saved, "checkpoint", {"step": 2}, NEW)
    manifest, parts = storage.load(saved, "checkpoint")
    assert manifest["step"] == 2
    assert same(parts, NEW)
    names = {entry["file"] for entry in manifest["files"].values()}
    assert set(files(saved)) == names | {storage.MANIFEST}


def test_a_part_that_is_gone_is_gone(saved):
    storage.save(saved, "checkpoint", {}, {"codes": NEW["codes"]})
    assert same(storage.load(saved, "checkpoint")[1], {"codes": NEW["codes"]})
    assert len(files(saved)) == 2


def test_files_of_others_in_the_folder_are_kept(saved):
    others = ["model.safetensors", "weights-v2.safetensors", "log.jsonl", ".hidden", "a-0123.png"]
    for name in others:
        (saved / name).write_text("mine")
    storage.save(saved, "checkpoint", {}, NEW)
    assert all((saved / name).read_text() == "mine" for name in others)


def test_the_same_content_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        storage.save(tmp_path / name, "k", {"step": 1}, OLD)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_fingerprint_tells_numbers_order_shape_and_type_apart():
    images = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    others = [
        images.clone().index_fill_(0, torch.tensor(1), 0),
        images.flip(0),
        images.reshape(4, 3),
        images.to(torch.int8),
    ]
    assert len({storage.fingerprint(tensor) for tensor in [images, *others]}) == 5
    assert storage.fingerprint(images.T.contiguous().T) == storage.fingerprint(images)
    assert storage.fingerprint(images.clone()) == storage.fingerprint(images)


def test_nobody_else_may_do_the_same_in_a_folder(tmp_path):
    other = "import sys; from pathlib import Path; from glann import storage\n"
    other += "with storage.alone(Path(sys.argv[1]), sys.argv[2]): print('in')"

    def elsewhere(folder, name):
        command = [sys.executable, "-c", other, folder, name]
        return subprocess.run(command, capture_output=True, text=True)

    with storage.alone(tmp_path / "run", "training"):
        refused = elsewhere(tmp_path / "run", "training")
        assert f"another process is at work in {tmp_path / 'run'} (training)" in refused.stderr
        assert elsewhere(tmp_path / "run", "ns-gan").stdout == "in\n"
        assert elsewhere(tmp_path / "other", "training").stdout == "in\n"
    assert elsewhere(tmp_path / "run", "training").stdout == "in\n"


def test_a_place_without_locks_is_worked_in_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with storage.alone(tmp_path, "training"):
        pass


def test_holds_asks_for_the_kind(saved, tmp_path):
    assert storage.holds(saved, "checkpoint")
    assert not storage.holds(saved, "pipeline")
    assert not storage.holds(tmp_path / "none", "checkpoint")


def test_folders_may_be_given_as_text(tmp_path):
    folder = str(tmp_path / "deep" / "run")
    assert not storage.is_saved(folder)
    storage.save(folder, "k", {}, OLD)
    assert storage.is_saved(folder)
    assert same(storage.load(folder, "k")[1], OLD)


def test_a_manifest_is_read_without_torch(saved):
    code = (
        "import sys; from glann import storage; storage.read_manifest(sys.argv[1]); "
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


# ---------------------------------------------------------------------- killed, disk full


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_leaves_the_old_content_and_nothing_else(saved, number):
    before = files(saved)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with failing_at(number, full), pytest.raises(GlannError, match=r"No space left.*free some"):
        storage.save(saved, "checkpoint", {"step": 2}, NEW)
    assert files(saved) == before
    assert same(storage.load(saved, "checkpoint")[1], OLD)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_at_the_first_save(tmp_path, number):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with failing_at(number, full), pytest.raises(GlannError):
        storage.save(tmp_path, "checkpoint", {}, OLD)
    assert not storage.is_saved(tmp_path)
    assert files(tmp_path) == {}


def test_a_full_disk_does_not_take_away_a_part_that_both_share(saved):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with failing_at(3, full), pytest.raises(GlannError):
        storage.save(saved, "checkpoint", {}, {"weights": OLD["weights"], "codes": NEW["codes"]})
    assert same(storage.load(saved, "checkpoint")[1], OLD)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_save_that_is_killed_leaves_the_old_content_and_the_next_tidies_up(saved, number):
    before = files(saved)
    with failing_at(number, Killed()), pytest.raises(Killed):
        storage.save(saved, "checkpoint", {"step": 2}, NEW)
    left = files(saved)
    assert len(left) == len(before) + number
    assert before.items() <= left.items()
    manifest, parts = storage.load(saved, "checkpoint")
    assert manifest["step"] == 1
    assert same(parts, OLD)
    storage.save(saved, "checkpoint", {"step": 2}, NEW)
    assert same(storage.load(saved, "checkpoint")[1], NEW)
    weights = [name for name in files(saved) if "safetensors" in name]
    assert len(weights) == 2


def test_a_folder_is_at_every_moment_the_old_or_the_new(saved, monkeypatch):
    seen = []

    def looking(name):
        real = getattr(Path, name)

        def call(*args, **kwargs):
            real(*args, **kwargs)
            manifest, parts = storage.load(saved, "checkpoint")
            assert same(parts, OLD if manifest["step"] == 1 else NEW)
            seen.append(manifest["step"])

        return call

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, looking(name))
    storage.save(saved, "checkpoint", {"step": 2}, NEW)
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    storage.write_text(path, "old")

    def write(file):
        file.write(b"half of the n")
        raise error

    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(GlannError, match=r"result\.json can't be written: No space left"):
        storage.write_atomically(path, write)
    assert files(tmp_path) == {"result.json": b"old"}
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(path, write)
    assert files(tmp_path) == {"result.json": b"old"}


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "x"

    def write(file):
        file.write(b"all")
        file.flush()
        assert not path.exists()

    storage.write_atomically(path, write)
    assert files(tmp_path) == {"x": b"all"}


def test_all_is_on_the_disk_before_the_old_file_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "x"
    storage.write_text(path, "old")
    synced = []

    def fsync(handle):
        synced.append(os.fstat(handle).st_size)
        assert path.read_text() == "old"

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_text(path, "something new")
    assert synced == [13]
    assert path.read_text() == "something new"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(GlannError, match=r"file/x can't be written"):
        storage.write_text(tmp_path / "file" / "x", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(GlannError, match=r"folder can't be written"):
        storage.write_text(tmp_path / "folder", "text")
    assert set(os.listdir(tmp_path)) == {"file", "folder"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_written_files_have_the_rights_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        storage.write_text(tmp_path / "x", "text")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


# ---------------------------------------------------------------------- larger than memory


MIXED = {
    "i": torch.tensor(3),
    "h": torch.arange(7, dtype=torch.float64),
    "a": torch.randn(3, 5),
    "b": torch.empty(0, 5),
    'é \n"\x7f\x01': torch.arange(5, dtype=torch.int32),
    "c": torch.randn(3).bfloat16(),
    "d": torch.randn(5).half(),
    "s": torch.tensor([-3], dtype=torch.int16),
    "e": torch.tensor([-3], dtype=torch.int8),
    "f": torch.arange(9, dtype=torch.uint8).reshape(3, 3),
    "g": torch.tensor([True, False]),
}


@pytest.mark.parametrize("chunk", [1, 16, 2**26])
@pytest.mark.parametrize("names", ["", "b", "i", "ab", "ag", "fe", "cd", "dc", "".join(MIXED)])
def test_a_part_is_byte_for_byte_what_safetensors_writes(tmp_path, monkeypatch, names, chunk):
    monkeypatch.setattr(storage, "CHUNK", chunk)
    tensors = MIXED if len(names) > 2 else {name: MIXED[name] for name in names}
    storage.save(tmp_path, "k", {}, {"part": tensors})
    (entry,) = json.loads((tmp_path / storage.MANIFEST).read_text())["files"].values()
    wanted = to_bytes(tensors)
    assert (tmp_path / entry["file"]).read_bytes() == wanted
    assert entry["sha256"] == hashlib.sha256(wanted).hexdigest()
    assert entry["bytes"] == len(wanted)
    assert same(storage.load(tmp_path, "k")[1], {"part": tensors})


def test_a_fingerprint_does_not_depend_on_its_pieces(monkeypatch):
    images = torch.arange(60, dtype=torch.uint8).reshape(5, 3, 4)
    whole = hashlib.sha256(b"torch.uint8 (5, 3, 4)" + images.numpy().tobytes()).hexdigest()
    for chunk in (7, 60, 2**26):
        monkeypatch.setattr(storage, "CHUNK", chunk)
        assert storage.fingerprint(images) == whole


def test_what_is_written_to_loaded_tensors_does_not_reach_the_file(saved):
    before = files(saved)
    _, parts = storage.load(saved, "checkpoint")
    parts["weights"]["w"] += 1
    assert files(saved) == before


def test_loaded_tensors_stay_when_their_file_is_saved_over(saved):
    _, parts = storage.load(saved, "checkpoint")
    storage.save(saved, "checkpoint", {}, NEW)
    assert same(parts, OLD)


MEMORY = """
import sys
from pathlib import Path
import torch
from glann import storage

def held(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) // 1024

codes = torch.ones(256, 2**18)
folder = Path(sys.argv[1])
storage.save(folder, "k", {}, {"small": {"x": torch.ones(2)}})
if sys.argv[2] == "save":
    import resource
    most = (held("VmData") + 64) * 2**20  # MB; the tensor has 256
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    storage.save(folder, "k", {}, {"part": {"codes": codes}})
else:
    storage.save(folder, "k", {}, {"part": {"codes": codes}})
    before = held("RssAnon")
    (part,) = storage.load(folder, "k")[1].values()
    assert float(part["codes"].sum()) == 2**26
    room = storage.scratch(folder, codes.shape)
    room.copy_(part["codes"])
    assert float(room.sum()) == 2**26
    assert held("RssAnon") - before < 64
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it gave")
@pytest.mark.parametrize("what", ["save", "load"])
def test_memory_does_not_grow_with_what_is_saved_and_loaded(tmp_path, what):
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), what], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory there is")
def test_a_file_larger_than_all_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "x").open("w+b") as file:
        file.truncate(2 * memory)  # takes no room: nothing is written to it
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
        file.flush()
        buffer = storage.mapped(file)
        assert buffer[-2:] == b"\0x"
        buffer[-1:] = b"y"
        file.seek(-1, os.SEEK_END)
        assert file.read() == b"x"


def test_scratch_is_zeros_in_a_file_without_a_name(tmp_path):
    room = storage.scratch(tmp_path / "deep", (3, 5))
    assert torch.equal(room, torch.zeros(3, 5))
    room[1] = 7
    assert room.sum() == 35
    assert files(tmp_path / "deep") == {}


def test_scratch_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(GlannError, match=r"no room for 4 MB: No space left.*free some space"):
        storage.scratch(tmp_path, (1024, 1024))
    assert files(tmp_path) == {}


# ---------------------------------------------------------------------- damaged, newer, foreign


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    storage.save(folder, "checkpoint", {"step": 1}, OLD)
    return folder


def weights_of(folder: Path) -> Path:
    manifest = json.loads((folder / storage.MANIFEST).read_text())
    return folder / manifest["files"]["weights"]["file"]


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_damaged_byte_or_a_cut_is_noticed(pristine, data):
    path = weights_of(pristine)
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255) | st.just(None))
    damaged = bytearray(whole)
    if change is None:
        del damaged[position:]
    else:
        damaged[position] ^= change
    try:
        path.write_bytes(damaged)
        with pytest.raises(GlannError, match=f"{path.name} is damaged"):
            storage.load(pristine, "checkpoint")
    finally:
        path.write_bytes(whole)


def test_saving_again_mends_a_damaged_file(saved):
    path = weights_of(saved)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    storage.save(saved, "checkpoint", {"step": 1}, OLD)
    assert same(storage.load(saved, "checkpoint")[1], OLD)


def test_a_missing_part_is_named(saved):
    path = weights_of(saved)
    path.unlink()
    with pytest.raises(GlannError, match=f"{path.name} can't be read"):
        storage.load(saved, "checkpoint")


def test_a_wrong_kind_is_refused(saved):
    with pytest.raises(GlannError, match="holds 'checkpoint'; wanted 'pipeline'"):
        storage.load(saved, "pipeline")
    assert storage.read_manifest(saved)["glann"] == "checkpoint"


def change_manifest(folder: Path, **changes) -> None:
    path = folder / storage.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [storage.FORMAT + 1, 10**30, "1", None, [1], 1.5])
def test_a_newer_format_is_refused(saved, version):
    change_manifest(saved, format=version)
    with pytest.raises(GlannError, match=r"reads up to 1\. Install a newer glann"):
        storage.load(saved, "checkpoint")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "null", '{"format": 1}', "\x00"])
def test_what_is_no_manifest_is_refused(saved, text):
    (saved / storage.MANIFEST).write_text(text)
    with pytest.raises(GlannError, match=r"manifest\.json (is not a manifest|can't be read)"):
        storage.load(saved, "checkpoint")


def test_an_empty_folder_or_none_is_missing(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert not storage.is_saved(folder)
        with pytest.raises(GlannError, match=r"manifest\.json is missing"):
            storage.load(folder, "checkpoint")


def test_a_manifest_cannot_reach_outside_its_folder(saved):
    secret = to_bytes({"w": torch.full((3,), 7.0)})
    outside = saved.parent / "secret.safetensors"
    outside.write_bytes(secret)
    (saved / "sub").mkdir()
    (saved / "sub" / "secret.safetensors").write_bytes(secret)
    for name in ("../secret.safetensors", str(outside), "sub/secret.safetensors", "..", ".", ""):
        entry = {"file": name, "sha256": hashlib.sha256(secret).hexdigest(), "bytes": len(secret)}
        change_manifest(saved, files={"weights": entry})
        with pytest.raises(GlannError, match="can't be read"):
            storage.load(saved, "checkpoint")


def test_a_name_that_no_file_can_have_is_refused(saved):
    for name in ("\0", "x" * 5000, 3, None, ["x"]):
        change_manifest(saved, files={"weights": {"file": name, "sha256": "", "bytes": 0}})
        with pytest.raises(GlannError, match=r"manifest\.json is damaged|can't be read"):
            storage.load(saved, "checkpoint")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["file", "sha256", "bytes", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(listed=json_values | st.fixed_dictionaries({"w": json_values}))
@settings(deadline=None, max_examples=100)
def test_whatever_a_manifest_lists_there_is_no_other_error(tmp_path_factory, listed):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / storage.MANIFEST).write_text(
        json.dumps({"glann": "checkpoint", "format": 1, "files": listed})
    )
    with contextlib.suppress(GlannError):
        assert storage.load(folder, "checkpoint")[1] == {}
    shutil.rmtree(folder)


# ---------------------------------------------------------------------- text and JSON


def test_json_round_trip(tmp_path):
    content = {"text": "σ 😀", "numbers": [1, 2.5, None, True], "nested": {"a": []}}
    storage.write_json(tmp_path / "deep" / "x.json", content)
    assert storage.read_json(tmp_path / "deep" / "x.json") == content
    text = (tmp_path / "deep" / "x.json").read_text(encoding="utf-8")
    assert "σ" in text
    assert re.search(r"^  \"text\"", text, re.MULTILINE)
    assert text.endswith("}\n")


def test_unreadable_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(GlannError, match=r"x\.json is missing"):
        storage.read_json(path)
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(GlannError, match=r"x\.json can't be read"):
            storage.read_json(path)
    with pytest.raises(GlannError, match="can't be read"):
        storage.read_json(tmp_path)


def test_a_name_that_is_no_utf_8_can_be_told(tmp_path):
    """Linux has files of such names, and `data.json` says where images are."""
    content = {"place": "ph\udcff", "other": "α"}
    storage.write_json(tmp_path / "data.json", content)
    assert storage.read_json(tmp_path / "data.json") == content


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_can_t_be_made_is_an_error_in_words(tmp_path, inside):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(GlannError, match="can't be made"),
        storage.alone(tmp_path / "file" / inside, "training"),
    ):
        pass
