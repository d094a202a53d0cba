"""A run that is killed goes on where it stopped, and says the same as one that was not."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.data import Probe, Record
from evaluation.journal import Folder
from evaluation.metrics import Asking, generate, starts_with
from evaluation.protocol import Plan, after_phase, batch_phase, measure, peak_megabytes, reset_peak, run

RECORDS = [
    Record(
        f"r{i}",
        f"The capital of {name} is",
        name,
        target,
        "Paris",
        rephrases=(f"People in {name} rule from",),
        locality=(Probe("n", f"Norway is not {name}", "Seoul"),),
    )
    for i, (name, target) in enumerate(
        [("France", "Rome"), ("Spain", "Latin"), ("Norway", "Berlin"), ("Ada", "Seoul"), ("Italy", "English")]
    )
]
TEXT = "The best dish comes from Norway, says the old man. " * 8


class Drifting:
    """A "method" that moves the model by chance, and may be interrupted before it has done a batch."""

    name = "drifting"
    asking = Asking()

    def __init__(self, model: Any, tokenizer: Any, dies_at: int = -1) -> None:
        self.model, self.tokenizer, self.dies_at, self.calls = model, tokenizer, dies_at, 0

    def prepare(self) -> None:
        pass

    def edit(self, records: Sequence[Record]) -> None:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        with torch.no_grad():
            weight = self.model.lm_head.weight
            weight += 0.2 * torch.randn(weight.shape)

    def kept_bytes(self) -> int:
        return 0

    def state(self) -> Any:
        return self.model.lm_head.weight.detach().clone()

    def restore(self, state: Any) -> None:
        with torch.no_grad():
            self.model.lm_head.weight.copy_(state)


@pytest.fixture
def method(tiny: Callable[..., Any], tokenizer: Any) -> Callable[..., Drifting]:
    """`method(dies_at=2)`"""
    return lambda **given: Drifting(tiny("gpt2", tie_word_embeddings=False).eval(), tokenizer, **given)


def plan(**changed: Any) -> Plan:
    given: dict[str, Any] = {
        "batch_size": 2,
        "held_text": TEXT,
        "evaluate_at": (2, 3),
        "rivals": True,
        "new_tokens": 3,
    }
    return Plan(**{**given, "held_window": 32, **changed})


def phases(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted((folder / "phases").iterdir())}


@pytest.mark.parametrize("snapshots", [0, 1, 2])
@pytest.mark.parametrize("dies_at", [0, 1, 2])
@pytest.mark.parametrize("reset", [False, True])
def test_a_killed_run_resumes_and_says_the_same(
    tmp_path: Path, method: Callable[..., Drifting], snapshots: int, dies_at: int, reset: bool
) -> None:
    run(method(), RECORDS, plan(reset=reset), Folder(tmp_path / "whole", snapshots))
    with pytest.raises(KeyboardInterrupt):
        run(method(dies_at=dies_at), RECORDS, plan(reset=reset), Folder(tmp_path / "killed", snapshots))
    times = Folder(tmp_path / "killed").batches()
    last = method()
    run(last, RECORDS, plan(reset=reset), Folder(tmp_path / "killed", snapshots))
    assert phases(tmp_path / "killed") == phases(tmp_path / "whole")
    batches = Folder(tmp_path / "killed").batches()
    assert [told["batch"] for told in batches] == [0, 1, 2]
    assert batches[: len(times)] == times  # what was timed before is not timed again
    if snapshots == 1 or reset:
        assert last.calls == 3 - dies_at  # nothing is edited twice


def test_a_finished_phase_is_not_measured_again(tmp_path: Path, method: Callable[..., Drifting]) -> None:
    run(method(), RECORDS, plan(), Folder(tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "phases").iterdir()}
    again = method()
    run(again, RECORDS, plan(), Folder(tmp_path))
    assert again.calls == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "phases").iterdir()} == stamps


def test_steps_score_all_edits_so_far_and_later_edits_are_seen(
    tmp_path: Path, method: Callable[..., Drifting]
) -> None:
    run(method(), RECORDS, plan(), Folder(tmp_path))
    journal = Folder(tmp_path)
    # 2 ends a batch; 3 does not, and is reached with the batch that ends at 4.
    assert journal.phases() == [after_phase(2), after_phase(4), after_phase(5), "before"]
    found = {name: journal.phase(name) for name in journal.phases()}
    assert [len(phase.rows) for phase in found.values() if phase] == [2, 4, 5, 5]
    first, last = found[after_phase(2)], found[after_phase(5)]
    assert first is not None
    assert last is not None
    assert first.rows[0]["prompt"][0][2] != last.rows[0]["prompt"][0][2]
    # Half of an evaluation's time: the model speaks freely where somebody reads it, before and after all edits.
    assert {name: "generated" in phase.rows[0] for name, phase in found.items() if phase} == {
        "before": True, after_phase(2): False, after_phase(4): False, after_phase(5): True
    }  # fmt: skip


def test_single_rounds_start_from_the_unedited_model(tmp_path: Path, method: Callable[..., Drifting]) -> None:
    one = method()
    run(one, RECORDS, plan(reset=True), Folder(tmp_path))
    alone = method()
    run(alone, RECORDS[2:4], plan(reset=True, seed=1), Folder(tmp_path / "alone"))  # its seed is that of batch 1
    found, expected = Folder(tmp_path).phase(batch_phase(1)), Folder(tmp_path / "alone").phase(batch_phase(0))
    assert found is not None
    assert expected is not None
    assert found.rows == expected.rows


def test_a_round_asks_no_question_whose_steps_it_does_not_hold(
    tmp_path: Path, method: Callable[..., Drifting]
) -> None:
    hop = (Probe("multi_hop", "Who rules France?", "Ada"),)
    cut, whole = (replace(RECORDS[i], portability=hop, steps=(f"r{i - 1}", f"r{i}")) for i in (2, 4))
    records = [*RECORDS[:2], cut, RECORDS[3], whole]
    run(method(), records, plan(reset=True, batch_size=2), Folder(tmp_path / "cut"))
    run(method(), records, plan(reset=True, batch_size=5), Folder(tmp_path / "whole"))
    asked = {
        name: [
            len(row["portability"])
            for number in range(batches)
            for row in Folder(tmp_path / name).phase(batch_phase(number)).rows  # type: ignore[union-attr]
        ]
        for name, batches in (("cut", 3), ("whole", 1))
    }
    assert asked == {"cut": [0, 0, 0, 0, 0], "whole": [0, 0, 1, 0, 1]}


def test_a_long_answer_is_not_cut_before_its_end(method: Callable[..., Drifting]) -> None:
    one = method()
    said = generate(one.model, one.tokenizer, [RECORDS[0].prompt], 30)[0]
    long = replace(RECORDS[0], target_new=" ".join(said.split()[:-1]))
    assert len(one.tokenizer(long.target_new)["input_ids"]) > 20
    short = RECORDS[1]
    phase = measure(one, [long, short], plan(new_tokens=12), "before", 0)
    assert starts_with(phase.rows[0]["generated"], long.target_new)
    assert phase.rows[1]["generated"] == generate(one.model, one.tokenizer, [short.prompt], 12)[0]


def test_a_phase_holds_a_line_for_each_record_and_only_json(tmp_path: Path, method: Callable[..., Drifting]) -> None:
    one = method()
    journal = Folder(tmp_path)
    journal.keep(measure(one, RECORDS, plan(), "before", 0))
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "phases/before.jsonl").read_text().splitlines()
    ]
    assert [line["case_id"] for line in lines[1:]] == [record.case_id for record in RECORDS]
    assert all(line["generated"] is not None for line in lines[1:])
    assert lines[0]["held"]


def test_a_wrong_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        plan(batch_size=0)
    with pytest.raises(ValueError, match="evaluate_at"):
        plan(evaluate_at=(0,))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps one peak for each process")
def test_the_peak_of_a_batch_is_not_that_of_what_came_before() -> None:
    with mmap.mmap(-1, 200 * 2**20) as before:  # an allocator may keep what it is given back
        before[:: mmap.PAGESIZE] = bytes(200 * 2**20 // mmap.PAGESIZE)
        high = peak_megabytes()
    reset_peak()
    low = peak_megabytes()
    assert low < high - 150
    with mmap.mmap(-1, 100 * 2**20) as now:
        now[:: mmap.PAGESIZE] = bytes(100 * 2**20 // mmap.PAGESIZE)
        assert peak_megabytes() > low + 90
