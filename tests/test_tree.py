"""Token trees: a pass over the tree tells of every row what a pass over that row alone tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from hypothesis import given
from hypothesis import strategies as st

from coachhook_plugin.architectures import model_parts
from coachhook_plugin.observation import Comparison, observe
from coachhook_plugin.tokens import Batch
from coachhook_plugin.tree import TokenTree

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


def batch_of(rows: list[list[int]]) -> Batch:
    """Padded with a token that rows hold, too; the subject is each row's last token."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids, mask, mask.sum(1) - 1)


@given(ROWS)
def test_every_beginning_of_a_row_is_one_node_that_sees_its_own_tokens(rows: list[list[int]]) -> None:
    tree = TokenTree.of(batch_of(rows))
    assert tree.ids.shape[1] == len({tuple(row[: t + 1]) for row in rows for t in range(len(row))})
    for b, row in enumerate(rows):
        nodes = tree.node[b, : len(row)]
        assert tree.ids[0, nodes].tolist() == row
        assert tree.positions[0, nodes].tolist() == list(range(len(row)))
        assert set(tree.node[b, len(row) :].tolist()) <= {int(nodes[-1])}
        for t in range(len(row)):
            assert set(tree.sees[nodes[t]].nonzero().flatten().tolist()) == set(nodes[: t + 1].tolist())


def test_what_a_block_is_given_for_rows_is_picked_from_what_it_is_given_for_the_tree() -> None:
    tree = TokenTree.of(batch_of([[0, 1, 2], [0, 2], [0, 1, 0]]))
    n = tree.ids.shape[1]
    assert n == 5
    states = torch.randn(1, n, 4)
    assert torch.equal(tree.row_argument(states)[1, 1], states[0, tree.node[1, 1]])
    (first, second), other = tree.row_argument(((states, states), "text"))
    assert torch.equal(first, second)
    assert other == "text"
    mask = tree.model_inputs(torch.float32)["attention_mask"]
    rows = tree.row_argument(mask)
    assert rows.shape == (3, 1, 3, 3)
    for b, length in enumerate((3, 2, 3)):
        seen = rows[b, 0, :length] == 0
        assert torch.equal(seen, torch.ones(3, 3, dtype=torch.bool).tril()[:length]), "a token looks at padding"
    assert torch.equal(tree.row_argument(mask > -1), rows > -1)
    assert tree.row_argument(torch.arange(n)).tolist() == [0, 1, 2]


# These run their rows: one counts positions from the mask, the others have windows shorter than the rows. In
# transformers 4 GPT-2 takes no mask of four dimensions.
NO_TREES = {"opt", "mistral-window-4", "gemma2", "gemma3"}
if transformers.__version__.startswith("4."):
    NO_TREES.add("gpt2")


@pytest.mark.parametrize("case", zoo.EVERY)
def test_what_is_observed_through_a_tree_is_what_the_padded_rows_give(
    tiny: Callable[..., Any], settings: Callable[..., Any], case: str
) -> None:
    model = tiny(case)
    parts = model_parts(model, settings())
    rows = [[5, 9, 11, 4], [5, 9, 11, 4, 7, 30], [5, 9, 3], [8, 8, 11, 4, 7, 2, 21], [5]]
    batch = batch_of(rows)
    comparison = Comparison()
    with torch.no_grad():
        found = observe(model, parts.blocks, 0, len(parts.blocks) - 1, batch, comparison)
        plain = observe(model, parts.blocks, 0, len(parts.blocks) - 1, batch, Comparison(causal=False))
    if case not in NO_TREES:
        assert found.tree, "shared beginnings are run again and again"
    real = batch.attention_mask.bool()
    for got, expected in ((found.hidden, plain.hidden), (found.last, plain.last)):
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)
    for pair, others in zip(found.attended, plain.attended, strict=True):
        for got, expected in zip(pair, others, strict=True):
            torch.testing.assert_close(got.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


def test_rows_past_an_attention_window_are_compared_again(
    tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    model = tiny("mistral-window-4")
    parts = model_parts(model, settings())
    short, long = batch_of([[5, 9, 11], [5, 9, 3]]), batch_of([[5, 9, 11, 4, 6, 8, 7, 21], [5, 9, 3, 7, 8, 30, 2, 11]])
    comparison = Comparison()
    with torch.no_grad():
        assert observe(model, parts.blocks, 0, 1, short, comparison).tree
        found = observe(model, parts.blocks, 0, 1, long, comparison)
        assert not found.tree
        plain = observe(model, parts.blocks, 0, 1, long, Comparison(causal=False))
        again = observe(model, parts.blocks, 0, 1, short, comparison)
        assert again.tree, "a long row decides for later batches: a resumed session would end with other bits"
    torch.testing.assert_close(found.last, plain.last, rtol=1e-4, atol=1e-5)
