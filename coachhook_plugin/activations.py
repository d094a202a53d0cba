"""Keys and values at the subject (MEMIT: `compute_ks.py`, `get_module_input_output_at_words`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .memory import working_precision
from .tokens import Batch, Encoder, Request, Row, micro_batches
from .trace import captured
from .tree import TokenTree


@torch.no_grad()
def subject_keys(
    model: nn.Module,
    projection: nn.Module,
    encoder: Encoder,
    requests: Sequence[Request],
    prefixes: Sequence[str],
    budget: int,
    device: torch.device,
    looks_ahead: bool = True,
    trees: bool = False,
) -> torch.Tensor:
    """(u, 1 + prefixes, m): the projection's input at the subject's last token, of the plain prompt and prefixed.

    Args:
        budget: tokens in one forward pass.
        looks_ahead: whether tokens behind the subject can change what it is answered.
        trees: whether the model may run token trees (`target.Targets`).
    """
    rows = [[_row(encoder, prefix, request, looks_ahead) for prefix in ("", *prefixes)] for request in requests]
    return _keys(model, projection, encoder, rows, budget, device, trees)


@torch.no_grad()
def opening_keys(
    model: nn.Module,
    projection: nn.Module,
    encoder: Encoder,
    requests: Sequence[Request],
    budget: int,
    device: torch.device,
) -> torch.Tensor:
    """(u, m): the same where the subject begins a text, as it does when somebody asks about it. Arguments as above."""
    rows = [[encoder.essence(request).up_to_subject()] for request in requests]
    return _keys(model, projection, encoder, rows, budget, device, trees=False)[:, 0]


@torch.no_grad()
def subject_values(
    model: nn.Module,
    block: nn.Module,
    encoder: Encoder,
    requests: Sequence[Request],
    budget: int,
    device: torch.device,
    looks_ahead: bool = True,
    trees: bool = False,
) -> torch.Tensor:
    """(d, u): what the block now answers at the subject's last token of the plain prompt. Arguments as above."""
    rows = [[_row(encoder, "", request, looks_ahead)] for request in requests]
    columns = []
    for chunk in micro_batches(rows, budget):
        batch = encoder.batch([row for i in chunk for row in rows[i]], device)
        columns.append(working_precision(_at_subject(model, block, batch, trees).output))
    return torch.cat(columns).T


def _keys(
    model: nn.Module,
    projection: nn.Module,
    encoder: Encoder,
    rows: Sequence[Sequence[Row]],
    budget: int,
    device: torch.device,
    trees: bool,
) -> torch.Tensor:
    """(u, n, m) for n rows of each request."""
    keys = []
    for chunk in micro_batches(rows, budget):
        batch = encoder.batch([row for i in chunk for row in rows[i]], device)
        found = _at_subject(model, projection, batch, trees).input
        keys.append(working_precision(found).view(len(chunk), len(rows[0]), -1))
    return torch.cat(keys)


def _row(encoder: Encoder, prefix: str, request: Request, looks_ahead: bool) -> Row:
    row = encoder.prompt(prefix, request)
    return row if looks_ahead else row.up_to_subject()


@dataclass(frozen=True)
class _AtSubject:
    input: torch.Tensor  # (b, x) what the module was given at each row's subject
    output: torch.Tensor  # (b, y)


def _at_subject(model: nn.Module, module: nn.Module, batch: Batch, tree: bool) -> _AtSubject:
    """What passes through one module at the subjects."""
    each = torch.arange(len(batch.subject), device=batch.subject.device)
    if tree:
        run = TokenTree.of(batch)
        inputs = run.model_inputs(next(model.parameters()).dtype)
        places = run.node[each, batch.subject]
    else:
        inputs = batch.model_inputs()
        places = each * batch.input_ids.shape[1] + batch.subject
    with captured(module, stop=True) as seen:
        model(**inputs)
    # (b, T, x), or (b T, x) from blocks that flatten their tokens
    found = (state.reshape(-1, state.shape[-1])[places.to(state.device)] for state in (seen.input, seen.output))
    return _AtSubject(*found)
