"""Free generation: what an edited model says when nobody feeds it the answer.

The model writes greedily until it stops by itself. What counts is its first statement: the text up to its end token,
a line break or the end of a sentence. It is compared with the answer as question answering does (SQuAD): without case,
punctuation, articles and double spaces.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .teacher_forcing import Asking

NATURAL_STOP = re.compile(r"\n|[.!?;](?=\s|$)")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 12, asking: Asking | None = None
) -> list[str]:
    """Greedy continuations, each prompt by itself."""
    use_cache = asking.use_cache if asking is not None else True
    rows = continuations(model, tokenizer, prompts, tokens, use_cache, asking)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int = 12,
    use_cache: bool = True,
    asking: Asking | None = None,
) -> list[list[int]]:
    """The same as token ids, with a natural stop."""
    rows = []
    for prompt in tqdm(prompts, desc="generating" if use_cache else "generating without cache", leave=False):
        # Some tokenizers give more than a model's generate takes.
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
        if asking is not None and asking.at is not None:
            asking.at(ids["input_ids"].shape[1] - 1)
        out = model.generate(
            **ids, max_new_tokens=tokens, do_sample=False, use_cache=use_cache, pad_token_id=tokenizer.eos_token_id
        )
        rows.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return rows


def first_statement(text: str) -> str:
    """What is said before the first natural stop; a stop at the very beginning does not count."""
    text = text.strip()
    found = NATURAL_STOP.search(text)
    return (text[: found.start()] if found else text).strip()


def is_answered(text: str, answer: str) -> bool:
    """Whether the first statement is the answer and nothing else."""
    return _plain(first_statement(text)) == _plain(answer)


def starts_with(text: str, answer: str) -> bool:
    """Whether the text begins with the answer, whatever follows: the lenient side of `is_answered`."""
    said, wanted = _plain(text).split(), _plain(answer).split()
    return bool(wanted) and said[: len(wanted)] == wanted


def _plain(text: str) -> str:
    kept = "".join(" " if char in string.punctuation else char for char in text.lower())
    return " ".join(ARTICLES.sub(" ", kept).split())
