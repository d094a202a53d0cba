"""One protocol for every method: all scores before -> all edits -> all scores after.

Scoring an edit right after it is made, as the toolkit's sequential modes do, measures neither what later edits destroy
nor what the edit itself does to the answers that were scored before it.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from .data import Record
from .metrics import Answer, agreement, answers, perplexity

METRICS = ("reliability", "generality", "locality", "portability")


class EditingMethod(Protocol):
    """A model, and a way of writing facts into it."""

    name: str
    model: nn.Module
    tokenizer: Any

    def prepare(self) -> None:
        """What is done once for a model and kept on disk (key statistics); not part of the time of an edit."""
        ...

    def edit(self, records: Sequence[Record]) -> None:
        """Write one batch on top of all earlier ones."""
        ...

    def kept_bytes(self) -> int:
        """Memory that the edits occupy beside the model."""
        ...


@dataclass(frozen=True)
class Reading:
    """What the model says at one record's probes."""

    prompt: list[Answer]
    rephrases: list[Answer]
    locality: list[Answer]
    portability: list[Answer]


@dataclass(frozen=True)
class Scores:
    """Of one record; NaN where it has no such probe."""

    reliability: float
    generality: float
    locality: float  # share of tokens said as before the edits
    portability: float


@dataclass
class Outcome:
    """Everything one run of a method measured."""

    method: str
    records: list[dict[str, Any]]  # a line for each edit: what was edited, scores before and after
    before: dict[str, float]
    after: dict[str, float]
    perplexity_before: float
    perplexity_after: float
    seconds_per_edit: float
    kept_megabytes: float
    peak_megabytes: float
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt, target, before, after

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_after / self.perplexity_before

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


def consecutive(
    method: EditingMethod, records: Sequence[Record], batch_size: int, held_text: str, samples: int = 5
) -> Outcome:
    """Edit `records` batch after batch, and measure before the first and after the last."""
    method.prepare()
    before = read(method.model, method.tokenizer, records, "scores before")
    perplexity_before = perplexity(method.model, method.tokenizer, held_text)
    spread = records[:: max(1, len(records) // samples)][:samples] if samples else []
    said_before = generate(method.model, method.tokenizer, [record.prompt for record in spread])

    seconds = 0.0
    with tqdm(total=len(records), desc=f"{method.name}: edits", unit="edit") as bar:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            started = time.perf_counter()
            method.edit(batch)
            seconds += time.perf_counter() - started
            bar.update(len(batch))

    after = read(method.model, method.tokenizer, records, "scores after")
    said_after = generate(method.model, method.tokenizer, [record.prompt for record in spread])
    scores = [(score(b, b), score(b, a)) for b, a in zip(before, after, strict=True)]
    return Outcome(
        method=method.name,
        records=[
            {
                "case_id": record.case_id,
                "prompt": record.prompt,
                "subject": record.subject,
                "target_new": record.target_new,
                "before": _known(asdict(old)),
                "after": _known(asdict(new)),
            }
            for record, (old, new) in zip(records, scores, strict=True)
        ],
        before=mean_scores([old for old, _ in scores]),
        after=mean_scores([new for _, new in scores]),
        perplexity_before=perplexity_before,
        perplexity_after=perplexity(method.model, method.tokenizer, held_text),
        seconds_per_edit=seconds / len(records),
        kept_megabytes=method.kept_bytes() / 2**20,
        peak_megabytes=peak_megabytes(),
        samples=[
            {"prompt": record.prompt, "target": record.target_new, "before": old, "after": new}
            for record, old, new in zip(spread, said_before, said_after, strict=True)
        ],
    )


def read(model: nn.Module, tokenizer: Any, records: Sequence[Record], what: str = "scores") -> list[Reading]:
    """Ask the model every probe of every record."""
    asked: list[tuple[str, str]] = []
    counts = []
    for record in records:
        probes = [
            [(record.prompt, record.target_new)],
            [(prompt, record.target_new) for prompt in record.rephrases],
            [(probe.prompt, probe.answer) for probe in record.locality],
            [(probe.prompt, probe.answer) for probe in record.portability],
        ]
        counts.append([len(group) for group in probes])
        asked += [probe for group in probes for probe in group]
    chunk = 64
    said: list[Answer] = []
    for start in tqdm(range(0, len(asked), chunk), desc=what, unit="batch", leave=False):
        said += answers(model, tokenizer, asked[start : start + chunk])
    source = iter(said)
    return [Reading(*([next(source) for _ in range(count)] for count in row)) for row in counts]


def score(before: Reading, after: Reading) -> Scores:
    """The toolkit's four scores of one record; with `after` equal to `before`, those of the unedited model."""
    return Scores(
        reliability=_mean([answer.accuracy for answer in after.prompt]),
        generality=_mean([answer.accuracy for answer in after.rephrases]),
        locality=_mean([agreement(b.said, a.said) for b, a in zip(before.locality, after.locality, strict=True)]),
        portability=_mean([answer.accuracy for answer in after.portability]),
    )


def mean_scores(scores: Sequence[Scores]) -> dict[str, float]:
    """Mean of each score over the records that have it."""
    return {name: _mean([getattr(one, name) for one in scores]) for name in METRICS}


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 12) -> list[str]:
    """Greedy continuations, each prompt by itself."""
    rows = continuations(model, tokenizer, prompts, tokens)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 12, use_cache: bool = True
) -> list[list[int]]:
    """The same as token ids, with a natural stop."""
    rows = []
    for prompt in tqdm(prompts, desc="generating" if use_cache else "generating without cache", leave=False):
        # Some tokenizers give more than a model's generate takes.
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
        out = model.generate(
            **ids, max_new_tokens=tokens, do_sample=False, use_cache=use_cache, pad_token_id=tokenizer.eos_token_id
        )
        rows.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return rows


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _known(scores: dict[str, float]) -> dict[str, float]:
    """Without NaN, which JSON does not know."""
    return {name: value for name, value in scores.items() if not math.isnan(value)}
