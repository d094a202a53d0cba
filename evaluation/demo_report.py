"""The demo's outcomes as tables on the terminal, as files, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonlines
from rich.console import Console
from rich.table import Table

from .pictures import COLOURS, new_figure, save_figure
from .protocol import METRICS, Outcome

BEFORE = "#c9ccd1"


def summary(outcomes: Sequence[Outcome], model: str, batch_size: int) -> dict[str, Any]:
    """The figures of a run, by method."""
    return {
        "model": model,
        "edits": len(outcomes[0].records),
        "batch_size": batch_size,
        "methods": {
            outcome.method: {
                **{name: outcome.after[name] for name in METRICS},
                "perplexity_ratio": outcome.perplexity_ratio,
                "seconds_per_edit": outcome.seconds_per_edit,
                "before": {**outcome.before, "perplexity": outcome.perplexity_before},
                "perplexity": outcome.perplexity_after,
                "kept_megabytes": outcome.kept_megabytes,
                "peak_megabytes": outcome.peak_megabytes,
            }
            for outcome in outcomes
        },
    }


def write_metrics(outcomes: Sequence[Outcome], path: Path) -> None:
    """A line for each edit and method."""
    with jsonlines.open(path, "w") as lines:
        for outcome in outcomes:
            lines.write_all({"method": outcome.method, **record} for record in outcome.records)


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """Scores before and after, perplexity, time and memory."""
    table = Table(title=f"{len(outcomes[0].records)} consecutive edits: before → after")
    columns = ("method", *METRICS, "perplexity", "s/edit", "kept MB", "peak MB")
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for o in outcomes:
        table.add_row(
            o.method,
            *(f"{o.before[name]:.3f} → {o.after[name]:.3f}" for name in METRICS),
            f"{o.perplexity_before:.1f} → {o.perplexity_after:.1f}",
            f"{o.seconds_per_edit:.1f}",
            f"{o.kept_megabytes:.0f}",
            f"{o.peak_megabytes:.0f}",
        )
    console.print(table)


def print_samples(outcomes: Sequence[Outcome], console: Console) -> None:
    """Greedy continuations of five edited prompts."""
    table = Table(title="What the model says, before and after", show_lines=True)
    for name in ("prompt → new target", "before", *(f"after: {outcome.method}" for outcome in outcomes)):
        table.add_column(name, overflow="fold")
    for row in zip(*(outcome.samples for outcome in outcomes), strict=True):
        first = row[0]
        table.add_row(
            f"{first['prompt']} → {first['target']}", _line(first["before"]), *(_line(one["after"]) for one in row)
        )
    console.print(table)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Scores before and after as bars; seconds per edit and drift of perplexity beside them."""
    figure, ((left, middle, right),) = new_figure(1, 3, 11 / 3, 3.9, ratios=(3.2, 1, 1))
    width = 0.8 / (len(outcomes) + 1)
    for place, name in enumerate(METRICS):
        bars = [("before", outcomes[0].before[name], BEFORE)]
        bars += [(o.method, o.after[name], colour) for o, colour in zip(outcomes, COLOURS, strict=False)]
        for i, (label, value, colour) in enumerate(bars):
            at = place + (i - len(outcomes) / 2) * width
            left.bar(at, value, width * 0.92, color=colour, label=label if place == 0 else None)
            left.text(at, value + 0.015, f"{value:.2f}", ha="center", fontsize=8)
    left.set_xticks(range(len(METRICS)), [name.capitalize() for name in METRICS])
    left.set_ylim(0, 1.12)
    left.set_ylabel("share of tokens")
    left.set_title(f"After {len(outcomes[0].records)} consecutive edits", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9, ncols=len(outcomes) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    for i, (outcome, colour) in enumerate(zip(outcomes, COLOURS, strict=False)):
        middle.bar(i, outcome.seconds_per_edit, 0.55, color=colour)
        right.plot(i, outcome.perplexity_ratio, "o", markersize=9, color=colour)  # a bar would have to begin at 0
        for axis, value, text in (
            (middle, outcome.seconds_per_edit, f"{outcome.seconds_per_edit:.1f}"),
            (right, outcome.perplexity_ratio, f"{outcome.perplexity_ratio:.3f}"),
        ):
            axis.annotate(text, (i, value), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    for axis, title in ((middle, "Seconds per edit"), (right, "Perplexity ratio")):
        axis.set_xticks(range(len(outcomes)), [outcome.method for outcome in outcomes])
        axis.set_xlim(-0.6, len(outcomes) - 0.4)
        axis.set_title(title, loc="left", fontsize=11)
        axis.margins(y=0.15)
    right.axhline(1, color="#888888", linewidth=0.8)
    right.set_ylim(0.9, max(1.1, *(o.perplexity_ratio * 1.03 for o in outcomes)))
    save_figure(figure, path, ("png",))


def _line(text: str) -> str:
    return " ".join(text.split())
