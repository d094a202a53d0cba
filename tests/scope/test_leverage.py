"""The leverage rule, against regressions solved one key at a time: what opens, what stays closed, what is kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import bits, leverages, told
from torch import nn

import coachhook_plugin.scope.leverage
from coachhook_plugin.memory import context_mean
from coachhook_plugin.scope import LeverageScope, LeverageState
from coachhook_plugin.scope.leverage import (
    LEAST,
    MARGIN,
    QUANTILE,
    SILENT,
    WITNESSES,
    Decision,
    FollowingGate,
    LeverageGate,
    explaining,
    leverage,
    scaling,
)
from coachhook_plugin.state import changed, changes

pytestmark = pytest.mark.once

M = 24
SEEDS = st.integers(0, 2**31)
RIDGES = st.sampled_from([1e-3, 0.1, 1.0, 30.0])


def of_text(seed: int, n: int = 4000, m: int = M, spread: float = 2.0) -> np.ndarray:
    """Pre-training keys (n, m) that lean to a few directions, as those of language models do."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(m, m)))[0]
    scales = np.logspace(spread / 2, -spread / 2, m)
    return (random.normal(size=(n, m)) * scales + 0.5 * scales) @ basis


def second_moment(keys: np.ndarray) -> np.ndarray:
    return keys.T @ keys / len(keys)


def moments_of(keys: np.ndarray) -> np.ndarray:
    return (keys**2).mean(0)


def scaled(keys: np.ndarray, text: np.ndarray) -> torch.Tensor:
    """w (n, m) of keys (n, m)."""
    return torch.tensor(keys) * scaling(torch.tensor(moments_of(text)))


def facts_of(text: np.ndarray, seed: int, u: int, contexts: int, noise: float = 0.2) -> np.ndarray:
    """Keys (u, contexts, m) of subjects, each much the same in all its contexts; drawn as the text's are."""
    random = np.random.default_rng(seed)
    subjects = text[random.integers(len(text), size=(u, 1))]
    return subjects + noise * text[random.integers(len(text), size=(u, contexts))]


def scope_of(text: np.ndarray, budget: float = 0.01, ridge: float = 0.1, seed: int = 0) -> LeverageScope:
    return LeverageScope([3, 4], torch.tensor(moments_of(text)), torch.tensor(text).float(), budget, ridge, seed)


def after(scope: LeverageScope, *batches: np.ndarray) -> LeverageState:
    state = scope.initial()
    for keys in batches:
        state = learned(scope, state, torch.tensor(keys))
    return state


def learned(
    scope: LeverageScope, state: LeverageState, keys: torch.Tensor, opening: torch.Tensor | None = None
) -> LeverageState:
    """After one batch; where no opening keys are given, they are as the mean ones."""
    return scope.after_keys(state, keys, context_mean(keys.double()) if opening is None else opening)


def showing(scope: LeverageScope, state: LeverageState) -> LeverageGate:
    gate = scope.gate(3)
    assert isinstance(gate, LeverageGate)
    scope.show(3, gate, state)
    return gate


def opens(gate: LeverageGate | FollowingGate, keys: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(...) bool for keys (..., m)."""
    keys = torch.as_tensor(keys).to(dtype)
    found = gate(keys, never)
    assert found is not None
    assert found.dtype == torch.bool
    assert found.shape == (*keys.shape[:-1], 1)
    return found.squeeze(-1)


def never() -> torch.Tensor:
    raise AssertionError("the rule looks at keys alone")


def by_regression(keys: np.ndarray, edited: np.ndarray, c0: np.ndarray, ridge: float) -> np.ndarray:
    """w^T Q b / w^T w with b from ridge regression of w on Q, solved as least squares; w_i = k_i / sqrt(C0_ii)."""
    root = (np.diag(c0) + SILENT * np.trace(c0) / len(c0)) ** -0.5
    q = np.array([root * k / np.linalg.norm(root * k) for k in edited]).reshape(-1, len(c0)).T  # (m, r)
    padded = np.vstack([q, np.sqrt(ridge) * np.eye(q.shape[1])])
    found = []
    for key in keys:
        w = root * key
        b = np.linalg.lstsq(padded, np.concatenate([w, np.zeros(q.shape[1])]), rcond=None)[0]
        found.append(w @ q @ b / (w @ w))
    return np.array(found)


# --- the score -------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 10))
def test_the_two_plain_accounts_of_the_score_agree(seed: int, r: int) -> None:
    text = of_text(seed, 200)
    c0 = second_moment(text)
    one, other = (account(text[:9], text[50 : 50 + r], c0, 0.1) for account in (by_regression, leverages))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@given(SEEDS, st.integers(1, 2 * M), RIDGES)
def test_the_score_is_the_share_that_a_ridge_regression_on_the_edited_keys_explains(
    seed: int, r: int, ridge: float
) -> None:
    text = of_text(seed, 300)
    c0, edited, keys = second_moment(text), text[:r], text[r : r + 20]
    q = nn.functional.normalize(scaled(edited, text), dim=-1).T
    found = leverage(scaled(keys, text), explaining(q, ridge))
    np.testing.assert_allclose(found.numpy(), by_regression(keys, edited, c0, ridge), rtol=1e-7, atol=1e-9)
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_scaling_gives_every_neuron_a_mean_square_of_one() -> None:
    text = of_text(0, spread=1.0)
    np.testing.assert_allclose(moments_of(scaled(text, text).numpy()), 1, rtol=1e-3)


def test_neurons_that_never_fired_leave_scaling_finite_and_the_score_as_without_them() -> None:
    text = of_text(0, 300)
    silent = np.hstack([text, np.zeros((300, 3))])
    scale = scaling(torch.tensor(moments_of(silent)).float())
    assert scale.dtype == torch.float64
    assert scale.isfinite().all()
    state = after(scope_of(silent), silent[:2, None])
    found = leverage(scaled(silent[5:30], silent), explaining(state.edited, 0.1))
    np.testing.assert_allclose(found.numpy(), leverages(text[5:30], text[:2], second_moment(text), 0.1), rtol=1e-3)


@given(SEEDS, RIDGES, st.sampled_from([1e-4, -1.0, 1e4]))
def test_one_edited_key_alone_scores_by_the_ridge_whatever_its_length(seed: int, ridge: float, scale: float) -> None:
    text = of_text(seed)
    state = after(scope_of(text, ridge=ridge), text[:1, None])
    found = leverage(scale * scaled(text[:1], text), explaining(state.edited, ridge))
    assert float(found) == pytest.approx(1 / (1 + ridge), rel=1e-6)


def test_unrelated_keys_score_as_many_parts_of_the_key_as_were_edited() -> None:
    m, r = 64, 16
    random = np.random.default_rng(1)
    text = random.normal(size=(20_000, m)) * np.logspace(1, -1, m)  # unrelated neurons, of any size
    state = after(scope_of(text, ridge=1e-6), text[:r, None])
    found = leverage(scaled(text[r:3000], text), explaining(state.edited, 1e-6))
    assert float(found.mean()) == pytest.approx(r / m, rel=0.15)
    milder = leverage(scaled(text[r:3000], text), explaining(state.edited, 0.1))
    assert float(milder.mean()) == pytest.approx(r / m / 1.1, rel=0.2)


# --- the decision ----------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 2 * M), RIDGES, st.integers(1, 3))
@settings(max_examples=50)
def test_a_token_opens_exactly_when_its_score_reaches_the_threshold(
    seed: int, u: int, ridge: float, contexts: int
) -> None:
    text = of_text(seed, 500)
    facts = facts_of(text, seed, u, contexts)
    scope = scope_of(text, ridge=ridge)
    # Midway between two scores, so that some of each are there and none is a tie (the gate keeps 16 bits).
    keys = np.concatenate([text[:40], facts.reshape(-1, M)[:20]])
    means = context_mean(torch.tensor(facts)).numpy()
    scores = by_regression(keys, means, second_moment(text), ridge)
    middle = np.sort(scores)
    at = int(np.argmax(np.diff(middle)[5:-5])) + 5
    gate = showing(scope, replace(after(scope, facts), threshold=float(middle[at : at + 2].mean())))
    assert opens(gate, keys).tolist() == (scores >= middle[at + 1] - 1e-12).tolist()


# Not with the smallest ridge: near a score of one, 16 bits move the log odds.
@given(
    SEEDS, st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.002, 0.01, 0.1, 0.5]), st.just(0.1) | st.just(1.0)
)
@settings(max_examples=50)
def test_the_threshold_lies_midway_and_never_below_what_the_budget_allows(
    seed: int, u: int, contexts: int, budget: float, ridge: float
) -> None:
    text = of_text(seed, 500)
    facts = facts_of(text, seed, u, contexts, noise=0.7)
    found = after(scope_of(text, budget, ridge), facts).threshold
    means = context_mean(torch.tensor(facts)).numpy()
    of_facts, of_rest = (leverages(keys, means, second_moment(text), ridge) for keys in (facts.reshape(-1, M), text))
    first_too_many = np.sort(of_rest)[::-1][int(budget * len(text))]
    low, floor = (np.clip(q, 1e-6, 1 - 1e-6) for q in (np.quantile(of_facts, 0.02), first_too_many))
    odds = np.sqrt(low / (1 - low) * floor / (1 - floor))
    assert found == pytest.approx(max(odds / (1 + odds), first_too_many * 1.001, LEAST / (1 + ridge)), rel=5e-3)
    assert found > floor * (1 - 1e-3)


@given(SEEDS, st.sampled_from([0.002, 0.01, 0.1]), st.integers(1, 40), st.floats(0, 3))
@settings(max_examples=50)
def test_no_more_of_the_text_is_answered_than_the_budget(seed: int, budget: float, u: int, noise: float) -> None:
    text = of_text(seed, 1000)
    scope = scope_of(text, budget)
    state = scope.initial()
    for number in range(3):
        state = learned(scope, state, torch.tensor(facts_of(text, seed + number, u, 3, noise)))
        assert float(opens(showing(scope, state), text).sum()) <= budget * len(text) + 1  # one for the rounding


@pytest.mark.parametrize("seed", range(10))
def test_an_edit_of_what_the_text_repeats_word_by_word_stays_within_the_budget(seed: int) -> None:
    """Keys of equal tokens at the start of a text are equal: all of them lie exactly at the quantile, or none."""
    text = of_text(seed, n=4000)
    text[::100] = text[0]  # a hundredth of the text
    scope = scope_of(text, budget=0.002)
    facts = facts_of(text[1:90], seed, 1, 6, noise=1.0)
    facts[0, 0] = text[0]
    assert float(opens(showing(scope, after(scope, facts)), text).sum()) <= 0.002 * len(text) + 1


def test_edited_subjects_are_answered_in_every_context_where_they_stand_apart() -> None:
    m = 96
    text = of_text(3, n=20_000, m=m)
    scope = scope_of(text[:4096], budget=0.002)
    state = scope.initial()
    batches = [facts_of(text[15_000:], i, 8, 6, noise=0.15) for i in range(3)]
    for batch in batches:
        state = learned(scope, state, torch.tensor(batch))
    gate = showing(scope, state)
    for batch in batches:
        assert opens(gate, batch).float().mean() >= 1 - QUANTILE
    assert opens(gate, text[5000:15_000]).float().mean() < 0.01


@pytest.mark.parametrize("odd", ["like no other in each context", "near a common direction"])
def test_one_odd_edit_among_many_does_not_open_the_scope_for_everything(odd: str) -> None:
    m = 96
    text = of_text(5, n=20_000, m=m)
    random = np.random.default_rng(6)
    facts = facts_of(text[15_000:], 7, 20, 5, noise=0.1)
    if odd == "near a common direction":  # the mean of the text, where much of every key lies
        strange = text.mean(0) + 0.3 * text[random.integers(len(text), size=(1, 5))]
    else:
        strange = text[random.integers(len(text), size=(1, 5))]
    scope = scope_of(text[:4096], budget=0.002)
    for batches in ([np.concatenate([facts, strange])], [facts, strange], [strange, facts]):
        gate = showing(scope, after(scope, *batches))
        assert opens(gate, text[5000:15_000]).float().mean() < 0.01
        assert opens(gate, facts).float().mean() > 0.97


def test_without_edits_nothing_opens() -> None:
    text = of_text(0)
    scope = scope_of(text)
    gate = scope.gate(3)
    assert isinstance(gate, LeverageGate)
    for _ in range(2):  # as it is made, and as the session shows it
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert not opens(gate, np.concatenate([text[:50], np.zeros((1, M))]), dtype).any()
        scope.show(3, gate, scope.initial())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_key_is_outside_and_a_broken_one_stays_alone(dtype: torch.dtype) -> None:
    text = of_text(0)
    scope = scope_of(text)
    gate = showing(scope, replace(after(scope, text[:3, None]), threshold=0.0))
    keys = torch.tensor(text[:4]).clone()
    keys[1], keys[2, 5] = 0.0, torch.nan
    assert opens(gate, keys, dtype).tolist() == [True, False, False, True]


# --- what a decision does not depend on ------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.integers(1, 7), min_size=1, max_size=5), st.sampled_from(["left", "right"]), st.randoms())
@settings(max_examples=50)
def test_a_token_is_decided_by_its_own_key_alone(seed: int, lengths: list[int], side: str, random: Any) -> None:
    text = of_text(0, 500)
    scope = scope_of(text, budget=0.3)
    gate = showing(scope, after(scope, text[:4, None]))
    drawn = np.random.default_rng(seed)
    rows = [text[drawn.integers(60, size=n)] for n in lengths]
    alone = [[bool(opens(gate, key)) for key in row] for row in rows]
    width = max(lengths) + 2
    batch = drawn.normal(size=(len(rows), width, M)) * 1e3  # junk at the padding
    order = list(range(len(rows)))
    random.shuffle(order)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for place, b in enumerate(order):
        batch[place, spans[b]] = rows[b]
    found = opens(gate, batch)
    flat = opens(gate, batch.reshape(-1, M)).view(found.shape)  # as OPT gives its tokens
    assert torch.equal(found, flat)
    for place, b in enumerate(order):
        assert found[place, spans[b]].tolist() == alone[b]
        for n in range(1, lengths[b]):  # prefixes: what comes later
            assert opens(gate, rows[b][None, :n])[0].tolist() == alone[b][:n]


@given(SEEDS, st.sampled_from([1e-3, 0.5, 40.0]))
def test_only_the_direction_of_a_key_counts(seed: int, scale: float) -> None:
    text = of_text(seed, 300)
    scope = scope_of(text, budget=0.3)
    gate = showing(scope, after(scope, text[:4, None]))
    assert torch.equal(opens(gate, text), opens(gate, scale * text))
    longer = showing(scope, after(scope, scale * text[:4, None]))
    assert torch.equal(opens(gate, text), opens(longer, text))


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])


@DTYPES
@pytest.mark.parametrize("moved", [False, True], ids=["gate float32", "gate of the model's dtype"])
def test_keys_of_any_precision_are_decided_as_the_same_keys_in_float32(dtype: torch.dtype, moved: bool) -> None:
    text = torch.tensor(of_text(2, n=3000, m=64, spread=3.0)).to(dtype)
    c0 = second_moment(text.double().numpy())
    scope = LeverageScope([3, 4], torch.tensor(c0).diagonal(), text.float(), 0.05, 0.1)
    facts = torch.tensor(facts_of(text.double().numpy(), 3, 12, 5, noise=0.3)).to(dtype)
    state = learned(scope, scope.initial(), facts)
    gate = showing(scope, state)
    keys = torch.cat([text, facts.reshape(-1, 64)])
    exact = leverages(keys.double().numpy(), context_mean(facts.double()).numpy(), c0, 0.1)
    away = np.abs(exact - state.threshold) > 1e-3  # for the 16 bits that the edited keys are kept in
    assert 20 < (exact[away] > state.threshold).sum() < 300
    expected = opens(gate, keys.float())
    assert expected.numpy()[away].tolist() == (exact > state.threshold)[away].tolist()
    if moved:
        gate = gate.to(dtype)
    for power in (1.0, 2.0**-5, 2.0**4):  # lengths of the keys: nothing over- or underflows
        assert torch.equal(opens(gate, power * keys, dtype), opens(gate, (power * keys).float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(opens(gate, keys, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_text_at_the_quantile_of_the_budget_opens_in_any_precision(dtype: torch.dtype) -> None:
    """What is asked lies a thousandth above the first key that would be one too many: 16 bits would not tell them."""
    for seed in range(12):
        text = torch.tensor(of_text(seed, n=500)).to(dtype)
        scope = LeverageScope([3, 4], text.double().square().mean(0), text.float(), 0.3, 0.1)
        state = learned(scope, scope.initial(), text[:6, None])
        gate = showing(scope, replace(state, threshold=1.0))
        shares = gate.margin(text.float(), never).sort(descending=True).values
        at_the_floor = replace(state, threshold=float(shares[150]) * (1 + MARGIN))
        gate = showing(scope, at_the_floor).to(dtype)
        assert int(opens(gate, text, dtype).sum()) == int((shares > at_the_floor.threshold).sum()) <= 150


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_more_edits_than_twice_the_keys_entries_are_kept_in_a_square_and_score_the_same() -> None:
    text = of_text(1)
    scope, keys = scope_of(text), scaled(text[500:600], text)
    state, columns = scope.initial(), 0
    for first in range(0, 91, 13):
        state = learned(scope, state, torch.tensor(text[first : first + 13, None]))
        r = first + 13
        columns = columns + 13 if columns + 13 <= 2 * M else M
        assert state.edited.shape == (M, columns)
        found = leverage(keys, explaining(state.edited, 0.1))
        expected = leverages(text[500:600], text[:r], second_moment(text), 0.1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
        assert len(showing(scope, state).explain) == min(r, M)


def test_after_many_edits_a_batch_adds_its_own_keys_to_the_journal_and_the_rest_once_in_m_edits() -> None:
    text = of_text(1)
    scope = scope_of(text)
    state, told_rows = after(scope, text[: M + 3, None]), []
    for first in range(M + 3, 4 * M, 4):
        following = learned(scope, state, torch.tensor(text[first : first + 4, None]))
        told = changes(scope.pack(state), scope.pack(following))
        assert torch.equal(changed(scope.pack(state), told)["edited"], scope.pack(following)["edited"])
        told_rows.append(len(told["edited"]))
        state = following
    assert set(told_rows) == {4, M}
    assert 2 <= told_rows.count(M) <= 3


@given(SEEDS, st.integers(1, 3 * M), st.randoms())
@settings(max_examples=30)
def test_how_edits_come_in_batches_and_in_which_order_changes_nothing(seed: int, u: int, random: Any) -> None:
    """While all their keys fit the sample; the sample itself is drawn anew."""
    text = of_text(seed, 500)
    facts, opening = (
        torch.tensor(facts_of(text, seed, u, 3)),
        torch.tensor(facts_of(text, seed, u, 1, noise=1.0))[:, 0],
    )
    scope = scope_of(text)
    cut, order = random.randint(0, u), list(range(u))
    random.shuffle(order)
    at_once, parts = learned(scope, scope.initial(), facts, opening), scope.initial()
    for part in (order[:cut], order[cut:]):
        parts = learned(scope, parts, facts[part], opening[part]) if part else parts
    assert parts.threshold == pytest.approx(at_once.threshold, rel=2e-3)
    assert parts.seen == at_once.seen
    assert 3 * u <= parts.seen <= 4 * u
    one, other = (explaining(state.edited, 0.1) for state in (at_once, parts))
    torch.testing.assert_close(one.T @ one, other.T @ other, rtol=1e-6, atol=1e-6)


# --- subjects that begin a text --------------------------------------------------------------------------------------


def apart(seed: int, m: int = 256, u: int = 8) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Text, facts (u, contexts, m), and keys (u, m) that their subjects have at the beginning of a text."""
    text = np.random.default_rng(seed).normal(size=(8000, m))
    facts = torch.tensor(facts_of(text[5000:], seed, u, 6, noise=0.15))
    return text, facts, torch.tensor(0.5 * context_mean(facts).numpy() + text[4200 : 4200 + u])


@pytest.mark.parametrize("seed", range(4))
def test_a_question_that_begins_with_the_subject_is_answered_though_its_key_is_another_there(seed: int) -> None:
    text, facts, opening = apart(seed)
    scope = scope_of(text[:4096], budget=0.002)
    without, state = learned(scope, scope.initial(), facts), learned(scope, scope.initial(), facts, opening)
    assert not opens(showing(scope, without), opening).any()
    assert opens(showing(scope, state), opening).all()
    assert opens(showing(scope, state), facts).float().mean() >= 1 - QUANTILE
    assert opens(showing(scope, state), text[:4096]).float().mean() <= 0.002


def test_an_opening_key_that_the_mean_one_stands_for_takes_no_room() -> None:
    text, facts, opening = apart(0)
    scope, mean = scope_of(text[:4096]), context_mean(facts)
    u, contexts, _ = facts.shape
    for other, more in ((0.0, 0), (0.2, 0), (1.0, u)):
        state = learned(scope, scope.initial(), facts, (1 - other) * mean + other * opening)
        assert state.edited.shape[1] == u + more
        assert len(state.witnesses) == state.seen == u * contexts + more


def test_a_subject_of_one_token_does_not_open_the_scope_for_every_first_token() -> None:
    """Whatever a text's first token is, its key is the same there: as frequent as texts are."""
    text, facts, _ = apart(1)
    rare, frequent = text[:4096].copy(), text[:4096].copy()
    first = text[7000]
    rare[:8] = frequent[:40] = first  # 0.2 % and 1 % of the text
    for sample, taken in ((rare, True), (frequent, False)):
        scope = scope_of(sample, budget=0.005)
        state = learned(scope, scope.initial(), facts, torch.tensor(first).expand(len(facts), -1))
        assert (state.edited.shape[1] > len(facts)) is taken
        assert bool(opens(showing(scope, state), first)) is taken
        assert opens(showing(scope, state), facts).float().mean() >= 1 - QUANTILE


def sample_of(seed: int, sizes: Sequence[int]) -> list[int]:
    """Numbers of the keys that were sampled, of batches of so many one-context facts; key number i is e_(i mod m)."""
    scope = LeverageScope([0, 1], torch.ones(40), torch.eye(40), 0.1, 0.1, seed)
    state, done = scope.initial(), 0
    for size in sizes:
        state = learned(scope, state, torch.eye(40)[done : done + size, None])
        done += size
    return state.witnesses.argmax(-1).tolist()


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [5, 30, 5], [3, 4] * 5 + [5]], ids=str)
def test_every_key_is_as_likely_to_be_in_the_sample_whenever_it_came(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coachhook_plugin.scope.leverage, "WITNESSES", 10)
    draws = 300 if len(sizes) < 20 else 120
    counts: Counter[int] = Counter()
    for seed in range(draws):
        found = sample_of(seed, sizes)
        assert len(set(found)) == len(found) == 10
        counts.update(found)
    expected = draws * 10 / 40
    # Chi-square with 39 degrees of freedom, less for drawing without replacement: 73 is exceeded once in a thousand.
    assert sum((counts[i] - expected) ** 2 / expected for i in range(40)) < 73
    assert sample_of(7, sizes) == sample_of(7, sizes)
    assert sample_of(7, sizes) != sample_of(8, sizes)


def test_the_sample_holds_every_key_until_it_is_full_and_then_stays() -> None:
    text = of_text(0)
    scope = scope_of(text)
    state, seen = scope.initial(), 0
    comparable = scaled(text, text).float()
    for u in (10, 90, 70, 200, 1):
        keys = text[seen : seen + 3 * u].reshape(u, 3, M)
        earlier = told(state), state
        state = learned(scope, state, torch.tensor(keys))
        assert told(earlier[1]) == earlier[0]  # an earlier state stays as it was
        seen += 3 * u
        assert len(state.witnesses) == len(state.lots) == min(seen, WITNESSES)
        assert state.seen == seen
        if seen <= WITNESSES:
            torch.testing.assert_close(state.witnesses, comparable[:seen])
    rows = {bits(row) for row in comparable}
    assert all(bits(row) in rows for row in state.witnesses)  # keys that came, and nothing else


# --- travelling ------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """The gates of a model with two edited layers."""

    def __init__(self, scope: LeverageScope) -> None:
        super().__init__()
        self.first, self.second = scope.gate(3), scope.gate(7)


@pytest.mark.parametrize("earlier", [0, 2, 9, 30])
def test_a_saved_gate_decides_alike_in_a_model_with_other_edits(earlier: int) -> None:
    text = of_text(0)
    scope, other = scope_of(text), scope_of(of_text(1))
    gate, into = showing(scope, after(scope, text[:9, None])), other.gate(3)
    if earlier:
        other.show(3, into, after(other, of_text(1)[:earlier, None]))
    shared = into.explain
    kept = bits(shared)
    into.load_state_dict(gate.state_dict())
    assert torch.equal(opens(into, text), opens(gate, text))
    assert opens(into, text).any()
    assert bits(shared) == kept
    with pytest.raises(RuntimeError, match="threshold"):
        into.load_state_dict({k: v for k, v in gate.state_dict().items() if k != "threshold"})


def test_copies_of_a_model_decide_for_themselves() -> None:
    text = of_text(0)
    scope = scope_of(text, budget=0.3)
    pair = Pair(scope)
    scope.show(3, pair.first, after(scope, text[:4, None]))
    first = opens(pair.first, text[:30])
    twin = copy.deepcopy(pair)
    assert opens(twin.second, text[:30]).equal(first)  # the copy was made after a decision
    second = opens(twin.first, text[30:60])
    assert not first.equal(second)
    assert opens(twin.second, text[30:60]).equal(second)
    assert opens(pair.second, text[:30]).equal(first)


def test_later_layers_stay_closed_until_the_first_one_decided_for_as_many_tokens() -> None:
    text = of_text(0)
    scope = scope_of(text)
    pair = Pair(scope)
    assert isinstance(pair.second, FollowingGate)
    assert pair.second(torch.tensor(text[:30]), never) is None
    scope.show(3, pair.first, after(scope, text[:4, None]))
    scope.show(7, pair.second, after(scope, text[:4, None]))  # which has nothing to learn
    found = opens(pair.first, text[:30].reshape(2, 15, M))
    assert opens(pair.second, np.zeros((2, 15, M + 5))).equal(found)  # whatever its own keys are
    assert opens(pair.first, text[:30].reshape(2, 15, M)).equal(found)
    assert opens(pair.second, np.zeros((30, M))).equal(found.flatten())  # as OPT gives its tokens
    opens(pair.first, text[:30].reshape(2, 15, M))
    assert pair.second(torch.zeros(2, 14, M), never) is None
    assert FollowingGate(Decision(), last=True)(torch.zeros(2, 15, M), never) is None


def test_the_state_shown_is_the_one_decided_by() -> None:
    text = of_text(0)
    scope = scope_of(text)
    states = [scope.initial(), after(scope, text[:4, None]), after(scope, text[:4, None], text[10:30, None])]
    gate = scope.gate(3)
    assert isinstance(gate, LeverageGate)
    seen = []
    for state in states:
        scope.show(3, gate, state)
        seen.append([bits(tensor) for tensor in gate.state_dict().values()])
    assert len({tuple(one) for one in seen}) == 3
    for number in (1, 2, 0, 1):
        scope.show(3, gate, states[number])
        assert [bits(tensor) for tensor in gate.state_dict().values()] == seen[number]
