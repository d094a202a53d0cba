"""Buffers that keep their precision: halving a model, moving it or loading into it must not round an edit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain import bits
from torch import nn

from coachhook_plugin.buffers import PreciseBuffers

pytestmark = pytest.mark.once

THIRDS = torch.tensor([1 / 3, 2 / 3, 1e-30, 1e30])  # rounded by bfloat16, lost by float16


class Inner(PreciseBuffers):
    exact: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exact", THIRDS.double() / 3)


class Holder(PreciseBuffers):
    growing = frozenset({"precise"})
    precise: torch.Tensor
    nothing: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("precise", THIRDS.clone())
        self.register_buffer("nothing", None)
        self.inner = Inner()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.add_module("held", Holder())

    @property
    def held(self) -> Holder:
        held = self.layer.held
        assert isinstance(held, Holder)
        return held


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to a dtype": lambda model: model.to(torch.float16),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "like a tensor": lambda model: model.to(torch.zeros(1).half()),
    "there and back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_models_dtype_leaves_every_bit_of_the_buffers(change: str) -> None:
    model = Model()
    model = CHANGES[change](model)
    for name, buffer, expected in (
        ("precise", model.held.precise, THIRDS),
        ("exact", model.held.inner.exact, THIRDS.double() / 3),
    ):
        assert buffer.dtype == expected.dtype, name
        assert bits(buffer) == bits(expected), name
    assert model.layer.weight.dtype != torch.float32 or change == "there and back"
    assert model.held.nothing is None


def test_buffers_follow_the_model_to_another_device() -> None:
    model = Model().half().to("meta")
    assert model.held.precise.device.type == model.held.inner.exact.device.type == "meta"
    assert (model.held.precise.dtype, model.held.inner.exact.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_forward_gets_the_buffer_in_its_dtype_and_the_cast_is_made_once(dtype: torch.dtype) -> None:
    held = Model().held
    cast = held.in_dtype("precise", dtype)
    assert cast.dtype == dtype
    assert torch.equal(cast, THIRDS.to(dtype))
    assert held.in_dtype("precise", dtype) is cast
    assert held.in_dtype("precise", torch.float32) is held.precise  # which needs none, and no copy
    assert torch.equal(held.inner.in_dtype("exact", dtype), (THIRDS.double() / 3).to(dtype))


def test_a_cast_does_not_outlive_what_it_was_made_from() -> None:
    model = Model()
    held = model.held

    def cast() -> torch.Tensor:
        return held.in_dtype("precise", torch.bfloat16)

    before = cast()
    held.precise = 2 * THIRDS  # replaced
    assert torch.equal(cast(), (2 * THIRDS).bfloat16())
    held.precise = THIRDS.clone()  # back: equal, but another tensor
    assert torch.equal(cast(), before)
    assert held.in_dtype("precise", torch.float16).dtype == torch.float16  # another dtype in between
    assert torch.equal(cast(), before)
    assert cast().dtype == torch.bfloat16
    model.load_state_dict({**model.state_dict(), "layer.held.precise": 3 * THIRDS})  # loaded
    assert torch.equal(cast(), (3 * THIRDS).bfloat16())
    model.to("meta")  # moved
    assert cast().device.type == "meta"


def test_a_cast_made_while_generating_can_be_trained_through_afterwards() -> None:
    held = Holder()
    with torch.inference_mode():
        held.in_dtype("precise", torch.bfloat16)
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    (weight * held.in_dtype("precise", torch.bfloat16)).sum().backward()
    assert weight.grad is not None


def test_loading_writes_into_no_tensor_that_someone_else_holds() -> None:
    model = Model()
    mine, exact = THIRDS.clone(), THIRDS.double().clone()
    model.held.precise, model.held.inner.exact = mine, exact  # as a session shows its state
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    told = {name: bits(tensor) for name, tensor in given.items()}
    model.load_state_dict(given)
    assert bits(mine) == bits(THIRDS)
    assert bits(exact) == bits(THIRDS.double())
    assert torch.equal(model.held.precise, THIRDS + 1)
    model.held.precise.zero_()  # nor do what was loaded and the model share anything
    assert {name: bits(tensor) for name, tensor in given.items()} == told


@pytest.mark.parametrize("saved_in", [torch.float32, torch.float64, torch.bfloat16])
def test_a_buffer_that_has_grown_is_loaded_in_its_own_precision(saved_in: torch.dtype) -> None:
    held = Holder()
    grown = torch.arange(12.0).view(3, 4)
    state = {**held.state_dict(), "precise": grown.to(saved_in)}
    assert not any(held.load_state_dict(state))  # no missing and no unexpected keys
    assert held.precise.dtype == torch.float32
    assert torch.equal(held.precise, grown)
    held.load_state_dict({**state, "precise": torch.zeros(0, 4)})
    assert held.precise.shape == (0, 4)


def test_a_state_dict_that_lacks_a_buffer_is_refused_and_leaves_it_alone() -> None:
    held = Holder()
    state = {name: tensor for name, tensor in held.state_dict().items() if name != "precise"}
    with pytest.raises(RuntimeError, match="precise"):
        held.load_state_dict(state)
    held.load_state_dict(state, strict=False)
    assert bits(held.precise) == bits(THIRDS)


def test_a_copy_has_buffers_and_casts_of_its_own() -> None:
    model = Model().bfloat16()
    cast = model.held.in_dtype("precise", torch.bfloat16)
    twin = copy.deepcopy(model)
    twin.held.precise = 5 * THIRDS
    assert torch.equal(twin.held.in_dtype("precise", torch.bfloat16), (5 * THIRDS).bfloat16())
    assert torch.equal(model.held.in_dtype("precise", torch.bfloat16), cast)
    fresh = copy.deepcopy(model)
    fresh.held.precise.zero_()
    assert bits(model.held.precise) == bits(THIRDS)
