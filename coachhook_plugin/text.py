"""Pre-training text as batches of token ids: a file, a Hugging Face data set, or written by the model itself."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .architectures import context_length, vocabulary_size
from .cache import cache_dir, dispensable, is_kept, write_whole
from .fingerprint import model_fingerprint
from .hparams import CoachHooKHparams
from .sampling import sample

LOG = logging.getLogger(__name__)

FORMAT = 1  # of the cached text; raise it when the same settings would give other text
ROWS, LENGTH = 16, 256  # of a batch of text; rows are shorter where the model's context is
SAMPLED_ROWS, SAMPLED_LENGTH = 64, 64  # of sampled text: many rows cost a decoding step little more


class TextSource(Protocol):
    """Batches of token ids, reproducible from any starting point."""

    description: dict[str, Any]  # everything that determines the tokens
    batches: int

    def batch(self, index: int) -> torch.Tensor:
        """Token ids (b, T), every one real."""
        ...


class SampledText:
    """Text the model writes by itself, from its start token, drawn from the whole distribution.

    Writing takes much longer than reading, so each batch is kept in the cache folder.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tokens: int,
        seed: int,
        device: torch.device,
        length: int = SAMPLED_LENGTH,
    ) -> None:
        self._length = length
        self._model, self._device, self._seed = model, device, seed
        self._vocabulary = vocabulary_size(model)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._first = next((int(i) for i in ends if i is not None and i < self._vocabulary), 0)
        self._banned = [i for i in tokenizer.all_special_ids if i is not None]
        self.batches = max(1, -(-tokens // (SAMPLED_ROWS * length)))
        told = {"seed": seed, "batches": self.batches, "first": self._first, "rows": SAMPLED_ROWS, "length": length}
        self.description = {"source": "self", **told}
        key = {"format": FORMAT, "model": model_fingerprint(model), **told, "batches": None, "banned": self._banned}
        self._name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def batch(self, index: int) -> torch.Tensor:
        path = cache_dir() / "text" / f"{self._name}-{index}.npy"
        if is_kept(path):
            try:
                return self._read(path)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                LOG.warning("%s: unreadable (%s); writing it again", path, error)
        drawn = self._drawn(index).cpu().numpy()
        with dispensable():
            write_whole(path, lambda stream: np.save(stream, drawn))
        return torch.from_numpy(drawn)

    def _read(self, path: Path) -> torch.Tensor:
        ids = np.load(path, allow_pickle=False)
        if not isinstance(ids, np.ndarray) or ids.shape != (SAMPLED_ROWS, self._length) or ids.dtype != np.int64:
            raise ValueError("not rows of token ids")
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise ValueError("token ids of another vocabulary")
        return torch.from_numpy(ids)

    def _drawn(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        start = torch.full((SAMPLED_ROWS, 1), self._first, device=self._device)
        return sample(self._model, start, self._length + 1, generator, banned=self._banned)[:, 1:]


class PackedText:
    """Documents, one after another, cut into rows of equal length; without tokens that the model does not know."""

    def __init__(
        self, documents: Iterable[str], name: str, tokenizer: Any, vocabulary: int, tokens: int, length: int
    ) -> None:
        ids: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for document in documents:
            if len(ids) >= tokens:
                break
            if document.strip():
                read = tokenizer(document, verbose=False)["input_ids"] + end
                ids += [token for token in read if token < vocabulary]
        ids = ids[: max(tokens, 1)]
        if not ids:
            raise ValueError(f"mom2_dataset {name!r} holds no text")
        length = min(length, len(ids))
        self._rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        self.batches = -(-len(self._rows) // ROWS)
        told = hashlib.sha256(self._rows.numpy().tobytes()).hexdigest()
        self.description = {"source": Path(name).name, "tokens": told, "length": length}

    def batch(self, index: int) -> torch.Tensor:
        return self._rows[index * ROWS : (index + 1) * ROWS]


def text_source(
    model: nn.Module, tokenizer: Any, hparams: CoachHooKHparams, key_size: int, device: torch.device
) -> TextSource:
    """The text that `mom2_dataset` names, enough for `mom2_key_multiple` keys for each of their `key_size` entries."""
    tokens = int(hparams.mom2_key_multiple * key_size)
    length = min(LENGTH, context_length(model) or LENGTH)
    vocabulary = vocabulary_size(model)
    name = hparams.mom2_dataset
    if name != "self":
        path = Path(name).expanduser()
        if path.is_file():
            try:
                paragraphs = path.read_text(encoding="utf-8").split("\n\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"mom2_dataset: {path} is not UTF-8 text ({error}); save it as UTF-8") from None
            return PackedText(paragraphs, name, tokenizer, vocabulary, tokens, length)
        if path.suffix == ".txt" or path.is_absolute() or name.startswith((".", "~")):
            raise ValueError(
                f"mom2_dataset: there is no text file {name!r}; correct the path, or write mom2_dataset: self for "
                "text sampled from the model"
            )
        try:
            documents = _hub_documents(name, hparams.mom2_n_samples)
            return PackedText(documents, name, tokenizer, vocabulary, tokens, length)
        except Exception as error:  # no package, no network, no such data set: all end in the same remedy
            LOG.warning(
                "mom2_dataset %r cannot be read (%s: %s); text sampled from the model takes its place. Give a text "
                "file, or a statistics file under stats_dir, to avoid that",
                name,
                type(error).__name__,
                str(error).splitlines()[0] if str(error) else "",
            )
    return SampledText(model, tokenizer, tokens, hparams.seed, device, min(SAMPLED_LENGTH, length))


# The toolkit's short names.
HUB_NAMES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}


def _hub_documents(name: str, limit: int | None) -> Iterator[str]:
    """The data set's first `limit` documents, each fetched when it is asked for."""
    from datasets import load_dataset

    path, config = HUB_NAMES.get(name, (name, None))
    for row in islice(load_dataset(path, config, split="train", streaming=True), limit):
        yield str(row["text"])
