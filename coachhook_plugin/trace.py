"""Reading what passes through one module in this thread, and stopping the forward pass there.

Usage::

    with captured(block, stop=True) as seen:
        model(**batch)
    seen.output  # (b, T, d)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Captured:
    """What a module was given and what it answered."""

    inputs: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    answer: Any = None

    @property
    def input(self) -> torch.Tensor:
        """The first input, by position or (some blocks) by name."""
        first = self.inputs[0] if self.inputs else self.kwargs["hidden_states"]
        assert isinstance(first, torch.Tensor)
        return first

    @property
    def output(self) -> torch.Tensor:
        return hidden_of(self.answer)


class _Stop(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


def hidden_of(answer: Any) -> torch.Tensor:
    """The hidden states in a block's answer: a tensor (transformers >= 4.54) or the first of a tuple (before)."""
    hidden = answer[0] if isinstance(answer, tuple) else answer
    assert isinstance(hidden, torch.Tensor)
    return hidden


def with_hidden(answer: Any, hidden: torch.Tensor) -> Any:
    """`answer` with other hidden states, in the form the block gave it."""
    return (hidden, *answer[1:]) if isinstance(answer, tuple) else hidden


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of a module that lets pass what other threads run meanwhile."""
    mine = threading.get_ident()

    @functools.wraps(hook)
    def called(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == mine else None

    return called


@contextmanager
def captured(module: nn.Module, stop: bool = False) -> Iterator[Captured]:
    """Record the module's last call inside the `with` body; with `stop`, the body ends right after that call.

    Calls in other threads are neither recorded nor stopped.
    """
    seen = Captured()

    @in_this_thread
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        seen.inputs, seen.kwargs, seen.answer = args, kwargs, answer
        if stop:
            raise _Stop

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    except _Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the model's own precision whatever the caller casts to; all is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The same without parameter gradients."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
