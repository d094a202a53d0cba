"""ROME, R-ROME, and SimIE around one of them: one fact at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .base import Peer
from .registry import TEMPLATES


class Rome(Peer):
    """ROME and R-ROME."""

    writes_one = True


class SimIE(Peer):
    """Its hyperparameters hold those of the method inside it, and what goes from one edit to the next."""

    writes_one = True
    globals_kept = (f"rome.rome_main:{TEMPLATES}",)

    def _kept(self) -> list[Any]:
        instance = getattr(self.hparams, "_simie_instance", None)  # a plain object
        return [*super()._kept(), None if instance is None else vars(instance)]

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        return {**super().state(), "simie": copy.deepcopy(self._own())}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for name in self._own():
            delattr(self.hparams, name)
        for name, value in state["simie"].items():
            setattr(self.hparams, name, copy.deepcopy(value))

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.hparams).items() if name.startswith("_simie_")}

    def _settings_parts(self) -> list[Any]:
        inner = getattr(self.hparams, "_base_hparams", None)
        return [self.hparams] if inner is None else [self.hparams, inner]
