"""The same key statistics C0 for every method: CoachHooK's, laid where the toolkit looks for its own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import io
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coachhook_plugin.architectures import ModelParts, key_size, model_parts
from coachhook_plugin.fingerprint import model_fingerprint
from coachhook_plugin.hparams import CoachHooKHparams
from coachhook_plugin.statistics import KeyStatistics, key_statistics, save_statistics, toolkit_paths
from coachhook_plugin.text import text_source
from coachhook_plugin.toolkit import import_easyeditor
from coachhook_plugin.toolkit.release import as_cuda
from coachhook_plugin.trace import frozen


def share_statistics(model: Any, tokenizer: Any, ours: CoachHooKHparams, theirs: Any) -> None:
    """Write the key statistics that CoachHooK uses where the toolkit looks for its own: the same C0 for both."""
    named = dataclasses.replace(
        ours,
        layers=list(theirs.layers),
        stats_dir=theirs.stats_dir,
        mom2_dataset=theirs.mom2_dataset,
        mom2_n_samples=theirs.mom2_n_samples,
        mom2_dtype=theirs.mom2_dtype,
    )
    source = dataclasses.replace(ours, layers=list(theirs.layers))
    parts = model_parts(model, source)
    with frozen(model):
        # Where the model is: `ours` may be for another device.
        text = partial(text_source, model, tokenizer, source, key_size(parts), next(model.parameters()).device)
        found = key_statistics(model, parts, source, text)
    # A folder for each model, text and choice of layers: the toolkit's file names do not tell the first two apart.
    own = f"{model_fingerprint(model)}-{_digest(found.values())}"
    theirs.stats_dir = named.stats_dir = str(Path(theirs.stats_dir) / own)
    for layer, statistics in found.items():
        for path in toolkit_paths(model, parts, layer, named):
            save_statistics(path, statistics, theirs.mom2_n_samples)


def _digest(found: Iterable[KeyStatistics]) -> str:
    """A short name for the text that statistics are of: the keys' squares tell it."""
    told = hashlib.sha256()
    for statistics in found:
        told.update(statistics.total.diagonal().double().cpu().numpy().tobytes())
    return told.hexdigest()[:10]


def toolkit_statistics(
    model: Any, tokenizer: Any, parts: ModelParts, hparams: CoachHooKHparams, texts: Sequence[str]
) -> tuple[float, int]:
    """Collect the key statistics of every edited layer with the toolkit's own function.

    Returns:
        Seconds, and the number of keys it counted at each layer.
    """
    import_easyeditor()
    module: Any = importlib.import_module("easyeditor.models.rome.layer_stats")
    presented = copy.copy(hparams)
    seconds, counts = 0.0, set()
    given, module.load_dataset = module.load_dataset, lambda *_: {"train": [{"text": text} for text in texts]}
    try:
        with tempfile.TemporaryDirectory() as folder, as_cuda(presented), contextlib.redirect_stdout(io.StringIO()):
            for layer in parts.projections:
                started = time.perf_counter()
                found = module.layer_stats(
                    model,
                    tokenizer,
                    parts.names.projection.format(layer),
                    folder,
                    "wikipedia",
                    to_collect=["mom2"],
                    model_name=f"layer-{layer}",
                    sample_size=len(texts),
                    precision="float32",
                    progress=lambda loader, **_: loader,
                    hparams=presented,
                )
                seconds += time.perf_counter() - started
                counts.add(int(found.mom2.count))
    finally:
        module.load_dataset = given
    (count,) = counts
    return seconds, count
