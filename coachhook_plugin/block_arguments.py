"""What a block is given besides its hidden states, cut and rearranged like them.

Nothing names the dimensions of such an argument (rotary angles, positions, what an edited layer chose), so its shape
has to tell. That can be wrong, as where there are as many heads as rows; what is run with such arguments is therefore
compared with the model's own answer (`observation`, `tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Change = Callable[[torch.Tensor], torch.Tensor]


def of_tokens(value: Any, rows: int, width: int, tokens: Change, places: Change) -> Any:
    """The argument with every tensor of tokens changed.

    Args:
        rows, width: of the hidden states.
        tokens: given what has an entry for each token (rows, width, ...), also where all rows share it.
        places: given the tokens' places in the cache (width,).
    """
    if isinstance(value, tuple | list):
        return type(value)(of_tokens(item, rows, width, tokens, places) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() >= 2 and value.shape[:2] in ((1, width), (rows, width)):
        return tokens(value.expand(rows, *value.shape[1:]))
    return places(value) if value.shape == (width,) else value


def of_rows(value: Any, rows: torch.Tensor, count: int) -> Any:
    """Some of the rows of every tensor that has `count` of them."""
    if isinstance(value, Mapping):
        return {key: of_rows(item, rows, count) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(of_rows(item, rows, count) for item in value)
    return value[rows.to(value.device)] if has_rows(value, count) else value


def has_rows(value: Any, count: int) -> bool:
    """Whether `of_rows` would take any of its rows."""
    if isinstance(value, Mapping):
        return any(has_rows(item, count) for item in value.values())
    if isinstance(value, tuple | list):
        return any(has_rows(item, count) for item in value)
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[0] == count
