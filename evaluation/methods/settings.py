"""The hyperparameters of a run: a YAML file, by path or shipped, and what a run changes in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from coachhook_plugin.hparams import CoachHooKHparams
from coachhook_plugin.shipped import shipped_hparams, shipped_names

COACHHOOK = "CoachHooK"
# Where the shipped files of a method are, if not under its name in lower case.
ALGORITHMS = {
    name.lower(): name
    for name in (
        COACHHOOK,
        "MEMIT",
        "ROME",
        "FT",
        "WISE",
        "AlphaEdit",
        "UltraEdit",
        "GRACE",
        "EMMET",
        "R-ROME",
        "SimIE",
    )
}


def settings(
    name: str, model: str, changes: Mapping[str, Any] | None = None, path: str | Path | None = None
) -> dict[str, Any]:
    """The hyperparameters of method `name` for `model`, with `changes` in them.

    Args:
        path: a YAML file to take instead of the shipped one.

    Raises:
        ValueError: no such file, one of another method, nothing shipped, or a change of something that the file does
            not have.
    """
    algorithm = ALGORITHMS.get(name.lower(), name)
    found = Path(path) if path else shipped_hparams(model, algorithm)
    if found is None:
        names = ", ".join(shipped_names(algorithm)) or "none"
        raise ValueError(
            f"no hyperparameters of {algorithm} for {model!r} are shipped (there are: {names}); give your own file "
            "with method.hparams=<path>"
        )
    if not found.is_file():
        raise ValueError(f"method.hparams is {str(found)!r}, which is no file; give the path of a YAML file")
    config = yaml.safe_load(found.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "alg_name" not in config:
        raise ValueError(f"{found}: no hyperparameters of a method; it must be a mapping with alg_name")
    held = str(config["alg_name"])
    if held.lower() != algorithm.lower():
        raise ValueError(
            f"{found}: hyperparameters of {held}, and {algorithm} was asked for; give method={held.lower()} or "
            "another file"
        )
    # CoachHooK's file may leave out what has a default.
    known = [field.name for field in dataclasses.fields(CoachHooKHparams)] if held == COACHHOOK else list(config)
    unknown = sorted(set(changes or {}) - set(known))
    if unknown:
        raise ValueError(f"{found}: has no {', '.join(unknown)} to change; it has {', '.join(known)}")
    return {**config, **(changes or {})}


def inner_settings(config: Mapping[str, Any], model: str, path: str | Path | None = None) -> dict[str, Any] | None:
    """The hyperparameters of the method inside another one (SimIE's `base_method`); None where there is none."""
    base = config.get("base_method")
    return settings(base, model, path=path) if base else None
