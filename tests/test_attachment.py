"""What the usual operations on a model make of the edits that hang on it (the table of the README), and threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from plain import bits, hook_layers, logits_of
from transformers import AutoModelForCausalLM

import coachhook_plugin.batch_writing
import coachhook_plugin.persistence
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


# --- threads that share a model --------------------------------------------------------------------------------------

SCOPES = pytest.mark.parametrize("scope", ["leverage", "zscore"])


def elsewhere(act: Callable[[], Any]) -> Any:
    """What `act` gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(timeout=60)


@CASES
@SCOPES
def test_a_thread_that_looks_at_the_base_model_leaves_the_others_their_answers(
    start: Start, tiny: Any, case: str, scope: str, facts: Facts
) -> None:
    session = start(case, scope=scope, alpha=1.0)
    session.edit(facts)
    told = answers(tiny(case), session.tokenizer), answers(session.model, session.tokenizer)
    base, expected = told
    assert base != expected

    def all_answers() -> tuple[list[bytes], list[bytes]]:
        with session.disabled():
            without = answers(session.model, session.tokenizer)
        return without, answers(session.model, session.tokenizer)

    with session.disabled():
        assert elsewhere(all_answers) == told
        assert answers(session.model, session.tokenizer) == base
    assert elsewhere(all_answers) == told
    assert answers(session.model, session.tokenizer) == expected


def test_compiled_code_looks_anew_whether_it_shall_answer(start: Start, facts: Facts) -> None:
    session = start("llama")
    session.edit(facts)
    compiled = torch.compile(session.model, backend="eager")
    ids = torch.tensor([session.tokenizer(PROMPTS[0])["input_ids"]])

    @torch.no_grad()
    def near(expected: torch.Tensor) -> bool:
        return zoo.relative(compiled(input_ids=ids).logits, expected) < 1e-4

    with torch.no_grad():
        edited = session.model(input_ids=ids).logits
        with session.disabled():
            base = session.model(input_ids=ids).logits
    assert zoo.relative(base, edited) > 0.05
    assert near(edited)
    for _ in range(2):
        with session.disabled():
            assert near(base)
        assert near(edited)
        assert elsewhere(lambda: near(edited))


def test_saving_leaves_everybodys_answers_alone(edited: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = edited("llama")
    expected = answers(session.model, session.tokenizer)
    found: list[list[bytes]] = []
    original = coachhook_plugin.persistence.weights_fingerprint

    def meanwhile(*args: Any) -> str:
        for ask in (elsewhere, lambda act: act()):
            found.append(ask(lambda: answers(session.model, session.tokenizer)))
        return original(*args)

    monkeypatch.setattr(coachhook_plugin.persistence, "weights_fingerprint", meanwhile)
    session.save(tmp_path)
    assert found == [expected, expected]


@CASES
def test_a_pass_in_training_is_silent_or_not_in_whatever_thread_a_block_is_run_once_more(
    edited: Any, tiny: Any, case: str
) -> None:
    session = edited(case)
    base, expected = answers(tiny(case), session.tokenizer), answers(session.model, session.tokenizer)
    session.model.train()
    for module in session.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for ask in (elsewhere, lambda act: act()):
        with session.disabled():
            assert ask(lambda: answers(session.model, session.tokenizer)) == base
        assert ask(lambda: answers(session.model, session.tokenizer)) == expected


@CASES
@SCOPES
def test_a_probe_and_the_passes_of_other_threads_do_not_meet(
    start: Start, case: str, scope: str, facts: Facts
) -> None:
    session = start(case, scope=scope, alpha=1.0)
    session.edit(facts)
    model, tokenizer = session.model, session.tokenizer
    ids = torch.tensor(tokenizer(PROMPTS[0])["input_ids"])
    given = tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)

    def generated() -> list[int]:
        made: torch.Tensor = model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return made[0].tolist()

    said, margins = generated(), session.margins(ids)
    heard: list[list[int]] = []

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            assert all(parameter.requires_grad for parameter in model.parameters()), "others may be training it"
            heard.append(elsewhere(generated))

    handle = session._parts.blocks[1].register_forward_hook(meanwhile)  # between the edited layers, or after the first
    assert torch.equal(session.margins(ids), margins)
    handle.remove()
    assert heard == [said]


@pytest.mark.parametrize("use_hooks", [True, False])
@pytest.mark.parametrize("leaves", ["during the edit", "after it"])
def test_who_looked_at_the_base_model_while_others_edited_does_not_silence_their_edits(
    start: Start, facts: Facts, use_hooks: bool, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = start(use_hooks=use_hooks), start(use_hooks=use_hooks)
    for one in (session, other):
        one.edit(facts[:2])
    other.edit(facts[2:])
    expected = answers(other.model, other.tokenizer)
    inside, leave = threading.Event(), threading.Event()

    def look() -> None:
        with session.disabled():
            inside.set()
            assert leave.wait(60)

    original = coachhook_plugin.batch_writing.subject_keys
    with ThreadPoolExecutor(1) as pool:

        def keys(*args: Any, **kwargs: Any) -> torch.Tensor:
            if leaves == "during the edit":
                leave.set()
                looking.result(timeout=60)
            return original(*args, **kwargs)

        monkeypatch.setattr(coachhook_plugin.batch_writing, "subject_keys", keys)
        looking = pool.submit(look)
        assert inside.wait(60)
        session.edit(facts[2:])
        if use_hooks:
            assert answers(session.model, session.tokenizer) == expected
        leave.set()
        looking.result(timeout=60)
    assert answers(session.model, session.tokenizer) == expected
    with session.disabled():
        assert answers(session.model, session.tokenizer) != expected


def test_weights_written_in_place_are_hidden_until_the_last_thread_has_looked(
    start: Start, tiny: Any, facts: Facts
) -> None:
    session = start(use_hooks=False)
    session.edit(facts)
    base, expected = answers(tiny(), session.tokenizer), answers(session.model, session.tokenizer)

    def look() -> list[bytes]:
        with session.disabled():
            return answers(session.model, session.tokenizer)

    with session.disabled():
        assert elsewhere(look) == base
        assert answers(session.model, session.tokenizer) == base
    assert answers(session.model, session.tokenizer) == expected
