"""What all pictures share: colours, markers, bare axes, and how they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Distinguishable with every common kind of colour vision (Okabe and Ito), each with a marker of its own.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#a6761d", "#000000")
GREY = COLOURS[6]
MARKERS = "os^DvP*X<>"


def new_figure(
    lines: int,
    columns: int,
    width: float,
    height: float,
    beside: float = 0,
    ratios: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """A figure and its axes (lines, columns), each of `width` by `height` inches, with room `beside` for a legend.

    Args:
        ratios: of the columns' widths, whose mean is `width`.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns + beside, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", width_ratios=ratios)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path, formats: Sequence[str] = ("png", "svg")) -> None:
    """Files of these formats beside each other, the same bytes whenever they are made."""
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}):
        for name in formats:
            figure.savefig(path.with_suffix(f".{name}"), dpi=140, metadata={"Date": None} if name == "svg" else None)
    plt.close(figure)
