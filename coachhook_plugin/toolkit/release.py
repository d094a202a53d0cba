"""What the registry's release of EasyEdit (0.0.1) needs to run today: other devices than CUDA, current transformers.

The release moves everything to `f"cuda:{hparams.device}"` and reads the output of a block as `output[0]`. Its code is
left as it is; its entry points are wrapped, and what is below acts only while one of them runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .devices import settle_device, torch_device
from .imports import TOOLKIT

Function = Callable[..., Any]


class _Redirect(TorchFunctionMode):
    """Sends what is meant for a CUDA device to `device` instead."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], self.device, *args[2:])
        return func(*map(self._instead, args), **{name: self._instead(value) for name, value in kwargs.items()})

    def _instead(self, value: Any) -> Any:
        named = isinstance(value, str) and value.startswith("cuda")
        return self.device if named or (isinstance(value, torch.device) and value.type == "cuda") else value


# The hyperparameters whose device is presented as a number, and the device the user asked for.
_PRESENTED: ContextVar[tuple[Any, Any] | None] = ContextVar("coachhook_presented", default=None)


@contextmanager
def as_cuda(hparams: Any) -> Iterator[int]:
    """Inside, `hparams.device` is a number and `f"cuda:{hparams.device}"` means the device asked for.

    A number, because nn.Module.to() reads the name before any redirection can help: it must be a valid one.
    """
    presented = _PRESENTED.get()
    if not hasattr(hparams, "device") or (presented is not None and presented[0] is hparams):
        yield getattr(hparams, "device", 0)
        return
    settle_device(hparams)
    asked = hparams.device
    target = torch_device(asked)
    number = (target.index or 0) if target.type == "cuda" else 0
    token = _PRESENTED.set((hparams, asked))
    hparams.device = number
    try:
        with nullcontext() if target.type == "cuda" else _Redirect(target):
            yield number
    finally:
        _PRESENTED.reset(token)
        hparams.device = asked


@contextmanager
def as_asked(hparams: Any) -> Iterator[None]:
    """Inside, `hparams.device` is what the user wrote, also within `as_cuda`."""
    presented = _PRESENTED.get()
    if presented is None or presented[0] is not hparams:
        yield
        return
    number, hparams.device = hparams.device, presented[1]
    token = _PRESENTED.set(None)
    try:
        yield
    finally:
        _PRESENTED.reset(token)
        hparams.device = number


@contextmanager
def tuple_blocks(model: nn.Module, hparams: Any) -> Iterator[None]:
    """Inside, blocks answer with a tuple, as they did before transformers 4.54; whatever follows a block unwraps it.

    Registered before the method's own hooks, so that those see the tuple.
    """
    pattern, norm = getattr(hparams, "layer_module_tmp", None), getattr(hparams, "ln_f_module", None)
    if not isinstance(pattern, str) or not isinstance(norm, str):  # a method that does not look at blocks
        yield
        return
    modules = dict(model.named_modules())
    blocks = [modules[pattern.format(i)] for i in range(len(modules)) if pattern.format(i) in modules]
    handles = [block.register_forward_hook(_wrap) for block in blocks]
    readers = [*blocks, *([modules[norm]] if norm in modules else [])]
    handles += [reader.register_forward_pre_hook(_unwrap, with_kwargs=True) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wrap(_: nn.Module, args: Any, answer: Any) -> Any:
    return (answer,) if isinstance(answer, torch.Tensor) else None


def _unwrap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def bare(value: Any) -> Any:
        return value[0] if isinstance(value, tuple) and len(value) == 1 else value

    if args:
        return (bare(args[0]), *args[1:]), kwargs
    return args, {name: bare(value) if name == "hidden_states" else value for name, value in kwargs.items()}


def bridged_method(apply: Function) -> Function:
    """One of the release's own methods: on the device asked for, with blocks as it knows them."""

    @functools.wraps(apply)
    def bridged(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, copy: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        model = deepcopy(model) if copy else model  # a copy made inside would keep the hooks of `tuple_blocks`
        with as_cuda(hparams), tuple_blocks(model, hparams):
            return apply(model, tok, requests, hparams, False, *args, **kwargs)

    return bridged


def bridge(methods: dict[str, Function]) -> None:
    """Wrap the release's methods and its scoring (both can be called without an editor); mend its loader."""
    for name, apply in list(methods.items()):
        if next(iter(inspect.signature(apply).parameters)) == "model":  # "FT-Api" has none
            methods[name] = bridged_method(apply)
    score = importlib.import_module(f"{TOOLKIT}.evaluate.evaluate").compute_edit_quality

    @functools.wraps(score)
    def compute_edit_quality(
        model: Any, model_name: Any, hparams: Any, tok: Any, record: Any, device: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with as_cuda(hparams) as number:
            return score(model, model_name, hparams, tok, record, number, *args, **kwargs)

    importlib.import_module(f"{TOOLKIT}.editors.editor").__dict__["LlamaTokenizer"] = _FolderTokenizer
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == TOOLKIT and vars(module).get("compute_edit_quality") is score:
            vars(module)["compute_edit_quality"] = compute_edit_quality


class _FolderTokenizer:
    """Stands for LlamaTokenizer in the release's editor, which reads every "llama" with it.

    From transformers 5 on that class builds a SentencePiece-like tokenizer out of any vocabulary, and a byte-level one
    (Llama 3, SmolLM2) loses its spaces; so this reads the tokenizer that the model folder describes.
    """

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from transformers import AutoTokenizer  # slow to import; with a model it is there

        return AutoTokenizer.from_pretrained(*args, **kwargs)


def settle_padding(editor: Any) -> None:
    """The padding side that the release means to set for a "llama", whatever class its tokenizer has."""
    if isinstance(editor.model_name, str) and "llama" in editor.model_name.lower() and editor.tok is not None:
        editor.tok.padding_side = "right" if editor.alg_name in ("ROME", "MEMIT") else "left"


def normal_edit(self: Any, prompts: list[str], target_new: list[str], sequential_edit: bool = False) -> Any:
    """`BaseEditor.normal_edit`, which the release lacks: all edits in one batch, no scores, restored at the end."""
    requests = self._prepare_requests(prompts, target_new, ["<|endoftext|>"] * len(prompts))
    edited_model, original = self.apply_algo(
        self.model, self.tok, requests, self.hparams, copy=False, return_orig_weights=True, keep_original_weight=True
    )
    with torch.no_grad():
        for name, value in original.items():
            self.model.get_parameter(name).copy_(value)
    return None, edited_model, original


def in_chunks(batch_edit: Function) -> Function:
    """`BaseEditor.batch_edit` of the release returns the scores of its last chunk only: call it once for each."""
    signature = inspect.signature(batch_edit)

    @functools.wraps(batch_edit)
    def every_chunk(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        total, size = len(given.arguments["prompts"]), self.hparams.batch_size
        if total <= size:
            return batch_edit(self, *args, **kwargs)
        scores: list[Any] = []
        rest: tuple[Any, ...] = ()
        for start in range(0, total, size):
            part = {name: _part(value, start, start + size, total) for name, value in given.arguments.items()}
            extra = part.pop("kwargs", {})
            chunk, *rest = batch_edit(**part, **extra)
            scores += chunk
        return (scores, *rest)

    return every_chunk


def _part(value: Any, start: int, stop: int, total: int) -> Any:
    """Cut what has one entry for each request."""
    if isinstance(value, dict):
        return {key: _part(entry, start, stop, total) for key, entry in value.items()}
    return value[start:stop] if isinstance(value, list | tuple) and len(value) == total else value
