"""Which tokens of a pass count as real, read from every form of attention mask that generation hands to a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coachhook_plugin.scope.token_mask import real_tokens

pytestmark = pytest.mark.once

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
SIDES = st.sampled_from(["left", "right"])


def padded(lengths: list[int], side: str) -> torch.Tensor:
    width = max(lengths)
    rows = [[0] * (width - n) + [1] * n if side == "left" else [1] * n + [0] * (width - n) for n in lengths]
    return torch.tensor(rows)


def for_a_cache(mask: torch.Tensor, seen: int, slots: int, window: int) -> torch.Tensor:
    """(b, 1, T, slots) bool for the tokens behind the first `seen`, written out entry by entry."""
    found = torch.zeros(len(mask), 1, mask.shape[1] - seen, slots, dtype=torch.bool)
    for b, row in enumerate(mask.tolist()):
        for i in range(seen, len(row)):
            for j in range(max(0, i - window + 1), i + 1):
                found[b, 0, i - seen, j] = bool(row[j])
    return found


@given(LENGTHS, SIDES, st.integers(0, 5), st.integers(0, 4), st.sampled_from([2, 99]), st.integers(0, 3))
def test_padding_is_told_apart_in_every_form_of_mask(
    lengths: list[int], side: str, seen: int, free: int, window: int, form: int
) -> None:
    mask = padded(lengths, side)
    seen = min(seen, mask.shape[1] - 1)
    expected = mask[:, seen:].bool()
    if not expected.any():
        return
    square = for_a_cache(mask, seen, mask.shape[1] + free, window)
    least = torch.finfo(torch.float16).min
    forms: list[Any] = [
        mask,
        square,
        torch.zeros(square.shape, dtype=torch.float16).masked_fill(~square, least),
        {"full_attention": square, "sliding_attention": None},
    ]
    found = real_tokens(forms[form], mask.shape[1] - seen)
    assert found is not None
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.ones(2, 1, 5, 9), {}, torch.ones(4)], ids=str)
def test_a_mask_that_says_nothing_of_a_pass_is_not_guessed_at(mask: Any) -> None:
    assert real_tokens(mask, 4 if mask is None or mask == {} or mask.dim() != 1 else 5) is None
