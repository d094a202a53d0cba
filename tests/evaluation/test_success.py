"""ES, PS, NS and NKP against probabilities computed one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluation.data import Probe, Record
from evaluation.metrics import Answer, success
from evaluation.protocol import read

RECORD = Record(
    "a",
    "The capital of France is",
    "France",
    "Rome",
    "Paris and more",
    rephrases=("France has the capital", "Its capital, says France, is"),
    locality=(Probe("n", "The capital of Spain is", "Madrid"), Probe("n", "Norway lies in", "Europe")),
)


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean over the answer's tokens, one row."""
    ids, first = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(first, len(ids))) / (len(ids) - first)


def test_success_says_which_answer_is_likelier(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama").eval()
    (reading,) = read(model, tokenizer, [RECORD], rivals=True)
    for answer, (prompt, text) in zip(
        [*reading.prompt, *reading.prompt_rivals, *reading.locality_rivals],
        [(RECORD.prompt, "Rome"), (RECORD.prompt, "Paris and more"), *((p.prompt, "Rome") for p in RECORD.locality)],
        strict=True,
    ):
        assert answer.nll == pytest.approx(-log_likelihood(model, tokenizer, prompt, text), abs=1e-4)
    found = success(
        list(zip(reading.prompt, reading.prompt_rivals, strict=True)),
        list(zip(reading.rephrases, reading.rephrase_rivals, strict=True)),
        list(zip(reading.locality, reading.locality_rivals, strict=True)),
        reading.locality,
    )

    def beats(prompt: str, one: str, other: str) -> bool:
        return log_likelihood(model, tokenizer, prompt, one) > log_likelihood(model, tokenizer, prompt, other)

    assert float(beats(RECORD.prompt, "Rome", RECORD.ground_truth)) == found.ES
    assert sum(beats(p, "Rome", RECORD.ground_truth) for p in RECORD.rephrases) / 2 == found.PS
    assert sum(beats(p.prompt, p.answer, "Rome") for p in RECORD.locality) / 2 == found.NS
    assert found.NKP == 1


def test_a_neighbour_with_one_other_token_is_not_kept() -> None:
    one, other = Answer([1, 2], [5, 6], 0.1), Answer([1, 3], [5, 6], 0.1)
    assert success([], [], [(other, one), (one, one)], [one, one]).NKP == 0.5


def test_records_without_an_old_answer_have_no_success() -> None:
    found = success([], [], [], [])
    assert all(map(math.isnan, (found.ES, found.PS, found.NS, found.NKP)))


def test_an_old_answer_that_is_the_new_one_can_neither_win_nor_lose() -> None:
    """ZsRE has such records: they would count against every method."""
    new, old, same = Answer([1], [5], 0.1), Answer([1], [6], 0.2), Answer([1], [5], 0.1)
    found = success([(new, same)], [(new, same), (new, old)], [(old, new), (new, same)], [old, new])
    assert math.isnan(found.ES)
    assert (found.PS, found.NS, found.NKP) == (1, 0, 1)
