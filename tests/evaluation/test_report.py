"""What a run leaves behind: figures, a line for each edit, a picture, a table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonlines
import pytest
from matplotlib import image
from rich.console import Console

from evaluation.demo import choose
from evaluation.leaderboard.rows import COLUMNS, UNKNOWN, Row
from evaluation.protocol import METRICS, Outcome
from evaluation.readme import ROOT, TABLES, figures, filled
from evaluation.report import draw, print_samples, print_table, summary, write_metrics


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


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_committed_figures(name: str) -> None:
    if name == "leaderboard" and not figures(name).is_file():
        pytest.skip("no leaderboard is committed yet")
    told = json.loads(figures(name).read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme, name, TABLES[name](told)) == readme


def test_a_leaderboard_has_a_line_for_each_method_and_what_is_unknown_stays_empty() -> None:
    def row(method: str, edits: int, mean: float, seconds: float, behind: tuple[float, ...] = (0, 0, 0)) -> Row:
        known = {"reliability": 0.75, "generality": 0.5, "locality": 1.0, "mean": mean, "seconds_per_edit": seconds,
                 "starts_with_answer": 0.25}  # fmt: skip
        metrics = dict.fromkeys(COLUMNS, UNKNOWN) | {name: (of, of, of) for name, of in known.items()}
        metrics["behind_first"] = behind
        return Row(method, "towns", "c0ffee", 0, "first", edits, 10, "consecutive", "m", {}, metrics, "a")

    rows = [
        row("A", 60, 0.7, 1.26, (0.1, -0.01, 0.2)),
        row("B", 60, 0.8, 2.0),
        row("unedited", 60, 0.3, math.nan, (0.5, 0.4, 0.6)),
        row("A", 300, 0.3, 1.1),
        row("Nothing known", 300, math.nan, math.nan, (math.nan, math.nan, math.nan)),
    ]

    def table(rows: list[Row]) -> list[list[str]]:
        text = TABLES["leaderboard"](json.loads(json.dumps([row.to_dict() for row in rows])))
        lines = [line for line in text.splitlines() if "---" not in line]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    assert table(rows) == [
        ["method", "towns, 60 edits", "towns, 300 edits", "begins with the answer", "seconds per edit"],
        ["B", "**0.800** (0.75, 0.50, 1.00)", "", "0.25", "2.0"],
        # The best of the long run, however low all means are there.
        ["A", "0.700 (0.75, 0.50, 1.00)", "**0.300** (0.75, 0.50, 1.00)", "0.25", "1.1 to 1.3"],
        ["unedited", "0.300↓ (0.75, 0.50, 1.00)", "", "0.25", ""],
        ["Nothing known", "", "(0.75, 0.50, 1.00)", "0.25", ""],
    ]
    # Whoever took part in one more, harder run is not put behind for that.
    longer = [row("A", 60, 0.7, 1.0), row("B", 60, 0.8, 1.0), row("C", 60, 0.6, 1.0), row("A", 300, 0.1, 1.0),
              row("B", 300, 0.8, 1.0)]  # fmt: skip
    assert [line[0] for line in table(longer)] == ["method", "B", "A", "C"]
    # Two groups of one size are told apart in full.
    assert table([rows[0], replace(rows[0], skip=5)])[0][1:3] == [
        "towns, 60 edits, consecutive, m", "towns from record 6, 60 edits, consecutive, m"
    ]  # fmt: skip


def test_a_readme_without_a_place_for_a_table_is_named() -> None:
    with pytest.raises(ValueError, match="no place for the demo table"):
        filled("# Title\n", "demo", "| a |\n")


def test_the_table_is_replaced_and_nothing_else() -> None:
    readme = "before\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nafter\n"
    once = filled(readme, "demo", TABLES["demo"](summary(RUN, "m", 10)))
    assert once.startswith("before\n<!-- demo-table -->")
    assert once.endswith("<!-- /demo-table -->\nafter\n")
    assert "old" not in once
    assert "| CoachHooK | 0.900 | 0.900 | 0.900 | 0.900 | 1.100 | 2.4 |" in once
    assert filled(once, "demo", TABLES["demo"](summary(RUN, "m", 10))) == once
