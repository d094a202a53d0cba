"""A session: the hook layers living on one model, and everything needed to go on editing it.

Usage::

    session = EditSession(model, tokenizer, hparams)
    session.edit(requests)             # one batch; lands whole or not at all
    model.generate(...)                # answers with the edits
    with session.disabled(): ...       # the base model
    session.rollback(to=3)             # as after the third batch
    session.forget(["2-1"])            # without the first fact of the second batch
    session.save("edits/")             # and elsewhere: load_edits(model, "edits/")
    session.detach()                   # the model exactly as it was found
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import memory, probe, statistics, store
from .activations import subject_keys, subject_values
from .architectures import context_length, key_size, model_parts, weight_device, weight_shape
from .attachment import Attachment
from .fingerprint import weights_fingerprint
from .hook import Mode
from .hparams import CoachHooKHparams
from .ledger import Edit, Ledger, lines_of_batch, to_forget, with_lines
from .memory import KeyMemory
from .observation import Comparison
from .sampling import context_prefixes
from .scope import LeverageScope, Scope, ScopeState, Thresholds, ZScoreGate, ZScoreScope
from .state import Factors, History, LayerState, SessionState, Snapshot, Step, changes
from .store import Contents, FolderError, Journal, Record
from .store.files import lock
from .target import Targets, optimise_targets
from .text import TextSource, text_source
from .tokens import Encoder, Request, parse_requests
from .trace import frozen

LOG = logging.getLogger(__name__)

ATTRIBUTE = "_coachhook_session"  # where a model keeps its session; deepcopy takes it along
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EditResult:
    """What one batch did."""

    requests: list[Request]
    nll: list[float]  # mean NLL of each target with its target value in place
    steps: list[int]  # evaluations of the objective
    scope: ScopeState  # after the batch
    in_scope: list[bool]  # whether the plain prompt's subject opens the scope; where not, it keeps its old answer
    seconds: float
    ids: list[str]  # in the ledger
    superseded: list[str]  # ids of earlier edits of the same subject and prompt


class EditSession:
    """Consecutive batch editing of one model.

    Args:
        model: a Hugging Face causal language model. Its weights stay as they are (unless `use_hooks` is off).
        tokenizer: its tokenizer; either padding side.
        hparams: see `CoachHooKHparams`. With `session_dir` every batch is in that folder when `edit` returns.
        progress: show progress bars.

    Raises:
        ValueError, KeyError: the hyperparameters do not fit the model, or another session lives on it or writes to
            `session_dir`.
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
        looks_ahead = hparams.use_hooks and hparams.scope == "zscore"  # a token tree is for models that do not
        self._comparison = Comparison(trees=False if looks_ahead else None)
        self._attached = Attachment(self._parts.projections)
        self._journal = Journal.start(hparams.session_dir) if hparams.session_dir else None
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
        step = 0 if self._state is None else self._state.step
        folder = "" if self._journal is None else f", session_dir={str(self._journal.folder)!r}"
        return f"EditSession({name!r}, edits={len(self)}, step={step}, layers={self._layers}{folder})"

    @property
    def ledger(self) -> Ledger:
        """Every fact that was written, oldest first, and what became of it."""
        return () if self._state is None else self._state.ledger

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

    def margins(self, ids: torch.Tensor) -> torch.Tensor:
        """How far each token is inside the editing scope, for token ids (T,) of one unpadded text.

        Returns:
            (T,): score over what is asked, the largest of all edited layers; tokens with 1 and more are answered by
            the edits. Without edits or hook layers -inf.
        """
        return probe.margins(self.model, self._parts, self._attached.hooks, ids)

    def kept_bytes(self) -> int:
        """Memory held for the edits, beside the model's own weights; bounded, however many they are."""
        state = self.state
        holders = [self._scope, state.scope, *state.layers.values()]
        tensors = [value for holder in holders if holder is not None for value in vars(holder).values()]
        tensors += [layer.memory.matrix for layer in state.layers.values() if layer.memory is not None]
        tensors += [] if state.history is None else state.history.tensors()
        tensors += self._attached.tensors()
        stored = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(stored.values())

    @torch.inference_mode(False)  # whatever the caller is in: targets need gradients
    def edit(self, requests: Iterable[Mapping[str, Any] | Request], first: int = 0) -> EditResult:
        """Write one batch of facts (paper, algorithm 1). It lands whole or not at all.

        Args:
            requests: mappings with `prompt` (naming the subject once), `subject` and `target_new`.
            first: place of the batch in a longer list, from which messages count.

        Raises:
            ValueError, KeyError: a request cannot be edited (the message names it), the session was detached or loaded
                without what editing needs, or its folder cannot be written. Nothing has changed.
        """
        started = time.perf_counter()
        parsed = self.check(requests, first)
        before = self.state
        try:
            self._attached.attach(self._scope)
            with frozen(self.model):
                targets, factors, layers, scope = self._written_batch(parsed, first)
                in_scope = self._in_scope(parsed, first)
            asked = None if self._scope is None else self._scope.asked(scope)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            lines = lines_of_batch(before.ledger, before.step + 1, now, parsed, targets.nll, asked, in_scope)
            self._take(self._next(before, factors, layers, scope, lines))
        except BaseException:
            self._back(before)
            raise
        superseded = [line.id for line in lines if not line.in_force]
        if superseded:
            LOG.info("step %d supersedes the edits %s of the same facts", before.step + 1, ", ".join(superseded))
        return EditResult(
            requests=parsed,
            nll=targets.nll,
            steps=targets.steps,
            scope=scope,
            in_scope=in_scope,
            seconds=time.perf_counter() - started,
            ids=[line.id for line in lines if line.in_force],
            superseded=superseded,
        )

    def check(self, requests: Iterable[Mapping[str, Any] | Request], first: int = 0) -> list[Request]:
        """The batch as `edit` reads it, or the error that `edit` would raise; nothing is written.

        Args:
            first: place of the batch in a longer list, from which errors count.
        """
        self._check_editable()
        parsed = parse_requests(requests, first)
        self._encoder.check_lengths(parsed, self.prefixes, first)
        return parsed

    @torch.inference_mode(False)  # as in `edit`, which goes on from what this makes
    def forget(self, edit_ids: Iterable[str]) -> Ledger:
        """Take single facts back, and with each what it superseded; the other edits stay.

        Their share is taken out of Delta and of the memory, and their keys out of the scope, which is calibrated on
        the facts that are left. That makes one step, which `rollback` can undo.

        Args:
            edit_ids: of edits in force, as `ledger` names them.

        Returns:
            Their lines of the ledger, which stay there.

        Raises:
            ValueError, KeyError: no such edit is in force, or it is older than what `history_steps` keeps. Nothing has
                changed.
        """
        self._check_editable()
        before = self.state
        gone = to_forget(before.ledger, edit_ids)
        assert before.history is not None
        factors = before.history.factors_of(gone)
        layers = {layer: factors[layer].on(of.delta.device).written(of, -1) for layer, of in before.layers.items()}
        step = before.step + 1
        lines = tuple(replace(edit, status="forgotten", by=str(step)) for edit in gone if edit.in_force)
        try:
            self._attached.attach(self._scope)
            for layer, of in layers.items():
                self._attached.show(layer, of.delta)
            forgotten = {line.id for line in lines}
            left = [edit for edit in before.ledger if edit.in_force and edit.id not in forgotten]
            with frozen(self.model):
                scope = self._scope_of(left)
            self._take(self._next(before, factors, layers, scope, lines, sign=-1))
        except BaseException:
            self._back(before)
            raise
        return lines

    @torch.inference_mode(False)
    def rollback(self, to: int) -> None:
        """Return to the state after step `to`, bit for bit; 0 is the beginning. Later steps leave the ledger, too.

        Raises:
            ValueError: there is no such step, or it is older than what `history_steps` keeps.
        """
        self._check_living()
        state = self.state
        first = state.step if state.history is None else state.history.base.step
        if not first <= to <= state.step:
            raise ValueError(f"to: is {to}; this session can return to steps {first} to {state.step} (history_steps)")
        if to != state.step and state.history is not None:
            self.restore(self._placed(state.history.at(to), state.history.until(to)))

    @torch.inference_mode(False)
    def restore(self, state: SessionState) -> None:
        """Return to an earlier `state` of this session. Without edits in force nothing stays attached."""
        self._check_living()
        shapes = {layer: weight_shape(projection) for layer, projection in self._parts.projections.items()}
        if {layer: tuple(of.delta.shape) for layer, of in state.layers.items()} != shapes:
            raise ValueError(
                f"state: is that of a session on other layers or another model; give a `state` of {self!r} itself"
            )
        before = self.state
        try:
            self._take(state)
        except BaseException:
            self._back(before)
            raise

    def save(self, folder: str | Path, memory: bool = True) -> None:
        """Write the edits to a folder that `load_edits` reads, whole or not at all. The model itself is not in it.

        Args:
            folder: made where there is none; edits that it holds are replaced.
            memory: with what it takes to go on editing, to roll back and to forget, for each edited layer a matrix
                (m, m) in float64 and more.

        Raises:
            ValueError: the folder cannot be written, another session writes to it, or the model was given other edits
                than the session's (`load_state_dict`).
        """
        self._check_living()
        self._check_shown()
        record = self._record()
        if memory and record.state.history is None:
            raise ValueError("memory: these edits were loaded without it; save with memory=False")
        if self._journal is not None and self._journal.folder.resolve() == Path(folder).resolve():
            if not memory:
                raise ValueError(f"memory: {folder} is this session's own folder, which needs it")
            self._journal.rewrite(record)
            return
        held = lock(Path(folder))
        try:
            store.write(Path(folder), record, memory)
        finally:
            held.release()

    @classmethod
    def resume(cls, folder: str | Path, model: nn.Module, tokenizer: Any = None, progress: bool = True) -> EditSession:
        """Go on with the session of a folder, at its last whole batch; every further batch is written there.

        Args:
            model: the base model of those edits, without a session.
            tokenizer: its tokenizer; without it the session can do all but `edit` and `forget`.

        Raises:
            ValueError: as `load_edits`, or the folder lacks memory.safetensors, or another session writes to it.
        """
        if not store.holds_edits(Path(folder)):
            raise FolderError(f"{folder}: holds no session; start one with session_dir in the hyperparameters")
        journal = Journal(folder)
        try:
            contents = store.read(Path(folder))
            if contents.history is None:
                raise FolderError(f"{folder}: memory.safetensors is missing, without which a session cannot go on")
            session = cls.of_contents(contents, model, tokenizer, progress)
            session.hparams = replace(session.hparams, session_dir=str(folder))
            journal.adopt(contents)
        except BaseException:
            journal.close()
            raise
        session._journal = journal
        return session

    @classmethod
    @torch.inference_mode(False)
    def of_contents(cls, contents: Contents, model: nn.Module, tokenizer: Any, progress: bool) -> EditSession:
        """The session that a folder tells of, in memory; see `load_edits`."""
        session = cls(model, tokenizer, contents.hparams, progress)
        try:
            told, found = contents.manifest.fingerprint, session._fingerprint()
            if told != found:
                raise FolderError(
                    f"these edits were made on {contents.manifest.base_model!r} in {contents.manifest.dtype}, and "
                    "this model has other weights; load that model, in that dtype"
                )
            session._prefixes = contents.manifest.prefixes
            session._scope = session._loaded_scope(contents.constants)
            session._take(session._placed(contents.snapshot, contents.history))
            for layer, buffers in (contents.gates or {}).items():
                session._attached.hooks[layer].gate.fill(buffers)
        except BaseException:
            session.detach()
            raise
        return session

    def keep_in(self, folder: str | Path) -> None:
        """Write everything so far, and every further batch before `edit` returns, to a folder without edits.

        Raises:
            ValueError: the folder holds edits, another session writes to it, or it cannot be written.
        """
        self._check_editable()
        journal = Journal.start(folder)
        try:
            journal.sync(self.state, self._record)
        except BaseException:
            journal.close()
            raise
        self.close()
        self._journal = journal

    def close(self) -> None:
        """Stop writing to the session's folder and leave it to others; the edits stay in force, in memory."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def detach(self) -> None:
        """Take everything off the model: its modules, hooks and weights are exactly as they were found."""
        self.close()
        self._attached.release()
        self._state = None
        if EditSession.of(self.model) is self:
            delattr(self.model, ATTRIBUTE)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the `with` body; afterwards what was there before."""
        with self._attached.disabled():
            yield

    def _check_living(self) -> None:
        if EditSession.of(self.model) is not self:
            raise ValueError("this session was detached from its model; start a new one with EditSession(model, ...)")

    def _check_shown(self) -> None:
        state = self.state
        for layer, hook in self._attached.hooks.items():
            if not torch.equal(hook.delta.cpu(), state.layers[layer].delta.cpu()):
                raise ValueError(
                    "the model was given other edits than this session's, perhaps by load_state_dict; keep those with "
                    "model.state_dict(), or return to the session's with session.restore(session.state)"
                )

    def _check_editable(self) -> None:
        self._check_living()
        if self._state is not None and self._state.history is None:
            raise ValueError("these edits were loaded without memory.safetensors, which editing goes on from")
        if self.tokenizer is None:
            raise ValueError("these edits were loaded without a tokenizer; give it to load_edits or resume")

    def _take(self, state: SessionState) -> None:
        """Let the model and the session's folder tell of `state`."""
        self._set(state)
        if self._journal is not None:
            self._journal.sync(state, self._record)

    def _back(self, state: SessionState) -> None:
        """The same after a failure, whose cause shall reach the caller."""
        self._set(state)
        if self._journal is not None:
            with suppress(FolderError):
                self._journal.undo(state, self._record)

    def _set(self, state: SessionState) -> None:
        self._state = state
        if not state.edits:
            self._attached.release()
            return
        self._attached.attach(self._scope)
        for layer in self._layers:
            self._attached.show(layer, state.layers[layer].delta)
        if state.scope is not None:
            self._attached.show_scope(state.scope)
        self._attached.set_mode(Mode.VALIDATED)

    def _next(
        self,
        before: SessionState,
        factors: dict[int, Factors],
        layers: dict[int, LayerState],
        scope: ScopeState,
        lines: Ledger,
        sign: int = 1,
    ) -> SessionState:
        """The state one step after `before`."""
        packed, ledger, number = self._packed(scope), with_lines(before.ledger, lines), before.step + 1
        told = changes(self._packed(before.scope), packed)
        step = Step({layer: of.on(CPU) for layer, of in factors.items()}, told, lines, sign)
        assert before.history is not None
        history = before.history.followed(
            step,
            self.hparams.history_steps,
            lambda: Snapshot({layer: of.on(CPU) for layer, of in layers.items()}, packed, ledger, number),
        )
        return SessionState(layers, scope, ledger, number, history)

    def _packed(self, scope: ScopeState) -> dict[str, torch.Tensor]:
        return {} if self._scope is None else self._scope.pack(scope)

    def _placed(self, snapshot: Snapshot, history: History | None) -> SessionState:
        """A snapshot as a state of this session, on the devices of the edited layers."""
        devices = {layer: weight_device(projection) for layer, projection in self._parts.projections.items()}
        layers = {layer: of.on(devices[layer]) for layer, of in snapshot.layers.items()}
        scope = self._scope.unpack(snapshot.scope) if self._scope is not None and snapshot.scope else None
        return SessionState(layers, scope, snapshot.ledger, snapshot.step, history)

    def _scope_of(self, edits: Sequence[Edit]) -> ScopeState:
        """The scope's state had only these edits been made, whose Delta is in force."""
        if self._scope is None:
            return None
        scope = self._scope.initial()
        if not edits:
            return scope
        requests = [Request(edit.prompt, edit.subject, edit.target_new) for edit in edits]
        self._attached.set_mode(Mode.VALIDATED)
        for _, batch in groupby(zip(edits, requests, strict=True), key=lambda pair: pair[0].step):
            keys = self._keys(self._layers[0], [request for _, request in batch])
            scope = self._told(self._scope.after_keys(scope, keys))
        self._attached.show_scope(scope)
        return self._looked_ahead(scope, requests)

    def _told(self, scope: ScopeState) -> ScopeState:
        """The state as it comes back from a folder: arithmetic may round differently on another memory layout."""
        assert self._scope is not None
        return self._scope.unpack(self._scope.pack(scope))

    def _looked_ahead(self, scope: ScopeState, requests: list[Request]) -> ScopeState:
        """The scope's state once it has seen what the layers now make of these prompts."""
        if self._scope is None or not self._looks_ahead:
            return scope
        for layer in self._layers:
            gate, projection = self._attached.hooks[layer].gate, self._parts.projections[layer]
            assert isinstance(gate, ZScoreGate)
            budget = self.hparams.target_tokens
            norms = probe.change_norms(self.model, projection, gate, self._encoder, requests, budget)
            scope = self._scope.after_write(layer, scope, *norms)
            self._attached.show_scope(scope)
        return scope

    def _fingerprint(self) -> str:
        with self.disabled():
            return weights_fingerprint(self.model, self._parts.projections.values())

    def _record(self) -> Record:
        """What a folder shall tell."""
        named = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        return Record(
            state=self.state,
            hparams=self.hparams,
            prefixes=self._prefixes,
            base_model=named,
            dtype=str(next(iter(self._parts.projections.values())).weight.dtype).removeprefix("torch."),
            fingerprint=self._fingerprint(),
            gates={layer: dict(hook.gate.named_buffers()) for layer, hook in self._attached.hooks.items()},
            constants={} if self._scope is None else self._scope.constants(),
        )

    def _written_batch(
        self, requests: list[Request], first: int
    ) -> tuple[Targets, dict[int, Factors], dict[int, LayerState], ScopeState]:
        """The three steps of one batch; returns the targets, what is written to every layer, and the new states."""
        layers, scope = dict(self.state.layers), self.state.scope
        factors: dict[int, Factors] = {}
        # Layers written towards one target; the last of them is where it stands.
        groups = [self._layers] if self.hparams.spread == "mean" else [[layer] for layer in self._layers]
        for group in groups:
            self._attached.set_mode(Mode.VALIDATED)
            targets = self._targets(requests, group[-1], first)
            self._attached.set_mode(Mode.TEMPORARY, group)
            for i, layer in enumerate(group):
                keys = self._keys(layer, requests, trees=self._comparison.trees is True)
                if layer == self._layers[0] and self._scope is not None:
                    scope = self._told(self._scope.after_keys(scope, keys))
                    self._attached.show_scope(scope)
                factors[layer] = self._factors(layer, layers[layer], requests, keys, targets, group[i:])
                layers[layer] = self._write(layer, layers[layer], factors[layer])
        return targets, factors, layers, self._looked_ahead(scope, requests)

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
        if self._scope is None:
            return [True] * len(requests)
        budget = self.hparams.target_tokens
        return probe.in_scope(self.model, self._parts, self._attached.hooks, self._encoder, requests, budget, first)

    def _keys(self, layer: int, requests: list[Request], trees: bool = False) -> torch.Tensor:
        """(u, contexts, m)"""
        budget, projection = self.hparams.target_tokens, self._parts.projections[layer]
        return subject_keys(
            self.model,
            projection,
            self._encoder,
            requests,
            self.prefixes,
            budget,
            self.device,
            self._looks_ahead,
            trees,
        )

    @property
    def _looks_ahead(self) -> bool:
        return self._scope is not None and self._scope.looks_ahead

    def _factors(
        self,
        layer: int,
        state: LayerState,
        requests: list[Request],
        keys: torch.Tensor,
        targets: Targets,
        layers_left: Sequence[int],
    ) -> Factors:
        """Transformer memory updating of one layer (paper, section 3.2), the first of `layers_left`."""
        last = self._parts.blocks[layers_left[-1]]
        current = subject_values(
            self.model,
            last,
            self._encoder,
            requests,
            self.hparams.target_tokens,
            self.device,
            self._looks_ahead,
            trees=self._comparison.trees is True,
        )  # (d, u)
        residual = memory.spread(targets.values.to(current.device), current, len(layers_left))  # (d, u)
        assert state.memory is not None
        keys = memory.on_grid(memory.context_mean(keys).T.to(state.delta.device))  # (m, u)
        coefficients = memory.on_grid(state.memory.coefficients(keys))  # (m, u)
        residual = memory.on_grid(residual).to(keys.device)
        return Factors(residual, coefficients, keys if self.hparams.accumulate else None)

    def _write(self, layer: int, before: LayerState, factors: Factors) -> LayerState:
        state = factors.written(before, 1)
        if not state.delta.isfinite().all():
            raise ValueError(
                f"the update of layer {layer} is not finite, and nothing was written; raise mom2_update_weight, or "
                "load the model in a wider dtype"
            )
        self._attached.show(layer, state.delta)
        self._attached.set_mode(Mode.VALIDATED, [layer])
        return state

    @torch.inference_mode(False)
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
                    memory=KeyMemory.of_covariance(
                        covariance, self.hparams.mom2_update_weight, self.hparams.memory_device
                    ),
                )
            self._scope = self._new_scope(found, text) if self.hparams.use_hooks else None
        scope = None if self._scope is None else self._scope.initial()
        base = Snapshot({layer: of.on(CPU) for layer, of in layers.items()}, self._packed(scope))
        return SessionState(layers, scope, history=History(base))

    def _new_scope(self, found: dict[int, statistics.KeyStatistics], text: Callable[[], TextSource]) -> Scope:
        hparams, first = self.hparams, self._layers[0]
        if hparams.scope == "zscore":
            start = Thresholds(hparams.alpha, hparams.short_prompt_ratio)
            return ZScoreScope(self.model, self._layers, start, hparams.dynamic_alpha)
        sample = statistics.pre_training_keys(self.model, self._parts, first, text())
        moments = _moved(found[first].covariance().diagonal(), self._parts.projections[first])
        return LeverageScope(self._layers, moments, sample, hparams.scope_budget, hparams.scope_ridge, hparams.seed)

    def _loaded_scope(self, constants: dict[str, torch.Tensor]) -> Scope | None:
        """The scope that has these constants; without any, only its gates can be used."""
        hparams = self.hparams
        if not hparams.use_hooks:
            return None
        if hparams.scope == "zscore":
            start = Thresholds(hparams.alpha, hparams.short_prompt_ratio)
            return ZScoreScope(self.model, self._layers, start, hparams.dynamic_alpha)
        first = weight_device(self._parts.projections[self._layers[0]])
        constants = {name: tensor.to(first) for name, tensor in constants.items()}
        return LeverageScope.of_constants(
            self._layers, constants, hparams.scope_budget, hparams.scope_ridge, hparams.seed
        )


def load_edits(model: nn.Module, folder: str | Path, tokenizer: Any = None, progress: bool = True) -> EditSession:
    """Put the edits of a folder on a model, which then answers bit for bit as the model they were saved from.

    Args:
        model: the base model of those edits, as Hugging Face loads it.
        folder: written by `EditSession.save`, or the `session_dir` of a session, which stays as it is.
        tokenizer: its tokenizer; without it, or without memory.safetensors, the edits can be used but not edited on.

    Raises:
        ValueError: the folder is damaged, of a newer format, or made for other weights. Nothing was attached.
    """
    return EditSession.of_contents(store.read(Path(folder)), model, tokenizer, progress)


def _moved(matrix: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """A float64 matrix where the projection's weight is, as wide as that device has it."""
    device = weight_device(projection)
    return (matrix.float() if device.type == "mps" else matrix).to(device).contiguous()
