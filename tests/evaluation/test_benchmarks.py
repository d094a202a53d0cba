"""The benchmarks: every job measures what it says, and the report tells what was measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
import zoo
from rich.console import Console

from coachhook_plugin import EditSession
from evaluation.benchmarks.__main__ import Bench
from evaluation.benchmarks.jobs import ALL_STEPS, JOBS, arithmetic, consecutive, edits, inference, key_statistics
from evaluation.benchmarks.report import BARS, draw, reached, show


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Hyperparameters of a tiny model in a folder."""
    folder = tmp_path_factory.mktemp("bench")
    zoo.model("llama", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(zoo.TEXT * 4, encoding="utf-8")
    settings = zoo.hparams(folder / "text.txt", v_num_grad_steps=3).to_dict()
    settings["model_name"] = str(folder / "model")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(folder / "tiny.yaml")


def test_equal_steps_are_equal(model: str) -> None:
    told = edits(model, 4, steps=5)
    assert told["steps"] == [5] * 4
    assert told["seconds"] > 0
    assert all(step <= 3 for step in edits(model, 4)["steps"])
    assert set(ALL_STEPS.values()) == {0.0}


def test_every_consecutive_batch_is_timed_and_beside_the_late_ones_the_first_one_again(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited: list[int] = []  # steps taken before each batch
    edit = EditSession.edit

    def noted(self: EditSession, requests: Any) -> Any:
        edited.append(self.state.step)
        return edit(self, requests)

    monkeypatch.setattr(EditSession, "edit", noted)
    told = consecutive(model, batches=4, size=2, turns=2)
    assert edited == [0, 0, 1, 0, 2, 0, 3]  # the first of all warms up
    assert len(told["seconds"]) == 4
    assert len(told["first_in_turn"]) == 2


def test_inference_is_timed_with_and_without_hooks_in_turn(model: str) -> None:
    told = inference(model, repeats=2)
    assert [len(told[name]) for name in ("forward", "forward_base", "decode", "decode_base")] == [2] * 4
    assert told["kept_megabytes"] > 0


def test_operations_are_counted(model: str) -> None:
    few, many = (arithmetic(model, count)["operations"] for count in (1, 8))
    assert few > 0
    assert many > 4 * few


@pytest.mark.parametrize("even", [False, True])
def test_both_statistics_count_the_same_text(model: str, even: bool) -> None:
    pytest.importorskip("easyeditor")
    told = key_statistics(model, tokens=256, even=even)
    assert told["ours"] > 0
    assert told["toolkit"] > 0
    assert told["toolkit_tokens"] == pytest.approx(told["tokens"], rel=0.1)


def test_a_part_is_a_ratio_of_medians_with_its_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"memit": 100.0, "edits": 10.0}
    asked: list[tuple[str, dict[str, Any]]] = []

    def job(self: Bench, name: str, **arguments: Any) -> dict[str, Any]:
        asked.append((name, arguments))
        if name == "arithmetic":
            return {"operations": 4.0, "rate": 2.0}
        half = 2 if name == "edits" and "steps" not in arguments else 1
        return {"seconds": seconds[name] / half, "peak_megabytes": 100.0 + arguments["count"]}

    monkeypatch.setattr(Bench, "job", job)
    bench = Bench("m", Console(file=io.StringIO()))
    found = bench.edits(2)
    assert found["edit_speedup_equal_steps"] == 10
    assert found["edit_speedup_vs_toolkit_memit"] == 20
    assert found["share_of_arithmetic_limit"] == pytest.approx(2 / 5)
    assert len(found["raw_edits"]["toolkit_memit"]) == 2
    assert bench.memory()["peak_memory_100_over_10"] == pytest.approx(200 / 110)
    assert {name for name, _ in asked} <= set(JOBS)


def test_the_report_says_which_bars_are_reached(tmp_path: Path) -> None:
    figures: dict[str, Any] = {name: bar for name, (_, bar, _) in BARS.items()}
    assert all(reached(name, value) for name, value in figures.items())
    figures["forward_overhead"] = 1.2
    figures |= {"edits_per_second": {"1": 0.2, "10": 0.4}, "seconds_per_edit": {"toolkit_memit": 20.0}}
    figures["raw_batches"] = {"seconds": [1.0, 1.1], "first_in_turn": [1.05]}
    console = Console(file=io.StringIO(), width=120)
    show(json.loads(json.dumps(figures)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("reached") == len(BARS) - 1
    assert text.count("short") == 1
    draw(figures, tmp_path / "benchmarks.png")
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000
