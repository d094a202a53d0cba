"""The toolkit's own methods, each as it is; a class of its own for those that are particular in some way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coachhook_plugin.hparams import CoachHooKHparams

from .adapters import Grace, Wise
from .alphaedit import AlphaEdit
from .base import Peer, set_batch_size
from .ft import FineTuning
from .registry import TEMPLATES
from .rome import Rome, SimIE
from .ultraedit import UltraEdit

__all__ = ["TEMPLATES", "Peer", "peer", "set_batch_size"]

# By the name that the registry knows it by, in lower case.
CLASSES: dict[str, type[Peer]] = {
    "alphaedit": AlphaEdit,
    "ft": FineTuning,
    "grace": Grace,
    "r-rome": Rome,
    "rome": Rome,
    "simie": SimIE,
    "ultraedit": UltraEdit,
    "wise": Wise,
}


def peer(
    config: Mapping[str, Any], ours: CoachHooKHparams, folder: Path, base: Mapping[str, Any] | None = None
) -> Peer:
    """The method that `config` is of; arguments and errors as `Peer`'s."""
    return CLASSES.get(str(config["alg_name"]).lower(), Peer)(config, ours, folder, base)
