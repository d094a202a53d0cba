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

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import persistence, probe
from .architectures import context_length, model_parts, vocabulary_size, weight_device
from .attachment import Attachment
from .batch_writing import BatchWriter
from .beginning import beginning
from .fingerprint import Vocabulary, state_origin
from .hparams import FREE, PLACES, CoachHooKHparams, shared
from .ledger import Ledger, lines_of_batch, to_forget
from .observation import Comparison
from .placement import Place
from .sampling import context_prefixes
from .scope import Scope, ScopeState
from .state import Factors, History, LayerState, SessionState, Snapshot, Step, changes
from .store import FolderError, Journal
from .tokens import Encoder, Places, Request, parse_requests
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
    ids: list[str]  # in the ledger, of the facts now in force
    superseded: list[str]  # ids of edits of the same subject and prompt, earlier ones or (a fact twice) of this batch


class EditSession:
    """Consecutive batch editing of one model.

    Args:
        model: a Hugging Face causal language model. Its weights stay as they are (unless `use_hooks` is off).
        tokenizer: its tokenizer; either padding side.
        hparams: see `CoachHooKHparams`; the session takes a copy. With `session_dir` every batch is in that folder
            when `edit` returns.
        progress: show progress bars.

    Raises:
        ValueError, KeyError: the hyperparameters do not fit the model, or another session lives on it or writes to
            `session_dir`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, hparams: CoachHooKHparams, progress: bool = True) -> None:
        model = getattr(model, "_orig_mod", model)  # within the wrapper of torch.compile, which has the same modules
        if EditSession.of(model) is not None:
            raise ValueError("this model has an edit session already; use EditSession.of(model), or detach that one")
        hparams = replace(hparams)  # lists too: its owner may change them later
        self.model, self.tokenizer, self.hparams = model, tokenizer, hparams
        self.progress = progress
        self._parts = model_parts(model, hparams)
        self._layers = hparams.edited_layers
        self._encoder = Encoder(tokenizer, context_length(model), vocabulary_size(model))
        self._prefixes: list[str] | None = hparams.context_prefixes
        self._vocabulary: Vocabulary | None = None  # of the tokenizer of edits that were loaded
        self._origin = state_origin(model, shared(hparams.to_dict(), FREE | PLACES))
        self._state: SessionState | None = None  # None until the key statistics are there
        self._scope: Scope | None = None
        looks_ahead = hparams.use_hooks and hparams.scope == "zscore"
        self._attached = Attachment(self._parts.projections)
        self._comparison = Comparison(causal=not looks_ahead, unedited=self._attached.disabled)
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
        name, step = persistence.name_of(self.model), 0 if self._state is None else self._state.step
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
            self._check_living()
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
        tensors = [*self.state.tensors(), *self._attached.tensors()]
        tensors += [] if self._scope is None else vars(self._scope).values()
        stored = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(stored.values())

    @torch.inference_mode(False)  # whatever the caller is in: targets need gradients
    def edit(self, requests: Iterable[Mapping[str, Any] | Request], first: Places = 0) -> EditResult:
        """Write one batch of facts (paper, algorithm 1). It lands whole or not at all.

        Args:
            requests: mappings with `prompt` (naming the subject once), `subject` and `target_new`.
            first: what messages call the first request, the others counting on from there; or the number of each.

        Raises:
            ValueError, KeyError: a request cannot be edited (the message names it), the session was detached or loaded
                without what editing needs, the model was given other edits than the session's, or the session's folder
                cannot be written. Nothing has changed.
        """
        started = time.perf_counter()
        parsed = self.check(requests, first)
        before = self.state
        writer = self._writer()
        with self._changing(before):
            self._attached.attach(self._scope)
            with frozen(self.model):
                written = writer.write(parsed, before, first)
                in_scope = writer.in_scope(parsed, first)
            nll, scope = written.targets.nll, written.scope
            asked = None if self._scope is None else self._scope.asked(scope)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            lines = lines_of_batch(before.ledger, before.step + 1, now, parsed, nll, asked, in_scope)
            self._take(self._next(before, written.factors, written.layers, scope, lines))
        superseded = [line.id for line in lines if not line.in_force]
        if superseded:
            LOG.info("step %d supersedes the edits %s of the same facts", before.step + 1, ", ".join(superseded))
        return EditResult(
            requests=parsed,
            nll=nll,
            steps=written.targets.steps,
            scope=scope,
            in_scope=in_scope,
            seconds=time.perf_counter() - started,
            ids=[line.id for line in lines if line.in_force],
            superseded=superseded,
        )

    def check(self, requests: Iterable[Mapping[str, Any] | Request], first: Places = 0) -> list[Request]:
        """The batch as `edit` reads it, or the error that `edit` would raise; nothing is written."""
        self._check_editable()
        parsed = parse_requests(requests, first)
        self._encoder.check_vocabulary(parsed, first)
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
        lines = tuple(replace(edit, status="forgotten", by=str(before.step + 1)) for edit in gone if edit.in_force)
        forgotten = {line.id for line in lines}
        left = [edit for edit in before.ledger if edit.in_force and edit.id not in forgotten]
        with self._changing(before):
            self._attached.attach(self._scope)
            for layer, of in layers.items():
                self._attached.show(layer, of.delta)
            with frozen(self.model):
                scope = self._writer().scope_of(left)
            self._take(self._next(before, factors, layers, scope, lines, sign=-1))
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
        self._check_own(state)
        with self._changing(self.state):
            self._take(state)

    @torch.inference_mode(False)
    def show(self, state: SessionState) -> None:
        """For a look at another `state` of this session: as `restore`, but the session's folder stays as it is.

        Before the next edit, `show` the state that the folder tells of.
        """
        self._check_own(state)
        before = self.state
        with self._attached.answering():
            try:
                self._set(state)
            except BaseException:
                self._set(before)
                raise

    def save(self, folder: str | Path, memory: bool = True) -> None:
        """Write the edits to a folder that `load_edits` reads, whole or not at all. The model itself is not in it.

        Args:
            folder: made where there is none; edits that it holds are replaced.
            memory: with what it takes to go on editing, to roll back and to forget, for each edited layer a matrix
                (m, m) in float64 and more.

        Raises:
            ValueError: the folder cannot be written, another session writes to it, other files there have the names of
                those of edits, or the model was given other edits than the session's (`load_state_dict`).
        """
        self._check_living()
        self._check_shown()
        persistence.save(self, Path(folder), memory)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        model: nn.Module,
        tokenizer: Any = None,
        progress: bool = True,
        memory_device: Place | None = None,
    ) -> EditSession:
        """Go on with the session of a folder, at its last whole batch; every further batch is written there.

        Args:
            model: the base model of those edits, without a session.
            tokenizer: its tokenizer; without it the session can do all but `edit` and `forget`.
            memory_device: as in `load_edits`.

        Raises:
            ValueError: as `load_edits`, or the folder lacks memory.safetensors, or another session writes to it.
        """
        return persistence.resume(folder, model, tokenizer, progress, memory_device)

    def keep_in(self, folder: str | Path) -> None:
        """Write everything so far, and every further batch before `edit` returns, to a folder without edits.

        Raises:
            ValueError: the folder holds edits, another session writes to it, or it cannot be written.
        """
        self._check_editable()
        persistence.keep_in(self, folder)

    def close(self) -> None:
        """Stop writing to the session's folder and leave it to others; the edits stay in force, in memory."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
            self.hparams = replace(self.hparams, session_dir=None)

    def detach(self) -> None:
        """Take everything off the model: its modules, hooks and weights are exactly as they were found."""
        self.close()
        self._attached.release()
        self._state = None
        if EditSession.of(self.model) is self:
            delattr(self.model, ATTRIBUTE)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model for this thread inside the `with` body, whatever is edited there; afterwards the edits.

        In training, in compiled code and with `use_hooks: false` it is the base model for every thread.
        """
        with self._attached.disabled():
            yield

    def _check_living(self) -> None:
        if EditSession.of(self.model) is not self:
            raise ValueError("this session was detached from its model; start a new one with EditSession(model, ...)")

    def _check_own(self, state: SessionState) -> None:
        self._check_living()
        if state.origin != self._origin:
            raise ValueError(
                f"state: is that of other weights or other hyperparameters; give a `state` of {self!r} itself"
            )

    def _check_shown(self) -> None:
        state = self._state
        if state is not None and not self._attached.shows(state.layers):
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
        self._check_shown()

    def _writer(self) -> BatchWriter:
        """For one batch; the first state must be there, which brings the scope."""
        return BatchWriter(
            self.model,
            self._parts,
            self._encoder,
            self.prefixes,
            self.hparams,
            self._attached,
            self._scope,
            self._comparison,
            self.progress,
        )

    @contextmanager
    def _changing(self, before: SessionState) -> Iterator[None]:
        """Around what leads from `before` to another state: it lands whole, or all is as before."""
        with self._attached.answering():
            try:
                yield
            except BaseException:
                self._back(before)
                raise

    def _write_to(self, journal: Journal, folder: str | Path) -> None:
        """Keep every further batch in the journal of `folder`."""
        self.close()
        self._journal = journal
        self.hparams = replace(self.hparams, session_dir=str(folder))

    def _take(self, state: SessionState) -> None:
        """Let the model and the session's folder tell of `state`."""
        self._set(state)
        if self._journal is not None:
            self._journal.sync(state, lambda: persistence.record_of(self))

    def _back(self, state: SessionState) -> None:
        """The same after a failure, whose cause shall reach the caller."""
        self._set(state)
        if self._journal is not None:
            with suppress(FolderError):
                self._journal.undo(state, lambda: persistence.record_of(self))

    def _set(self, state: SessionState) -> None:
        self._state = state
        self._attached.carry(state, self._scope)

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
        packed = self._packed(scope)
        told = changes(self._packed(before.scope), packed)
        step = Step({layer: of.on(CPU) for layer, of in factors.items()}, told, lines, sign)
        return before.followed(step, layers, scope, packed, self.hparams.history_steps)

    def _packed(self, scope: ScopeState) -> dict[str, torch.Tensor]:
        return {} if self._scope is None else self._scope.pack(scope)

    def _placed(self, snapshot: Snapshot, history: History | None) -> SessionState:
        """A snapshot as a state of this session, on the devices of the edited layers."""
        devices = {layer: weight_device(projection) for layer, projection in self._parts.projections.items()}
        layers = {layer: of.on(devices[layer]) for layer, of in snapshot.layers.items()}
        scope = self._scope.unpack(snapshot.scope) if self._scope is not None and snapshot.scope else None
        return SessionState(layers, scope, snapshot.ledger, snapshot.step, history, self._origin)

    @torch.inference_mode(False)
    def _initial_state(self) -> SessionState:
        with self.disabled(), frozen(self.model):
            layers, self._scope = beginning(self.model, self.tokenizer, self._parts, self.hparams, self.progress)
        scope = None if self._scope is None else self._scope.initial()
        base = Snapshot({layer: of.on(CPU) for layer, of in layers.items()}, self._packed(scope))
        return SessionState(layers, scope, history=History(base), origin=self._origin)
