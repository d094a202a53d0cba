"""Intervals say how far a figure would move with other records, and say the same each time."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from evaluation.metrics import interval_of_mean, interval_of_mean_score, interval_of_ratio

RANDOM = random.Random(1)
VALUES = [RANDOM.random() for _ in range(40)]


def slow_bootstrap(values: list[float]) -> tuple[float, float]:
    """Percentiles of means of drawn lists, in plain Python."""
    rng = random.Random(3)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(4000))
    return means[100], means[3899]


def test_an_interval_is_that_of_an_obvious_bootstrap() -> None:
    value, low, high = interval_of_mean(VALUES)
    assert value == pytest.approx(sum(VALUES) / len(VALUES))
    assert (low, high) == pytest.approx(slow_bootstrap(VALUES), abs=0.01)


def test_an_interval_is_the_same_in_every_run_and_depends_on_the_seed() -> None:
    assert interval_of_mean(VALUES, 5) == interval_of_mean(VALUES, 5)
    assert interval_of_mean(VALUES, 5) != interval_of_mean(VALUES, 6)


def test_unknown_scores_neither_count_nor_break_the_mean() -> None:
    assert interval_of_mean([1.0, math.nan, 0.0])[0] == 0.5
    assert all(map(math.isnan, interval_of_mean([math.nan])))
    rows = [[1.0, math.nan], [0.0, 0.5], [0.5, math.nan]]
    value, low, high = interval_of_mean_score(rows)
    assert value == pytest.approx((0.5 + 0.5) / 2)
    assert low <= value <= high
    assert interval_of_mean_score([[1.0, math.nan], [0.0, math.nan]])[0] == 0.5


def test_a_mean_of_scores_draws_records_as_wholes() -> None:
    """Scores that always make up for each other leave nothing uncertain."""
    rows = [[score, 1 - score] for score in VALUES]
    value, low, high = interval_of_mean_score(rows)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_of_perplexities_compares_the_same_windows() -> None:
    before = [(100.0 * (i + 1), 50) for i in range(8)]
    after = [(loss + 50 * math.log(1.1), count) for loss, count in before]  # every window 1.1 times as perplexed
    assert interval_of_ratio(after, before) == pytest.approx((1.1, 1.1, 1.1))


def test_seconds_per_edit_weigh_batches_by_their_edits() -> None:
    value, low, high = interval_of_ratio([(10.0, 10), (2.0, 1)])
    assert value == pytest.approx(12 / 11)
    assert (low, high) == pytest.approx((1.0, 2.0))


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = sum(
        low <= 0 <= high for _, low, high in (interval_of_mean(rng.normal(size=30).tolist()) for _ in range(100))
    )
    assert 86 <= held <= 99
