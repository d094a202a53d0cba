"""Running text: perplexity, and the time of a forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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
) -> list[tuple[float, int]]:
    """Sum of the NLL, and number of predicted tokens, of each window of the first `max_tokens` of `text`."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens], device=device)
    found = []
    for part in torch.split(ids, window):
        if len(part) < 2:
            continue
        logits = model(input_ids=part[None], attention_mask=torch.ones_like(part)[None], use_cache=False).logits
        found.append((F.cross_entropy(logits[0, :-1].float(), part[1:], reduction="sum").item(), len(part) - 1))
    return found


def perplexity_of(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean NLL of windows; NaN where there are none."""
    count = sum(count for _, count in losses)
    return math.exp(sum(loss for loss, _ in losses) / count) if count else math.nan


def perplexity(model: nn.Module, tokenizer: Any, text: str, max_tokens: int = 4096, window: int = 512) -> float:
    """exp of the mean NLL over the first `max_tokens` of `text`, read in windows without overlap."""
    return perplexity_of(window_losses(model, tokenizer, text, max_tokens, window))


@torch.no_grad()
def forward_seconds(
    model: nn.Module, tokenizer: Any, text: str, tokens: int = 128, asking: Asking | None = None
) -> float:
    """Wall clock of one forward pass over the first `tokens` of `text`, after one that warms up."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens], device=device)[None]
    started = 0.0
    for _ in range(2):
        if asking is not None and asking.at is not None:
            asking.at(-1)
        wait(device)
        started = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it: times are wall clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
