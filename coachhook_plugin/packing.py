"""Rows of different lengths run as one long row; only attention sees them apart.

Projections, norms and activations treat every token alike, so on a batch of short rows they are quickest on one long
row without padding: each weight is read once. For that the model's attention function is wrapped while such a row
runs: the wrapper takes the rows' queries, keys and values apart, lets the library's own function attend, and joins the
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAME = "coachhook_packed"  # of the wrapped attention function in the library's table


@dataclass(frozen=True)
class Packing:
    """Which token of the long row is which of a (g, S) batch of rows."""

    of_batch: torch.Tensor  # (g S,) place in the long row; padding has the place 0
    of_row: torch.Tensor  # (n,) place in the flattened batch
    rows: int

    @classmethod
    def of_lengths(cls, lengths: torch.Tensor) -> Packing:
        """For rows of these lengths (g,)."""
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (g, S)
        of_row = real.flatten().nonzero().flatten()
        of_batch = torch.zeros(real.numel(), dtype=torch.long, device=lengths.device)
        of_batch[of_row] = torch.arange(len(of_row), device=lengths.device)
        return cls(of_batch, of_row, len(lengths))

    def join(self, batch: torch.Tensor) -> torch.Tensor:
        """(g, S, ...) -> (1, n, ...)"""
        return batch.flatten(0, 1).index_select(0, self.of_row.to(batch.device))[None]

    def split(self, row: torch.Tensor) -> torch.Tensor:
        """(1, n, ...) -> (g, S, ...); padding holds copies of the first token."""
        flat = row[0].index_select(0, self.of_batch.to(row.device))
        return flat.view(self.rows, -1, *flat.shape[1:])


class PackedAttention:
    """Stands in for the library's cache while a long row runs: has each row's earlier keys and values."""

    def __init__(self, packing: Packing, kept: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.packing, self.kept = packing, kept  # (g, heads, P, head size) each

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _RUNNING.set(self)
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return int(self.kept[0].shape[2])

    def attend(self, function: Any, module: nn.Module, *states: torch.Tensor, **kwargs: Any) -> tuple[Any, None]:
        """`function` on queries, keys and values (1, heads, n, head size), as if the rows were a batch."""
        query, key, value = (self.packing.split(state.transpose(1, 2)).transpose(1, 2) for state in states)
        key, value = (torch.cat(pair, dim=2) for pair in zip(self.kept, (key, value), strict=True))
        answer = function(module, query, key, value, **kwargs)[0]  # (g, S, heads, head size)
        return self.packing.join(answer), None


_RUNNING: ContextVar[PackedAttention | None] = ContextVar("coachhook_packed_attention", default=None)
_WRAPPED: ContextVar[str] = ContextVar("coachhook_wrapped_attention")


def _packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> Any:
    running = _RUNNING.get()
    if running is None:
        raise RuntimeError("this attention does not ask its cache first")
    _RUNNING.set(None)
    function = _attention_functions()[_WRAPPED.get()]
    return running.attend(function, module, query, key, value, attention_mask=mask, **kwargs)


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow to import; with a model it is there

    return ALL_ATTENTION_FUNCTIONS


def attention_of(blocks: Sequence[nn.Module]) -> str:
    """The name of the attention function that all of the blocks use; empty where it is not one."""
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs_of(blocks)}
    return names.pop() if len(names) == 1 else ""


def configs_of(blocks: Sequence[nn.Module]) -> list[Any]:
    found = (module.config for block in blocks for module in block.modules() if hasattr(module, "config"))
    return list({id(config): config for config in found}.values())


@contextmanager
def packed_attention(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the `with` body the blocks' attention expects `PackedAttention` for a cache.

    Raises:
        TypeError: their attention is not one that can be wrapped.
    """
    configs, name, functions = configs_of(blocks), attention_of(blocks), _attention_functions()
    if name not in functions or name == NAME:
        raise TypeError("the model's attention is not in the library's table, or is wrapped already")
    functions[NAME] = _packed_attention
    token = _WRAPPED.set(name)
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = name
        _WRAPPED.reset(token)
        _RUNNING.set(None)
