"""Files that are whole or not there: atomic writes, weights with checksums, strict loading.

A saved folder holds `manifest.json` and one safetensors file for each part.  A part's file carries
the start of its sha256 in its name and the manifest is replaced last, so that a folder that is
saved over is at every moment either the old one or the new one.  No pickle anywhere.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
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
    write_atomically(path, lambda file: file.write(text.encode()))


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
    from safetensors.torch import save as to_bytes

    if not _writes:
        return
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    new = []
    try:
        for name, tensors in parts.items():
            data = to_bytes({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
            digest = hashlib.sha256(data).hexdigest()
            path = folder / f"{name}-{digest[:12]}.safetensors"
            if not path.exists():
                new.append(path)
            # Written even if it is there: that one may be damaged, and saving again mends it.
            write_atomically(path, lambda file, data=data: file.write(data))  # type: ignore[misc]
            files[name] = {"file": path.name, "sha256": digest, "bytes": len(data)}
        write_json(folder / MANIFEST, {"glann": kind, "format": FORMAT, **content, "files": files})
    except GlannError:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    kept = {entry["file"] for entry in files.values()}
    for old in folder.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in kept:
            old.unlink(missing_ok=True)


def fingerprint(tensor: "torch.Tensor") -> str:
    """sha256 (hex) of a tensor's dtype, shape and numbers; their order counts."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


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
        raise GlannError(f"{folder} holds a {manifest['glann']}; wanted a {kind}")
    return manifest


def load(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, dict[str, "torch.Tensor"]]]:
    """Load what `save` wrote: (manifest, parts), tensors on the CPU.

    Every file is checked against its sha256 first: a damaged one is a GlannError.
    """
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
    manifest = read_manifest(folder, kind)
    parts = {}
    try:
        for name, entry in manifest["files"].items():
            path = folder / Path(entry["file"]).name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise GlannError(f"{path} can't be read: {error.strerror}") from error
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise GlannError(
                    f"{path} is damaged: {len(data)} bytes whose sha256 is not the manifest's "
                    f"(wanted {entry['bytes']} bytes). Copy or train it again"
                )
            parts[name] = from_bytes(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GlannError(f"{folder / MANIFEST} is damaged: its files are not listed") from error
    return manifest, parts
