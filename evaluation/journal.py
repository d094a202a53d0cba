"""What a run has measured so far, phase by phase. A phase is there whole or not at all, so that a killed run goes on.

In a folder every phase is one JSON Lines file: a line with what was measured once, then a line for each record. All
figures of a report come from these lines, whether they were written by one process or by several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from coachhook_plugin.cache import write_whole

# Files of a run's folder that its process and its readers both know.
CONFIG, DONE, FAILED = "config.yaml", "done.json", "failed.txt"
RECORDS, ABOUT, TOOLKIT = "records.json", "about.json", "toolkit.json"
BATCHES = "batches.jsonl"
LOCK = ".worker.lock"
BUSY = 75  # exit status of a worker that found another one in its folder


@dataclass(frozen=True)
class Phase:
    """One pass over the probes."""

    name: str
    header: dict[str, Any]  # measured once: edits so far, windows of the held-out text, seconds of forward passes
    rows: list[dict[str, Any]]  # one for each record


class Journal(Protocol):
    """Where phases, batches and the state after the newest batch are kept."""

    def phase(self, name: str) -> Phase | None: ...

    def keep(self, phase: Phase) -> None: ...

    def batches(self) -> list[dict[str, Any]]: ...

    def keep_batch(self, entry: dict[str, Any], state: Callable[[], Any] | None) -> None: ...

    def state(self) -> tuple[int, Any] | None: ...


@dataclass
class Memory:
    """A journal of one process."""

    phases: dict[str, Phase] = field(default_factory=dict)
    done: list[dict[str, Any]] = field(default_factory=list)

    def phase(self, name: str) -> Phase | None:
        return self.phases.get(name)

    def keep(self, phase: Phase) -> None:
        self.phases[phase.name] = phase

    def batches(self) -> list[dict[str, Any]]:
        return self.done

    def keep_batch(self, entry: dict[str, Any], state: Callable[[], Any] | None) -> None:
        self.done.append(entry)

    def state(self) -> tuple[int, Any] | None:
        return None


class Folder:
    """A journal on disk.

    Args:
        path: the folder of one run.
        snapshots: keep the method's state after every so many batches; 0: never, a killed run edits again from the
            start (and skips what it has measured already).
    """

    def __init__(self, path: Path, snapshots: int = 1) -> None:
        self.path, self.snapshots = path, snapshots
        path.mkdir(parents=True, exist_ok=True)

    def phase(self, name: str) -> Phase | None:
        file = self._phase_file(name)
        if not file.is_file():
            return None
        header, *rows = read_lines(file)
        return Phase(name, header, rows)

    def keep(self, phase: Phase) -> None:
        write_lines(self._phase_file(phase.name), [phase.header, *phase.rows])

    def phases(self) -> list[str]:
        """Names of the phases that are there."""
        return sorted(file.stem for file in (self.path / "phases").glob("*.jsonl"))

    def batches(self) -> list[dict[str, Any]]:
        file = self.path / BATCHES
        return read_lines(file) if file.is_file() else []

    def keep_batch(self, entry: dict[str, Any], state: Callable[[], Any] | None) -> None:
        done = [*self.batches(), entry]
        write_lines(self.path / BATCHES, done)
        if state is not None and self.snapshots and len(done) % self.snapshots == 0:
            held = {"batches": len(done), "state": state()}
            write_whole(self._state_file, lambda stream: torch.save(held, stream))

    def state(self) -> tuple[int, Any] | None:
        """Number of batches that the newest state follows, and that state."""
        if not self._state_file.is_file():
            return None
        # Written by this run itself: it holds the method's own objects.
        found = torch.load(self._state_file, weights_only=False)
        return found["batches"], found["state"]

    def forget_scratch(self) -> None:
        """The run is complete: nothing will build on its state, nor on tensors that a method kept beside it."""
        for file in self.path.glob("*.pt"):
            file.unlink()

    @property
    def _state_file(self) -> Path:
        return self.path / "state.pt"

    def _phase_file(self, name: str) -> Path:
        return self.path / "phases" / f"{name}.jsonl"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; numbers of numpy become plain ones."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=lambda value: value.item())
    write_whole(path, lambda stream: stream.write(f"{text}\n".encode()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    # By line feeds alone: the texts inside may hold what else `splitlines` takes for an end of line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON Lines file whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def write(stream: Any) -> None:
        stream.write(text.encode())

    write_whole(path, write)
