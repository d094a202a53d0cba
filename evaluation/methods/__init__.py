"""The methods a run can compare, each on the same model and the same key statistics.

    method = build("coachhook", "smollm2-135m", folder)
    method.edit(records)

`coachhook` is this project's; any other name is one of the toolkit's own registry (`memit`, `wise`, ...), as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coachhook_plugin  # noqa: F401  (makes CoachHooK one of the toolkit's methods)
from coachhook_plugin.hparams import CoachHooKHparams

from ..protocol import EditingMethod
from .coachhook import CoachHooK
from .peers import Peer, peer
from .settings import COACHHOOK, inner_settings, settings
from .statistics import toolkit_statistics

__all__ = ["CoachHooK", "Peer", "build", "settings", "toolkit_statistics"]


def build(
    name: str,
    model: str,
    folder: Path,
    given: Mapping[str, Any] | None = None,
    statistics: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> EditingMethod:
    """The method called `name`, ready to edit.

    Args:
        model: name of the shipped hyperparameters.
        folder: where a toolkit method writes what it prints, and files of its own.
        given: hyperparameters as a mapping (`settings`); those shipped for `model` where not given.
        statistics: CoachHooK's hyperparameters that say which key statistics are shared; those for `model`.
        base: hyperparameters of the method inside it (SimIE's); those shipped for `model` where not given.

    Raises:
        ValueError: the toolkit at hand has no such method, or nothing is shipped for the model.
    """
    logging.getLogger().setLevel(logging.WARNING)
    config = dict(given) if given is not None else settings(name, model)
    if config["alg_name"] == COACHHOOK:
        return CoachHooK(CoachHooKHparams.from_dict(config))
    inside = base or inner_settings(config, model)
    return peer(config, CoachHooKHparams.from_hparams(statistics or model), folder, inside)
