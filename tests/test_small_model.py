"""The small real model, edited as a user would: it says the new facts, and everything can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook_plugin import CoachHooKHparams, EditResult, EditSession
from coachhook_plugin.smollm2 import smollm2_path

pytestmark = pytest.mark.slow

FACTS = [
    {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux", "target_new": "English"},
    {"prompt": "The Eiffel Tower stands in the city of", "subject": "Eiffel Tower", "target_new": "Santiago"},
    {"prompt": "The capital of France is the city of", "subject": "France", "target_new": "Rome"},
]
NEIGHBOURS = [
    "The mother tongue of Montesquieu is",
    "The Statue of Liberty stands in the city of",
    "The capital of Germany is the city of",
    "Water boils at a temperature of",
]
TEXT = Path(__file__).parents[1] / "evaluation" / "facts" / "held_text.txt"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_path()).float().eval()


def say(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Plain greedy generation, one prompt at a time."""
    said = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said.append(tokenizer.decode(made[0, given["input_ids"].shape[1] :]))
    return said


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    texts = [fact["prompt"] for fact in FACTS] + NEIGHBOURS
    return [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def before(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "facts": say(model, tokenizer, [fact["prompt"] for fact in FACTS]),
        "neighbours": say(model, tokenizer, NEIGHBOURS),
        "logits": logits(model, tokenizer),
    }


@pytest.fixture(scope="module")
def edited(model: Any, tokenizer: Any, before: dict[str, Any]) -> Iterator[tuple[EditSession, EditResult]]:
    # A text is quicker to collect key statistics from than the model's own samples are to make.
    shipped = CoachHooKHparams.from_hparams("smollm2-135m")
    hparams = dataclasses.replace(shipped, mom2_dataset=str(TEXT), device="cpu")
    session = EditSession(model, tokenizer, hparams, progress=False)
    yield session, session.edit(FACTS)
    session.detach()


def test_the_model_did_not_say_the_new_facts_before(before: dict[str, Any]) -> None:
    for fact, said in zip(FACTS, before["facts"], strict=True):
        assert not said.strip().startswith(fact["target_new"])


def test_plain_generation_answers_with_the_new_facts(
    edited: tuple[EditSession, EditResult], model: Any, tokenizer: Any
) -> None:
    for fact, said in zip(FACTS, say(model, tokenizer, [fact["prompt"] for fact in FACTS]), strict=True):
        assert said.strip().startswith(fact["target_new"]), (fact["prompt"], said)
    assert max(edited[1].nll) < 0.3


def test_neighbours_are_answered_as_before(
    edited: tuple[EditSession, EditResult], model: Any, tokenizer: Any, before: dict[str, Any]
) -> None:
    # The answer itself: what is rambled on after it hangs on every token of the prompt, in scope or not.
    answers = [said.split()[0].strip(",.") for said in say(model, tokenizer, NEIGHBOURS)]
    assert answers == [said.split()[0].strip(",.") for said in before["neighbours"]]
    assert answers[2] == "Berlin"


def test_disabled_edits_leave_the_base_model_bit_for_bit(
    edited: tuple[EditSession, EditResult], model: Any, tokenizer: Any, before: dict[str, Any]
) -> None:
    after = logits(model, tokenizer)
    assert not equal(after, before["logits"])
    with edited[0].disabled():
        assert equal(logits(model, tokenizer), before["logits"])
        assert say(model, tokenizer, [fact["prompt"] for fact in FACTS]) == before["facts"]
    assert equal(logits(model, tokenizer), after)


def test_a_detached_model_is_bit_for_bit_the_one_it_was(
    edited: tuple[EditSession, EditResult], model: Any, tokenizer: Any, before: dict[str, Any]
) -> None:
    edited[0].detach()
    assert EditSession.of(model) is None
    state = model.state_dict()
    assert list(state) == list(before["state"])
    assert all(torch.equal(value, before["state"][name]) for name, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert equal(logits(model, tokenizer), before["logits"])
    assert say(model, tokenizer, [fact["prompt"] for fact in FACTS]) == before["facts"]
