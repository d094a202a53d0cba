"""Where derived files are kept, and how they are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """`$COACHHOOK_CACHE`, or `~/.cache/coachhook`."""
    return Path(os.environ.get("COACHHOOK_CACHE") or Path.home() / ".cache" / "coachhook").expanduser()


def neighbour(path: Path) -> Path:
    """An empty temporary file beside `path`, for whoever a new file is for (`tempfile` makes them private)."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    made.touch(exist_ok=False)
    return made


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write to a temporary neighbour, flush it to the disk, then rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = neighbour(path)
    try:
        with made.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
