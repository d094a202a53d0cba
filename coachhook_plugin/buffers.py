"""Buffers that follow the model to another device but keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class PreciseBuffers(nn.Module):
    """A module whose buffers stay float32 (or wider) when the model is halved; `in_dtype` casts them for a forward.

    Buffers are replaced, never written into, because session states share their tensors.
    """

    growing: ClassVar[frozenset[str]] = frozenset()  # buffers that load in any shape

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # buffer, and its cast

    def in_dtype(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The buffer `name` in the dtype of a forward pass; the cast is kept until the buffer is replaced."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.dtype == dtype:
            return buffer
        source, cast = self._casts.get(name, (None, None))
        if source is not buffer or cast is None or cast.dtype != dtype:
            with torch.inference_mode(False):  # a cast made while generating must serve a training step as well
                cast = buffer.to(dtype)
            self._casts[name] = buffer, cast
        return cast

    def fill(self, buffers: dict[str, torch.Tensor]) -> None:
        """Replace every buffer by the one of its name, of whatever shape.

        Raises:
            ValueError: the names are not those of this module's buffers.
        """
        if set(buffers) != set(self._buffers):
            raise ValueError(f"{type(self).__name__} has buffers {sorted(self._buffers)}, not {sorted(buffers)}")
        for name, tensor in buffers.items():
            before = self._buffers[name]
            self._buffers[name] = tensor if before is None else tensor.to(before.device)
        self._casts.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PreciseBuffers:
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self._casts.clear()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is None or not isinstance(given, torch.Tensor):
                continue
            if name in self.growing or given.shape == buffer.shape:
                self._buffers[name] = buffer.new_empty(given.shape)  # a fresh tensor: loading copies into it
        self._casts.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
