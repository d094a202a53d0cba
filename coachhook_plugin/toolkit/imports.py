"""Bring in `easyeditor`: from the right place, without the parts whose packages are missing, with our method in it.

Three things happen while `easyeditor` is being imported, and none before or after:

- it is taken from `$EASYEDIT_HOME` when that is set (`sys.path` stays: nothing else in that folder is exposed);
- a part of the toolkit that only pictures need (`PARTS`) and whose import fails is replaced by a placeholder module;
  a package that only some methods need (`PACKAGES`) and that is not installed is replaced by a placeholder in the
  toolkit's own modules. Whatever can be imported is imported: a complete environment sees no placeholder at all;
- the random generators of Python, numpy and torch come out as they went in (the toolkit seeds them all with 42).

A placeholder package is never put into `sys.modules`: other libraries ask there (or `importlib.util.find_spec`)
whether a package is available, and must not be told that it is. That is why the toolkit's import statements are
answered through `builtins.__import__`, which knows who asks, and not through a finder, which does not.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

TOOLKIT = "easyeditor"

# Parts of the toolkit for pictures and video (torchvision, timm, cv2, av ...).
PARTS = tuple(
    f"{TOOLKIT}.{part}"
    for part in (
        "trainer.blip2_models",
        "trainer.MultimodalTrainer",
        "editors.multimodal_editor",
        "dataset.processor",
        "dataset.coco_caption",
        "dataset.vqa",
        "dataset.adsedit",
        "dataset.ComprehendEdit",
        "evaluate.multimodal_evaluate",
    )
)

# Packages the text half imports at its top and uses in single methods or scores; import name -> what to install.
PACKAGES = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "einops": "einops",
    "higher": "higher",
    "hydra": "hydra-core",
    "matplotlib": "matplotlib",
    "nltk": "nltk",
    "omegaconf": "omegaconf",
    "openai": "openai",
    "pandas": "pandas",
    "peft": "peft",
    "rouge": "rouge",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "zhipuai": "zhipuai",
}


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class Placeholder(type):
    """Metaclass of the classes that stand for what could not be imported: they complain when used, not before."""

    reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(cls.reason)

    def __getattr__(cls, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        return _placeholder(f"{cls.__qualname__}.{name}", cls.reason)

    def __getitem__(cls, item: object) -> Placeholder:  # annotations, evaluated where a function is defined
        return cls


def _placeholder(name: str, reason: str) -> Placeholder:
    return Placeholder(name, (), {"reason": reason})


def _attributes_of(prefix: str, reason: str) -> Callable[[str], Placeholder]:
    """A module's `__getattr__` that answers every name with a placeholder class."""

    def answer(name: str) -> Placeholder:
        if _is_dunder(name):
            raise AttributeError(name)
        return _placeholder(f"{prefix}.{name}", reason)

    return answer


class _PartLoader(importlib.abc.Loader):
    """Loads a part of the toolkit; where that ends in an ImportError, leaves a placeholder module instead."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except ImportError as error:
            missing = f"the package {error.name!r}" if isinstance(error, ModuleNotFoundError) else "something else"
            reason = f"{module.__name__} could not be imported because it needs {missing}: {error}"
            for name in [name for name in vars(module) if not _is_dunder(name)]:
                delattr(module, name)
            vars(module)["__getattr__"] = _attributes_of(module.__name__, reason)

    def __getattr__(self, name: str) -> Any:  # get_source, is_package ... as the real loader answers them
        return getattr(self.loader, name)


class _ToolkitLoader(importlib.abc.Loader):
    """Loads the toolkit's top package and calls `after` on it."""

    def __init__(self, loader: importlib.abc.Loader, after: Callable[[ModuleType], None]):
        self.loader = loader
        self.after = after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with _same_randomness(), _lean():
            self.loader.exec_module(module)
        self.after(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class ToolkitFinder(importlib.abc.MetaPathFinder):
    """Answers for `easyeditor` only: from `$EASYEDIT_HOME` if set, else from wherever it would be found anyway."""

    def __init__(self, after: Callable[[ModuleType], None]):
        self.after = after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TOOLKIT:
            return None
        home = os.environ.get("EASYEDIT_HOME")
        home = os.path.abspath(os.path.expanduser(home)) if home else None
        spec = importlib.machinery.PathFinder.find_spec(fullname, [home] if home else None)
        if home and (spec is None or spec.loader is None):
            raise ModuleNotFoundError(
                f"EASYEDIT_HOME is {home!r}, but that folder has no package {TOOLKIT!r}; it must be the top folder of "
                "an EasyEdit checkout",
                name=TOOLKIT,
            )
        if spec is None or spec.loader is None:
            return None
        spec.loader = _ToolkitLoader(spec.loader, self.after)
        return spec


class _PartFinder(importlib.abc.MetaPathFinder):
    """While the toolkit is imported: gives each of `PARTS` a loader that may fail."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_part(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and spec.origin is not None:  # not a folder without __init__
            spec.loader = _PartLoader(spec.loader)
        return spec


def _is_part(name: str) -> bool:
    return name.startswith(PARTS) and any(name == part or name.startswith(part + ".") for part in PARTS)


@contextmanager
def _lean() -> Iterator[None]:
    """Placeholders for what is missing, inside the toolkit's own modules, for as long as the context lasts."""
    finder = _PartFinder()
    ordinary = builtins.__import__

    def lenient(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        try:
            return ordinary(name, globals, locals, fromlist or (), level)
        except ModuleNotFoundError as error:
            top = name.partition(".")[0]
            importer = str((globals or {}).get("__name__", ""))
            ours = importer.startswith(TOOLKIT + ".") and not _is_part(importer)
            if level or not ours or top not in PACKAGES or error.name != top:
                raise
            reason = f"{importer} needs the package {top!r}, which is not installed (pip install {PACKAGES[top]})"
            # `import a.b` binds a, `from a.b import c` reads c from a.b: a placeholder answers both.
            module = ModuleType(name if fromlist else top)
            vars(module)["__getattr__"] = _attributes_of(module.__name__, reason)
            return module

    sys.meta_path.insert(0, finder)
    builtins.__import__ = lenient
    try:
        yield
    finally:
        builtins.__import__ = ordinary
        sys.meta_path.remove(finder)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Give the caller's random generators back as they were."""
    import numpy
    import torch

    python, tensors = random.getstate(), torch.get_rng_state()
    arrays = numpy.random.get_state()  # noqa: NPY002 - the global generator is what the toolkit seeds
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    metal = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(tensors)
        if cuda is None:  # the seed that CUDA will start with
            torch.cuda.manual_seed_all(torch.initial_seed())
        else:
            torch.cuda.set_rng_state_all(cuda)
        if metal is not None:
            torch.mps.set_rng_state(metal)


def watch(after: Callable[[ModuleType], None]) -> None:
    """Call `after(easyeditor)` as soon as there is one: now, or right after somebody imports it. Twice is once."""
    toolkit = sys.modules.get(TOOLKIT)
    if toolkit is not None:
        after(toolkit)
    elif not any(isinstance(finder, ToolkitFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ToolkitFinder(after))
