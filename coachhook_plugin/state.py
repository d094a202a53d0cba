"""What a session knows, in immutable pieces: a state, the steps that led to it, and the way back.

A step is kept as low-rank factors on fixed-point grids (`memory.on_grid`), whose products are exact. Replaying the
steps from an earlier state therefore gives the bits that the session had, on every machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from . import memory
from .ledger import Edit, Ledger, with_lines
from .memory import KeyMemory

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerState:
    """What a batch changes in one layer."""

    delta: torch.Tensor  # (d, m), float32: Wh - W0
    memory: KeyMemory | None  # None where edits were loaded without it

    def on(self, device: torch.device) -> LayerState:
        return LayerState(self.delta.to(device), None if self.memory is None else self.memory.on(device))


@dataclass(frozen=True)
class Factors:
    """What one step does to one layer: Delta += sign R X^T and C += sign K K^T, each matrix on a grid."""

    residual: torch.Tensor  # (d, u): R
    coefficients: torch.Tensor  # (m, u): X
    keys: torch.Tensor | None  # (m, u): K; None: C stays as it is

    def written(self, layer: LayerState, sign: int) -> LayerState:
        change = memory.update(self.residual, self.coefficients).float().to(layer.delta.device)  # (d, m)
        kept = layer.memory
        if self.keys is not None and kept is not None:
            kept = kept.remembering(self.keys, sign)
        return LayerState(layer.delta + sign * change, kept)

    def on(self, device: torch.device) -> Factors:
        keys = None if self.keys is None else self.keys.to(device)
        return Factors(self.residual.to(device), self.coefficients.to(device), keys)

    def columns(self, which: list[int]) -> Factors:
        keys = None if self.keys is None else self.keys[:, which]
        return Factors(self.residual[:, which], self.coefficients[:, which], keys)

    @staticmethod
    def joined(parts: Iterable[Factors]) -> Factors:
        """Columns side by side, on a grid that they share."""
        rows = list(parts)

        def together(matrices: list[torch.Tensor]) -> torch.Tensor:
            return memory.on_grid(torch.cat([matrix.double() for matrix in matrices], dim=1))

        keys = [part.keys for part in rows if part.keys is not None]
        return Factors(
            together([part.residual for part in rows]),
            together([part.coefficients for part in rows]),
            together(keys) if keys else None,
        )


@dataclass(frozen=True)
class Step:
    """One batch of edits, or one call of `forget`: all that leads from a state to the next. Tensors on the CPU."""

    layers: dict[int, Factors]
    scope: Tensors = field(default_factory=dict)  # the scope's state, as `changes` tells it
    lines: Ledger = ()  # of the ledger, changed and new
    sign: int = 1  # -1: columns of earlier steps are taken back

    def for_answers(self) -> Step:
        """Only what Delta is made of."""
        return Step({i: replace(factors, keys=None) for i, factors in self.layers.items()}, sign=self.sign)

    @property
    def edits(self) -> int:
        """u: the number of columns."""
        return next(iter(self.layers.values())).residual.shape[1]


@dataclass(frozen=True)
class Snapshot:
    """A state as plain tensors on the CPU."""

    layers: dict[int, LayerState]
    scope: Tensors
    ledger: Ledger = ()
    step: int = 0

    def after(self, step: Step) -> Snapshot:
        return Snapshot(
            {i: step.layers[i].written(layer, step.sign) for i, layer in self.layers.items()},
            changed(self.scope, step.scope),
            with_lines(self.ledger, step.lines),
            self.step + 1,
        )


@dataclass(frozen=True)
class History:
    """The way back: an earlier state, and the steps since."""

    base: Snapshot
    steps: tuple[Step, ...] = ()
    # The steps before `base`, as far as Delta goes; None once they would take more room than Delta itself.
    folded: tuple[Step, ...] | None = ()
    # The memories of `base` by layer, mapped where they were found, for a session that cannot edit and so has none.
    left: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def at(self, number: int) -> Snapshot:
        """The state after step `number`, from that of `base` on."""
        return reduce(Snapshot.after, self.steps[: number - self.base.step], self.base)

    def until(self, number: int) -> History:
        return replace(self, steps=self.steps[: number - self.base.step])

    def followed(self, step: Step, limit: int, now: Callable[[], Snapshot]) -> History:
        """With one more step; beyond `limit` only the newest half stays, the others become part of `base`.

        Args:
            now: gives the state after `step`, which becomes `base` where no step stays.
        """
        steps = (*self.steps, step)
        if len(steps) <= limit:
            return replace(self, steps=steps)
        split = len(steps) - -(-limit // 2)
        folded = None if self.folded is None else (*self.folded, *(old.for_answers() for old in steps[:split]))
        base = reduce(Snapshot.after, steps[:split], self.base) if steps[split:] else now()
        if folded is not None and not is_smaller(folded, base):
            folded = None
        return History(base, steps[split:], folded)

    @property
    def answers(self) -> tuple[Step, ...] | None:
        """Every step since the beginning, as far as Delta goes, where that takes less room than Delta itself."""
        if self.folded is None:
            return None
        steps = (*self.folded, *(step.for_answers() for step in self.steps))
        return steps if is_smaller(steps, self.base) else None

    def factors_of(self, edits: Iterable[Edit]) -> dict[int, Factors]:
        """What these edits wrote, by layer.

        Raises:
            ValueError: an edit of a step that is part of `base`, where it cannot be told from the others.
        """
        columns: dict[int, list[int]] = {}
        for edit in edits:
            if edit.step <= self.base.step:
                raise ValueError(
                    f"edit_ids: {edit.id!r} can no longer be told apart from the other edits of its time, only those "
                    f"after step {self.base.step} can; history_steps says how many are kept"
                )
            columns.setdefault(edit.step, []).append(edit.place)
        steps = {number: self.steps[number - self.base.step - 1] for number in columns}
        return {
            layer: Factors.joined(steps[number].layers[layer].columns(which) for number, which in columns.items())
            for layer in self.base.layers
        }

    def tensors(self) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = [*self.base.scope.values()]
        for layer in self.base.layers.values():
            kept += [layer.delta, *([] if layer.memory is None else [layer.memory.matrix])]
        for step in (*(self.folded or ()), *self.steps):
            kept += step.scope.values()
            for factors in step.layers.values():
                kept += [t for t in vars(factors).values() if t is not None]
        return kept


@dataclass(frozen=True)
class SessionState:
    """What a step changes. Tensors are never changed in place, so a state stays valid and costs no copy."""

    layers: dict[int, LayerState]
    scope: Any = None  # the scope's own; None without hook layers
    ledger: Ledger = ()
    step: int = 0  # batches, and calls of `forget`, so far
    history: History | None = None  # None where edits were loaded without it
    origin: str = ""  # of its session, see `fingerprint.state_origin`

    @property
    def edits(self) -> int:
        """Edits in force."""
        return sum(edit.in_force for edit in self.ledger)

    def followed(
        self, step: Step, layers: dict[int, LayerState], scope: Any, packed: Tensors, limit: int
    ) -> SessionState:
        """The state after `step`, which made these layers and this scope.

        Args:
            packed: the scope's state as tensors.
            limit: as in `History.followed`.
        """
        ledger, number = with_lines(self.ledger, step.lines), self.step + 1

        def now() -> Snapshot:
            return Snapshot({i: of.on(torch.device("cpu")) for i, of in layers.items()}, packed, ledger, number)

        assert self.history is not None
        return SessionState(layers, scope, ledger, number, self.history.followed(step, limit, now), self.origin)

    def tensors(self) -> list[Any]:
        """Everything held, beside what is no tensor."""
        held = [value for of in (self.scope, *self.layers.values()) if of is not None for value in vars(of).values()]
        held += [layer.memory.matrix for layer in self.layers.values() if layer.memory is not None]
        return held + ([] if self.history is None else self.history.tensors())


def is_smaller(steps: Iterable[Step], than: Snapshot) -> bool:
    """Whether the factors of Delta take less room than Delta."""
    room = sum(f.residual.numel() + f.coefficients.numel() for step in steps for f in step.layers.values())
    return room < sum(layer.delta.numel() for layer in than.layers.values())


def changes(old: Tensors, new: Tensors) -> Tensors:
    """What makes `new` of `old`: for each tensor the rows behind the last kept one, and under `name.kept` the indices
    of the rows of `old` that stay in front of them.

    A scope's state grows, and is a moving sample: most of its rows are those it had before.
    """
    told: Tensors = {}
    for name, tensor in new.items():
        before = old.get(name)
        kept = [] if before is None or tensor.dim() == 0 or before.dtype != tensor.dtype else _kept(before, tensor)
        told[name] = tensor[len(kept) :].clone() if kept else tensor
        if kept:
            told[f"{name}.kept"] = torch.tensor(kept, dtype=torch.int32)
    return told


def changed(old: Tensors, told: Tensors) -> Tensors:
    """What `changes` told of."""
    new: Tensors = {}
    for name, rows in told.items():
        kept = told.get(f"{name}.kept")
        if not name.endswith(".kept"):
            new[name] = rows if kept is None else torch.cat([old[name][kept.long()], rows])
    return new


def _kept(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    """Indices of the rows of `old` that `new` begins with, bit by bit and in their order."""
    places: dict[bytes, list[int]] = {}  # a fact edited again has the key it had: rows can be equal
    for i, row in enumerate(old):
        places.setdefault(row.numpy().tobytes(), []).append(i)
    kept: list[int] = []
    for row in new:
        equal = places.get(row.numpy().tobytes(), [])
        after = bisect_right(equal, kept[-1] if kept else -1)
        if after == len(equal):
            break
        kept.append(equal[after])
    return kept
