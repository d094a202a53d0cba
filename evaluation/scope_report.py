"""The picture of a scope study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import COLOURS, GREY, new_figure, save_figure

GROUPS = ("edited", "rephrased", "neighbours", "text")
MARKERS = "os^D"
NONE = 1e-4  # where nothing let in stands on the logarithmic axis


def roc(inside: Sequence[float], outside: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of `outside` and of `inside` that lie at or above every threshold, from the strictest on."""
    thresholds = np.sort(np.unique([*inside, *outside]))[::-1]
    shares = [np.searchsorted(np.sort(values), thresholds, side="left") for values in (outside, inside)]
    return 1 - shares[0] / len(outside), 1 - shares[1] / len(inside)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """By data set: who passes as the threshold moves, and who is let in as the edits grow in number."""
    # How the residual is spread has no part in who is let in: one run of each scope tells it.
    runs = list({(run["dataset"], run["settings"]["scope"]): run for run in reversed(runs)}.values())[::-1]
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    scopes = sorted({run["scope"] for run in runs})
    of_scope = dict(zip(scopes, COLOURS, strict=False))
    figure, axes = new_figure(len(datasets), 1 + len(scopes), 4, 3.6)
    for row, dataset in zip(axes, datasets, strict=True):
        of = {run["scope"]: run for run in runs if run["dataset"] == dataset}
        for scope in filter(of.__contains__, scopes):
            run = of[scope]
            last = run["margins"][max(run["margins"], key=int)]
            inside = last["edited"] + last["rephrased"]
            for group, style in (("text", "-"), ("neighbours", "--")):
                x, y = roc(inside, last[group])
                row[0].plot(np.clip(x, NONE, 1), y, style, color=of_scope[scope], label=f"{scope}, {group}")
            let_in, reached = (np.mean(np.array(values) >= 1) for values in (last["text"], inside))
            row[0].plot(max(let_in, NONE), reached, "o", color=of_scope[scope], clip_on=False)
        row[0].plot([], [], "o", color=GREY, label="threshold in use")
        row[0].set(xscale="log", xlim=(NONE / 1.3, 1), ylim=(0, 1.04), xlabel="share of other tokens let in")
        row[0].set_xticks([NONE, 1e-3, 1e-2, 1e-1, 1], ["none", "0.001", "0.01", "0.1", "1"])
        row[0].minorticks_off()
        row[0].set_ylabel("share of subjects let in")
        row[0].set_title(f"{dataset}: any threshold", loc="left", fontsize=10)
        row[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.16))
        for axis, scope in zip(row[1:], scopes, strict=True):
            if scope not in of:
                axis.set_visible(False)
                continue
            steps = sorted(of[scope]["margins"], key=int)
            for group, colour, marker in zip(GROUPS, COLOURS, MARKERS, strict=False):
                rates = [np.mean(np.array(of[scope]["margins"][step][group]) >= 1) for step in steps]
                look = {"color": colour, "marker": marker, "markersize": 5, "fillstyle": "none"}
                axis.plot([int(step) for step in steps], rates, label=group, **look)
            axis.set(ylim=(-0.02, 1.02), xlabel="edits so far", ylabel="share let in")
            axis.set_title(f"{dataset}: {scope}", loc="left", fontsize=10)
            axis.legend(frameon=False, fontsize=8, loc="center right")
    save_figure(figure, path, ("png",))
