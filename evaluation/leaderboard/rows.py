"""A row of the leaderboard: every figure of one job, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from coachhook_plugin.shipped import shipped_hparams

from ..data import Record
from ..methods.settings import COACHHOOK
from ..metrics import (
    Interval,
    interval_of_mean,
    interval_of_mean_score,
    interval_of_ratio,
    is_answered,
    starts_with,
    success,
)
from ..protocol import METRICS, Reading, score
from .jobs import Job

UNKNOWN: Interval = (math.nan, math.nan, math.nan)
UNEDITED = "unedited"
# The three that every published comparison has.
THREE = ("reliability", "generality", "locality")
# Of what the model says by itself.
SPOKEN = ("free_generation", "starts_with_answer")
# Of each record.
SCORES = (*METRICS, *SPOKEN, "ES", "PS", "NS", "NKP")
COSTS = ("perplexity_ratio", "seconds_per_edit", "forward_overhead", "kept_megabytes", "peak_megabytes")
COLUMNS = (
    *METRICS,
    "mean",  # of the three
    "behind_first",  # by how much the group's best mean is higher, on the same records
    *SCORES[len(METRICS) :],
    *COSTS,
)


@dataclass(frozen=True)
class Row:
    """One line; metrics that were not measured are NaN."""

    method: str
    dataset: str
    checksum: str  # beginning of its SHA-256
    skip: int  # records of the data set before the first one edited
    order: str  # in which they were taken
    edits: int
    batch_size: int
    protocol: str
    model: str
    overrides: dict[str, Any]
    metrics: dict[str, Interval]
    job: str  # its folder

    @property
    def group(self) -> tuple[str, str, str, int, str, str, int]:
        """Rows that are compared with each other: model, file and records of it, protocol, number of edits."""
        return self.model, self.dataset, self.checksum, self.skip, self.order, self.protocol, self.edits

    @property
    def title(self) -> str:
        """Of its group."""
        start = f" from record {self.skip + 1}" if self.skip else ""
        order = "" if self.order == "first" else f" ({self.order})"
        return f"{self.dataset}{start}, {self.edits} edits{order}, {self.protocol}, {self.model}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: each metric, and `<metric>_interval` beside it; null where unknown."""
        row: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "metrics"}
        for name in COLUMNS:
            value, *ends = self.metrics[name]
            row[name] = value if math.isfinite(value) else None  # JSON knows neither NaN nor infinity
            row[f"{name}_interval"] = ends if all(map(math.isfinite, (value, *ends))) else None
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Row:
        """What `to_dict` gave."""
        ends = {name: row[f"{name}_interval"] or (math.nan, math.nan) for name in COLUMNS}
        metrics = {name: UNKNOWN if row[name] is None else (row[name], *ends[name]) for name in COLUMNS}
        return cls(metrics=metrics, **{name: row[name] for name in cls.__dataclass_fields__ if name != "metrics"})


def label(config: dict[str, Any]) -> str:
    """The method's name, with what the user changed in it."""
    changes = {**config["method"]["overrides"], **({"seed": config["seed"]} if config["seed"] else {})}
    listed = ", ".join(f"{name}={value}" for name, value in changes.items())
    name: str = config["method"]["label"]
    return f"{name} ({listed})" if listed else name


def model_name(config: dict[str, Any]) -> str:
    """The model's name, with that of the hyperparameters where a file of the user's is for another one."""
    name = str(config["model"]["name"])
    shipped = shipped_hparams(name, COACHHOOK)
    known = {name} | ({yaml.safe_load(shipped.read_text(encoding="utf-8"))["model_name"]} if shipped else set())
    own = Path(str(config.get("hparams", {}).get("model_name", name))).name
    return name if own in {Path(one).name for one in known} else f"{name} ({own})"


def row_of(job: Job) -> Row:
    """Everything that one job measured."""
    config = job.config
    seed = config["seed"]
    return Row(
        method=label(config),
        dataset=config["dataset"]["name"],
        checksum=config["dataset"].get("checksum", "")[:8],
        skip=config["dataset"].get("skip", 0),
        order=config["dataset"].get("order", "first"),
        edits=config["edits"],
        batch_size=job.done["batch_size"],
        protocol=config["protocol"]["name"] + (", sequential" if config["protocol"].get("sequential") else ""),
        model=model_name(config),
        overrides=config["method"]["overrides"],
        metrics={**_scored(record_scores(job), seed), **costs(job, seed)},
        job=job.folder.name,
    )


def unedited(row: Row, job: Job) -> Row:
    """The model that a job began with, as a row of its group: what doing nothing is worth."""
    one: Interval = (1.0, 1.0, 1.0)
    metrics = dict.fromkeys(COSTS, UNKNOWN) | {"perplexity_ratio": one}
    metrics |= _scored(record_scores(job, 0), job.config["seed"])
    return replace(row, method=UNEDITED, batch_size=0, overrides={}, metrics=metrics)


def _scored(scores: Sequence[dict[str, float]], seed: int) -> dict[str, Interval]:
    metrics = {name: interval_of_mean([one[name] for one in scores], seed) for name in SCORES}
    metrics["mean"] = interval_of_mean_score([[one[name] for name in THREE] for one in scores], seed)
    return {**metrics, "behind_first": UNKNOWN}


def behind(first: Job, job: Job, step: int | None = None) -> Interval:
    """How much higher the mean of `first` is; records are drawn in pairs, so what makes some hard for both cancels."""
    if _records(first) != _records(job):
        return UNKNOWN
    pairs = zip(record_scores(first), record_scores(job, step), strict=True)
    differences = [[one[name] - other[name] for name in THREE] for one, other in pairs]
    return interval_of_mean_score(differences, job.config["seed"])


def told_apart(rows: Sequence[Row], jobs: Sequence[Job]) -> list[Row]:
    """The rows, with what their configurations differ in added to names that a group has more than once."""
    parts = (
        lambda row, job: f"batches of {row.batch_size}",
        lambda row, job: job.config["method"].get("file", ""),
        lambda row, job: row.job.rpartition("-")[2],
    )
    found = list(rows)
    for part in parts:
        named = [(row.group, row.method) for row in found]
        added = [part(row, job) for row, job in zip(found, jobs, strict=True)]
        for i, name in enumerate(named):
            others = {added[k] for k, other in enumerate(named) if other == name}
            if len(others) > 1 and added[i]:
                found[i] = replace(found[i], method=f"{found[i].method}, {added[i]}")
    return found


def name_files(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the beginning of their file's checksum where data sets of one name are not the same file."""
    files: dict[str, set[str]] = {}
    for row in rows:
        files.setdefault(row.title, set()).add(row.checksum)
    return [
        replace(row, dataset=f"{row.dataset} {row.checksum}") if len(files[row.title]) > 1 else row for row in rows
    ]


def _records(job: Job) -> tuple[str, list[str]]:
    """The file and the records of it."""
    return job.config["dataset"]["checksum"], [record.case_id for record in job.records]


def record_scores(job: Job, step: int | None = None) -> list[dict[str, float]]:
    """Every score of every record, after the last edit or after `step` edits; 0: before the first."""
    if step not in job.scored:
        job.scored[step] = _record_scores(job, step)
    return job.scored[step]


def _record_scores(job: Job, step: int | None) -> list[dict[str, float]]:
    if job.toolkit is not None:
        return [_toolkit_scores(metric["post"]) for metric in job.toolkit]
    after = job.before if step == 0 else job.after if step is None else job.steps[step]
    assert job.before is not None
    assert after is not None
    pairs = zip(job.readings(job.before), job.readings(after), strict=False)
    return [
        {**_scores(before, reading), **spoken(record, row)}
        for record, (before, reading), row in zip(job.records, pairs, after.rows, strict=False)
    ]


def spoken(record: Record, row: dict[str, Any]) -> dict[str, float]:
    """Of what the model said by itself: whether that is the answer, and begins with it; empty where nobody asked.

    Where a published job's row tells, the record's texts are not needed.
    """
    if all(name in row for name in SPOKEN):
        return {name: row[name] for name in SPOKEN}
    if row.get("generated") is None:
        return {}
    said, target = row["generated"], record.target_new
    return dict(zip(SPOKEN, map(float, (is_answered(said, target), starts_with(said, target))), strict=True))


def _scores(before: Reading, after: Reading) -> dict[str, float]:
    found = dict.fromkeys(SCORES, math.nan) | asdict(score(before, after))
    if after.prompt_rivals or after.locality_rivals:
        wins = success(
            list(zip(after.prompt, after.prompt_rivals, strict=False)),
            list(zip(after.rephrases, after.rephrase_rivals, strict=False)),
            list(zip(after.locality, after.locality_rivals, strict=False)),
            before.locality,
        )
        found |= asdict(wins)
    return found


def _toolkit_scores(post: dict[str, Any]) -> dict[str, float]:
    def mean(values: Any) -> float:
        flat = [float(value) for value in (values if isinstance(values, list) else [values])]
        return sum(flat) / len(flat) if flat else math.nan

    def of(section: str) -> list[float]:
        return [
            float(value)
            for name, values in post[section].items()
            if name.endswith("_acc")
            for value in (values if isinstance(values, list) else [values])
        ]

    found = dict.fromkeys(SCORES, math.nan)
    found["reliability"] = mean(post["rewrite_acc"])
    found["generality"] = mean(post.get("rephrase_acc", []))
    return found | {"locality": mean(of("locality")), "portability": mean(of("portability"))}


def costs(job: Job, seed: int) -> dict[str, Interval]:
    """What the edits cost: other text, time and memory."""
    if job.toolkit is not None:
        size = job.done["batch_size"]
        chunks = [job.toolkit[start : start + size] for start in range(0, len(job.toolkit), size)]
        times = [(chunk[0]["time"], len(chunk)) for chunk in chunks]  # each record tells the whole chunk's
        known = interval_of_ratio(times, seed=seed) if any(time for time, _ in times) else UNKNOWN
        return dict.fromkeys(COSTS, UNKNOWN) | {"seconds_per_edit": known}
    batches, before, after = job.journal.batches(), job.before, job.after
    assert before is not None
    assert after is not None
    held = before.header.get("held", [])
    ratio = interval_of_ratio(_by_window(after.header["held"], len(held)), held, seed) if held else UNKNOWN
    last = batches[-1]
    return {
        "perplexity_ratio": ratio,
        "seconds_per_edit": interval_of_ratio([(entry["seconds"], entry["edits"]) for entry in batches], seed=seed),
        "forward_overhead": interval_of_ratio(after.header.get("forward_seconds", []), seed=seed),
        "kept_megabytes": (last["kept_megabytes"],) * 3,
        "peak_megabytes": (max(entry["peak_megabytes"] for entry in batches),) * 3,
    }


def _by_window(read: Sequence[tuple[float, int]], windows: int) -> list[tuple[float, int]]:
    """Sums over what was read of each window: single rounds read the same ones again after every batch."""
    of_each = [read[window::windows] for window in range(windows)]
    return [(sum(loss for loss, _ in of), sum(count for _, count in of)) for of in of_each]
