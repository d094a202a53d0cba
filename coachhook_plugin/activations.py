"""Keys and values at the subject (MEMIT: `compute_ks.py`, `get_module_input_output_at_words`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .memory import working_precision
from .tokens import Encoder, Request, Row, micro_batches
from .trace import captured


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
) -> torch.Tensor:
    """(u, 1 + prefixes, m): the projection's input at the subject's last token, of the plain prompt and prefixed.

    Args:
        budget: tokens in one forward pass.
        looks_ahead: whether tokens behind the subject can change what it is answered.
    """
    rows = [[_row(encoder, prefix, request, looks_ahead) for prefix in ("", *prefixes)] for request in requests]
    keys = []
    for chunk in micro_batches(rows, budget):
        batch = encoder.batch([row for i in chunk for row in rows[i]], device)
        with captured(projection, stop=True) as seen:
            model(**batch.model_inputs())
        found = _at_subject(seen.input, batch.input_ids.shape, batch.subject)  # (b, m)
        keys.append(working_precision(found).view(len(chunk), 1 + len(prefixes), -1))
    return torch.cat(keys)


@torch.no_grad()
def subject_values(
    model: nn.Module,
    block: nn.Module,
    encoder: Encoder,
    requests: Sequence[Request],
    budget: int,
    device: torch.device,
    looks_ahead: bool = True,
) -> torch.Tensor:
    """(d, u): what the block now answers at the subject's last token of the plain prompt. Arguments as above."""
    rows = [[_row(encoder, "", request, looks_ahead)] for request in requests]
    columns = []
    for chunk in micro_batches(rows, budget):
        batch = encoder.batch([row for i in chunk for row in rows[i]], device)
        with captured(block, stop=True) as seen:
            model(**batch.model_inputs())
        columns.append(working_precision(_at_subject(seen.output, batch.input_ids.shape, batch.subject)))
    return torch.cat(columns).T


def _row(encoder: Encoder, prefix: str, request: Request, looks_ahead: bool) -> Row:
    row = encoder.prompt(prefix, request)
    return row if looks_ahead else row.up_to_subject()


def _at_subject(hidden: torch.Tensor, shape: torch.Size, subject: torch.Tensor) -> torch.Tensor:
    """(b, T, x), or (b T, x) from blocks that flatten their tokens, to (b, x)."""
    rows = hidden.view(*shape, hidden.shape[-1])
    return rows[torch.arange(shape[0], device=rows.device), subject.to(rows.device)]
