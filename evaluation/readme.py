"""Put the committed figures into the README: `python -m evaluation.readme`.

Reads `evaluation/results/demo/summary.json` (copy it there from `results/demo` after a run that shall be shown).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .protocol import METRICS

ROOT = Path(__file__).parent.parent
SUMMARY = Path(__file__).parent / "results" / "demo" / "summary.json"
START, STOP = "<!-- demo-table -->\n", "<!-- /demo-table -->"


def table(figures: dict[str, Any]) -> str:
    """A Markdown table of a demo's `summary.json`: scores before and after, and what they cost."""
    methods = figures["methods"]
    before = next(iter(methods.values()))["before"]
    lines = [
        f"| after {figures['edits']} edits | {' | '.join(METRICS)} | perplexity ratio | seconds per edit |",
        "|---|" + "---:|" * (len(METRICS) + 2),
        f"| unedited | {' | '.join(f'{before[name]:.3f}' for name in METRICS)} | 1.000 | |",
    ]
    for name, of in methods.items():
        scores = " | ".join(f"{of[metric]:.3f}" for metric in METRICS)
        lines.append(f"| {name} | {scores} | {of['perplexity_ratio']:.3f} | {of['seconds_per_edit']:.1f} |")
    return "\n".join(lines) + "\n"


def filled(readme: str, figures: dict[str, Any]) -> str:
    """The README with the table between its markers replaced."""
    head, rest = readme.split(START, 1)
    _, tail = rest.split(STOP, 1)
    return head + START + "\n" + table(figures) + "\n" + STOP + tail


def main() -> None:
    path = ROOT / "README.md"
    figures = json.loads(SUMMARY.read_text(encoding="utf-8"))
    path.write_text(filled(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
