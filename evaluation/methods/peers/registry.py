"""Where the toolkit keeps what belongs to a method: its entry, its hyperparameter class, its modules' globals."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

MODELS = "easyeditor.models"
TEMPLATES = "CONTEXT_TEMPLATES_CACHE"
CACHES = ("cache_c", "cache_c_new")  # of keys edited so far: AlphaEdit's, and of what is made after it
# Second moments of keys and what is made of them, by layer.
STATISTICS = ("COV_CACHE", "inv_mom2_cache", "P")


def registered(name: str) -> str:
    """The toolkit's spelling of a method's name.

    Raises:
        ValueError: this toolkit has no such method.
    """
    registry = _methods()
    for known in registry:
        if known.lower() == name.lower():
            return str(known)
    raise ValueError(
        f"method {name!r} is not in this EasyEdit, which has {', '.join(sorted(registry))}; set EASYEDIT_HOME to "
        "the top folder of a checkout for the newer ones"
    )


def hparams_class(algorithm: str) -> Any:
    """The hyperparameter class in the package that a method's apply function comes from.

    Raises:
        ValueError: there is none.
    """
    package = _package(algorithm)
    inside = modules(algorithm)
    base = importlib.import_module("easyeditor.util.hparams").HyperParams
    for module_name in inside:
        for name, found in sorted(vars(sys.modules[module_name]).items()):
            own = inspect.isclass(found) and issubclass(found, base) and found.__module__ in inside
            if own and "multimodal" not in name.lower() and "train" not in name.lower():
                return found
    raise ValueError(f"no hyperparameter class of {algorithm} was found in {package}")


def modules(algorithm: str) -> list[str]:
    """The loaded modules of a method's package."""
    package = _package(algorithm)
    return sorted(name for name in sys.modules if f"{name}.".startswith(f"{package}."))


def usual_memory(algorithm: str) -> tuple[str, ...]:
    """Contexts and caches among the globals of a method, by the names that all of them use: "module:name"."""
    return tuple(
        f"{module.removeprefix(f'{MODELS}.')}:{name}"
        for module in modules(algorithm)
        for names in ((TEMPLATES,), CACHES)
        if names[-1] in vars(sys.modules[module])  # the first edit makes the cache itself
        for name in names
    )


def statistics_held(algorithm: str) -> list[Any]:
    """What a method's modules hold of the key statistics."""
    return [
        vars(sys.modules[module])[name]
        for module in modules(algorithm)
        for name in STATISTICS
        if name in vars(sys.modules[module])
    ]


def place(where: str) -> tuple[Any, str]:
    """Module and name of a global that is told as "module:name" under `easyeditor.models`."""
    module, _, name = where.partition(":")
    return importlib.import_module(f"{MODELS}.{module}"), name


def _methods() -> dict[str, Any]:
    return dict(importlib.import_module("easyeditor.util.alg_dict").ALG_DICT)


def _package(algorithm: str) -> str:
    apply = _methods()[algorithm]
    owner = getattr(apply, "__self__", None)
    module: str = apply.__module__ if owner is None else type(owner).__module__
    return module.rpartition(".")[0]
