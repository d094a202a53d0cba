"""HooK layers: modules that hang on a projection and carry its edits (paper, figures 1 and 2).

A hook layer is a child module named `coachhook` of the projection it serves. The projection keeps its class, its
parameters' names and their bits; a forward hook lets the child amend its output. `deepcopy`, `.to()` and `state_dict`
therefore see the hook layer like any other module.

With W0 the projection's weight and Wh = W0 + Delta, the projection has already computed P = W0 k (+ bias), so the
hook's answer is O = P + Delta k and the distance that the scope looks at is s = ||O - P|| = ||Delta k||.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .architectures import weight_shape
from .scope import Thresholds, in_scope

CHILD = "coachhook"


class Mode(Enum):
    OFF = "off"  # the base model
    TEMPORARY = "temporary"  # Wh k for every token: while a batch is being written
    VALIDATED = "validated"  # Wh k for the tokens in scope: inference, and layers already written


class TokenMask:
    """Which tokens of the running forward pass are real; shared by the hook layers of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: tuple[int, int] | None = None  # (b, T)
        self.mask: torch.Tensor | None = None  # (b, T) bool; None: every token is real
        self._names = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, key: torch.Tensor) -> torch.Tensor:
        """(b, T) bool for keys (b, T, m), or (b T, m) from blocks that flatten their tokens (OPT)."""
        rows = self.rows
        if rows is None or rows[0] * rows[1] * key.shape[-1] != key.numel():
            rows = (key.shape[0], key.shape[1]) if key.dim() == 3 else (1, key.shape[0])
            return torch.ones(rows, dtype=torch.bool, device=key.device)
        if self.mask is None:
            return torch.ones(rows, dtype=torch.bool, device=key.device)
        return self.mask.to(key.device)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            self.rows = self.mask = None
            return
        self.rows = (tokens.shape[0], tokens.shape[1])
        mask = given.get("attention_mask")
        # In cached decoding the mask covers the past as well; the last T columns are this pass.
        self.mask = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= self.rows[1]:
            self.mask = mask[:, -self.rows[1] :].bool()

    def _leave(self, *_: Any) -> None:
        self.rows = self.mask = None


class HookLayer(nn.Module):
    """The edits of one projection: Delta = Wh - W0 (d, m) in float32, and the thresholds of its scope."""

    delta: torch.Tensor  # (d, m)
    alpha: torch.Tensor  # ()
    ratio: torch.Tensor  # ()

    def __init__(self, projection: nn.Module, tokens: TokenMask, thresholds: Thresholds) -> None:
        super().__init__()
        weight = projection.weight
        assert isinstance(weight, torch.Tensor)
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        self.register_buffer("delta", torch.zeros(weight_shape(projection), dtype=torch.float32, device=weight.device))
        self.register_buffer("alpha", torch.tensor(thresholds.alpha, dtype=wide, device=weight.device))
        self.register_buffer("ratio", torch.tensor(thresholds.ratio, dtype=wide, device=weight.device))
        self.mode = Mode.OFF
        self.observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None  # called with s and mask, (b, T)
        self._tokens = tokens
        self._cast: torch.Tensor | None = None  # Delta in the dtype of the forward pass
        self._handle = projection.register_forward_hook(self._answer)
        projection.add_module(CHILD, self)

    def remove_from(self, projection: nn.Module) -> None:
        self._handle.remove()
        delattr(projection, CHILD)

    def write(self, delta: torch.Tensor) -> None:
        """Replace Delta (d, m)."""
        self.delta, self._cast = delta.to(self.delta.device), None

    def set_thresholds(self, thresholds: Thresholds) -> None:
        self.alpha = torch.full_like(self.alpha, thresholds.alpha)
        self.ratio = torch.full_like(self.ratio, thresholds.ratio)

    def _answer(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if self.mode is Mode.OFF:
            return None
        key = inputs[0]  # (b, T, m)
        change = F.linear(key, self._delta_in(key.dtype))  # (b, T, d)
        if self.mode is Mode.TEMPORARY:
            return output + change
        mask = self._tokens.of(key)  # (b, T)
        wide = torch.promote_types(change.dtype, torch.float32)
        norms = torch.linalg.vector_norm(change, dim=-1, dtype=wide).view(mask.shape)
        if self.observer is not None:
            self.observer(norms, mask)
        open_ = in_scope(norms, mask, self.alpha, self.ratio).view(*change.shape[:-1], 1)
        return torch.where(open_, output + change, output)

    def _delta_in(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype == self.delta.dtype:
            return self.delta
        if self._cast is None or self._cast.dtype != dtype or self._cast.device != self.delta.device:
            self._cast = self.delta.to(dtype)
        return self._cast

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HookLayer:
        # `.half()` and `.to(bfloat16)` move the model, not the edits: Delta stays float32 and is cast when used.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self._cast = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading copies into the buffer, which session states share.
        self.delta, self._cast = self.delta.clone(), None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        d, m = self.delta.shape
        return f"d={d}, m={m}, alpha={self.alpha.item():.3f}, mode={self.mode.value}"
