"""The plots of a leaderboard, each as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ..metrics import interval_of_mean_score
from .jobs import Job
from .rows import THREE, Row, record_scores

# Distinguishable with every common kind of colour vision (Okabe and Ito), each with a marker of its own.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#a6761d", "#000000")
MARKERS = "os^DvP*X<>"


def retention(rows: Sequence[Row], jobs: Sequence[Job], path: Path) -> bool:
    """Scores of everything edited so far, by number of edits; False where no job was scored on its way."""
    series = [(row, job) for row, job in zip(rows, jobs, strict=True) if len(job.steps) > 1]
    if not series:
        return False
    groups = list(dict.fromkeys(row.title for row, _ in series))
    styles = _styles(rows)
    figure, axes = _figure(len(groups), len(THREE))
    for line, group in zip(axes, groups, strict=True):
        of_group = [(row, job) for row, job in series if row.title == group]
        for axis, name in zip(line, THREE, strict=True):
            for rank, (row, job) in enumerate(of_group):
                steps = sorted(job.steps)
                means = [_mean([one[name] for one in record_scores(job, step)]) for step in steps]
                axis.plot(steps, means, markersize=5, label=row.method, **styles[row.method], zorder=_on_top(rank))
            axis.set(ylim=(-0.02, 1.04), xlabel="edits so far")
            axis.set_title(name, loc="left", fontsize=10)
        line[0].set_ylabel(group.replace(", ", "\n"))
        _legend(line, line[-1])
    _save(figure, path)
    return True


def trade_off(rows: Sequence[Row], jobs: Sequence[Job], path: Path) -> bool:
    """Reliability and generality together against locality, with intervals."""
    groups = list(dict.fromkeys(row.title for row in rows))
    styles = _styles(rows)
    columns = min(len(groups), 2)
    figure, axes = _figure(math.ceil(len(groups) / columns), columns, 4.6, 4.0)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes.flat, groups, strict=False):
        of_group = [(row, job) for row, job in zip(rows, jobs, strict=True) if row.title == group]
        for rank, (row, job) in enumerate(of_group):
            learned = [[one["reliability"], one["generality"]] for one in record_scores(job)]
            across, up = row.metrics["locality"], interval_of_mean_score(learned, job.config["seed"])
            axis.errorbar(
                across[0], up[0],
                xerr=[[max(0, across[0] - across[1])], [max(0, across[2] - across[0])]],
                yerr=[[max(0, up[0] - up[1])], [max(0, up[2] - up[0])]],
                label=row.method, capsize=2, **{**styles[row.method], "linestyle": "none"}, zorder=_on_top(rank),
            )  # fmt: skip
        axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="locality")
        axis.set_ylabel("mean of reliability and generality")
        axis.set_title(group.replace(", ", "\n", 1), loc="left", fontsize=10)
    _legend(axes.flat[: len(groups)], axes[0, -1])
    _save(figure, path)
    return True


def _on_top(rank: int) -> float:
    """Methods that do alike lie on each other: the better ones are to be seen."""
    return 3 - rank / 100


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(sorted({row.method for row in rows})):
        again, colour = divmod(i, len(COLOURS))
        styles[name] = {"color": COLOURS[colour], "marker": MARKERS[i % len(MARKERS)]}
        if again:  # hollow and dashed, beside the one that has the colour already
            styles[name] |= {"linestyle": "--", "markerfacecolor": "white"}
    return styles


def _legend(axes: Any, beside: Any) -> None:
    """Every method of these panels, beside one of them."""
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    beside.legend(
        named.values(), named.keys(), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5)
    )


def _figure(lines: int, columns: int, width: float = 3.6, height: float = 3.2) -> tuple[Any, Any]:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns + 2.2, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "path"}):
        figure.savefig(path.with_suffix(".png"), dpi=140)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
