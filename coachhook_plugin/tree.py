"""Rows that begin alike share their first tokens: one pass runs the tree of all rows.

What a causal model answers at a token depends on the tokens before it alone. The rows of a batch of facts are every
prompt behind every context prefix, so most of their tokens stand in several rows. As one sequence of the tree's nodes,
each at its place in its rows and looking at its ancestors, every one of them is run once, and there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .block_arguments import of_tokens
from .tokens import Batch


@dataclass(frozen=True)
class TokenTree:
    """The rows of a batch as the nodes of a tree, each node a token."""

    ids: torch.Tensor  # (1, n)
    positions: torch.Tensor  # (1, n) in the rows
    sees: torch.Tensor  # (n, n) whether a node comes before another one in a row, or is it
    node: torch.Tensor  # (b, T) of each token of the batch; padding has its row's last one

    @classmethod
    def of(cls, batch: Batch) -> TokenTree:
        """The tree of a batch whose rows have at least one token."""
        known: dict[tuple[int, int], int] = {}  # by parent and token
        ids: list[int] = []
        positions: list[int] = []
        parents: list[int] = []
        node = np.zeros(batch.input_ids.shape, dtype=np.int64)
        lengths = batch.attention_mask.sum(1).tolist()
        for b, (row, length) in enumerate(zip(batch.input_ids.tolist(), lengths, strict=True)):
            at = -1
            for t, token in enumerate(row[:length]):
                parent, at = at, known.setdefault((at, token), len(ids))
                if at == len(ids):
                    ids.append(token)
                    positions.append(t)
                    parents.append(parent)
                node[b, t] = at
            node[b, length:] = at
        sees = np.eye(len(ids), dtype=bool)
        for at, parent in enumerate(parents):
            if parent >= 0:
                sees[at] |= sees[parent]
        ids_, positions_, sees_, node_ = (
            torch.as_tensor(x).to(batch.input_ids.device) for x in (ids, positions, sees, node)
        )
        return cls(ids_[None], positions_[None], sees_, node_)

    def model_inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """For a model of this dtype, which must take position ids and a mask of four dimensions as it is."""
        mask = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device)
        mask = mask.masked_fill(~self.sees, torch.finfo(dtype).min)
        return {
            "input_ids": self.ids,
            "attention_mask": mask[None, None],
            "position_ids": self.positions,
            "use_cache": False,
        }

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """(1, n, ...) -> (b, T, ...)"""
        return value[0][self.node.to(value.device)]

    def row_argument(self, value: Any) -> Any:
        """What a block would be given for the rows, of what it was given for the tree."""
        n, width = self.ids.shape[1], self.node.shape[1]
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-2:] == (n, n):
            node = self.node.to(value.device)
            mask = value[0, 0][node[:, :, None], node[:, None, :]][:, None]  # (b, 1, T, T)
            # Padding stands for copies of the last token, which must not look at them.
            ahead = torch.ones(width, width, dtype=torch.bool, device=value.device).triu(1)
            return mask.masked_fill(ahead, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        return of_tokens(value, 1, n, self.rows, lambda value: torch.arange(width, device=value.device))
