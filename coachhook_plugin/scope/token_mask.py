"""Which tokens of a forward pass are real, for rules that compare the tokens of a sequence."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn


class Pass(threading.local):
    """This thread's running forward pass."""

    rows: tuple[int, int] | None = None  # (b, T)
    mask: torch.Tensor | None = None  # (b, T) bool; None: every token is real

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model has not begun one


class TokenMask:
    """Which tokens of the running forward pass are real; shared by the gates of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._pass = Pass()
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
        rows, mask = self._pass.rows, self._pass.mask
        if rows is None or rows[0] * rows[1] * key.shape[-1] != key.numel():
            rows = (key.shape[0], key.shape[1]) if key.dim() == 3 else (1, key.shape[0])
            return torch.ones(rows, dtype=torch.bool, device=key.device)
        if mask is None:
            return torch.ones(rows, dtype=torch.bool, device=key.device)
        return mask.to(key.device)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            self._leave()
            return
        self._pass.rows = (tokens.shape[0], tokens.shape[1])
        self._pass.mask = real_tokens(given.get("attention_mask"), tokens.shape[1])

    def _leave(self, *_: Any) -> None:
        self._pass.rows = self._pass.mask = None


def real_tokens(mask: Any, width: int) -> torch.Tensor | None:
    """(b, T) bool: which tokens of a pass of `width` tokens are real; None: the mask does not tell.

    Args:
        mask: what a causal language model is given as its attention mask: (b, past + T); or (b, 1, T, slots), boolean
            or additive, as generation makes it for a static cache; or several of these by kind of attention.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] < width:
        return None
    if mask.dim() == 2:
        return mask[:, -width:].bool()  # in cached decoding the mask covers the past as well
    if mask.dim() != 4 or mask.shape[2] != width:
        return None
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1  # (b, T, slots)
    # The last slot that a real token sees is its own, and those of one pass stand in a line; padding sees less.
    slots = torch.arange(mask.shape[-1], device=mask.device)
    start = allowed.int().mul(slots + 1).amax(-1) - slots[:width]  # (b, T)
    return start == start.amax()
