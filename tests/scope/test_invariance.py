"""What the scopes' decisions on a model do not depend on: padding, batch mates, suffixes, and how a text is cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain import answered

from coachhook_plugin import CoachHooKHparams, EditSession

Edited = Callable[..., EditSession]

CASES = pytest.mark.parametrize("case", ["llama", "gpt2", "mistral-window-4"])
PROJECTION = {"gpt2": "transformer.h.{}.mlp.c_proj"}
CLOSE = 1e-4  # relative, what rounds differently in another layout
TIE = 1e-3  # margins as near to 1 as this may fall either way

SUBJECTS = [fact["subject"] for fact in zoo.FACTS]
WORDS = ["The", "city", "of", "people say that", "born in", "best dish", "Rome,", "Tower", "Ada", "old man."]
TEXTS = st.lists(
    st.one_of(st.sampled_from(SUBJECTS), st.sampled_from(WORDS), st.text("aé字 .", min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
).map(" ".join)
SIDES = st.sampled_from(["left", "right"])


@pytest.fixture(scope="module")
def edited(tokenizer: Any, settings: Callable[..., CoachHooKHparams]) -> Edited:
    """`edited("gpt2")`: a session with large changes, one for all tests; none of them changes it."""

    @functools.cache
    def made(case: str, scope: str = "leverage") -> EditSession:
        room = {"v_num_grad_steps": 25, "clamp_norm_factor": 8.0, "v_weight_decay": 0.0, "mom2_update_weight": 0.1}
        room |= {"layers": [0, 1], "scope_budget": 0.1, "alpha": 1.5}  # wide open
        model = zoo.model(case, len(tokenizer))
        session = EditSession(model, tokenizer, settings(**room, scope=scope), progress=False)
        session.edit(zoo.FACTS[:2])
        session.edit(zoo.FACTS[2:])
        return session

    return made


def ids_of(session: EditSession, text: str) -> torch.Tensor:
    return torch.tensor(session.tokenizer(text)["input_ids"])


@torch.no_grad()
def run(session: EditSession, case: str, cuts: tuple[int, ...] = (), **batch: torch.Tensor) -> tuple[Any, Any]:
    """Logits (b, T, vocabulary) and the answered tokens (b, T) of a batch, in one pass or cut into cached ones."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    bounds = [0, *cuts, ids.shape[1]]
    past = None
    logits = []
    projection = PROJECTION.get(case, "model.layers.{}.mlp.down_proj").format(session.hparams.layers[0])
    with answered(session.model.get_submodule(projection)) as passes:
        for start, stop in itertools.pairwise(bounds):
            made = session.model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=past,
                use_cache=bool(cuts),
            )
            past = made.past_key_values
            logits.append(made.logits)
    return torch.cat(logits, dim=1), torch.cat(passes, dim=1)


def alone(session: EditSession, case: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, open_ = run(session, case, input_ids=ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    return logits[0], open_[0]


def together(rows: list[torch.Tensor], side: str, extra: int, junk: int) -> tuple[dict[str, Any], list[slice]]:
    """A padded batch, token `junk` where there is padding, and where each row's tokens are."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), junk), torch.zeros(len(rows), width, dtype=torch.long)
    spans = [slice(width - len(row), width) if side == "left" else slice(0, len(row)) for row in rows]
    for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[b, span], mask[b, span] = row, 1
    return {"input_ids": ids, "attention_mask": mask}, spans


def clear(margins: torch.Tensor) -> bool:
    return bool(((margins - 1).abs() > TIE).all())


@CASES
@given(text=TEXTS, suffix=TEXTS)
@settings(max_examples=30)
def test_margins_of_a_token_stay_whatever_follows(edited: Edited, case: str, text: str, suffix: str) -> None:
    session = edited(case)
    ids = ids_of(session, text)
    before = session.margins(ids)
    after = session.margins(torch.cat([ids, ids_of(session, suffix)]))[: len(ids)]
    torch.testing.assert_close(after, before, rtol=CLOSE, atol=CLOSE)
    if clear(before):
        assert alone(session, case, ids)[1].tolist() == (before >= 1).tolist()


@pytest.mark.parametrize("scope", ["leverage", "zscore"])
@CASES
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), side=SIDES, extra=st.integers(0, 5), junk=st.integers(0, 300))
@settings(max_examples=30)
def test_padding_and_batch_mates_change_neither_decisions_nor_answers(
    edited: Edited, case: str, scope: str, texts: list[str], side: str, extra: int, junk: int
) -> None:
    session = edited(case, scope)
    rows = [ids_of(session, text) for text in texts]
    margins = [session.margins(row) for row in rows]
    assume(all(map(clear, margins)))
    batch, spans = together(rows, side, extra, junk)
    logits, open_ = run(session, case, **batch)
    for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
        expected, opened = alone(session, case, row)
        assert open_[b, span].tolist() == opened.tolist()
        assert zoo.relative(logits[b, span], expected) < CLOSE
        if scope == "leverage":
            assert opened.tolist() == (margins[b] >= 1).tolist()
    if scope == "zscore":
        assert not open_[~batch["attention_mask"].bool()].any()


@CASES
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), extra=st.integers(0, 3), data=st.data())
@settings(max_examples=30)
def test_a_text_read_in_pieces_is_answered_as_in_one_go(
    edited: Edited, case: str, texts: list[str], extra: int, data: st.DataObject
) -> None:
    session = edited(case)
    rows = [ids_of(session, text) for text in texts]
    assume(all(clear(session.margins(row)) for row in rows))
    batch, spans = together(rows, "left", extra, junk=0)
    width = batch["input_ids"].shape[1]
    assume(width > 1)
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, width - 1), min_size=1, max_size=5))))
    logits, open_ = run(session, case, cuts, **batch)
    for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
        expected, opened = alone(session, case, row)
        assert open_[b, span].tolist() == opened.tolist()
        assert zoo.relative(logits[b, span], expected) < CLOSE


@CASES
def test_the_texts_drawn_here_have_tokens_on_both_sides(edited: Edited, case: str) -> None:
    """Without which the tests above would say little."""
    for scope in ("leverage", "zscore"):
        session = edited(case, scope)
        text = " of ".join([*SUBJECTS, *WORDS])
        opened = alone(session, case, ids_of(session, text))[1]
        assert 1 <= opened.sum() <= len(opened) / 2
        logits = alone(session, case, ids_of(session, text))[0]
        with session.disabled():
            assert zoo.relative(logits, alone(session, case, ids_of(session, text))[0]) > 0.05


@CASES
def test_the_paper_rule_does_look_at_what_follows(edited: Edited, case: str) -> None:
    """The stated limit of `scope: zscore`, and why `leverage` is there."""
    session = edited(case, "zscore")
    ids = ids_of(session, f"{zoo.FACTS[0]['prompt']} English and {zoo.FACTS[1]['prompt']}")
    whole = alone(session, case, ids)[1]
    assert any(alone(session, case, ids[:n])[1].tolist() != whole[:n].tolist() for n in range(3, len(ids)))


@CASES
def test_the_paper_rule_answers_nothing_in_passes_too_short_to_score(edited: Edited, case: str) -> None:
    """Its policy for cached decoding: a pass is judged by itself, whatever came before it."""
    session = edited(case, "zscore")
    ids = ids_of(session, f"{zoo.FACTS[0]['prompt']} English and {zoo.FACTS[1]['prompt']}")
    batch = {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    assert run(session, case, **batch)[1].any()
    logits, open_ = run(session, case, tuple(range(2, len(ids), 2)), **batch)
    assert not open_.any()
    with session.disabled():
        assert zoo.relative(logits, run(session, case, **batch)[0]) < CLOSE
