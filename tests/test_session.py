"""A session on a model: batches land whole or not at all, come out again bit by bit, and answer as METHOD says."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import lessons
from plain import (
    PRECISION,
    PlainEditor,
    bits,
    hook_layers,
    logits_of,
    padded_logits,
    photograph,
    photograph_session,
    raising_at,
)

import coachhook_plugin.batch_writing
import coachhook_plugin.beginning
import coachhook_plugin.memory
import coachhook_plugin.scope.leverage
import coachhook_plugin.scope.zscore
import coachhook_plugin.session
from coachhook_plugin import EditSession, load_edits
from coachhook_plugin.activations import subject_values
from coachhook_plugin.hook import HookLayer, Mode
from coachhook_plugin.scope import LeverageScope, ZScoreScope
from coachhook_plugin.scope.leverage import WITNESSES
from coachhook_plugin.scope.zscore import ROUNDING_MARGIN

Start = Callable[..., EditSession]
Facts = list[dict[str, str]]

MORE = [
    {"prompt": "In the city of Norway people say", "subject": "Norway", "target_new": "Rome"},
    {"prompt": "The best tower of Darrieux stands in old", "subject": "Darrieux", "target_new": "Seoul"},
    {"prompt": "It comes from Ada, as one can read in", "subject": "Ada", "target_new": "English"},
]
OTHER = ["The best dish comes from the city of", "People say that", "Many books", "Ada", "as one can read in"]
PROJECTION = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}


LEVERAGE = pytest.mark.parametrize("scope", ["leverage"])
ZSCORE = pytest.mark.parametrize("scope", ["zscore"])


@pytest.fixture(params=["leverage", "zscore"])
def scope(request: pytest.FixtureRequest) -> str:
    """Both rules, unless a test is marked `LEVERAGE` or `ZSCORE`."""
    return str(request.param)


@pytest.fixture
def start(start: Start, scope: str) -> Start:
    return lambda *args, **changed: start(*args, **{"scope": scope, **changed})


@pytest.fixture
def taught(taught: Start, scope: str) -> Start:
    return lambda *args, **changed: taught(*args, **{"scope": scope, **changed})


def prompts(*batches: Facts) -> list[str]:
    return [fact["prompt"] for fact in itertools.chain(*batches)]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return [bits(a) for a in one] == [bits(b) for b in other]


def answers(session: EditSession, *more: str) -> list[torch.Tensor]:
    return logits_of(session.model, session.tokenizer, [*prompts(zoo.FACTS, MORE), *OTHER, *more])


@torch.no_grad()
def probability(session: EditSession, fact: dict[str, str]) -> float:
    """Of the whole target after the prompt."""
    prompt = session.tokenizer(fact["prompt"])["input_ids"]
    ids = torch.tensor([session.tokenizer(f"{fact['prompt']} {fact['target_new']}")["input_ids"]])
    # Token by token from the prompt's cache, as the model would generate it.
    step = session.model(input_ids=ids[:, : len(prompt)], use_cache=True)
    total = 0.0
    for token in ids[0, len(prompt) :]:
        total += float(step.logits[0, -1].double().log_softmax(-1)[token])
        step = session.model(input_ids=token[None, None], past_key_values=step.past_key_values, use_cache=True)
    return float(np.exp(total))


def text_rows(session: EditSession) -> list[list[int]]:
    """The pre-training text of the tiny models, as long as they ask for it, in rows of their context."""
    tokenizer, end = session.tokenizer, session.tokenizer.eos_token_id
    ids = [token for text in zoo.TEXT.split("\n\n") for token in [*tokenizer(text)["input_ids"], end]]
    ids = ids[: int(session.hparams.mom2_key_multiple * 48)]
    return [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]


@pytest.fixture
def targets_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The targets of every batch from here on, with the hooks' modes while they were optimised."""
    seen: list[Any] = []
    original = coachhook_plugin.batch_writing.optimise_targets

    def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
        modes = [hook.mode for hook in hook_layers(model)]
        seen.append((original(model, *args, **kwargs), modes))
        return seen[-1][0]

    monkeypatch.setattr(coachhook_plugin.batch_writing, "optimise_targets", recorded)
    return seen


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("zscore", {}),
        ("zscore", {"accumulate": False}),
        ("zscore", {"dynamic_alpha": False}),
        ("zscore", {"layers": [0, 1, 2]}),
        ("leverage", {}),
        ("leverage", {"accumulate": False}),
        ("leverage", {"layers": [0, 1, 2], "scope_ridge": 0.5}),
        ("leverage", {"scope_budget": 0.2, "context_prefixes": []}),
    ],
    ids=str,
)
def test_consecutive_batches_write_what_the_method_says(
    start: Start, targets_of: list[Any], facts: Facts, case: str, scope: str, changed: dict[str, Any]
) -> None:
    dtype, tolerance = PRECISION[case]
    session = start(case, dtype=dtype, alpha=1.9, **changed)
    weight, layers = session.hparams.mom2_update_weight, session.hparams.layers
    c0 = {layer: session.state.layers[layer].memory.matrix.numpy() / weight for layer in layers}
    names = [PROJECTION[case].format(layer) for layer in layers]
    plain_model = zoo.model(case, len(session.tokenizer), dtype=dtype)
    plain = PlainEditor(session, plain_model, c0, names, text_rows(session) if scope == "leverage" else [])
    for number, batch in enumerate([facts, MORE]):
        session.edit(batch)
        targets, modes = targets_of[number]
        assert modes == [Mode.VALIDATED] * len(layers)
        plain.edit(batch, targets.values.double().numpy(), accumulate=session.hparams.accumulate)
        if scope == "zscore" and session.hparams.dynamic_alpha:
            plain.lower_thresholds(batch, margin=ROUNDING_MARGIN[dtype])
        for layer, state in session.state.layers.items():
            expected = torch.tensor(plain.wh[layer] - plain.w0[layer])
            assert expected.norm() > 1e-3
            assert zoo.relative(state.delta, expected) < tolerance
            assert zoo.relative(state.memory.matrix, torch.tensor(plain.c[layer])) < tolerance
            if scope == "zscore":
                thresholds = session.state.scope.thresholds[layer]
                assert thresholds.alpha == pytest.approx(plain.alpha[layer], rel=1e-4)
                assert thresholds.ratio == pytest.approx(plain.ratio[layer], rel=1e-4)
        if scope == "leverage":
            assert session.state.scope.threshold == pytest.approx(plain.threshold, rel=1e-3)
    # ... and answers with it: the gate of every layer, on edited prompts and others.
    opened = []
    for text in [*prompts(facts, MORE), *OTHER[:3]]:
        if scope == "leverage" or len(session.tokenizer(text)["input_ids"]) >= 3:
            (found,), (expected,) = (logits_of(m, session.tokenizer, [text]) for m in (session.model, plain_model))
            assert zoo.relative(found, expected) < tolerance
            opened += plain.open
    if scope == "leverage":
        assert 4 <= sum(opened) <= len(opened) / 2, "the rule was hardly put to the test"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_an_edit_makes_the_model_say_the_target_and_keep_saying_it(
    taught: Start, case: str, dtype: torch.dtype
) -> None:
    session = taught(case, dtype=dtype)
    first, second, known = lessons(1)[::7], lessons(2)[1::9], lessons(0)[2::4]
    assert max(probability(session, fact) for fact in first + second) < 0.05
    assert min(probability(session, fact) for fact in known) > 0.9
    result = session.edit(first)
    assert np.mean([probability(session, fact) for fact in first]) > 0.7
    session.edit(second)
    assert np.mean([probability(session, fact) for fact in first]) > 0.6
    assert np.mean([probability(session, fact) for fact in second]) > 0.7
    assert len(result.nll) == len(result.steps) == len(result.requests) == len(first)
    assert np.mean(result.nll) < 0.3
    assert len(session) == len(first) + len(second)
    for state in session.state.layers.values():
        assert state.delta.dtype == torch.float32
        assert state.delta.isfinite().all()


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_remembering_earlier_batches_keeps_their_edits_where_forgetting_loses_them(taught: Start, case: str) -> None:
    kept = {}
    for accumulate in (True, False):
        session = taught(case, accumulate=accumulate)
        session.edit(lessons(1)[::7])
        session.edit(lessons(2)[1::9])
        for hook in hook_layers(session.model):
            hook.mode = Mode.TEMPORARY  # what is written, whatever the scope lets through
        kept[accumulate] = np.mean([probability(session, fact) for fact in lessons(1)[::7]])
    assert kept[True] > kept[False] + 0.1
    assert kept[True] > 0.6


def test_the_result_of_a_batch_tells_the_thresholds_in_force(start: Start, facts: Facts, scope: str) -> None:
    session = start("llama-tied")
    result = session.edit(facts)
    assert result.scope is session.state.scope
    gates = [hook.gate for hook in hook_layers(session.model)]
    if scope == "leverage":
        assert float(gates[0].threshold) == pytest.approx(result.scope.threshold, rel=1e-6)
        assert 0 < result.scope.threshold < 1
        return
    for gate, thresholds in zip(gates, result.scope.thresholds.values(), strict=True):
        assert (float(gate.alpha), float(gate.ratio)) == (thresholds.alpha, thresholds.ratio)
        assert thresholds.alpha < 2.2


# Large changes of a random model.
EASY = {"v_num_grad_steps": 25, "clamp_norm_factor": 8.0, "v_weight_decay": 0.0, "mom2_update_weight": 0.1}


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_neither_batch_order_nor_padding_side_nor_micro_batches_change_what_is_written(
    start: Start, facts: Facts, case: str, scope: str
) -> None:
    reference = start(case)
    reference.edit(facts)
    others = []
    for side, order, budget in [("left", 1, 8192), ("right", -1, 8192), ("right", 1, 40), ("left", -1, 300)]:
        session = start(case, target_tokens=budget)
        session.tokenizer = session._encoder.tokenizer = copy.deepcopy(session.tokenizer)
        session.tokenizer.padding_side = side
        session.edit(facts[::order])
        others.append(session)
    for session in others:
        for layer, state in session.state.layers.items():
            expected = reference.state.layers[layer]
            assert zoo.relative(state.delta, expected.delta) < 1e-5
            assert zoo.relative(state.memory.matrix, expected.memory.matrix) < 1e-6
            if scope == "zscore":
                found, wanted = (one.state.scope.thresholds[layer] for one in (session, reference))
                assert found.alpha == pytest.approx(wanted.alpha, rel=1e-4)
                assert found.ratio == pytest.approx(wanted.ratio, rel=1e-4)
        if scope == "leverage":
            assert session.state.scope.threshold == pytest.approx(reference.state.scope.threshold, rel=1e-3)


def test_the_same_edits_give_the_same_bits_and_touch_no_random_state(start: Start, facts: Facts) -> None:
    first, second = start(context_prefixes=None), start(context_prefixes=None)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first.edit(facts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second.edit(facts)
    assert first.prefixes == second.prefixes
    assert len(first.prefixes) == 5
    assert same(answers(first), answers(second))


def test_an_edit_is_the_same_with_gradients_switched_off_around_it(start: Start, facts: Facts) -> None:
    first, second = start(), start()
    first.edit(facts)
    with torch.no_grad():
        second.edit(facts)
    assert same(answers(first), answers(second))


@LEVERAGE
def test_memory_stays_within_two_square_matrices_and_a_fixed_sample(
    start: Start, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of what was edited is at most (m, 2 m), and the sampled keys at most WITNESSES, for ever."""
    assert WITNESSES <= 1000
    sample, m = 30, 48
    monkeypatch.setattr(coachhook_plugin.scope.leverage, "WITNESSES", sample)
    session = start(v_num_grad_steps=1)
    sizes, ranks = [], [0]
    for number in range(1, 16):
        session.edit([*facts, *MORE])
        edits, state = 7 * number, session.state.scope
        ranks.append(state.edited.shape[1])
        assert state.edited.shape == (m, min(ranks[-1], 2 * m))
        assert 3 * edits <= state.seen <= 4 * edits  # three contexts, and where a subject begins a text
        assert state.witnesses.shape == (min(sample, state.seen), m)
        assert state.lots.shape == (min(sample, state.seen),)
        gate = hook_layers(session.model)[0].gate
        assert gate.explain.shape == (min(m, ranks[-1]), m)
        layers = [tensor for s in session.state.layers.values() for tensor in (s.delta, s.memory.matrix)]
        held = [*layers, *session.model.buffers(), state.witnesses, state.lots]
        sizes.append([(tensor.shape, tensor.dtype) for tensor in held])
    assert all(size == sizes[6] for size in sizes[7:])  # 49 edits and more
    assert ranks != sorted(ranks)  # it was put together


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_margins_tell_which_tokens_the_edits_answer(start: Start, facts: Facts, case: str) -> None:
    session = start(case, **EASY)
    ids = [torch.tensor(session.tokenizer(text)["input_ids"]) for text in [*prompts(facts, MORE), *OTHER[:3]]]
    assert all(session.margins(row).eq(-torch.inf).all() for row in ids)  # nothing is edited yet
    session.edit(facts)
    told = [session.margins(row) for row in ids]
    before = photograph(session.model)
    for row, margins in zip(ids, told, strict=True):
        opened = open_tokens(session, lambda row=row: session.model(input_ids=row[None]))
        assert (margins >= 1).tolist() == torch.stack([open_[0] for open_ in opened]).any(0).tolist()
    assert any((margins >= 1).any() for margins in told)
    assert photograph(session.model) == before


@ZSCORE
def test_memory_does_not_grow_with_the_number_of_edits(start: Start, facts: Facts) -> None:
    session = start()

    def size() -> list[Any]:
        held = [tensor for s in session.state.layers.values() for tensor in (s.delta, s.memory.matrix)]
        return [[(t.shape, t.dtype) for t in held], [(n, b.shape, b.dtype) for n, b in session.model.named_buffers()]]

    session.edit(facts)
    after_one = size()
    for batch in (MORE, facts[:1], facts[1:], MORE):
        session.edit(batch)
        assert size() == after_one
    assert len(session) == len(facts) + len(MORE)  # each in force once, though written twice
    assert session.state.step == 5


def test_without_accumulation_the_memory_stays_that_of_pre_training(start: Start, facts: Facts) -> None:
    session, remembering = start(accumulate=False), start()
    before = photograph_session(session)["layers"]
    for batch in (facts, MORE):
        session.edit(batch)
        remembering.edit(batch)
    for layer, state in session.state.layers.items():
        assert bits(state.memory.matrix) == before[layer][1]
        assert bits(remembering.state.layers[layer].memory.matrix) != before[layer][1]


@ZSCORE
def test_with_a_fixed_alpha_no_batch_moves_the_thresholds(start: Start, facts: Facts) -> None:
    session = start(dynamic_alpha=False, alpha=1.3)
    session.edit(facts)
    session.edit(MORE)
    for hook, thresholds in zip(hook_layers(session.model), session.state.scope.thresholds.values(), strict=True):
        assert (thresholds.alpha, thresholds.ratio) == (1.3, session.hparams.short_prompt_ratio)
        assert float(hook.gate.alpha) == 1.3


# --- the scope in a real forward pass --------------------------------------------------------------------------------


def open_tokens(session: EditSession, call: Callable[[], Any]) -> list[torch.Tensor]:
    """(b, T) for each forward pass and layer: what its gate opened during the call."""
    found = []
    gates = [hook.gate for hook in hook_layers(session.model)]

    def recording(decide: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def decided(*args: Any) -> torch.Tensor:
            found.append(decide(*args))
            return found[-1]

        return decided

    for gate in gates:
        gate.forward = recording(gate.forward)
    try:
        call()
    finally:
        for gate in gates:
            del gate.forward
    return [open_.squeeze(-1) for open_ in found]


@ZSCORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_every_edited_prompt_is_answered_in_whatever_batch_it_comes_back(
    start: Start, facts: Facts, case: str, dtype: torch.dtype
) -> None:
    session = start(case, dtype=dtype)
    batch = [*facts, *MORE]
    session.edit(batch)
    model, tokenizer = session.model, session.tokenizer
    texts = prompts(batch)
    layouts: list[Callable[[], Any]] = [
        lambda: padded_logits(model, tokenizer, texts[::-1], "left", extra=5),
        lambda: padded_logits(model, tokenizer, texts, "right", extra=11),
        *[lambda text=text: logits_of(model, tokenizer, [text]) for text in texts],
    ]
    for layout in layouts:
        for open_ in open_tokens(session, layout):
            assert open_.any(-1).all()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edited_model_answers_a_prompt_alike_alone_and_padded_among_others(
    start: Start, facts: Facts, case: str, side: str
) -> None:
    session = start(case, **EASY)
    session.edit(facts)
    texts = [*prompts(facts, MORE), *OTHER]
    alone = logits_of(session.model, session.tokenizer, texts)
    for extra in (0, 9):
        together = padded_logits(session.model, session.tokenizer, texts, side, extra)
        for text, one, other in zip(texts, alone, together, strict=True):
            assert zoo.relative(other, one) < 1e-4, text
    with session.disabled():
        base = logits_of(session.model, session.tokenizer, texts)
    assert any(zoo.relative(one, other) > 0.1 for one, other in zip(alone, base, strict=True))


@ZSCORE
def test_a_short_prompt_can_be_edited_without_lowering_alpha_for_the_others(start: Start, facts: Facts) -> None:
    short = [fact for fact in facts if len(start().tokenizer(fact["prompt"])["input_ids"]) == 5]
    assert short
    session = start(**EASY)
    session.edit(short)
    assert [thresholds.alpha for thresholds in session.state.scope.thresholds.values()] == [2.2, 2.2]
    opened = open_tokens(session, lambda: logits_of(session.model, session.tokenizer, prompts(short)))
    assert all(open_.any() for open_ in opened)


@ZSCORE
def test_one_and_two_token_inputs_stay_with_the_base_model(start: Start, facts: Facts) -> None:
    for case in ("llama", "gpt2"):
        session = start(case, **EASY)
        # ... although the first subject's last token is one of them, and a prompt of two tokens was edited
        session.edit([*facts, {"prompt": "Ada is", "subject": "Ada", "target_new": "Rome"}])
        for ids in ([7], [7, 8], session.tokenizer("Ada is")["input_ids"]):
            found = session.model(input_ids=torch.tensor([ids])).logits
            with session.disabled():
                assert torch.equal(found, session.model(input_ids=torch.tensor([ids])).logits)
            assert found.isfinite().all()
        assert all(np.isfinite(t.alpha) and t.alpha > 0 for t in session.state.scope.thresholds.values())


def decisions(session: EditSession, *texts: str) -> list[torch.Tensor]:
    """What each edited layer opened, text by text (T,)."""
    opened = open_tokens(session, lambda: logits_of(session.model, session.tokenizer, texts))
    assert len(opened) == len(texts) * len(session.hparams.layers)
    return [open_.flatten() for open_ in opened]


TEXTS = [*prompts(zoo.FACTS, MORE), *OTHER]


@LEVERAGE
@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_every_layer_answers_the_tokens_that_the_first_one_chose(start: Start, facts: Facts, case: str) -> None:
    session = start(case, layers=[0, 1, 3], **EASY)
    session.edit(facts)
    wrote = {hook: [] for hook in hook_layers(session.model)}  # rows that a layer changed
    for name, module in session.model.named_modules():
        if not name.endswith(".coachhook"):
            continue
        answer = module._answer

        def seen(of: Any, inputs: Any, output: torch.Tensor, answer: Any = answer, module: Any = module) -> Any:
            amended = answer(of, inputs, output)
            changed = torch.zeros_like(output) if amended is None else amended - output
            wrote[module].append((changed != 0).any(-1).flatten())
            return amended

        projection = session.model.get_submodule(name.rpartition(".")[0])
        projection._forward_hooks[module._handle.id] = seen
    opened = decisions(session, *TEXTS)
    for i in range(len(TEXTS)):
        first, *later = opened[3 * i : 3 * i + 3]
        assert all(torch.equal(open_.flatten(), first.flatten()) for open_ in later)
        for rows in wrote.values():
            assert torch.equal(rows[i], first.flatten())
    assert 4 <= sum(int(open_.sum()) for open_ in opened) // 3 < sum(open_.numel() for open_ in opened) // 6


@LEVERAGE
@torch.no_grad()
def test_a_block_run_by_itself_does_not_repeat_what_an_earlier_pass_decided(start: Start, facts: Facts) -> None:
    session = start(**EASY)
    session.edit(facts)
    projection = session.model.get_submodule(PROJECTION["llama"].format(2))
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    keys = torch.randn(1, ids.shape[1], 48, generator=torch.Generator().manual_seed(0))
    with session.disabled():
        base = projection(keys)
    session.model(input_ids=ids)
    assert torch.equal(projection(keys), base)


@LEVERAGE
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_token_is_decided_alike_alone_and_padded_among_others(start: Start, facts: Facts, case: str) -> None:
    session = start(case, **EASY)
    session.edit(facts)
    alone = decisions(session, *TEXTS)[::2]  # each first layer's
    assert sum(map(torch.sum, alone)) >= 4
    lengths = [len(open_) for open_ in alone]
    for side, extra in [("left", 5), ("right", 11), ("left", 0)]:
        together, again = open_tokens(
            session, lambda side=side, extra=extra: padded_logits(session.model, session.tokenizer, TEXTS, side, extra)
        )
        assert torch.equal(together, again)
        for open_, row, n in zip(alone, together, lengths, strict=True):
            assert torch.equal(open_, row[-n:] if side == "left" else row[:n])


@LEVERAGE
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_what_comes_later_changes_no_answer(start: Start, facts: Facts, case: str) -> None:
    session = start(case, **EASY)
    session.edit(facts)
    text = f"{facts[1]['prompt']} Rome, and {facts[0]['prompt']}"
    ids = session.tokenizer(text)["input_ids"]
    whole = logits_of(session.model, session.tokenizer, [text])[0]
    assert decisions(session, text)[0].sum() >= 2
    for n in range(1, len(ids)):
        with torch.no_grad():
            found = session.model(input_ids=torch.tensor([ids[:n]])).logits[0]
        assert zoo.relative(found, whole[:n]) < 1e-4


@LEVERAGE
@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("pieces", ["one by one", "in two"])
def test_a_subject_that_comes_up_while_decoding_is_answered_as_in_a_whole_pass(
    start: Start, facts: Facts, case: str, pieces: str
) -> None:
    session = start(case, **EASY, scope_budget=0.2)
    session.edit(facts)
    model, text = session.model, f"People say that {facts[0]['prompt']} old and {facts[1]['prompt']}"
    ids = torch.tensor([session.tokenizer(text)["input_ids"]])
    whole: list[torch.Tensor] = []
    expected = open_tokens(session, lambda: whole.append(model(input_ids=ids).logits))[0]
    assert expected[:, 6:].any()
    with session.disabled():
        assert zoo.relative(whole[0], model(input_ids=ids).logits) > 0.05
    cuts = range(1, ids.shape[1]) if pieces == "one by one" else [6]
    past, logits, opened = None, [], []
    for part in torch.tensor_split(ids, list(cuts), dim=1):
        seen = sum(piece.shape[1] for piece in logits)
        given = {"attention_mask": torch.ones(1, seen + part.shape[1], dtype=torch.long), "past_key_values": past}
        call = functools.partial(model, input_ids=part, use_cache=True, **given)
        steps: list[Any] = []
        first, second = open_tokens(session, lambda call=call, steps=steps: steps.append(call()))
        assert torch.equal(first, second)
        opened.append(first)
        logits.append(steps[0].logits)
        past = steps[0].past_key_values
    assert torch.equal(torch.cat(opened, dim=1), expected)
    assert zoo.relative(torch.cat(logits, dim=1), whole[0]) < 1e-4


@LEVERAGE
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_generation_says_the_same_with_and_without_a_cache(taught: Start, case: str) -> None:
    session = taught(case)
    batch = lessons(1)[::7]
    session.edit(batch)
    # A subject at the very end of what is given, and one in the middle, so that edited keys are cached and not.
    texts = [batch[0]["prompt"], batch[2]["prompt"], f"{batch[1]['prompt']} Rome. {batch[0]['prompt'][:20]}"]
    said = set()
    for text in texts:
        one = session.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        found = {}
        for use_cache in (True, False):
            given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
            found[use_cache] = session.model.generate(**one, **given)[0].tolist()
        assert found[True] == found[False]
        with session.disabled():
            base = session.model.generate(**one, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        said.add(base == found[True])
    assert False in said


@ZSCORE
@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_cached_decoding_edits_the_prompt_and_leaves_generated_tokens_to_the_base_model(
    start: Start, facts: Facts, case: str
) -> None:
    session = start(case, **EASY)
    session.edit(facts)
    model = session.model
    for fact in facts:
        ids = torch.tensor([session.tokenizer(fact["prompt"])["input_ids"]])
        full = model(input_ids=ids).logits
        step = model(input_ids=ids, use_cache=True)
        torch.testing.assert_close(step.logits, full, rtol=1e-4, atol=1e-4)
        for _ in range(5):
            token = step.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            twin = copy.deepcopy(step.past_key_values)
            mask = torch.ones_like(ids)
            step = model(input_ids=token, past_key_values=step.past_key_values, attention_mask=mask, use_cache=True)
            assert step.logits.isfinite().all()
            with session.disabled():
                base = model(input_ids=token, past_key_values=twin, attention_mask=mask, use_cache=True)
            assert torch.equal(step.logits, base.logits)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_generation_in_a_padded_batch_says_what_generation_alone_says(taught: Start, case: str) -> None:
    session = taught(case)
    batch = lessons(1)[::7]
    session.edit(batch)
    tokenizer = copy.deepcopy(session.tokenizer)
    tokenizer.padding_side = "left"
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    inputs = tokenizer(prompts(batch), padding=True, return_tensors="pt", return_token_type_ids=False)
    assert not inputs["attention_mask"].all()
    together = session.model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]
    said = 0
    for fact, row in zip(batch, together, strict=True):
        one = tokenizer(fact["prompt"], return_tensors="pt", return_token_type_ids=False)
        alone = session.model.generate(**one, **given)[0, one["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()
        said += tokenizer.decode(row).startswith(f" {fact['target_new']}")
    assert said >= len(batch) - 1


# --- how the residual is spread --------------------------------------------------------------------------------------


@pytest.mark.once
@LEVERAGE  # the z-score's thresholds move after the last write
@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 3]])
def test_with_boundary_spread_the_first_and_the_last_layer_each_reach_a_target_of_their_own(
    start: Start, targets_of: list[Any], facts: Facts, case: str, layers: list[int]
) -> None:
    first, last = layers[0], layers[-1]
    # Next to no weight on pre-training, and one context: an update gives the block just what it is asked for.
    session = start(case, layers=layers, spread="boundary", mom2_update_weight=1e-9, context_prefixes=[], v_lr=0.3)
    result = session.edit(facts)
    assert list(session.state.layers) == [first, last]
    (at_first, _), (at_last, _) = targets_of
    assert result.nll == at_last.nll
    one, other = hook_layers(session.model)
    for hook, layer, targets in ((one, first, at_first), (other, last, at_last)):
        one.mode = other.mode = Mode.VALIDATED
        hook.mode = Mode.TEMPORARY  # as while it was written
        block = session._parts.blocks[layer]
        requests = session.check(facts)
        found = subject_values(session.model, block, session._encoder, requests, 10_000, torch.device("cpu"))
        assert zoo.relative(found, targets.values) < 1e-2
    assert at_first.values.shape == at_last.values.shape
    assert zoo.relative(at_first.values, at_last.values) > 0.1


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_with_boundary_spread_the_first_layers_targets_count_on_the_edits_above_it(
    start: Start, targets_of: list[Any], facts: Facts, case: str
) -> None:
    session = start(case, layers=[0, 2], spread="boundary", alpha=1.0, mom2_update_weight=0.1)
    session.edit(facts)
    again = [{**fact, "target_new": "Seoul"} for fact in facts]
    block, settings = session._parts.blocks[0], session.hparams

    def expected() -> list[torch.Tensor]:
        model, tokenizer = session.model, session.tokenizer
        return [zoo.plain_target(model, block, tokenizer, fact, session.prefixes, settings)[0] for fact in again]

    whole, (_, above) = expected(), hook_layers(session.model)
    above.mode = Mode.OFF
    without = expected()
    above.mode = Mode.VALIDATED
    session.edit(again)
    found = targets_of[2][0].values.T
    assert any(zoo.relative(one, other) > 1e-2 for one, other in zip(without, whole, strict=True))
    for one, other in zip(found, whole, strict=True):
        assert zoo.relative(one, other) < 1e-3


def test_boundary_spread_can_be_undone_and_goes_on(start: Start, facts: Facts) -> None:
    session = start(spread="boundary", layers=[0, 1, 3])
    before = photograph(session.model)
    base = session.state
    session.edit(facts)
    after_one = answers(session)
    session.edit(MORE)
    session.restore(base)
    session.edit(facts)
    assert same(answers(session), after_one)
    session.detach()
    assert photograph(session.model)["parameters"] == before["parameters"]


# --- in company ------------------------------------------------------------------------------------------------------


def test_a_model_compiled_before_its_first_edit_answers_with_it(start: Start, facts: Facts) -> None:
    session = start(**EASY)
    compiled = torch.compile(session.model, backend="eager")
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    with torch.no_grad():
        base = compiled(input_ids=ids).logits
        session.edit(facts)
        edited = session.model(input_ids=ids).logits
        assert zoo.relative(compiled(input_ids=ids).logits, edited) < 1e-4
        assert zoo.relative(base, edited) > 0.1
        session.detach()
        assert zoo.relative(compiled(input_ids=ids).logits, base) < 1e-4


@pytest.mark.once
@torch.no_grad()
@pytest.mark.parametrize("compiled", [(0, 1, 2, 3), (1,), (2,)], ids=["every block", "the first edited", "the second"])
def test_blocks_that_are_compiled_one_by_one_answer_as_before(
    start: Start, facts: Facts, compiled: tuple[int, ...]
) -> None:
    """Each is a graph of its own, and the second edited layer acts on what the first one decided."""
    session = start(**EASY)
    session.edit(facts)
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    edited = session.model(input_ids=ids).logits
    for i in compiled:
        session.model.model.layers[i].compile(backend="eager")
    for _ in range(2):
        assert zoo.relative(session.model(input_ids=ids).logits, edited) < 1e-4
    with session.disabled():
        assert zoo.relative(session.model(input_ids=ids).logits, edited) > 0.1
    assert zoo.relative(session.model(input_ids=ids).logits, edited) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_threads_may_run_one_edited_model_at_once(start: Start, facts: Facts, case: str) -> None:
    """A server's threads, one of them in the middle of a pass while another runs a whole one."""
    session = start(case, **EASY)
    session.edit(facts)
    model = session.model
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    others: list[torch.Tensor] = []

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            rows = ids.roll(3, dims=1)[:, : 5 if others else None]
            thread = threading.Thread(target=lambda: others.append(model(input_ids=rows).logits))
            thread.start()
            thread.join()

    handle = model.get_submodule(PROJECTION[case].format(1)).register_forward_hook(meanwhile)
    for _ in range(2):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    handle.remove()
    assert [len(logits[0]) for logits in others] == [ids.shape[1], 5]


@pytest.mark.parametrize("calls", ["restore", "state", "load"])
def test_a_model_can_be_trained_after_its_session_was_used_in_inference_mode(
    start: Start, tiny: Any, facts: Facts, calls: str, tmp_path: Any
) -> None:
    session = start(**EASY)
    with torch.inference_mode():
        empty = session.state
    session.edit(facts)
    if calls == "restore":
        state = session.state
        session.restore(empty)
        with torch.inference_mode():
            session.restore(state)
    if calls == "load":
        session.save(tmp_path)
        model = tiny()
        with torch.inference_mode():
            session = load_edits(model, tmp_path, session.tokenizer)
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    session.model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in session.model.parameters())


def test_an_edit_inside_autocast_is_the_same(start: Start, facts: Facts, monkeypatch: Any, tmp_path: Any) -> None:
    first, second = start(), start()
    first.edit(facts)
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))  # statistics are collected anew
    with torch.autocast("cpu", torch.bfloat16):
        second.edit(facts)
    assert same(answers(first), answers(second))
    for layer, of in first.state.layers.items():
        assert torch.equal(second.state.layers[layer].memory.matrix, of.memory.matrix)


def test_another_attention_may_be_chosen_between_batches(start: Start, facts: Facts) -> None:
    session, untroubled = start(), start()
    for one in (session, untroubled):
        one.edit(facts[:2])
    session.model.config._attn_implementation = "eager"
    for one in (session, untroubled):
        one.edit(facts[:2])
    for one, other in zip(answers(session), answers(untroubled), strict=True):
        assert zoo.relative(one, other) < 1e-3


def test_an_edit_inside_inference_mode_is_the_same(start: Start, facts: Facts) -> None:
    first, second = start(), start()
    first.edit(facts)
    with torch.inference_mode():
        second.edit(facts)
    assert same(answers(first), answers(second))


@LEVERAGE
def test_a_subject_that_cannot_open_the_scope_is_told_to_the_user(
    start: Start, facts: Facts, caplog: pytest.LogCaptureFixture
) -> None:
    session = start(**EASY, scope_budget=0.001)
    hidden = {"prompt": "The best dish", "subject": "The", "target_new": "Rome"}  # as every other first "The"
    result = session.edit([*facts, hidden], first=40)
    rows = [torch.tensor(session.tokenizer(fact["prompt"])["input_ids"]) for fact in [*facts, hidden]]
    assert result.in_scope == [bool((session.margins(row) >= 1).any()) for row in rows]
    assert not result.in_scope[-1]
    assert f"request {40 + len(facts)}, subject: 'The'" in caplog.text
    assert "put a word before it" in caplog.text


def test_the_state_of_other_weights_or_settings_is_refused_and_nothing_changes(
    start: Start, facts: Facts, tiny: Callable[..., Any], tokenizer: Any, settings: Callable[..., Any]
) -> None:
    session = start()
    session.edit(facts)
    trained = tiny()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    others = [start(layers=[0, 3]), start(seed=1), EditSession(trained, tokenizer, settings(), progress=False)]
    for other in others:  # of other shapes, and of the same
        other.edit(facts)
        before, before_session = photograph(session.model), photograph_session(session)
        for act in (session.restore, session.show):
            with pytest.raises(ValueError, match="state: is that of other weights or other hyperparameters"):
                act(other.state)
        assert photograph(session.model) == before
        assert photograph_session(session) == before_session
    earlier = session.state
    session.edit(MORE)
    twin = EditSession.of(copy.deepcopy(session.model))
    assert twin is not None
    for one in (session, twin):
        one.restore(earlier)
        one.rollback(to=0)
        one.restore(earlier)
        assert len(one) == len(facts)


def test_a_state_goes_on_in_another_session_on_the_same_weights(start: Start, facts: Facts) -> None:
    """As in a run that keeps its states by itself and was killed."""
    session, other = start(), start()
    session.edit(facts)
    _ = other.state
    other.restore(pickle.loads(pickle.dumps(session.state)))
    for one in (session, other):
        one.edit(MORE)
    assert other.state.step == 2
    assert all(torch.equal(of.delta, session.state.layers[layer].delta) for layer, of in other.state.layers.items())


def test_the_memory_held_is_counted_from_the_start(start: Start, facts: Facts) -> None:
    session = start()
    empty = session.kept_bytes()
    assert empty == session.kept_bytes()
    session.edit(facts)
    assert session.kept_bytes() > empty > 0


# --- whole or not at all ---------------------------------------------------------------------------------------------

POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the targets": (coachhook_plugin.batch_writing, "optimise_targets", 0, False),
    "after the targets": (coachhook_plugin.batch_writing, "optimise_targets", 0, True),
    "while optimising": (torch.optim.Adam, "step", 2, False),
    "first layer's keys": (coachhook_plugin.batch_writing, "subject_keys", 0, False),
    "second layer's keys": (coachhook_plugin.batch_writing, "subject_keys", 1, True),
    "second layer's values": (coachhook_plugin.batch_writing, "subject_values", 1, False),
    "second layer's update": (coachhook_plugin.memory, "update", 1, False),
    "second layer's write": (HookLayer, "write", 1, True),
    "second hook layer": (HookLayer, "__init__", 1, False),
}


# Where the two rules learn what they ask for, and where they begin to ask for it.
POINTS_OF = {
    "zscore": {
        "first threshold": (coachhook_plugin.scope.zscore, "lowered", 0, False),
        "second threshold": (coachhook_plugin.scope.zscore, "lowered", 1, True),
        "last threshold shown": (ZScoreScope, "show", 3, True),
    },
    "leverage": {
        "before the threshold": (LeverageScope, "after_keys", 0, False),
        "after the threshold": (LeverageScope, "after_keys", 0, True),
        "threshold shown": (LeverageScope, "show", 1, True),
    },
}
FAILURES = [(rule, name) for rule, points in POINTS_OF.items() for name in (*POINTS, *points)]


def marked(model: Any) -> Any:
    """A model in the middle of someone's training: modes, frozen parameters and gradients that must survive."""
    model.train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[3].grad = torch.ones_like(parameters[3])
    next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).eval()
    return model


@pytest.mark.once
@pytest.mark.parametrize("earlier", [False, True], ids=["first batch", "third batch"])
@pytest.mark.parametrize(("scope", "point"), FAILURES)
def test_a_batch_that_fails_leaves_model_and_session_as_they_were(
    start: Start, monkeypatch: pytest.MonkeyPatch, facts: Facts, scope: str, point: str, earlier: bool
) -> None:
    owner, name, call, after = {**POINTS, **POINTS_OF[scope]}[point]
    session, untroubled = start(), start()
    marked(session.model)
    marked(untroubled.model)
    if earlier:
        if point == "second hook layer":
            return  # hook layers are made in the first batch only
        for batch in (MORE[:1], MORE[1:]):
            session.edit(batch)
            untroubled.edit(batch)
    before, before_session = photograph(session.model), photograph_session(session)
    logits = None if session.model.training else answers(session)
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):
        with raising_at(monkeypatch, owner, name, call, error, after) as calls:
            with pytest.raises(type(error)):
                session.edit(facts)
            assert calls[0] > call
        assert photograph(session.model) == before
        assert photograph_session(session) == before_session
        assert logits is None or same(answers(session), logits)
    session.edit(facts)
    untroubled.edit(facts)
    for one in (session, untroubled):
        one.model.eval()
    assert same(answers(session), answers(untroubled))


@pytest.mark.once
@pytest.mark.parametrize(
    ("scope", "call"), [*[("leverage", call) for call in range(5)], *[("zscore", call) for call in (0, 1, 2, 4, 6)]]
)
@pytest.mark.parametrize("earlier", [False, True], ids=["first batch", "second batch"])
def test_an_interrupt_in_any_forward_pass_leaves_model_and_session_as_they_were(
    start: Start, facts: Facts, call: int, earlier: bool
) -> None:
    session = start()
    if earlier:
        session.edit(MORE)
    before, before_session = photograph(session.model), photograph_session(session)
    calls = itertools.count()  # the last pass of a batch: 4, or 6 where two layers are measured after the writing

    def interrupt(*_: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    handle = session.model.get_submodule("model.layers.0").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.edit(facts)
    handle.remove()
    assert photograph(session.model) == before
    assert photograph_session(session) == before_session


@pytest.mark.parametrize("name", ["key_statistics", "context_prefixes"])
def test_a_session_that_cannot_start_leaves_the_model_as_it_was(
    start: Start, monkeypatch: pytest.MonkeyPatch, facts: Facts, name: str
) -> None:
    session = start(context_prefixes=None)
    marked(session.model)
    before = photograph(session.model)
    owner = coachhook_plugin.beginning.statistics if name == "key_statistics" else coachhook_plugin.session
    with raising_at(monkeypatch, owner, name, 0, KeyboardInterrupt(), after=True), pytest.raises(KeyboardInterrupt):
        session.edit(facts)
    assert photograph(session.model) == before
    assert len(session) == 0
    session.edit(facts)
    assert len(session) == len(facts)


def test_a_loss_that_is_no_number_leaves_model_and_session_as_they_were(start: Start, facts: Facts) -> None:
    for earlier in (False, True):
        session = start()
        _ = session.state
        if earlier:
            session.edit(MORE)
        with torch.no_grad():
            session.model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan  # above the edited layers
        before, before_session = photograph(session.model), photograph_session(session)
        with pytest.raises(ValueError, match=r"request 0 .*nan"):
            session.edit(facts)
        assert photograph(session.model) == before
        assert photograph_session(session) == before_session


def test_an_update_that_is_no_number_is_not_written(start: Start, facts: Facts) -> None:
    session = start()
    _ = session.state
    with torch.no_grad():
        session.model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan  # the last edited layer's own
    before, before_session = photograph(session.model), photograph_session(session)
    with pytest.raises(ValueError, match=r"request 0|layer 1"):
        session.edit(facts)
    assert photograph(session.model) == before
    assert photograph_session(session) == before_session


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("case", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.float32), ("llama-tied", torch.float32), ("llama", torch.bfloat16)],
)
def test_every_earlier_state_comes_back_bit_by_bit(start: Start, facts: Facts, case: str, dtype: torch.dtype) -> None:
    session = start(case, dtype=dtype)
    found_model = photograph(session.model)
    seen = [(session.state, answers(session), photograph_session(session))]
    for batch in (facts, MORE[:1], MORE[1:]):
        session.edit(batch)
        seen.append((session.state, answers(session), photograph_session(session)))
    assert len({b"".join(map(bits, logits)) for _, logits, _ in seen}) == 4
    for number in (2, 3, 0, 1, 3, 0, 2):
        state, logits, told = seen[number]
        session.restore(state)
        assert same(answers(session), logits)
        assert photograph_session(session) == told
        if number == 0:
            assert photograph(session.model) == found_model
    session.edit(MORE[1:])  # on top of state 2, as the first time
    assert same(answers(session), seen[3][1])


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_restored_state_decides_every_token_as_it_did(start: Start, facts: Facts, case: str) -> None:
    session = start(case, **EASY)
    texts = [text for text in TEXTS if len(session.tokenizer(text)["input_ids"]) >= 3]
    seen = []
    for batch in (facts, MORE[:1], MORE[1:]):
        session.edit(batch)
        seen.append((session.state, decisions(session, *texts)))
    for number in (0, 2, 1, 0):
        state, expected = seen[number]
        session.restore(state)
        assert all(map(torch.equal, decisions(session, *texts), expected))
    assert any(not torch.equal(one, other) for one, other in zip(seen[0][1], seen[2][1], strict=True))


@pytest.mark.once
@pytest.mark.parametrize("case", ["llama", "gpt2", "llama-tied"])
@pytest.mark.parametrize("training", [False, True])
def test_detaching_leaves_the_model_as_it_was_found(
    start: Start, tiny: Any, facts: Facts, case: str, training: bool
) -> None:
    model = tiny(case).train(training)
    before, keys = photograph(model), list(model.state_dict())
    session = start(case)
    session = EditSession(model, session.tokenizer, session.hparams, progress=False)
    session.edit(facts)
    session.edit(MORE)
    assert photograph(model) != before
    session.detach()
    assert photograph(model) == before
    assert list(model.state_dict()) == keys
    assert len(session) == 0
    session.detach()  # twice is once
    assert photograph(model) == before


def test_hyperparameters_changed_after_the_fact_spoil_neither_the_session_nor_its_folder(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    plain = start()
    given = replace(plain.hparams)
    session = EditSession(tiny(), plain.tokenizer, given, progress=False)
    session.edit(facts[:2])
    given.layers[0] = 0  # the list itself, too
    given.layers, given.use_hooks, given.v_lr = [1, 2, 3], False, 0.1
    session.edit(facts[2:])
    session.save(tmp_path)
    again = load_edits(tiny(), tmp_path, plain.tokenizer, progress=False)
    for batch in (facts[:2], facts[2:]):
        plain.edit(batch)
    assert photograph_session(again)["layers"] == photograph_session(plain)["layers"]


def test_a_compiled_model_and_the_one_within_have_one_session(start: Start, facts: Facts, tmp_path: Path) -> None:
    plain = start()
    model, hparams = plain.model, plain.hparams
    plain.detach()
    compiled = torch.compile(model, backend="eager")
    before = photograph(model)
    session = EditSession(compiled, plain.tokenizer, hparams, progress=False)
    for one in (model, compiled):
        assert EditSession.of(one) is session
        with pytest.raises(ValueError, match="session already"):
            EditSession(one, plain.tokenizer, hparams)
    session.edit(facts)
    session.save(tmp_path)
    expected = answers(session)
    session.detach()
    assert photograph(model) == before
    assert EditSession.of(compiled) is None
    again = load_edits(model, tmp_path, plain.tokenizer)  # the parameters have their own names in the folder
    assert same(answers(again), expected)


def test_a_model_has_one_session_and_is_asked_for_it(start: Start, facts: Facts) -> None:
    session = start()
    model = session.model
    assert EditSession.of(model) is session
    assert session  # although it has no edits
    with pytest.raises(ValueError, match="session already"):
        EditSession(model, session.tokenizer, session.hparams)
    session.edit(facts)
    with pytest.raises(ValueError, match="session already"):
        EditSession(model, session.tokenizer, session.hparams)
    assert len(session) == len(facts)
    state = session.state
    session.detach()
    assert EditSession.of(model) is None
    following = EditSession(model, session.tokenizer, session.hparams, progress=False)
    before = photograph(model)
    for use in (lambda: session.edit(facts), lambda: session.restore(state)):
        with pytest.raises(ValueError, match="detached"):
            use()
    assert photograph(model) == before
    following.edit(facts)
    assert EditSession.of(model) is following


def test_a_session_that_does_not_fit_leaves_no_trace_on_the_model(tiny: Any, tokenizer: Any, settings: Any) -> None:
    model = tiny()
    before = photograph(model)
    with pytest.raises(ValueError, match="out of range"):
        EditSession(model, tokenizer, settings(layers=[1, 40]))
    assert photograph(model) == before


@pytest.mark.once
def test_disabled_is_the_base_model_and_gives_back_what_was_there_before(start: Start, facts: Facts) -> None:
    for use_hooks in (True, False):
        session = start(use_hooks=use_hooks)
        base = answers(session)
        with session.disabled():  # before the first edit
            assert same(answers(session), base)
        session.edit(facts)
        edited = answers(session)
        assert not same(edited, base)
        with session.disabled():
            assert same(answers(session), base)
            with session.disabled():
                assert same(answers(session), base)
            assert same(answers(session), base)
            with pytest.raises(KeyboardInterrupt), session.disabled():
                raise KeyboardInterrupt
            assert same(answers(session), base)
        assert same(answers(session), edited)
        with pytest.raises(RuntimeError, match="mine"), session.disabled():
            raise RuntimeError("mine")
        assert same(answers(session), edited)


def test_restoring_inside_disabled_is_not_undone_at_its_end(start: Start, facts: Facts) -> None:
    for use_hooks in (True, False):
        session = start(use_hooks=use_hooks)
        before, base = session.state, answers(session)
        session.edit(facts)
        with session.disabled():
            session.restore(before)
        assert same(answers(session), base)


@pytest.mark.once
@pytest.mark.parametrize("use_hooks", [True, False])
def test_what_is_edited_inside_disabled_shows_when_its_body_ends_and_not_before(
    start: Start, facts: Facts, use_hooks: bool
) -> None:
    session, other = start(use_hooks=use_hooks), start(use_hooks=use_hooks)
    base = answers(session)
    for batch in (facts, MORE):
        other.edit(batch)
    with session.disabled():
        session.edit(facts)  # the first hook layers are made here
        assert same(answers(session), base)
        one = session.state
        with session.disabled():
            session.edit(MORE)
            assert same(answers(session), base)
        assert same(answers(session), base)
    assert same(answers(session), answers(other))
    with session.disabled():
        session.restore(one)
        assert same(answers(session), base)
        session.edit(MORE)
        session.forget(["2-1"])
        session.rollback(to=2)
        with pytest.raises(ValueError, match="request 0"):
            session.edit([{**facts[0], "subject": "Nobody"}])
        assert same(answers(session), base)
    assert same(answers(session), answers(other))
    with session.disabled():
        session.rollback(to=0)
    assert same(answers(session), base)


@pytest.mark.parametrize("use_hooks", [True, False])
def test_a_batch_that_fails_inside_disabled_leaves_the_body_with_the_base_model(
    start: Start, facts: Facts, use_hooks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(use_hooks=use_hooks)
    base = answers(session)
    session.edit(facts)
    edited = answers(session)
    owner = coachhook_plugin.batch_writing
    with session.disabled():
        before = photograph(session.model)
        with raising_at(monkeypatch, owner, "subject_keys", 1, RuntimeError("full")), pytest.raises(RuntimeError):
            session.edit(MORE)
        assert photograph(session.model) == before
        assert same(answers(session), base)
    assert same(answers(session), edited)


@pytest.mark.once
@pytest.mark.parametrize("use_hooks", [True, False])
def test_a_copy_made_inside_disabled_is_not_kept_from_answering(start: Start, facts: Facts, use_hooks: bool) -> None:
    session, other = start(use_hooks=use_hooks), start(use_hooks=use_hooks)
    for one in (session, other):
        one.edit(facts)
    with session.disabled():
        twin = EditSession.of(copy.deepcopy(session.model))
    assert twin is not None
    for one in (twin, other):
        one.edit(MORE)
    assert same(answers(twin), answers(other))


def test_a_detached_session_has_no_state_and_says_so(start: Start, facts: Facts) -> None:
    session = start()
    session.edit(facts)
    session.detach()
    for ask in (lambda: session.state, session.kept_bytes):
        with pytest.raises(ValueError, match="was detached"):
            ask()
    assert len(session) == 0
    assert session.ledger == ()
    assert "edits=0" in repr(session)


# --- copies and moves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_hooks", [True, False])
@pytest.mark.parametrize("case", ["llama", "gpt2", "llama-tied"])
def test_a_deep_copy_of_an_edited_model_is_edited_by_itself(
    start: Start, facts: Facts, case: str, use_hooks: bool
) -> None:
    session = start(case, use_hooks=use_hooks)
    base = answers(session)
    session.edit(facts)
    edited = answers(session)
    model = copy.deepcopy(session.model)
    twin = EditSession.of(model)
    assert twin is not None
    assert twin is not session
    assert twin.model is model
    assert same(answers(twin), edited)
    twin.edit(MORE)
    assert same(answers(session), edited)
    further = answers(twin)
    assert not same(further, edited)
    session.detach()
    assert same(answers(session), base)
    assert same(answers(twin), further)
    twin.detach()
    assert same(answers(twin), base)


@LEVERAGE
@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_copy_that_runs_in_the_middle_of_a_pass_does_not_decide_for_the_original(
    start: Start, facts: Facts, case: str
) -> None:
    """As two models served by one process, or by two threads, may come to do."""
    session = start(case, **EASY)
    session.edit(facts)
    model, twin = session.model, copy.deepcopy(session.model)
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    other = ids.roll(3, dims=1)  # of the same shape, and other tokens open
    for runs, disturbs in ((model, twin), (twin, model)):
        expected = runs(input_ids=ids).logits
        between = runs.get_submodule(PROJECTION[case].format(1))
        handle = between.register_forward_hook(lambda *_, model=disturbs: model(input_ids=other) and None)
        found = runs(input_ids=ids).logits
        handle.remove()
        assert torch.equal(found, expected)
    # The test can fail: the original itself, called in between, would decide anew.
    layer = PROJECTION[case].format(1)
    inside = [False]

    def again(*_: Any) -> None:
        if not inside[0]:
            inside[0] = True
            model(input_ids=other)

    handle = model.get_submodule(layer).register_forward_hook(again)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    handle.remove()


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changing_the_models_dtype_keeps_the_edits_in_full_precision(
    start: Start, facts: Facts, dtype: torch.dtype
) -> None:
    session = start(**EASY)
    session.edit(facts)
    told = photograph_session(session)["layers"]

    def ungated() -> list[torch.Tensor]:  # near its threshold the gate may fall either way
        for hook in hook_layers(session.model):
            hook.mode = Mode.TEMPORARY
        found = answers(session)
        for hook in hook_layers(session.model):
            hook.mode = Mode.VALIDATED
        return found

    wide = ungated()
    if dtype == torch.float16:
        session.model.half()
    else:
        session.model.to(dtype)
    for hook, state in zip(hook_layers(session.model), session.state.layers.values(), strict=True):
        assert hook.delta.dtype == torch.float32
        assert bits(hook.delta) == bits(state.delta)
    assert photograph_session(session)["layers"] == told
    assert max(zoo.relative(one, other) for one, other in zip(ungated(), wide, strict=True)) < 0.05
    narrow = answers(session)
    state = session.state
    session.edit(MORE)
    session.restore(state)
    assert same(answers(session), narrow)
    session.detach()
    assert {p.dtype for p in session.model.parameters()} == {dtype}


def test_the_state_dict_holds_the_edits_beside_the_unchanged_base_weights(
    start: Start, facts: Facts, scope: str
) -> None:
    session = start()
    base = {name: bits(tensor) for name, tensor in session.model.state_dict().items()}
    session.edit(facts)
    found = session.model.state_dict()
    assert {name: bits(found[name]) for name in base} == base
    held = {
        "zscore": {layer: ["delta", "gate.alpha", "gate.ratio"] for layer in (1, 2)},
        "leverage": {1: ["delta", "gate.scale", "gate.explain", "gate.threshold"], 2: ["delta"]},
    }[scope]
    names = {f"model.layers.{i}.mlp.down_proj.coachhook.{name}" for i in held for name in held[i]}
    assert set(found) - set(base) == names
    for layer, state in session.state.layers.items():
        assert torch.equal(found[f"model.layers.{layer}.mlp.down_proj.coachhook.delta"], state.delta)


def test_editing_leaves_no_gradients_and_asks_for_none(start: Start, facts: Facts) -> None:
    session = start()
    wanted = [p.requires_grad for p in session.model.parameters()]
    session.edit(facts)
    assert all(p.grad is None for p in session.model.parameters())
    assert [p.requires_grad for p in session.model.parameters()] == wanted
    assert not any(state.delta.requires_grad for state in session.state.layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edited_model_can_still_be_trained(start: Start, facts: Facts, dtype: torch.dtype) -> None:
    session = start(dtype=dtype)
    session.edit(facts)
    ids = torch.tensor([session.tokenizer(facts[0]["prompt"])["input_ids"]])
    with torch.inference_mode():
        session.model(input_ids=ids)  # as an evaluation in between does
    session.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in session.model.parameters())
