"""A method's process: what it hands to the method, and what it leaves behind when something is in its way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from evaluation.data import Probe, Record, load_facts
from evaluation.journal import BUSY, LOCK
from evaluation.sources import Dataset
from evaluation.worker import left_alone, with_earlier, write


def record(number: int, neighbour: str | None) -> Record:
    locality = () if neighbour is None else (Probe("n", neighbour, "Oslo"),)
    return Record(f"r{number}", f"Town {number} lies in", f"Town {number}", "Rome", "Paris", locality=locality)


def dataset(edited: list[Record], spare: list[Record]) -> Dataset:
    return Dataset("towns", edited, spare, "c0ffee", {})


def test_a_method_never_learns_to_leave_alone_what_it_is_scored_on() -> None:
    edited = [record(0, "Village 0 lies in")]
    assert left_alone(dataset(edited, [record(1, "Village 1 lies in")])) == ["Village 1 lies in Oslo"]
    assert left_alone(dataset(edited, [record(1, "Village 0 lies in"), record(2, "Village 2 lies in")])) == [
        "Village 2 lies in Oslo"
    ]
    facts = load_facts()
    scored = {probe.prompt for fact in facts[:5] for probe in fact.locality}
    for spare in ([], [record(1, None)]):
        texts = left_alone(dataset(facts[:5], spare))
        assert texts
        assert not any(text.startswith(prompt) for prompt in scored for text in texts)
    with pytest.raises(ValueError, match="towns: every record is edited and scored"):
        left_alone(dataset(list(facts), []))


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.worker", str(tmp_path)]
    with FileLock(tmp_path / LOCK):
        done = subprocess.run(command, input="{}", text=True, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == BUSY, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_that_goes_on_with_other_programs_tells_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    for torch, earlier in (("1", []), ("1", []), ("2", ["1"]), ("2", ["1"]), ("3", ["1", "2"])):
        told = with_earlier({"torch": torch}, path)
        assert told == {"torch": torch, **({"earlier": [{"torch": one} for one in earlier]} if earlier else {})}
        write(path, told)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path / "done.json", {"finished": "now"})
    with pytest.raises(AttributeError):
        write(tmp_path / "done.json", {"finished": object()})
    assert json.loads((tmp_path / "done.json").read_text()) == {"finished": "now"}
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
