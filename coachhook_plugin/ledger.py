"""The ledger: one line for every fact that was ever written, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .tokens import Request

Ledger = tuple["Edit", ...]  # oldest first


@dataclass(frozen=True)
class Edit:
    """One line of the ledger."""

    id: str  # "3-1": the first fact of step 3
    step: int
    time: str  # UTC, ISO 8601
    prompt: str
    subject: str
    target_new: str
    nll: float  # mean NLL of the target with its target value in place
    threshold: float | None  # what the scope asked of a token after the step (zscore: alpha); None without hook layers
    in_scope: bool  # whether the plain prompt's subject opened the scope
    status: Literal["in force", "superseded", "forgotten"] = "in force"
    by: str | None = None  # id of the edit that superseded it, or the step that forgot it

    @property
    def in_force(self) -> bool:
        return self.status == "in force"

    @property
    def place(self) -> int:
        """Of the fact in its batch, from 0."""
        return int(self.id.rpartition("-")[2]) - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Edit:
        return cls(**{f.name: line[f.name] for f in fields(cls)})


def lines_of_batch(
    ledger: Ledger,
    step: int,
    time: str,
    requests: Sequence[Request],
    nll: Sequence[float],
    threshold: float | None,
    in_scope: Sequence[bool],
) -> Ledger:
    """The lines that a batch changes, earlier edits of the same subject and prompt, and then those that it adds.

    Where the batch itself holds a fact more than once, the last line supersedes the others.
    """
    ids = {(request.subject, request.prompt): f"{step}-{i}" for i, request in enumerate(requests, 1)}
    superseded = [
        replace(edit, status="superseded", by=ids[edit.subject, edit.prompt])
        for edit in ledger
        if edit.in_force and (edit.subject, edit.prompt) in ids
    ]
    added = []
    for i, request in enumerate(requests, 1):
        last = ids[request.subject, request.prompt]
        line = Edit(
            id=f"{step}-{i}",
            step=step,
            time=time,
            prompt=request.prompt,
            subject=request.subject,
            target_new=request.target_new,
            nll=nll[i - 1],
            threshold=threshold,
            in_scope=in_scope[i - 1],
        )
        added.append(line if line.id == last else replace(line, status="superseded", by=last))
    return (*superseded, *added)


def with_lines(ledger: Ledger, lines: Ledger) -> Ledger:
    """The ledger with some lines replaced, by id, and new ones at its end."""
    found = {edit.id: edit for edit in ledger}
    found.update({edit.id: edit for edit in lines})
    return tuple(found.values())


def to_forget(ledger: Ledger, ids: Iterable[str]) -> list[Edit]:
    """The edits that must go for the facts `ids` to be as before: those themselves, and what they superseded.

    Raises:
        KeyError: an id that the ledger lacks.
        ValueError: an edit that is not in force, or no id at all.
    """
    known = {edit.id: edit for edit in ledger}
    wanted = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
    if not wanted:
        raise ValueError("edit_ids is empty; name at least one edit of the ledger")
    for i in wanted:
        if i not in known:
            raise KeyError(f"edit_ids: there is no edit {i!r}; the ledger lists those there are")
        if not known[i].in_force:
            remedy = f"forget {known[i].by!r} instead" if known[i].status == "superseded" else "it is gone already"
            raise ValueError(f"edit_ids: edit {i!r} is {known[i].status} (by {known[i].by}); {remedy}")
    gone, seen = [known[i] for i in wanted], set(wanted)
    for edit in gone:  # grows while it is walked through
        more = [line for line in ledger if line.id not in seen and _superseded(line, edit)]
        gone += more
        seen |= {line.id for line in more}
    return gone


def _superseded(one: Edit, by: Edit) -> bool:
    return one.status == "superseded" and one.by == by.id
