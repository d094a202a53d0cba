"""CoachHooK: consecutive batch model editing with hook layers, for Hugging Face models and the EasyEdit toolkit.

Importing this package is enough for the toolkit's `BaseEditor` to know the method.
"""

from typing import Any

from .hparams import CoachHooKHparams, CoachHooKHyperParams
from .persistence import load_edits
from .session import EditResult, EditSession
from .state import SessionState
from .store import FolderError
from .tokens import Request
from .toolkit import register

__version__ = "0.1.0"

__all__ = [
    "CoachHooKHparams",
    "CoachHooKHyperParams",
    "EditResult",
    "EditSession",
    "FolderError",
    "Request",
    "SessionState",
    "load_edits",
]


def __getattr__(name: str) -> Any:
    if name == "CoachHooKEditor":  # needs EasyEdit, which the rest does not
        from .editor import CoachHooKEditor

        return CoachHooKEditor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
