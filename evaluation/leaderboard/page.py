"""The leaderboard as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Probe, Record
from ..journal import Phase
from ..metrics import Interval
from .jobs import Job
from .rows import COLUMNS, SCORES, UNEDITED, Row, record_scores

TEMPLATE = Path(__file__).parent / "page.html"
GROUPS = ("prompt", "rephrases", "locality", "portability")
PROTOCOLS = {
    "consecutive": "all scores before the first edit, all edits, all scores after the last",
    "single": "all scores before the first edit; then every batch starts from the unedited model and is scored alone",
    "batch_edit": "the toolkit's own editor, which scores each batch right after it is written",
    "edit": "the toolkit's own editor, which scores each edit right after it is written",
}


def page(title: str, rows: Sequence[Row], jobs: Sequence[Job], plots: Mapping[str, str], note: str = "") -> str:
    """The page's text.

    Args:
        note: what a reader must know of the rows.
        plots: SVG by name; they become images, so that nothing in them meets the page.
    """
    parts = {
        "title": html.escape(title),
        "protocols": "\n".join(_protocol(name) for name in dict.fromkeys(row.protocol for row in rows)),
        "note": html.escape(note),
        "plots": "\n".join(_figure(name, svg) for name, svg in plots.items()),
        "data": embedded(_data(rows, jobs)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    # One pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def embedded(value: Any) -> str:
    """JSON for a script element: no text in it can end the element, or start another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _protocol(name: str) -> str:
    kind, _, sequential = name.partition(", ")
    text = PROTOCOLS.get(kind, PROTOCOLS["consecutive"]) + ("; edits stay for the next" if sequential else "")
    return f"<li><b>{html.escape(name)}</b>: {html.escape(text)}.</li>"


def _figure(name: str, svg: str) -> str:
    caption = {
        "retention": "Reliability, generality and locality of everything edited so far, by number of edits",
        "trade-off": "Reliability and generality against locality, with 95 % intervals",
    }.get(name, name)
    source = base64.b64encode(svg.encode()).decode()
    shown = html.escape(caption)
    image = f'<img alt="{shown}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure>{image}<figcaption>{shown}</figcaption></figure>"


def _data(rows: Sequence[Row], jobs: Sequence[Job]) -> dict[str, Any]:
    sets: list[list[dict[str, Any]]] = []
    places: dict[str, int] = {}
    listed = []
    by_name = {job.folder.name: job for job in jobs}
    for row in rows:
        if row.method == UNEDITED:
            listed.append(_row(row))
            continue
        job = by_name[row.job]
        key = json.dumps([job.config["dataset"]["checksum"], [record.case_id for record in job.records]])
        if key not in places:
            places[key] = len(sets)
            sets.append([_record(record) for record in job.records])
        listed.append({**_row(row), "set": places[key], "edits_told": _edits(job)})
    return {"columns": list(COLUMNS), "rows": listed, "sets": sets}


def _row(row: Row) -> dict[str, Any]:
    figures = {name: _short(row.metrics[name]) for name in COLUMNS if math.isfinite(row.metrics[name][0])}
    kept = ("method", "dataset", "skip", "edits", "batch_size", "protocol", "model")
    return {**{name: getattr(row, name) for name in kept}, "group": row.title, "figures": figures}


def _record(record: Record) -> dict[str, Any]:
    def asked(probes: Sequence[Probe]) -> list[list[str]]:
        return [[probe.prompt, probe.answer] for probe in probes]

    return {
        "id": record.case_id,
        "subject": record.subject,
        "old": record.ground_truth,
        "prompt": [[record.prompt or f"record {record.case_id}", record.target_new]],
        "rephrases": [[prompt, record.target_new] for prompt in record.rephrases],
        "locality": asked(record.locality),
        "portability": asked(record.portability),
    }


def _edits(job: Job) -> list[dict[str, Any]]:
    """Each edit's scores, and what was said before and after it; the toolkit's own results hold no texts."""
    scores = [
        {name: round(value, 4) for name, value in one.items() if name in SCORES and not math.isnan(value)}
        for one in record_scores(job)
    ]
    before, after, right = _texts(job.before), _texts(job.after), _right(job)
    return [
        {
            "scores": one,
            "pre": before[i] if before else {},
            "post": after[i] if after else {},
            "right": right[i] if right else {},
        }
        for i, one in enumerate(scores)
    ]


def _right(job: Job) -> list[dict[str, list[bool]]]:
    """Of each edit, by group of probes: whether the answer is what the scores ask for. As token ids, which may differ
    where the texts look alike."""
    if job.before is None or job.after is None:
        return []
    return [
        {
            group: [
                answer.said == (old.said if group == "locality" else answer.wanted)
                for old, answer in zip(getattr(before, group), getattr(after, group), strict=False)
            ]
            for group in GROUPS
        }
        for before, after in zip(job.readings(job.before), job.readings(job.after), strict=False)
    ]


def _texts(phase: Phase | None) -> list[dict[str, Any]]:
    if phase is None:
        return []
    return [{**row.get("texts", {}), "generated": row.get("generated")} for row in phase.rows]


def _short(interval: Interval) -> list[float]:
    """Value and ends; without ends where they are not known."""
    return [round(value, 5) for value in interval if math.isfinite(value)]
