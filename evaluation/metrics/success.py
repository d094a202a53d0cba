"""The success scores of the ROME family: which of two answers the model finds more likely.

An answer's likelihood is the mean over its tokens, as in ROME's evaluation of CounterFact. ES and PS: the share of
prompts and rephrasings where the new answer beats the old one. NS: the share of neighbours where their true answer
beats the new one. NKP: the share of neighbours where every token of the answer is said as before the edits.
A prompt whose two answers are the same does not count: there is nothing to win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .teacher_forcing import Answer


@dataclass(frozen=True)
class Success:
    """Of one record; NaN where it has no such prompt, or no old answer other than the new one."""

    ES: float
    PS: float
    NS: float
    NKP: float


def success(
    prompt: Sequence[tuple[Answer, Answer]],
    rephrases: Sequence[tuple[Answer, Answer]],
    neighbours: Sequence[tuple[Answer, Answer]],
    before: Sequence[Answer],
) -> Success:
    """Score one record.

    Args:
        prompt, rephrases: (new answer, old answer) at each prompt.
        neighbours: (true answer, new answer) at each neighbour.
        before: the neighbours' true answers as read before the edits.
    """
    kept = [old.said == true.said for old, (true, _) in zip(before, neighbours, strict=False)]
    return Success(_wins(prompt), _wins(rephrases), _wins(neighbours), _share(kept))


def _wins(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    return _share([one.nll < other.nll for one, other in pairs if one.wanted != other.wanted])


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
