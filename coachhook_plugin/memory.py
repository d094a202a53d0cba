"""Transformer memory: what is written, and the closed form that writes it (paper, section 3.2).

Shapes: d hidden size, m size of a key, u edits in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NOT_POSITIVE = "the key covariance is not positive definite; collect more keys (mom2_key_multiple) or check the file"


@dataclass(frozen=True)
class KeyMemory:
    """C = lambda C0 + sum of K K^T over all batches written so far. Immutable: an update gives a new memory."""

    matrix: torch.Tensor  # (m, m), float64 where the device has it

    @classmethod
    def of_covariance(cls, c0: torch.Tensor, weight: float) -> KeyMemory:
        """A memory of pre-training alone: lambda C0, with C0 = E[k k^T] (m, m) and lambda = `weight`."""
        return cls(weight * working_precision(c0))

    def coefficients(self, keys: torch.Tensor) -> torch.Tensor:
        """X = (C + K K^T)^-1 K for keys K (m, u); returns (m, u).

        Raises:
            ValueError: C + K K^T is not positive definite, even with a ridge of a millionth of its mean diagonal.
        """
        keys = working_precision(keys)
        total = self.matrix + keys @ keys.T  # (m, m)
        factor, info = torch.linalg.cholesky_ex(total)
        if info.item() != 0:
            # Neurons that never fired in the sample (ReLU) leave C0 singular.
            ridge = 1e-6 * total.diagonal().mean()
            factor, info = torch.linalg.cholesky_ex(total + ridge * torch.eye(len(total)).to(total))
        if info.item() != 0:
            raise ValueError(NOT_POSITIVE)
        return torch.cholesky_solve(keys, factor)

    def remembering(self, keys: torch.Tensor) -> KeyMemory:
        """The memory after keys K (m, u) were written: C + K K^T."""
        keys = working_precision(keys)
        return KeyMemory(self.matrix + keys @ keys.T)


def context_mean(keys: torch.Tensor) -> torch.Tensor:
    """(u, m) for keys (u, contexts, m), the plain prompt's first: the mean of the plain key and the mean prefixed one.

    As MEMIT averages them (`compute_ks.py`).
    """
    plain, prefixed = keys[:, 0], keys[:, 1:]
    return (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain


def update(residual: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Delta = R K^T (C + K K^T)^-1 = R X^T, for R (d, u) and X (m, u); returns (d, m)."""
    return working_precision(residual) @ coefficients.T


def spread(targets: torch.Tensor, current: torch.Tensor, layers_left: int) -> torch.Tensor:
    """R = (v - current) / layers left: an equal share for this layer and each deeper one. All (d, u)."""
    return (working_precision(targets) - working_precision(current)) / layers_left


def working_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float64, or float32 on a device without it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
