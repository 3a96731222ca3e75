"""Files that are whole or not there: atomic writes, weights with checksums, strict loading.

A saved folder holds `manifest.json` and one safetensors file for each part.  A part's file carries
the start of its sha256 in its name and the manifest is replaced last, so that a folder that is
saved over is at every moment either the old one or the new one.  No pickle anywhere.

Nothing here takes memory for what it saves or loads: tensors are written a piece at a time and
loaded as maps of their files, so that they may be larger than memory.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from glann.errors import GlannError

if TYPE_CHECKING:  # reading a manifest must not cost an import of torch
    import torch

FORMAT = 1
"""Version of the layout that this code writes, and the newest that it reads."""

MANIFEST = "manifest.json"

_WEIGHTS = re.compile(r"\.?.+-[0-9a-f]{12}\.safetensors(\.\w{8})?")
"""Names of weights files, and of temporary ones that a killed process left: no one else's."""

CHUNK = 2**26
"""Bytes of a tensor that are in hand at a time."""

_DTYPES = {
    **{"I64": "int64", "F64": "float64", "F32": "float32", "I32": "int32", "BF16": "bfloat16"},
    **{"F16": "float16", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""safetensors' names of torch's dtypes, in the order in which it puts them into a file: the widest
first, so that every number lies at a multiple of its size."""


_writes = True


def write_nothing() -> None:
    """From now on this process writes no file: it is not the first of several that work alike."""
    global _writes
    _writes = False


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` with a binary file that takes `path`'s place only when all has been written."""
    if not _writes:
        return
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give them the rights that any other new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise GlannError(
            f"{path} can't be written: {error.strerror or error}. Nothing there was changed; free "
            "some space or choose another place, then run the same command again"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    # Of a file's name that is no UTF-8 it has what JSON, too, knows as \udcff.
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, content: object) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; GlannError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GlannError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise GlannError(f"{path} can't be read: {error}") from error


def save(
    folder: Path, kind: str, content: dict[str, Any], parts: dict[str, dict[str, "torch.Tensor"]]
) -> None:
    """Save `content` (JSON) and `parts` (name → tensors by name) into `folder`.

    `kind` says what it is ("pipeline", "checkpoint", …); `load` asks for it again.
    """
    if not _writes:
        return
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    new = []
    try:
        for name, tensors in parts.items():
            # Gone through twice, as the name of the file follows from what is in it.
            digest, size = hashlib.sha256(), 0
            for piece in _safetensors(tensors):
                digest.update(piece)
                size += len(piece)
            path = folder / f"{name}-{digest.hexdigest()[:12]}.safetensors"
            if not path.exists():
                new.append(path)
            # Written even if it is there: that one may be damaged, and saving again mends it.
            write_atomically(path, lambda file, t=tensors: file.writelines(_safetensors(t)))  # type: ignore[misc]
            files[name] = {"file": path.name, "sha256": digest.hexdigest(), "bytes": size}
        write_json(folder / MANIFEST, {"glann": kind, "format": FORMAT, **content, "files": files})
    except GlannError:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    kept = {entry["file"] for entry in files.values()}
    for old in folder.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in kept:
            with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
                old.unlink(missing_ok=True)


def _safetensors(tensors: dict[str, "torch.Tensor"]) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors' own `save` gives, a piece at a time."""
    order, dtypes = list(_DTYPES), {f"torch.{name}": key for key, name in _DTYPES.items()}
    kinds = {name: dtypes[str(tensor.dtype)] for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (order.index(kinds[name]), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from _pieces(tensors[name])


def _pieces(tensor: "torch.Tensor") -> Iterator[memoryview]:
    """A tensor's numbers in their order, as bytes, a piece at a time."""
    import torch

    for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(CHUNK):
        yield piece.cpu().numpy().data


def fingerprint(tensor: "torch.Tensor") -> str:
    """sha256 (hex) of a tensor's dtype, shape and numbers; their order counts."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for piece in _pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Nobody else may do what is called `name` in this folder at the same time.

    Of two trainings in one folder each would delete what the other has written.

    Raises:
        GlannError: somebody does.
    """
    if not _writes:  # the first of the processes that work alike holds it for all
        yield
        return
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file is there" if isinstance(error, FileExistsError) else error.strerror
        raise GlannError(
            f"the folder {folder} can't be made: {reason}; take another one (--run FOLDER)"
        ) from error
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise GlannError(
            f"another process is at work in {folder} ({name}): wait until it has ended, or take "
            "another folder"
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def is_saved(folder: Path) -> bool:
    """Whether `save` has ever finished in this folder."""
    return (Path(folder) / MANIFEST).is_file()


def holds(folder: Path, kind: str) -> bool:
    """Whether a folder holds something saved of this kind."""
    return is_saved(folder) and bool(read_manifest(folder)["glann"] == kind)


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a saved folder; GlannError if missing, damaged, newer or of another kind."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "glann" not in manifest or "format" not in manifest:
        raise GlannError(f"{path} is not a manifest written by glann")
    if not isinstance(manifest["format"], int) or manifest["format"] > FORMAT:
        raise GlannError(
            f"{folder} is in format {manifest['format']}; this glann reads up to {FORMAT}. "
            "Install a newer glann"
        )
    if kind is not None and manifest["glann"] != kind:
        raise GlannError(f"{folder} holds '{manifest['glann']}'; wanted '{kind}'")
    return manifest


def load(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, dict[str, "torch.Tensor"]]]:
    """Load what `save` wrote: (manifest, parts), tensors on the CPU.

    Every file is checked against its sha256 first: a damaged one is a GlannError.  The tensors are
    maps of the files, see `mapped`: they can be written to, and stay when the files are deleted.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, kind)
    parts = {}
    try:
        for name, entry in manifest["files"].items():
            path = folder / Path(entry["file"]).name
            try:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise GlannError(
                            f"{path} is damaged: {file.tell()} bytes whose sha256 is not the "
                            f"manifest's (wanted {entry['bytes']} bytes). Copy or train it again"
                        )
                    parts[name] = _tensors(mapped(file))
            except OSError as error:
                raise GlannError(f"{path} can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GlannError(f"{folder / MANIFEST} is damaged: its files are not listed") from error
    return manifest, parts


def _tensors(buffer: mmap.mmap) -> dict[str, "torch.Tensor"]:
    """The tensors of a safetensors file, without a copy."""
    import torch

    begin = 8 + int.from_bytes(buffer[:8], "little")
    tensors = {}
    for name, entry in json.loads(buffer[8:begin]).items():
        dtype, shape = getattr(torch, _DTYPES[entry["dtype"]]), entry["shape"]
        start, count = begin + entry["data_offsets"][0], math.prod(shape)
        tensor = torch.empty(0, dtype=dtype)
        if count:  # torch takes no buffer of nothing
            tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)
        tensors[name] = tensor.view(shape)
    return tensors


# --- more than memory holds ---------------------------------------------------------------------


def mapped(file: IO[bytes]) -> mmap.mmap:
    """The bytes of a file, read from the disk when they are looked at.

    Memory that they fill goes back whenever it is short.  What is written to them goes to memory
    and not to the file.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # As all of it might be written to, Linux refuses what is larger than its memory, but for this
    # flag: Python has it from 3.13 on.
    no_reserve = 0x4000 if sys.platform == "linux" else 0
    flags, rights = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=rights)


def scratch(folder: Path, shape: Sequence[int]) -> "torch.Tensor":
    """float32 zeros that lie on the disk of `folder` instead of in memory.

    Their file has no name: it is gone with the tensor, however the process ends.
    """
    import torch

    size = 4 * math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file, size)
            room = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise GlannError(
            f"{folder} has no room for {size / 2**20:,.0f} MB: {error.strerror or error}. Nothing "
            "there was changed; free some space or choose another place"
        ) from error
    return torch.frombuffer(room, dtype=torch.float32).view(*shape)


def reserve(file: IO[bytes], size: int) -> None:
    """Fill a file with zeros up to `size` bytes; OSError if the disk hasn't got them.

    A map of a file without its room ends the process when the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # macOS, Windows
        os.truncate(file.fileno(), size)
