"""What a scope must offer to the session and to the hook layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..buffers import PreciseBuffers

ScopeState = Any  # LeverageState or ZScoreState; only its own scope looks inside


class Gate(PreciseBuffers, ABC):
    """Decides for one hook layer which tokens it answers."""

    @abstractmethod
    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """(..., 1) bool for keys (..., m): the tokens in scope; None: no token is.

        Args:
            change: gives Delta k (..., d), for rules that need it.
        """

    def margin(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """(...): each token's score over what is asked of it, 1 and more in scope; None: decided at another layer."""
        return None

    def __call__(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        return self.forward(key, change)  # typed, and without the hooks of a module


class Scope(ABC):
    """One rule, on one model."""

    looks_ahead: ClassVar[bool]  # whether later tokens of a sequence take part in a decision

    @abstractmethod
    def initial(self) -> ScopeState:
        """The state before any edit."""

    def attach(self) -> None:  # noqa: B027 - most rules need nothing
        """Get ready for hook layers on the model; `release` takes back what this put there."""

    def release(self) -> None:  # noqa: B027
        """See `attach`."""

    @abstractmethod
    def gate(self, layer: int) -> Gate:
        """A gate for the hook layer of block `layer`."""

    @abstractmethod
    def show(self, layer: int, gate: Gate, state: ScopeState) -> None:
        """Let a gate decide by `state`."""

    def after_keys(self, state: ScopeState, keys: torch.Tensor, opening: torch.Tensor) -> ScopeState:
        """For rules that do not look ahead: the state once a batch's keys at the first edited layer are known.

        Args:
            keys: (u, contexts, m), the plain prompt's first.
            opening: (u, m), where the subject begins a text.
        """
        return state

    def after_write(self, layer: int, state: ScopeState, norms: torch.Tensor, mask: torch.Tensor) -> ScopeState:
        """For rules that look ahead: the state once a layer is written, given ||Delta k|| (b, T) of the batch."""
        return state

    @abstractmethod
    def asked(self, state: ScopeState) -> float:
        """What the state asks of a token, for people to read."""

    @abstractmethod
    def pack(self, state: ScopeState) -> dict[str, torch.Tensor]:
        """The state as contiguous tensors on the CPU; what grows or is a sample, row by row."""

    @abstractmethod
    def unpack(self, tensors: dict[str, torch.Tensor]) -> ScopeState:
        """The state that `pack` told of."""

    def constants(self) -> dict[str, torch.Tensor]:
        """What the rule knows of the model beside its state; enough to make it again without key statistics."""
        return {}
