"""One pass of the model over a batch of facts: what the edited block answered, and how the blocks above were called.

Where the model's answer comes out the same, the pass runs the batch's token tree instead of its padded rows. Whether
it does is tried on made-up rows, once for all batches that are no wider; what is told is of rows either way.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .architectures import context_length, vocabulary_size
from .hook import HookLayer
from .packing import attention_of, configs_of
from .scope import FollowingGate, Gate
from .tokens import Batch
from .trace import captured, hidden_of
from .tree import TokenTree

LOG = logging.getLogger(__name__)

DECIDED = "coachhook_decided"  # beside a block's arguments, and cut like them: (b, T, 1), the tokens its edits answer
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
# Relative, for each token. In bfloat16 SmolLM2 differs by up to 4%; what a token should not see makes tens of percent.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2}
WIDEST = 1e-1  # of any other dtype
SHORT = 64  # tokens: no family's attention window is shorter, unless its configuration says so


@dataclass(frozen=True)
class Call:
    """How the model called one block."""

    block: nn.Module
    arguments: dict[str, Any]  # by name, without the hidden states
    hidden_name: str
    is_loss_layer: bool
    gate: Gate | None = None  # of its hook layer

    def run(self, state: torch.Tensor, **changed: Any) -> torch.Tensor:
        given = {**self.arguments, self.hidden_name: state, **changed}
        decided = given.pop(DECIDED, None)
        if isinstance(self.gate, FollowingGate) and decided is not None:
            self.gate.decide(decided)
        return hidden_of(self.block(**given))


class Attended:
    """Stands in for the library's cache: remembers keys and values, and puts kept ones in front of new ones."""

    def __init__(self, kept: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.kept = kept  # (b, heads, P, head size) each
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = key, value
        if self.kept is None:
            return key, value
        return torch.cat([self.kept[0], key], dim=2), torch.cat([self.kept[1], value], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.kept is None else int(self.kept[0].shape[2])


@dataclass(frozen=True)
class Seen:
    """On which texts something was seen: rows of so many tokens, under one attention function."""

    width: int = 0
    attention: str = ""
    by_row: frozenset[str] = frozenset()  # arguments of blocks that looked as if they had an entry for each row

    def holds(self, blocks: Sequence[nn.Module], width: int, by_row: frozenset[str] = frozenset()) -> bool:
        """Whether what came out the same tells of rows of `width` tokens, too.

        Longer rows may reach past an attention window, and the user may choose another attention between batches. And
        what has an entry for each head looks like one with an entry for each row where they are as many.
        """
        known = max(self.width, _short(blocks)) if self.width else 0
        return width <= known and self.attention == attention_of(blocks) and by_row <= self.by_row


@dataclass
class Comparison:
    """What has been found to agree with the model's own way; kept between batches, it changes no result.

    A session that resumes begins with a new one. So nothing here may decide otherwise than a comparison would.
    """

    causal: bool = True  # off: answers depend on later tokens, too, and no token tree is tried
    unedited: Callable[[], AbstractContextManager[None]] = nullcontext  # shows the model without edits
    trees: Seen = Seen()  # the longest rows that came out the same through a token tree
    no_trees: Seen | None = None  # the shortest that did not
    tail: type | None = None  # the way of running the upper blocks that came out the same
    tail_seen: Seen = Seen()
    warned: bool = False  # that no such way agrees
    named_head: bool | None = None  # whether the final norm and the head alone give the logits; None: not known yet

    def runs_trees(self, blocks: Sequence[nn.Module], width: int) -> bool | None:
        """Whether rows of `width` tokens come out the same through a tree; None: that is not known yet."""
        no = self.no_trees
        if not self.causal or (no is not None and no.attention == attention_of(blocks) and width >= no.width):
            return False
        return True if self.trees.holds(blocks, width) else None


@dataclass(frozen=True)
class Observation:
    """What was seen, of rows (b, T)."""

    hidden: torch.Tensor  # (b, T, d) answer of the edited block
    last: torch.Tensor  # (b, T, d) of the last block
    calls: tuple[Call, ...]  # of the blocks above the edited one
    cache_name: str  # under which they take a cache; empty where they take none of ours
    attended: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (b, heads, T, head size): keys and values of each
    tree: bool = False  # whether they were run as a token tree

    def of_rows(self, tree: TokenTree) -> Observation:
        """The same of rows, where a tree was run."""
        return Observation(
            tree.rows(self.hidden),
            tree.rows(self.last),
            tuple(
                replace(call, arguments={name: tree.row_argument(value) for name, value in call.arguments.items()})
                for call in self.calls
            ),
            self.cache_name,
            tuple(
                tuple(tree.rows(state.transpose(1, 2)).transpose(1, 2) for state in pair)  # type: ignore[misc]
                for pair in self.attended
            ),
            tree=True,
        )


@torch.no_grad()
def observe(
    model: nn.Module, blocks: Sequence[nn.Module], edited: int, loss: int, batch: Batch, comparison: Comparison
) -> Observation:
    """Run `model` on the rows of `batch` once.

    Args:
        edited: the last edited block.
        loss: block the loss is read from, at or above it.
    """
    look = partial(_observed, model, blocks, edited, loss)
    if _runs_trees(model, blocks, look, batch, comparison):
        try:
            return _through_a_tree(model, look, batch)
        except Exception as error:  # as where memory runs out
            LOG.debug("the model does not run this token tree: %s", error)
    return look(batch.model_inputs())


Look = Callable[[dict[str, Any]], Observation]


def _through_a_tree(model: nn.Module, look: Look, batch: Batch) -> Observation:
    tree = TokenTree.of(batch)
    return look(tree.model_inputs(next(model.parameters()).dtype)).of_rows(tree)


def _runs_trees(
    model: nn.Module, blocks: Sequence[nn.Module], look: Look, batch: Batch, comparison: Comparison
) -> bool:
    """Whether rows as wide as these come out the same through a tree.

    Tried on made-up rows and without edits: rounding can bring a token into the scope, or beyond the tolerance of 16
    bits, and what it does to one batch must not decide for others.
    """
    width = batch.input_ids.shape[1]
    known = comparison.runs_trees(blocks, width)
    if known is not None:
        return known
    attention, short = attention_of(blocks), _short(blocks)
    tried = max(width, min(short, context_length(model) or short))  # short rows are all alike
    rows = _made_up(tried, vocabulary_size(model), batch.input_ids.device)
    try:
        with comparison.unedited():
            found, expected = _through_a_tree(model, look, rows).last, look(rows.model_inputs()).last
            agrees = alike(found, expected, rows.attention_mask.bool())
    except Exception as error:
        LOG.debug("the model runs no token trees: %s", error)
        agrees = False
    if agrees:
        comparison.trees = Seen(tried, attention)
    else:
        comparison.no_trees = Seen(width if width > short else 0, attention)
    return agrees


def _made_up(width: int, vocabulary: int, device: torch.device) -> Batch:
    """Rows of up to `width` tokens, some of which begin alike."""
    ids = (7919 * torch.arange(4 * width).view(4, width)) % vocabulary
    ids[1, : width // 2], ids[2, : width // 4] = ids[0, : width // 2], ids[0, : width // 4]
    lengths = torch.tensor([width, width, -(-width // 2), width])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return Batch(ids.to(device), mask.to(device), (lengths - 1).to(device))


def alike(got: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> bool:
    """Whether states (b, T, d) are the same up to rounding at the `real` (b, T) tokens, each by itself.

    The largest entry would be no measure for all: some models answer first tokens with values a thousandfold.
    """
    real = real.to(expected.device)
    got, expected = got[real].float(), expected[real]
    tolerance = TOLERANCE.get(expected.dtype, WIDEST)
    return bool(((got - expected).norm(dim=-1) <= tolerance * expected.float().norm(dim=-1)).all())


def _observed(
    model: nn.Module, blocks: Sequence[nn.Module], edited: int, loss: int, inputs: dict[str, Any]
) -> Observation:
    calls: list[Call] = []
    caches: list[tuple[str, Attended]] = []

    def remember(layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = _by_name(block, args, kwargs)
        hidden_name = next(iter(named))
        hidden = named.pop(hidden_name)
        cache_name = next((name for name in CACHE_ARGUMENTS if name in named), None)
        gate = _gate_of(block)
        decided = gate.decided(hidden.shape[:2]) if isinstance(gate, FollowingGate) else None
        told = {} if decided is None else {DECIDED: decided}
        calls.append(Call(block, {**named, **told}, hidden_name, layer == loss, gate))
        if not record or cache_name is None:
            return None
        caches.append((cache_name, Attended()))
        return (hidden,), {**named, cache_name: caches[-1][1]}

    upper = list(enumerate(blocks))[edited + 1 :]
    for record in (True, False):
        calls.clear()
        handles = [b.register_forward_pre_hook(partial(remember, i), with_kwargs=True) for i, b in upper]
        try:
            with captured(blocks[edited]) as at_cut, captured(blocks[-1], stop=True) as at_last:
                model(**inputs)
            break
        except Exception as error:
            if not record:
                raise
            LOG.debug("blocks take no cache of ours: %s", error)
            caches.clear()
        finally:
            for handle in handles:
                handle.remove()
    attended = tuple(cache.seen for _, cache in caches if cache.seen is not None)
    return Observation(at_cut.output, at_last.output, tuple(calls), caches[0][0] if caches else "", attended)


def _gate_of(block: nn.Module) -> Gate | None:
    """The gate of the block's hook layer, where it has one."""
    return next((module.gate for module in block.modules() if isinstance(module, HookLayer)), None)


def _short(blocks: Sequence[nn.Module]) -> int:
    """Tokens that no attention window cuts: `SHORT`, or the shortest window that the blocks' configuration names."""
    named = (vars(config) for config in configs_of(blocks))
    sizes = [
        v
        for of in named
        for k, v in of.items()
        if ("window" in k or "chunk" in k) and "layers" not in k and isinstance(v, int) and v > 1
    ]
    return min([SHORT, *sizes])


def _by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, the hidden states first."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError("arguments without names")
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
