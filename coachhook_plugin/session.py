"""A session: the hook layers living on one model, and everything needed to go on editing it.

Usage::

    session = EditSession(model, tokenizer, hparams)
    session.edit(requests)             # one batch; lands whole or not at all
    model.generate(...)                # answers with the edits
    with session.disabled(): ...       # the base model
    session.detach()                   # the model exactly as it was found
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import memory, statistics
from .activations import subject_keys, subject_values
from .architectures import context_length, key_size, model_parts, weight_shape
from .hook import HookLayer, Mode
from .hparams import CoachHooKHparams
from .in_place import InPlaceLayer
from .memory import KeyMemory
from .sampling import context_prefixes
from .scope import LeverageScope, Scope, ScopeState, Thresholds, ZScoreGate, ZScoreScope
from .tail import Comparison
from .target import Targets, optimise_targets
from .text import TextSource, text_source
from .tokens import Encoder, Request, micro_batches, parse_requests
from .trace import captured, frozen

LOG = logging.getLogger(__name__)

ATTRIBUTE = "_coachhook_session"  # where a model keeps its session; deepcopy takes it along


@dataclass(frozen=True)
class LayerState:
    """What a batch changes in one layer."""

    delta: torch.Tensor  # (d, m), float32: Wh - W0
    memory: KeyMemory


@dataclass(frozen=True)
class SessionState:
    """What a batch changes. Tensors are never changed in place, so a state stays valid and costs no copy."""

    layers: dict[int, LayerState]
    scope: ScopeState = None  # None without hook layers
    edits: int = 0
    batches: int = 0


@dataclass(frozen=True)
class EditResult:
    """What one batch did."""

    requests: list[Request]
    nll: list[float]  # mean NLL of each target with its target value in place
    steps: list[int]  # evaluations of the objective
    scope: ScopeState  # after the batch
    in_scope: list[bool]  # whether the plain prompt's subject opens the scope; where not, it keeps its old answer
    seconds: float


class EditSession:
    """Consecutive batch editing of one model.

    Args:
        model: a Hugging Face causal language model. Its weights stay as they are (unless `use_hooks` is off).
        tokenizer: its tokenizer; either padding side.
        hparams: see `CoachHooKHparams`.
        progress: show progress bars.

    Raises:
        ValueError, KeyError: the hyperparameters do not fit the model, or another session lives on it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, hparams: CoachHooKHparams, progress: bool = True) -> None:
        if EditSession.of(model) is not None:
            raise ValueError("this model has an edit session already; use EditSession.of(model), or detach that one")
        self.model, self.tokenizer, self.hparams = model, tokenizer, hparams
        self.progress = progress
        self._parts = model_parts(model, hparams)
        self._layers = hparams.edited_layers
        self._encoder = Encoder(tokenizer, context_length(model))
        self._prefixes: list[str] | None = hparams.context_prefixes
        self._state: SessionState | None = None  # None until the key statistics are there
        self._scope: Scope | None = None
        self._comparison = Comparison()
        self._hooks: dict[int, HookLayer] = {}
        self._written: dict[int, InPlaceLayer] = {}
        object.__setattr__(model, ATTRIBUTE, self)

    @staticmethod
    def of(model: nn.Module) -> EditSession | None:
        """The session that lives on this model."""
        session = getattr(model, ATTRIBUTE, None)
        return session if isinstance(session, EditSession) else None

    def __len__(self) -> int:
        """Number of edits in force."""
        return 0 if self._state is None else self._state.edits

    def __bool__(self) -> bool:
        return True  # a session without edits is still a session

    def __repr__(self) -> str:
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        batches = 0 if self._state is None else self._state.batches
        return f"EditSession({name!r}, edits={len(self)}, batches={batches}, layers={self._layers})"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    @property
    def prefixes(self) -> list[str]:
        """The context prefixes a fact is learned behind; sampled from the base model on first use."""
        if self._prefixes is None:
            with self.disabled(), frozen(self.model):
                self._prefixes = context_prefixes(self.model, self.tokenizer, self.hparams.seed, self.device)
        return self._prefixes

    @property
    def state(self) -> SessionState:
        """Everything the edits so far have made; `restore` returns to it bit for bit."""
        if self._state is None:
            self._state = self._initial_state()
        return self._state

    @torch.no_grad()
    def margins(self, ids: torch.Tensor) -> torch.Tensor:
        """How far each token is inside the editing scope, for token ids (T,) of one unpadded text.

        Returns:
            (T,): score over what is asked, the largest of all edited layers; tokens with 1 and more are answered by
            the edits. Without edits or hook layers -inf.
        """
        found = torch.full(ids.shape, -torch.inf)
        seen: dict[int, torch.Tensor] = {}
        handles = [
            self._parts.projections[layer].register_forward_pre_hook(
                lambda _, inputs, layer=layer: seen.update({layer: inputs[0]})
            )
            for layer in self._hooks
        ]
        try:
            last = self._parts.projections[self._layers[-1]]
            with frozen(self.model), captured(last, stop=True):
                self.model(input_ids=ids[None].to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for layer, key in seen.items():
            margin = self._hooks[layer].margin(key)
            if margin is not None:
                found = torch.maximum(found, margin.reshape(-1).to(found))
        return found

    def kept_bytes(self) -> int:
        """Memory held for the edits, beside the model's own weights; bounded, however many they are."""
        state = self.state
        holders = [self._scope, state.scope, *state.layers.values()]
        tensors = [value for holder in holders if holder is not None for value in vars(holder).values()]
        tensors += [layer.memory.matrix for layer in state.layers.values()]
        tensors += [buffer for hook in self._hooks.values() for buffer in hook.buffers()]
        tensors += [written.original for written in self._written.values()]
        stored = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(stored.values())

    @torch.inference_mode(False)  # whatever the caller is in: targets need gradients
    def edit(self, requests: Iterable[Mapping[str, Any] | Request], first: int = 0) -> EditResult:
        """Write one batch of facts (paper, algorithm 1). It lands whole or not at all.

        Args:
            requests: mappings with `prompt` (naming the subject once), `subject` and `target_new`.
            first: place of the batch in a longer list, from which messages count.

        Raises:
            ValueError, KeyError: a request cannot be edited (the message names it), or the session was detached.
                Nothing has changed.
        """
        started = time.perf_counter()
        self._check_living()
        parsed = self.check(requests, first)
        before = self.state
        try:
            self._attach()
            with frozen(self.model):
                targets, layers, scope = self._written_batch(parsed, first)
                in_scope = self._in_scope(parsed, first)
            self._state = SessionState(layers, scope, before.edits + len(parsed), before.batches + 1)
        except BaseException:
            self.restore(before)
            raise
        return EditResult(
            requests=parsed,
            nll=targets.nll,
            steps=targets.steps,
            scope=scope,
            in_scope=in_scope,
            seconds=time.perf_counter() - started,
        )

    def check(self, requests: Iterable[Mapping[str, Any] | Request], first: int = 0) -> list[Request]:
        """The batch as `edit` reads it, or the error that `edit` would raise; nothing is written.

        Args:
            first: place of the batch in a longer list, from which errors count.
        """
        parsed = parse_requests(requests, first)
        self._encoder.check_lengths(parsed, self.prefixes, first)
        return parsed

    def restore(self, state: SessionState) -> None:
        """Return to an earlier `state` of this session. Without edits in force nothing stays attached."""
        self._check_living()
        shapes = {layer: weight_shape(projection) for layer, projection in self._parts.projections.items()}
        if {layer: tuple(of.delta.shape) for layer, of in state.layers.items()} != shapes:
            raise ValueError(
                f"state: is that of a session on other layers or another model; give a `state` of {self!r} itself"
            )
        self._state = state
        if not state.edits:
            self._release()
            return
        self._attach()
        for layer in self._layers:
            self._show(layer, state.layers[layer])
        self._show_scope(state.scope)
        self._set_mode(Mode.VALIDATED)

    def detach(self) -> None:
        """Take everything off the model: its modules, hooks and weights are exactly as they were found."""
        self._release()
        self._state = None
        if EditSession.of(self.model) is self:
            delattr(self.model, ATTRIBUTE)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the `with` body; afterwards what was there before."""
        modes = {layer: hook.mode for layer, hook in self._hooks.items()}
        shown = [layer for layer, written in self._written.items() if not written.hidden]
        self._set_mode(Mode.OFF)
        for layer in shown:
            self._written[layer].hide()
        try:
            yield
        finally:
            for layer, mode in modes.items():
                if layer in self._hooks:
                    self._hooks[layer].mode = mode
            for layer in shown:
                if layer in self._written:
                    self._written[layer].show()

    def _check_living(self) -> None:
        if EditSession.of(self.model) is not self:
            raise ValueError("this session was detached from its model; start a new one with EditSession(model, ...)")

    def _written_batch(self, requests: list[Request], first: int) -> tuple[Targets, dict[int, LayerState], ScopeState]:
        """The three steps of one batch; returns the targets, and the new state of every layer and of the scope."""
        layers, scope = dict(self.state.layers), self.state.scope
        # Layers written towards one target; the last of them is where it stands.
        groups = [self._layers] if self.hparams.spread == "mean" else [[layer] for layer in self._layers]
        for group in groups:
            self._set_mode(Mode.VALIDATED)
            targets = self._targets(requests, group[-1], first)
            self._set_mode(Mode.TEMPORARY, group)
            for i, layer in enumerate(group):
                keys = self._keys(layer, requests)
                if layer == self._layers[0] and self._scope is not None:
                    scope = self._scope.after_keys(scope, keys)
                    self._show_scope(scope)
                layers[layer] = self._write(layer, layers[layer], requests, keys, targets, group[i:])
        if self._scope is not None and self._looks_ahead:
            for layer in self._layers:
                scope = self._scope.after_write(layer, scope, *self._norms(layer, requests))
                self._show_scope(scope)
        return targets, layers, scope

    def _targets(self, requests: list[Request], layer: int, first: int) -> Targets:
        """What the block of `layer` should answer at the subject's last token (paper: v_i)."""
        return optimise_targets(
            self.model,
            self._parts,
            self._encoder,
            requests,
            self.prefixes,
            self.hparams,
            layer,
            self.device,
            self.progress,
            self._comparison,
            first,
        )

    def _in_scope(self, requests: list[Request], first: int) -> list[bool]:
        """Whether each plain prompt's subject opens the scope, now that the batch is written; the others are told."""
        if self._scope is None:
            return [True] * len(requests)
        found = []
        for i, request in enumerate(requests, first):
            row = self._encoder.prompt("", request)
            found.append(bool(self.margins(torch.tensor(row.ids))[row.subject] >= 1))
            if not found[-1]:
                why = (
                    "it is the very first token of the text, which looks like every other first token; put a word "
                    "before it"
                    if row.subject == 0
                    else "too much other text looks like it; raise scope_budget, or name the subject more fully"
                )
                LOG.warning(
                    "request %d, subject: %r lies outside the editing scope in %r, which therefore keeps its old "
                    "answer: %s",
                    i,
                    request.subject,
                    request.prompt,
                    why,
                )
        return found

    def _keys(self, layer: int, requests: list[Request]) -> torch.Tensor:
        """(u, contexts, m)"""
        budget, projection = self.hparams.target_tokens, self._parts.projections[layer]
        return subject_keys(
            self.model, projection, self._encoder, requests, self.prefixes, budget, self.device, self._looks_ahead
        )

    @property
    def _looks_ahead(self) -> bool:
        return self._scope is not None and self._scope.looks_ahead

    def _write(
        self,
        layer: int,
        state: LayerState,
        requests: list[Request],
        keys: torch.Tensor,
        targets: Targets,
        layers_left: Sequence[int],
    ) -> LayerState:
        """Transformer memory updating of one layer (paper, section 3.2), the first of `layers_left`."""
        last = self._parts.blocks[layers_left[-1]]
        current = subject_values(
            self.model, last, self._encoder, requests, self.hparams.target_tokens, self.device, self._looks_ahead
        )  # (d, u)
        residual = memory.spread(targets.values.to(current.device), current, len(layers_left))  # (d, u)
        keys = memory.context_mean(keys).T.to(state.memory.matrix.device)  # (m, u)
        change = memory.update(residual.to(keys.device), state.memory.coefficients(keys))  # (d, m)
        if not change.isfinite().all():
            raise ValueError(
                f"the update of layer {layer} is not finite, and nothing was written; raise mom2_update_weight, or "
                "load the model in a wider dtype"
            )
        delta = (memory.working_precision(state.delta) + change.to(state.delta.device)).float()
        remembered = state.memory.remembering(keys) if self.hparams.accumulate else state.memory
        state = LayerState(delta, remembered)
        self._show(layer, state)
        if layer in self._hooks:
            self._hooks[layer].mode = Mode.VALIDATED
        return state

    def _norms(self, layer: int, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """||Delta k|| and which tokens are real, (2 u, T), of the batch's prompts, for rules that look ahead.

        Measured as at inference, shallower layers in force, and on each prompt both as it stands and with its target:
        an edited prompt must stay inside while its answer is being written.
        """
        gate = self._hooks[layer].gate
        assert isinstance(gate, ZScoreGate)
        rows = [[self._encoder.prompt("", request), self._encoder.with_target("", request)] for request in requests]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        gate.observer = lambda norms, mask: seen.append((norms, mask))
        try:
            with torch.no_grad():
                for chunk in micro_batches(rows, self.hparams.target_tokens):
                    batch = self._encoder.batch([row for i in chunk for row in rows[i]], self.device)
                    with captured(self._parts.projections[layer], stop=True):
                        self.model(**batch.model_inputs())
        finally:
            gate.observer = None
        norms, mask = (
            nn.utils.rnn.pad_sequence([row for part in parts for row in part], batch_first=True)
            for parts in zip(*seen, strict=True)
        )
        return norms, mask

    def _initial_state(self) -> SessionState:
        with self.disabled(), frozen(self.model):
            size = key_size(self._parts)
            # Read or written once, and only if somebody asks for it.
            text = functools.cache(lambda: text_source(self.model, self.tokenizer, self.hparams, size, self.device))
            found = statistics.key_statistics(self.model, self._parts, self.hparams, text, self.progress)
            layers = {}
            for layer, projection in self._parts.projections.items():
                covariance = _moved(found[layer].covariance(), projection)
                layers[layer] = LayerState(
                    delta=torch.zeros(self._parts.hidden_size, len(covariance), device=covariance.device),
                    memory=KeyMemory.of_covariance(covariance, self.hparams.mom2_update_weight),
                )
            self._scope = self._new_scope(found, text) if self.hparams.use_hooks else None
        return SessionState(layers, None if self._scope is None else self._scope.initial())

    def _new_scope(self, found: dict[int, statistics.KeyStatistics], text: Callable[[], TextSource]) -> Scope:
        hparams, first = self.hparams, self._layers[0]
        if hparams.scope == "zscore":
            start = Thresholds(hparams.alpha, hparams.short_prompt_ratio)
            return ZScoreScope(self.model, self._layers, start, hparams.dynamic_alpha)
        sample = statistics.pre_training_keys(self.model, self._parts, first, text())
        moments = _moved(found[first].covariance().diagonal(), self._parts.projections[first])
        return LeverageScope(self._layers, moments, sample, hparams.scope_budget, hparams.scope_ridge, hparams.seed)

    def _attach(self) -> None:
        """Hang hook layers as they are before any edit, where there are none."""
        if self._hooks or self._written:
            return
        if self._scope is None:
            self._written = {layer: InPlaceLayer(base) for layer, base in self._parts.projections.items()}
            return
        self._scope.attach()
        for layer, projection in self._parts.projections.items():
            self._hooks[layer] = HookLayer(projection, self._scope.gate(layer))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled before does not look for new hooks

    def _release(self) -> None:
        for layer, hook in self._hooks.items():
            hook.remove_from(self._parts.projections[layer])
        for written in self._written.values():
            written.remove()
        if self._scope is not None:
            self._scope.release()
        self._hooks, self._written = {}, {}

    def _show(self, layer: int, state: LayerState) -> None:
        """Let the model answer with this state of a layer."""
        if layer in self._hooks:
            self._hooks[layer].write(state.delta)
        else:
            self._written[layer].write(state.delta)

    def _show_scope(self, state: ScopeState) -> None:
        """Let the hook layers decide by this state of the scope."""
        for layer, hook in self._hooks.items():
            assert self._scope is not None
            self._scope.show(layer, hook.gate, state)

    def _set_mode(self, mode: Mode, layers: Sequence[int] | None = None) -> None:
        for layer, hook in self._hooks.items():
            if layers is None or layer in layers:
                hook.mode = mode


def _moved(matrix: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """A float64 matrix where the projection's weight is, as wide as that device has it."""
    weight = projection.weight
    assert isinstance(weight, torch.Tensor)
    return (matrix.float() if weight.device.type == "mps" else matrix).to(weight.device)
