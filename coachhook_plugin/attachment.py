"""What a session hangs on its model: hook layers, or without them edits in the weights themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .architectures import weight_shape
from .hook import HookLayer, Mode
from .in_place import InPlaceLayer
from .scope import Scope, ScopeState
from .silence import Silence
from .state import LayerState, SessionState


class Attachment:
    """The edited layers of one model; nothing hangs there before `attach` and after `release`.

    Args:
        projections: the edited projections, by layer.
    """

    def __init__(self, projections: dict[int, nn.Module]) -> None:
        self.hooks: dict[int, HookLayer] = {}
        self._written: dict[int, InPlaceLayer] = {}
        self._projections = projections
        self._scope: Scope | None = None
        self._silence = Silence()

    def attach(self, scope: Scope | None) -> None:
        """Hang hook layers as they are before any edit, where there are none; without a scope write in place."""
        if self.hooks or self._written:
            return
        if scope is None:
            self._written = {layer: InPlaceLayer(base) for layer, base in self._projections.items()}
            return
        self._scope = scope
        scope.attach()
        for layer, projection in self._projections.items():
            self.hooks[layer] = HookLayer(projection, scope.gate(layer), self._silence)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled before does not look for new hooks

    def carry(self, state: SessionState, scope: Scope | None) -> None:
        """Let the model answer with a session's state; without edits in force nothing stays attached."""
        if not state.edits:
            self.release()
            return
        with self.answering():
            self.attach(scope)
            for layer in self._projections:
                self.show(layer, state.layers[layer].delta)
            if state.scope is not None:
                self.show_scope(state.scope)
            self.set_mode(Mode.VALIDATED)

    def fits(self, layers: Mapping[int, LayerState]) -> bool:
        """Whether these are changes of just these layers, (d, m) each."""
        shapes = {layer: weight_shape(projection) for layer, projection in self._projections.items()}
        return {layer: tuple(of.delta.shape) for layer, of in layers.items()} == shapes

    def shows(self, layers: Mapping[int, LayerState]) -> bool:
        """Whether the hook layers have these changes, and not others that somebody else put there."""
        return all(
            hook.delta is layers[layer].delta or torch.equal(hook.delta.cpu(), layers[layer].delta.cpu())
            for layer, hook in self.hooks.items()
        )

    def release(self) -> None:
        """Leave the model as it was found."""
        for layer, hook in self.hooks.items():
            hook.remove_from(self._projections[layer])
        for written in self._written.values():
            written.remove()
        if self._scope is not None:
            self._scope.release()
        self.hooks, self._written, self._scope = {}, {}, None

    def show(self, layer: int, delta: torch.Tensor) -> None:
        """Let the model answer with this change (d, m) of a layer."""
        if layer in self.hooks:
            self.hooks[layer].write(delta)
        else:
            self._written[layer].write(delta)

    def show_scope(self, state: ScopeState) -> None:
        """Let the hook layers decide by this state of the scope."""
        for layer, hook in self.hooks.items():
            assert self._scope is not None
            self._scope.show(layer, hook.gate, state)

    def set_mode(self, mode: Mode, layers: Sequence[int] | None = None) -> None:
        for layer, hook in self.hooks.items():
            if layers is None or layer in layers:
                hook.mode = mode

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the `with` body, whatever is attached or released there; afterwards the edits.

        With hook layers it is so for this thread alone, except in training and in compiled code. That and weights
        written in place are without edits for all threads.
        """
        with self._silence.body(True, self._settle):
            yield

    @contextmanager
    def answering(self) -> Iterator[None]:
        """The edits inside the `with` body, also within one of `disabled`: they are written, or looked at."""
        with self._silence.body(False, self._settle):
            yield

    def _settle(self, hidden: bool) -> None:
        for written in self._written.values():
            if hidden and not written.hidden:
                written.hide()
            elif written.hidden and not hidden:
                written.show()

    def tensors(self) -> list[torch.Tensor]:
        """What is held beside the model's own weights."""
        held = [buffer for hook in self.hooks.values() for buffer in hook.buffers()]
        return held + [written.original for written in self._written.values()]
