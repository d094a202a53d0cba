"""`apply_coachhook_to_model`, the function EasyEdit calls, and the undo it returns.

One call writes one batch. Which edits stay is not in that call's arguments (the two versions of the toolkit give
`keep_original_weight=False` opposite meanings), so the editor's entry methods open a `Run` that knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from ..hparams import FREE, PLACES, CoachHooKHparams, differing
from ..persistence import load_edits
from ..session import EditSession
from ..state import SessionState
from ..store import holds_edits
from ..tokens import parse_requests
from .release import as_asked

# What a session takes up when it begins, and not while it lives.
BEGINNING = frozenset({"load_path", "memory_device"})


@dataclasses.dataclass
class Run:
    """One call of an editor's entry method."""

    keep: bool  # the edits stay when the call is over
    subjects: list[str] | None = None  # for requests that come without one
    given: int = 0  # requests that came so far: messages count through the call
    begun: tuple[EditSession, SessionState] | None = None  # before the first batch of this call
    aside: tuple[EditSession, SessionState] | None = None  # edits that stay, out of the way of a "before" score
    save_path: str | None = None  # folder for the edits that stay

    def step_back(self, session: EditSession, before: SessionState) -> None:
        """Show the model as it was before its newest batch, until `rejoin`; in its folder the batch stays."""
        self.aside = (session, session.state)
        session.show(before)

    def rejoin(self) -> None:
        if self.aside is not None:
            session, state = self.aside
            session.show(state)
            self.aside = None

    def close(self) -> None:
        """Leave the edits that stay, and only those."""
        self.rejoin()
        if not self.keep and self.begun is not None:
            session, state = self.begun
            if _lives(session) and session.state is not state:
                session.restore(state)
        elif self.save_path and self.begun is not None and _lives(self.begun[0]):
            self.begun[0].save(self.save_path)


_RUN: ContextVar[Run | None] = ContextVar("coachhook_run", default=None)


@contextmanager
def run(
    model: nn.Module, tok: Any, hparams: CoachHooKHparams, keep: bool, subjects: list[str] | None = None
) -> Iterator[None]:
    """Around an entry method: whatever ends the body, the model is left with the edits that stay, and only those.

    Edits of an earlier run are on the model before the body begins, so that its scores "before" know them. Where the
    body fails and nothing of its own stays, they are taken off again.
    """
    found = EditSession.of(model)
    with as_asked(hparams):
        session = session_for(model, tok, hparams)
    before = session.ledger
    current = Run(keep, subjects)
    token = _RUN.set(current)
    try:
        try:
            yield
        finally:
            _RUN.reset(token)
            current.close()
    except BaseException:
        if session is not found and session.ledger == before:
            session.detach()
        raise


def running() -> bool:
    """An entry method is at work (they call each other)."""
    return _RUN.get() is not None


class Undo:
    """What `apply_coachhook_to_model` returns beside the model: call it to take the batch out again, bit for bit.

    EasyEdit restores in one of two ways: it calls the object (HEAD), or it walks through its `items()` as if they were
    weights to copy back (the release, and `normal_edit` of HEAD). So `items()` undoes too, and has nothing to yield.
    """

    def __init__(self, session: EditSession, before: SessionState, after: SessionState):
        self._states: tuple[EditSession, SessionState, SessionState] | None = (session, before, after)

    def __call__(self) -> None:
        """Return to the state before the batch. A second call does nothing.

        Raises:
            RuntimeError: later edits are in force, which an undo of this batch would silently drop.
        """
        if self._states is None:
            return
        session, before, after = self._states
        if _lives(session) and session.state is not before:
            if session.state is not after:
                raise RuntimeError(
                    "this batch is not the newest edit of the model; undo the later ones first (newest first), or "
                    "return to a state with EditSession.of(model).restore(state)"
                )
            session.restore(before)
        self._states = None

    def items(self) -> list[tuple[str, Any]]:
        """Undo as a call does; within an editor's call whose edits stay, only step back until the next batch."""
        current = _RUN.get()
        if current is None or not current.keep:
            self()
        elif self._states is not None and current.aside is None:
            session, before, _ = self._states
            current.step_back(session, before)
        return []


def apply_coachhook_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: CoachHooKHparams,
    copy: bool = False,
    return_orig_weights: bool = True,
    keep_original_weight: bool | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Undo]:
    """Write `requests` as one batch, on top of the edits that are in force already.

    Where the hyperparameters say so, edits of an earlier run come first (`load_path`, or those in `session_dir`), and
    those in force afterwards are saved (`save_path`): after this batch, or where the edits stay at the end of the call
    that made them.

    Args:
        copy: edit a deep copy (with the edits in force) and leave `model` alone.
        return_orig_weights, keep_original_weight, kwargs: part of EasyEdit's calling convention; the undo is always
            returned, and nothing is undone before it is used.

    Returns:
        the edited model (`model` itself unless `copy`), and an `Undo` for this batch.

    Raises:
        ValueError, KeyError: a request cannot be edited, or the hyperparameters differ from those of the edits in
            force; nothing has changed.
    """
    current = _RUN.get()
    first = 0
    if current is not None:
        current.rejoin()
        if current.subjects is not None:
            requests = _with_subjects(requests, current.subjects)
        first = current.given
        current.given += len(requests)
    parsed = parse_requests(requests, first)
    if copy:
        model = deepcopy(model)
    session = session_for(model, tok, hparams)
    before = session.state
    if current is not None and current.begun is None:
        current.begun = (session, before)
    session.edit(parsed, first)
    if current is not None and current.keep:
        current.save_path = session.hparams.save_path
    elif session.hparams.save_path:
        try:
            session.save(session.hparams.save_path)
        except BaseException:
            session.restore(before)
            raise
    return model, Undo(session, before, session.state)


def _with_subjects(requests: Sequence[Mapping[str, Any]], subjects: Sequence[str]) -> list[dict[str, Any]]:
    if len(subjects) != len(requests):
        raise ValueError(f"subject: holds {len(subjects)} for {len(requests)} prompts; give one for each")
    return [{**request, "subject": subject} for request, subject in zip(requests, subjects, strict=True)]


def session_for(model: nn.Module, tok: Any, hparams: CoachHooKHparams) -> EditSession:
    """The model's session, which takes up what may change in `hparams`, or a new one with a copy of them.

    A new one begins with the edits that are in `session_dir`, or else with those of `load_path`.

    Raises:
        ValueError: the session has edits in force, and `hparams` differ in what may not change.
    """
    hparams = dataclasses.replace(hparams)
    session = EditSession.of(model)
    if session is not None:
        in_force = session.hparams
        given = dataclasses.replace(
            hparams,  # a folder that this call does not name is the session's
            session_dir=hparams.session_dir or in_force.session_dir,
            load_path=hparams.load_path or in_force.load_path,
        )
        others = differing(in_force, given, FREE - BEGINNING)
        if not others:
            session.hparams = given
            return session
        if len(session):
            raise ValueError(
                f"this model carries {len(session)} edits made with other hyperparameters ({'; '.join(others)}); "
                "go on with the same ones, or take the edits off first with EditSession.of(model).detach()"
            )
        session.detach()
    if hparams.session_dir and holds_edits(Path(hparams.session_dir)):
        resumed = EditSession.resume(hparams.session_dir, model, tok, memory_device=hparams.memory_device)
        return _agreed(resumed, hparams, hparams.session_dir)
    if hparams.load_path:
        loaded = load_edits(model, hparams.load_path, tok, memory_device=hparams.memory_device)
        session = _agreed(loaded, hparams, hparams.load_path)
        if hparams.session_dir:
            try:
                session.keep_in(hparams.session_dir)
            except BaseException:
                session.detach()
                raise
        return session
    return EditSession(model, tok, hparams)


def _agreed(session: EditSession, hparams: CoachHooKHparams, folder: str) -> EditSession:
    """A session from a folder, under the hyperparameters of this run, which must be those of its edits."""
    others = differing(session.hparams, hparams, FREE | PLACES)
    if others:
        session.detach()
        raise ValueError(
            f"{folder}: holds edits made with other hyperparameters ({'; '.join(others)}); go on with the same "
            "ones, or name another folder"
        )
    session.hparams = hparams
    return session


def _lives(session: EditSession) -> bool:
    return EditSession.of(session.model) is session
