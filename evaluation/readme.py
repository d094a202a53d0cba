"""Put the committed figures into the README: `python -m evaluation.readme`.

Reads what lies under `evaluation/results`; copy a run there from `results` when it shall be shown. A table stands
between two markers, for instance `<!-- demo-table -->` and `<!-- /demo-table -->`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .benchmarks.report import BARS
from .leaderboard import Row, cell
from .leaderboard.rows import THREE
from .metrics import mean_of_known
from .protocol import METRICS
from .tables import markdown_table

ROOT = Path(__file__).parent.parent
BEHIND = "↓"  # behind its group's best method by more than the 95 % interval of the difference
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


def leaderboard(listed: list[dict[str, Any]]) -> str:
    """A line for each method, a column for each group of rows: the mean, and the three that it is of.

    The one that is least behind the best comes first (in the groups that most methods are in); ↓ says that it is
    behind by more than the interval.
    """
    rows = [Row.from_dict(row) for row in listed]
    titles = {row.group: f"{row.dataset}, {row.edits} edits" for row in rows}
    if len(set(titles.values())) < len(titles):
        titles = {row.group: row.title for row in rows}
    lines: dict[str, dict[Any, Row]] = {}
    for row in rows:
        lines.setdefault(row.method, {})[row.group] = row
    groups = sorted(titles, key=lambda group: (group[-1], group))
    means = {
        group: {name: of[group].metrics["mean"][0] for name, of in lines.items() if group in of} for group in groups
    }
    best = {group: max((mean for mean in means[group].values() if mean == mean), default=math.nan) for group in groups}
    # Not every method is in every group, and a longer one is harder: those that most are in decide.
    fullest = max(map(len, means.values()))
    deciding = [group for group in groups if len(means[group]) == fullest]

    def behind(name: str) -> float:
        for among in (deciding, groups):
            gap = mean_of_known([best[group] - means[group].get(name, math.nan) for group in among])
            if not math.isnan(gap):
                return gap
        return math.inf

    ordered = sorted(lines, key=behind)
    cells = [
        [
            name,
            *(_mean_of_three(lines[name].get(group), best[group]) for group in groups),
            _range(lines[name].values(), "starts_with_answer", 2),
            _range(lines[name].values(), "seconds_per_edit", 1),
        ]
        for name in ordered
    ]
    head = ["method", *(titles[group] for group in groups), "begins with the answer", "seconds per edit"]
    return markdown_table(head, cells) + "\n"


def _mean_of_three(row: Row | None, best: float) -> str:
    if row is None:
        return ""
    three = ", ".join(f"{row.metrics[name][0]:.2f}" for name in THREE)
    mean, (_, least, _) = cell(row, "mean", interval=False), row.metrics["behind_first"]
    shown = f"**{mean}**" if row.metrics["mean"][0] == best else mean
    return f"{shown}{BEHIND if least > 0 else ''} ({three})"


def _range(rows: Iterable[Row], name: str, digits: int) -> str:
    """The least and the greatest of a figure in a method's groups."""
    known = [of for row in rows if (of := row.metrics[name][0]) == of]
    ends = dict.fromkeys(f"{of:.{digits}f}" for of in (min(known), max(known))) if known else ()
    return " to ".join(ends)


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
