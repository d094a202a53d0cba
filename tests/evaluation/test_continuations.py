"""Free generation: what counts as the answer that an edited model gives by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluation.metrics import Asking, answers, continuations, first_statement, generate, is_answered, starts_with


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        (" Rome. It is the seat of", "Rome"),
        (" Rome\n\nThe answer", "Rome"),
        (" Rome, the city", "Rome, the city"),
        ("\n Rome", "Rome"),
        (" St.Gallen is", "St.Gallen is"),  # a point inside a word ends nothing
        (" 3.5 metres! And", "3.5 metres"),
        ("", ""),
    ],
)
def test_a_statement_ends_where_a_reader_would_end_it(text: str, statement: str) -> None:
    assert first_statement(text) == statement


@pytest.mark.parametrize(
    ("text", "answer", "exact", "begins"),
    [
        (" Rome. It", "Rome", True, True),
        (" the Rome.", "rome", True, True),
        (" Rome and Paris.", "Rome", False, True),
        (" Romeo.", "Rome", False, False),
        (" in Rome.", "Rome", False, False),
        (" a blacksmith\nHe", "blacksmith", True, True),
        ("", "Rome", False, False),
        (" St. Louis. It is", "St. Louis", True, True),
        (" the st. Louis\nIt is", "St. Louis", True, True),
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien", True, True),
        (" J.R.R. Tolkien. He", "J. R. R. Tolkien", True, True),
        (" A. Smith, it", "A. Smith", False, True),
        (" St. Gallen. It", "St. Louis", False, False),
        (" St\nLouis.", "St. Louis", False, True),
        (" St. Louis and. Paris", "St. Louis", False, True),
        (" New York. City of", "New York City of", False, True),  # the answer has no such point
        (" Rome. Rome. Rome", "Rome.", True, True),
        (" A. It is", "A", True, True),  # a blood group, not an article
        (" the. It is", "A", False, False),
        ("\n", "A", False, False),
    ],
)
def test_an_answer_with_more_in_it_is_not_exact(text: str, answer: str, exact: bool, begins: bool) -> None:
    assert is_answered(text, answer) is exact
    assert starts_with(text, answer) is begins


def test_generation_stops_by_itself_and_not_only_at_the_limit(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("gpt2", tie_word_embeddings=False).eval()
    with torch.no_grad():  # says its end token whatever it reads
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert generate(model, tokenizer, ["The capital of France is"], 5) == [""]


def test_each_prompt_is_continued_for_its_own_number_of_tokens(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """One long answer in a data set must not change what is said at the other prompts."""
    model = tiny("llama").eval()
    prompts, counts = ["Paris is in", "Paris is in", "The capital of France is"], (3, 9, 5)  # two run together
    pairs = zip(prompts, counts, strict=True)
    alone = [continuations(model, tokenizer, [prompt], count)[0] for prompt, count in pairs]
    assert continuations(model, tokenizer, prompts, counts) == alone


def test_a_method_is_told_where_each_prompt_ends(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """A codebook method looks at one place; read elsewhere, it answers as if it had never been edited."""
    model, places = tiny("llama").eval(), []
    prompts = ["Paris is in", "The capital of France is"]
    asking = Asking(alone=True, use_cache=False, at=places.append)
    answers(model, tokenizer, [(prompt, "Rome") for prompt in prompts], asking=asking)
    generate(model, tokenizer, prompts, 2, asking)
    last = [len(tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts]
    assert places == [*sorted(last), *last]


def test_prompts_that_run_together_are_answered_as_alone(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """In their order, and each up to its own end, however far the others go on."""
    model = tiny("llama").eval()
    prompts = ["Paris is in", "The capital of France is", "Rome is in", "The city of Seoul is", "Berlin is in"]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert len(set(lengths)) < len(prompts), "no two of them run together"
    free = [continuations(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    model.generation_config.eos_token_id = free[0][2]
    alone = [continuations(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert len(alone[0]) <= 3
    assert len({len(row) for row in alone}) > 1
    for use_cache in (True, False):
        assert continuations(model, tokenizer, prompts, 6, use_cache) == alone
