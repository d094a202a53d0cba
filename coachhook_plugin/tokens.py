"""Requests to token batches: what is wrong with a request, and where its subject and target lie.

Positions come from character offsets, not from string templates: nothing is replaced inside a prompt. Batches are
padded on the right whatever the tokenizer's own padding side is, so that results do not depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# What messages call the requests of a batch: the number of the first, the others counting on from there, or of each.
Places = int | Sequence[int]


@dataclass(frozen=True)
class Request:
    """One fact to write: after `prompt`, which names `subject` exactly once, the model shall say `target_new`."""

    prompt: str
    subject: str
    target_new: str

    @property
    def subject_end(self) -> int:
        """Character after the subject's last one."""
        return self.prompt.index(self.subject) + len(self.subject)


@dataclass(frozen=True)
class Row:
    """One tokenised text; positions are token indices."""

    ids: list[int]
    subject: int  # last token of the subject
    target: range = range(0)  # tokens of the target, where there is one

    def up_to_subject(self) -> Row:
        """Without the tokens behind the subject, which change nothing at it in a causal model."""
        return Row(self.ids[: self.subject + 1], self.subject)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right."""

    input_ids: torch.Tensor  # (b, T)
    attention_mask: torch.Tensor  # (b, T)
    subject: torch.Tensor  # (b,) index of the subject's last token

    def rows(self, which: torch.Tensor | slice) -> Batch:
        """Some of the rows, as wide as before."""
        which = which.to(self.subject.device) if isinstance(which, torch.Tensor) else which
        return Batch(self.input_ids[which], self.attention_mask[which], self.subject[which])

    def model_inputs(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}


def place(first: Places, i: int) -> int:
    """What messages call request `i` of a batch."""
    return first + i if isinstance(first, int) else first[i]


def parse_requests(requests: Iterable[Mapping[str, Any] | Request], first: Places = 0) -> list[Request]:
    """Check a batch of requests as texts; errors count from `first`.

    Raises:
        KeyError: a request lacks `prompt`, `subject` or `target_new`.
        ValueError: anything else that cannot be edited; the message names the request and the field.
    """
    if isinstance(requests, Mapping | str) or not isinstance(requests, Iterable):
        raise ValueError(f"requests is a {type(requests).__name__}; give a list of facts, even for one")
    parsed = [_parsed(place(first, i), request) for i, request in enumerate(requests)]
    if not parsed:
        raise ValueError("requests is empty; give at least one fact to edit")
    seen: dict[tuple[str, str], int] = {}
    for i, request in enumerate(parsed):
        earlier = seen.setdefault((request.prompt, request.subject), i)
        if parsed[earlier].target_new != request.target_new:
            raise ValueError(
                f"request {place(first, i)}, target_new: {request.target_new!r} contradicts "
                f"{parsed[earlier].target_new!r} of request {place(first, earlier)} for the same prompt; "
                "keep one of them, or edit them in separate batches"
            )
    return parsed


def _parsed(i: int, request: Mapping[str, Any] | Request) -> Request:
    given = vars(request) if isinstance(request, Request) else request
    if not isinstance(given, Mapping):
        raise ValueError(f"request {i}: expected prompt, subject and target_new; got {type(given).__name__}")
    for name in ("prompt", "subject", "target_new"):
        if given.get(name) is None:
            beside = "" if name == "prompt" else f" beside the prompt {given['prompt']!r}"
            raise KeyError(f"request {i}: field {name!r} is missing{beside}")
        if not isinstance(given[name], str):
            raise ValueError(f"request {i}, {name}: expected a string, got {type(given[name]).__name__}")
        if not given[name].strip():
            raise ValueError(f"request {i}, {name}: is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in given[name]):
            raise ValueError(f"request {i}, {name}: {given[name]!r} holds half a character; write it as proper UTF-8")
    # One space at the end stands before the target anyway: with and without it is one prompt.
    prompt, subject = re.sub(r"(?<=\S) \Z", "", given["prompt"]), given["subject"].strip()
    if "{" in prompt or "}" in prompt:
        raise ValueError(
            f"request {i}, prompt: braces in {prompt!r}; write the subject out and take the braces away "
            "(the toolkit's prompt templates give them a meaning)"
        )
    count = occurrences(prompt, subject)
    if count == 0:
        at = prompt.lower().find(subject.lower())
        hint = f"it says {prompt[at : at + len(subject)]!r}: match its case" if at >= 0 else "name it as written there"
        raise ValueError(f"request {i}, subject: {subject!r} is not in the prompt {prompt!r}; {hint}")
    if count > 1:
        raise ValueError(
            f"request {i}, subject: {subject!r} occurs {count} times in the prompt {prompt!r}; it must occur once, "
            "or the place to edit is ambiguous"
        )
    return Request(prompt, subject, given["target_new"].strip())


def occurrences(text: str, subject: str) -> int:
    """How often a text names a subject, also where two such places overlap ("ana" in "banana")."""
    return sum(text.startswith(subject, i) for i in range(len(text)))


class Encoder:
    """Tokenises requests for one model."""

    def __init__(self, tokenizer: Any, max_tokens: int | None, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens  # the model's context length
        self.vocabulary = vocabulary  # tokens that the model has an embedding of

    def check_vocabulary(self, requests: Sequence[Request], first: Places = 0) -> None:
        """Raise a ValueError for the first request with a token that the model does not know."""
        for i, request in enumerate(requests):
            ids, _ = self._encode(f"{request.prompt} {request.target_new}")
            unknown = [token for token in ids if self.vocabulary is not None and token >= self.vocabulary]
            if unknown:
                told = self.tokenizer.convert_ids_to_tokens(unknown[0])
                raise ValueError(
                    f"request {place(first, i)}, prompt and target_new: hold the token {told!r} with the id "
                    f"{unknown[0]}, and the model has {self.vocabulary} embeddings; give the model's own tokenizer, "
                    "or resize the embeddings"
                )

    def check_lengths(self, requests: Sequence[Request], prefixes: Sequence[str], first: Places = 0) -> None:
        """Raise a ValueError for the first request that does not fit the model's context with its prefixes."""
        for i, request in enumerate(requests):
            try:
                rows = [self.with_target(prefix, request) for prefix in ("", *prefixes)]
            except ValueError as error:
                raise ValueError(f"request {place(first, i)}, {error}") from None
            longest = max(len(row.ids) for row in rows)
            if self.max_tokens is not None and longest > self.max_tokens:
                raise ValueError(
                    f"request {place(first, i)}, prompt: {longest} tokens with target and context, but the model's "
                    f"context holds {self.max_tokens}; shorten the prompt"
                )

    def prompt(self, prefix: str, request: Request) -> Row:
        """`prefix` + prompt."""
        text = prefix + request.prompt
        ids, last_before = self._encode(text)
        return Row(ids, last_before(len(prefix) + request.subject_end))

    def with_target(self, prefix: str, request: Request) -> Row:
        """`prefix` + prompt + " " + target, the text that shall become likely."""
        prompt = prefix + request.prompt
        text = prompt.rstrip() + prompt[len(prompt.rstrip()) :].ljust(1) + request.target_new
        ids, last_before = self._encode(text)
        target = range(last_before(len(prompt.rstrip())) + 1, last_before(len(text)) + 1)
        if not target:
            raise ValueError(f"target_new: {request.target_new!r} gives no token of its own after the prompt")
        # Tokens that some tokenizers add at the end are not part of the text to predict.
        return Row(ids[: target.stop], last_before(len(prefix) + request.subject_end), target)

    def essence(self, request: Request) -> Row:
        """ "{subject} is a": where an edit shall leave the next-token distribution alone."""
        ids, last_before = self._encode(f"{request.subject} is a")
        return Row(ids, last_before(len(request.subject)))

    def batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        """Pad on the right."""
        width = max(len(row.ids) for row in rows)
        # Padding is masked: any token does, and the tokenizer's own may have no embedding.
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, : len(row.ids)] = torch.tensor(row.ids)
            mask[b, : len(row.ids)] = 1
        subject = torch.tensor([row.subject for row in rows])
        return Batch(ids.to(device), mask.to(device), subject.to(device))

    def _encode(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        """Token ids, and the function from a character position to the last token that starts before it."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, return_offsets_mapping=True)
            spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]  # (0, 0): special tokens
            return list(encoded["input_ids"]), lambda stop: max(
                t for t, (start, end) in enumerate(spans) if start < stop and end > 0
            )
        # Slow tokenizers give no offsets; the text up to the position has as many tokens as lie before it.
        ids = list(self.tokenizer(text)["input_ids"])
        added_at_end = len(ids) - len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if added_at_end and ids[0] in self.tokenizer.all_special_ids:
            added_at_end -= 1
        return ids, lambda stop: len(self.tokenizer(text[:stop])["input_ids"]) - added_at_end - 1


def micro_batches(rows_per_request: Sequence[Sequence[Row]], budget: int) -> Iterator[range]:
    """Cut requests 0..u-1 into runs whose padded rows hold at most `budget` tokens (at least one request each)."""
    start, rows, width = 0, 0, 0
    for i, request in enumerate(rows_per_request):
        wider = max(width, *(len(row.ids) for row in request))
        if i > start and (rows + len(request)) * wider > budget:
            yield range(start, i)
            start, rows, wider = i, 0, max(len(row.ids) for row in request)
        rows, width = rows + len(request), wider
    yield range(start, len(rows_per_request))
