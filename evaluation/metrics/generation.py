"""Free generation: what an edited model says when nobody feeds it the answer.

The model writes greedily until it stops by itself. What counts is its first statement: the text up to its end token,
a line break or the end of a sentence, except where the answer itself goes on ("St. Louis"). It is compared with the
answer as question answering does (SQuAD): without case, punctuation, articles and double spaces.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .teacher_forcing import Asking

NATURAL_STOP = re.compile(r"\n|[.!?;](?=\s|$)")
SPARE = 4  # tokens beyond the answer's own: for its end, and for a model that spells it in more
ROWS = 16  # prompts at once: reading the weights is what a step costs
ARTICLES = re.compile(r"\b(a|an|the)\b")


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int | Sequence[int] = 12, asking: Asking | None = None
) -> list[str]:
    """Greedy continuations; prompts of equal length run together where the model's rows do not see each other.

    Args:
        tokens: how many at most; of all prompts, or of each.
    """
    use_cache = asking.use_cache if asking is not None else True
    rows = continuations(model, tokenizer, prompts, tokens, use_cache, asking)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int | Sequence[int] = 12,
    use_cache: bool = True,
    asking: Asking | None = None,
) -> list[list[int]]:
    """The same as token ids, with a natural stop."""
    asking = asking or Asking()
    device = next(model.parameters()).device
    # Some tokenizers give more than a model's generate takes.
    ids = [tokenizer(prompt, return_token_type_ids=False)["input_ids"] for prompt in prompts]
    most = [tokens] * len(ids) if isinstance(tokens, int) else tokens
    found: dict[int, list[int]] = {}
    with tqdm(total=len(ids), desc="generating" if use_cache else "generating without cache", leave=False) as bar:
        for rows in _alike(ids, 1 if asking.alone or asking.at is not None else ROWS):
            if asking.at is not None:
                asking.at(len(ids[rows[0]]) - 1)
            given = torch.tensor([ids[i] for i in rows], device=device)
            out = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max(most[i] for i in rows),
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=tokenizer.eos_token_id,
            )
            for i, row in zip(rows, out[:, given.shape[1] :].tolist(), strict=True):
                found[i] = _up_to(row[: most[i]], _ends(model, tokenizer))
            bar.update(len(rows))
    return [found[i] for i in range(len(ids))]


def room_for(tokenizer: Any, answer: str, least: int) -> int:
    """How many tokens a model needs to say `answer` and end there; at least `least`."""
    return max(least, len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) + SPARE)


def _alike(ids: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of prompts that go into one batch: of equal length, so that nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    for group in by_length.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    return set(known) if isinstance(known, list) else {known}


def _up_to(row: list[int], ends: set[int]) -> list[int]:
    """A row without what stands behind its end: rows of a batch are filled up to the longest."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def first_statement(text: str, answer: str = "") -> str:
    """What is said before the first natural stop; none is where the text has said no more than `answer` has there.

    A line break at the very beginning does not count.
    """
    text = text.strip()
    inside = {
        (stop[0], _plain(answer[: stop.start()]))
        for stop in NATURAL_STOP.finditer(answer)
        if _plain(answer[stop.end() :])
    }
    stops = (stop for stop in NATURAL_STOP.finditer(text) if (stop[0], _plain(text[: stop.start()])) not in inside)
    found = next(stops, None)
    return (text[: found.start()] if found else text).strip()


def is_answered(text: str, answer: str) -> bool:
    """Whether the first statement is the answer and nothing else."""
    articles = not _plain(answer)  # "A" may be the answer itself
    return _plain(first_statement(text, answer), articles) == _plain(answer, articles)


def starts_with(text: str, answer: str) -> bool:
    """Whether the text begins with the answer, whatever follows: the lenient side of `is_answered`."""
    articles = not _plain(answer)
    said, wanted = _plain(text, articles).split(), _plain(answer, articles).split()
    return bool(wanted) and said[: len(wanted)] == wanted


def _plain(text: str, articles: bool = False) -> str:
    """Without case, punctuation and double spaces, and without articles unless they are asked for."""
    kept = "".join(" " if char in string.punctuation else char for char in text.lower())
    return " ".join((kept if articles else ARTICLES.sub(" ", kept)).split())
