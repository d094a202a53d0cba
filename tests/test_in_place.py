"""The ablation without hook layers: weights are written, and come back bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from plain import (
    PRECISION,
    PlainEditor,
    bits,
    hook_layers,
    logits_of,
    photograph,
    photograph_session,
    raising_at,
    weight_of,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import coachhook_plugin.batch_writing
import coachhook_plugin.memory
from coachhook_plugin import EditSession
from coachhook_plugin.in_place import InPlaceLayer

Facts = list[dict[str, str]]
NAME = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_written_weight_is_the_rounded_sum_and_the_original_comes_back(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projection = (nn.Linear(7, 5) if kind == "Linear" else Conv1D(5, 7)).to(dtype)
    with torch.no_grad():
        projection.weight[0, 0] = -0.0
    original, parameter = projection.weight.detach().clone(), projection.weight
    layer, delta = InPlaceLayer(projection), torch.randn(5, 7)
    layer.write(delta)
    change = delta if kind == "Linear" else delta.T
    expected = (original.double() + change.double()).to(dtype)
    torch.testing.assert_close(projection.weight.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    if dtype == torch.float64:
        assert torch.equal(projection.weight.detach(), expected)
    written = bits(projection.weight)
    layer.hide()
    assert bits(projection.weight) == bits(original)
    layer.show()
    assert bits(projection.weight) == written
    layer.remove()
    assert bits(projection.weight) == bits(original)
    assert projection.weight is parameter


@DTYPES
def test_writing_twice_starts_from_the_original_not_from_the_rounded_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    once, again = nn.Linear(7, 5).to(dtype), nn.Linear(7, 5).to(dtype)
    again.load_state_dict(once.state_dict())
    first, second = torch.randn(5, 7), torch.randn(5, 7)
    layer = InPlaceLayer(again)
    layer.write(first)
    layer.write(second)
    InPlaceLayer(once).write(second)
    assert bits(again.weight) == bits(once.weight)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_what_is_written_is_the_methods_update(
    start: Callable[..., EditSession], monkeypatch: pytest.MonkeyPatch, facts: Facts, case: str
) -> None:
    dtype, tolerance = PRECISION[case]
    session = start(case, dtype=dtype, use_hooks=False)
    targets: list[Any] = []
    original = coachhook_plugin.batch_writing.optimise_targets

    def recorded(*args: Any, **kwargs: Any) -> Any:
        targets.append(original(*args, **kwargs))
        return targets[-1]

    monkeypatch.setattr(coachhook_plugin.batch_writing, "optimise_targets", recorded)
    c0 = {i: s.memory.matrix.numpy() / session.hparams.mom2_update_weight for i, s in session.state.layers.items()}
    names = [NAME[case].format(layer) for layer in (1, 2)]
    plain = PlainEditor(session, zoo.model(case, len(session.tokenizer), dtype=dtype), c0, names)
    for number, batch in enumerate([facts[:2], facts[2:]]):
        session.edit(batch)
        plain.edit(batch, targets[number].values.double().numpy())
        for layer, name in zip((1, 2), names, strict=True):
            found = torch.tensor(weight_of(session.model.get_submodule(name)) - plain.w0[layer])
            assert zoo.relative(found, torch.tensor(plain.wh[layer] - plain.w0[layer])) < tolerance
    assert hook_layers(session.model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gpt2", "llama-tied"])
def test_only_the_edited_weights_change_and_all_come_back(
    start: Callable[..., EditSession], facts: Facts, case: str, dtype: torch.dtype
) -> None:
    session = start(case, dtype=dtype, use_hooks=False)
    _ = session.state
    untouched = photograph(session.model)
    states, photographs = [session.state], [untouched]
    for batch in (facts[:2], facts[2:]):
        session.edit(batch)
        states.append(session.state)
        photographs.append(photograph(session.model))
    changed = {n for n, seen in photographs[2]["parameters"].items() if seen != untouched["parameters"][n]}
    name = NAME["gpt2" if case == "gpt2" else "llama"]
    assert changed == {f"{name.format(layer)}.weight" for layer in (1, 2)}
    assert {**photographs[2], "parameters": 0} == {**untouched, "parameters": 0}  # no module, hook or buffer
    for number in (1, 0, 2, 0, 1, 2):
        session.restore(states[number])
        assert photograph(session.model) == photographs[number]
    session.detach()
    assert {**photograph(session.model), "session": 0, "attributes": 0} == {**untouched, "session": 0, "attributes": 0}


def test_disabled_hides_the_written_weights(start: Callable[..., EditSession], facts: Facts) -> None:
    session = start(use_hooks=False)
    _ = session.state
    base = photograph(session.model)
    session.edit(facts)
    written = photograph(session.model)
    with session.disabled():
        assert photograph(session.model) == base
        with pytest.raises(KeyboardInterrupt), session.disabled():
            raise KeyboardInterrupt
        assert photograph(session.model) == base  # still inside the outer one
    assert photograph(session.model) == written


@pytest.mark.parametrize("scope", ["leverage", "zscore"])
def test_unlike_a_hook_a_written_weight_answers_every_token(
    start: Callable[..., EditSession], facts: Facts, scope: str
) -> None:
    texts = ["Ada", "as one can read in many books"]
    written, hooked = start(use_hooks=False), start(scope=scope, scope_budget=0.002)
    base = logits_of(hooked.model, hooked.tokenizer, texts)
    written.edit(facts)
    hooked.edit(facts)
    found = logits_of(written.model, written.tokenizer, texts)
    assert all((one != two).any() for one, two in zip(found, base, strict=True))
    assert torch.equal(logits_of(hooked.model, hooked.tokenizer, texts)[0], base[0])


@pytest.mark.parametrize("earlier", [False, True], ids=["first batch", "second batch"])
@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (coachhook_plugin.batch_writing, "optimise_targets", 0, True),
        (coachhook_plugin.batch_writing, "subject_keys", 1, False),
        (coachhook_plugin.memory, "update", 1, True),
        (InPlaceLayer, "write", 1, True),
        (InPlaceLayer, "__init__", 1, True),
    ],
)
def test_a_batch_that_fails_leaves_the_weights_as_they_were(
    start: Callable[..., EditSession],
    monkeypatch: pytest.MonkeyPatch,
    facts: Facts,
    owner: Any,
    name: str,
    call: int,
    after: bool,
    earlier: bool,
) -> None:
    session = start(use_hooks=False)
    if earlier:
        if name == "__init__":
            return  # made in the first batch only
        session.edit(facts[:1])
    session.model.train()
    before, before_session = photograph(session.model), photograph_session(session)
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):
        with raising_at(monkeypatch, owner, name, call, error, after), pytest.raises(type(error)):
            session.edit(facts[1:])
        assert photograph(session.model) == before
        assert photograph_session(session) == before_session
    session.edit(facts[1:])
    assert photograph(session.model) != before
