"""Jobs as they can be given on: everything that was measured, and none of the data set's texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..data import Record
from ..journal import ABOUT, CONFIG, DONE, RECORDS, TOOLKIT, Folder, Phase, write_json
from .jobs import Job, load_jobs
from .rows import spoken

# Of what the toolkit's editor returned for a record, all that `rows` reads; the rest repeats the request.
KEPT = ("case_id", "post", "time")


def publish(folder: Path, to: Path) -> int:
    """Copy the finished jobs of `folder` into `to`, each in place of an earlier copy; returns how many there are.

    Of the records only their names are kept, so what takes their texts to judge is judged here. `jobs.load_jobs`
    gives the texts back to whoever has the data set's file.

    Raises:
        ValueError: `to` is `folder`, whose own jobs would be gone.
    """
    if to.resolve() == folder.resolve():
        raise ValueError(f"{to} is where these jobs were made; publish them into another folder")
    jobs = load_jobs(folder)
    for job in jobs:
        _copy(job, to / "jobs" / job.folder.name)
    return len(jobs)


def _copy(job: Job, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    copy = Folder(to)
    for name in (ABOUT, CONFIG):
        shutil.copyfile(job.folder / name, to / name)
    write_json(to / RECORDS, [{"case_id": record.case_id} for record in job.records])
    if job.toolkit is not None:
        write_json(to / TOOLKIT, [{name: metric[name] for name in KEPT if name in metric} for metric in job.toolkit])
    for batch in job.journal.batches():
        copy.keep_batch(batch, None)
    for phase, records in _phases(job):
        rows = [{**row, **spoken(record, row)} for record, row in zip(records, phase.rows, strict=False)]
        copy.keep(Phase(phase.name, phase.header, rows))
    shutil.copyfile(job.folder / DONE, to / DONE)


def _phases(job: Job) -> Iterator[tuple[Phase, list[Record]]]:
    """Each phase, and the records from the one that its rows begin with."""
    start = 0
    for name in job.journal.phases():
        phase = job.journal.phase(name)
        assert phase is not None
        of_one_batch = name.startswith("batch-")
        yield phase, job.records[start if of_one_batch else 0 :]
        start += len(phase.rows) if of_one_batch else 0
