"""Everything above the last edited block, as a function of that block's output.

While a target value is optimised, only the tokens from the subject's last one on change, and only above the edited
block. So the model runs once; the attention keys and values of the earlier tokens are kept; and each step runs just
the suffix through the upper blocks. Where a family's blocks cannot be called like that (it is tried once and compared
with the model's own answer), a step runs the upper blocks over all tokens, or else the whole model.

Edits above the cut answer the tokens that an edited layer at or below it chose, which no step can change: the blocks
get that decision along with their other arguments (`observation.Call`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from .block_arguments import has_rows, of_rows, of_tokens
from .observation import Attended, Call, Comparison, Observation, Seen, alike
from .packing import PackedAttention, Packing, attention_of, packed_attention
from .scope import FollowingGate
from .tokens import Batch
from .trace import captured, with_hidden

LOG = logging.getLogger(__name__)


class Tail(Protocol):
    """Goes on from `hidden`, the edited block's output (b, S, d) at positions `offset` (b,) and after."""

    packs: ClassVar[bool]  # whether rows shorter than others cost nothing

    @property
    def hidden(self) -> torch.Tensor: ...

    @property
    def offset(self) -> torch.Tensor: ...  # where `hidden` is

    def __call__(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, S, d) in place of `hidden` -> states after the block the loss is read from, and after the last one."""
        ...

    def keep(self, rows: torch.Tensor, lengths: torch.Tensor) -> Tail:
        """The same for some of the rows, and at least the first `lengths` (one for each) of their positions."""
        ...


@dataclass(frozen=True)
class _Suffix:
    """Upper blocks over the tokens from the subject's last one on."""

    hidden: torch.Tensor  # (b, S, d)
    offset: torch.Tensor  # (b,)
    calls: tuple[Call, ...]
    cache_name: str
    kept: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # of the tokens before, for each upper block

    packs: ClassVar[bool] = False

    def __call__(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for_loss = state
        for call, kept in zip(self.calls, self.kept, strict=True):
            state = call.run(state, **{self.cache_name: Attended(kept)})
            for_loss = state if call.is_loss_layer else for_loss
        return for_loss, state

    def keep(self, rows: torch.Tensor, lengths: torch.Tensor) -> _Suffix:
        front, length = int(self.offset[rows].max()), int(lengths.max())

        def of_mask(mask: torch.Tensor) -> torch.Tensor:  # (b, 1, S, P + S)
            own = mask.shape[-1] - mask.shape[-2]  # where the suffix itself begins
            return torch.cat([mask[rows, :, :length, :front], mask[rows, :, :length, own : own + length]], dim=-1)

        part = partial(
            of_tokens,
            rows=len(self.hidden),
            width=self.hidden.shape[1],
            tokens=lambda value: value[rows.to(value.device), :length],
            places=lambda value: value[:length],
        )
        kept = tuple(
            (key[rows.to(key.device), :, :front], value[rows.to(value.device), :, :front]) for key, value in self.kept
        )
        calls = tuple(_changed(call, part, of_mask) for call in self.calls)
        return replace(self, hidden=self.hidden[rows, :length], offset=self.offset[rows], calls=calls, kept=kept)


@dataclass(frozen=True)
class _PackedSuffix(_Suffix):
    """The same, with all rows in one long row."""

    lengths: torch.Tensor  # (b,)

    packs: ClassVar[bool] = True

    def __call__(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row = self._packing.join(state)  # (1, n, d)
        for_loss = row
        with packed_attention([call.block for call in self.calls]):
            for call, arguments, kept in zip(self.calls, self._arguments, self.kept, strict=True):
                cache = PackedAttention(self._packing, kept)
                row = replace(call, arguments=arguments).run(row, **{self.cache_name: cache})
                for_loss = row if call.is_loss_layer else for_loss
        return self._packing.split(for_loss), self._packing.split(row)

    @functools.cached_property
    def _packing(self) -> Packing:
        return Packing.of_lengths(self.lengths)

    @functools.cached_property
    def _arguments(self) -> list[dict[str, Any]]:
        rows, width = self.hidden.shape[:2]

        def places(value: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(self._packing.of_row), device=value.device)

        join = partial(of_tokens, rows=rows, width=width, tokens=self._packing.join, places=places)
        return [_changed(call, join, lambda mask: mask).arguments for call in self.calls]

    def keep(self, rows: torch.Tensor, lengths: torch.Tensor) -> _PackedSuffix:
        return _packed(super().keep(rows, lengths), lengths)


@dataclass(frozen=True)
class _UpperBlocks:
    """Upper blocks over all tokens."""

    hidden: torch.Tensor  # (b, T, d)
    offset: torch.Tensor
    calls: tuple[Call, ...]

    packs: ClassVar[bool] = False

    def __call__(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for_loss = state
        for call in self.calls:
            state = call.run(state)
            for_loss = state if call.is_loss_layer else for_loss
        return for_loss, state

    def keep(self, rows: torch.Tensor, lengths: torch.Tensor) -> _UpperBlocks:
        calls = tuple(replace(c, arguments=of_rows(c.arguments, rows, len(self.hidden))) for c in self.calls)
        return replace(self, hidden=self.hidden[rows], offset=self.offset[rows], calls=calls)


@dataclass(frozen=True)
class _WholeModel:
    """The whole model, with the edited block's output replaced."""

    hidden: torch.Tensor  # (b, T, d)
    offset: torch.Tensor
    model: nn.Module
    batch: Batch
    edited: nn.Module
    loss: nn.Module
    last: nn.Module

    packs: ClassVar[bool] = False

    def __call__(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        handle = self.edited.register_forward_hook(lambda _, __, answer: with_hidden(answer, state))
        try:
            with captured(self.loss) as at_loss, captured(self.last, stop=True) as at_last:
                self.model(**self.batch.model_inputs())
        finally:
            handle.remove()
        return at_loss.output, at_last.output

    def keep(self, rows: torch.Tensor, lengths: torch.Tensor) -> _WholeModel:
        return replace(self, hidden=self.hidden[rows], offset=self.offset[rows], batch=self.batch.rows(rows))


@torch.no_grad()
def cut(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    edited: int,
    loss: int,
    batch: Batch,
    seen: Observation,
    comparison: Comparison,
) -> Tail:
    """What goes on from the output of block `edited`.

    Args:
        edited: the last edited block.
        loss: block the loss is read from, at or above it.
        seen: what `model` made of `batch`.
        comparison: remembers, for later batches on the same model, that the answers were compared.
    """
    start = torch.zeros_like(batch.subject, device=seen.hidden.device)
    whole = _WholeModel(seen.hidden, start, model, batch, blocks[edited], blocks[loss], blocks[-1])
    complete = _UpperBlocks(seen.hidden, start, seen.calls)
    if not seen.calls:  # the last block is edited: nothing is above it
        return complete
    if any(call.gate is not None and not isinstance(call.gate, FollowingGate) for call in seen.calls):
        return whole  # the edits above look at all tokens
    builds: tuple[Callable[[], Tail], ...] = (
        lambda: _packed(_suffix(seen, batch), batch.attention_mask.sum(1) - batch.subject),
        lambda: _suffix(seen, batch),
        lambda: complete,
    )
    width, by_row = batch.input_ids.shape[1], _by_row(seen.calls, len(batch.subject))
    for build in builds:
        try:
            tail = build()
            if comparison.tail is type(tail) and comparison.tail_seen.holds(blocks, width, by_row):
                return tail
            if _agrees(tail, seen.last, batch):
                if len(set(batch.subject.tolist())) > 1:  # rows of one offset prove nothing about others
                    comparison.tail, comparison.tail_seen = type(tail), Seen(width, attention_of(blocks), by_row)
                return tail
        except Exception as error:
            LOG.debug("blocks cannot be called like that: %s", error)
    if not comparison.warned:
        comparison.warned = True
        LOG.warning("%s: its blocks cannot be run by themselves; each step runs the whole model", type(model).__name__)
    return whole


def _suffix(seen: Observation, batch: Batch) -> _Suffix:
    if len(seen.attended) != len(seen.calls):
        raise TypeError("its attention does not use the cache it is given")
    hidden = seen.hidden
    rows, width = hidden.shape[:2]
    offset = batch.subject.to(hidden.device)  # (b,)
    lengths = batch.attention_mask.sum(1).to(hidden.device)
    size, front = int((lengths - offset).max()), int(offset.max())
    at = (offset[:, None] + torch.arange(size, device=hidden.device)).clamp(max=width - 1)  # (b, S)
    cutter = partial(
        of_tokens,
        rows=rows,
        width=width,
        tokens=lambda value: _gathered(value, at.to(value.device)),
        places=lambda value: torch.arange(front, front + size, device=value.device),
    )
    of_mask = partial(_cut_mask, rows=rows, width=width, at=at, front=front, offset=offset)
    calls = tuple(_changed(call, cutter, of_mask) for call in seen.calls)
    kept = tuple((key[:, :, :front], value[:, :, :front]) for key, value in seen.attended)
    return _Suffix(_gathered(hidden, at), offset, calls, seen.cache_name, kept)


def _packed(suffix: _Suffix, lengths: torch.Tensor) -> _PackedSuffix:
    """The same rows, of these lengths (b,), as one."""
    given = {field.name: getattr(suffix, field.name) for field in fields(_Suffix)}
    return _PackedSuffix(**given, lengths=lengths.to(suffix.hidden.device))


def _changed(call: Call, argument: Callable[[Any], Any], mask: Callable[[Any], torch.Tensor]) -> Call:
    """The call with each of its arguments changed, and its attention mask (None where it has none) by itself."""
    given = {"attention_mask": None, **call.arguments}
    changed = {name: argument(value) for name, value in given.items() if name != "attention_mask"}
    return replace(call, arguments={**changed, "attention_mask": mask(given["attention_mask"])})


def _cut_mask(
    mask: torch.Tensor | None, rows: int, width: int, at: torch.Tensor, front: int, offset: torch.Tensor
) -> torch.Tensor:
    """(b, 1, S, front + S): which earlier tokens and suffix tokens each suffix token attends to."""
    size, device = at.shape[1], at.device
    if mask is None:
        allowed = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(rows, 1, width, width)
    elif mask.dim() == 4 and mask.shape[-2:] == (width, width):
        allowed = (mask if mask.dtype == torch.bool else mask > -1).expand(rows, -1, -1, -1)[:, :1]
    else:
        raise TypeError(f"unknown form of attention mask {tuple(mask.shape)}")
    allowed = allowed.to(device)[:, 0].gather(1, at[:, :, None].expand(-1, -1, width))  # (b, S, T)
    earlier = allowed[:, :, :front] & (torch.arange(front, device=device) < offset[:, None])[:, None]
    own = allowed.gather(2, at[:, None, :].expand(-1, size, -1))  # (b, S, S)
    own = own & torch.ones(size, size, dtype=torch.bool, device=device).tril()
    joined = torch.cat([earlier, own], dim=2)[:, None]  # (b, 1, S, front + S)
    if mask is None or mask.dtype == torch.bool:
        return joined
    return torch.zeros(joined.shape, dtype=mask.dtype, device=device).masked_fill(~joined, torch.finfo(mask.dtype).min)


def _agrees(tail: Tail, reference: torch.Tensor, batch: Batch) -> bool:
    """Whether every row comes out as the model's own, and some of them do when they are all that is kept.

    One row would not do: blocks that tell positions by the length of their cache (ALiBi, GPT-Neo's windows) are right
    about the row whose subject comes last, and wrong about the others. Nor would all rows: an argument with entries
    for heads, or for rows and heads in one (MPT, Bloom), is right until rows are dropped.
    """
    count = len(batch.subject)
    some = torch.arange(count, device=tail.offset.device)[count // 2 :][:2]
    lengths = batch.attention_mask.sum(1).to(tail.offset.device) - tail.offset
    return _answers_as(tail, reference, batch) and _answers_as(
        tail.keep(some, lengths[some]), reference[some.to(reference.device)], batch.rows(some)
    )


def _answers_as(tail: Tail, reference: torch.Tensor, batch: Batch) -> bool:
    _, state = tail(tail.hidden)
    at = tail.offset.to(state.device)[:, None] + torch.arange(state.shape[1], device=state.device)  # (b, S)
    real = at < batch.attention_mask.sum(1, keepdim=True).to(at.device)
    return alike(state, _gathered(reference, at.clamp(max=reference.shape[1] - 1)), real)


def _by_row(calls: Sequence[Call], count: int) -> frozenset[str]:
    """Names of the arguments that look as if they had `count` rows."""
    return frozenset(name for call in calls for name, value in call.arguments.items() if has_rows(value, count))


def _gathered(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """value (b, T, ...) at positions (b, S) -> (b, S, ...)."""
    return value[torch.arange(len(at), device=value.device)[:, None], at]
