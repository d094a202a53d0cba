"""Editing data sets as one kind of record, whatever file they come from.

    records = load_records("counterfact.json", limit=100)
    print(len(records), dict(records.skipped))
    session.edit([record.request() for record in records])

`load_records` recognises the file by its fields, or is told its shape, one of `SHAPES`; `load_facts` reads the set
that is shipped here. A file is one JSON list, or JSON Lines. A record that no subject based editor could use, as one
whose target is null, is left out and counted by reason; a file that is not what it should be is refused with the
place, the field and the remedy.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from coachhook_plugin.tokens import occurrences

FACTS = Path(__file__).parent / "facts" / "facts.json"
HELD_TEXT = FACTS.with_name("held_text.txt")  # for the perplexity

FilePath: TypeAlias = "str | os.PathLike[str]"

# What an edit must leave alone, in files that give one such prompt and no name for it.
NEIGHBORHOOD = "neighborhood"
# What must follow from an edit, in files that give one question and no name for it.
ONE_HOP = "one_hop"
# WikiBigEdit's and MQuAKE's questions in several steps, and WikiBigEdit's questions in another person's words.
MULTI_HOP, PERSONAS = "multi_hop", "personas"

EMPTY_TARGET = "empty target"
NO_SUBJECT = "no subject"
SUBJECT_ABSENT = "subject not in the prompt"
SUBJECT_REPEATED = "subject more than once in the prompt"
BRACES = "braces in the prompt"  # the toolkit's templates give them a meaning
HALF_CHARACTER = "half a character"  # a lone surrogate: no tokenizer takes it


@dataclass(frozen=True)
class Probe:
    """One prompt beside the edit itself, with the answer that is expected of it."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One edit and everything it is measured by. `ground_truth` is "" where a file does not tell the old answer."""

    case_id: str
    prompt: str
    subject: str
    target_new: str
    ground_truth: str = ""
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    steps: tuple[str, ...] = ()  # case_ids of all edits that its portability follows from, if it takes several

    def request(self) -> dict[str, Any]:
        """The record as the toolkit's editors and `compute_edit_quality` take it: with one rephrasing, the first."""
        request: dict[str, Any] = {
            "case_id": self.case_id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "ground_truth": self.ground_truth,
            "locality": _by_kind(self.locality),
            "portability": _by_kind(self.portability),
        }
        if self.rephrases:
            request["rephrase_prompt"] = self.rephrases[0]
        return request


class Records(list[Record]):
    """A list of records that remembers what was left out: `skipped` counts by reason."""

    def __init__(self, records: list[Record] | None = None, skipped: Counter[str] | None = None) -> None:
        super().__init__(records or [])
        self.skipped: Counter[str] = Counter() if skipped is None else skipped


def answerable(records: Sequence[Record]) -> list[Record]:
    """The records, without those questions in steps that also need edits which are not among them."""
    there = {record.case_id for record in records}
    return [record if there.issuperset(record.steps) else replace(record, portability=()) for record in records]


def load_facts(limit: int | None = None) -> Records:
    """The data set that is shipped with this package."""
    return load_records(FACTS, limit, "knowedit")


def load_records(path: FilePath, limit: int | None = None, shape: str | None = None) -> Records:
    """The first `limit` records of a file that can be edited.

    Args:
        shape: one of `SHAPES`; where not given, recognised by the fields of the first record and, for WISE's set, by
            the subjects.

    Raises:
        ValueError: the file is not of that shape, or none of its records can be edited.
    """
    return records_of(read_raw(path), path, limit, shape)


def records_of(raw: list[Any], path: FilePath, limit: int | None = None, shape: str | None = None) -> Records:
    """As `load_records`, from a list of objects that is in memory already; messages call it `path`."""
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; choose from {', '.join(SHAPES)}, or leave it out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for the whole file; got {limit}")
    read = _recognised(path, raw) if shape is None else SHAPES[shape]
    records = Records()
    for index, item in enumerate(raw):
        if len(records) == limit:
            break
        found = read(_Fields(path, index, item))
        for record in [found] if isinstance(found, Record) else found:
            if len(records) == limit:
                break
            reason = _unusable(record)
            if reason is None:
                records.append(record)
            else:
                records.skipped[reason] += 1
    if not records:
        counts = ", ".join(f"{reason}: {n}" for reason, n in records.skipped.items())
        raise ValueError(f"{path}: none of its {len(raw)} records can be edited ({counts})")
    return records


def _recognised(path: FilePath, raw: list[Any]) -> Read:
    first = _Fields(path, 0, raw[0])
    read: Read
    if isinstance(first.raw.get("requested_rewrite"), list):
        read = _mquake
    elif "requested_rewrite" in first or "locality_prompt" in first:
        # A subject of one word may look the same in either set: any record tells.
        read = _hallucination if any(_named_as_file(item) for item in raw) else _counterfact
    elif "update" in first and "ans" in first:
        read = _wikibigedit
    elif "src" in first and "alt" in first:
        read = _zsre
    elif ("locality" in first or "portability" in first) and ("prompt" in first or "text" in first):
        read = _knowedit
    elif "prompt" in first and "target_new" in first:
        read = _counterfact
    else:
        raise ValueError(
            f"{path}, record 0: the fields {sorted(first.raw)} fit no known data set; expected ZsRE (src, alt), "
            "CounterFact (requested_rewrite, or prompt and target_new), KnowEdit (prompt, target_new, locality), "
            "WikiBigEdit (update, ans), MQuAKE (a list of requested_rewrite) or WISE's hallucination set (prompt, "
            "target_new, locality_prompt, and file names as subjects)"
        )
    return read


def _named_as_file(item: object) -> bool:
    """Whether a record's subject is a file name ("ada_brun") where its prompt has spaces."""
    prompt, named = (item.get("prompt"), item.get("subject")) if isinstance(item, dict) else (None, None)
    if not isinstance(prompt, str) or not isinstance(named, str):
        return False
    return "_" in named and named not in prompt and named.replace("_", " ").lower() in prompt.lower()


def read_raw(path: FilePath) -> list[Any]:
    """The JSON list in a file, its records unread."""
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read()
            lines = str(path).endswith(".jsonl")
            raw = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
        except ValueError as error:  # bad JSON and bad UTF-8 alike
            expected = "a JSON object in each line" if lines else "one JSON list of records (or name it .jsonl)"
            raise ValueError(f"{path}: not a JSON file ({error}); expected {expected}") from error
    if not isinstance(raw, list) or not raw:
        found = "an empty list" if isinstance(raw, list) else f"one {type(raw).__name__}"
        raise ValueError(f"{path}: holds {found}; expected one JSON list of records")
    return raw


def _unusable(record: Record) -> str | None:
    """Why no editor that looks the subject up in the prompt can use this record, or None."""
    if not record.target_new:
        return EMPTY_TARGET
    if not record.subject:
        return NO_SUBJECT
    if "{" in record.prompt or "}" in record.prompt:
        return BRACES
    if any("\ud800" <= letter <= "\udfff" for letter in record.prompt + record.target_new):
        return HALF_CHARACTER
    count = occurrences(record.prompt, record.subject)
    if count == 0:
        return SUBJECT_ABSENT
    return SUBJECT_REPEATED if count > 1 else None


def _by_kind(probes: tuple[Probe, ...]) -> dict[str, dict[str, list[str]]]:
    kinds: dict[str, dict[str, list[str]]] = {}
    for probe in probes:
        lists = kinds.setdefault(probe.kind, {"prompt": [], "ground_truth": []})
        lists["prompt"].append(probe.prompt)
        lists["ground_truth"].append(probe.answer)
    return kinds


# One function per published shape.


def _zsre(fields: _Fields) -> Record:
    """ZsRE in MEND's format: `subject, src, rephrase, alt, answers, loc, loc_ans`."""
    return Record(
        case_id=fields.case_id(),
        prompt=fields.text("src"),
        subject=fields.text("subject"),
        target_new=fields.text("alt"),
        ground_truth=fields.text("answers", default=""),
        rephrases=fields.texts("rephrase"),
        locality=fields.pair(NEIGHBORHOOD, "loc", "loc_ans"),
        portability=fields.hop(),
    )


def _counterfact(fields: _Fields) -> Record:
    """CounterFact, either EasyEdit's flat edit format or the original of ROME with `requested_rewrite`."""
    if "requested_rewrite" in fields:
        return _counterfact_original(fields)
    return Record(
        case_id=fields.case_id(),
        prompt=fields.text("prompt"),
        subject=fields.text("subject"),
        target_new=fields.text("target_new"),
        ground_truth=fields.text("ground_truth", default=""),
        rephrases=fields.texts("rephrase_prompt"),
        locality=fields.pair(NEIGHBORHOOD, "locality_prompt", "locality_ground_truth"),
        portability=fields.hop(),
    )


def _counterfact_original(fields: _Fields) -> Record:
    rewrite = fields.inner("requested_rewrite")
    subject, template = rewrite.text("subject"), rewrite.text("prompt")
    if template.count("{}") != 1:
        raise rewrite.error("prompt", f"must hold the subject's place, {{}}, exactly once; got {template!r}")
    truth = rewrite.inner("target_true").text("str")
    return Record(
        case_id=fields.case_id(),
        prompt=template.replace("{}", subject),
        subject=subject,
        target_new=rewrite.inner("target_new").text("str"),
        ground_truth=truth,
        rephrases=fields.texts("paraphrase_prompts"),
        # Its neighbours are chosen to share the old answer.
        locality=tuple(Probe(NEIGHBORHOOD, prompt, truth) for prompt in fields.texts("neighborhood_prompts") if truth),
        portability=fields.hop(),
    )


def _knowedit(fields: _Fields) -> Record:
    """KnowEdit: `subject, prompt, target_new`, with `locality` and `portability` lists by kind."""
    return Record(
        case_id=fields.case_id(),
        prompt=fields.text("prompt", "text"),
        subject=fields.text("subject", "concept"),
        target_new=fields.text("target_new", "labels"),
        ground_truth=fields.text("ground_truth", default=""),
        rephrases=fields.texts("rephrase_prompt", "rephrase"),
        locality=tuple(fields.probes("locality")),
        portability=tuple(fields.probes("portability")),
    )


def _wikibigedit(fields: _Fields) -> Record:
    """WikiBigEdit: `subject, update, ans`, with `rephrase, personas, mhop, mhop_ans, loc, loc_ans`."""
    answer = fields.text("ans")
    return Record(
        case_id=fields.case_id(),
        prompt=fields.text("update"),
        subject=fields.text("subject"),
        target_new=answer,
        ground_truth=fields.text("ground_truth", default=""),
        rephrases=fields.texts("rephrase"),
        locality=fields.pair(NEIGHBORHOOD, "loc", "loc_ans"),
        portability=(
            *(Probe(PERSONAS, prompt, answer) for prompt in fields.texts("personas")),
            *fields.pair(MULTI_HOP, "mhop", "mhop_ans"),
        ),
    )


def _mquake(fields: _Fields) -> list[Record]:
    """MQuAKE: an edit for each of a case's `requested_rewrite`; the multi-hop questions go with the last of them.

    A case with a rewrite that cannot be edited loses its questions: not every step of them could be written.
    """
    rewrites = fields.inners("requested_rewrite")
    answer = fields.text("new_answer", default="")
    hops = tuple(Probe(MULTI_HOP, question, answer) for question in fields.texts("questions") if answer)
    found = []
    for number, rewrite in enumerate(rewrites):
        subject, template = rewrite.text("subject"), rewrite.text("prompt")
        if template.count("{}") != 1:
            raise rewrite.error("prompt", f"must hold the subject's place, {{}}, exactly once; got {template!r}")
        found.append(
            Record(
                case_id=fields.case_id() if len(rewrites) == 1 else f"{fields.case_id()}.{number}",
                prompt=template.replace("{}", subject),
                subject=subject,
                target_new=rewrite.inner("target_new").text("str"),
                ground_truth=rewrite.inner("target_true").text("str"),
                rephrases=rewrite.texts("question"),
            )
        )
    if all(_unusable(record) is None for record in found):  # asked once every step of them is written
        found[-1] = replace(found[-1], portability=hops, steps=tuple(record.case_id for record in found))
    return found


def _hallucination(fields: _Fields) -> Record:
    """WISE's hallucination set (SelfCheckGPT): `prompt, target_new, subject, locality_prompt, ...`, long texts.

    Its subjects are file names ("john_russell_reynolds"); they are looked up in the prompt without regard to case.
    """
    prompt, named = fields.text("prompt"), fields.text("subject")
    at = prompt.lower().find(named.replace("_", " ").lower())
    return Record(
        case_id=fields.case_id(),
        prompt=prompt,
        subject=named if at < 0 else prompt[at : at + len(named)],
        target_new=fields.text("target_new"),
        ground_truth=fields.text("ground_truth", default=""),
        rephrases=fields.texts("rephrase_prompt"),
        locality=fields.pair(NEIGHBORHOOD, "locality_prompt", "locality_ground_truth"),
    )


class _Fields:
    """One JSON object of a file, read field by field, with errors that say where it stands."""

    def __init__(self, path: FilePath, index: int, raw: object, prefix: str = "") -> None:
        self.path, self.index, self.prefix = path, index, prefix
        if not isinstance(raw, dict):
            where = f"field '{prefix[:-1]}' " if prefix else ""
            raise ValueError(f"{path}, record {index}: {where}must be an object of named fields, not {_kind(raw)}")
        self.raw: dict[str, Any] = raw

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}, record {self.index}: field '{self.prefix}{name}' {problem}")

    def inner(self, name: str) -> _Fields:
        self._require(name)
        return _Fields(self.path, self.index, self.raw[name], f"{self.prefix}{name}.")

    def inners(self, name: str) -> list[_Fields]:
        self._require(name)
        value = self.raw[name]
        if not isinstance(value, list) or not value:
            raise self.error(name, f"must be a list of objects, not {_kind(value)}")
        return [_Fields(self.path, self.index, item, f"{self.prefix}{name}[{i}].") for i, item in enumerate(value)]

    def case_id(self) -> str:
        for name in ("case_id", "id"):
            if isinstance(self.raw.get(name), (int, str)):
                return str(self.raw[name])
        return str(self.index)

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of these fields that has a value, without outer spaces; of a list of answers, the first one.

        "" where they are there and null.
        """
        name = self._first(names)
        if name is None:
            if default is None:
                self._require(*names)
            return default or ""
        return self._answer(name, self.raw[name])

    def texts(self, *names: str) -> tuple[str, ...]:
        """All texts of the first of these fields that is there; none of them has to be."""
        name = self._first(names)
        if name is None:
            return ()
        value = self.raw[name]
        items = value if isinstance(value, list) else [value]
        return tuple(text for item in items if (text := self._answer(name, item)))

    def pair(self, kind: str, prompt_name: str, answer_name: str) -> tuple[Probe, ...]:
        """A probe; none where the prompt or its answer is empty or null."""
        prompt = self.text(prompt_name, default="")
        if not prompt:
            return ()
        answer = self.text(answer_name)
        return (Probe(kind, prompt, answer),) if answer else ()

    def hop(self) -> tuple[Probe, ...]:
        """The one question that EasyEdit's own portability files add to ZsRE and CounterFact."""
        if self.raw.get("portability") is None:
            return ()
        return self.inner("portability").pair(ONE_HOP, "New Question", "New Answer")

    def probes(self, name: str) -> Iterator[Probe]:
        """KnowEdit's `{kind: [{prompt, ground_truth}, ...]}`; as in the toolkit, one without an answer is no probe."""
        if self.raw.get(name) is None:
            return
        kinds = self.inner(name)
        for kind, value in kinds.raw.items():
            items = value if isinstance(value, list) else [] if value is None else [value]
            for number, item in enumerate(items):
                probe = _Fields(self.path, self.index, item, f"{kinds.prefix}{kind}[{number}].")
                probe._require("prompt")
                probe._require("ground_truth")
                prompts, truth = probe.raw["prompt"], probe.raw["ground_truth"]
                if isinstance(prompts, list):
                    if not isinstance(truth, list) or len(truth) != len(prompts):
                        raise probe.error(
                            "ground_truth", f"must be a list of {len(prompts)} answers, one for each prompt"
                        )
                else:
                    prompts, truth = [prompts], [truth]
                for prompt, answer in zip(prompts, truth, strict=True):
                    text, expected = probe._answer("prompt", prompt), probe._answer("ground_truth", answer)
                    if text and expected:
                        yield Probe(kind, text, expected)

    def _answer(self, name: str, value: object) -> str:
        while isinstance(value, list):  # alternatives, possibly nested: the first one counts
            value = value[0] if value else ""
        if _is_nothing(value):
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):  # a year
            return str(int(value) if isinstance(value, float) and value.is_integer() else value)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, not {_kind(value)}")
        return value.strip()

    def _first(self, names: Sequence[str]) -> str | None:
        """Which of these fields has a value."""
        return next((name for name in names if not _is_nothing(self.raw.get(name))), None)

    def _require(self, *names: str) -> None:
        if not any(name in self for name in names):
            there = ", ".join(sorted(self.raw)) or "nothing"
            other = "".join(f" (or '{name}')" for name in names[1:])
            raise self.error(
                names[0], f"is missing{other}: add it, or check that the file is of this kind; found {there}"
            )


def _is_nothing(value: object) -> bool:
    """null, or what pandas writes for it: NaN."""
    return value is None or value != value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


Read: TypeAlias = "Callable[[_Fields], Record | list[Record]]"

SHAPES: dict[str, Read] = {
    "zsre": _zsre,
    "counterfact": _counterfact,
    "knowedit": _knowedit,
    "wikibigedit": _wikibigedit,
    "mquake": _mquake,
    "hallucination": _hallucination,
}
