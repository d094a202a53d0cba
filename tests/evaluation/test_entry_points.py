"""The toolkit's own editor is called as its methods expect it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from evaluation.data import Probe, Record
from evaluation.entry_points import entry_point
from evaluation.methods.peers import Peer

RECORDS = [
    Record(f"r{i}", f"Town {i} lies in", f"Town {i}", "Rome", portability=(Probe("hop", f"Who rules {i}?", "Ida"),))
    for i in range(5)
]


class Editor:
    """A checkout's editor, with a method that takes its batch in parts of `batch_size_once`, as UltraEdit does."""

    def __init__(self, **hparams: int) -> None:
        self.hparams = SimpleNamespace(**hparams)
        self.written: list[list[str]] = []  # what was written together
        self.asked: list[Any] = []  # the questions in steps of each record

    def batch_edit(
        self, prompts: Sequence[str], target_new: Sequence[str], ground_truth: Any = None, locality_inputs: Any = None,
        portability_inputs: Any = None, sequential_edit: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        size = self.hparams.batch_size
        for start in range(0, len(prompts), size):
            chunk = list(prompts[start : start + size])
            assert len(chunk) >= size, "the method refuses a batch that is shorter than it says"
            once = getattr(self.hparams, "batch_size_once", size)
            self.written += [chunk[at : at + once] for at in range(0, size, once)]
        return self.told(prompts, portability_inputs)

    def edit(
        self, prompts: Sequence[str], target_new: Sequence[str], ground_truth: Any = None, locality_inputs: Any = None,
        portability_inputs: Any = None, sequential_edit: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        assert self.hparams.batch_size == 1
        self.written += [[prompt] for prompt in prompts]
        return self.told(prompts, portability_inputs)

    def told(self, prompts: Sequence[str], portability: Any) -> Any:
        self.asked += portability["hop"]["prompt"] if portability else [None] * len(prompts)
        scores: dict[str, Any] = {"rewrite_acc": [1.0], "locality": {}, "portability": {}}
        return [{"pre": scores, "post": scores, "asked": prompt} for prompt in prompts], None, None


def call(editor: Editor, name: str, batch_size: int, records: Sequence[Record] = RECORDS, **given: bool) -> list[Any]:
    method = SimpleNamespace(editor=editor, name="UltraEdit", one_by_one=False)
    found = entry_point(method, records, name, batch_size, given.get("sequential", False))
    assert [(one["case_id"], one["asked"]) for one in found] == [(one.case_id, one.prompt) for one in records]
    return found


@pytest.mark.parametrize(("once", "batch_size", "parts"), [
    (1, 1, [1, 1, 1, 1, 1]),
    (1, 5, [1, 1, 1, 1, 1]),  # as asked: in parts of two it would also train the padding of the shorter
    (10, 2, [2, 2, 1]),
    (10, 5, [5]),
    (10, 9, [5]),
    (2, 4, [2, 2, 1]),
    (2, 3, [1, 1, 1, 1, 1]),  # two do not divide three; the method would drop the third
])  # fmt: skip
def test_no_fact_is_dropped_by_a_method_that_cuts_its_batches(once: int, batch_size: int, parts: list[int]) -> None:
    editor = Editor(batch_size=1, batch_size_once=once)
    call(editor, "batch_edit", batch_size)
    assert [prompt for part in editor.written for prompt in part] == [record.prompt for record in RECORDS]
    assert [len(part) for part in editor.written] == parts


def test_what_the_release_would_measure_or_train_wrongly_is_refused() -> None:
    """It scores `pre` after writing: where the edits stay, nothing would seem to have changed."""

    class Release(Editor):
        def batch_edit(self, prompts: Any, target_new: Any, keep_original_weight: bool = False, **more: Any) -> Any:
            return super().batch_edit(prompts, target_new)

    method = Peer.__new__(Peer)
    method.editor, method.name, method.algorithm = Release(batch_size=1), "FT", "FT"
    with (
        patch.object(Peer, "one_by_one", False),
        pytest.raises(ValueError, match="scores FT's `pre` after it has written edits that stay"),
    ):
        entry_point(method, RECORDS, "batch_edit", 2, sequential=True)
    with (
        patch.object(Peer, "one_by_one", False),
        pytest.raises(ValueError, match="release's FT pads the facts"),
    ):
        entry_point(method, RECORDS, "batch_edit", 2, sequential=False)
    assert method.editor.written == []


def test_methods_without_parts_get_none() -> None:
    editor = Editor(batch_size=1)
    call(editor, "batch_edit", 2)
    assert [len(batch) for batch in editor.written] == [2, 2, 1]
    assert set(vars(editor.hparams)) == {"batch_size"}


@pytest.mark.parametrize(
    ("name", "sequential", "asked"),
    [
        ("batch_edit", False, [0, 1, 4]),  # record 2's steps are in two batches
        ("batch_edit", True, [0, 1, 2, 4]),
        ("edit", False, [0, 4]),
        ("edit", True, [0, 1, 2, 4]),
    ],
)
def test_questions_in_steps_are_asked_only_where_all_steps_are_written(
    name: str, sequential: bool, asked: list[int]
) -> None:
    steps = {1: ("r0", "r1"), 2: ("r1", "r2")}
    records = [
        Record(one.case_id, one.prompt, one.subject, one.target_new, portability=one.portability if i != 3 else (),
               steps=steps.get(i, ()))
        for i, one in enumerate(RECORDS)
    ]  # fmt: skip
    editor = Editor(batch_size=1, batch_size_once=1)
    call(editor, name, 2, records, sequential=sequential)
    assert editor.asked == [[f"Who rules {i}?"] if i in asked else None for i in range(5)]
