"""What is written into a layer, against numpy and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coachhook_plugin.memory import KeyMemory, spread, update, working_precision

pytestmark = pytest.mark.once

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**31))  # d, m, u, seed


def drawn(d: int, m: int, u: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C0 (m, m), K (m, u), R (d, u)."""
    random = np.random.default_rng(seed)
    text = random.normal(size=(m, 3 * m))
    return text @ text.T / (3 * m), random.normal(size=(m, u)), random.normal(size=(d, u))


@given(SIZES, st.floats(0.1, 1e5))
def test_the_update_is_the_closed_form_of_the_paper(sizes: tuple[int, int, int, int], weight: float) -> None:
    c0, keys, residual = drawn(*sizes)
    memory = KeyMemory.of_covariance(torch.tensor(c0), weight)
    found = update(torch.tensor(residual), memory.coefficients(torch.tensor(keys)))
    total = weight * c0
    for key in keys.T:
        total = total + np.outer(key, key)
    expected = np.linalg.solve(total, (residual @ keys.T).T).T  # total is symmetric
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


@given(SIZES)
def test_the_memory_after_some_batches_is_the_sum_over_all_their_keys(sizes: tuple[int, int, int, int]) -> None:
    c0, keys, _ = drawn(*sizes)
    memory = KeyMemory.of_covariance(torch.tensor(c0), 5.0)
    for column in keys.T:  # one batch for each
        memory = memory.remembering(torch.tensor(column)[:, None])
    expected = 5.0 * c0
    for i in range(len(c0)):
        for j in range(len(c0)):
            expected[i, j] += sum(keys[i, u] * keys[j, u] for u in range(keys.shape[1]))
    np.testing.assert_allclose(memory.matrix.numpy(), expected, rtol=1e-10, atol=1e-10)


@given(SIZES, st.randoms())
def test_the_order_of_a_batch_does_not_change_what_is_written(sizes: tuple[int, int, int, int], random) -> None:
    c0, keys, residual = drawn(*sizes)
    memory = KeyMemory.of_covariance(torch.tensor(c0), 3.0)
    order = list(range(keys.shape[1]))
    random.shuffle(order)
    one = update(torch.tensor(residual), memory.coefficients(torch.tensor(keys)))
    other = update(torch.tensor(residual[:, order]), memory.coefficients(torch.tensor(keys[:, order])))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_what_is_written_minimises_the_objective() -> None:
    """||Delta K - R||^2 + ||Delta L||^2, where C = L L^T: no small step away from the solution does better."""
    c0, keys, residual = drawn(4, 6, 3, seed=1)
    factor = np.linalg.cholesky(2.0 * c0)

    def objective(delta: np.ndarray) -> float:
        return float(np.square(delta @ keys - residual).sum() + np.square(delta @ factor).sum())

    memory = KeyMemory.of_covariance(torch.tensor(c0), 2.0)
    found = update(torch.tensor(residual), memory.coefficients(torch.tensor(keys))).numpy()
    random = np.random.default_rng(2)
    assert all(objective(found) < objective(found + 1e-3 * random.normal(size=found.shape)) for _ in range(50))


def test_remembering_leaves_the_earlier_memory_as_it_was() -> None:
    c0, keys, _ = drawn(2, 5, 3, seed=0)
    memory = KeyMemory.of_covariance(torch.tensor(c0), 1.0)
    before = memory.matrix.clone()
    after = memory.remembering(torch.tensor(keys))
    assert torch.equal(memory.matrix, before)
    assert after.matrix.shape == before.shape
    assert not torch.equal(after.matrix, before)


def test_half_precision_keys_are_solved_in_double_precision() -> None:
    c0, keys, residual = drawn(3, 8, 2, seed=4)
    half, half_residual = torch.tensor(keys).bfloat16(), torch.tensor(residual).half()
    memory = KeyMemory.of_covariance(torch.tensor(c0).float(), 7.0)
    found = update(half_residual, memory.coefficients(half))
    assert found.dtype == memory.remembering(half).matrix.dtype == torch.float64
    rounded, rounded_residual = half.double().numpy(), half_residual.double().numpy()
    c = 7.0 * torch.tensor(c0).float().double().numpy()
    expected = rounded_residual @ rounded.T @ np.linalg.inv(c + rounded @ rounded.T)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_neurons_that_never_fired_do_not_stop_an_edit() -> None:
    """ReLU models leave whole rows of C0 zero; the other rows must come out as if those neurons were not there."""
    c0, keys, residual = drawn(3, 6, 2, seed=5)
    dead = np.zeros((9, 9))
    dead[:6, :6] = c0
    silent_keys = np.vstack([keys, np.zeros((3, 2))])
    found = update(torch.tensor(residual), KeyMemory(torch.tensor(dead)).coefficients(torch.tensor(silent_keys)))
    expected = residual @ keys.T @ np.linalg.inv(c0 + keys @ keys.T)
    np.testing.assert_allclose(found.numpy()[:, :6], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.numpy()[:, 6:], 0, atol=1e-12)


def test_a_covariance_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        KeyMemory(-torch.eye(4, dtype=torch.float64)).coefficients(torch.ones(4, 1))


@pytest.mark.parametrize("layers_left", [1, 2, 5])
def test_the_residual_is_shared_among_the_layers_that_are_left(layers_left: int) -> None:
    target, current = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]])
    assert spread(target, current, layers_left).tolist() == [[2 / layers_left, -3 / layers_left]]
    assert working_precision(target.half()).dtype == torch.float64
