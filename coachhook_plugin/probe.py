"""What the hook layers make of given text: how far inside the scope its tokens are, how large their change is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .architectures import ModelParts
from .hook import HookLayer
from .scope import ZScoreGate
from .tokens import Encoder, Places, Request, Row, micro_batches, place
from .trace import captured, evaluating, in_this_thread

LOG = logging.getLogger(__name__)


def margins(model: nn.Module, parts: ModelParts, hooks: dict[int, HookLayer], ids: torch.Tensor) -> torch.Tensor:
    """(T,): how far each token of `ids` (T,) is inside the scope, the largest of all layers; see `Gate.margin`."""
    ids = ids[None].to(next(model.parameters()).device)
    return _margins(model, parts, hooks, {"input_ids": ids, "use_cache": False}, ids.shape)[0]


def in_scope(
    model: nn.Module,
    parts: ModelParts,
    hooks: dict[int, HookLayer],
    encoder: Encoder,
    requests: Sequence[Request],
    budget: int,
    first: Places,
) -> list[bool]:
    """Whether the subject of each plain prompt is in scope; where it is not, the user is told.

    Args:
        first: what messages call the requests, see `tokens.place`.
    """
    rows = [[encoder.prompt("", request)] for request in requests]
    found: list[bool] = []
    for chunk in micro_batches(rows, budget):
        batch = encoder.batch([row for i in chunk for row in rows[i]], next(model.parameters()).device)
        of_batch = _margins(model, parts, hooks, batch.model_inputs(), batch.input_ids.shape)  # (b, T)
        found += (of_batch.gather(1, batch.subject[:, None].cpu())[:, 0] >= 1).tolist()
    for i, (request, (row,), inside) in enumerate(zip(requests, rows, found, strict=True)):
        if not inside:
            _tell(place(first, i), request, row, any(isinstance(hook.gate, ZScoreGate) for hook in hooks.values()))
    return found


@torch.no_grad()
def _margins(
    model: nn.Module,
    parts: ModelParts,
    hooks: dict[int, HookLayer],
    inputs: dict[str, Any],
    shape: torch.Size,
) -> torch.Tensor:
    """The same for rows (b, T)."""
    found = torch.full(shape, -torch.inf)

    def look(hook: HookLayer, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal found
        margin = hook.margin(given[0])
        if margin is not None:
            found = torch.maximum(found, margin.reshape(shape).to(found))

    handles = [
        parts.projections[i].register_forward_pre_hook(in_this_thread(partial(look, hook)))
        for i, hook in hooks.items()
    ]
    try:
        with evaluating(model), captured(parts.projections[max(parts.projections)], stop=True):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tell(name: int, request: Request, row: Row, zscore: bool) -> None:
    if zscore:
        why = "it stands out too little from the other tokens; lower alpha, or take scope: leverage"
    elif row.subject == 0:
        why = "it is the very first token of the text, which looks like every other first token; put a word before it"
    else:
        why = "too much other text looks like it; raise scope_budget, or name the subject more fully"
    LOG.warning(
        "request %d, subject: %r lies outside the editing scope in %r, which therefore keeps its old answer: %s",
        name,
        request.subject,
        request.prompt,
        why,
    )


@torch.no_grad()
def change_norms(
    model: nn.Module,
    projection: nn.Module,
    gate: ZScoreGate,
    encoder: Encoder,
    requests: Sequence[Request],
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """||Delta k|| and which tokens are real, (2 u, T), of the requests' prompts, for rules that look ahead.

    Measured as at inference, shallower layers in force, and on each prompt both as it stands and with its target: an
    edited prompt must stay inside while its answer is being written.
    """
    rows = [[encoder.prompt("", request), encoder.with_target("", request)] for request in requests]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    gate.observer = lambda norms, mask: seen.append((norms, mask))
    try:
        for chunk in micro_batches(rows, budget):
            batch = encoder.batch([row for i in chunk for row in rows[i]], next(model.parameters()).device)
            with captured(projection, stop=True):
                model(**batch.model_inputs())
    finally:
        gate.observer = None
    norms, mask = (
        nn.utils.rnn.pad_sequence([row for part in parts for row in part], batch_first=True)
        for parts in zip(*seen, strict=True)
    )
    return norms, mask
