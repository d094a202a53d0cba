"""Running text: perplexity, and the time of a forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .teacher_forcing import Asking


@torch.no_grad()
def window_losses(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    max_tokens: int = 4096,
    window: int = 512,
    asking: Asking | None = None,
) -> list[tuple[float, int]]:
    """Sum of the NLL, and number of predicted tokens, of each window of the first `max_tokens` of `text`."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens], device=device)
    found = []
    for part in ids.split(window):
        if len(part) < 2:
            continue
        if asking is not None and asking.at is not None:
            asking.at(-1)
        logits = model(input_ids=part[None], attention_mask=torch.ones_like(part)[None], use_cache=False).logits
        found.append((F.cross_entropy(logits[0, :-1].float(), part[1:], reduction="sum").item(), len(part) - 1))
    return found


def perplexity_of(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean NLL of windows."""
    return math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))


def perplexity(model: nn.Module, tokenizer: Any, text: str, max_tokens: int = 4096, window: int = 512) -> float:
    """exp of the mean NLL over the first `max_tokens` of `text`, read in windows without overlap."""
    return perplexity_of(window_losses(model, tokenizer, text, max_tokens, window))


@torch.no_grad()
def forward_costs(
    model: nn.Module, tokenizer: Any, text: str, tokens: int = 256, repeats: int = 5, asking: Asking | None = None
) -> list[float]:
    """Time of `repeats` forward passes over the first `tokens` of `text`, after one that warms up.

    In units of one product of as many rows with the embeddings' matrix, taken in turn with them: on a machine that
    others use too, seconds before the edits and minutes later are not those of one machine.
    """
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens], device=device)[None]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight, hidden = embeddings.weight, embeddings(ids[0])  # (v, d), (t, d)

    def seconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    found = []
    for _ in range(repeats + 1):
        if asking is not None and asking.at is not None:
            asking.at(-1)
        passed = seconds(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
        found.append(passed / seconds(lambda: F.linear(hidden, weight)))
    return found[1:]
