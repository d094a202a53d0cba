"""The methods a run can compare, each on the same model and the same key statistics."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

import coachhook_plugin  # noqa: F401  (makes CoachHooK one of the toolkit's methods)
from coachhook_plugin.architectures import ModelParts, key_size, model_parts
from coachhook_plugin.cache import cache_dir
from coachhook_plugin.fingerprint import model_fingerprint
from coachhook_plugin.hparams import SMALL_MODEL, CoachHooKHparams
from coachhook_plugin.shipped import shipped_hparams
from coachhook_plugin.smollm2 import smollm2_path
from coachhook_plugin.statistics import key_statistics, save_statistics, toolkit_paths
from coachhook_plugin.text import text_source
from coachhook_plugin.toolkit import import_easyeditor
from coachhook_plugin.toolkit.release import as_cuda
from coachhook_plugin.trace import frozen

from .data import Record
from .protocol import EditingMethod


class CoachHooK:
    """This project's method, through the toolkit's `BaseEditor`."""

    name = "CoachHooK"

    def __init__(self, hparams: CoachHooKHparams) -> None:
        from coachhook_plugin.editor import CoachHooKEditor

        self._editor = CoachHooKEditor.from_hparams(hparams)
        self.model: nn.Module = self._editor.model
        self.tokenizer: Any = self._editor.tok

    def prepare(self) -> None:
        _ = self._editor.session.state

    def edit(self, records: Sequence[Record]) -> None:
        self._editor.session.edit([record.request() for record in records])

    def kept_bytes(self) -> int:
        return self._editor.session.kept_bytes()


class ToolkitMethod:
    """A method of the toolkit, as it is, called as `BaseEditor.batch_edit` calls it with sequential editing."""

    def __init__(self, name: str, hparams: Any, log: Path) -> None:
        self.name = name
        self._log = log
        with self._quiet():
            self._editor = import_easyeditor().BaseEditor.from_hparams(hparams)
        self.model: nn.Module = self._editor.model
        self.tokenizer: Any = self._editor.tok

    @property
    def hparams(self) -> Any:
        """The method's own hyperparameters."""
        return self._editor.hparams

    def prepare(self) -> None:
        """The statistics are laid ready by `build`."""

    def edit(self, records: Sequence[Record]) -> None:
        self.edit_requests([record.request() for record in records])

    def edit_requests(self, requests: list[dict[str, Any]]) -> None:
        """Write one batch on top of all earlier ones."""
        with self._quiet():
            self.model, _ = self._editor.apply_algo(
                self.model,
                self.tokenizer,
                requests,
                self._editor.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=False,
            )

    def kept_bytes(self) -> int:
        return 0  # the weights themselves are changed

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """What the method prints goes to a file, so that progress stays readable."""
        with self._log.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield


def build(name: str, model: str, folder: Path) -> EditingMethod:
    """The method called `name` ("coachhook", "memit"), with the shipped hyperparameters for `model`.

    Args:
        folder: where a toolkit method writes what it prints.
    """
    logging.getLogger().setLevel(logging.WARNING)
    ours = CoachHooKHparams.from_hparams(model)
    if name.lower() == "coachhook":
        return CoachHooK(ours)
    if name.lower() == "memit":
        toolkit = import_easyeditor()
        hparams = toolkit.MEMITHyperParams(**_toolkit_config("MEMIT", model))
        hparams.stats_dir = str(cache_dir() / "toolkit-statistics")
        method = ToolkitMethod("MEMIT", hparams, folder / "memit.log")
        _share_statistics(method, ours, hparams)
        return method
    raise ValueError(f"method {name!r} is not known here; choose from coachhook, memit")


def _toolkit_config(method: str, model: str) -> dict[str, Any]:
    """A shipped YAML of a toolkit method, with numbers such as 5e-1 as numbers and our name for the small model."""
    path = shipped_hparams(model, method)
    if path is None:
        raise ValueError(f"no hyperparameters of {method} for {model!r} are shipped")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config["model_name"] == SMALL_MODEL:
        config["model_name"] = smollm2_path()
    return config


def _share_statistics(method: ToolkitMethod, ours: CoachHooKHparams, theirs: Any) -> None:
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
    parts = model_parts(method.model, source)
    with frozen(method.model):
        text = partial(text_source, method.model, method.tokenizer, source, key_size(parts), source.torch_device())
        found = key_statistics(method.model, parts, source, text)
    # A folder for each model: the toolkit's file names do not tell models of one name apart.
    theirs.stats_dir = named.stats_dir = str(Path(theirs.stats_dir) / model_fingerprint(method.model))
    for layer, statistics in found.items():
        for path in toolkit_paths(method.model, parts, layer, named):
            save_statistics(path, statistics, theirs.mom2_n_samples)


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
