"""`coachhook_config.json`: what a folder is, and the checksums of everything in it, itself included."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..fingerprint import Vocabulary
from .files import FolderError, canonical, write_text

NAME = "coachhook_config.json"
FORMAT = 1  # raise it when an older release would misread what is written
LATER = frozenset({"vocabulary", "sums"})  # that folders of earlier releases lack
UPDATE = "update coachhook-plugin"
PACKAGES = ("coachhook-plugin", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class File:
    """One file of the folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `coachhook_config.json`."""

    base_model: str
    dtype: str  # of the edited weights
    fingerprint: str  # `fingerprint.weights_fingerprint` of the base model
    hparams: dict[str, Any]
    prefixes: list[str] | None  # context prefixes the facts were learned behind; None: not sampled yet
    step: int  # that hook_layers and ledger tell of
    edits: int  # in force then
    columns: list[list[int]] | None  # of each step: sign and number of its factors' columns; None: Delta is dense
    files: dict[str, File]  # "hook_layers", "ledger" and, where it was saved, "memory"
    vocabulary: Vocabulary | None = None  # of the tokenizer; None: not known
    sums: str | None = None  # `fingerprint.weights_sums` of the base model, where the vocabulary is known
    steps: list[str] = field(default_factory=list)  # files under steps/ when this was written; later ones follow on
    revision: int = 1  # how often this file was written, so that none is like another
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    format: int = FORMAT

    @property
    def content(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None or name not in LATER}

    @property
    def digest(self) -> str:
        return hashlib.sha256(canonical(self.content)).hexdigest()

    def write(self, folder: Path) -> None:
        """Make the folder be this."""
        write_text(folder / NAME, json.dumps({**self.content, "digest": self.digest}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FolderError: there is none, it is damaged, or of a newer format.
        """
        path = folder / NAME
        damaged = FolderError(f"{path}: damaged; restore the folder from a copy")
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise FolderError(f"{folder}: holds no edits ({NAME} is missing); check the path") from None
        except OSError as error:
            raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise damaged from None
        if not isinstance(content, dict):
            raise damaged
        if isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise FolderError(
                f"{path}: written in format {content['format']}, and this release reads up to {FORMAT}; {UPDATE}"
            )
        digest = content.pop("digest", None)
        if digest != hashlib.sha256(canonical(content)).hexdigest():
            raise damaged
        known = {f.name for f in fields(cls)}
        if new := set(content) - known:
            raise FolderError(f"{path}: has entries that this release lacks ({', '.join(sorted(new))}); {UPDATE}")
        if known - LATER - set(content):
            raise damaged
        try:
            files = {role: File(**file) for role, file in content.pop("files").items()}
            told = content.pop("vocabulary", None)
            vocabulary = None if told is None else Vocabulary(**told)
        except (AttributeError, TypeError):
            raise damaged from None
        return cls(files=files, vocabulary=vocabulary, **content)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path
            found[package] = "unknown"
    return found
