"""Sums over pre-training keys: one pass over the text for all edited layers, by one process or by several.

Processes share the work where `torch.distributed` is initialised (`torchrun`, `accelerate launch`): each takes every
n-th batch of the text, and the sums are added up. Every process ends with the same sums.
"""

from __future__ import annotations

import logging
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from tqdm.auto import tqdm

from .architectures import weight_device, weight_shape
from .cache import dispensable, is_kept, write_whole
from .memory import working_precision
from .text import TextSource
from .trace import captured, in_this_thread

LOG = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
STRIPES = 4  # of the sum, each multiplied from its diagonal on


@dataclass(frozen=True)
class Share:
    """Which part of the text is this process's."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0


def needed_by_any(layers: list[int]) -> list[int]:
    """The layers that at least one process has to collect: then all take part, or those would wait for ever."""
    processes = Share.of_this_process().processes
    if processes == 1:
        return layers
    told: list[list[int]] = [[] for _ in range(processes)]
    distributed.all_gather_object(told, layers)
    return sorted({layer for of_one in told for layer in of_one})


class KeySums:
    """Running sums over the keys of one layer."""

    def __init__(self, size: int, device: torch.device) -> None:
        # (m, m): the sum of k k^T on and above the diagonal; what lies below is not kept up
        self.upper = working_precision(torch.zeros(size, size, device=device))
        self.moments = working_precision(torch.zeros(2, device=device))  # number of keys, ||k||^4

    @property
    def total(self) -> torch.Tensor:
        """(m, m): sum of k k^T."""
        return self.upper.triu() + self.upper.triu(1).T

    @property
    def count(self) -> int:
        return int(self.moments[0])

    @property
    def fourth(self) -> float:
        return float(self.moments[1])

    def add(self, keys: torch.Tensor) -> None:
        """Take keys (..., m) in: the product of a batch in float32, which is quick, their sum in float64."""
        size = len(self.upper)
        keys = keys.reshape(-1, size).float()
        for start in range(0, size, -(-size // STRIPES)):  # of a symmetric matrix five eighths do
            stripe = slice(start, start + -(-size // STRIPES))
            self.upper[stripe, start:] += keys[:, stripe].T @ keys[:, start:]
        self.moments[0] += len(keys)
        self.moments[1] += keys.square().sum(-1).square().sum()

    def add_up(self) -> None:
        """Make these the sums over the keys of all processes."""
        distributed.all_reduce(self.upper)
        distributed.all_reduce(self.moments)


@torch.no_grad()
def collected_sums(
    model: nn.Module,
    projections: dict[int, nn.Module],
    source: TextSource,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[int, KeySums]:
    """Sum over the keys at every projection in one pass over the text, which stops after the last of them.

    An interrupted pass goes on from `checkpoint` (each process has its own), which is written about once a minute.
    """
    device, share = next(model.parameters()).device, Share.of_this_process()
    if checkpoint is not None:
        checkpoint = checkpoint.with_name(f"{checkpoint.name}-{share.rank}-of-{share.processes}.npz")
    sums = {layer: KeySums(weight_shape(p)[1], weight_device(p)) for layer, p in projections.items()}
    mine = range(share.rank, source.batches, share.processes)
    done = _resume(checkpoint, sums)
    last = max(projections)
    written = time.monotonic()
    for number, index in enumerate(
        tqdm(mine[done:], initial=done, total=len(mine), desc="key statistics", disable=not progress, leave=False), 1
    ):
        ids = source.batch(index).to(device)
        handles = [
            p.register_forward_pre_hook(in_this_thread(partial(_add, sums[layer]))) for layer, p in projections.items()
        ]
        try:
            with captured(projections[last], stop=True):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if checkpoint is not None and time.monotonic() - written > CHECKPOINT_SECONDS:
            with dispensable():
                _save_checkpoint(checkpoint, sums, done + number)
            written = time.monotonic()
    if share.processes > 1:
        for of_layer in sums.values():
            of_layer.add_up()
    if checkpoint is not None and is_kept(checkpoint):
        with dispensable():
            checkpoint.unlink()
    return sums


def _add(sums: KeySums, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    sums.add(inputs[0])


def _save_checkpoint(path: Path, sums: dict[int, KeySums], batches: int) -> None:
    arrays: dict[str, Any] = {"batches": np.array(batches)}
    for layer, of_layer in sums.items():
        arrays[f"total.{layer}"] = of_layer.upper.cpu().numpy()
        arrays[f"moments.{layer}"] = of_layer.moments.cpu().numpy()
    write_whole(path, lambda stream: np.savez(stream, **arrays))


def _resume(path: Path | None, sums: dict[int, KeySums]) -> int:
    """Take the sums of an interrupted pass; returns how many batches are in them."""
    if path is None or not is_kept(path):
        return 0
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = {
                layer: (torch.from_numpy(file[f"total.{layer}"]), torch.from_numpy(file[f"moments.{layer}"]))
                for layer in sums
            }
            batches = int(file["batches"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        LOG.warning("%s: unreadable checkpoint (%s); starting over", path, error)
        return 0
    for layer, (total, moments) in saved.items():
        sums[layer].upper.copy_(total)
        sums[layer].moments.copy_(moments)
    return batches
