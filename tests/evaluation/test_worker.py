"""A method's process: what it hands to the method, and what it leaves behind when something is in its way."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from evaluation import machine
from evaluation.data import Probe, Record, load_facts
from evaluation.journal import BUSY, LOCK, write_json
from evaluation.processes import worker_environment
from evaluation.sources import Dataset
from evaluation.worker import left_alone, with_earlier


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
        write_json(path, told)


def test_folders_that_are_named_from_here_are_found_from_the_workers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("easyedit/easyeditor", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "easyedit/easyeditor/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASYEDIT_HOME", "easyedit")
    monkeypatch.setenv("COACHHOOK_CACHE", "kept")
    asks = (
        "import os; os.chdir('elsewhere')\n"
        "import coachhook_plugin, importlib.util\n"
        "from coachhook_plugin.cache import cache_dir\n"
        "print(importlib.util.find_spec('easyeditor').origin, cache_dir(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", asks], env=worker_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "easyedit/easyeditor/__init__.py"), str(tmp_path / "kept")]


def test_rows_from_unlike_machines_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "processor\t: {}\nmodel name\t: Some CPU\ncpu family\t: 6\nmodel\t\t: {}\nflags\t: a b: c\n\n"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for model in (85, 207):
        (tmp_path / "cpuinfo").write_text("".join(told.format(i, model) for i in range(2)), encoding="utf-8")
        assert machine.processor() == f"Some CPU, family 6 model {model}, 2 cores"
    (tmp_path / "cpuinfo").unlink()  # elsewhere than on Linux
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert machine.processor() == "arm, 2 cores"


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_json(tmp_path / "done.json", {"finished": "now"})
    with pytest.raises(AttributeError):
        write_json(tmp_path / "done.json", {"finished": object()})
    assert json.loads((tmp_path / "done.json").read_text()) == {"finished": "now"}
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
