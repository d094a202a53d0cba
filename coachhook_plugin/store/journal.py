"""The journal of a session: whatever its state becomes is on the disk before anybody is told.

A batch is one new file under steps/. Taking steps back writes the config anew, listing those that stay. When the
session's history is folded, or a step inside memory.safetensors is taken back, all files are written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hparams import shared
from ..state import SessionState, Snapshot, Step
from . import folder as folders
from . import steps
from .files import FolderError, lock, writing
from .folder import STEPS, Contents, Record
from .manifest import Manifest


class Journal:
    """One folder, and what of a session is in it. Copies of a session have none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()  # wherever the process goes
        self._lock = lock(self.folder)
        self._told: SessionState | None = None  # what the folder was last made to tell of ...
        self._unsure = False  # ... unless a failure left that open
        self._manifest: Manifest | None = None
        self._base: Snapshot | None = None  # the beginning of the history in memory.safetensors ...
        self._inside: tuple[Step, ...] = ()  # ... its steps there ...
        self._trailing: list[steps.Written] = []  # ... and those under steps/

    @classmethod
    def start(cls, folder: str | Path) -> Journal:
        """A journal in a folder that holds no edits yet.

        Raises:
            FolderError: it does, or files that edits would replace; another session writes there, or it cannot be
                written.
        """
        journal = cls(folder)
        try:
            if folders.holds_edits(journal.folder):
                raise FolderError(
                    f"session_dir: {folder} holds a session already; go on with EditSession.resume, or name another "
                    "folder"
                )
            folders.check_free(journal.folder)
        except BaseException:
            journal.close()
            raise
        return journal

    def adopt(self, contents: Contents) -> None:
        """Go on with what the folder holds."""
        assert contents.history is not None
        self._manifest, self._base = contents.manifest, contents.history.base
        self._inside, self._trailing = contents.history.steps[: contents.inside], list(contents.trailing)
        folders.clean(self.folder, contents.manifest, contents.trailing)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # neither copied nor pickled: one folder, one session

    def sync(self, state: SessionState, record: Callable[[], Record]) -> None:
        """Make the folder tell of `state`.

        Raises:
            FolderError: it cannot be written, and tells what it told before.
        """
        self._unsure = True
        self._sync(state, record)
        self._unsure, self._told = False, state

    def undo(self, state: SessionState, record: Callable[[], Record]) -> None:
        """After a failure, make sure that the folder tells of `state`; where nothing was written, it still does."""
        if self._unsure or (self._told is not None and self._told is not state):
            self.sync(state, record)
            if self._manifest is not None:  # a step may have landed just before the failure
                folders.clean(self.folder, self._manifest, self._trailing)

    def _sync(self, state: SessionState, record: Callable[[], Record]) -> None:
        history = state.history
        assert history is not None
        inside = len(self._inside)
        if self._manifest is None or history.base is not self._base or not _begin(history.steps, self._inside):
            self.rewrite(record())
            return
        wanted = history.steps[inside:]
        same = 0
        while same < min(len(wanted), len(self._trailing)) and self._trailing[same].step is wanted[same]:
            same += 1
        if same < len(self._trailing):
            self._take_back(same)
        for i, step in enumerate(wanted[same:], same):
            self._append(history.base.step + inside + i + 1, step)

    def rewrite(self, record: Record) -> None:
        """Write all files anew; the steps since then are within them."""
        self._manifest = None  # unknown, should this fail
        manifest = folders.write(self.folder, record)
        history = record.state.history
        assert history is not None
        self._manifest, self._base, self._inside, self._trailing = manifest, history.base, history.steps, []

    def close(self) -> None:
        """Leave the folder to others."""
        self._lock.release()

    def _take_back(self, kept: int) -> None:
        assert self._manifest is not None
        names = [written.name for written in self._trailing[:kept]]
        hparams = shared(self._manifest.hparams)  # earlier releases kept secrets there
        manifest = replace(self._manifest, hparams=hparams, steps=names, revision=self._manifest.revision + 1)
        self._manifest = None
        with writing(self.folder):
            manifest.write(self.folder)
        self._manifest, self._trailing = manifest, self._trailing[:kept]
        folders.clean(self.folder, manifest, self._trailing)

    def _append(self, number: int, step: Step) -> None:
        assert self._manifest is not None
        listed = len(self._manifest.steps)
        after = self._trailing[-1].digest if len(self._trailing) > listed else self._manifest.digest
        with writing(self.folder):
            (self.folder / STEPS).mkdir(exist_ok=True)
            self._trailing.append(steps.append(self.folder / STEPS, number, step, after))


def _begin(history: tuple[Step, ...], with_: tuple[Step, ...]) -> bool:
    return len(history) >= len(with_) and all(a is b for a, b in zip(history, with_, strict=False))
