"""Where derived files are kept, and how they are written whole or not at all."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOG = logging.getLogger(__name__)

TEMPORARY = r"[0-9a-f]{16}"  # what the name of a temporary neighbour ends in


def cache_dir() -> Path:
    """`$COACHHOOK_CACHE`, or `~/.cache/coachhook`."""
    return Path(os.environ.get("COACHHOOK_CACHE") or Path.home() / ".cache" / "coachhook").expanduser()


def is_kept(path: Path) -> bool:
    """Whether the file is there; in a folder that is closed to us there is none."""
    return os.path.isfile(path)


@contextmanager
def dispensable() -> Iterator[None]:
    """Around changes to the cache folder: where they cannot be made, that is said once, and all goes on without."""
    try:
        yield
    except OSError as error:
        _tell(cache_dir(), error.strerror or str(error))


@functools.cache
def _tell(folder: Path, why: str) -> None:
    LOG.warning(
        "the cache folder %s cannot be written (%s): what would be kept there is made again next time; choose another "
        "folder with COACHHOOK_CACHE",
        folder,
        why,
    )


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, also where its folder is not there yet; see `write_durably`."""

    def fill(made: Path) -> None:
        with made.open("wb") as stream:
            write(stream)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, fill)


def write_durably(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary neighbour, bring it to the disk, rename it, and bring the name to the disk.

    Readers see the old file or the new one, also after a power cut. The neighbour lies in a folder of its own, which
    is all that a killed process leaves: safetensors makes temporary files beside the one it writes.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        made = folder / path.name
        made.touch()  # for whoever a new file is for: `tempfile` and safetensors make private ones
        mode = made.stat().st_mode
        fill(made)
        made.chmod(mode)
        _sync(made)
        os.replace(made, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
