"""Requests and settings that cannot be edited: said by index and field, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import bits, hook_layers, photograph, photograph_session
from torch import nn

from coachhook_plugin import EditSession, Request
from coachhook_plugin.tokens import parse_requests

GOOD = {"prompt": "Ada Lovelace was born in", "subject": "Ada Lovelace", "target_new": "Berlin"}
LONG = "Norway " + "people say that " * 60

# What is wrong: (the changed request, error, what its message must hold beside the request's index).
CASES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "no subject": ({"subject": None}, KeyError, ["subject", "missing"]),
    "no prompt": ({"prompt": None}, KeyError, ["prompt", "missing"]),
    "no target": ({"target_new": None}, KeyError, ["target_new", "missing"]),
    "empty subject": ({"subject": ""}, ValueError, ["subject", "empty"]),
    "blank subject": ({"subject": " \t"}, ValueError, ["subject", "empty"]),
    "empty prompt": ({"prompt": ""}, ValueError, ["prompt", "empty"]),
    "blank prompt": ({"prompt": " \n"}, ValueError, ["prompt", "empty"]),
    "empty target": ({"target_new": ""}, ValueError, ["target_new", "empty"]),
    "blank target": ({"target_new": "  "}, ValueError, ["target_new", "empty"]),
    "target is a number": ({"target_new": 1999}, ValueError, ["target_new", "string", "int"]),
    "subject is a list": ({"subject": ["Ada Lovelace"]}, ValueError, ["subject", "string", "list"]),
    "prompt is bytes": ({"prompt": b"Ada Lovelace is"}, ValueError, ["prompt", "string", "bytes"]),
    "subject elsewhere": ({"subject": "Norway"}, ValueError, ["subject", "'Norway'", "not in the prompt"]),
    "other case": ({"subject": "ada lovelace"}, ValueError, ["subject", "'Ada Lovelace'", "case"]),
    "subject twice": ({"prompt": "Ada Lovelace or Ada Lovelace is"}, ValueError, ["subject", "2 times", "once"]),
    "overlapping": ({"prompt": "The banana is", "subject": "ana"}, ValueError, ["subject", "2 times", "once"]),
    "braces": ({"prompt": "{} was born, says Ada Lovelace, in"}, ValueError, ["prompt", "braces"]),
    "one brace": ({"prompt": "Ada Lovelace } was born in"}, ValueError, ["prompt", "braces"]),
    "too long": ({"prompt": LONG, "subject": "Norway"}, ValueError, ["prompt", "tokens", "128"]),
    "not a mapping": ("Ada Lovelace was born in Berlin", ValueError, ["prompt", "str"]),
}


def changed(case: str) -> Any:
    given = CASES[case][0]
    return {**GOOD, **given} if isinstance(given, dict) else given


@pytest.mark.parametrize("edited", [False, True], ids=["unedited", "edited"])
def test_a_request_that_cannot_be_edited_is_named_and_changes_nothing(
    start: Callable[..., EditSession], facts: list[dict[str, str]], edited: bool
) -> None:
    session = start()
    if edited:
        session.edit(facts[:1])
    before, before_session = photograph(session.model), photograph_session(session)
    for case, (_, error, words) in CASES.items():
        with pytest.raises(error) as caught:
            session.edit([facts[1], facts[2], changed(case), facts[3]])
        message = str(caught.value)
        assert "request 2" in message, (case, message)
        assert all(word in message for word in words), (case, message)
        assert len(message) < 300 or case == "too long", (case, message)
        assert photograph(session.model) == before, case
        assert photograph_session(session) == before_session, case
    session.edit(facts)  # and the session goes on


def test_a_token_that_the_model_does_not_know_is_told_with_the_remedy(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any, facts: list[dict[str, str]]
) -> None:
    """As of another model's tokenizer; the context prefixes, which it could not give either, are not begun."""
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["Zaragoza"])
    session = EditSession(tiny(), larger, settings(context_prefixes=None), progress=False)
    with pytest.raises(ValueError, match=r"request 1, .*'Zaragoza'.* embeddings; give the model's own tokenizer"):
        session.edit([facts[0], {**GOOD, "target_new": "Zaragoza"}])
    assert len(session) == 0


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(KeyError, match=rf"request 1.*{field}"):
        parse_requests([GOOD, {name: value for name, value in GOOD.items() if name != field}])


@pytest.mark.parametrize("requests", [[], (), iter([])])
def test_no_requests_at_all_is_an_error(start: Callable[..., EditSession], requests: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        start().edit(requests)


def test_a_single_request_without_its_list_is_an_error(start: Callable[..., EditSession]) -> None:
    with pytest.raises(ValueError, match="give a list of facts"):
        start().edit(GOOD)  # type: ignore[arg-type]


def test_two_targets_for_one_prompt_are_refused_naming_both(start: Callable[..., EditSession]) -> None:
    session = start()
    before = photograph(session.model)
    other = {**GOOD, "target_new": "Rome"}
    with pytest.raises(ValueError, match="contradicts") as caught:
        session.edit([{**GOOD, "prompt": "Ada Lovelace stands in"}, GOOD, other])
    assert all(word in str(caught.value) for word in ("request 2", "request 1", "target_new", "'Rome'", "'Berlin'"))
    assert photograph(session.model) == before
    session.edit([GOOD])
    session.edit([other])  # one after the other is a change of mind
    assert [edit.status for edit in session.ledger] == ["superseded", "in force"]


def test_the_same_request_twice_is_fine_however_it_is_spaced(start: Callable[..., EditSession]) -> None:
    session = start()
    result = session.edit([GOOD, {**GOOD, "target_new": " Berlin "}, Request(**GOOD)])
    assert len(result.nll) == 3
    assert len(session) == 1
    assert result.nll[0] == pytest.approx(result.nll[1], rel=1e-4)


def test_a_space_at_the_end_of_a_prompt_makes_no_other_fact_of_it(start: Callable[..., EditSession]) -> None:
    session = start()
    spaced = {**GOOD, "prompt": f"{GOOD['prompt']} ", "target_new": "Rome"}
    with pytest.raises(ValueError, match="'Rome' contradicts 'Berlin' of request 0 for the same prompt"):
        session.edit([GOOD, spaced])
    session.edit([GOOD])
    assert session.edit([spaced]).superseded == ["1-1"]
    assert session.edit([GOOD]).superseded == ["2-1"]
    others = [{**GOOD, "prompt": GOOD["prompt"] + space, "target_new": "Seoul"} for space in ("  ", "\n", " \n")]
    assert session.edit([GOOD, *others]).superseded == ["3-1"]  # other texts in front of the target
    assert len(session) == 4


@pytest.mark.parametrize(
    ("layers", "words"),
    [([1, 4], ["4", "0 to 3"]), ([99], ["99"]), ([2, 1], ["shallow to deep"]), ([1, 1], ["once"]), ([-1], ["from 0"])],
)
def test_layers_that_the_model_does_not_have_are_refused(
    start: Callable[..., EditSession], layers: list[int], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="layers") as caught:
        start(layers=layers)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("layer", [1, 4, -2])
def test_a_loss_layer_outside_the_blocks_above_is_refused(start: Callable[..., EditSession], layer: int) -> None:
    with pytest.raises(ValueError, match="v_loss_layer"):
        start(v_loss_layer=layer)


def test_an_unknown_family_is_named_with_what_to_do_about_it(tiny: Any, tokenizer: Any, settings: Any) -> None:
    model = tiny()
    model.config.model_type = "mystery"
    before = photograph(model)
    with pytest.raises(KeyError, match=r"'mystery'.*llama.*rewrite_module_tmp"):
        EditSession(model, tokenizer, settings())
    assert photograph(model) == before
    named = {
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
    }
    with pytest.raises(KeyError, match="'mystery'"):
        EditSession(model, tokenizer, settings(**{**named, "lm_head_module": None}))
    EditSession(model, tokenizer, settings(**named))


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("rewrite_module_tmp", "model.layers.{}.mlp.dwon_proj"),
        ("ln_f_module", "model.nrom"),
        ("lm_head_module", "head"),
        ("layer_module_tmp", "model.layer.{}"),
        ("layer_module_tmp", "model.layers"),
    ],
)
def test_a_module_name_that_is_wrong_is_quoted(start: Callable[..., EditSession], field: str, name: str) -> None:
    with pytest.raises(ValueError, match=name.removesuffix(".{}").replace(".", r"\.").replace("{}", r"(\d|\{\})")):
        start(**{field: name})


def test_a_projection_that_is_no_linear_layer_is_refused(tiny: Any, tokenizer: Any, settings: Any) -> None:
    model = tiny()

    class Quantised(nn.Module):
        pass

    model.model.layers[1].mlp.down_proj = Quantised()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is a Quantised"):
        EditSession(model, tokenizer, settings())


def test_a_key_covariance_of_another_model_is_refused_before_anything_is_attached(
    start: Callable[..., EditSession], facts: list[dict[str, str]], tmp_path: Any
) -> None:
    import numpy as np

    from coachhook_plugin.statistics import KeyStatistics, save_statistics, toolkit_paths

    session = start(stats_dir=str(tmp_path), mom2_dataset="wiki")
    session.model.config._name_or_path = "tiny"
    paths = [toolkit_paths(session.model, session._parts, layer, session.hparams)[0] for layer in (1, 2)]
    save_statistics(paths[0], KeyStatistics(torch.eye(48), 1))
    save_statistics(paths[1], KeyStatistics(torch.eye(7), 1))
    before = photograph(session.model)
    with pytest.raises(ValueError, match="another model"):
        session.edit(facts)
    assert photograph(session.model) == before
    assert hook_layers(session.model) == []
    save_statistics(paths[1], KeyStatistics(torch.eye(48), 1))
    session.edit(facts[:1])
    weight = session.hparams.mom2_update_weight
    np.testing.assert_allclose(session.state.layers[1].memory.matrix.diagonal().min().item(), weight, rtol=0.5)
    assert bits(session.state.layers[1].memory.matrix) != bits(session.state.layers[2].memory.matrix)
