"""Every family: an edit is learned, leaves no trace when undone, and does not depend on how things are batched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin import CoachHooKHparams, EditSession
from coachhook_plugin.architectures import FAMILIES, model_parts
from coachhook_plugin.trace import captured

EVERY = pytest.mark.parametrize("case", zoo.EVERY)


def cases(*values: Any, families: Sequence[str] = tuple(zoo.FAMILIES), marks: Any = ()) -> list[Any]:
    """Parameters of a test for each of the families."""
    slow = [pytest.mark.slow]
    return [pytest.param(case, *values, marks=[*marks, *(slow if case not in zoo.CORE else ())]) for case in families]


# The paper's scope and half precision where families differ most; what they compute is tested elsewhere.
SCOPES = pytest.mark.parametrize(("case", "scope"), [*cases("leverage"), *cases("zscore", families=zoo.CORE)])
HALF = cases(torch.bfloat16, families=("gpt2", "llama", "gemma2"), marks=[pytest.mark.once])
DTYPES = pytest.mark.parametrize(("case", "dtype"), [*cases(torch.float32), *HALF])
OTHER = ["The old man stands in the city", "Many books were read"]


@pytest.fixture
def settings(text: Path) -> Callable[..., CoachHooKHparams]:
    """Ten facts' worth of learning in few steps, room in the weights for it, and a scope that is wide.

    A low alpha: in a random model the subject seldom stands out from its sentence as it does in a trained one. A large
    budget: nor is its key the same in every context, and the text is full of it.
    """
    given = {"v_num_grad_steps": 10, "mom2_update_weight": 0.1, "alpha": 0.3, "scope_budget": 0.25}
    return lambda **changed: zoo.hparams(text, **{**given, **changed})


def test_no_family_of_the_table_goes_untested() -> None:
    assert set(FAMILIES) == {family for family, _ in zoo.FAMILIES.values()}


@torch.no_grad()
def nll(one: Any, tokenizer: Any, fact: dict[str, str]) -> float:
    """Mean NLL of the target by a plain call of the model."""
    start = len(tokenizer(fact["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(f"{fact['prompt']} {fact['target_new']}")["input_ids"]])
    log_probs = one(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    return -float(log_probs.gather(1, ids[0, start:, None]).mean())


@torch.no_grad()
def answers(one: Any, tokenizer: Any) -> list[torch.Tensor]:
    texts = [fact["prompt"] for fact in zoo.FACTS] + OTHER
    return [one(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts]


def appearance(one: Any) -> dict[str, Any]:
    """By what a caller could tell that a model was touched."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "state": {name: value.clone() for name, value in one.state_dict().items()},
        "modules": [name for name, _ in one.named_modules()],
        "hooks": {name: [len(getattr(m, kind)) for kind in kinds] for name, m in one.named_modules()},
        "gradients": {name: p.requires_grad for name, p in one.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in one.named_parameters(remove_duplicate=False)},
        "attributes": sorted(vars(one)),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found["state"]) == list(expected["state"])
    assert all(torch.equal(value, expected["state"][name]) for name, value in found["state"].items())
    for kind in expected.keys() - {"state"}:
        assert found[kind] == expected[kind], kind


@EVERY
def test_logits_from_the_last_block_are_the_models_own(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny(case)
    parts = model_parts(one, settings())
    ids = torch.tensor([tokenizer(zoo.FACTS[0]["prompt"])["input_ids"]])
    with torch.no_grad(), captured(parts.blocks[-1]) as seen:
        logits = one(input_ids=ids).logits
    assert zoo.relative(parts.logits(seen.output), logits) < 1e-6


@pytest.mark.parametrize(
    ("case", "dtype", "scope"),
    [
        *cases(torch.float32, "leverage"),
        *cases(torch.bfloat16, "leverage", marks=[pytest.mark.once]),
        *cases(torch.float32, "zscore", families=zoo.CORE),
    ],
)
def test_an_edit_makes_the_new_target_likely(
    case: str, dtype: torch.dtype, scope: str, start: Callable[..., EditSession], tokenizer: Any
) -> None:
    session = start(case, dtype=dtype, scope=scope)
    before = [nll(session.model, tokenizer, fact) for fact in zoo.FACTS]
    result = session.edit(zoo.FACTS)
    after = [nll(session.model, tokenizer, fact) for fact in zoo.FACTS]
    gains = [old - new for old, new in zip(before, after, strict=True)]
    # A scope may miss the subject of a prompt: where another token stands out more, or its key is like no other.
    assert sum(gain > 0.01 for gain in gains) >= len(gains) - 1, "facts were not learned at all"
    promised = sum(before) - sum(result.nll)  # its NLL counts the prefixed prompts too
    assert sum(gains) > 0.4 * max(promised, 0.5), "the weights carry little of what the target values promise"
    assert all(layer.delta.dtype == torch.float32 for layer in session.state.layers.values())
    assert all(p.dtype == dtype for p in session.model.parameters())


@DTYPES
def test_undone_edits_leave_the_model_bit_for_bit_as_it_was(
    case: str, dtype: torch.dtype, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny(case, dtype=dtype)
    untouched, said = appearance(one), answers(one, tokenizer)
    for kind in ({"scope": "leverage"}, {"scope": "zscore"}, {"use_hooks": False}):
        session = EditSession(one, tokenizer, settings(**kind, v_num_grad_steps=2), progress=False)
        empty = session.state
        session.edit(zoo.FACTS[:2])
        first = session.state
        once = answers(one, tokenizer)
        assert not all(map(torch.equal, once, said))
        session.edit(zoo.FACTS[2:])
        assert not all(map(torch.equal, answers(one, tokenizer), once))
        with session.disabled():
            assert all(map(torch.equal, answers(one, tokenizer), said))
        session.restore(first)
        assert all(map(torch.equal, answers(one, tokenizer), once))
        session.restore(empty)
        assert all(map(torch.equal, answers(one, tokenizer), said))
        session.edit(zoo.FACTS[:2])
        assert all(map(torch.equal, answers(one, tokenizer), once))  # and the same edit gives the same bits again
        session.detach()
        assert_same(appearance(one), untouched)
        assert all(map(torch.equal, answers(one, tokenizer), said))


@pytest.mark.parametrize("case", [case for case in zoo.FAMILIES if case in ("gpt2", "llama-tied", "gemma", "opt")])
def test_tied_embeddings_are_neither_edited_nor_untied(
    case: str, start: Callable[..., EditSession], tokenizer: Any
) -> None:
    session = start(case)
    inputs, outputs = (
        get().weight for get in (session.model.get_input_embeddings, session.model.get_output_embeddings)
    )
    assert inputs is outputs, "not a tied model"
    before = inputs.detach().clone()
    session.edit(zoo.FACTS)
    assert session.model.get_output_embeddings().weight is session.model.get_input_embeddings().weight is inputs
    assert torch.equal(inputs, before)


def deltas(session: EditSession) -> list[torch.Tensor]:
    return [layer.delta for layer in session.state.layers.values()]


@EVERY
def test_padding_side_order_and_memory_budget_write_the_same_weights(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    def written(facts: Sequence[dict[str, str]], side: str, **changed: Any) -> tuple[list[float], list[torch.Tensor]]:
        one = tiny(case)
        tokenizer.padding_side = side
        try:
            session = EditSession(one, tokenizer, settings(v_num_grad_steps=3, **changed), progress=False)
            return session.edit(facts).nll, deltas(session)
        finally:
            tokenizer.padding_side = "right"

    nll_right, right = written(zoo.FACTS, "right")
    nll_left, left = written(zoo.FACTS, "left")
    nll_turned, turned = written(zoo.FACTS[::-1], "left", target_tokens=30)
    assert nll_left == nll_right
    assert nll_turned[::-1] == pytest.approx(nll_right, rel=1e-4)
    assert all(map(torch.equal, left, right))
    for one, other in zip(turned, right, strict=True):
        assert zoo.relative(one, other) < 1e-5


@SCOPES
def test_an_edited_model_answers_the_same_alone_and_padded_in_a_batch(
    case: str, scope: str, start: Callable[..., EditSession], tokenizer: Any
) -> None:
    session = start(case, scope=scope, alpha=1.0)  # low enough for some tokens of other texts to be in scope as well
    session.edit(zoo.FACTS)
    texts = [fact["prompt"] for fact in zoo.FACTS] + OTHER
    alone = [logits[0] for logits in answers(session.model, tokenizer)]
    with session.disabled():
        base = [logits[0] for logits in answers(session.model, tokenizer)]
    assert all(zoo.relative(edited, old) > 1e-3 for edited, old in zip(alone[:4], base[:4], strict=True))
    for side in ("left", "right"):
        batch = _padded(session.model, [tokenizer(text)["input_ids"] for text in texts], side)
        with torch.no_grad():
            logits = session.model(**batch).logits
        for b, expected in enumerate(alone):
            found = logits[b, -len(expected) :] if side == "left" else logits[b, : len(expected)]
            assert zoo.relative(found, expected) < 1e-4, (side, texts[b])


def _padded(one: Any, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    marks = [[1] * len(row) for row in rows]
    mask = [pad + mark if side == "left" else mark + pad for mark, pad in zip(marks, pads, strict=True)]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if "position_ids" in inspect.signature(one.forward).parameters:  # as `generate` gives them
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


@SCOPES
def test_generation_starts_from_what_the_edited_model_says(
    case: str, scope: str, start: Callable[..., EditSession], tokenizer: Any
) -> None:
    session = start(case, scope=scope)
    session.edit(zoo.FACTS)
    edited = [logits[0, -1] for logits in answers(session.model, tokenizer)[:4]]
    with session.disabled():
        base = [logits[0, -1] for logits in answers(session.model, tokenizer)[:4]]
    for fact, expected, old in zip(zoo.FACTS, edited, base, strict=True):
        given = tokenizer(fact["prompt"], return_tensors="pt")
        made = session.model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert zoo.relative(made.logits[0][0], expected) < 1e-4 < zoo.relative(expected, old), fact
