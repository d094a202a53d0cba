"""One protocol for every method: all scores before -> all edits -> all scores after.

Scoring an edit right after it is made, as the toolkit's sequential modes do, measures neither what later edits destroy
nor what the edit itself does to the answers that were scored before it.

`run` writes what it measures into a journal and skips what is there already; `consecutive` is the same run in memory,
with its figures as one `Outcome`.
"""

from __future__ import annotations

import contextlib
import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .data import Record, answerable
from .journal import Journal, Memory, Phase
from .metrics import (
    Answer,
    Asking,
    agreement,
    answers,
    forward_seconds,
    generate,
    mean_of_known,
    perplexity_of,
    room_for,
    wait,
    window_losses,
)

METRICS = ("reliability", "generality", "locality", "portability")
BEFORE = "before"


class EditingMethod(Protocol):
    """A model, and a way of writing facts into it."""

    name: str
    model: nn.Module
    tokenizer: Any

    @property
    def one_by_one(self) -> bool:
        """Whether it writes the facts of a batch one after another."""
        ...

    @property
    def asking(self) -> Asking:
        """How its model is asked."""
        ...

    def prepare(self) -> None:
        """What is done once for a model and kept on disk (key statistics); not part of the time of an edit."""
        ...

    def edit(self, records: Sequence[Record]) -> None:
        """Write one batch on top of all earlier ones."""
        ...

    def kept_bytes(self) -> int:
        """Memory that stays beside the model between batches: key statistics, and what the edits leave."""
        ...

    def state(self) -> Any:
        """Everything that the next batch builds on; a later edit does not change it."""
        ...

    def restore(self, state: Any) -> None:
        """Return to a `state`, of this process or of another one with the same model and settings.

        Raises:
            NoWayBack: the model holds what no state brings back.
        """
        ...


class NoWayBack(ValueError):
    """A method cannot return to an earlier state of its own."""


@dataclass(frozen=True)
class Plan:
    """What a run does.

    `reset`: every batch starts from the unedited model and is scored alone (single-round editing); otherwise batches
    follow one another (consecutive editing).
    """

    batch_size: int
    held_text: str
    reset: bool = False
    evaluate_at: tuple[int, ...] = ()  # score all edits so far after the batch that reaches each of these numbers
    rivals: bool = False  # also read the answers that success scores compare with
    # At the beginning and the end of a run, and of every single round; what is scored on the way has no use for them:
    new_tokens: int = 0  # of free generation for every edited prompt, more where the answer is longer; 0: none
    forward_repeats: int = 0  # forward passes that are timed, the unedited and the edited model in turn; 0: none
    held_window: int = 512
    held_tokens: int = 4096
    seed: int = 0
    extra: Callable[[EditingMethod, Sequence[Record]], list[dict[str, Any]]] | None = None  # per record, after edits

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if any(step < 1 for step in self.evaluate_at):
            raise ValueError(f"evaluate_at is {list(self.evaluate_at)}; give numbers of edits, from 1 on")


@dataclass(frozen=True)
class Reading:
    """What the model says at one record's probes; rivals are the answers that success scores compare with."""

    prompt: list[Answer]
    rephrases: list[Answer]
    locality: list[Answer]
    portability: list[Answer]
    prompt_rivals: list[Answer] = field(default_factory=list)  # the old answer, at the prompt
    rephrase_rivals: list[Answer] = field(default_factory=list)  # the old answer, at each rephrasing
    locality_rivals: list[Answer] = field(default_factory=list)  # the new answer, at each neighbour

    def to_dict(self) -> dict[str, list[list[Any]]]:
        """As JSON holds it: (said, wanted, nll) of every answer."""
        return {name: [[a.said, a.wanted, _rounded(a.nll)] for a in getattr(self, name)] for name in _GROUPS}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Reading:
        """What `to_dict` gave, from a mapping that may hold more."""
        groups = {name: row.get(name, []) for name in _GROUPS}
        return cls(
            **{
                name: [Answer(said, wanted, math.nan if nll is None else nll) for said, wanted, nll in group]
                for name, group in groups.items()
            }
        )


_GROUPS = tuple(Reading.__dataclass_fields__)


@dataclass(frozen=True)
class Scores:
    """Of one record; NaN where it has no such probe."""

    reliability: float
    generality: float
    locality: float  # share of tokens said as before the edits
    portability: float


@dataclass
class Outcome:
    """Everything one run of a method measured."""

    method: str
    records: list[dict[str, Any]]  # a line for each edit: what was edited, scores before and after
    before: dict[str, float]
    after: dict[str, float]
    perplexity_before: float
    perplexity_after: float
    seconds_per_edit: float
    kept_megabytes: float
    peak_megabytes: float
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt, target, before, after

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_after / self.perplexity_before

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


def run(method: EditingMethod, records: Sequence[Record], plan: Plan, journal: Journal) -> None:
    """Edit `records` batch after batch; measure before the first, at the steps asked for, and after the last.

    What the journal holds already is not measured again. Batches are made again, with the same random numbers, from
    the newest state it holds.
    """
    method.prepare()
    start = method.state() if plan.reset or plan.forward_repeats else None
    if journal.phase(BEFORE) is None:
        journal.keep(measure(method, records, plan, BEFORE, 0))
    done = _resumed(method, journal, plan)
    with tqdm(total=len(records), initial=min(done * plan.batch_size, len(records)), desc=f"{method.name}: edits",
              unit="edit") as bar:  # fmt: skip
        for number, batch, reached in _batches(records, plan.batch_size):
            if plan.reset:
                if journal.phase(batch_phase(number)) is not None:
                    bar.update(len(batch))
                    continue
                method.restore(start)
            if number >= done:
                _edit(method, batch, number, plan, journal)
                bar.update(len(batch))
            if plan.reset:
                journal.keep(measure(method, answerable(batch), plan, batch_phase(number), len(batch), start))
            elif is_step(reached, len(records), plan) and journal.phase(after_phase(reached)) is None:
                asked = plan if reached == len(records) else replace(plan, new_tokens=0, forward_repeats=0)
                journal.keep(measure(method, records[:reached], asked, after_phase(reached), reached, start))


def _resumed(method: EditingMethod, journal: Journal, plan: Plan) -> int:
    """Bring the method to the newest state that the journal holds; returns how many batches are done by that."""
    found = None if plan.reset else journal.state()
    if found is None:
        return 0
    # A step is measured before the next batch is written, so only the newest one can be missing here.
    done, state = found
    method.restore(state)
    return done


def _edit(method: EditingMethod, batch: Sequence[Record], number: int, plan: Plan, journal: Journal) -> None:
    seed_everything(plan.seed + number)
    device = next(method.model.parameters()).device
    reset_peak(device)
    started = time.perf_counter()
    method.edit(batch)
    wait(device)
    seconds = time.perf_counter() - started
    known = {entry["batch"] for entry in journal.batches()}
    if number not in known:  # a batch made again has its time already
        entry = {
            "batch": number,
            "edits": len(batch),
            "seconds": seconds,
            "kept_megabytes": method.kept_bytes() / 2**20,
            "peak_megabytes": peak_megabytes(device),
        }
        journal.keep_batch(entry, None if plan.reset else method.state)


def _batches(records: Sequence[Record], size: int) -> Iterator[tuple[int, Sequence[Record], int]]:
    """Number of the batch, its records, and how many records there are up to its end."""
    for number, start in enumerate(range(0, len(records), size)):
        batch = records[start : start + size]
        yield number, batch, start + len(batch)


def is_step(reached: int, total: int, plan: Plan) -> bool:
    """Whether all edits so far are scored after the batch that ends at `reached`: it passes a number asked for."""
    first = reached - (reached % plan.batch_size or plan.batch_size)
    return reached == total or any(first < step <= reached for step in plan.evaluate_at)


def after_phase(reached: int) -> str:
    """Name of the phase that scores everything after that many edits."""
    return f"after-{reached:06d}"


def batch_phase(number: int) -> str:
    """Name of the phase that scores one batch of single-round editing."""
    return f"batch-{number:06d}"


def measure(
    method: EditingMethod, records: Sequence[Record], plan: Plan, name: str, edits: int, start: Any = None
) -> Phase:
    """Read every probe of `records` and the held-out text; `start` is the method's state before any edit."""
    model, tokenizer, asking = method.model, method.tokenizer, method.asking
    readings = read(model, tokenizer, records, f"scores {name}", plan.rivals, asking)
    rows: list[dict[str, Any]] = [
        {"case_id": record.case_id, **reading.to_dict(), "texts": _texts(tokenizer, reading)}
        for record, reading in zip(records, readings, strict=True)
    ]
    if plan.new_tokens:
        prompts = [record.prompt for record in records]
        room = [room_for(tokenizer, record.target_new, plan.new_tokens) for record in records]
        for row, text in zip(rows, generate(model, tokenizer, prompts, room, asking), strict=True):
            row["generated"] = text
    if plan.extra is not None and name != BEFORE:
        for row, more in zip(rows, plan.extra(method, records), strict=True):
            row.update(more)
    header: dict[str, Any] = {"phase": name, "edits": edits, "records": len(records)}
    if plan.held_text:
        # Running text has no prompt, so a method that must be told where that ends has no perplexity.
        held = (plan.held_text, plan.held_tokens, plan.held_window)
        header["held"] = window_losses(model, tokenizer, *held) if asking.at is None else []
    if plan.held_text and plan.forward_repeats and start is not None:
        header["forward_seconds"] = forward_pairs(method, start, plan)
    return Phase(name, header, rows)


def forward_pairs(method: EditingMethod, start: Any, plan: Plan) -> list[tuple[float, float]]:
    """Seconds of a forward pass, of the edited and of the unedited model, `forward_repeats` times in turn.

    In turn, because on a machine that others use too, times before the edits and hours later do not compare.
    """
    edited, found = method.state(), []
    for _ in range(plan.forward_repeats):
        try:
            method.restore(start)
        except NoWayBack:
            return []
        before = forward_seconds(method.model, method.tokenizer, plan.held_text, asking=method.asking)
        method.restore(edited)
        found.append((forward_seconds(method.model, method.tokenizer, plan.held_text, asking=method.asking), before))
    return found


def consecutive(
    method: EditingMethod, records: Sequence[Record], batch_size: int, held_text: str, samples: int = 5
) -> Outcome:
    """Edit `records` batch after batch, and measure before the first and after the last."""
    journal = Memory()
    spread = records[:: max(1, len(records) // samples)][:samples] if samples else []
    method.prepare()
    prompts = [record.prompt for record in spread]
    said_before = generate(method.model, method.tokenizer, prompts, asking=method.asking)
    run(method, records, Plan(batch_size, held_text), journal)
    said_after = generate(method.model, method.tokenizer, prompts, asking=method.asking)
    old, new = journal.phases[BEFORE], journal.phases[after_phase(len(records))]
    before, after = ([Reading.from_dict(row) for row in phase.rows] for phase in (old, new))
    scores = [(score(b, b), score(b, a)) for b, a in zip(before, after, strict=True)]
    return Outcome(
        method=method.name,
        records=[
            {
                "case_id": record.case_id,
                "prompt": record.prompt,
                "subject": record.subject,
                "target_new": record.target_new,
                "before": _known(asdict(b)),
                "after": _known(asdict(a)),
            }
            for record, (b, a) in zip(records, scores, strict=True)
        ],
        before=mean_scores([b for b, _ in scores]),
        after=mean_scores([a for _, a in scores]),
        perplexity_before=perplexity_of(old.header["held"]),
        perplexity_after=perplexity_of(new.header["held"]),
        seconds_per_edit=sum(entry["seconds"] for entry in journal.done) / len(records),
        kept_megabytes=method.kept_bytes() / 2**20,
        peak_megabytes=max(entry["peak_megabytes"] for entry in journal.done),
        samples=[
            {"prompt": record.prompt, "target": record.target_new, "before": b, "after": a}
            for record, b, a in zip(spread, said_before, said_after, strict=True)
        ],
    )


def read(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    what: str = "scores",
    rivals: bool = False,
    asking: Asking | None = None,
) -> list[Reading]:
    """Ask the model every probe of every record."""
    asked: list[tuple[str, str]] = []
    counts = []
    for record in records:
        probes = [
            [(record.prompt, record.target_new)],
            [(prompt, record.target_new) for prompt in record.rephrases],
            [(probe.prompt, probe.answer) for probe in record.locality],
            [(probe.prompt, probe.answer) for probe in record.portability],
        ]
        if rivals:
            old = [record.ground_truth] if record.ground_truth else []
            probes += [
                [(record.prompt, truth) for truth in old],
                [(prompt, truth) for truth in old for prompt in record.rephrases],
                [(probe.prompt, record.target_new) for probe in record.locality],
            ]
        counts.append([len(group) for group in probes])
        asked += [probe for group in probes for probe in group]
    chunk = 512  # rows of like length share a pass, and the bar moves
    said: list[Answer] = []
    for start in tqdm(range(0, len(asked), chunk), desc=what, unit="batch", leave=False):
        said += answers(model, tokenizer, asked[start : start + chunk], asking=asking)
    source = iter(said)
    return [Reading(*([next(source) for _ in range(count)] for count in row)) for row in counts]


def score(before: Reading, after: Reading) -> Scores:
    """The toolkit's four scores of one record; with `after` equal to `before`, those of the unedited model."""
    kept = [agreement(b.said, a.said) for b, a in zip(before.locality, after.locality, strict=True)]
    return Scores(
        reliability=mean_of_known([answer.accuracy for answer in after.prompt]),
        generality=mean_of_known([answer.accuracy for answer in after.rephrases]),
        locality=mean_of_known(kept),
        portability=mean_of_known([answer.accuracy for answer in after.portability]),
    )


def mean_scores(scores: Sequence[Scores]) -> dict[str, float]:
    """Mean of each score over the records that have it."""
    return {name: mean_of_known([getattr(one, name) for one in scores]) for name in METRICS}


def seed_everything(seed: int) -> None:
    """Every generator that a method of the toolkit may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what the toolkit uses
    torch.manual_seed(seed)


def peak_megabytes(device: torch.device | None = None) -> float:
    """Largest memory since `reset_peak`: resident memory of this process, or what was allocated on a CUDA `device`."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak(device: torch.device | None = None) -> None:
    """Measure `peak_megabytes` from here on; where the system cannot, it stays that of the whole process."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _texts(tokenizer: Any, reading: Reading) -> dict[str, list[str]]:
    """What was said at each probe, for people."""
    return {
        name: [tokenizer.decode(answer.said).strip() for answer in getattr(reading, name)]
        for name in ("prompt", "rephrases", "locality", "portability")
    }


def _known(scores: dict[str, float]) -> dict[str, float]:
    """Without NaN, which JSON does not know."""
    return {name: value for name, value in scores.items() if not math.isnan(value)}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
