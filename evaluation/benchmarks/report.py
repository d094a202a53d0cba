"""The benchmarks as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..pictures import COLOURS, GREY, new_figure, save_figure

# figure: (what it is, the bar it shall reach, whether more is better)
BARS: dict[str, tuple[str, float, bool]] = {
    "edit_speedup_equal_steps": ("toolkit's MEMIT / ours, equal steps", 6, True),
    "edit_speedup_vs_toolkit_memit": ("toolkit's MEMIT / ours, default settings", 10, True),
    "statistics_speedup_vs_toolkit": ("toolkit's statistics / ours", 8, True),
    "forward_overhead": ("forward pass with hooks / without", 1.05, False),
    "decode_overhead": ("decoding step with hooks / without", 1.05, False),
    "batch50_over_batch1": ("last ten of 50 batches / the first in turn", 1.1, False),
    "peak_memory_100_over_10": ("peak memory, one batch of 100 / one of 10", 1.5, False),
}
GOOD, TOOLKIT, SHORT = COLOURS[0], COLOURS[1], COLOURS[3]


def reached(name: str, value: float) -> bool:
    """Whether a figure is on the right side of its bar."""
    _, bar, more = BARS[name]
    return value >= bar if more else value <= bar


def show(figures: dict[str, Any], console: Console) -> None:
    """Every ratio beside its bar."""
    table = Table(title="Benchmarks")
    for name in ("ratio", "measured", "bar", ""):
        table.add_column(name, justify="left" if name == "ratio" else "right")
    for name, (label, bar, more) in BARS.items():
        if name in figures:
            verdict = "reached" if reached(name, figures[name]) else "short"
            table.add_row(label, f"{figures[name]:.2f}", f"{'≥' if more else '≤'} {bar:g}", verdict)
    console.print(table)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Speedups, overheads, edits per second by batch size and seconds by batch."""
    figure, ((speed, over), (sizes, batches)) = new_figure(2, 2, 5, 3.2)
    for axis, more, title in ((speed, True, "Times as fast as the toolkit"), (over, False, "Cost ratios")):
        names = [name for name, (_, _, better) in BARS.items() if better is more and name in figures]
        for place, name in enumerate(reversed(names)):
            value, bar = figures[name], BARS[name][1]
            axis.barh(place, value, 0.55, color=GOOD if reached(name, value) else SHORT)
            axis.plot([bar, bar], [place - 0.38, place + 0.38], color="#333333", linewidth=1.5)
            axis.text(0, place, f"  {value:.2f}", va="center", color="white", fontsize=9)
        axis.set_yticks(
            range(len(names)), [BARS[name][0].replace(" / ", " /\n") for name in reversed(names)], fontsize=8
        )
        missed = "" if all(reached(name, figures[name]) for name in names) else "; red: missed"
        axis.set_title(f"{title} (line: the goal{missed})", loc="left", fontsize=10)
        axis.margins(x=0.15)
    if "edits_per_second" in figures and "seconds_per_edit" in figures:
        rates = {int(size): rate for size, rate in figures["edits_per_second"].items()}
        sizes.bar(range(len(rates)), rates.values(), 0.55, color=GOOD)
        sizes.axhline(1 / figures["seconds_per_edit"]["toolkit_memit"], color=TOOLKIT, label="toolkit's MEMIT")
        sizes.set_xticks(range(len(rates)), [str(size) for size in rates])
        sizes.set(xlabel="edits in a batch")
        sizes.set_title("Edits per second", loc="left", fontsize=10)
        sizes.legend(frameon=False, fontsize=8)
    if "raw_batches" in figures:
        seconds = figures["raw_batches"]["seconds"]
        again = figures["raw_batches"]["first_in_turn"]
        batches.plot(range(1, len(seconds) + 1), seconds, ".-", color=GOOD)
        late = range(len(seconds) - len(again) + 1, len(seconds) + 1)
        batches.plot(late, again, ".-", color=GREY, label="the first one again, in turn")
        batches.legend(frameon=False, fontsize=8, loc="lower right")
        batches.set(xlabel="consecutive batch", ylim=(0, max(*seconds, *again) * 1.15))
        batches.set_title("Seconds per batch (4 steps, the same 10 facts)", loc="left", fontsize=10)
    save_figure(figure, path, ("png",))
