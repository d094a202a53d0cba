"""CoachHooK: consecutive batch model editing with hook layers, for Hugging Face models and the EasyEdit toolkit.

Importing this package is enough for the toolkit's `BaseEditor` to know the method.
"""

from .hparams import CoachHooKHparams, CoachHooKHyperParams
from .session import EditResult, EditSession, SessionState
from .tokens import Request

__version__ = "0.1.0"

__all__ = [
    "CoachHooKHparams",
    "CoachHooKHyperParams",
    "EditResult",
    "EditSession",
    "Request",
    "SessionState",
]
