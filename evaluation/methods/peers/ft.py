"""FT: gradient steps on one layer's projection."""

from __future__ import annotations

from .base import Peer


class FineTuning(Peer):
    """The toolkit's FT-L and FT-M."""

    newer = ("objective_optimization",)
