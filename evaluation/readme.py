"""Put the committed figures into the README: `python -m evaluation.readme`.

Reads what lies under `evaluation/results`; copy a run there from `results` when it shall be shown. A table stands
between two markers, for instance `<!-- demo-table -->` and `<!-- /demo-table -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .benchmarks.report import BARS
from .leaderboard import Row, cell
from .leaderboard.rows import THREE
from .protocol import METRICS
from .tables import markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def demo(figures: dict[str, Any]) -> str:
    """Scores before and after the edits of the demo, and what they cost."""
    methods = figures["methods"]
    before = next(iter(methods.values()))["before"]
    rows = [["unedited", *(f"{before[name]:.3f}" for name in METRICS), "1.000", ""]]
    for name, of in methods.items():
        scores = [f"{of[metric]:.3f}" for metric in METRICS]
        rows.append([name, *scores, f"{of['perplexity_ratio']:.3f}", f"{of['seconds_per_edit']:.1f}"])
    head = [f"after {figures['edits']} edits", *METRICS, "perplexity ratio", "seconds per edit"]
    return markdown_table(head, rows).replace("|  |", "| |") + "\n"


def benchmarks(figures: dict[str, Any]) -> str:
    """Every ratio beside its goal."""
    rows = [
        [label, f"{figures[name]:.2f}", f"{'at least' if more else 'at most'} {bar:g}"]
        for name, (label, bar, more) in BARS.items()
    ]
    return markdown_table(["ratio", "measured", "goal"], rows) + "\n"


def scope(figures: dict[str, Any]) -> str:
    """The editing scopes by data set."""
    names = ("reliability", "generality", "locality", "perplexity_ratio", "open_rate_text", "starts_with_answer")
    rows = [
        [dataset, name, str(of["edits"]), *(f"{of[column]:.3f}" for column in names)]
        for dataset, scopes in figures.items()
        for name, of in scopes.items()
    ]
    head = ["data set", "scope", "edits", *(name.replace("_", " ") for name in names)]
    return markdown_table(head, rows, left=2) + "\n"


def leaderboard(told: list[dict[str, Any]]) -> str:
    """A table for each group of rows; intervals where methods are told apart by them."""
    spread = ("mean", "behind_first")
    columns = (*THREE, *spread, "starts_with_answer", "free_generation", "perplexity_ratio", "seconds_per_edit")
    groups: dict[str, list[list[str]]] = {}
    for row in map(Row.from_dict, told):
        cells = [row.method, *(cell(row, name, interval=name in spread) for name in columns)]
        groups.setdefault(row.title, []).append(cells)
    head = [name.replace("_", " ") for name in columns]
    return "\n\n".join(markdown_table([title, *head], lines) for title, lines in groups.items()) + "\n"


TABLES: dict[str, Callable[[Any], str]] = {
    "demo": demo, "benchmarks": benchmarks, "scope": scope, "leaderboard": leaderboard
}  # fmt: skip


def figures(name: str) -> Path:
    """The file that a table is made from."""
    return RESULTS / name / ("leaderboard.json" if name == "leaderboard" else "summary.json")


def filled(readme: str, name: str, table: str) -> str:
    """The README with the table between its markers replaced.

    Raises:
        ValueError: the README has no such markers.
    """
    start, stop = f"<!-- {name}-table -->\n", f"<!-- /{name}-table -->"
    head, found, rest = readme.partition(start)
    _, closed, tail = rest.partition(stop)
    if not found or not closed:
        raise ValueError(f"the README has no place for the {name} table; put {start.strip()} and {stop} there")
    return f"{head}{start}\n{table}\n{stop}{tail}"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if figures(name).is_file():
            text = filled(text, name, table(json.loads(figures(name).read_text(encoding="utf-8"))))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
