"""Bootstrap confidence intervals (percentile method, seeded): how far a figure would move with other records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"

RESAMPLES, LEVEL = 2000, 0.95

Interval: TypeAlias = "tuple[float, float, float]"  # value, low, high; NaN where nothing was measured


def mean_of_known(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def interval_of_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of what is known among `values`."""
    known = np.asarray([value for value in values if not np.isnan(value)])
    if not len(known):
        return (float("nan"),) * 3
    return _bootstrap(len(known), lambda drawn: known[drawn].mean(1), float(known.mean()), seed)


def interval_of_mean_score(rows: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The mean of several scores' means, records drawn as wholes. `rows`: one for each record, NaN where unknown."""
    table = np.asarray(rows, dtype=float).reshape(len(rows), -1)  # (records, scores)
    table = table[:, ~np.isnan(table).all(0)] if len(table) else table
    if not table.size:
        return (float("nan"),) * 3

    def statistic(drawn: NDArray[np.int64]) -> Array:
        taken = table[drawn]  # (b, records, scores)
        known = ~np.isnan(taken)
        sums = np.where(known, taken, 0).sum(1)
        return np.asarray(np.nanmean(sums / np.where(known.any(1), known.sum(1), np.nan), axis=1))

    return _bootstrap(len(table), statistic, float(statistic(np.arange(len(table))[None])[0]), seed)


def interval_of_ratio(
    above: Sequence[tuple[float, float]], below: Sequence[tuple[float, float]] | None = None, seed: int = 0
) -> Interval:
    """exp of the difference of two means of (sum, count) pairs drawn together; with one list, its own sum over count.

    The first is a ratio of perplexities over the same windows, the second a rate such as seconds per edit.
    """
    a = np.asarray(above, dtype=float).reshape(-1, 2)
    if not len(a):
        return (float("nan"),) * 3
    b = None if below is None else np.asarray(below, dtype=float).reshape(-1, 2)

    def statistic(drawn: NDArray[np.int64]) -> Array:
        one = a[drawn].sum(1)
        rate = one[:, 0] / one[:, 1]
        if b is None:
            return np.asarray(rate)
        other = b[drawn].sum(1)
        return np.asarray(np.exp(rate - other[:, 0] / other[:, 1]))

    with np.errstate(over="ignore"):
        value = float(statistic(np.arange(len(a))[None])[0])
    return _bootstrap(len(a), statistic, value, seed)


@np.errstate(over="ignore", invalid="ignore")  # a model that its edits destroyed may have an infinite perplexity
def _bootstrap(count: int, statistic: Callable[[NDArray[np.int64]], Array], value: float, seed: int) -> Interval:
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(0, count, size=(100, count))) for _ in range(RESAMPLES // 100)]
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)
