"""Logits are the model's own: by its norm and head where that is all, by the model itself where it does more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin import EditSession
from coachhook_plugin.architectures import model_parts
from coachhook_plugin.head import head_of
from coachhook_plugin.observation import Comparison
from coachhook_plugin.tokens import Batch, Encoder, Row
from coachhook_plugin.trace import captured, frozen

CPU = torch.device("cpu")


def batch_of(tokenizer: Any) -> Batch:
    """A first row that is padded."""
    rows = [Row(tokenizer(fact["prompt"])["input_ids"], 0) for fact in zoo.FACTS]
    return Encoder(tokenizer, None).batch(sorted(rows, key=lambda row: len(row.ids)), CPU)


def last_states(one: Any, parts: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last block's answer (T, d) to a text, and the model's (T, V)."""
    with torch.no_grad(), captured(parts.blocks[-1]) as seen:
        logits = one(input_ids=torch.tensor([tokenizer("The best of many books")["input_ids"]])).logits
    return seen.output[0], logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", zoo.EVERY)
def test_no_family_of_the_table_runs_the_whole_model_for_its_logits(
    case: str, dtype: torch.dtype, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny(case, dtype=dtype)
    parts, comparison = model_parts(one, settings()), Comparison()
    with frozen(one):
        assert head_of(one, parts, batch_of(tokenizer), comparison) == parts.logits
    assert comparison.named_head


@pytest.mark.parametrize("family", zoo.EVERY_UNKNOWN)
def test_families_unknown_to_the_table_get_their_own_logits_and_gradients(
    family: str, settings: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one, names = zoo.unknown(family, len(tokenizer))
    parts, comparison = model_parts(one, settings(**names)), Comparison()
    with frozen(one), caplog.at_level(logging.WARNING):
        for _ in range(2):
            head = head_of(one, parts, batch_of(tokenizer), comparison)
        state, logits = last_states(one, parts, tokenizer)
        state = state.clone().requires_grad_()
        found = head(state)
        (gradient,) = torch.autograd.grad(found[:, 7].sum(), state)
    assert zoo.relative(found, logits) < 1e-5
    assert (gradient.norm(dim=-1) > 0).all()
    assert len(caplog.records) == (family in ("cohere", "cohere2"))  # which scale their logits


def test_wrong_names_of_norm_and_head_do_not_lead_the_edit_astray(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny()
    parts = model_parts(one, settings(ln_f_module="model.layers.3.input_layernorm"))
    state, logits = last_states(one, parts, tokenizer)
    assert zoo.relative(parts.logits(state), logits) > 1e-2
    with frozen(one):
        assert zoo.relative(head_of(one, parts, batch_of(tokenizer), Comparison())(state), logits) < 1e-5


def test_logits_that_the_last_block_does_not_decide_are_refused_and_nothing_is_edited(
    start: Callable[..., EditSession],
) -> None:
    session = start()

    def echo(_: Any, __: Any, given: dict[str, Any], answer: Any) -> Any:
        answer.logits = answer.logits + 10 * torch.nn.functional.one_hot(given["input_ids"], answer.logits.shape[-1])
        return answer

    session.model.register_forward_hook(echo, with_kwargs=True)
    with pytest.raises(ValueError, match=r"logits do not follow from what model.layers.3 answers; .*layer_module_tmp"):
        session.edit(zoo.FACTS)
    assert len(session) == 0
