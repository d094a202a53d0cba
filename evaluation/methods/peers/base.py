"""The toolkit's own methods, as they are: their apply functions on their own hyperparameters.

Each is called as `BaseEditor` calls it when edits follow one another. What differs between them and matters to a run
stands in `TRAITS`; a method that is not there is taken for one that writes weights, takes whole batches if the toolkit
says so, and keeps in its modules what most keep there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from coachhook_plugin.cache import cache_dir, write_whole
from coachhook_plugin.hparams import SMALL_MODEL, CoachHooKHparams
from coachhook_plugin.smollm2 import smollm2_path
from coachhook_plugin.toolkit import import_easyeditor

from ..data import Record
from ..metrics import Asking
from .settings import ALGORITHMS
from .statistics import share_statistics

MODELS = "easyeditor.models"


@dataclass(frozen=True)
class Traits:
    """What is particular about a method."""

    alone: bool = False  # its answers depend on batch mates: it is asked one row at a time
    one_by_one: bool = False  # a call writes one fact
    use_cache: bool = True  # in generation
    adapter: bool = False  # it puts a module of its own in the place of `inner_params[0]`
    # "module:name" under easyeditor.models: globals that go from one call to the next; None: the usual ones.
    memory: tuple[str, ...] | None = None


TEMPLATES = "CONTEXT_TEMPLATES_CACHE"
CACHES = ("cache_c", "cache_c_new")  # of keys edited so far: AlphaEdit's, and of what is made after it
LENGTHS = "context_template_length_params"  # the hyperparameter of the ROME family; WISE's stand in its code
WISE_LENGTHS = [[5, 5], [10, 5]]

TRAITS = {
    "ROME": Traits(one_by_one=True),
    "R-ROME": Traits(one_by_one=True),
    "SimIE": Traits(one_by_one=True, memory=(f"rome.rome_main:{TEMPLATES}",)),
    # Its side memory answers for a whole batch or for none of it, by the mean over all tokens.
    "WISE": Traits(
        alone=True,
        one_by_one=True,
        adapter=True,
        memory=("wise.WISE:edit_history", "wise.WISE:merge_group_edit_history", f"wise.utils:{TEMPLATES}"),
    ),
    # Looks at one place of the input, which it is told; its `generate` reads without a cache in the toolkit.
    "GRACE": Traits(alone=True, one_by_one=True, use_cache=False, adapter=True),
}
WISE_SCRATCH = ("original_layer_output", "new_weight_layer_output")
# Hyperparameters that the release's classes do not know yet.
NEWER = {"FT": ("objective_optimization",)}


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

    def __init__(
        self,
        config: Mapping[str, Any],
        ours: CoachHooKHparams,
        folder: Path,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        self.toolkit: Any = import_easyeditor()
        self.algorithm = self._algorithm(str(config["alg_name"]))
        self.name = ALGORITHMS.get(self.algorithm.lower(), self.algorithm)
        self.traits = TRAITS.get(self.algorithm, Traits())
        self.memory = _usual_memory(self.algorithm) if self.traits.memory is None else self.traits.memory
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
        self.loc_prompts: Sequence[str] = ()
        self._calls = 0

    @property
    def hparams(self) -> Any:
        """The method's own hyperparameters."""
        return self.editor.hparams

    @property
    def one_by_one(self) -> bool:
        """Whether it writes one fact at a time."""
        if self.traits.one_by_one:
            return True
        batches = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
        return not batches.is_batchable_method(self.algorithm)

    @property
    def asking(self) -> Asking:
        """How its model is asked."""
        at = self._look_at if self.algorithm == "GRACE" else None
        return Asking(alone=self.traits.alone, use_cache=self.traits.use_cache, at=at)

    def prepare(self) -> None:
        """Sample the contexts that it puts before prompts, and make AlphaEdit's projection; the statistics are laid
        ready when it is made.

        Before the first state, so that no batch's time holds it, and every batch and process has the same ones.
        """
        if self.algorithm == "AlphaEdit" and not Path(self.hparams.P_loc).is_file():
            self._project()
        for place in self.memory:
            module, name = _place(place)
            if name == TEMPLATES and getattr(module, name) is None and hasattr(module, "get_context_templates"):
                with self._quiet():
                    self._sample_templates(module)

    def _sample_templates(self, module: Any) -> None:
        sample, lengths = module.get_context_templates, getattr(self._settings_parts()[-1], LENGTHS, None)
        known = inspect.signature(sample).parameters
        more = {"length_params": WISE_LENGTHS if lengths is None else lengths, "device": self.editor.model.device}
        sample(self.model, self.tokenizer, **{name: value for name, value in more.items() if name in known})

    def _project(self) -> None:
        """AlphaEdit's null space of C0 by layer, where its first batch would write it and every later one reads it."""
        of_layer = importlib.import_module(f"{MODELS}.alphaedit.AlphaEdit_main").get_project
        hparams = self.hparams
        with self._quiet():
            found = torch.stack([of_layer(self.model, self.tokenizer, layer, hparams) for layer in hparams.layers])
        write_whole(Path(hparams.P_loc), lambda stream: torch.save(found, stream))

    def edit(self, records: Sequence[Record]) -> None:
        self.edit_requests([record.request() for record in records])

    def edit_requests(self, requests: list[dict[str, Any]]) -> None:
        """Write one batch on top of all earlier ones; one fact at a time where the method takes no batches."""
        for group in [[request] for request in requests] if self.one_by_one else [requests]:
            self._write([self._with_loc_prompt(request) for request in group])

    def _write(self, requests: list[dict[str, Any]]) -> None:
        if self.algorithm == "ULTRAEDIT":  # it writes as many as this says, whatever it is given
            set_batch_size(self.hparams, len(requests))
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
        if not self.traits.adapter:  # those return a shell around the model, and expect the model back
            self.model = edited
        self.model.eval()

    def _with_loc_prompt(self, request: dict[str, Any]) -> dict[str, Any]:
        """WISE also reads a text that it shall not answer; those here belong to records that nobody scores."""
        self._calls += 1
        if self.algorithm != "WISE":
            return request
        if not self.loc_prompts:
            raise ValueError("WISE needs texts that it shall leave alone; give them as `loc_prompts`")
        return {**request, "loc_prompt": self.loc_prompts[(self._calls - 1) % len(self.loc_prompts)]}

    def kept_bytes(self) -> int:
        """Of what the method keeps for its edits beside the model's weights, which most methods change themselves."""
        kept = [getattr(*_place(place), None) for place in self.memory]
        kept += self._simie().values()
        if not self.traits.adapter:
            return _bytes(kept)
        place, name = self._adapter_place()
        module = getattr(place, name)
        own = {key: value for key, value in vars(module).items() if key not in WISE_SCRATCH}
        return _bytes([kept, own]) - _bytes(next(module.parameters()))

    # What the edits so far have made: kept between batches, so that a run can go on or start afresh.

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """Everything that the next batch builds on; a copy."""
        found: dict[str, Any] = {
            "calls": self._calls,
            "weights": {name: p.detach().clone().cpu() for name, p in self._written_weights()},
            "memory": {place: copy.deepcopy(getattr(*_place(place), None)) for place in self.memory},
            "simie": copy.deepcopy(self._simie()),
        }
        if self.traits.adapter:
            place, name = self._adapter_place()
            module = getattr(place, name)
            for scratch in WISE_SCRATCH:
                vars(module).pop(scratch, None)
            found["adapter"] = copy.deepcopy(module)
        if self.algorithm == "ULTRAEDIT":
            executor = self._executor()
            found["normalizer"] = (
                copy.deepcopy(executor.alg.lifelong_normalizer.state_dict()) if executor.is_init else None
            )
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Return to a `state` of this method, of this process or of another one."""
        self._calls = state["calls"]
        if self.traits.adapter:
            place, name = self._adapter_place()
            setattr(place, name, copy.deepcopy(state["adapter"]))
        parameters = dict(self.model.named_parameters())
        if not parameters.keys() >= state["weights"].keys():
            raise ValueError(
                f"{self.name} puts modules of its own into the model, which a fresh process does not have; its run "
                "cannot go on, and cannot start each batch from the unedited model: give again=true snapshots=0 and "
                "protocol=consecutive"
            )
        for name, value in state["weights"].items():
            parameters[name].copy_(value)
        for place_of, value in state["memory"].items():
            setattr(*_place(place_of), copy.deepcopy(value))
        for name in self._simie():
            delattr(self.hparams, name)
        for name, value in state["simie"].items():
            setattr(self.hparams, name, copy.deepcopy(value))
        if self.algorithm == "ULTRAEDIT":
            executor = self._executor()
            if executor.is_init:
                executor.reset_model()
            if state["normalizer"] is not None:
                executor.init_model(self.model, self.tokenizer, self.hparams)
                executor.is_init = True
                executor.alg.lifelong_normalizer.load_state_dict(state["normalizer"])

    def _written_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.traits.adapter:
            return
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

    def _simie(self) -> dict[str, Any]:
        """What SimIE keeps from one edit to the next, on its hyperparameters."""
        return {name: value for name, value in vars(self.hparams).items() if name.startswith("_simie_")}

    def _settings_parts(self) -> list[Any]:
        """The hyperparameters, and those of the method inside it."""
        inner = getattr(self.hparams, "_base_hparams", None)
        return [self.hparams] if inner is None else [self.hparams, inner]

    def _adapter_place(self) -> tuple[nn.Module, str]:
        path = self.hparams.inner_params[0].removesuffix(".weight").replace("[", ".").replace("]", "")
        place, _, name = path.rpartition(".")
        return self.model.get_submodule(place), name

    def _look_at(self, place: int) -> None:
        holder, name = self._adapter_place()
        module = getattr(holder, name)
        if hasattr(module, "key_id"):
            module.key_id = place

    def _executor(self) -> Any:
        return self.editor.apply_algo.__self__

    # How it is found and set up.

    def _algorithm(self, name: str) -> str:
        registry = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
        for known in registry:
            if known.lower() == name.lower():
                return str(known)
        raise ValueError(
            f"method {name!r} is not in this EasyEdit, which has {', '.join(sorted(registry))}; set EASYEDIT_HOME to "
            "the top folder of a checkout for the newer ones"
        )

    def _hparams(self, config: dict[str, Any], base: Mapping[str, Any] | None) -> Any:
        """The method's own hyperparameter object, made by its own reader from a file beside the results."""
        cls = _hparams_class(self.algorithm)
        known = {field.name for field in dataclasses.fields(cls)}
        for name in NEWER.get(self.algorithm, ()):
            if name not in known:
                config.pop(name, None)
        made = self._written_file(config)
        if base is not None:  # its reader looks for it under the same name
            self._written_file({**base, "model_name": config["model_name"], "device": config["device"]})
        with self._quiet():
            hparams = cls.from_hparams(str(made))
        if self.algorithm == "WISE":
            hparams.sequential_edit = True
        if self.algorithm == "AlphaEdit":
            projection = self._folder / "null_space_project.pt"  # where it writes it, in its working directory
            if projection.is_file() and not zipfile.is_zipfile(projection):
                projection.unlink()  # of a process killed while it wrote
            hparams.P_loc = str(projection)
        return hparams

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


def _bytes(held: Any) -> int:
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


def _place(where: str) -> tuple[Any, str]:
    module, _, name = where.partition(":")
    return importlib.import_module(f"{MODELS}.{module}"), name


def _usual_memory(algorithm: str) -> tuple[str, ...]:
    """Contexts and caches among the globals of a method, by the names that all of them use."""
    _, inside = _package(algorithm)
    return tuple(
        f"{module.removeprefix(f'{MODELS}.')}:{name}"
        for module in inside
        for names in ((TEMPLATES,), CACHES)
        if names[-1] in vars(sys.modules[module])  # the first edit makes the cache itself
        for name in names
    )


def _package(algorithm: str) -> tuple[str, list[str]]:
    """The package that a method's apply function comes from, and the modules of it that are loaded."""
    apply = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT[algorithm]
    owner = getattr(apply, "__self__", None)
    package = (apply.__module__ if owner is None else type(owner).__module__).rpartition(".")[0]
    return package, sorted(name for name in sys.modules if f"{name}.".startswith(f"{package}."))


def _hparams_class(algorithm: str) -> Any:
    """The hyperparameter class in the package that a method's apply function comes from."""
    package, inside = _package(algorithm)
    base = importlib.import_module("easyeditor.util.hparams").HyperParams
    for module_name in inside:
        for name, found in sorted(vars(sys.modules[module_name]).items()):
            ours = inspect.isclass(found) and issubclass(found, base) and found.__module__ in inside
            if ours and "multimodal" not in name.lower() and "train" not in name.lower():
                return found
    raise ValueError(f"no hyperparameter class of {algorithm} was found in {package}")
