"""CoachHooK inside EasyEdit: the only place that imports `easyeditor`.

`import coachhook_plugin` calls `register()`, and that is all a user has to do: where `easyeditor` is imported already,
the method joins it now; otherwise it joins as soon as somebody imports it, from `$EASYEDIT_HOME` if that is set.
Without EasyEdit nothing happens. Two versions are known: a source checkout ("HEAD") and the registry's release 0.0.1.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .apply import Undo, apply_coachhook_to_model
from .imports import TOOLKIT, watch
from .registration import join

__all__ = ["Undo", "apply_coachhook_to_model", "import_easyeditor", "register"]


def register() -> None:
    """Make `CoachHooK` one of EasyEdit's methods, now or when EasyEdit is imported. Twice is once."""
    watch(join)


def import_easyeditor() -> ModuleType:
    """EasyEdit, with `CoachHooK` among its methods.

    It comes from `$EASYEDIT_HOME` (the top folder of a checkout) when that is set, else from where Python finds it.
    Parts whose packages are missing are left out and complain when used (see `imports`). The import leaves the random
    generators of Python, numpy and torch as they were; it configures `logging`, as EasyEdit always does.

    Raises:
        ImportError: there is no EasyEdit, or `$EASYEDIT_HOME` holds none.
    """
    register()
    try:
        return importlib.import_module(TOOLKIT)
    except ModuleNotFoundError as error:
        if error.name != TOOLKIT or "EASYEDIT_HOME" in str(error):
            raise
        raise ModuleNotFoundError(
            "EasyEdit is not installed; set EASYEDIT_HOME to the top folder of a checkout of zjunlp/EasyEdit, or "
            "pip install --no-deps easyeditor",
            name=TOOLKIT,
        ) from None
