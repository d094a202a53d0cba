"""The z-score rule: which tokens the hook layers answer, and how the threshold moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import ceiling_of, z_of

from coachhook_plugin.scope.zscore import MIN_TOKENS, Thresholds, ceiling, in_scope, lowered, z_scores

pytestmark = pytest.mark.once

NORMS = st.lists(st.integers(0, 1000).map(lambda n: n / 64), min_size=0, max_size=12)
ROWS = st.lists(NORMS, min_size=1, max_size=5).filter(lambda rows: any(rows))


def padded(rows: list[list[float]], side: str, width: int, junk: float = 7.0) -> tuple[torch.Tensor, torch.Tensor]:
    norms, mask = torch.full((len(rows), width), junk), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        norms[b, at], mask[b, at] = torch.tensor(row), True
    return norms, mask


def plain_scope(row: list[float], alpha: float, ratio: float) -> list[bool]:
    if len(row) < 3 or len(set(row)) == 1:
        return [False] * len(row)
    asked = min(alpha, ratio * ceiling_of(len(row)))
    return [z >= asked for z in z_of(row)]


@given(ROWS, st.sampled_from(["left", "right"]), st.integers(0, 3), st.sampled_from([0.0, 1e6, math.nan, math.inf]))
def test_padding_and_batch_mates_never_change_a_z_score(
    rows: list[list[float]], side: str, extra: int, junk: float
) -> None:
    norms, mask = padded(rows, side, max(map(len, rows)) + extra, junk)
    found = z_scores(norms, mask)
    for b, row in enumerate(rows):
        if len(row) < 3 or len(set(row)) == 1:
            assert found[b].eq(-math.inf).all()
        else:
            assert found[b][mask[b]].tolist() == pytest.approx(z_of(row), abs=1e-9)
    assert found[~mask].eq(-math.inf).all()


@given(ROWS, st.sampled_from(["left", "right"]), st.floats(0.3, 3), st.floats(0.3, 1))
def test_a_token_is_answered_exactly_when_the_formula_says_so(
    rows: list[list[float]], side: str, alpha: float, ratio: float
) -> None:
    norms, mask = padded(rows, side, max(map(len, rows)))
    found = in_scope(norms, mask, torch.tensor(alpha).double(), torch.tensor(ratio).double())
    assert not found[~mask].any()
    for b, row in enumerate(rows):
        expected = plain_scope(row, alpha, ratio)
        asked = min(alpha, ratio * ceiling_of(len(row))) if len(row) > 1 else alpha
        scores = z_of(row) if len(row) > 1 and len(set(row)) > 1 else [math.inf] * len(row)
        for open_, wanted, z in zip(found[b][mask[b]].tolist(), expected, scores, strict=True):
            assert open_ == wanted or abs(z - asked) < 1e-9  # a tie may fall either way


@given(st.lists(st.floats(0, 1e3, width=32), min_size=3, max_size=40))
def test_no_token_can_score_above_the_ceiling_that_short_prompts_are_measured_by(row: list[float]) -> None:
    n = len(row)
    attainable = float(ceiling(torch.tensor(n)))
    assert attainable == pytest.approx(ceiling_of(n))
    assert float(z_scores(torch.tensor([row]), torch.ones(1, n, dtype=torch.bool)).max()) <= attainable + 1e-9


@pytest.mark.parametrize("n", range(MIN_TOKENS))
def test_inputs_too_short_to_score_stay_with_the_base_model_and_are_no_nan(n: int) -> None:
    norms, mask = padded([[5.0, 1.0][:n], [0.0, 9.0, 1.0, 1.0]], "right", 4)
    assert not z_scores(norms, mask).isnan().any()
    # Even a threshold that every token would pass
    assert not in_scope(norms, mask, torch.tensor(-9.0), torch.tensor(0.5))[0].any()


def test_a_repeated_token_does_not_open_the_scope_by_rounding_noise() -> None:
    noise = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    norms, mask = 3 * (1 + 2e-7 * noise), torch.ones(1, 12, dtype=torch.bool)
    assert z_scores(norms, mask).eq(-math.inf).all()


def test_a_nan_in_one_row_does_not_reach_its_batch_mates() -> None:
    rows = [[1.0, math.nan, 2.0, 3.0], [0.0, 0.0, 1.0, 0.0]]
    norms, mask = padded(rows, "right", 4)
    assert in_scope(norms, mask, torch.tensor(1.4), torch.tensor(1.0)).tolist() == [
        [False] * 4,
        [False, False, True, False],
    ]


def test_dynamic_alpha_is_the_smallest_top_score_of_the_long_prompts() -> None:
    rows = [[0.1, 0.2, 0.1, 3.0, 0.2, 0.3, 0.1, 0.2], [1.0, 2.0, 1.5, 0.5, 2.5, 1.0, 0.2, 1.1]]
    tops = [max(z_of(row)) for row in rows]
    assert tops[0] > 2.2 > tops[1]  # one prompt would have passed anyway
    found = lowered(Thresholds(2.2, 0.9), *padded(rows, "left", 9), margin=0.0)
    assert found.alpha == pytest.approx(min(2.2, *tops))
    assert found.ratio == 0.9


def test_a_short_prompt_does_not_lower_alpha_for_the_others() -> None:
    short, long = [0.1, 2.0, 1.9, 0.3, 0.2], [0.1, 0.2, 0.1, 3.0, 0.2, 0.3, 0.1, 0.2]
    found = lowered(Thresholds(2.2, 0.9), *padded([short, long], "right", 8), margin=0.0)
    assert found.alpha == 2.2
    assert found.ratio == pytest.approx(max(z_of(short)) / ceiling_of(5))


@pytest.mark.parametrize("row", [[1.0], [1.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
def test_a_prompt_without_a_score_leaves_the_thresholds_alone(row: list[float]) -> None:
    assert lowered(Thresholds(2.2, 0.9), *padded([row], "right", 6), margin=1e-3) == Thresholds(2.2, 0.9)


@given(st.lists(NORMS, min_size=1, max_size=6).filter(any), st.floats(0.5, 3), st.floats(0.2, 1))
def test_after_a_batch_every_scored_prompt_of_it_is_in_scope(
    rows: list[list[float]], alpha: float, ratio: float
) -> None:
    norms, mask = padded(rows, "right", max(map(len, rows)))
    found = lowered(Thresholds(alpha, ratio), norms, mask, margin=1e-3)
    assert found.alpha <= alpha
    assert found.ratio <= ratio
    open_ = in_scope(norms, mask, torch.tensor(found.alpha).double(), torch.tensor(found.ratio).double())
    for b, row in enumerate(rows):
        assert bool(open_[b].any()) == (len(row) >= 3 and len(set(row)) > 1)


@given(ROWS, ROWS)
def test_alpha_after_two_batches_does_not_depend_on_which_came_first(
    first: list[list[float]], second: list[list[float]]
) -> None:
    def after(*batches: list[list[float]]) -> Thresholds:
        thresholds = Thresholds(2.2, 1.0)
        for rows in batches:
            long = [row for row in rows if len(row) >= 8]
            if long:
                thresholds = lowered(thresholds, *padded(long, "right", max(map(len, long))), margin=1e-3)
        return thresholds

    assert after(first, second).alpha == pytest.approx(after(second, first).alpha)
