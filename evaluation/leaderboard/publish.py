"""Jobs as they can be given on: everything that was measured, and nothing of the data set.

Of a record its name is kept; of an answer which of its tokens are the same, which is all that scores ask; and what the
model said, with what that is worth.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..journal import ABOUT, BATCHES, CONFIG, DONE, RECORDS, TOOLKIT, Folder, Phase, write_json
from ..protocol import Reading
from .jobs import Job, load_jobs
from .rows import spoken

# Of what the toolkit's editor returned for a record, all that `rows` reads; the rest repeats the request.
KEPT = ("case_id", "post", "time")


def publish(folder: Path, to: Path) -> int:
    """Copy the finished jobs of `folder` into `to`, each in place of an earlier copy; returns how many there are.

    `jobs.load_jobs` gives the questions back to whoever has the data set's file.

    Raises:
        ValueError: where a copy would stand is a job as a run made it.
    """
    copies = {to / "jobs" / job.folder.name: job for job in load_jobs(folder)}
    for path in filter(Path.exists, copies):
        if not (path / DONE).is_file() or any(record.prompt for record in Job(path).records):
            raise ValueError(f"{path} was made by a run, and a copy would replace it; publish into another folder")
    for path, job in copies.items():
        _copy(job, path)
    return len(copies)


def _copy(job: Job, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    copy = Folder(to)
    for name in (ABOUT, CONFIG, BATCHES):
        if (job.folder / name).is_file():  # the toolkit's own editor tells of no batches
            shutil.copyfile(job.folder / name, to / name)
    write_json(to / RECORDS, [{"case_id": record.case_id} for record in job.records])
    if job.toolkit is not None:
        write_json(to / TOOLKIT, [{name: metric[name] for name in KEPT if name in metric} for metric in job.toolkit])
    numbers: list[dict[int, int]] = [{} for _ in job.records]
    for phase, first in _phases(job):
        rows = [
            {**row, **_numbered(row, numbers[i]), **spoken(job.records[i], row)}
            for i, row in enumerate(phase.rows, start=first)
        ]
        copy.keep(Phase(phase.name, phase.header, rows))
    shutil.copyfile(job.folder / DONE, to / DONE)


def _phases(job: Job) -> Iterator[tuple[Phase, int]]:
    """Each phase, and which record its first row is of."""
    start = 0
    for name in job.journal.phases():
        phase = job.journal.phase(name)
        assert phase is not None
        of_one_batch = name.startswith("batch-")
        yield phase, start if of_one_batch else 0
        start += len(phase.rows) if of_one_batch else 0


def _numbered(row: dict[str, Any], numbers: dict[int, int]) -> dict[str, list[list[Any]]]:
    """The answers of a row, with tokens counted through as they are met, by all rows of a record alike."""

    def counted(ids: list[int]) -> list[int]:
        return [numbers.setdefault(token, len(numbers)) for token in ids]

    groups = {name: row[name] for name in Reading.__dataclass_fields__ if name in row}
    return {name: [[counted(said), counted(wanted), nll] for said, wanted, nll in of] for name, of in groups.items()}
