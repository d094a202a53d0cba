"""Writing one batch of facts: targets, then keys, residuals and updates layer by layer, and what the scope learns.

Every layer shows the model what was written to it before the next one is looked at. The session around it takes all of
it back where a step fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from . import memory, probe
from .activations import opening_keys, subject_keys, subject_values
from .architectures import ModelParts
from .attachment import Attachment
from .hook import Mode
from .hparams import CoachHooKHparams
from .ledger import Edit
from .observation import Comparison
from .scope import Scope, ScopeState, ZScoreGate
from .state import Factors, LayerState, SessionState
from .target import Targets, optimise_targets
from .tokens import Encoder, Places, Request


@dataclass(frozen=True)
class Written:
    """What a batch made of a state."""

    targets: Targets  # at the last layer
    factors: dict[int, Factors]  # what was written to each layer
    layers: dict[int, LayerState]
    scope: ScopeState


@dataclass(frozen=True)
class BatchWriter:
    """Writes batches into the hook layers (or weights) that are attached to a model; the model must be frozen."""

    model: nn.Module
    parts: ModelParts
    encoder: Encoder
    prefixes: list[str]
    hparams: CoachHooKHparams
    attached: Attachment
    scope: Scope | None
    comparison: Comparison
    progress: bool

    def write(self, requests: list[Request], before: SessionState, first: Places) -> Written:
        """One batch on top of `before` (paper, algorithm 1).

        Args:
            first: what messages call the requests, see `tokens.place`.

        Raises:
            ValueError: a target or an update is not finite.
        """
        layers, scope = dict(before.layers), before.scope
        factors: dict[int, Factors] = {}
        every = self.hparams.edited_layers
        # Layers written towards one target; the last of them is where it stands.
        groups = [every] if self.hparams.spread == "mean" else [[layer] for layer in every]
        for group in groups:
            self.attached.set_mode(Mode.VALIDATED)
            targets = self._targets(requests, group[-1], first)
            self.attached.set_mode(Mode.TEMPORARY, group)
            for i, layer in enumerate(group):
                keys = self._keys(layer, requests, trees=targets.trees)
                if layer == every[0] and self.scope is not None:
                    scope = self._learned(self.scope, scope, requests, keys)
                    self.attached.show_scope(scope)
                factors[layer] = self._factors(layers[layer], requests, keys, targets, group[i:])
                layers[layer] = self._updated(layer, layers[layer], factors[layer])
        return Written(targets, factors, layers, self._looked_ahead(scope, requests))

    def scope_of(self, edits: Sequence[Edit]) -> ScopeState:
        """The scope's state had only these edits been made, whose Delta is in force."""
        if self.scope is None:
            return None
        scope = self.scope.initial()
        if not edits:
            return scope
        requests = [Request(edit.prompt, edit.subject, edit.target_new) for edit in edits]
        self.attached.set_mode(Mode.VALIDATED)
        for _, batch in groupby(zip(edits, requests, strict=True), key=lambda pair: pair[0].step):
            written = [request for _, request in batch]
            scope = self._learned(self.scope, scope, written, self._keys(self.hparams.edited_layers[0], written))
        self.attached.show_scope(scope)
        return self._looked_ahead(scope, requests)

    def in_scope(self, requests: Sequence[Request], first: Places) -> list[bool]:
        """Whether each plain prompt's subject opens the scope; the user is told where it does not."""
        if self.scope is None:
            return [True] * len(requests)
        budget = self.hparams.target_tokens
        return probe.in_scope(self.model, self.parts, self.attached.hooks, self.encoder, requests, budget, first)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _looks_ahead(self) -> bool:
        return self.scope is not None and self.scope.looks_ahead

    def _targets(self, requests: list[Request], layer: int, first: Places) -> Targets:
        """What the block of `layer` should answer at the subject's last token (paper: v_i)."""
        return optimise_targets(
            self.model,
            self.parts,
            self.encoder,
            requests,
            self.prefixes,
            self.hparams,
            layer,
            self._device,
            self.progress,
            self.comparison,
            first,
        )

    def _keys(self, layer: int, requests: list[Request], trees: bool = False) -> torch.Tensor:
        """(u, contexts, m)"""
        return subject_keys(
            self.model,
            self.parts.projections[layer],
            self.encoder,
            requests,
            self.prefixes,
            self.hparams.target_tokens,
            self._device,
            self._looks_ahead,
            trees,
        )

    def _learned(self, rule: Scope, before: ScopeState, requests: list[Request], keys: torch.Tensor) -> ScopeState:
        """The scope's state once it knows a batch by its keys (u, contexts, m) at the first edited layer."""
        if rule.looks_ahead:  # learns once the batch is written
            return before
        projection = self.parts.projections[self.hparams.edited_layers[0]]
        budget = self.hparams.target_tokens
        opening = opening_keys(self.model, projection, self.encoder, requests, budget, self._device)
        # As it comes back from a folder: arithmetic may round differently on another memory layout.
        return rule.unpack(rule.pack(rule.after_keys(before, keys, opening)))

    def _factors(
        self,
        state: LayerState,
        requests: list[Request],
        keys: torch.Tensor,
        targets: Targets,
        layers_left: Sequence[int],
    ) -> Factors:
        """Transformer memory updating of one layer (paper, section 3.2), the first of `layers_left`."""
        last = self.parts.blocks[layers_left[-1]]
        current = subject_values(
            self.model,
            last,
            self.encoder,
            requests,
            self.hparams.target_tokens,
            self._device,
            self._looks_ahead,
            trees=targets.trees,
        )  # (d, u)
        residual = memory.spread(targets.values.to(current.device), current, len(layers_left))  # (d, u)
        assert state.memory is not None
        keys = memory.on_grid(memory.context_mean(keys).T.to(state.delta.device))  # (m, u)
        coefficients = memory.on_grid(state.memory.coefficients(keys))  # (m, u)
        residual = memory.on_grid(residual).to(keys.device)
        return Factors(residual, coefficients, keys if self.hparams.accumulate else None)

    def _updated(self, layer: int, before: LayerState, factors: Factors) -> LayerState:
        state = factors.written(before, 1)
        if not state.delta.isfinite().all():
            raise ValueError(
                f"the update of layer {layer} is not finite, and nothing was written; raise mom2_update_weight, or "
                "load the model in a wider dtype"
            )
        self.attached.show(layer, state.delta)
        self.attached.set_mode(Mode.VALIDATED, [layer])
        return state

    def _looked_ahead(self, scope: ScopeState, requests: list[Request]) -> ScopeState:
        """The scope's state once it has seen what the layers now make of these prompts."""
        if self.scope is None or not self.scope.looks_ahead:
            return scope
        for layer in self.hparams.edited_layers:
            gate, projection = self.attached.hooks[layer].gate, self.parts.projections[layer]
            assert isinstance(gate, ZScoreGate)
            budget = self.hparams.target_tokens
            norms = probe.change_norms(self.model, projection, gate, self.encoder, requests, budget)
            scope = self.scope.after_write(layer, scope, *norms)
            self.attached.show_scope(scope)
        return scope
