"""The editing scope: which tokens the hook layers answer (paper, section 3.3).

Two rules stand side by side, chosen by the hyperparameter `scope`:

* `leverage` (`leverage.py`): how much of a token's key the edited keys account for. Causal: it looks at no other
  token.
* `zscore` (`zscore.py`): the paper's rule, which compares a token with the others of its sequence.

Each has an immutable state (part of the session's) and, for every hook layer, a gate (a module inside the model).
"""

from __future__ import annotations

from .gate import Gate, Scope, ScopeState
from .leverage import FollowingGate, LeverageScope, LeverageState
from .zscore import Thresholds, ZScoreGate, ZScoreScope, ZScoreState

__all__ = [
    "FollowingGate",
    "Gate",
    "LeverageScope",
    "LeverageState",
    "Scope",
    "ScopeState",
    "Thresholds",
    "ZScoreGate",
    "ZScoreScope",
    "ZScoreState",
]
