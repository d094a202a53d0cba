"""Where CoachHooK joins EasyEdit: registry, batchable methods, callable undos, and the editor's entry methods."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from . import release
from .apply import apply_coachhook_to_model, run, running
from .datasets import keep_subjects
from .devices import settle_device
from .imports import TOOLKIT
from .release import Function

NAME = "CoachHooK"
ENTRIES = ("edit", "batch_edit", "edit_requests", "edit_dataset", "normal_edit", "generate_edit")
MARK = "_coachhook_joined"


def join(toolkit: ModuleType) -> None:
    """Add CoachHooK to `toolkit`. Once is enough; a second call changes nothing."""
    if vars(toolkit).get(MARK):
        return
    is_release = importlib.util.find_spec(f"{TOOLKIT}.util.device") is None
    methods: dict[str, Function] = _module("util.alg_dict").ALG_DICT
    if is_release:
        release.bridge(methods)
    methods[NAME] = _release_apply if is_release else apply_coachhook_to_model
    _make_batchable(_module("editors.batch_editor").BatchEditor)
    callable_undos = getattr(None if is_release else _module("editors.utils"), "CALLABLE_RESTORE_ALGS", None)
    if isinstance(callable_undos, set):
        callable_undos.add(NAME)
    _wrap_editor(_module("editors.editor").BaseEditor, is_release)
    keep_subjects(_module("dataset.zsre").ZsreDataset)
    setattr(toolkit, MARK, True)


def _module(name: str) -> Any:
    return importlib.import_module(f"{TOOLKIT}.{name}")


@functools.wraps(apply_coachhook_to_model)
def _release_apply(model: Any, tok: Any, requests: Any, hparams: Any, *args: Any, **kwargs: Any) -> Any:
    with release.as_asked(hparams):
        return apply_coachhook_to_model(model, tok, requests, hparams, *args, **kwargs)


def _make_batchable(batch_editor: Any) -> None:
    known = batch_editor.is_batchable_method
    batch_editor.is_batchable_method = staticmethod(lambda alg_name: alg_name == NAME or known(alg_name))


def _wrap_editor(editor: Any, is_release: bool) -> None:
    editor.__init__ = _initialiser(editor.__init__, is_release)
    if not hasattr(editor, "normal_edit"):
        editor.normal_edit = release.normal_edit
    for name in ENTRIES:
        if hasattr(editor, name):
            setattr(editor, name, _entry(getattr(editor, name), is_release))


def _initialiser(initialise: Function, is_release: bool) -> Function:
    @functools.wraps(initialise)
    def __init__(self: Any, hparams: Any) -> None:
        settle_device(hparams)
        with release.as_cuda(hparams) if is_release else nullcontext():
            initialise(self, hparams)
        if is_release:
            release.settle_padding(self)
        if not isinstance(self.model_name, str):  # a (model, tokenizer) pair; the scores look for "t5" in a name
            self.model_name = str(getattr(getattr(self.model, "config", None), "model_type", "model"))

    return __init__


def _entry(method: Function, is_release: bool) -> Function:
    """An editor's method that edits: the model ends with the edits that stay and only those, however it ends."""
    signature = inspect.signature(method)
    chunked = release.in_chunks(method) if is_release and method.__name__ == "batch_edit" else method

    @functools.wraps(method)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        with release.as_cuda(self.hparams) if is_release else nullcontext():
            if self.alg_name != NAME or running():
                return method(self, *args, **kwargs)
            subjects = kwargs.pop("subject", None) if method.__name__ == "normal_edit" else None
            sequential = kwargs.pop("sequential_edit", None) if "sequential_edit" not in signature.parameters else None
            given = signature.bind(self, *args, **kwargs).arguments
            keep = bool(given.get("sequential_edit", sequential)) or given.get("keep_original_weight") is False
            size = getattr(self.hparams, "batch_size", None)
            try:
                subjects = [subjects] if isinstance(subjects, str) else subjects
                with run(self.model, self.tok, self.hparams, keep, subjects):
                    return chunked(self, *args, **kwargs)
            finally:
                if is_release:  # its `edit` writes 1 into the caller's hyperparameters
                    self.hparams.batch_size = size

    return entry
