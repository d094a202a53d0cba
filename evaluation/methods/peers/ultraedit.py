"""UltraEdit: one linear solve for a batch, on gradients that a running normalizer scales."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .base import Peer, set_batch_size


class UltraEdit(Peer):
    """What goes from one batch to the next beside the weights is its normalizer, where the toolkit keeps one: at
    14cea82 every call makes a new one, as nothing sets `is_init`."""

    globals_kept = ()

    def _write(self, requests: list[dict[str, Any]]) -> None:
        set_batch_size(self.hparams, len(requests))  # it writes as many as this says, whatever it is given
        super()._write(requests)

    def _kept(self) -> list[Any]:
        return [*super()._kept(), self._normalizer()]

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        return {**super().state(), "normalizer": copy.deepcopy(self._normalizer())}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        executor = self._executor()
        if executor.is_init:
            executor.reset_model()
        if state["normalizer"] is not None:
            executor.init_model(self.model, self.tokenizer, self.hparams)
            executor.is_init = True
            executor.alg.lifelong_normalizer.load_state_dict(state["normalizer"])

    def _normalizer(self) -> dict[str, Any] | None:
        executor = self._executor()
        return executor.alg.lifelong_normalizer.state_dict() if executor.is_init else None

    def _executor(self) -> Any:
        return self.editor.apply_algo.__self__
