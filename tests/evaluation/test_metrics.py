"""Scores and perplexity against slow, obvious versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluation import protocol
from evaluation.data import Probe, Record
from evaluation.metrics import Asking, agreement, answers, forward_seconds, interval_of_ratio, perplexity, text
from evaluation.protocol import METRICS, NoWayBack, Plan, consecutive, forward_pairs, read, score

PROBES = [
    ("The capital of France is", "Rome"),
    ("Marie Curie was born in", "New Zealand"),
    ("Paris", "France"),
    ("The mother tongue of the man who painted it is", "Latin"),
]


def said_one_by_one(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """One row, no padding: the likeliest token at every place of the answer."""
    ids = tokenizer(prompt + " " + answer)["input_ids"]
    first = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return [int(logits[place - 1].argmax()) for place in range(first, len(ids))], ids[first:]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_batch_mates_or_padding(
    tiny: Callable[..., Any], tokenizer: Any, batch_tokens: int, side: str
) -> None:
    model, before = tiny("llama").eval(), tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        found = answers(model, tokenizer, PROBES, batch_tokens)
    finally:
        tokenizer.padding_side = before
    for (prompt, answer), got in zip(PROBES, found, strict=True):
        assert (got.said, got.wanted) == said_one_by_one(model, tokenizer, prompt, answer)


def test_accuracy_is_the_share_of_the_answers_tokens() -> None:
    assert agreement([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    assert math.isnan(agreement([], []))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement([1], [1, 2])


def test_perplexity_is_exp_of_the_mean_nll_of_the_predicted_tokens(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("gpt2").eval()
    text = "The capital of France is Rome. " * 6
    ids = tokenizer(text)["input_ids"][:40]
    total, count = 0.0, 0
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        for place in range(1, len(part)):
            with torch.no_grad():
                probabilities = model(torch.tensor([part[:place]])).logits[0, -1].double().softmax(-1)
            total -= math.log(probabilities[part[place]].item())
            count += 1
    assert perplexity(model, tokenizer, text, max_tokens=40, window=16) == pytest.approx(math.exp(total / count), 1e-4)


class Overwriting:
    """A "method" whose n-th batch makes the model say a token always: later batches destroy earlier ones."""

    name = "overwriting"
    asking = Asking()

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.calls = model, tokenizer, 0

    def prepare(self) -> None:
        assert self.calls == 0

    def edit(self, records: Any) -> None:
        self.calls += 1
        token = self.tokenizer(f"x {records[0].target_new}")["input_ids"][-1]
        with torch.no_grad():
            self.model.lm_head.weight[:] = 0
            self.model.lm_head.weight[token] = self.model.lm_head.weight.new_ones(self.model.config.n_embd)
            self.model.transformer.ln_f.weight[:] = 0
            self.model.transformer.ln_f.bias[:] = 1

    def kept_bytes(self) -> int:
        return 0

    def state(self) -> None: ...

    def restore(self, state: None) -> None: ...


def test_a_machine_that_becomes_slower_is_not_told_as_the_edits_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = 1.0

    class Stub:
        model = tokenizer = None
        asking, edited = Asking(), True

        def state(self) -> bool:
            return self.edited

        def restore(self, state: bool) -> None:
            self.edited = state

    method: Any = Stub()

    def seconds(*_: Any, **__: Any) -> float:
        nonlocal slower
        slower *= 1.2
        return (1.5 if method.edited else 1.0) * slower

    monkeypatch.setattr(protocol, "forward_seconds", seconds)
    pairs = forward_pairs(method, False, Plan(1, "text", forward_repeats=20))
    assert len(pairs) == 20
    assert method.edited  # as it was
    found = interval_of_ratio(pairs)
    assert all(1.5 <= value <= 1.5 * 1.2 + 1e-9 for value in found)


def test_a_method_whose_model_cannot_be_unedited_has_no_overhead() -> None:
    class Wrapped:
        def state(self) -> None: ...

        def restore(self, state: Any) -> None:
            raise NoWayBack("it puts modules of its own into the model")

    method: Any = Wrapped()
    assert forward_pairs(method, None, Plan(1, "text", forward_repeats=3)) == []


def test_what_warms_up_is_not_timed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, passes, places = 0.0, iter((60.0, 2.0)), []

    class Stub(torch.nn.Linear):
        def forward(self, **_: Any) -> None:  # type: ignore[override]
            nonlocal now
            now += next(passes)

    monkeypatch.setattr(text.time, "perf_counter", lambda: now)
    asking = Asking(at=places.append)
    assert forward_seconds(Stub(1, 1), tokenizer, "The best dish comes from Norway.", asking=asking) == 2
    assert places == [-1, -1]


def test_an_edit_that_a_later_batch_destroys_counts_as_lost(tiny: Callable[..., Any], tokenizer: Any) -> None:
    method = Overwriting(tiny("gpt2", tie_word_embeddings=False).eval(), tokenizer)
    record = [
        Record("a", "The capital of France is", "France", "Rome", locality=(Probe("n", "Paris is in", "France"),)),
        Record("b", "The capital of Spain is", "Spain", "Latin"),
    ]
    ends = [tokenizer(f"x {r.target_new}")["input_ids"][-1] for r in record]
    assert ends[0] != ends[1], "the test needs two targets that end differently"
    outcome = consecutive(method, record, 1, "Some text to read, twice. " * 4, samples=1)
    assert method.calls == 2
    after = read(method.model, tokenizer, record)
    assert set(after[0].prompt[0].said) == {ends[1]}  # the last batch won
    assert outcome.records[0]["after"]["reliability"] == after[0].prompt[0].accuracy
    assert outcome.records[1]["after"]["reliability"] > 0
    assert "locality" not in outcome.records[1]["after"]  # it has no such probe
    assert set(outcome.after) == set(METRICS)


def test_locality_compares_with_the_answers_before_not_with_the_truth(
    tiny: Callable[..., Any], tokenizer: Any
) -> None:
    record = [Record("a", "Paris is in", "Paris", "Rome", locality=(Probe("n", "Rome is in", "Italy and France"),))]
    one, other = (read(tiny("gpt2").eval(), tokenizer, record)[0] for _ in range(2))
    assert score(one, other).locality == 1.0
    assert score(one, other).reliability == one.prompt[0].accuracy
