"""Observing a batch: what counts as the same answer, and for which batches a finding holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin import EditSession
from coachhook_plugin.architectures import model_parts
from coachhook_plugin.observation import Comparison, Seen, alike, observe
from coachhook_plugin.target import optimise_targets
from coachhook_plugin.tokens import Batch, Encoder, parse_requests
from coachhook_plugin.trace import frozen

Tiny = Callable[..., Any]
REAL = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def batch_of(rows: list[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids, mask, mask.sum(1) - 1)


@pytest.mark.parametrize(
    ("dtype", "same", "other"),
    [
        (torch.float64, 1e-7, 1e-5),
        (torch.float32, 1e-4, 1e-2),
        (torch.bfloat16, 2e-2, 0.2),
        (torch.float16, 2e-2, 0.2),
    ],
)
def test_rounding_of_each_dtype_is_no_difference_and_more_than_that_is_one(
    dtype: torch.dtype, same: float, other: float
) -> None:
    expected = states(dtype)
    assert alike((expected.double() * (1 + same)).to(dtype), expected, REAL)
    assert not alike((expected.double() * (1 + other)).to(dtype), expected, REAL)


def test_one_wrong_token_beside_a_huge_one_is_seen_and_padding_is_not_looked_at() -> None:
    expected = states()
    expected[:, 0] *= 1e4  # some models answer first tokens like that
    padding, wrong = expected.clone(), expected.clone()
    padding[1, 2] = torch.nan
    wrong[1, 1] *= 1.1
    assert alike(padding, expected, REAL)
    assert not alike(wrong, expected, REAL)


def test_answers_that_are_not_finite_agree_with_nothing() -> None:
    expected = states()
    expected[0, 1, 3] = torch.nan
    assert not alike(expected, expected, REAL)


def passes(model: Any) -> list[torch.Size]:
    """Shapes of the token ids of every pass from here on."""
    seen: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    return seen


def deaf(model: Any) -> Any:
    """Ignores the mask of a tree, so that every token looks at all other rows."""
    given = model.forward

    def forward(**inputs: Any) -> Any:
        mask = inputs["attention_mask"]
        return given(**{**inputs, "attention_mask": None if mask.dim() == 4 else mask})

    model.forward = forward
    return model


NARROW, WIDE = [[5, 9], [5, 3, 8]], [[5, 9, 11, 4, 6, 8, 7, 21], [5, 9]]


@torch.no_grad()
@pytest.mark.parametrize("order", [[NARROW, WIDE, NARROW, WIDE], [WIDE, NARROW, WIDE, NARROW]], ids=["narrow", "wide"])
def test_what_wide_rows_show_decides_nothing_for_narrow_ones(
    tiny: Tiny, settings: Callable[..., Any], order: list[list[list[int]]]
) -> None:
    model = tiny("mistral-window-4")
    blocks, comparison = model_parts(model, settings()).blocks, Comparison()
    for rows in order:
        assert observe(model, blocks, 0, 1, batch_of(rows), comparison).tree is (rows is NARROW)
    seen = passes(model)
    for rows in order:
        observe(model, blocks, 0, 1, batch_of(rows), comparison)
    assert len(seen) == len(order), "what is known is compared again"


@torch.no_grad()
def test_a_model_whose_answers_differ_through_a_tree_runs_its_rows_and_is_asked_once(
    tiny: Tiny, settings: Callable[..., Any]
) -> None:
    model = deaf(tiny("llama"))
    blocks, comparison = model_parts(model, settings()).blocks, Comparison()
    seen = passes(model)
    for rows in (WIDE, NARROW, WIDE):
        found = observe(model, blocks, 0, 1, batch_of(rows), comparison)
        assert not found.tree
    assert [shape[0] for shape in seen].count(1) == 1
    plain = observe(model, blocks, 0, 1, batch_of(WIDE), Comparison(causal=False))
    assert torch.equal(found.last, plain.last)


def test_another_attention_is_compared_anew(tiny: Tiny, settings: Callable[..., Any]) -> None:
    model = tiny("llama", attn_implementation="sdpa")
    blocks = model_parts(model, settings()).blocks
    for comparison in (Comparison(trees=Seen(5, "sdpa")), Comparison(no_trees=Seen(0, "sdpa"))):
        model.config._attn_implementation = "sdpa"
        assert comparison.runs_trees(blocks, 5) is not None
        model.config._attn_implementation = "eager"
        assert comparison.runs_trees(blocks, 5) is None


@torch.no_grad()
def test_a_long_row_behind_many_short_ones_sees_what_its_window_shows_it(
    tiny: Tiny, settings: Callable[..., Any]
) -> None:
    model = tiny("mistral-window-4")
    blocks = model_parts(model, settings()).blocks
    batch = batch_of([*([5, i] for i in range(20)), [5, 9, 11, 4, 6, 8, 7, 21]])
    found = observe(model, blocks, 0, 1, batch, Comparison())
    plain = observe(model, blocks, 0, 1, batch, Comparison(causal=False))
    assert torch.equal(found.last, plain.last)


@torch.no_grad()
def test_edits_in_force_do_not_decide_how_texts_are_run(start: Callable[..., EditSession]) -> None:
    """Their scope may open for a token through a tree and not for its row, as sums round differently."""
    session = start("llama", mom2_update_weight=0.1)
    session.edit(zoo.FACTS)
    model, blocks = session.model, session._parts.blocks
    for hook in session._attached.hooks.values():
        hook.gate.forward = lambda key, change: torch.full((*key.shape[:-1], 1), len(key) == 1)
    batch = batch_of(WIDE)
    for comparison, tree in ((Comparison(), False), (Comparison(unedited=session.disabled), True)):
        assert observe(model, blocks, 2, 3, batch, comparison).tree is tree


def test_a_pass_that_was_stopped_after_its_decision_does_not_decide_how_texts_are_run(
    start: Callable[..., EditSession],
) -> None:
    session = start("llama", layers=[0, 2])
    session.edit(zoo.FACTS)
    session.forget(["1-1"])  # reads keys at the first edited layer, and no further
    gate = session._attached.hooks[2].gate
    assert gate._decision.told(training=False, last=False) is not None
    comparison = Comparison(unedited=session.disabled)
    assert observe(session.model, session._parts.blocks, 0, 3, batch_of(WIDE), comparison).tree


def test_a_context_shorter_than_any_window_is_no_reason_against_trees(
    tiny: Tiny, settings: Callable[..., Any]
) -> None:
    model = tiny("gpt_neox", max_position_embeddings=16)
    assert observe(model, model_parts(model, settings()).blocks, 0, 1, batch_of(NARROW), Comparison()).tree


def test_a_batch_is_read_through_trees_only_if_all_of_its_texts_came_out_the_same(
    tiny: Tiny, settings: Callable[..., Any], tokenizer: Any
) -> None:
    model, hparams = tiny("mistral-window-4"), settings(v_num_grad_steps=1, target_tokens=1)
    parts, encoder = model_parts(model, hparams), Encoder(tokenizer, None)
    long, short = parse_requests([zoo.FACTS[0], {"prompt": "Ada is", "subject": "Ada", "target_new": "Rome"}])
    for batch, trees in (([short], True), ([long, short], False), ([short, long], False), ([short], True)):
        with frozen(model):
            found = optimise_targets(
                model, parts, encoder, batch, [], hparams, 1, torch.device("cpu"), False, Comparison()
            )
        assert found.trees is trees
