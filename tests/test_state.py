"""States, steps and the way back: exact arithmetic, small files, nothing lost."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import bits

from coachhook_plugin.memory import KeyMemory, on_grid, update
from coachhook_plugin.state import Factors, History, LayerState, Snapshot, Step, changed, changes

pytestmark = pytest.mark.once


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@given(st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 5))
def test_a_product_on_the_grid_has_no_rounding_error_in_any_order(u: int, scale: float, seed: int) -> None:
    left, right = on_grid(drawn(3, u, seed=seed, scale=scale)), on_grid(drawn(2, u, seed=seed + 1))
    found = update(left, right)
    backwards = update(left.flip(1), right.flip(1))
    assert bits(found) == bits(backwards)
    for i in range(3):
        for j in range(2):
            exact = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left[i], right[j], strict=True))
            assert Fraction(float(found[i, j])) == exact


@pytest.mark.parametrize(("u", "allowed"), [(1, 2**-24), (32, 2**-24), (100, 2**-23), (4096, 2**-20)])
def test_the_grid_costs_no_accuracy_that_counts(u: int, allowed: float) -> None:
    matrix = drawn(50, u, seed=3) ** 3  # heavy tails, as keys have
    assert float((on_grid(matrix).double() - matrix).abs().max() / matrix.abs().max()) <= allowed
    product, exact = update(on_grid(matrix), on_grid(matrix)), matrix @ matrix.T
    assert float((product - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 3e38, math.nan])
def test_the_grid_takes_any_number(value: float) -> None:
    found = on_grid(torch.full((2, 3), value, dtype=torch.float64))
    torch.testing.assert_close(
        found.double(), torch.full_like(found.double(), value), rtol=1e-6, atol=0, equal_nan=True
    )


ROWS = st.lists(st.integers(0, 6), max_size=8)


@given(ROWS, ROWS)
def test_what_changed_leads_from_the_old_to_the_new(old: list[int], new: list[int]) -> None:
    before = {"rows": torch.tensor(old, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()}
    after = {"rows": torch.tensor(new, dtype=torch.float32)[:, None].expand(-1, 2).contiguous(), "n": torch.tensor(7)}
    told = changes(before, after)
    found = changed(before, told)
    assert found.keys() == after.keys()
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_rows_that_stay_are_not_told_again() -> None:
    old = drawn(500, 64)
    new = torch.cat([old[[1, 5, *range(20, 400)]], drawn(3, 64, seed=1)])
    told = changes({"sample": old}, {"sample": new})
    assert told["sample"].shape == (3, 64)
    assert torch.equal(changed({"sample": old}, told)["sample"], new)


def test_rows_that_are_equal_among_themselves_are_not_told_again_either() -> None:
    row, other = drawn(2, 1, 64)
    old = torch.cat([row, row, other, row, drawn(5, 64, seed=2)])  # a fact edited again has the key it had
    new = torch.cat([old[1:], row])
    told = changes({"sample": old}, {"sample": new})
    assert told["sample"].shape == (1, 64)
    assert torch.equal(changed({"sample": old}, told)["sample"], new)


def steps(count: int) -> list[Step]:
    return [
        Step(
            {0: Factors(*(on_grid(drawn(n, 2, seed=10 * i + n)) for n in (3, 5, 5)))},
            {"rows": torch.full((i + 1, 2), float(i)), "seen": torch.tensor(i)},
            sign=-1 if i == 4 else 1,
        )
        for i in range(count)
    ]


def beginning() -> Snapshot:
    return Snapshot({0: LayerState(torch.zeros(3, 5), KeyMemory(torch.eye(5, dtype=torch.float64)))}, {})


def photograph(snapshot: Snapshot) -> tuple[bytes, bytes, dict[str, bytes], int]:
    layer = snapshot.layers[0]
    assert layer.memory is not None
    scope = {name: bits(t) for name, t in snapshot.scope.items()}
    return bits(layer.delta), bits(layer.memory.matrix), scope, snapshot.step


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 100])
def test_history_is_bounded_and_what_it_keeps_is_exact(limit: int) -> None:
    states, history = [beginning()], History(beginning())
    for number, step in enumerate(steps(12), 1):
        states.append(states[-1].after(step))
        history = history.followed(step, limit, lambda now=states[-1]: now)
        assert limit / 2 <= len(history.steps) <= limit or len(history.steps) == number
        assert history.base.step + len(history.steps) == number
        for earlier in range(history.base.step, number + 1):
            assert photograph(history.at(earlier)) == photograph(states[earlier])
            assert len(history.until(earlier).steps) == earlier - history.base.step
        if history.answers is not None:
            assert sum(step.edits for step in history.answers) * 8 < 15
    assert history.answers is None  # 24 columns of 3 + 5 numbers against 15


def test_the_memory_after_a_step_is_the_sum_in_any_order_and_can_be_taken_back() -> None:
    keys = on_grid(drawn(5, 4))
    memory = KeyMemory(torch.eye(5, dtype=torch.float64) * 8)
    there = memory.remembering(keys)
    assert bits(there.matrix) == bits(memory.remembering(keys.flip(1)).matrix)
    torch.testing.assert_close(there.remembering(keys, -1).matrix, memory.matrix, rtol=0, atol=1e-14)
