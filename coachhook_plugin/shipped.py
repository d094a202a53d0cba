"""Where the hyperparameter files that come with the package are: one folder per method, one file per model."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_hparams", "shipped_names"]

# An installed package carries them inside itself; a checkout (also one installed with -e) has them next to it.
_ROOTS = (Path(__file__).parent / "_hparams", Path(__file__).parent.parent / "hparams")


def shipped_hparams(name: str, method: str = "CoachHooK") -> Path | None:
    """The shipped file for `name` (with or without `.yaml`), or None; `shipped_names` lists what there is."""
    stem = name.removesuffix(".yaml")
    return _files(method).get(stem)


def shipped_names(method: str = "CoachHooK") -> list[str]:
    """Names of the shipped files for `method`, sorted."""
    return sorted(_files(method), key=str.lower)


def _files(method: str) -> dict[str, Path]:
    for root in _ROOTS:
        # Compared by name, not joined: "../x" names no file, and case counts on every file system.
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.name == method:
                return {path.stem: path for path in folder.glob("*.yaml")}
    return {}
