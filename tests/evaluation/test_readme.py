"""The README's tables: what they say, and that they are the committed figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from evaluation.journal import ABOUT, BATCHES, CONFIG, DONE, RECORDS
from evaluation.leaderboard import load_jobs, row_of
from evaluation.leaderboard.rows import COLUMNS, SCORES, UNKNOWN, Row
from evaluation.protocol import METRICS, Reading
from evaluation.readme import RESULTS, ROOT, TABLES, figures, filled


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_committed_figures(name: str) -> None:
    told = json.loads(figures(name).read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme, name, TABLES[name](told)) == readme


def test_the_committed_leaderboard_is_what_its_jobs_say() -> None:
    committed = {
        row["job"]: row for row in json.loads(figures("leaderboard").read_text()) if row["method"] != "unedited"
    }
    jobs = load_jobs(RESULTS / "leaderboard")
    assert {job.folder.name for job in jobs} == set(committed)
    for job in jobs:
        found, told = row_of(job).to_dict(), committed[job.folder.name]
        assert (found["dataset"], found["edits"]) == (told["dataset"], told["edits"])
        for name in SCORES:
            assert found[name] == (told[name] and pytest.approx(told[name], abs=1e-9)), (job.folder.name, name)


def test_no_data_set_is_given_on_with_the_committed_results() -> None:
    """Each has terms of its own. `python -m evaluation.leaderboard --publish` leaves their texts out."""
    jobs = load_jobs(RESULTS / "leaderboard")
    assert {path.parent for path in RESULTS.glob(f"**/{RECORDS}")} == {job.folder for job in jobs} != set()
    for job in jobs:
        files = {path.name for path in job.folder.iterdir()}
        assert files == {ABOUT, CONFIG, DONE, RECORDS, BATCHES, "phases"}
        listed = json.loads((job.folder / RECORDS).read_text(encoding="utf-8"))
        assert all(set(record) == {"case_id"} for record in listed)
        tokens: dict[str, set[int]] = {}  # of a record's answers: counted through, not the tokenizer's
        for name in job.journal.phases():
            phase = job.journal.phase(name)
            assert phase is not None
            for row in phase.rows:
                for answer in (one for group in Reading.__dataclass_fields__ for one in row.get(group, [])):
                    tokens.setdefault(row["case_id"], set()).update(answer[0], answer[1])
        assert len(tokens) == len(listed)
        assert all(max(found) == len(found) - 1 for found in tokens.values()), job.folder.name


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
    told = {"before": dict.fromkeys(METRICS, 0.25), **dict.fromkeys(METRICS, 0.9), "perplexity_ratio": 1.1}
    table = TABLES["demo"]({"edits": 3, "methods": {"CoachHooK": {**told, "seconds_per_edit": 2.4}}})
    once = filled(readme, "demo", table)
    assert once.startswith("before\n<!-- demo-table -->")
    assert once.endswith("<!-- /demo-table -->\nafter\n")
    assert "old" not in once
    assert "| CoachHooK | 0.900 | 0.900 | 0.900 | 0.900 | 1.100 | 2.4 |" in once
    assert filled(once, "demo", table) == once
