"""The ablation without hook layers: edits are added to the projection's own weight, and taken out again exactly."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .architectures import is_transposed, weight_shape


class InPlaceLayer:
    """W = W0 + Delta, written into the model; `remove` puts the bits of W0 back."""

    def __init__(self, projection: nn.Module) -> None:
        self._weight = cast(nn.Parameter, projection.weight)
        self._transposed = is_transposed(projection)
        self.original = self._weight.detach().clone()
        self.hidden = False
        self.delta = torch.zeros(weight_shape(projection), dtype=torch.float32, device=self._weight.device)  # (d, m)

    @torch.no_grad()
    def write(self, delta: torch.Tensor) -> None:
        """Replace Delta (d, m)."""
        self.delta = delta
        self._show(delta)

    @torch.no_grad()
    def hide(self) -> None:
        """The base weight, until `show`."""
        self._weight.copy_(self.original)
        self.hidden = True

    @torch.no_grad()
    def show(self) -> None:
        self._show(self.delta)

    def remove(self) -> None:
        self.hide()

    def _show(self, delta: torch.Tensor) -> None:
        change = delta.T if self._transposed else delta
        wide = torch.promote_types(self.original.dtype, torch.float32)
        total = self.original.to(wide) + change.to(self.original.device)
        self._weight.copy_(total.to(self._weight.dtype))
        self.hidden = False
