"""Next-token logits from a block's output: by the model's final norm and head alone, where they are all there is.

What some families do besides has no module's name (Cohere scales its logits). So the two are compared once with the
model's own answer; where they differ, the model itself is run for the sake of what it does behind its last block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .architectures import ModelParts
from .observation import Comparison, alike
from .tokens import Batch
from .trace import captured, hidden_of, with_hidden

LOG = logging.getLogger(__name__)

Head = Callable[[torch.Tensor], torch.Tensor]


def head_of(model: nn.Module, parts: ModelParts, batch: Batch, comparison: Comparison) -> Head:
    """What makes the model's logits (n, V) of states (n, d) behind a block.

    Args:
        batch: with a row to compare on.
        comparison: remembers, for later batches on the same model, what was found.

    Raises:
        ValueError: the logits are not made of the last block's output alone.
    """
    own: Head = partial(_by_the_model, model, parts.blocks[-1])
    if comparison.named_head is None:
        hidden, logits = _of_first_row(model, parts, batch)
        if not logits.isfinite().all():  # proves nothing; the objective will tell of the request
            return parts.logits
        comparison.named_head = _agrees(parts.logits, hidden, logits)
        if not comparison.named_head:
            if not _agrees(own, hidden, logits):
                raise ValueError(
                    f"{type(model).__name__}: its logits do not follow from what "
                    f"{parts.names.block.format(len(parts.blocks) - 1)} answers; correct layer_module_tmp, or edit "
                    "another model"
                )
            LOG.warning(
                "%s: its logits are not those of %s and %s alone; each step runs the whole model for them",
                type(model).__name__,
                parts.names.final_norm,
                parts.names.head,
            )
    return parts.logits if comparison.named_head else own


def _by_the_model(model: nn.Module, last: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """(n, V) for states (n, d) in place of the last block's answers to n rows of one token."""

    def answer(_: nn.Module, __: object, given: object) -> object:
        return with_hidden(given, state[:, None].to(hidden_of(given).device))

    ids = torch.zeros(len(state), 1, dtype=torch.long, device=next(model.parameters()).device)
    handle = last.register_forward_hook(answer)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits[:, 0]


@torch.no_grad()
def _of_first_row(model: nn.Module, parts: ModelParts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, d) and (T, V): the last block's answer to the first row, and the model's."""
    ids = batch.input_ids[:1, : int(batch.attention_mask[0].sum())]
    with captured(parts.blocks[-1]) as last:
        logits = model(input_ids=ids, use_cache=False).logits
    return last.output.reshape(ids.shape[1], -1), logits[0]


@torch.no_grad()
def _agrees(head: Head, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    try:
        found = head(hidden)
    except Exception as error:  # as where a projection stands between the two
        LOG.debug("the head cannot be called like that: %s", error)
        return False
    return alike(found, logits.to(found), torch.ones(len(found), dtype=torch.bool))
