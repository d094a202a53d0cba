"""What a session hangs on its model: hook layers, or without them edits in the weights themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .hook import HookLayer, Mode
from .in_place import InPlaceLayer
from .scope import Scope, ScopeState


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
            self.hooks[layer] = HookLayer(projection, scope.gate(layer))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled before does not look for new hooks

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
        """The base model inside the `with` body; afterwards what was there before."""
        modes = {layer: hook.mode for layer, hook in self.hooks.items()}
        shown = [layer for layer, written in self._written.items() if not written.hidden]
        self.set_mode(Mode.OFF)
        for layer in shown:
            self._written[layer].hide()
        try:
            yield
        finally:
            for layer, mode in modes.items():
                if layer in self.hooks:
                    self.hooks[layer].mode = mode
            for layer in shown:
                if layer in self._written:
                    self._written[layer].show()

    def tensors(self) -> list[torch.Tensor]:
        """What is held beside the model's own weights."""
        held = [buffer for hook in self.hooks.values() for buffer in hook.buffers()]
        return held + [written.original for written in self._written.values()]
