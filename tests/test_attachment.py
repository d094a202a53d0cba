"""What the usual operations on a model make of the edits that hang on it (the table of the README)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from plain import bits, hook_layers, logits_of
from transformers import AutoModelForCausalLM

from coachhook_plugin import EditSession, load_edits

Start = Callable[..., EditSession]
Facts = list[dict[str, str]]

CASES = pytest.mark.parametrize("case", ["llama", "gpt2"])
PROMPTS = [fact["prompt"] for fact in zoo.FACTS]


def answers(model: Any, tokenizer: Any) -> list[bytes]:
    return [bits(logits) for logits in logits_of(model, tokenizer, PROMPTS)]


@pytest.fixture
def edited(start: Start, facts: Facts) -> Callable[[str], EditSession]:
    def made(case: str) -> EditSession:
        session = start(case)
        session.edit(facts)
        return session

    return made


@CASES
def test_a_model_saved_whole_comes_back_with_its_edits_and_its_session(
    edited: Any, case: str, tmp_path: Path, facts: Facts
) -> None:
    session = edited(case)
    torch.save(session.model, tmp_path / "model.pt")
    for model in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(session.model)):
        assert answers(model, session.tokenizer) == answers(session.model, session.tokenizer)
        twin = EditSession.of(model)
        assert twin is not None
        assert twin.model is model
        twin.rollback(to=0)
        assert hook_layers(model) == []
    assert len(hook_layers(session.model)) == 2


@CASES
def test_a_pretrained_folder_holds_the_base_model_and_the_edits_go_on_top(
    edited: Any, tiny: Any, case: str, tmp_path: Path
) -> None:
    session = edited(case)
    expected = answers(session.model, session.tokenizer)
    session.model.save_pretrained(tmp_path / "model")
    session.save(tmp_path / "edits")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert answers(model, session.tokenizer) == answers(tiny(case), session.tokenizer)
    load_edits(model, tmp_path / "edits")
    assert answers(model, session.tokenizer) == expected


@CASES
def test_edits_that_came_by_load_state_dict_are_neither_written_over_nor_forgotten_from(
    edited: Any, start: Start, case: str, facts: Facts, tmp_path: Path
) -> None:
    session, other = edited(case), start(case)
    other.edit(facts[:1])
    others = answers(other.model, other.tokenizer)
    kept = [*session.ledger]
    session.model.load_state_dict(session.model.state_dict())  # its own edits are no others
    session.check(facts)
    session.model.load_state_dict(other.model.state_dict())
    for act in (
        lambda: session.edit(facts[:1]),
        lambda: session.check(facts[:1]),
        lambda: session.forget(["1-1"]),
        lambda: session.save(tmp_path / "edits"),
        lambda: session.keep_in(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"other edits than this session's.*session\.restore\(session\.state\)"):
            act()
        assert answers(session.model, session.tokenizer) == others
        assert [*session.ledger] == kept
    assert not (tmp_path / "run").exists()
    session.restore(session.state)
    session.edit(facts[:1])
    assert answers(session.model, session.tokenizer) != others
    session.model.to(torch.bfloat16)
    session.forget(["2-1"])  # moved, but the same


@CASES
def test_a_state_dict_brings_the_edits_to_a_model_that_has_as_many(
    edited: Any, start: Start, case: str, facts: Facts
) -> None:
    session, other = edited(case), start(case)
    other.edit(facts[::-1])
    told = session.model.state_dict()
    other.model.load_state_dict(told)
    assert answers(other.model, other.tokenizer) == answers(session.model, session.tokenizer)
    base = {name: tensor for name, tensor in told.items() if ".coachhook." not in name}
    with pytest.raises(RuntimeError, match="coachhook"):
        other.model.load_state_dict(base)
    other.model.load_state_dict(base, strict=False)
    assert answers(other.model, other.tokenizer) == answers(session.model, session.tokenizer)


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_of_a_halved_model_are_saved_for_the_halved_model(
    edited: Any, tiny: Any, case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    session = edited(case)
    session.model.half() if dtype == torch.float16 else session.model.to(dtype)
    session.save(tmp_path)
    with pytest.raises(ValueError, match=f"in {str(dtype).removeprefix('torch.')}"):
        load_edits(tiny(case), tmp_path)
    model = tiny(case, dtype=dtype)
    load_edits(model, tmp_path)
    assert answers(model, session.tokenizer) == answers(session.model, session.tokenizer)


def test_disabled_and_detached_are_the_base_model_for_loaded_edits_too(edited: Any, tiny: Any, tmp_path: Path) -> None:
    session = edited("llama")
    session.save(tmp_path, memory=False)
    model = tiny()
    base = answers(model, session.tokenizer)
    loaded = load_edits(model, tmp_path)
    changed = answers(model, session.tokenizer)
    assert changed != base
    with loaded.disabled():
        assert answers(model, session.tokenizer) == base
    assert answers(model, session.tokenizer) == changed
    assert repr(loaded).startswith("EditSession(")
    assert "edits=4, step=1" in repr(loaded)
    loaded.detach()
    assert answers(model, session.tokenizer) == base
    assert EditSession.of(model) is None
