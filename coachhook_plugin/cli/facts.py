"""Facts from a file of JSON lines; whatever is wrong is said by line number."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..ledger import Ledger
from ..session import EditResult, EditSession
from ..tokens import Request, parse_requests


class FactsError(ValueError):
    """A file of facts that cannot be used."""


@dataclass(frozen=True)
class Fact:
    """One line of the file."""

    line: int  # from 1
    request: Request


def read_facts(path: Path) -> list[Fact]:
    """The facts of a file: on each line a JSON object with `prompt`, `subject` and `target_new`; others are ignored.

    Raises:
        FactsError: the file cannot be read, a line is no such object, or there is none.
    """
    try:
        # Only line ends separate lines: a text may hold other separators of Unicode.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FactsError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    facts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter for thousands of brackets in one another
            raise FactsError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise FactsError(f"{path}, line {number}: expected an object with prompt, subject and target_new")
        with _by_line(path, number):
            facts.append(Fact(number, parse_requests([content])[0]))
    if not facts:
        raise FactsError(f"{path}: holds no facts; write one JSON object on each line")
    return facts


def outstanding(facts: Sequence[Fact], ledger: Ledger) -> list[Fact]:
    """The facts that are still to be written, in the file's order.

    Of several targets for one prompt the last is what the file wants; those up to the one in force are behind us.
    """
    in_force = {(edit.prompt, edit.subject): edit.target_new for edit in ledger if edit.in_force}
    reached: set[tuple[str, str]] = set()
    left = []
    for fact in reversed(facts):
        request = fact.request
        told = request.prompt, request.subject
        if in_force.get(told) == request.target_new:
            reached.add(told)
        if told not in reached:
            left.append(fact)
    return left[::-1]


def check_facts(path: Path, facts: Sequence[Fact], session: EditSession) -> None:
    """Raise a `FactsError` for the first fact that the session cannot edit."""
    for fact in facts:
        with _by_line(path, fact.line):
            session.check([fact.request])


def edit_facts(path: Path, facts: Sequence[Fact], session: EditSession) -> EditResult:
    """Write one batch; where it fails the message has the line of the fact that is to blame."""
    try:
        return session.edit([fact.request for fact in facts], first=[fact.line for fact in facts])
    except (KeyError, ValueError) as error:
        said = str(error.args[0])
        if by_line(said) == said:
            raise
        raise ValueError(f"{path}, {by_line(said)}") from error


def batches(facts: Sequence[Fact], size: int) -> Iterator[list[Fact]]:
    """Facts in the file's order; two targets for one prompt are a change of mind, and never share a batch."""
    batch: list[Fact] = []
    told: dict[tuple[str, str], str] = {}
    for fact in facts:
        request = fact.request
        contradicts = told.get((request.prompt, request.subject), request.target_new) != request.target_new
        if len(batch) == size or contradicts:
            yield batch
            batch, told = [], {}
        batch.append(fact)
        told[request.prompt, request.subject] = request.target_new
    if batch:
        yield batch


class ByLine(logging.Formatter):
    """What a session says of a request, by its line; `first` has to be the lines."""

    def format(self, record: logging.LogRecord) -> str:
        return by_line(super().format(record))


def by_line(text: str) -> str:
    return re.sub(r"^request (?=\d)", "line ", text)


@contextmanager
def _by_line(path: Path, line: int) -> Iterator[None]:
    """What is wrong with the only request of a batch, by its line."""
    try:
        yield
    except (KeyError, ValueError) as error:
        said = str(error.args[0]).removeprefix("request 0").lstrip(",: ")
        raise FactsError(f"{path}, line {line}, {said}") from None
