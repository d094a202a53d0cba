"""Where derived files are kept, and how they are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """`$COACHHOOK_CACHE`, or `~/.cache/coachhook`."""
    return Path(os.environ.get("COACHHOOK_CACHE") or Path.home() / ".cache" / "coachhook").expanduser()


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write to a temporary neighbour, flush it to the disk, then rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
