"""The toolkit's scores, computed in batches (`easyeditor/evaluate/evaluate.py`, teacher forcing).

A probe is a prompt and an answer. The model reads `prompt + " " + answer`; at every token of the answer its most
likely token is compared with the answer's own (reliability, generality, portability) or with what it said before the
edits (locality).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
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
    nll: float = math.nan  # mean negative log-likelihood of the answer's tokens

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that the model says."""
        return agreement(self.said, self.wanted)


@dataclass(frozen=True)
class Asking:
    """How a method's model has to be asked. The defaults are right for any model whose rows do not see each other."""

    alone: bool = False  # one row at a time: what the method answers depends on batch mates or padding
    use_cache: bool = True  # in generation
    at: Callable[[int], None] | None = None  # told the place of the prompt's last token before each row; -1: of any


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of places where two equally long token lists are the same; NaN when they are empty."""
    if not one:
        return math.nan
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[tuple[str, str]],
    batch_tokens: int = 4096,
    asking: Asking | None = None,
) -> list[Answer]:
    """Read every (prompt, answer) and note what the model says at the answer's tokens."""
    asking = asking or Asking()
    device = next(model.parameters()).device
    spare = "logits_to_keep" in inspect.signature(model.forward).parameters
    encoded = []
    for index, (prompt, answer) in enumerate(probes):
        ids = tokenizer(f"{prompt} {answer}")["input_ids"]
        encoded.append((index, len(tokenizer(prompt)["input_ids"]), ids))
    encoded.sort(key=lambda item: len(item[2]))  # rows of like length share a batch
    found: list[Answer | None] = [None] * len(probes)
    start = 0
    while start < len(encoded):
        stop = start + 1
        while not asking.alone and stop < len(encoded) and len(encoded[stop][2]) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        rows = encoded[start:stop]
        if asking.at is not None:
            asking.at(rows[0][1] - 1)
        width = max(len(ids) for _, _, ids in rows)
        ids_in = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids_in)
        for row, (_, _, ids) in enumerate(rows):
            ids_in[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        asked = {"input_ids": ids_in.to(device), "attention_mask": mask.to(device), "use_cache": False}
        skipped = max(min(first for _, first, _ in rows) - 1, 0) if spare else 0  # places whose logits nobody reads
        if skipped:
            asked["logits_to_keep"] = width - skipped
        logits = model(**asked).logits
        for row, (index, first, ids) in enumerate(rows):
            at_answer = logits[row, first - 1 - skipped : len(ids) - 1 - skipped].float()  # (answer, vocabulary)
            wanted = torch.tensor(ids[first:], device=device)
            nll = F.cross_entropy(at_answer, wanted).item() if len(wanted) else math.nan
            found[index] = Answer(at_answer.argmax(-1).tolist(), list(ids[first:]), nll)
        start = stop
    return [answer for answer in found if answer is not None]
