"""The plots of a leaderboard, each as PNG and SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import interval_of_mean_score, mean_of_known
from ..pictures import COLOURS, MARKERS, new_figure, save_figure
from .jobs import Job
from .rows import THREE, Row, record_scores

LEGEND = 2.2  # inches
# Methods keep their colour and marker in every picture; others get what these leave.
KNOWN = (
    "CoachHooK",
    "MEMIT",
    "AlphaEdit",
    "CoachHooK (paper)",
    "CoachHooK without accumulation",
    "CoachHooK without hooks",
    "CoachHooK, dynamic alpha",
    "CoachHooK, static alpha",
    "FT",
    "GRACE",
    "MEMIT (our engine)",
    "UltraEdit",
    "WISE",
    "EMMET",
    "ROME",
    "R-ROME",
    "SimIE",
)


def retention(rows: Sequence[Row], jobs: Sequence[Job], path: Path) -> bool:
    """Scores of everything edited so far, by number of edits; False where no job was scored on its way."""
    series = [(row, job) for row, job in zip(rows, jobs, strict=True) if len(job.steps) > 1]
    if not series:
        return False
    groups = list(dict.fromkeys(row.title for row, _ in series))
    styles = _styles(rows)
    figure, axes = new_figure(len(groups), len(THREE), 3.6, 3.2, beside=LEGEND)
    for line, group in zip(axes, groups, strict=True):
        of_group = [(row, job) for row, job in series if row.title == group]
        for axis, name in zip(line, THREE, strict=True):
            for rank, (row, job) in enumerate(of_group):
                steps = sorted(job.steps)
                means = [mean_of_known([one[name] for one in record_scores(job, step)]) for step in steps]
                axis.plot(steps, means, markersize=5, label=row.method, **styles[row.method], zorder=_on_top(rank))
            axis.set(ylim=(-0.02, 1.04), xlabel="edits so far")
            axis.set_title(f"{name}, share of tokens", loc="left", fontsize=10)
        line[0].set_ylabel(group.replace(", ", "\n"))
        _legend(line, line[-1])
    save_figure(figure, path)
    return True


def trade_off(rows: Sequence[Row], jobs: Sequence[Job], path: Path) -> bool:
    """Reliability and generality together against locality, with intervals."""
    groups = list(dict.fromkeys(row.title for row in rows))
    styles = _styles(rows)
    columns = min(len(groups), 2)
    figure, axes = new_figure(math.ceil(len(groups) / columns), columns, 4.6, 4.0, beside=LEGEND)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes.flat, groups, strict=False):
        of_group = [(row, job) for row, job in zip(rows, jobs, strict=True) if row.title == group]
        for rank, (row, job) in enumerate(of_group):
            learned = [[one["reliability"], one["generality"]] for one in record_scores(job)]
            across, up = row.metrics["locality"], interval_of_mean_score(learned, job.config["seed"])
            style = {**styles[row.method], "linestyle": "none", "zorder": _on_top(rank)}
            axis.errorbar(
                across[0], up[0],
                xerr=[[max(0, across[0] - across[1])], [max(0, across[2] - across[0])]],
                yerr=[[max(0, up[0] - up[1])], [max(0, up[2] - up[0])]],
                **{**style, "marker": ""}, elinewidth=0.8, alpha=0.6,
            )  # fmt: skip
            axis.plot(across[0], up[0], label=row.method, **style)
        axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="locality")
        axis.set_ylabel("mean of reliability and generality")
        axis.set_title(group.replace(", ", "\n", 1), loc="left", fontsize=10)
    _legend(axes.flat[: len(groups)], axes[0, -1])
    save_figure(figure, path)
    return True


def _on_top(rank: int) -> float:
    """Methods that do alike lie on each other: the better ones are to be seen."""
    return 3 - rank / 100


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    names = {row.method for row in rows}
    places = {name: KNOWN.index(name) for name in names.intersection(KNOWN)}
    free = (i for i in itertools.count() if i not in places.values())
    for name, i in [*places.items(), *zip(sorted(names.difference(KNOWN)), free, strict=False)]:
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
