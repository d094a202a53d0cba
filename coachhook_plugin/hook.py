"""HooK layers: modules that hang on a projection and carry its edits (paper, figures 1 and 2).

A hook layer is a child module named `coachhook` of the projection it serves. The projection keeps its class, its
parameters' names and their bits; a forward hook lets the child amend its output. `deepcopy`, `.to()` and `state_dict`
therefore see the hook layer like any other module.

With W0 the projection's weight and Wh = W0 + Delta, the projection has already computed W0 k (+ bias), so the hook's
answer is that plus Delta k. Which tokens get it is for the gate to say.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn
from torch.nn import functional as F

from .architectures import weight_shape
from .buffers import PreciseBuffers
from .scope import Gate
from .silence import Silence

CHILD = "coachhook"


class Mode(Enum):
    OFF = "off"  # the base model
    TEMPORARY = "temporary"  # Wh k for every token: while a batch is being written
    VALIDATED = "validated"  # Wh k for the tokens in scope: inference, and layers already written


class HookLayer(PreciseBuffers):
    """The edits of one projection, Delta = Wh - W0 (d, m) in float32, and the gate that opens them."""

    delta: torch.Tensor  # (d, m)

    def __init__(self, projection: nn.Module, gate: Gate, silence: Silence | None = None) -> None:
        super().__init__()
        weight = projection.weight
        assert isinstance(weight, torch.Tensor)
        self.register_buffer("delta", torch.zeros(weight_shape(projection), dtype=torch.float32, device=weight.device))
        self.gate = gate.to(weight.device)
        self.mode = Mode.OFF
        self._silence = silence or Silence()
        self.train(projection.training)
        self._handle = projection.register_forward_hook(self._answer)
        projection.add_module(CHILD, self)

    def remove_from(self, projection: nn.Module) -> None:
        self._handle.remove()
        delattr(projection, CHILD)

    def write(self, delta: torch.Tensor) -> None:
        """Replace Delta (d, m)."""
        self.delta = delta.to(self.delta.device)

    @property
    def silent(self) -> bool:
        """Whether this pass is the base model's, whatever the mode is."""
        # Compiled code does not ask again in which thread it runs; and in training, gradient checkpointing may run a
        # block once more in a thread of autograd's.
        if self.training or torch.compiler.is_compiling():
            return self._silence.for_all
        return self._silence.here

    def margin(self, key: torch.Tensor) -> torch.Tensor | None:
        """(...): how far each key (..., m) is inside the scope, see `Gate.margin`."""
        return self.gate.margin(key, lambda: self._change(key))

    def _answer(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        key = inputs[0]  # (..., m)
        if self.silent or self.mode is Mode.OFF:
            return None
        if self.mode is Mode.TEMPORARY:
            return output + self._change(key)
        changed: list[torch.Tensor] = []  # Delta k, where the gate asked for it

        def change() -> torch.Tensor:
            changed.append(self._change(key))
            return changed[0]

        open_ = self.gate(key, change)  # (..., 1)
        if open_ is None:
            return None
        if changed:
            return torch.where(open_, output + changed[0], output)
        if key.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.where(open_, output + self._change(key), output)
        # On the CPU a look at the decision is free, and most tokens are outside.
        rows = open_.flatten().nonzero().flatten()
        if not len(rows):
            return None
        amended = self._change(key.reshape(-1, key.shape[-1])[rows]).to(output.dtype)
        return output.reshape(-1, output.shape[-1]).index_add(0, rows, amended).view_as(output)

    def _change(self, key: torch.Tensor) -> torch.Tensor:
        """Delta k (..., d)."""
        return F.linear(key, self.in_dtype("delta", key.dtype))

    def extra_repr(self) -> str:
        d, m = self.delta.shape
        return f"d={d}, m={m}, mode={self.mode.value}"
