"""Files that are there whole or not at all, also after a power cut; and one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from ..cache import write_durably

LOCK = ".coachhook.lock"
CHUNK = 1 << 22


class FolderError(ValueError):
    """A folder of edits that cannot be trusted, does not fit, or cannot be written."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Any failure to write as a `FolderError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise FolderError(
            f"{folder}: cannot be written ({why}); make room and give write permission, or name another folder"
        ) from error


def remove(path: Path) -> None:
    """Remove a file or folder that nothing refers to; where that fails it does no harm."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_durably(path, lambda target: save_file(plain, target, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    write_durably(path, lambda made: made.write_bytes(data))


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    # Copies, because arithmetic may round differently on memory that is aligned differently.
    found = load(data)
    return {name: found.pop(name).clone() for name in list(found)}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror}); restore the folder from a copy") from None


def _check(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise FolderError(f"{path}: damaged, its content is not what was written; restore the folder from a copy")


def read_checked(path: Path, digest: str) -> bytes:
    """The content of a file whose SHA-256 is `digest`.

    Raises:
        FolderError: the file is missing, unreadable or other than it was written.
    """
    with _reading(path):
        data = path.read_bytes()
    _check(path, hashlib.sha256(data).hexdigest(), digest)
    return data


class TensorFile:
    """A file of tensors whose SHA-256 is `digest`; what is not asked for is not read into memory.

    Raises:
        FolderError: as `read_checked`.
    """

    def __init__(self, path: Path, digest: str) -> None:
        with _reading(path):
            _check(path, sha256(path), digest)
            found: Any = safe_open(path, framework="pt")
        self._file = found
        self.names = sorted(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.mapped(name).clone()  # arithmetic may round differently on memory that is aligned otherwise

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor that stays in the file, and there also when the folder has another one by that name."""
        found = self._file.get_tensor(name)
        assert isinstance(found, torch.Tensor)
        return found

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """By the rest of the name, all whose name begins so."""
        return {name.removeprefix(prefix): self[name] for name in self.names if name.startswith(prefix)}


def canonical(content: Any) -> bytes:
    """One spelling for equal JSON contents."""
    return json.dumps(content, sort_keys=True).encode()


def lock(folder: Path) -> FileLock:
    """The right to write into `folder`, until `release` or the end of the process.

    Raises:
        FolderError: somebody else has it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK, thread_local=False)  # a session may be closed by another thread
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise FolderError(
                f"{folder}: another session is writing to this folder; end that one, or name another folder"
            ) from None
    return held
