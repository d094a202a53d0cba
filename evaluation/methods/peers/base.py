"""One of the toolkit's own methods, as it is: its apply function on its own hyperparameters.

It is called as `BaseEditor` calls it when edits follow one another. A method that nobody described is taken for one
that writes weights, takes whole batches if the toolkit says so, and keeps in its modules what most keep there; what is
particular about a method stands in its own class beside this file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from coachhook_plugin.cache import cache_dir
from coachhook_plugin.hparams import SMALL_MODEL, CoachHooKHparams
from coachhook_plugin.smollm2 import smollm2_path
from coachhook_plugin.toolkit import import_easyeditor

from ...data import Record
from ...metrics import Asking
from ...protocol import NoWayBack
from ..settings import ALGORITHMS
from ..statistics import share_statistics
from .registry import TEMPLATES, hparams_class, place, registered, statistics_held, usual_memory

LENGTHS = "context_template_length_params"  # the hyperparameter of the ROME family


class Peer:
    """A method of the toolkit, writing one batch after another.

    Args:
        config: its hyperparameters, as in its YAML file.
        ours: CoachHooK's hyperparameters, which say where the shared key statistics come from.
        folder: for what it prints, and for files of its own.
        base: hyperparameters of the method inside it (SimIE's `base_method`).

    Raises:
        ValueError: this toolkit has no such method.
    """

    # "module:name" under easyeditor.models: globals that go from one call to the next; None: the usual ones.
    globals_kept: tuple[str, ...] | None = None
    writes_one = False  # one fact a call, whatever the toolkit says
    wants_loc_prompts = False  # while it learns a fact it also reads a text that it shall not answer
    loc_prompts: Sequence[str] = ()  # those texts, taken in turn
    templates_lengths: Any = None  # of the sampled contexts, where its hyperparameters do not tell
    newer: tuple[str, ...] = ()  # hyperparameters that the release's class does not know yet

    def __init__(
        self,
        config: Mapping[str, Any],
        ours: CoachHooKHparams,
        folder: Path,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        self.toolkit: Any = import_easyeditor()
        self.algorithm = registered(str(config["alg_name"]))
        self.name = ALGORITHMS.get(self.algorithm.lower(), self.algorithm)
        self.memory = usual_memory(self.algorithm) if self.globals_kept is None else self.globals_kept
        self._log, self._folder = folder / f"{self.name.lower()}.log", folder
        hparams = self._hparams(dict(config), base)
        with self._quiet():
            self.editor: Any = self.toolkit.BaseEditor.from_hparams(hparams)
        self.model: nn.Module = self.editor.model
        self.tokenizer: Any = self.editor.tok
        for part in self._settings_parts():
            if hasattr(part, "stats_dir"):
                part.stats_dir = str(cache_dir() / "toolkit-statistics")
                share_statistics(self.model, self.tokenizer, ours, part)

    @property
    def hparams(self) -> Any:
        """The method's own hyperparameters."""
        return self.editor.hparams

    @property
    def one_by_one(self) -> bool:
        """Whether it writes one fact at a time."""
        if self.writes_one:
            return True
        batches = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
        return not batches.is_batchable_method(self.algorithm)

    @property
    def asking(self) -> Asking:
        """How its model is asked."""
        return Asking()

    def prepare(self) -> None:
        """Sample the contexts that it puts before prompts; the statistics are laid ready when it is made.

        Before the first state, so that no batch's time holds it, and every batch and process has the same ones.
        """
        for where in self.memory:
            module, name = place(where)
            if name == TEMPLATES and getattr(module, name) is None and hasattr(module, "get_context_templates"):
                with self._quiet():
                    self._sample_templates(module)

    def _sample_templates(self, module: Any) -> None:
        sample, lengths = module.get_context_templates, getattr(self._settings_parts()[-1], LENGTHS, None)
        known = inspect.signature(sample).parameters
        more = {
            "length_params": self.templates_lengths if lengths is None else lengths,
            "device": self.editor.model.device,
        }
        sample(self.model, self.tokenizer, **{name: value for name, value in more.items() if name in known})

    def edit(self, records: Sequence[Record]) -> None:
        self.edit_requests([record.request() for record in records])

    def edit_requests(self, requests: list[dict[str, Any]]) -> None:
        """Write one batch on top of all earlier ones; one fact at a time where the method takes no batches."""
        for group in [[request] for request in requests] if self.one_by_one else [requests]:
            self._write(group)

    def _write(self, requests: list[dict[str, Any]]) -> None:
        with self._quiet():
            given = self.editor.apply_algo(
                self.model,
                self.tokenizer,
                requests,
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=False,
            )
        edited = given[0] if isinstance(given, tuple) else None
        if not isinstance(edited, nn.Module):
            raise ValueError(f"{self.name} gives back no edited model, so nothing of it can be scored here")
        self._take(edited)
        self.model.eval()

    def _take(self, edited: nn.Module) -> None:
        """What the method gives back is the model from here on."""
        self.model = edited

    def kept_bytes(self) -> int:
        """Of what the method keeps beside the model's weights, which most methods change themselves: key statistics,
        and what its edits leave for later ones."""
        parts = self._settings_parts()
        return bytes_of([*self._kept(), *(statistics_held(registered(part.alg_name)) for part in parts)])

    def _kept(self) -> list[Any]:
        return [getattr(*place(where), None) for where in self.memory]

    # What the edits so far have made: kept between batches, so that a run can go on or start afresh.

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """Everything that the next batch builds on; a copy."""
        return {
            "weights": {name: p.detach().clone().cpu() for name, p in self._written_weights()},
            "memory": {where: copy.deepcopy(getattr(*place(where), None)) for where in self.memory},
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Return to a `state` of this method, of this process or of another one."""
        parameters = dict(self.model.named_parameters())
        if not parameters.keys() >= state["weights"].keys():
            raise NoWayBack(
                f"{self.name} puts modules of its own into the model, which a fresh process does not have; its run "
                "cannot go on, and cannot start each batch from the unedited model: give again=true snapshots=0 and "
                "protocol=consecutive"
            )
        for name, value in state["weights"].items():
            parameters[name].copy_(value)
        for where, value in state["memory"].items():
            setattr(*place(where), copy.deepcopy(value))

    def _written_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        marks = []
        for part in self._settings_parts():
            if hasattr(part, "rewrite_module_tmp"):
                marks += [part.rewrite_module_tmp.format(layer) for layer in part.layers]
            for template in getattr(part, "rewrite_module_tmps", []):  # PMET's
                marks += [template.format(layer) for layer in part.layers]
            marks += list(getattr(part, "inner_params", []))
        for name, parameter in self.model.named_parameters():
            if not marks or any(f"{mark.removesuffix('.weight')}." in name for mark in marks):
                yield name, parameter

    def _settings_parts(self) -> list[Any]:
        """The hyperparameters, and those of the method inside it."""
        return [self.hparams]

    # How it is set up.

    def _hparams(self, config: dict[str, Any], base: Mapping[str, Any] | None) -> Any:
        """The method's own hyperparameter object, made by its own reader from a file beside the results."""
        cls = hparams_class(self.algorithm)
        known = {field.name for field in dataclasses.fields(cls)}
        for name in self.newer:
            if name not in known:
                config.pop(name, None)
        made = self._written_file(config)
        if base is not None:  # its reader looks for it under the same name
            self._written_file({**base, "model_name": config["model_name"], "device": config["device"]})
        with self._quiet():
            return cls.from_hparams(str(made))

    def _written_file(self, config: dict[str, Any]) -> Path:
        stem = str(config["model_name"]).rpartition("/")[2]
        path = self._folder / "hparams" / str(config["alg_name"]) / f"{stem}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        if config["model_name"] == SMALL_MODEL:
            config = {**config, "model_name": smollm2_path()}
            if "tokenizer_name" in config:
                config["tokenizer_name"] = config["model_name"]
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """What the method prints goes to a file, so that progress stays readable."""
        with self._log.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield


def set_batch_size(hparams: Any, size: int) -> None:
    """How many facts a call writes at once."""
    hparams.batch_size = size
    if hasattr(hparams, "batch_size_once"):  # UltraEdit reads a batch in parts of this size, and drops what is left
        hparams.batch_size_once = math.gcd(hparams.batch_size_once, size)


def bytes_of(held: Any) -> int:
    """Of all tensors in there, each counted once."""
    found: dict[int, int] = {}
    left, seen = [held], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, nn.Module):
            left.append(vars(one))
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one
    return sum(found.values())
