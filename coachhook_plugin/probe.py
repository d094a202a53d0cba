"""What the hook layers make of given text: how far inside the scope its tokens are, how large their change is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from .architectures import ModelParts
from .hook import HookLayer
from .scope import ZScoreGate
from .tokens import Encoder, Request, micro_batches
from .trace import captured, frozen

LOG = logging.getLogger(__name__)


@torch.no_grad()
def margins(model: nn.Module, parts: ModelParts, hooks: dict[int, HookLayer], ids: torch.Tensor) -> torch.Tensor:
    """(T,): how far each token of `ids` (T,) is inside the scope, the largest of all layers; see `Gate.margin`."""
    found = torch.full(ids.shape, -torch.inf)
    seen: dict[int, torch.Tensor] = {}
    handles = [
        parts.projections[layer].register_forward_pre_hook(
            lambda _, inputs, layer=layer: seen.update({layer: inputs[0]})
        )
        for layer in hooks
    ]
    try:
        with frozen(model), captured(parts.projections[max(parts.projections)], stop=True):
            model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, key in seen.items():
        margin = hooks[layer].margin(key)
        if margin is not None:
            found = torch.maximum(found, margin.reshape(-1).to(found))
    return found


def opens(
    model: nn.Module, parts: ModelParts, hooks: dict[int, HookLayer], encoder: Encoder, request: Request, place: int
) -> bool:
    """Whether the plain prompt's subject is in scope; where it is not, the user is told about request `place`."""
    row = encoder.prompt("", request)
    if margins(model, parts, hooks, torch.tensor(row.ids))[row.subject] >= 1:
        return True
    if any(isinstance(hook.gate, ZScoreGate) for hook in hooks.values()):
        why = "it stands out too little from the other tokens; lower alpha, or take scope: leverage"
    elif row.subject == 0:
        why = "it is the very first token of the text, which looks like every other first token; put a word before it"
    else:
        why = "too much other text looks like it; raise scope_budget, or name the subject more fully"
    LOG.warning(
        "request %d, subject: %r lies outside the editing scope in %r, which therefore keeps its old answer: %s",
        place,
        request.subject,
        request.prompt,
        why,
    )
    return False


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
