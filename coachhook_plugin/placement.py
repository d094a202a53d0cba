"""Where large matrices rest between batches.

A memory C takes 8 m^2 bytes in float64: 2 GiB for each edited layer at m = 16384. It is only needed while its own
layer is written, so it need not lie beside the weights.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import Literal

import torch

from .cache import cache_dir

# With the weights, in main memory, or in a file that is mapped into memory and gone with the process.
Place = Literal["weights", "cpu", "disk"]


def at_rest(matrix: torch.Tensor, place: Place) -> torch.Tensor:
    """The matrix in its place; the same tensor where it rests with the weights, or is in main memory already."""
    if place == "weights":
        return matrix
    if place == "cpu":
        return matrix.cpu()
    return room_for(matrix, place).copy_(matrix)


def room_for(matrix: torch.Tensor, place: Place) -> torch.Tensor:
    """Uninitialised room in `place` for a matrix of this shape and dtype.

    Raises:
        ValueError: the cache folder cannot hold the file.
    """
    if place != "disk":
        return torch.empty_like(matrix, device="cpu" if place == "cpu" else None)
    folder, size = cache_dir() / "memory", matrix.numel() * matrix.element_size()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, path = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(file, "wb") as stream:
                _reserve(stream.fileno(), size)
            mapped = torch.from_file(path, shared=True, size=matrix.numel(), dtype=matrix.dtype)
        finally:
            with suppress(PermissionError):  # Windows keeps what is mapped
                os.unlink(path)  # the mapping keeps the room until the tensor is gone
    except OSError as error:
        raise ValueError(
            f"memory_device: no room for {size:,} bytes in {folder} ({error.strerror}); make some, choose another "
            "folder with COACHHOOK_CACHE, or use memory_device: cpu"
        ) from error
    return mapped.view(matrix.shape)


def _reserve(file: int, size: int) -> None:
    """Room for the whole file now, or an error now: writing to a mapping of a full disk would kill the process."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
