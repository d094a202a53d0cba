"""The toolkit's scores, computed in batches (`easyeditor/evaluate/evaluate.py`, teacher forcing), and perplexity.

A probe is a prompt and an answer. The model reads `prompt + " " + answer`; at every token of the answer its most
likely token is compared with the answer's own (reliability, generality, portability) or with what it said before the
edits (locality).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Answer:
    """Token ids at the places of one probe's answer."""

    said: list[int]  # the model's most likely tokens
    wanted: list[int]  # the answer's tokens

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that the model says."""
        return agreement(self.said, self.wanted)


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of places where two equally long token lists are the same; NaN when they are empty."""
    if not one:
        return math.nan
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Any, probes: Sequence[tuple[str, str]], batch_tokens: int = 4096
) -> list[Answer]:
    """Read every (prompt, answer) and note what the model says at the answer's tokens."""
    device = next(model.parameters()).device
    encoded = []
    for index, (prompt, answer) in enumerate(probes):
        ids = tokenizer(f"{prompt} {answer}")["input_ids"]
        encoded.append((index, len(tokenizer(prompt)["input_ids"]), ids))
    encoded.sort(key=lambda item: len(item[2]))  # rows of like length share a batch
    found: list[Answer | None] = [None] * len(probes)
    start = 0
    while start < len(encoded):
        stop = start + 1
        while stop < len(encoded) and len(encoded[stop][2]) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        rows = encoded[start:stop]
        width = max(len(ids) for _, _, ids in rows)
        ids_in = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids_in)
        for row, (_, _, ids) in enumerate(rows):
            ids_in[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        logits = model(input_ids=ids_in.to(device), attention_mask=mask.to(device), use_cache=False).logits
        said = logits.argmax(-1).cpu()  # (b, T)
        for row, (index, first, ids) in enumerate(rows):
            found[index] = Answer(said[row, first - 1 : len(ids) - 1].tolist(), list(ids[first:]))
        start = stop
    return [answer for answer in found if answer is not None]


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, text: str, max_tokens: int = 4096, window: int = 512) -> float:
    """exp of the mean NLL over the first `max_tokens` of `text`, read in windows without overlap."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens], device=device)
    total, count = 0.0, 0
    for part in ids.split(window):
        if len(part) < 2:
            continue
        logits = model(input_ids=part[None], attention_mask=torch.ones_like(part)[None], use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1].float(), part[1:], reduction="sum").item()
        count += len(part) - 1
    return math.exp(total / count)
