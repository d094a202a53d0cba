"""Rows packed into one: every token comes back to its place, and the model's attention is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coachhook_plugin.packing import NAME, Packing, packed_attention


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_packing_and_unpacking_gives_every_real_token_back_in_its_row(lengths: list[int]) -> None:
    packing = Packing.of_lengths(torch.tensor(lengths))
    numbers = torch.arange(sum(lengths) * 2).view(1, -1, 2)
    batch = packing.split(numbers)
    assert batch.shape == (len(lengths), max(lengths), 2)
    expected = list(numbers[0].split(lengths))
    assert all(torch.equal(batch[i, :n], rows) for i, (n, rows) in enumerate(zip(lengths, expected, strict=True)))
    assert torch.equal(packing.join(batch), numbers)


def test_padding_takes_no_part_in_gradients_beyond_the_place_it_copies() -> None:
    packing = Packing.of_lengths(torch.tensor([1, 3]))
    batch = torch.zeros(2, 3, 1, requires_grad=True)
    packing.join(batch).sum().backward()
    assert batch.grad is not None
    assert batch.grad[:, :, 0].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_attention_is_the_models_own_again_after_an_interruption(tiny: Callable[..., Any]) -> None:
    one = tiny("llama")
    before = one.config._attn_implementation
    with contextlib.suppress(KeyboardInterrupt), packed_attention(list(one.model.layers)):
        assert one.config._attn_implementation == NAME
        raise KeyboardInterrupt
    assert one.config._attn_implementation == before


def test_attention_that_is_wrapped_already_is_not_wrapped_again(tiny: Callable[..., Any]) -> None:
    """As two models that share a config would have it; the second would leave the wrapper there for ever."""
    one = tiny("llama")
    before, blocks = one.config._attn_implementation, list(one.model.layers)
    with packed_attention(blocks):
        with pytest.raises(TypeError, match="wrapped already"), packed_attention(blocks):
            pass
        assert one.config._attn_implementation == NAME
    assert one.config._attn_implementation == before


def test_a_model_that_looks_nothing_up_is_refused(tiny: Callable[..., Any]) -> None:
    one = tiny("llama", attn_implementation="eager")
    with pytest.raises(TypeError, match="table"), packed_attention(list(one.model.layers)):
        pass
    assert one.config._attn_implementation == "eager"
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
