"""The finished jobs of a run, read back from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from coachhook_plugin.store.files import sha256

from ..data import FACTS, Probe, Record
from ..journal import ABOUT, CONFIG, DONE, FAILED, RECORDS, TOOLKIT, Folder, Phase
from ..protocol import BEFORE, Reading
from ..sources import load_dataset

MOST_NAMED = 3  # values of one thing; of more, their number is told


@dataclass(frozen=True)
class Job:
    """One method on one data set under one protocol."""

    folder: Path
    files: Mapping[str, Path] = field(default_factory=dict, compare=False, repr=False)  # of data sets, by SHA-256
    # What `rows.record_scores` found, by step.
    scored: dict[int | None, list[dict[str, float]]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))
        return found

    @cached_property
    def about(self) -> dict[str, Any]:
        return dict(_json(self.folder / ABOUT))

    @cached_property
    def done(self) -> dict[str, Any]:
        return dict(_json(self.folder / DONE))

    @cached_property
    def records(self) -> list[Record]:
        """What was edited. A published job knows no more than the names, but for the file of its data set."""
        rows = _json(self.folder / RECORDS)
        given = self.config["dataset"]
        file = self.files.get(given["checksum"])
        if all("prompt" in row for row in rows) or file is None:
            return [_record(row) for row in rows]
        choice = {name: given[name] for name in ("shape", "order", "skip") if name in given}
        found = load_dataset(given["name"], len(rows), str(file), **choice).records
        if [record.case_id for record in found] != [row["case_id"] for row in rows]:
            raise ValueError(f"{file}: read today, it has other records than {self.folder.name} was made with")
        return found

    @cached_property
    def journal(self) -> Folder:
        return Folder(self.folder)

    @cached_property
    def before(self) -> Phase | None:
        """What was measured before any edit; None where the toolkit did the scoring."""
        return self.journal.phase(BEFORE)

    @cached_property
    def steps(self) -> dict[int, Phase]:
        """What was measured of everything edited so far, by number of edits; the last one is of all."""
        names = [name for name in self.journal.phases() if name.startswith("after-")]
        return {phase.header["edits"]: phase for name in names if (phase := self.journal.phase(name)) is not None}

    @cached_property
    def after(self) -> Phase | None:
        """What was measured after the edits, a row for each record: after the last one, or after each batch."""
        if self.steps:
            return self.steps[max(self.steps)]
        names = [name for name in self.journal.phases() if name.startswith("batch-")]
        phases = [phase for name in names if (phase := self.journal.phase(name)) is not None]
        if not phases:
            return None
        rows = [row for phase in phases for row in phase.rows]
        joined = {
            name: [one for phase in phases for one in phase.header.get(name, [])]
            for name in ("held", "forward_seconds")
        }
        return Phase("batches", {"edits": len(rows), **joined}, rows)

    @cached_property
    def toolkit(self) -> list[dict[str, Any]] | None:
        """What the toolkit's own editor returned."""
        path = self.folder / TOOLKIT
        return list(_json(path)) if self.before is None and path.is_file() else None

    def readings(self, phase: Phase) -> list[Reading]:
        """The answers of a phase."""
        return [Reading.from_dict(row) for row in phase.rows]


def load_jobs(folder: Path, data: Sequence[Path] = ()) -> list[Job]:
    """Every finished job under `folder`.

    Args:
        data: files of data sets, for published jobs, which hold no questions; those of the shipped facts are known.

    Raises:
        ValueError: no job was made with one of the files.
    """
    files = {sha256(path): path for path in (FACTS, *data)}
    jobs = [Job(path.parent, files) for path in sorted((folder / "jobs").glob(f"*/{DONE}"))]
    used = {files.get(job.config["dataset"]["checksum"]) for job in jobs} if data else set()
    for path in data:
        if path not in used:
            raise ValueError(f"{path}: no job under {folder} was made with this file, as its SHA-256 tells")
    return jobs


def mixed(jobs: Sequence[Job]) -> str:
    """What the jobs were made with and on that not all of them share, as text; empty where all agree."""
    made = [_made(about) for job in jobs for about in (job.about, *job.about.get("earlier", []))]
    differences = []
    for name in dict.fromkeys(name for one in made for name in one):
        found = sorted({str(one[name]) for one in made if one.get(name)})
        if len(found) > MOST_NAMED:
            differences.append(f"{len(found)} values of {name}")
        elif len(found) > 1:
            differences.append(f"{name} {' and '.join(found)}")
    return ", ".join(differences)


def _made(about: dict[str, Any]) -> dict[str, Any]:
    commits = {name: (about.get(f"{name}_commit") or "")[:7] for name in ("toolkit", "project")}
    commits["toolkit"] = commits["toolkit"] or about.get("toolkit")
    place = {name: about.get(name) or "unknown" for name in ("device", "processor", "threads")}
    return {**about.get("versions", {}), **commits, **place}


def unfinished(folder: Path) -> list[tuple[str, str, float]]:
    """Name, reason and time of every job that failed."""
    found = []
    for path in sorted((folder / "jobs").glob(f"*/{FAILED}")):
        why = path.read_text(encoding="utf-8").strip().splitlines()
        found.append((path.parent.name, why[0] if why else "", path.stat().st_mtime))
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _record(row: dict[str, Any]) -> Record:
    probes = {name: tuple(Probe(**probe) for probe in row.pop(name, ())) for name in ("locality", "portability")}
    texts = {name: tuple(row.pop(name, ())) for name in ("rephrases", "steps")}
    return Record(**{**dict.fromkeys(("prompt", "subject", "target_new"), ""), **row, **texts, **probes})
