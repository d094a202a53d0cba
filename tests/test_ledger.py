"""The ledger, and taking single facts back: what is forgotten, what stays, and what is told of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lessons
from plain import bits, hook_layers, logits_of, photograph, photograph_session, raising_at

import coachhook_plugin.session
from coachhook_plugin import EditSession, Request
from coachhook_plugin.batch_writing import BatchWriter
from coachhook_plugin.ledger import Edit, lines_of_batch, to_forget, with_lines

pytestmark = pytest.mark.once

Start = Callable[..., EditSession]
Facts = list[dict[str, str]]

SCOPES = pytest.mark.parametrize(
    "changed", [{"scope": "leverage"}, {"scope": "zscore"}, {"use_hooks": False}], ids=str
)


def statuses(session: EditSession) -> list[tuple[str, str, str | None]]:
    return [(edit.id, edit.status, edit.by) for edit in session.ledger]


def told(session: EditSession) -> Any:
    seen = photograph_session(session)
    del seen["state"]
    return seen, session.ledger, session.state.step


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_tells_every_fact_in_order_with_what_it_took(start: Start, facts: Facts) -> None:
    session = start()
    assert session.ledger == ()
    first = session.edit(facts[:3])
    second = session.edit(facts[3:])
    assert [edit.id for edit in session.ledger] == [*first.ids, *second.ids] == ["1-1", "1-2", "1-3", "2-1"]
    assert [edit.nll for edit in session.ledger] == [*first.nll, *second.nll]
    assert [edit.in_scope for edit in session.ledger] == [*first.in_scope, *second.in_scope]
    assert [edit.threshold for edit in session.ledger] == [first.scope.threshold] * 3 + [second.scope.threshold]
    for edit, fact in zip(session.ledger, facts, strict=True):
        assert (edit.prompt, edit.subject, edit.target_new) == tuple(fact.values())
        assert Edit.from_dict(edit.to_dict()) == edit


def test_a_fact_edited_again_supersedes_the_earlier_edit_and_says_so(
    start: Start, facts: Facts, caplog: pytest.LogCaptureFixture
) -> None:
    session = start()
    session.edit(facts)
    other = {**facts[1], "target_new": "Seoul"}
    with caplog.at_level("INFO"):
        result = session.edit([other, {**facts[0], "prompt": "They say of Danielle Darrieux that"}])
    assert result.superseded == ["1-2"]
    assert result.ids == ["2-1", "2-2"]
    assert "supersedes" in caplog.text
    assert "1-2" in caplog.text
    assert statuses(session)[1] == ("1-2", "superseded", "2-1")
    assert len(session) == len(facts) + 1  # another prompt about the same subject is another fact


def test_one_fact_twice_in_a_batch_counts_once_and_says_so(
    start: Start, facts: Facts, caplog: pytest.LogCaptureFixture
) -> None:
    session = start()
    with caplog.at_level("INFO"):
        result = session.edit([facts[0], facts[1], facts[0]])
    assert len(session) == 2
    assert (result.ids, result.superseded) == (["1-2", "1-3"], ["1-1"])
    assert "supersedes the edits 1-1" in caplog.text
    assert statuses(session) == [("1-1", "superseded", "1-3"), ("1-2", "in force", None), ("1-3", "in force", None)]
    assert len(result.nll) == len(result.in_scope) == 3  # for every request, as they came
    session.edit(facts[:1])
    assert statuses(session)[0] == ("1-1", "superseded", "1-3")
    assert statuses(session)[2] == ("1-3", "superseded", "2-1")
    with pytest.raises(ValueError, match="request 2, target_new: 'Seoul' contradicts 'English' of request 0"):
        session.edit([facts[0], facts[1], {**facts[0], "target_new": "Seoul"}])


def test_a_fact_that_was_twice_in_a_batch_is_forgotten_whole(start: Start, facts: Facts) -> None:
    session = start()
    session.edit([facts[0], facts[0], facts[1]])
    alone = session.state.history.steps[0]
    assert [line.id for line in session.forget(["1-2"])] == ["1-2"]
    assert statuses(session) == [("1-1", "superseded", "1-2"), ("1-2", "forgotten", "2"), ("1-3", "in force", None)]
    for layer, of in session.state.layers.items():  # both columns are out
        left = alone.layers[layer].columns([2])
        torch.testing.assert_close(of.delta, (left.residual.double() @ left.coefficients.double().T).float())
    session.edit([facts[2], facts[2]])
    session.edit([facts[2]])
    gone = to_forget(session.ledger, ["4-1"])
    assert [edit.id for edit in gone] == ["4-1", "3-2", "3-1"]
    session.rollback(to=3)
    assert [edit.id for edit in to_forget(session.ledger, ["3-2"])] == ["3-2", "3-1"]
    with pytest.raises(ValueError, match="forget '3-2' instead"):
        session.forget(["3-1"])


def test_what_a_fact_superseded_goes_with_it() -> None:
    request = Request("Ada was born in", "Ada", "Rome")
    ledger: tuple[Edit, ...] = ()
    for step in (1, 2, 3):
        ledger = with_lines(ledger, lines_of_batch(ledger, step, "", [request], [0.0], None, [True]))
    assert [edit.id for edit in to_forget(ledger, ["3-1"])] == ["3-1", "2-1", "1-1"]
    with pytest.raises(ValueError, match=r"'1-1' is superseded \(by 2-1\); forget '2-1'"):
        to_forget(ledger, ["1-1"])


# --- forgetting ------------------------------------------------------------------------------------------------------


@SCOPES
def test_forgetting_takes_exactly_the_facts_share_out(start: Start, facts: Facts, changed: dict[str, Any]) -> None:
    session = start(**changed)
    session.edit(facts[:3])
    session.edit(facts[3:])
    before = session.state
    lines = session.forget(["1-2", "2-1"])
    assert [(line.id, line.status, line.by) for line in lines] == [
        ("1-2", "forgotten", "3"),
        ("2-1", "forgotten", "3"),
    ]
    assert [edit.status for edit in session.ledger] == ["in force", "forgotten", "in force", "forgotten"]
    assert len(session) == 2
    assert before.history is not None
    first, second = before.history.steps
    for layer, state in session.state.layers.items():
        gone = [(first.layers[layer], 1), (second.layers[layer], 0)]
        delta, memory = before.layers[layer].delta.double().numpy(), before.layers[layer].memory.matrix.numpy()
        for factors, u in gone:
            delta = delta - np.outer(factors.residual[:, u].double(), factors.coefficients[:, u].double())
            key = factors.keys[:, u].double().numpy()
            memory = memory - np.outer(key, key)
        np.testing.assert_allclose(state.delta, delta, atol=1e-6 * np.abs(delta).max())
        np.testing.assert_allclose(state.memory.matrix, memory, atol=1e-6 * np.abs(memory).max())


@pytest.mark.parametrize("scope", ["leverage", "zscore"])
def test_the_scope_is_as_if_the_forgotten_facts_had_not_been_there(start: Start, facts: Facts, scope: str) -> None:
    session, other = start(scope=scope), start(scope=scope)
    session.edit(facts)
    session.forget(["1-1", "1-3"])
    other.edit([facts[1], facts[3]])
    left, expected = session.state.scope, other.state.scope
    if scope == "leverage":
        torch.testing.assert_close(left.edited, expected.edited, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.witnesses, expected.witnesses, rtol=1e-3, atol=1e-3)
        assert left.seen == expected.seen
        assert left.threshold == pytest.approx(expected.threshold, rel=1e-3)
    else:  # the others' change differs a little where the forgotten keys overlapped
        start_at = session.hparams.alpha
        for layer, thresholds in left.thresholds.items():
            assert thresholds.alpha <= start_at
            assert thresholds.alpha == pytest.approx(expected.thresholds[layer].alpha, rel=0.3)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_forgotten_fact_is_answered_as_before_and_the_others_stay(taught: Start, case: str) -> None:
    session = taught(case)
    first, second, known = lessons(1)[::7], lessons(2)[1::9], lessons(0)[::7]

    def chances(facts: Facts) -> list[float]:
        logits = logits_of(session.model, session.tokenizer, [fact["prompt"] for fact in facts])
        tokens = [session.tokenizer(" " + fact["target_new"])["input_ids"][0] for fact in facts]
        return [float(row[-1].softmax(-1)[token]) for row, token in zip(logits, tokens, strict=True)]

    assert min(chances(known)) > 0.9
    session.edit(first)
    session.edit(second)
    before = chances(first), chances(second)
    session.forget(["1-1", "1-3"])
    new, old, others = chances(first), chances(known), [*chances(first)[1::2], *chances(second)]
    assert max(before[0][0], before[0][2]) > 0.7
    assert max(new[0], new[2]) < 0.1
    assert min(old[0], old[2]) > 0.7
    assert np.mean(others) > 0.8 * np.mean([*before[0][1::2], *before[1]])


@SCOPES
def test_forgetting_everything_is_the_base_model_bit_by_bit(
    start: Start, facts: Facts, changed: dict[str, Any]
) -> None:
    session = start(**changed)
    before = photograph(session.model)
    session.edit(facts)
    session.edit([{**facts[0], "target_new": "Rome"}])
    session.forget(edit.id for edit in session.ledger if edit.in_force)
    assert len(session) == 0
    assert photograph(session.model) == before
    assert statuses(session)[0] == ("1-1", "superseded", "2-1")
    session.edit(facts[:1])
    assert len(session) == 1


@SCOPES
def test_rolling_back_is_exact_also_over_what_was_forgotten(
    start: Start, facts: Facts, changed: dict[str, Any]
) -> None:
    session = start(**changed)
    _ = session.state
    seen = [told(session)]
    acts: list[Callable[[], Any]] = [
        lambda: session.edit(facts[:2]),
        lambda: session.edit([{**facts[0], "target_new": "Seoul"}, facts[2]]),
        lambda: session.forget(["1-2"]),
        lambda: session.edit(facts[1:2]),
    ]
    for act in acts:
        act()
        seen.append(told(session))
    logits = [bits(row) for row in logits_of(session.model, session.tokenizer, [fact["prompt"] for fact in facts])]
    last = session.state
    for step in (3, 1, 0):
        session.rollback(to=step)
        assert told(session) == seen[step]
        assert len(hook_layers(session.model)) == (2 if step and session.hparams.use_hooks else 0)
    session.restore(last)
    assert told(session) == seen[4]
    again = logits_of(session.model, session.tokenizer, [fact["prompt"] for fact in facts])
    assert [bits(row) for row in again] == logits


@pytest.mark.parametrize("step", [-1, 3, 1])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(start: Start, facts: Facts, step: int) -> None:
    session = start(history_steps=0 if step == 1 else 2)
    session.edit(facts[:2])
    session.edit(facts[2:])
    before = told(session)
    with pytest.raises(ValueError, match=r"can return to steps \d to 2 \(history_steps\)"):
        session.rollback(to=step)
    assert told(session) == before


@pytest.mark.parametrize(
    ("ids", "error", "said"),
    [
        (["9-1"], KeyError, "no edit '9-1'"),
        (["3-1", "2-7"], KeyError, "no edit '2-7'"),
        ([], ValueError, "empty"),
        (["1-1"], ValueError, "'1-1' is superseded"),
        (["2-1"], ValueError, "'2-1' is forgotten"),
        (["1-2"], ValueError, "'1-2' can no longer be told apart"),
    ],
)
def test_what_cannot_be_forgotten_is_named_and_nothing_changes(
    start: Start, facts: Facts, ids: list[str], error: type[Exception], said: str
) -> None:
    session = start(history_steps=3)
    session.edit(facts[:2])
    session.edit([facts[2]])
    session.edit([{**facts[0], "target_new": "Seoul"}])
    session.forget(["2-1"])
    before, model = told(session), photograph(session.model)
    with pytest.raises(error, match=said):
        session.forget(ids)
    assert told(session) == before
    assert photograph(session.model) == model


@SCOPES
def test_forgetting_that_fails_changes_nothing(
    start: Start, facts: Facts, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    session = start(**changed)
    session.edit(facts)
    before, model = told(session), photograph(session.model)
    points = [(BatchWriter, "scope_of"), (EditSession, "_next"), (coachhook_plugin.session, "changes")]
    for (owner, name), error in itertools.product(points, (RuntimeError("out of memory"), KeyboardInterrupt())):
        with raising_at(monkeypatch, owner, name, 0, error, after=True), pytest.raises(type(error)):
            session.forget(["1-2"])
        assert told(session) == before
        assert photograph(session.model) == model
    session.forget(["1-2"])


def test_one_id_may_be_given_as_it_is(start: Start, facts: Facts) -> None:
    session = start()
    session.edit(facts)
    session.forget("1-2")
    assert len(session) == len(facts) - 1
