"""A session and its folders: what it writes there, and how it comes back. The other half of `EditSession`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import store
from .beginning import scope_of_constants
from .fingerprint import Vocabulary, weights_fingerprint, weights_sums
from .placement import Place
from .smollm2 import public_name
from .store import Contents, FolderError, Journal, Record
from .store.files import lock
from .store.folder import Use

if TYPE_CHECKING:
    from .session import EditSession


@torch.inference_mode(False)  # whatever the caller is in: the model may be trained later
def load_edits(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    progress: bool = True,
    memory_device: Place | None = None,
) -> EditSession:
    """Put the edits of a folder on a model, which then answers bit for bit as the model they were saved from.

    Args:
        model: the base model of those edits, as Hugging Face loads it.
        folder: written by `EditSession.save`, or the `session_dir` of a session, which stays as it is.
        tokenizer: its tokenizer; without it, or without memory.safetensors, the edits can be used but not edited on.
            Then the memories are not read either; `save` takes them from the folder's file.
        memory_device: where the memories rest from now on, as the hyperparameter says it; None: where they did.

    Raises:
        ValueError: the folder is damaged, of a newer format, or made for other weights or with another tokenizer.
            Nothing was attached.
    """
    return _session_of(store.read(Path(folder), memory_device, _use(tokenizer)), model, tokenizer, progress)


@torch.inference_mode(False)
def resume(
    folder: str | Path, model: nn.Module, tokenizer: Any, progress: bool, memory_device: Place | None
) -> EditSession:
    """See `EditSession.resume`."""
    if not store.holds_edits(Path(folder)):
        raise FolderError(f"{folder}: holds no session; start one with session_dir in the hyperparameters")
    journal = Journal(folder)
    try:
        contents = store.read(Path(folder), memory_device, _use(tokenizer))
        if contents.history is None:
            raise FolderError(f"{folder}: memory.safetensors is missing, without which a session cannot go on")
        session = _session_of(contents, model, tokenizer, progress)
        try:
            journal.adopt(contents)
        except BaseException:
            session.detach()
            raise
    except BaseException:
        journal.close()
        raise
    session._write_to(journal, folder)
    return session


def save(session: EditSession, folder: Path, memory: bool) -> None:
    """See `EditSession.save`."""
    record = record_of(session)
    if memory and record.state.history is None:
        raise ValueError("memory: these edits were loaded without it; save with memory=False")
    journal = session._journal
    if journal is not None and journal.folder.resolve() == folder.resolve():
        if not memory:
            raise ValueError(f"memory: {folder} is this session's own folder, which needs it")
        journal.rewrite(record)
        return
    held = lock(folder)
    try:
        store.write(folder, record, memory)
    finally:
        held.release()


def keep_in(session: EditSession, folder: str | Path) -> None:
    """See `EditSession.keep_in`."""
    journal = Journal.start(folder)
    try:
        journal.sync(session.state, lambda: record_of(session))
    except BaseException:
        journal.close()
        raise
    session._write_to(journal, folder)


def record_of(session: EditSession) -> Record:
    """What a folder shall tell of a session."""
    state, scope = session.state, session._scope  # in this order: the first state brings the scope
    vocabulary = session._vocabulary if session.tokenizer is None else Vocabulary.of(session.tokenizer)
    return Record(
        state=state,
        hparams=session.hparams,
        prefixes=session._prefixes,
        base_model=name_of(session.model),
        dtype=str(next(iter(session._parts.projections.values())).weight.dtype).removeprefix("torch."),
        fingerprint=_fingerprint(session),
        vocabulary=vocabulary,
        sums=None if vocabulary is None else _sums(session, vocabulary),
        gates={layer: dict(hook.gate.named_buffers()) for layer, hook in session._attached.hooks.items()},
        constants={} if scope is None else scope.constants(),
    )


def name_of(model: nn.Module) -> str:
    """What the model is called, wherever this machine has it."""
    given = public_name(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    path = Path(given).expanduser()
    return path.absolute().name if path.is_absolute() or path.is_dir() else given


def _use(tokenizer: Any) -> Use:
    return "answering" if tokenizer is None else "editing"


def _session_of(contents: Contents, model: nn.Module, tokenizer: Any, progress: bool) -> EditSession:
    """The session that a folder tells of, in memory."""
    from .session import EditSession

    session = EditSession(model, tokenizer, contents.hparams, progress)
    try:
        _begin_with(session, contents)
    except BaseException:
        session.detach()
        raise
    return session


def _begin_with(session: EditSession, contents: Contents) -> None:
    told, state = contents.manifest, contents.snapshot
    known = told.vocabulary
    if told.fingerprint != _fingerprint(session) or (known is not None and told.sums != _sums(session, known)):
        raise FolderError(
            f"these edits were made on {told.base_model!r} in {told.dtype}, and this model has other weights; load "
            "that model, in that dtype"
        )
    if not session._attached.fits(state.layers):
        raise FolderError(f"these edits have another shape than {told.base_model!r}; restore the folder from a copy")
    given = session.tokenizer
    if known is not None and given is not None and known.sha256 != Vocabulary.of(given).sha256:
        raise FolderError(
            f"these edits were made on {told.base_model!r} with another tokenizer; give the one that they were made "
            "with, or none to use them without editing on"
        )
    session._prefixes, session._vocabulary = told.prefixes, known
    session._scope = scope_of_constants(session.model, session._parts, session.hparams, contents.constants)
    session._take(session._placed(state, contents.history))
    for layer, buffers in (contents.gates or {}).items():
        session._attached.hooks[layer].gate.fill(buffers)


def _fingerprint(session: EditSession) -> str:
    with _base_weights(session):
        return weights_fingerprint(session.model, session._parts.projections.values())


def _sums(session: EditSession, vocabulary: Vocabulary) -> str:
    with _base_weights(session):
        return weights_sums(session.model, vocabulary.size)


def _base_weights(session: EditSession) -> AbstractContextManager[None]:
    # Beside hook layers the weights are the base model's, and other threads may be running it.
    return nullcontext() if session.hparams.use_hooks else session.disabled()
