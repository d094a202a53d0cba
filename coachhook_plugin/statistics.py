"""Key statistics C0 = E[k k^T] of pre-training keys, one (m, m) matrix for each edited layer (paper: K0 K0^T).

Sources, in order of preference:

1. a file in the toolkit's format (`easyeditor/models/rome/layer_stats.py`) under `stats_dir`;
2. the text file or Hugging Face data set that `mom2_dataset` names;
3. text sampled from the model itself (`mom2_dataset: self`, and where a data set cannot be loaded).

What 2 and 3 collect is kept in the cache folder under a key made of everything that determines it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .architectures import ModelParts, weight_shape
from .cache import cache_dir, dispensable, is_kept, write_whole
from .collection import Share, collected_sums, needed_by_any
from .fingerprint import model_fingerprint
from .hparams import CoachHooKHparams
from .text import TextSource
from .trace import captured

LOG = logging.getLogger(__name__)

FORMAT = 1  # of the cache; raise it when the same settings would give other numbers
SAMPLE = 4096  # pre-training keys that the editing scope is calibrated on


@dataclass(frozen=True)
class KeyStatistics:
    """Sum of k k^T over `count` keys."""

    total: torch.Tensor  # (m, m)
    count: int
    fourth: float | None = None  # sum of ||k||^4; None: not in the file

    def covariance(self) -> torch.Tensor:
        """C0 = E[k k^T], (m, m)."""
        return self.total / self.count

    def standard_error(self, count: int | None = None) -> float | None:
        """How far C0 is likely to be from that of endless text, or would be with `count` keys.

        Returns:
            The root of E||C0 - true C0||^2 / ||C0||^2 (Frobenius norms) for independent keys, of which the variance
            is (E||k||^4 - ||C0||^2) / count; None without the fourth moment, as in the toolkit's files.
        """
        if self.fourth is None:
            return None
        size = float(self.covariance().square().sum())
        return math.sqrt(max(self.fourth / self.count - size, 0.0) / (count or self.count) / size)

    def told(self) -> str:
        """A line for people: how many keys, and what more of them would change."""
        keys = f"{self.count:,} keys, {self.count / len(self.total):.1f} for each of their {len(self.total)} entries"
        now, then = self.standard_error(), self.standard_error(2 * self.count)
        if now is None or then is None:
            return keys
        return f"{keys}; C0 is known to {now:.1%}, with twice as many keys it would be to {then:.1%}"

    def as_saved(self) -> KeyStatistics:
        """The same to the bits that a file keeps, so that a run that collects and one that reads agree."""
        return replace(self, total=self.total.float().double().cpu())


def key_statistics(
    model: nn.Module,
    parts: ModelParts,
    hparams: CoachHooKHparams,
    text: Callable[[], TextSource],
    progress: bool = True,
) -> dict[int, KeyStatistics]:
    """Find or collect the statistics of every edited layer. The model must be unedited and frozen.

    Args:
        text: gives the text to collect from; asked only where no file is there.

    Raises:
        ValueError: a file in the toolkit's format that is damaged or belongs to another model.
    """
    found: dict[int, KeyStatistics] = {}
    for layer, projection in parts.projections.items():
        path = toolkit_file(model, parts, layer, hparams)
        if path is not None:
            found[layer] = load_statistics(path, weight_shape(projection)[1])
    wanted = needed_by_any([layer for layer in parts.projections if layer not in found])
    if wanted:
        found |= _cached(model, parts, wanted, text(), progress)
    return {layer: found[layer] for layer in parts.projections}


@torch.no_grad()
def pre_training_keys(
    model: nn.Module,
    parts: ModelParts,
    layer: int,
    source: TextSource,
    count: int = SAMPLE,
) -> torch.Tensor:
    """(n, m): the first `count` pre-training keys of one edited layer, or all there are. For a model as above."""
    projection = parts.projections[layer]
    device = next(model.parameters()).device
    keys: list[torch.Tensor] = []
    for index in range(source.batches):
        ids = source.batch(index).to(device)
        with captured(projection, stop=True) as seen:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        keys.append(seen.input.reshape(-1, weight_shape(projection)[1]).float())
        if sum(map(len, keys)) >= count:
            break
    return torch.cat(keys)[:count]


def toolkit_file(model: nn.Module, parts: ModelParts, layer: int, hparams: CoachHooKHparams) -> Path | None:
    """The layer's statistics under `stats_dir`, in the naming of the source version or of the release."""
    return next((path for path in toolkit_paths(model, parts, layer, hparams) if path.is_file()), None)


def toolkit_paths(model: nn.Module, parts: ModelParts, layer: int, hparams: CoachHooKHparams) -> list[Path]:
    """Where the source version and the release of the toolkit look for the layer's statistics."""
    if hparams.stats_dir is None:
        return []
    named = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    folders = dict.fromkeys([named.rsplit("/")[-1], named.replace("/", "_")])
    size = "" if hparams.mom2_n_samples is None else f"_{hparams.mom2_n_samples}"
    file = f"{parts.names.projection.format(layer)}_{hparams.mom2_dtype}_mom2{size}.npz"
    dataset = Path(hparams.mom2_dataset).stem or hparams.mom2_dataset
    return [Path(hparams.stats_dir) / folder / f"{dataset}_stats" / file for folder in folders if folder]


def load_statistics(path: Path, key_size: int) -> KeyStatistics:
    """Read a file in the toolkit's format: `mom2.mom2` is a sum over `mom2.count` keys.

    Raises:
        ValueError: the file is damaged, or its matrix is not a finite (key_size, key_size) second moment.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            total, count = torch.from_numpy(file["mom2.mom2"]), int(file["mom2.count"])
            fourth = float(file["mom2.fourth"]) if "mom2.fourth" in file else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable key statistics file ({error}); delete it or restore it") from None
    if tuple(total.shape) != (key_size, key_size):
        raise ValueError(
            f"{path}: holds a {tuple(total.shape)} matrix, but this model's keys have {key_size} entries; "
            "it belongs to another model or module"
        )
    total = total.double()
    if count < 1 or not total.isfinite().all() or (total.diagonal() < 0).any():
        raise ValueError(f"{path}: not a sum of k k^T over at least one key; delete it or restore it")
    if not torch.allclose(total, total.T, rtol=1e-3, atol=1e-3 * float(total.diagonal().mean())):
        raise ValueError(f"{path}: its matrix is not symmetric, so it is no second moment; delete it or restore it")
    return KeyStatistics(total, count, fourth)


def save_statistics(path: Path, statistics: KeyStatistics, sample_size: int | None = None) -> None:
    """Write a file that `load_statistics` and both versions of the toolkit read (they want float32)."""
    arrays: dict[str, Any] = {
        "mom2.constructor": np.array("easyeditor.util.runningstats.SecondMoment()"),
        "mom2.count": np.array(statistics.count),
        "mom2.mom2": statistics.total.float().cpu().numpy(),
        "sample_size": np.array(statistics.count if sample_size is None else sample_size),
    }
    if statistics.fourth is not None:
        arrays["mom2.fourth"] = np.array(statistics.fourth)  # ours; the toolkit reads what it knows
    write_whole(path, lambda stream: np.savez(stream, **arrays))


def _cached(
    model: nn.Module, parts: ModelParts, layers: Sequence[int], source: TextSource, progress: bool
) -> dict[int, KeyStatistics]:
    fingerprint = model_fingerprint(model)
    folder = cache_dir() / "statistics"

    def path(layer: int) -> Path:
        key = {
            "format": FORMAT,
            "model": fingerprint,
            "module": parts.names.projection.format(layer),
            "text": source.description,
        }
        return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.npz"

    found: dict[int, KeyStatistics] = {}
    for layer in layers:
        if is_kept(path(layer)):
            try:
                found[layer] = load_statistics(path(layer), weight_shape(parts.projections[layer])[1])
            except ValueError as error:
                LOG.warning("%s; collecting again", error)
    missing = needed_by_any([layer for layer in layers if layer not in found])
    if missing:
        projections = {layer: parts.projections[layer] for layer in missing}
        together = hashlib.sha256("".join(path(layer).stem for layer in missing).encode()).hexdigest()[:32]
        checkpoint = folder / f"{together}.partial"
        for layer, sums in collected_sums(model, projections, source, checkpoint, progress).items():
            statistics = KeyStatistics(sums.total, sums.count, sums.fourth)
            LOG.info("key statistics of layer %d: %s", layer, statistics.told())
            if Share.of_this_process().first:
                with dispensable():
                    save_statistics(path(layer), statistics)
            found[layer] = statistics.as_saved()
    return found
