"""Hyperparameters of CoachHooK: one validated dataclass, read from YAML by path or by shipped name.

Keys that the toolkit's MEMIT files already use (`easyeditor/models/memit/memit_hparams.py`) keep their names and
meaning, so a MEMIT file becomes a CoachHooK file by changing `alg_name`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from .placement import Place
from .shipped import shipped_hparams, shipped_names

LOG = logging.getLogger(__name__)

SMALL_MODEL = "smollm2-135m"  # a model name that stands for the folder made by `smollm2.smollm2_path`


@dataclass
class CoachHooKHparams:
    """Everything a run of CoachHooK depends on (paper, section 4.1, and the objective of MEMIT it builds on)."""

    # Which model, and how the toolkit should load it.
    model_name: Any  # path or hub name; the toolkit also takes a (model, tokenizer) pair
    layers: list[int]  # blocks whose MLP output projection gets a hook layer, shallow to deep
    alg_name: str = "CoachHooK"
    device: Any = None  # int, "0", "cpu", "cuda:1", "mps", torch.device; None: CUDA where there is one
    model_parallel: bool = False
    fp16: bool = False
    batch_size: int = 1
    max_length: int = 40
    evaluation_type: str | None = None
    api_key: str | None = field(default=None, repr=False)  # of the toolkit's judge; never written to a folder

    # Target values: MEMIT's objective.
    layer_selection: Literal["all"] = "all"
    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.5
    v_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # Adam's; lower ones forget sooner
    v_loss_layer: int | None = None  # block whose output is read for the loss; None: the last one
    v_weight_decay: float = 1e-3
    v_loss_threshold: float = 0.05  # a request stops when its loss is below this ...
    v_nll_threshold: float = 0.0  # ... or the NLL within it below this: the KL term alone can keep a loss above 0.05
    clamp_norm_factor: float = 0.75  # ||delta|| <= factor * ||v0||
    kl_factor: float = 0.0625
    context_prefixes: list[str] | None = None  # texts put before the prompt; None: sampled from the model
    target_tokens: int = 8192  # tokens optimised at once: bounds memory, changes no result

    # Transformer memory: lambda C0 + sum K K^T.
    mom2_adjustment: bool = True
    mom2_update_weight: float = 15000.0  # lambda
    mom2_dataset: str = "self"  # "self": text sampled from the model; else a text file or a data set's name
    mom2_n_samples: int | None = None  # documents read from a data set, and part of the toolkit's file name
    mom2_dtype: Literal["float16", "float32", "float64"] = "float32"
    mom2_key_multiple: float = 10.0  # keys collected per key dimension, at most
    stats_dir: str | None = None  # folder with the toolkit's *_mom2*.npz files
    memory_device: Place = "weights"  # where the memories rest between batches: "weights", "cpu" or "disk" (mapped)
    accumulate: bool = True  # off: every batch sees lambda C0 alone, as MEMIT does
    # How the residual is spread. mean: an equal share for every layer (paper). boundary: the first and the last layer
    # alone, each towards a target of its own and without division (BLUE, arXiv 2502.03748).
    spread: Literal["mean", "boundary"] = "mean"

    # Hook layers and their scope.
    use_hooks: bool = True  # off: weights are written in place
    scope: Literal["leverage", "zscore"] = "leverage"  # which tokens are answered (`scope/`); zscore: the paper's rule
    scope_budget: float = 0.002  # leverage: share of pre-training tokens that may be answered
    scope_ridge: float = 0.1  # leverage: eps; an edited key alone has leverage 1 / (1 + eps)
    alpha: float = 2.2  # zscore: what z must reach
    dynamic_alpha: bool = True  # zscore: off, alpha stays as it is
    short_prompt_ratio: float = 0.9  # zscore: share of the attainable z asked of prompts too short for alpha

    # Where things are inside the model; None: looked up by model family (`architectures.py`).
    rewrite_module_tmp: str | None = None
    layer_module_tmp: str | None = None
    mlp_module_tmp: str | None = None  # this one and the next are in the toolkit's files, and nothing here needs them
    attn_module_tmp: str | None = None
    ln_f_module: str | None = None
    lm_head_module: str | None = None

    seed: int = 0  # of the sampled contexts and statistics text

    # Keeping the edits (`store/`).
    history_steps: int = 100  # batches that can be rolled back and whose facts can be forgotten, at most
    save_path: str | None = None  # in the toolkit: folder the edits are saved to
    load_path: str | None = None  # in the toolkit: folder of edits that are put on the model first
    session_dir: str | None = None  # folder that every batch is written to before `edit` returns

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerced(f.name, getattr(self, f.name), _types()[f.name]))
        if self.alg_name != "CoachHooK":
            raise ValueError(f"alg_name is {self.alg_name!r}; a CoachHooK file says alg_name: CoachHooK")
        if not self.layers:
            raise ValueError("layers is empty; name at least one block, for example layers: [4, 5, 6, 7, 8]")
        if len(set(self.layers)) != len(self.layers) or self.layers != sorted(self.layers):
            raise ValueError(f"layers is {self.layers}; list each block once, from shallow to deep")
        if self.layers[0] < 0:
            raise ValueError(f"layers is {self.layers}; blocks are counted from 0")
        for name in ("batch_size", "max_length", "v_num_grad_steps", "target_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("v_lr", "clamp_norm_factor", "mom2_update_weight", "mom2_key_multiple", "alpha", "scope_ridge"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("v_weight_decay", "kl_factor", "v_loss_threshold", "v_nll_threshold", "history_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if len(self.v_betas) != 2 or not all(0 <= beta < 1 for beta in self.v_betas):
            raise ValueError(f"v_betas is {self.v_betas}; give the two betas of Adam, each in [0, 1)")
        if not 0 < self.scope_budget < 1:
            raise ValueError(f"scope_budget is {self.scope_budget}; it must lie between 0 and 1")
        if not 0 < self.short_prompt_ratio <= 1:
            raise ValueError(f"short_prompt_ratio is {self.short_prompt_ratio}; it must lie in (0, 1]")
        if not self.mom2_adjustment:
            raise ValueError("mom2_adjustment is false; CoachHooK has no update without the key covariance")
        for name in PLACES:
            if given := getattr(self, name):
                setattr(self, name, os.path.expanduser(given))
        if self.use_hooks and self.scope == "leverage" and not self.dynamic_alpha:
            LOG.warning("dynamic_alpha is false, but scope: leverage has no alpha; the ablation needs scope: zscore")
        self.torch_device()

    @classmethod
    def from_hparams(cls, name_or_path: str | Path) -> CoachHooKHparams:
        """Read a YAML file: a path as the toolkit writes it (with or without `.yaml`), or a shipped name.

        Raises:
            FileNotFoundError: no such file and no shipped set of that name.
            ValueError, KeyError: an empty file, or a key that is unknown, missing or of the wrong type.
        """
        path = _find(str(name_or_path))
        with path.open(encoding="utf-8") as stream:
            try:
                config = yaml.safe_load(stream)
            except yaml.YAMLError as error:
                raise ValueError(f"{path}: not a YAML file ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: expected a mapping of hyperparameters, found {type(config).__name__}")
        try:
            return cls.from_dict(config)
        except (KeyError, ValueError) as error:
            raise type(error)(f"{path}: {error.args[0]}") from None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> CoachHooKHparams:
        """Build from a mapping; errors as in `from_hparams`."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(config) - set(fields))
        if unknown:
            raise KeyError(f"unknown hyperparameter {', '.join(map(repr, unknown))}; known: {', '.join(fields)}")
        required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in config]
        if missing or "alg_name" not in config:
            raise KeyError(f"missing hyperparameter {', '.join(map(repr, missing or ['alg_name']))}")
        config = dict(config)
        if config["model_name"] == SMALL_MODEL:
            from .smollm2 import smollm2_path

            config["model_name"] = smollm2_path()
        return cls(**config)

    @property
    def edited_layers(self) -> list[int]:
        """The blocks that are written: all of `layers`, or with `spread: boundary` the first and the last."""
        return self.layers if self.spread == "mean" else sorted({self.layers[0], self.layers[-1]})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain mapping (what `from_dict` takes)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def torch_device(self) -> torch.device:
        """`device` as PyTorch names it; a bare number means that CUDA device, as in the toolkit."""
        device = self.device
        if isinstance(device, torch.device):
            return device
        if device is None or device == "":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        text = str(device).strip()
        try:
            return torch.device(f"cuda:{text}" if text.isdigit() else text)
        except RuntimeError:
            raise ValueError(f"device is {device!r}; expected a number, 'cpu', 'cuda:1' or 'mps'") from None


CoachHooKHyperParams = CoachHooKHparams  # the toolkit's spelling

# Hyperparameters that may differ between two edits of one session: they say how to load, batch and score.
FREE = frozenset(
    {
        "model_name",
        "device",
        "model_parallel",
        "fp16",
        "batch_size",
        "max_length",
        "evaluation_type",
        "api_key",
        "target_tokens",
        "memory_device",
        "history_steps",
        "save_path",
        "load_path",
    }
)
PLACES = frozenset({"stats_dir", "session_dir", "save_path", "load_path"})  # a folder of edits holds what was there
SECRETS = frozenset({"api_key"})


def shared(hparams: Mapping[str, Any], without: frozenset[str] = PLACES | SECRETS) -> dict[str, Any]:
    """Hyperparameters as they mean the same elsewhere: neither places of this machine nor secrets."""
    told = {name: value for name, value in hparams.items() if name not in without}
    return told | {"mom2_dataset": Path(hparams["mom2_dataset"]).name}  # what was read of it is in the memory


def differing(in_force: CoachHooKHparams, given: CoachHooKHparams, free: frozenset[str] = FREE) -> list[str]:
    """What keeps edits from going on under other hyperparameters than those they were made with.

    Args:
        free: what may differ; for edits that come from a folder `FREE | PLACES`.
    """
    one, other = shared(in_force.to_dict(), free), shared(given.to_dict(), free)
    return [f"{name}: {one[name]!r} in force, {other[name]!r} given" for name in one if one[name] != other[name]]


def _find(name_or_path: str) -> Path:
    for candidate in (Path(name_or_path), Path(name_or_path + ".yaml")):
        if candidate.is_file():
            return candidate
    shipped = shipped_hparams(name_or_path)
    if shipped is None:
        names = ", ".join(shipped_names("CoachHooK"))
        raise FileNotFoundError(f"no hyperparameter file {name_or_path!r}; give a YAML path or one of: {names}")
    return shipped


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(CoachHooKHparams)


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or a ValueError; YAML writes 5e-1 as a string and 2 for 2.0."""
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        return _coerced(name, value, next(arg for arg in args if arg is not types.NoneType))
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, args))}")
    if origin is list and isinstance(value, list | tuple):
        return [_coerced(f"{name}[{i}]", item, args[0]) for i, item in enumerate(value)]
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float | str):
        try:
            if float(value).is_integer():
                return int(float(value))
        except ValueError:
            pass
    expected = origin or hint
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    shown = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{name} is {value!r} ({type(value).__name__}); expected {shown}")
