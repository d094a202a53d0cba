"""What the demo leaves behind: figures, a line for each edit, a picture, a table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jsonlines
import pytest
from matplotlib import image
from rich.console import Console

from evaluation.demo import choose
from evaluation.demo_report import draw, print_samples, print_table, summary, write_metrics
from evaluation.protocol import METRICS, Outcome


def outcome(method: str, shift: float) -> Outcome:
    scores = dict.fromkeys(METRICS, 0.5 + shift)
    return Outcome(
        method=method,
        records=[{"case_id": str(i), "prompt": "p", "after": scores} for i in range(3)],
        before=dict.fromkeys(METRICS, 0.25),
        after=scores,
        perplexity_before=40.0,
        perplexity_after=40.0 + 10 * shift,
        seconds_per_edit=2.0 + shift,
        kept_megabytes=1.0,
        peak_megabytes=900.0,
        samples=[{"prompt": "The capital of France is", "target": "Rome", "before": " Paris", "after": " Rome"}],
    )


RUN = [outcome("CoachHooK", 0.4), outcome("MEMIT", 0.1)]


def test_the_summary_holds_the_promised_figures_for_every_method() -> None:
    figures = json.loads(json.dumps(summary(RUN, "m", 10), allow_nan=False))
    assert (figures["model"], figures["edits"], figures["batch_size"]) == ("m", 3, 10)
    assert set(figures["methods"]) == {"CoachHooK", "MEMIT"}
    ours = figures["methods"]["CoachHooK"]
    assert [ours[name] for name in METRICS] == pytest.approx([0.9] * 4)
    assert ours["perplexity_ratio"] == pytest.approx(1.1)
    assert ours["seconds_per_edit"] == pytest.approx(2.4)


def test_metrics_have_a_line_for_each_edit_and_method(tmp_path: Path) -> None:
    write_metrics(RUN, tmp_path / "metrics.jsonl")
    with jsonlines.open(tmp_path / "metrics.jsonl") as lines:
        rows = list(lines)
    assert [(row["method"], row["case_id"]) for row in rows] == [
        (method, str(i)) for method in ("CoachHooK", "MEMIT") for i in range(3)
    ]


@pytest.mark.parametrize("run", [RUN, RUN[:1]])
def test_the_picture_is_a_picture_with_one_method_and_with_two(run: list[Outcome], tmp_path: Path) -> None:
    draw(run, tmp_path / "demo.png")
    pixels = image.imread(tmp_path / "demo.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.02  # not blank


def test_the_tables_show_scores_before_and_after_and_what_the_model_says() -> None:
    told = io.StringIO()
    console = Console(file=told, width=150)
    print_table(RUN, console)
    print_samples(RUN, console)
    assert "0.250 → 0.900" in told.getvalue()
    assert "The capital of France is → Rome" in told.getvalue()


def test_the_demo_spreads_its_facts_over_the_relations() -> None:
    chosen = choose(30)
    assert len({record.case_id for record in chosen}) == 30
    assert len({record.case_id.split("-")[0] for record in chosen}) >= 18
    with pytest.raises(ValueError, match="--edits is 0"):
        choose(0)
