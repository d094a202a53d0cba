"""What the jobs of a run say together: `leaderboard.md`, `.csv`, `.json`, plots, and one HTML page.

    python -m evaluation.leaderboard results/board [--against CoachHooK] [--publish FOLDER] [--data FILE ...]

makes them again from what lies in `results/board/jobs`; `evaluation.run` does so at its end.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from ..tables import markdown_table
from .jobs import Job, load_jobs, mixed, unfinished
from .page import page
from .plots import retention, trade_off
from .publish import publish
from .rows import COLUMNS, Row, behind, name_files, row_of, told_apart, unedited

__all__ = ["COLUMNS", "AtTheEnd", "Job", "Row", "build", "cell", "load_jobs", "markdown", "publish", "row_of"]

SHOWN = ("reliability", "generality", "locality", "portability", "mean", "behind_first", "starts_with_answer",
         "free_generation", "perplexity_ratio", "seconds_per_edit")  # fmt: skip


def build(folder: Path, data: Sequence[Path] = ()) -> list[Row]:
    """Write the leaderboard of `folder` beside its jobs, and return its rows; `data` as in `load_jobs`."""
    edited, jobs = _ranked(load_jobs(folder, data))
    if not jobs:
        return []
    firsts: dict[Any, Job] = {}
    for row, job in zip(edited, jobs, strict=True):
        row.metrics["behind_first"] = behind(firsts.setdefault(row.group, job), job)
    rows = sorted([*edited, *_unedited(edited, jobs, firsts)], key=_order)
    listed = json.dumps([row.to_dict() for row in rows], indent=1, allow_nan=False)
    (folder / "leaderboard.json").write_text(f"{listed}\n", encoding="utf-8")
    (folder / "leaderboard.csv").write_text(table(rows), encoding="utf-8")
    different = mixed(jobs)
    note = f"\nNot all of these rows were made alike: {different}.\n" if different else ""
    (folder / "leaderboard.md").write_text(markdown(rows) + note, encoding="utf-8")
    plots = {}
    for name, draw in (("retention", retention), ("trade-off", trade_off)):
        if draw(edited, jobs, folder / name):
            plots[name] = (folder / f"{name}.svg").read_text(encoding="utf-8")
    (folder / "leaderboard.html").write_text(page(folder.name, rows, jobs, plots, note.strip()), encoding="utf-8")
    return rows


def against(folder: Path, method: str) -> str:
    """By how much the mean of the three scores of `method` is above each other one's, on the same records.

    Raises:
        ValueError: no row of the leaderboard has this name.
    """
    edited, jobs = _ranked(load_jobs(folder))
    ours = {row.group: job for row, job in zip(edited, jobs, strict=True) if row.method == method}
    if not ours:
        raise ValueError(
            f"{folder} has no method {method!r}; it has {', '.join(dict.fromkeys(r.method for r in edited))}"
        )
    groups: dict[str, list[list[str]]] = {}
    for row, job in zip(edited, jobs, strict=True):
        if row.group in ours and row.method != method:
            lead = "{:.3f} ({:.3f}..{:.3f})".format(*behind(ours[row.group], job))
            groups.setdefault(row.title, []).append([row.method, cell(row, "mean", interval=False), lead])
    head = ["method", "mean", f"{method} is ahead by"]
    return "\n\n".join(f"### {title}\n\n{markdown_table(head, lines)}" for title, lines in groups.items()) + "\n"


def _ranked(jobs: Sequence[Job]) -> tuple[list[Row], list[Job]]:
    """A row for each job, and the jobs; by group, the best first."""
    named = zip(name_files([row_of(job) for job in jobs]), jobs, strict=True)
    found = sorted(named, key=lambda pair: _order(pair[0]))
    ranked = [job for _, job in found]
    return told_apart([row for row, _ in found], ranked), ranked


def _unedited(rows: Sequence[Row], jobs: Sequence[Job], firsts: dict[Any, Job]) -> list[Row]:
    """A row for each group, from its best job."""
    found: dict[Any, Row] = {}
    for row, job in zip(rows, jobs, strict=True):
        if row.group not in found and job.before is not None:
            found[row.group] = unedited(row, job)
            found[row.group].metrics["behind_first"] = behind(firsts[row.group], job, 0)
    return list(found.values())


def _order(row: Row) -> tuple[Any, ...]:
    """By data set and size; the best first."""
    mean = row.metrics["mean"][0]
    return (*row.group, -mean if mean == mean else 2.0, row.method)


def table(rows: Sequence[Row]) -> str:
    """The rows as CSV: each metric, then the ends of its interval."""
    text = io.StringIO()
    listed = [row.to_dict() for row in rows]
    names = [name for name in listed[0] if not name.endswith("_interval") and name not in COLUMNS]
    head = [*names, *(part for name in COLUMNS for part in (name, f"{name}_low", f"{name}_high"))]
    lines = csv.DictWriter(text, head, lineterminator="\n")
    lines.writeheader()
    for row in listed:
        plain = {name: json.dumps(row[name]) if isinstance(row[name], dict) else row[name] for name in names}
        for name in COLUMNS:
            low, high = row[f"{name}_interval"] or (None, None)
            plain |= {name: row[name], f"{name}_low": low, f"{name}_high": high}
        lines.writerow(plain)
    return text.getvalue()


def markdown(rows: Sequence[Row], columns: Sequence[str] = SHOWN) -> str:
    """A table for each group of rows; intervals (95 %, bootstrap) in brackets."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.title, []).append(row)
    parts = []
    for title, group in groups.items():
        used = [name for name in columns if any(row.metrics[name][0] == row.metrics[name][0] for row in group)]
        head = ["method", "batch", *(name.replace("_", " ") for name in used)]
        lines = [[row.method, str(row.batch_size or ""), *(cell(row, name) for name in used)] for row in group]
        parts.append(f"### {title}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(parts) + "\n"


def cell(row: Row, name: str, interval: bool = True) -> str:
    """A figure, and its interval, as text."""
    value, low, high = row.metrics[name]
    if value != value:
        return ""
    digits = 1 if name in ("seconds_per_edit", "peak_megabytes", "kept_megabytes") else 3
    return f"{value:.{digits}f}" + (f" ({low:.{digits}f}..{high:.{digits}f})" if interval and low == low else "")


class AtTheEnd(Callback):  # type: ignore[misc, unused-ignore]
    """Writes the leaderboard when a run or a sweep is over, and tells what did not finish."""

    def __init__(self) -> None:
        self.started = time.time()

    def on_run_end(self, config: Any, **_: Any) -> None:
        self.tell(Path(config.out) / config.run)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        self.tell(Path(config.out) / config.run)

    def tell(self, folder: Path) -> None:
        """Leaves the process with status 1 if something that this call ran has failed."""
        rows, broken = [], False
        try:
            rows = build(folder)
        except Exception:  # Hydra would turn it into a warning, and what failed would not be told
            broken = True
            traceback.print_exc()
        if rows:
            print(f"\n{markdown(rows)}\n{len(rows)} rows in {folder}/leaderboard.html, .md, .csv and .json")
            if different := mixed(load_jobs(folder)):
                print(f"Not all of these rows were made alike: {different}", file=sys.stderr)
        failed = [(job, why) for job, why, when in unfinished(folder) if when >= self.started]
        for job, why in failed:
            print(f"{job} did not finish: {why}", file=sys.stderr)
        if failed or broken:
            sys.exit(1)
