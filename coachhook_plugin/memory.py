"""Transformer memory: what is written, and the closed form that writes it (paper, section 3.2).

Shapes: d hidden size, m size of a key, u edits in a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .placement import Place, at_rest, room_for

FLOAT32, FLOAT64 = 24, 53  # bits of their significands
NOT_POSITIVE = "the key covariance is not positive definite; collect more keys (mom2_key_multiple) or check the file"


@dataclass(frozen=True)
class KeyMemory:
    """C = lambda C0 + sum of K K^T over all batches written so far. Immutable: an update gives a new memory."""

    matrix: torch.Tensor  # (m, m), float64 where the device has it
    place: Place = "weights"  # where it rests between batches

    @classmethod
    def of_covariance(cls, c0: torch.Tensor, weight: float, place: Place = "weights") -> KeyMemory:
        """A memory of pre-training alone: lambda C0, with C0 = E[k k^T] (m, m) and lambda = `weight`."""
        return cls(at_rest(weight * working_precision(c0), place), place)

    def on(self, device: torch.device) -> KeyMemory:
        """The memory of a model whose weights are on `device`."""
        return KeyMemory(working_precision(self.matrix.to(device)), self.place) if self.place == "weights" else self

    def resting(self, place: Place) -> KeyMemory:
        """The same memory in another place."""
        return self if place == self.place else KeyMemory(at_rest(self.matrix, place), place)

    def coefficients(self, keys: torch.Tensor) -> torch.Tensor:
        """X = (C + K K^T)^-1 K for keys K (m, u); returns (m, u). Computed where the keys are.

        Raises:
            ValueError: C + K K^T is not positive definite, even with a ridge of a millionth of its mean diagonal.
        """
        keys = working_precision(keys)
        total = keys @ keys.T  # (m, m)
        total += self.matrix.to(total)
        factor, info = torch.linalg.cholesky_ex(total)
        if info.item() != 0:
            # Neurons that never fired in the sample (ReLU) leave C0 singular.
            ridge = 1e-6 * total.diagonal().mean()
            factor, info = torch.linalg.cholesky_ex(total + ridge * torch.eye(len(total)).to(total))
        if info.item() != 0:
            raise ValueError(NOT_POSITIVE)
        return torch.cholesky_solve(keys, factor)

    def remembering(self, keys: torch.Tensor, sign: int = 1) -> KeyMemory:
        """The memory after keys K (m, u) were written: C + K K^T; with sign -1, after they were taken back."""
        change = _product(keys, keys).to(self.matrix)
        return KeyMemory(torch.add(self.matrix, change, alpha=sign, out=room_for(self.matrix, self.place)), self.place)


def context_mean(keys: torch.Tensor) -> torch.Tensor:
    """(u, m) for keys (u, contexts, m), the plain prompt's first: the mean of the plain key and the mean prefixed one.

    As MEMIT averages them (`compute_ks.py`).
    """
    plain, prefixed = keys[:, 0], keys[:, 1:]
    return (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain


def update(residual: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Delta = R K^T (C + K K^T)^-1 = R X^T, for R (d, u) and X (m, u); returns (d, m), float64."""
    return _product(residual, coefficients)


def on_grid(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (n, u) rounded to multiples of one power of two, in float32.

    They are so many bits that the product of two such matrices over u is exact in float64: the same on every machine
    and in every order of summation. The error is at most 2^-24 of the largest entry for u up to 32, and doubles with
    each fourfold of u beyond.
    """
    wide = working_precision(matrix)
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    bits = min(FLOAT32, (FLOAT64 - (matrix.shape[-1] - 1).bit_length()) // 2)
    step = math.ldexp(1.0, max(math.frexp(largest)[1] - bits, -126))
    return ((wide / step).round() * step).float()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right^T in float64, on the CPU where the device has none."""
    if left.device.type == "mps":
        left, right = left.cpu(), right.cpu()
    return left.double() @ right.double().T


def spread(targets: torch.Tensor, current: torch.Tensor, layers_left: int) -> torch.Tensor:
    """R = (v - current) / layers left: an equal share for this layer and each deeper one. All (d, u)."""
    return (working_precision(targets) - working_precision(current)) / layers_left


def working_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float64, or float32 on a device without it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
